"""WebDataset: archives in which the members of a sample share a name."""

from __future__ import annotations

import bz2
import gzip
import lzma
import tarfile
import zlib
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path, PurePosixPath
from types import SimpleNamespace
from typing import Any

from dalle_ds.data import reasons
from dalle_ds.data.corpora import files
from dalle_ds.data.corpora.files import is_image, is_system, suffix_of
from dalle_ds.data.corpora.pairs import Broken, Corpus, RawPair, Unit, Unpaired, Unusable, columns_of, or_broken
from dalle_ds.data.images import image_suffixes
from dalle_ds.errors import DataError

TEXT_SUFFIXES = (".txt", ".json")
TAR_SUFFIXES = (".tar", ".tar.gz", ".tgz", ".tar.bz2", ".tbz2", ".tar.xz", ".txz")
_PACKED: dict[bytes, Callable[..., Any]] = {b"\x1f\x8b": gzip.open, b"BZh": bz2.open, b"\xfd7zXZ": lzma.open}
"""First bytes of what is packed → how it is opened; one file may be several that were packed one by one."""
_ZEROS = 2**16
"""Blocks of 512 bytes that are skipped between archives in one file; the usual padding is some ten."""


def read_webdataset(source: str, caption_column: str | None = None) -> Corpus:
    """WebDataset tars: a tar file, packed or not, or a folder of them. Members that share a name up to the first dot and
    follow each other are one sample; where a complete one is followed by another of the same name, both are samples.

    A sample is an image (.jpg, .png, .webp, …; the first counts) and a .txt (one caption per line) or a .json (captions
    under `caption_column`, by default "caption" or "text"); with both, the .txt counts.
    A tar that ends early, or without its end marker, yields the samples before the end and one `Broken`; so does a packed
    one whose checksum is wrong, which stands behind the samples. Where a name is repeated in an order that does not show
    where a sample ends, what may have the caption of another is `Broken`.

    Raises:
        DataError: no such file or folder, or no tar in it.
    """
    path = files.existing(source)
    found = files.walk(path) if path.is_dir() else []
    tars = [entry.path for entry in found if is_tar(entry.name)] if path.is_dir() else [path]
    if not tars:
        raise DataError(f"{path} has no .tar files: --corpus webdataset needs a .tar or a folder of them")

    def units() -> Iterator[Unit]:
        for tar in tars:
            yield Unit(tar.name, partial(_read_tar, tar, caption_column))
        yield files.others(lambda: (entry for entry in found if not is_tar(entry.name)), reasons.OTHER)

    return Corpus(units, units_per_part=1)


def is_tar(name: str) -> bool:
    """Whether a file's name is that of a tar that can be read."""
    return name.lower().endswith(TAR_SUFFIXES) and not is_system(name)


class _NoEndMarker(tarfile.ReadError):
    """The archive ends where a member would begin."""


class _Header(tarfile.TarInfo):
    """The header of a member, damaged ones of which tarfile would take for the end of the archive. Each archive has a class of
    its own, which knows where in the archive it is."""

    zeros: int | None = None
    """Blocks of an end marker that were read last; None before the first block."""

    @classmethod
    def frombuf(cls, buf: bytes | bytearray, encoding: str, errors: str) -> _Header:
        if len(buf) == tarfile.BLOCKSIZE and not any(buf):
            cls.zeros = (cls.zeros or 0) + 1
            if cls.zeros > _ZEROS:
                raise tarfile.ReadError("zeros without an end")
        elif not buf and not cls.zeros:
            raise _NoEndMarker("no end marker")
        try:
            header = super().frombuf(buf, encoding, errors)
        except (tarfile.InvalidHeaderError, tarfile.TruncatedHeaderError) as error:  # type: ignore[attr-defined]
            raise tarfile.ReadError(str(error)) from error
        cls.zeros = 0
        extended = not (header.isreg() or header.isdir() or header.issym() or header.islnk() or header.isdev())
        if header.size < 0 or (extended and header.size > files.MAX_TEXT_BYTES):  # a name or comment, read as a whole
            raise tarfile.ReadError(f"header of {header.size} bytes")
        return header


@dataclass
class TarSample:
    """Members of an archive that share a name up to the first dot."""

    archive: str = ""
    key: str = ""
    image: bytes | None = None
    """The first image; None where there is none, or it is too big."""
    has_image: bool = False
    texts: dict[str, bytes | None] = field(default_factory=dict)
    """Suffix → contents; None where they are too big."""
    others: list[Broken] = field(default_factory=list)
    """Images that cannot be the sample's, and why."""
    suffixes: list[str] = field(default_factory=list)
    """Of its members, in their order."""
    ambiguous: bool = False
    """Whether it has a second image of the same name before any text: of which of them the text is, is not sure."""
    before: list[str] | None = None
    """Where the sample before it has the same name: the suffixes of that one."""
    repeated: bool = False
    """Whether the sample behind it has the same name."""

    @property
    def name(self) -> str:
        """For people."""
        return f"{self.archive}/{self.key}"

    def begins_anew(self, key: str, suffix: str) -> bool:
        """Whether a member is of the next sample."""
        is_whole = self.has_image and bool(self.texts) and not self.ambiguous
        return key != self.key or (suffix in self.suffixes and is_whole)

    def is_sure(self, used: str) -> bool:
        """Whether this text is its own: a second one may begin the next sample of its name, unless all have that order."""
        may_begin = self.repeated and self.before != self.suffixes and used in [*self.texts][1:]
        return not self.ambiguous and not may_begin

    def complete(self) -> Iterator[TarSample | Broken]:
        """The sample, and images that are not in it, now that nothing more comes."""
        # Without an image of its own, what captions there are belong to them.
        yield from (Unpaired(other.name, other.reason) if self.has_image else other for other in self.others)
        if self.has_image or (self.texts and not self.others):
            yield self

    def unused(self, suffix: str | None) -> Iterator[Unpaired]:
        """Texts of a sample of which only this one is used."""
        return (Unpaired(f"{self.name}{other}", reasons.CAPTION_UNUSED) for other in self.texts if other != suffix)


def tar_samples(path: Path) -> Iterator[TarSample | Broken]:
    """The samples of an archive; where it ends early or is damaged, a `Broken` is the last."""
    header: Any = type("_HeaderOfThis", (_Header,), {})
    sample = TarSample()
    empty = True
    try:
        if not path.is_file():  # a pipe would be waited for
            yield Broken(path.name, reasons.NOT_A_FILE)
            return
        with path.open("rb") as file:
            head = file.read(6)
        opened = next((opened for magic, opened in _PACKED.items() if head.startswith(magic)), open)
        # `read1` passes on what there is before an error. All is read, to the checksum at the end.
        with (
            opened(path, "rb") as file,
            tarfile.open(fileobj=SimpleNamespace(read=file.read1), mode="r|", tarinfo=header, ignore_zeros=True) as tar,
        ):
            for member in tar:
                # tarfile would keep the headers of all, which nobody asks for again.
                tar.members = []  # type: ignore[attr-defined]
                if member.isdir():
                    continue
                empty = False
                place = PurePosixPath(member.name)
                name = f"{path.name}/{place}"
                if not member.isfile():
                    yield Unpaired(name, reasons.NOT_A_FILE)
                    continue
                if is_system(member.name) or not (is_image(member.name) or suffix_of(member.name) in TEXT_SUFFIXES):
                    yield Unpaired(name, files.unpaired_reason(member.name))
                    continue
                stem, _, suffix = place.name.partition(".")
                key, suffix = str(place.parent / stem), f".{suffix.lower()}"
                if sample.begins_anew(key, suffix):
                    sample.repeated = key == sample.key
                    yield from sample.complete()
                    sample = TarSample(path.name, key, before=sample.suffixes if sample.repeated else None)
                yield from _put(sample, suffix, name, tar, member)
            yield from sample.complete()
    except (tarfile.TarError, OSError, EOFError, ValueError, OverflowError, zlib.error, lzma.LZMAError) as error:
        # Whether what came before is whole: a sample that has all it needs is, too, at the end of a file without a marker.
        whole = bool(header.zeros) or (isinstance(error, _NoEndMarker) and sample.has_image and bool(sample.texts))
        if whole:
            yield from sample.complete()
        name = sample.name if sample.key and not whole else path.name
        if isinstance(error, OSError) and error.errno is not None:
            yield Broken(name, reasons.UNREADABLE)
        elif header.zeros is None:
            yield Broken(name, reasons.NO_ARCHIVE)
        else:
            yield Broken(name, reasons.BEHIND_THE_END if header.zeros else reasons.TRUNCATED)
    else:
        if empty:
            yield Unpaired(path.name, reasons.NOTHING_IN_IT)


def _put(sample: TarSample, suffix: str, name: str, tar: tarfile.TarFile, member: tarfile.TarInfo) -> Iterator[Broken]:
    """Put an image or text into a sample, or tell why not."""
    plain = suffix_of(name) == suffix
    if is_image(name):
        if not plain:
            sample.others.append(Broken(name, reasons.SEVERAL_DOTS))
        elif suffix not in image_suffixes():
            sample.others.append(Broken(name, reasons.FORMAT))
        elif sample.has_image:
            sample.ambiguous = sample.ambiguous or (suffix in sample.suffixes and not sample.texts)
            yield Broken(name, reasons.ANOTHER_IMAGE)
        else:
            sample.image, sample.has_image = _content(tar, member, files.MAX_IMAGE_BYTES), True
    elif plain and suffix not in sample.texts:
        sample.texts[suffix] = _content(tar, member, files.MAX_TEXT_BYTES)
    else:
        yield Unpaired(name, reasons.CAPTION_UNUSED if plain else reasons.SEVERAL_DOTS)
    sample.suffixes.append(suffix)


def _content(tar: tarfile.TarFile, member: tarfile.TarInfo, limit: int) -> bytes | None:
    file = tar.extractfile(member)
    assert file is not None, "a regular member has contents"
    return file.read() if member.size <= limit else None


def _read_tar(path: Path, caption_column: str | None) -> Iterator[RawPair | Broken]:
    for sample in tar_samples(path):
        if isinstance(sample, Broken):
            yield sample
            continue
        used = ".txt" if ".txt" in sample.texts and caption_column is None else ".json"
        yield or_broken(sample.name, _tar_pair, sample, used, caption_column)
        yield from sample.unused(used)


def _tar_pair(sample: TarSample, used: str, caption_column: str | None) -> RawPair:
    if not sample.has_image:
        raise Unusable(reasons.NO_IMAGE)
    if not sample.is_sure(used):
        raise Unusable(reasons.AMBIGUOUS)
    text = sample.texts.get(used, b"{}")
    if text is None:
        raise Unusable(reasons.TOO_BIG)
    if used == ".txt":
        captions: Any = files.lines_of(text)
    else:
        fields = files.json_of(text)
        captions = columns_of(None, caption_column)[1].value(fields) if isinstance(fields, dict) else None
    if sample.image is None:
        raise Unusable(reasons.TOO_BIG)
    return RawPair.of(sample.image, captions, sample.name)
