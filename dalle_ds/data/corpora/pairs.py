"""What a corpus consists of, and what its readers share.

A corpus is a sequence of units that can be read one without the other (an image, a row of a table, an archive), so that
several machines can share the work. Nothing in a source disappears: a pair that cannot be read is yielded as a `Broken`, what
belongs to no pair as an `Unpaired`, and the report of the preparation counts and names both. Captions are passed on as they
were written, or not at all. Sources may come from anywhere: archives are read and never unpacked, only regular files are
opened, and nothing is read that is absurdly long.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

from dalle_ds.data import reasons
from dalle_ds.errors import DataError
from dalle_ds.parsing import is_text

IMAGE_COLUMNS = ("image", "file_name")
CAPTION_COLUMNS = ("caption", "text")


@dataclass(frozen=True)
class RawPair:
    """An image as it is stored and its captions as they were written."""

    image: bytes
    """The encoded image."""
    captions: list[str]
    """At least one, not cleaned."""
    name: str
    """Where it came from, for people."""
    group: str
    """Pairs of one group never straddle train and validation."""
    variant: str = ""
    """Which variant of its group this is, in corpora that combine parts (skin tones); "" for the plain one."""
    lost: list[str] = field(default_factory=list)
    """The reason for each caption of it that could not be read."""


@dataclass(frozen=True)
class Broken:
    """A pair that cannot be read, or that lacks its image or its caption."""

    name: str
    reason: str
    count: int = 1
    """How many there are, where several are told of as one."""


@dataclass(frozen=True)
class Unpaired(Broken):
    """A file, member of an archive or row of a table that belongs to no pair."""


@dataclass(frozen=True)
class Unit:
    """A part of a corpus that is read by itself."""

    name: str
    read: Callable[[], Iterator[RawPair | Broken]]


class Corpus:
    """Pairs in a fixed order, as an iterable, or unit by unit.

    Args:
        units: begins to go through the units, of which none is read until it is asked to.
        units_per_part: how many are a fair part of the work: a thousand pairs, or one file with many.
    """

    def __init__(self, units: Callable[[], Iterator[Unit]], units_per_part: int = 1000) -> None:
        self.units = units
        self.units_per_part = units_per_part

    def __iter__(self) -> Iterator[RawPair | Broken]:
        for unit in self.units():
            yield from unit.read()


def told(broken: Broken) -> Unit:
    """A unit that is nothing else."""
    return Unit(broken.name, partial(iter, (broken,)))


def content_group(image: bytes) -> str:
    """The group of an image in corpora without groups of their own: equal files are one group."""
    return hashlib.sha256(image).hexdigest()[:16]


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


def pair_of(image: bytes, captions: list[Any], name: str, where: str = "") -> RawPair | Broken:
    """A pair that is a group by itself, but for equal files.

    Args:
        captions: whatever stands in their place.
        where: a better name where it is not kept.
    """
    if not captions:
        return Broken(where or name, reasons.NO_CAPTION)
    if not image:
        return Broken(where or name, reasons.EMPTY_FILE)
    problems = [_problem(caption) for caption in captions]
    lost = [problem for problem in problems if problem is not None]
    if len(lost) == len(captions):
        return Broken(where or name, lost[0])
    kept = [caption for caption, problem in zip(captions, problems, strict=True) if problem is None]
    return RawPair(image, kept, name, content_group(image), lost=lost)


class Unusable(Exception):
    """A file, or member of an archive, that is there but not read."""

    def __init__(self, reason: str) -> None:
        super().__init__(reason)
        self.reason = reason


def is_sound(text: str) -> bool:
    """Whether UTF-8 can hold a text, and it has no NUL, which text of another encoding is full of."""
    return is_text(text) and "\0" not in text


def as_captions(value: Any) -> list[Any]:
    """A caption, or the captions in a list; none where there is none."""
    return value if isinstance(value, list) else [] if value is None else [value]


def _problem(caption: Any) -> str | None:
    if not isinstance(caption, str):
        return reasons.NO_CAPTION if caption is None else reasons.NOT_TEXT
    return None if is_sound(caption) else reasons.ENCODING
