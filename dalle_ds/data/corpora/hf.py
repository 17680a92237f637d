"""Datasets of Hugging Face's `datasets` on disk. Files are read by Arrow itself: `datasets` would write to a cache first."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet

from dalle_ds.data import reasons
from dalle_ds.data.corpora import files
from dalle_ds.data.corpora.files import is_system, suffix_of
from dalle_ds.data.corpora.pairs import Broken, Column, Corpus, RawPair, Unit, Unpaired, Unusable, columns_of, or_broken
from dalle_ds.errors import DataError
from dalle_ds.parsing import parse_json, shown

SUFFIXES = (".parquet", ".arrow")
_OF_SAVED = ("dataset_dict.json", "state.json", "dataset_info.json")
_ROWS = 64
_DAMAGE = (OSError, ValueError, pa.ArrowException)

Group = tuple[int | None, Callable[[list[str] | None], Iterable[Any]]]
"""(rows, None where nobody knows how many; reads some columns of them)."""


def read_hf(source: str, image_column: str | None = None, caption_column: str | None = None) -> Corpus:
    """A Hugging Face dataset on disk: what `save_to_disk` wrote (all splits in turn), or .parquet or .arrow files.

    The image column holds encoded images (an `Image` feature or bytes) or paths of image files, the caption column strings or
    lists of strings. A row that cannot be read costs no other; of a file without these columns all rows are `Broken`.
    `DataError` where there is no dataset.
    """
    columns = columns_of(image_column, caption_column)
    return Corpus(partial(_hf_units, files.existing(source), columns), units_per_part=1)


def _hf_units(path: Path, columns: tuple[Column, Column]) -> Iterator[Unit]:
    found = files.walk(path) if path.is_dir() else []
    tables = _saved_tables(path)
    if tables is None:
        candidates = {entry.path: entry.name for entry in found if not is_system(entry.name)} or {path: path.name}
        kind = next((kind for kind in SUFFIXES if any(suffix_of(name) == kind for name in candidates.values())), None)
        tables = {file: name for file, name in candidates.items() if suffix_of(name) == kind and file.is_file()}
        if kind is None:
            raise DataError(
                f"{path} holds no dataset: --corpus hf needs what save_to_disk wrote, or .parquet or .arrow files"
            )
    folder = path if path.is_dir() else path.parent
    for table, name in tables.items():
        yield Unit(name, partial(_read_table, folder, columns, name, table))
    yield files.others(
        lambda: (entry for entry in found if entry.path not in tables and entry.path.name not in _OF_SAVED),
        reasons.OTHER,
    )


def _saved_tables(path: Path) -> dict[Path, str] | None:
    """The files of a dataset that `save_to_disk` wrote, with their names, split by split; None where it did not."""
    splits, state, _ = _OF_SAVED
    if not (path / splits).is_file() and not (path / state).is_file():
        return None
    tables: dict[Path, str] = {}
    try:
        is_one = not (path / splits).is_file()
        for split in [path.name] if is_one else _json(path / splits)["splits"]:
            folder = path if is_one else path / split
            parts = [entry["filename"] for entry in _json(folder / state)["_data_files"]]
            tables |= {folder / part: split if len(parts) == 1 else f"{split}/{part}" for part in parts}
    except (ValueError, KeyError, TypeError, Unusable) as error:
        raise DataError(f"{path} cannot be opened as a saved dataset: {shown(str(error))}") from error
    return tables


def _json(path: Path) -> Any:
    return parse_json(files.read_file(path, files.MAX_TEXT_BYTES))


def _read_table(folder: Path, columns: tuple[Column, Column], name: str, table: Path) -> Iterator[RawPair | Broken]:
    empty = True
    for row in table_rows(table, name, lambda names: [column.of(names, table) for column in columns]):
        empty = False
        yield row if isinstance(row, Broken) else _row_pair(folder, *row)
    if empty:
        yield Unpaired(name, reasons.NOTHING_IN_IT)


def table_rows(path: Path, name: str, columns_of: Any) -> Iterator[tuple[Any, ...] | Broken]:
    """(name, values of some columns) for each row of a .parquet or .arrow file. Where a group of rows cannot be read, the next
    one is. `columns_of` chooses among the names of columns; `DataError` where they are not there."""
    number = 0
    try:
        with path.open("rb") as file:
            names, groups = _groups_of(path, file)
            try:
                columns = list(columns_of(names))
            except DataError as error:
                count = sum(sum(map(len, read(None))) if rows is None else rows for rows, read in groups)
                yield Broken(f"{name} ({error})", reasons.NO_COLUMN, count)
                return
            for rows, read in groups:
                first = number
                try:
                    for batch in read(columns):
                        for start in range(0, len(batch), _ROWS):
                            yield from _rows_of(batch.slice(start, _ROWS), columns, name, number + start)
                        number += len(batch)
                except _DAMAGE:
                    lost = 1 if rows is None else first + rows - number
                    yield Broken(f"{name} row {number}", reasons.UNREADABLE, lost)
                    number += 0 if rows is None else lost
    except _DAMAGE:
        yield Broken(f"{name} row {number}" if number else name, reasons.UNREADABLE)


def _groups_of(path: Path, file: Any) -> tuple[list[str], Iterator[Group]]:
    """The names of columns, and groups of rows; in a stream of Arrow, nobody knows what follows a damaged one."""
    if suffix_of(path.name) == ".parquet":
        table = pyarrow.parquet.ParquetFile(file)
        numbers = range(table.num_row_groups)
        return table.schema_arrow.names, (
            (table.metadata.row_group(number).num_rows, partial(table.iter_batches, _ROWS, [number]))
            for number in numbers
        )
    try:
        opened = pa.ipc.open_file(file)
    except pa.ArrowInvalid:
        file.seek(0)
        stream = pa.ipc.open_stream(file)
        return stream.schema.names, ((None, lambda _, batch=batch: [batch]) for batch in stream)
    return opened.schema.names, (
        (None, lambda _, number=number: [opened.get_batch(number)]) for number in range(opened.num_record_batches)
    )


def _rows_of(batch: Any, columns: Sequence[str], name: str, number: int) -> Iterator[tuple[Any, ...] | Broken]:
    """The rows of a batch, of which the first has this number; one that cannot be read costs no other."""
    batch = batch.select(list(columns))
    try:
        batch.validate(full=True)  # Arrow follows offsets without looking; in a damaged file they lead anywhere
        rows = batch.to_pylist()
    except (ValueError, pa.ArrowException) as error:
        if len(batch) > 1:
            for place in range(len(batch)):
                yield from _rows_of(batch.slice(place, 1), columns, name, number + place)
        else:
            is_text = isinstance(error, UnicodeDecodeError) or "UTF8" in str(error)
            yield Broken(f"{name} row {number}", reasons.ENCODING if is_text else reasons.UNREADABLE)
        return
    for place, row in enumerate(rows, start=number):
        yield (f"{name} row {place}", *(row[column] for column in columns))


def _row_pair(folder: Path, name: str, image: Any, captions: Any) -> RawPair | Broken:
    if isinstance(image, dict):  # an Image feature: the bytes, or the path of a file that has them
        content = image.get("bytes")
        image = image.get("path") if content is None else content
    if not isinstance(image, bytes):
        return files.pair_of_row(folder, image, captions, name)
    if len(image) > files.MAX_IMAGE_BYTES:
        return Broken(name, reasons.TOO_BIG)
    return or_broken(name, RawPair.of, image, captions, name)
