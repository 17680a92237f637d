"""What a corpus consists of, and what its readers share.

A corpus is a sequence of units that can be read one without the other (a picture, a row of a table, an archive), so that
several machines can share the work. What cannot be read is yielded as a `Broken`, so that it is counted and named in the
report of the preparation. Sources may come from anywhere: archives are read and never unpacked, only regular files are
opened, and nothing is read that is absurdly long.
"""

from __future__ import annotations

import hashlib
import os
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from dalle_ds.errors import DataError

IMAGE_SUFFIXES = (".jpg", ".jpeg", ".png", ".webp", ".gif", ".bmp", ".tif", ".tiff")
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


def content_group(image: bytes) -> str:
    """The group of a picture in corpora without groups of their own: equal files are one group."""
    return hashlib.sha256(image).hexdigest()[:16]


def existing(source: str) -> Path:
    """The path of a source; `DataError` where there is nothing."""
    path = Path(source)
    if not path.exists():
        raise DataError(f"source {path} does not exist")
    return path


def column_of(option: str, wanted: str | None, usual: tuple[str, ...], columns: Iterable[str], where: Path) -> str:
    """The column that is wanted, or the first of the usual ones; `DataError` where there is none."""
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
    """A pair that is a group by itself, but for equal files."""
    if not captions:
        return Broken(name, NO_CAPTION)
    return RawPair(image, captions, name, content_group(image))


def pair_of_file(folder: Path, file_name: Any, captions: list[str], name: str) -> RawPair | Broken:
    """`pair_of` a picture file named in a table."""
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


def lines_of(text: bytes) -> list[str]:
    """Captions, one in a line."""
    return text.decode("utf-8-sig").splitlines()


def as_captions(value: Any) -> list[str]:
    """A caption, or the captions in a list; what is no text is left out."""
    values = value if isinstance(value, list) else [value]
    return [entry for entry in values if isinstance(entry, str)]
