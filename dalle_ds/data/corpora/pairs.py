"""What a corpus consists of, and what its readers share.

A corpus is a sequence of units that can be read one without the other (an image, a row of a table, an archive), so that
several machines can share the work. Nothing in a source disappears: a pair that cannot be read is yielded as a `Broken`, what
belongs to no pair as an `Unpaired`, and the report of the preparation counts and names both. Captions are passed on as they
were written, or not at all. Sources may come from anywhere: archives are read and never unpacked, only regular files are
opened, and nothing is read that is absurdly long.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Collection, Iterable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, TypeVar

from dalle_ds.data import reasons
from dalle_ds.errors import DataError
from dalle_ds.parsing import is_text

Result = TypeVar("Result")


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
    """Pairs of one group never straddle train and validation; without other groups, equal images are one."""
    variant: str = ""
    """Which variant of its group this is, in corpora that combine parts (skin tones); "" for the plain one."""
    lost: list[str] = field(default_factory=list)
    """The reason for each caption of it that could not be read."""

    @classmethod
    def of(cls, image: bytes, captions: Any, name: str) -> RawPair:
        """A pair that is a group by itself, but for equal images; `Unusable` without an image or a caption.

        Args:
            captions: a caption or a list of them, or whatever stands in their place.
        """
        values = captions if isinstance(captions, list) else [] if captions is None else [captions]
        if not values:
            raise Unusable(reasons.NO_CAPTION)
        if not image:
            raise Unusable(reasons.EMPTY_FILE)
        kept = [value for value in values if _problem(value) is None]
        lost = [problem for problem in map(_problem, values) if problem is not None]
        if not kept:
            raise Unusable(lost[0])
        return cls(image, kept, name, hashlib.sha256(image).hexdigest()[:16], lost=lost)


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


class Unusable(Exception):
    """A pair, or a part of one, is there but cannot be read."""

    def __init__(self, reason: str) -> None:
        super().__init__(reason)
        self.reason = reason


@dataclass(frozen=True)
class Unit:
    """A part of a corpus that is read by itself."""

    name: str
    read: Callable[[], Iterable[RawPair | Broken]]

    @classmethod
    def of(cls, broken: Broken) -> Unit:
        """One that is nothing else."""
        return cls(broken.name, lambda: [broken])

    @classmethod
    def of_pair(cls, name: str, read: Callable[..., RawPair], *arguments: Any) -> Unit:
        """One of a pair, or of what is in its place."""
        return cls(name, lambda: [or_broken(name, read, *arguments)])


@dataclass(frozen=True)
class Corpus:
    """Pairs in a fixed order, as an iterable, or unit by unit."""

    units: Callable[[], Iterator[Unit]]
    """Begins to go through the units, of which none is read until it is asked to."""
    units_per_part: int = 1000
    """How many are a fair part of the work: a thousand pairs, or one file with many."""

    def __iter__(self) -> Iterator[RawPair | Broken]:
        for unit in self.units():
            yield from unit.read()


def or_broken(name: str, read: Callable[..., Result], *arguments: Any) -> Result | Broken:
    """What `read` gives, or why it is `Unusable`."""
    try:
        return read(*arguments)
    except Unusable as error:
        return Broken(name, error.reason)


def is_sound(text: str) -> bool:
    """Whether UTF-8 can hold a text, and it has no NUL, which text of another encoding is full of."""
    return is_text(text) and "\0" not in text


def _problem(caption: Any) -> str | None:
    if not isinstance(caption, str):
        return reasons.NO_CAPTION if caption is None else reasons.NOT_TEXT
    return None if is_sound(caption) else reasons.ENCODING


@dataclass(frozen=True)
class Column:
    """A column of a table, by its possible names, of which the first that is there counts."""

    option: str
    """That names another."""
    names: tuple[str, ...]

    def of(self, columns: Collection[str], where: Path) -> str:
        """Which of a table's columns it is; `DataError` where there is none."""
        name = self.found(columns)
        if name is None:
            raise DataError(
                f"{where} has no column {' or '.join(map(repr, self.names))}: it has "
                f"{', '.join(columns)[:300] or 'none'}; name the right one with --{self.option}"
            )
        return name

    def found(self, columns: Collection[str]) -> str | None:
        """Which of the columns it is, if any."""
        return next((name for name in self.names if name in columns), None)

    def value(self, row: dict[str, Any]) -> Any:
        """Its value in a row, None where there is none."""
        return next((row[name] for name in self.names if name in row), None)


def columns_of(image: str | None, caption: str | None) -> tuple[Column, Column]:
    """The columns of images and of captions: those named, or the usual ones."""
    return (
        Column("image_column", (image,) if image is not None else ("image", "file_name")),
        Column("caption_column", (caption,) if caption is not None else ("caption", "text")),
    )
