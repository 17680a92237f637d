"""WebDataset: archives in which the members of a sample share a name."""

from __future__ import annotations

import lzma
import tarfile
import zlib
from collections.abc import Iterator
from dataclasses import dataclass
from functools import partial
from pathlib import Path, PurePosixPath

from dalle_ds.data.corpora.pairs import (
    CAPTION_COLUMNS,
    IMAGE_SUFFIXES,
    MAX_PICTURE_BYTES,
    MAX_TEXT_BYTES,
    NO_PICTURE,
    TOO_BIG,
    TRUNCATED,
    UNREADABLE,
    Broken,
    Corpus,
    RawPair,
    Unit,
    Unusable,
    as_captions,
    existing,
    lines_of,
    pair_of,
)
from dalle_ds.errors import DataError
from dalle_ds.parsing import parse_json

TEXT_SUFFIXES = (".txt", ".json")


def read_webdataset(source: str, caption_column: str | None = None) -> Corpus:
    """WebDataset tars: a .tar file, or a folder of them. Members that share a name up to the first dot are one sample.

    A sample is a picture (.jpg, .png, .webp, …) and a .txt (one caption per line) or a .json (captions under
    `caption_column`, by default "caption" or "text"); with both, the .txt counts.
    A tar that ends early yields the samples before the end and one `Broken`.

    Raises:
        DataError: no such file or folder, or no .tar in it.
    """
    path = existing(source)
    tars = sorted(path.rglob("*.tar")) if path.is_dir() else [path]
    if not tars:
        raise DataError(f"{path} has no .tar files: --corpus webdataset needs a .tar or a folder of them")
    return Corpus(lambda: (Unit(tar.name, partial(_read_tar, tar, caption_column)) for tar in tars))


class _Header(tarfile.TarInfo):
    """The header of a member, damaged ones of which tarfile would take for the end of the archive."""

    @classmethod
    def frombuf(cls, buf: bytes | bytearray, encoding: str, errors: str) -> _Header:
        try:
            header = super().frombuf(buf, encoding, errors)
        except (tarfile.InvalidHeaderError, tarfile.TruncatedHeaderError) as error:  # type: ignore[attr-defined]
            raise tarfile.ReadError(str(error)) from error
        extended = not (header.isreg() or header.isdir() or header.issym() or header.islnk() or header.isdev())
        if header.size < 0 or (extended and header.size > MAX_TEXT_BYTES):  # a name or comment, read as a whole
            raise tarfile.ReadError(f"header of {header.size} bytes")
        return header


_OTHERS = "others"  # no suffix: stands for all members of a sample that are neither pictures nor captions


def _read_tar(path: Path, caption_column: str | None) -> Iterator[RawPair | Broken]:
    for sample in tar_samples(path):
        yield sample if isinstance(sample, Broken) else _tar_pair(sample, caption_column)


@dataclass(frozen=True)
class TarSample:
    """Members of an archive that share a name up to the first dot."""

    name: str
    members: dict[str, bytes | None]
    """Suffix → contents of pictures and texts; None where they are too big, or of another kind."""

    def picture(self) -> tuple[bytes | None, bool]:
        """(contents, or None where they are too big; whether there is a picture)."""
        suffix = next((suffix for suffix in IMAGE_SUFFIXES if suffix in self.members), None)
        return (None, False) if suffix is None else (self.members[suffix], True)


def tar_samples(path: Path) -> Iterator[TarSample | Broken]:
    """The samples of an archive; where it ends early or is damaged, a `Broken` is the last."""
    key = ""
    members: dict[str, bytes | None] = {}
    try:
        with tarfile.open(path, "r|*", tarinfo=_Header) as tar:
            for member in tar:
                # tarfile would keep the headers of all, which nobody asks for again.
                tar.members = []  # type: ignore[attr-defined]
                member_key, suffix = _key_and_suffix(member.name)
                if not member.isfile():
                    continue
                if member_key != key:
                    if members:
                        yield TarSample(f"{path.name}/{key}", members)
                    key, members = member_key, {}
                if suffix not in (*IMAGE_SUFFIXES, *TEXT_SUFFIXES):
                    members[_OTHERS] = None
                    continue
                limit = MAX_PICTURE_BYTES if suffix in IMAGE_SUFFIXES else MAX_TEXT_BYTES
                if suffix not in members:
                    members[suffix] = _tar_member(tar, member) if member.size <= limit else None
            if members:
                yield TarSample(f"{path.name}/{key}", members)
    # TypeError: tarfile takes the letter's code of what is missing in a gzip header that is cut off.
    except (tarfile.TarError, OSError, EOFError, ValueError, OverflowError, TypeError, zlib.error, lzma.LZMAError):
        yield Broken(path.name, TRUNCATED)


def _tar_member(tar: tarfile.TarFile, member: tarfile.TarInfo) -> bytes:
    file = tar.extractfile(member)
    assert file is not None, "a regular member has contents"
    return file.read()


def _key_and_suffix(name: str) -> tuple[str, str]:
    path = PurePosixPath(name)
    stem, _, suffix = path.name.partition(".")
    return str(path.parent / stem), f".{suffix.lower()}"


def _tar_pair(sample: TarSample, caption_column: str | None) -> RawPair | Broken:
    image, there = sample.picture()
    if not there:
        return Broken(sample.name, NO_PICTURE)
    try:
        captions = _tar_captions(sample.members, caption_column)
    except Unusable as error:
        return Broken(sample.name, error.reason)
    except ValueError:
        return Broken(sample.name, UNREADABLE)
    return Broken(sample.name, TOO_BIG) if image is None else pair_of(image, captions, sample.name)


def _tar_captions(members: dict[str, bytes | None], caption_column: str | None) -> list[str]:
    has_text = ".txt" in members and caption_column is None
    content = members[".txt"] if has_text else members.get(".json", b"{}")
    if content is None:
        raise Unusable(TOO_BIG)
    if has_text:
        return lines_of(content)
    fields = parse_json(content)
    names = CAPTION_COLUMNS if caption_column is None else (caption_column,)
    return next((as_captions(fields[name]) for name in names if isinstance(fields, dict) and name in fields), [])
