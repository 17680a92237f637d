"""Rows of tables of text: separated values with quotes, and JSON lines. What is no row is told, with the reason."""

from __future__ import annotations

import csv
from collections.abc import Callable, Iterator
from contextlib import suppress
from pathlib import Path
from typing import Any

from dalle_ds.data import reasons
from dalle_ds.data.corpora.files import MAX_TEXT_BYTES, encoding_of
from dalle_ds.data.corpora.pairs import Column, is_sound
from dalle_ds.data.images import image_suffixes
from dalle_ds.errors import DataError
from dalle_ds.parsing import parse_json

_SEPARATORS = (",", "\t", ";", "|")
csv.field_size_limit(MAX_TEXT_BYTES)  # captions may be longer than the module's 128 KiB

Line = tuple[int, str, str | None]
"""(where it begins, the text, why it cannot be read or None)."""
Row = list[str]
Columns = tuple[Column, Column]
"""(of what names the image, of the captions)."""
PairRows = Iterator[tuple[int, tuple[Any, Any] | str]]
"""(line, what names the image and the captions as they stand there, None where there is none; or why the row is not read)."""


def pair_rows(table: Path, columns: Columns) -> PairRows:
    """The rows of a .csv, .tsv or .jsonl. Raises OSError, and `DataError` where the table lacks a column or has it twice."""
    return _json_rows(table, columns) if table.suffix.lower() == ".jsonl" else _separated_rows(table, columns)


def quoted_rows(
    lines: Iterator[Line], separator: str, is_row: Callable[[Row], bool]
) -> Iterator[tuple[int, Row | str]]:
    """(where it begins, fields or the reason for which there are none) for each row; fields in quotes may have ends of lines.

    A quote that is not closed would swallow rows: of such a row the first line is told, and the others are read by themselves.

    Args:
        is_row: whether the fields of a line are those of a row; lines within a field are no rows.
    """
    again: list[Line] = []  # to be read once more, the next one last
    taken: list[Line] = []

    def feed() -> Iterator[str]:
        while (line := again.pop() if again else next(lines, None)) is not None:
            taken.append(line)
            yield line[1]

    while True:
        taken.clear()
        row: Row | str
        try:
            row = next(csv.reader(feed(), delimiter=separator, skipinitialspace=True, strict=True))
            # One that is closed by chance, by a quote in another row, is known by the rows between.
            if any(is_row(line.rstrip("\r\n").split(separator)) for _, line, _ in taken[1:]):
                row = reasons.OPEN_QUOTE
        except StopIteration:
            return
        except csv.Error:
            row = reasons.OPEN_QUOTE
        if row == reasons.OPEN_QUOTE:
            again.extend(reversed(taken[1:]))
            del taken[1:]
        row = next((problem for _, _, problem in taken if problem is not None), row)
        if row:  # not an empty line
            yield taken[0][0], row


def _lines(table: Path) -> Iterator[Line]:
    with table.open("rb") as file:
        encoding = encoding_of(file.read(4))
    utf8 = encoding.startswith("utf-8")
    with table.open(encoding=encoding, errors="surrogateescape" if utf8 else "replace", newline="") as lines:
        number = 0
        while line := lines.readline(MAX_TEXT_BYTES + 1):
            number += 1
            if len(line) <= MAX_TEXT_BYTES:
                sound = is_sound(line) and (utf8 or "\N{REPLACEMENT CHARACTER}" not in line)
                yield number, line, None if sound else reasons.ENCODING
                continue
            while line and not line.endswith(("\n", "\r")):
                line = lines.readline(MAX_TEXT_BYTES)
            yield number, "", reasons.TOO_LONG


def _separated_rows(table: Path, columns: Columns) -> PairRows:
    lines = _lines(table)
    first = next((line for line in lines if line[1].strip() or line[2]), None)
    if first is None:
        return
    heading, separator = _heading(table, first, columns)
    names = [column.of(heading, table) for column in columns]
    twice = [name for name in names if heading.count(name) > 1]
    if twice:
        raise DataError(f"{table} has the column {twice[0]!r} twice: rename one of them")
    image, caption = map(heading.index, names)

    def is_row(fields: Row) -> bool:
        name = fields[image].strip() if len(fields) > image else ""
        # A line of one field may be words that end like that.
        named = len(fields) > 1 and "\0" not in name and name.lower().endswith(image_suffixes())
        with suppress(OSError):  # a line that is too long for a name
            return named or (table.parent / name).is_file()
        return False

    for line, row in quoted_rows(lines, separator, is_row):
        if isinstance(row, str):
            yield line, row
        elif len(row) > len(heading):  # a separator in a caption, which would be cut there
            yield line, reasons.FIELDS
        else:
            fields = dict(enumerate(row))
            yield line, (fields.get(image), fields.get(caption))


def _heading(table: Path, first: Line, columns: Columns) -> tuple[Row, str]:
    """The names of columns, and the separator by which the wanted ones are among them."""
    _, text, problem = first
    if problem is not None:
        raise DataError(
            f"the heading of {table} cannot be read ({problem}): store it as UTF-8 with a line of column names"
        )
    found = []
    for separator in _SEPARATORS:
        names = [name.strip() for name in next(csv.reader([text], delimiter=separator, skipinitialspace=True))]
        known = sum(column.found(names) is not None for column in columns)
        found.append((known, len(names), names, separator))
    _, _, names, separator = max(found, key=lambda entry: entry[:2])
    return names, separator


def _json_rows(table: Path, columns: Columns) -> PairRows:
    _check_json_columns(table, columns)
    image, caption = columns
    for line, row in _json_lines(table):
        yield line, row if isinstance(row, str) else (image.value(row), caption.value(row))


def _json_lines(table: Path) -> Iterator[tuple[int, dict[str, Any] | str]]:
    for number, text, problem in _lines(table):
        if problem is not None:
            yield number, problem
        elif text.strip():
            try:
                row = parse_json(text)
            except ValueError:
                row = None
            yield number, row if isinstance(row, dict) else reasons.BROKEN_JSON


def _check_json_columns(table: Path, columns: Columns) -> None:
    """`DataError` where no row at all has a column, which is a wrong name rather than a bad row."""
    missing = list(columns)
    first: dict[str, Any] | None = None
    for _, row in _json_lines(table):
        if isinstance(row, dict):
            first = first or row
            missing = [column for column in missing if column.found(row) is None]
        if not missing:
            return
    if first is not None:
        missing[0].of(first, table)
