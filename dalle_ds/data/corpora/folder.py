"""Folders of pictures, with captions beside them or in a table."""

from __future__ import annotations

import csv
from collections.abc import Iterator
from functools import partial
from pathlib import Path
from typing import Any, TextIO

from dalle_ds.data.corpora.pairs import (
    CAPTION_COLUMNS,
    IMAGE_COLUMNS,
    IMAGE_SUFFIXES,
    MAX_PICTURE_BYTES,
    MAX_TEXT_BYTES,
    NO_CAPTION,
    UNREADABLE,
    Broken,
    Corpus,
    RawPair,
    Unit,
    Unusable,
    as_captions,
    column_of,
    existing,
    lines_of,
    pair_of,
    pair_of_file,
    read_file,
)
from dalle_ds.data.disk import unreadable_is_a_data_error
from dalle_ds.errors import DataError
from dalle_ds.parsing import parse_json


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


def _read_with_text(path: Path, name: str) -> Iterator[RawPair | Broken]:
    text = path.with_suffix(".txt")
    try:
        if not text.exists():
            yield Broken(name, NO_CAPTION)
            return
        yield pair_of(read_file(path, MAX_PICTURE_BYTES), lines_of(read_file(text, MAX_TEXT_BYTES)), name)
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
    file_name = row[column_of("image_column", image_column, IMAGE_COLUMNS, row, table)]
    caption = row[column_of("caption_column", caption_column, CAPTION_COLUMNS, row, table)]
    yield pair_of_file(table.parent, file_name, as_captions(caption), name)


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
