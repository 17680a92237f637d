"""Folders of images, with captions beside them or in a table."""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import suppress
from functools import partial
from operator import attrgetter
from pathlib import Path
from typing import Any

import xxhash

from dalle_ds.data import reasons
from dalle_ds.data.corpora import files
from dalle_ds.data.corpora.files import Found, is_image, is_system, suffix_of
from dalle_ds.data.corpora.pairs import Broken, Column, Corpus, RawPair, Unit, Unpaired, Unusable, columns_of
from dalle_ds.data.corpora.rows import pair_rows
from dalle_ds.data.images import image_suffixes
from dalle_ds.errors import DataError
from dalle_ds.files import unreadable_is_a_data_error

_TABLES = (".csv", ".jsonl")
_TEXT = ".txt"


def read_folder(source: str, image_column: str | None = None, caption_column: str | None = None) -> Corpus:
    """A folder of images, searched with its subfolders.

    Captions stand in a text file beside each image (`cat.jpg`, `cat.txt`, one caption per line), or in one table
    directly in the folder (.csv or .jsonl, or .tsv where there is neither) with a column of file names, relative to the
    folder, and a column of captions. The separator of a table is the one that gives these columns.

    Args:
        source: the folder.
        image_column, caption_column: columns of the table; None takes the first of "image", "file_name" and of
            "caption", "text" that it has. In .jsonl a caption may be a list of captions.

    Raises:
        DataError: no folder, no images, several tables, or no such column.
    """
    folder = files.existing(source)
    if not folder.is_dir():
        raise DataError(f"source {folder} is not a folder: --corpus folder needs a folder of images")
    with unreadable_is_a_data_error(folder):
        direct = sorted(path for path in folder.iterdir() if path.is_file() and not is_system(path.name))
    tables = [path for path in direct if suffix_of(path.name) in _TABLES]
    tables = tables or [path for path in direct if suffix_of(path.name) == ".tsv"]
    if len(tables) > 1:
        names = ", ".join(path.name for path in tables)
        raise DataError(f"{folder} has several tables ({names}): keep the one that has the captions")
    if tables:
        return Corpus(partial(_table_units, tables[0], columns_of(image_column, caption_column)))
    if image_column or caption_column:
        raise DataError(
            f"{folder} has no .csv, .tsv or .jsonl table, in which image_column and caption_column would be looked up"
        )
    found = files.walk(folder)
    if not any(is_image(entry.name) and not is_system(entry.name) for entry in found):
        there = f"; it has {len(found):,} other files, such as {found[0].name}" if found else ""
        raise DataError(
            f"{folder} has no images: looked for {', '.join(image_suffixes())} there and in its subfolders{there}"
        )
    return Corpus(partial(_units, found))


def _units(found: list[Found]) -> Iterator[Unit]:
    plain = [entry for entry in found if not is_system(entry.name)]
    # Of a.TXT and a.txt the latter counts.
    texts = {_stem(entry): entry.path for entry in sorted(plain, key=attrgetter("name")) if _is_text(entry)}
    images = {_stem(entry) for entry in plain if is_image(entry.name)}
    for entry in found:
        if is_system(entry.name):
            yield Unit.of(entry.unpaired())
        elif is_image(entry.name):
            yield Unit.of_pair(entry.name, _read_with_text, entry, texts.get(_stem(entry)))
        elif _is_text(entry) and _stem(entry) not in images:
            yield Unit.of(Broken(entry.name, reasons.NO_IMAGE))
        elif not _is_text(entry):
            is_below = suffix_of(entry.name) in (*_TABLES, ".tsv") and "/" in entry.name
            yield Unit.of(entry.unpaired(reasons.TABLE_BELOW) if is_below else entry.unpaired())
        elif texts[_stem(entry)] != entry.path:
            yield Unit.of(Unpaired(entry.name, reasons.CAPTION_UNUSED))


def _is_text(entry: Found) -> bool:
    return entry.problem is None and suffix_of(entry.name) == _TEXT


def _stem(entry: Found) -> str:
    return str(entry.path.with_suffix(""))


def _read_with_text(entry: Found, text: Path | None) -> RawPair:
    if entry.problem is not None or text is None:
        raise Unusable(entry.problem or reasons.NO_CAPTION)
    return files.pair_of_file(entry.path, files.lines_of(files.read_file(text, files.MAX_TEXT_BYTES)), entry.name)


def _table_units(table: Path, columns: tuple[Column, Column]) -> Iterator[Unit]:
    listed: set[int] = set()
    empty = True
    with unreadable_is_a_data_error(table):
        for line, row in pair_rows(table, columns):
            empty = False
            name = f"{table.name} line {line}"
            if isinstance(row, str):
                yield Unit.of(Broken(name, row))
                continue
            if isinstance(row[0], str):
                listed.add(_key(table.parent / row[0]))
            yield _row_unit(table.parent, row, name)
    if empty:
        yield Unit.of(Unpaired(table.name, reasons.NOTHING_IN_IT))
    yield files.others(
        lambda: (entry for entry in files.walk(table.parent) if entry.path != table and _key(entry.path) not in listed)
    )


def _row_unit(folder: Path, row: tuple[Any, Any], name: str) -> Unit:
    return Unit(name, lambda: [files.pair_of_row(folder, *row, name)])


def _key(path: Path) -> int:
    """A table of millions of rows is remembered by so many numbers, of the files that its names lead to."""
    name = str(path)
    with suppress(OSError, ValueError):  # of names that no file can have
        name = os.path.realpath(name)
    return xxhash.xxh3_64_intdigest(name.encode("utf-8", "surrogatepass"))
