"""Datasets of Hugging Face's `datasets` on disk. Files are read by Arrow itself: `datasets` would write to a cache first."""

from __future__ import annotations

from collections.abc import Iterator
from functools import partial
from pathlib import Path
from typing import Any

from dalle_ds.data.corpora.files import NOT_READ, is_system, suffix_of, walk
from dalle_ds.data.corpora.pairs import (
    CAPTION_COLUMNS,
    IMAGE_COLUMNS,
    MAX_PICTURE_BYTES,
    NO_COLUMN,
    NOTHING_IN_IT,
    TOO_BIG,
    UNREADABLE,
    Broken,
    Corpus,
    RawPair,
    Unit,
    Unpaired,
    as_captions,
    column_of,
    existing,
    pair_of,
    pair_of_file,
    told,
)
from dalle_ds.errors import DataError
from dalle_ds.parsing import shown

SUFFIXES = (".parquet", ".arrow")

_ROWS = 64

Columns = tuple[str, str]
"""(of pictures, of captions)"""
Wanted = tuple[str | None, str | None]


def read_hf(source: str, image_column: str | None = None, caption_column: str | None = None) -> Corpus:
    """A Hugging Face dataset on disk: what `save_to_disk` wrote (all splits in turn), or .parquet or .arrow files.

    The image column holds encoded pictures (an `Image` feature or bytes) or paths of picture files, the caption column
    strings or lists of strings.

    Raises:
        DataError: no such folder, nothing in it that is a dataset, or a dataset of one split that has no such column.
    """
    return Corpus(partial(_hf_units, existing(source), (image_column, caption_column)))


def _hf_units(path: Path, wanted: Wanted) -> Iterator[Unit]:
    """The rows of a saved dataset, or the files of another."""
    if (path / "dataset_dict.json").is_file() or (path / "state.json").is_file():
        yield from _saved_units(path, wanted)
        return
    found = walk(path) if path.is_dir() else []
    candidates = {entry.path: entry.name for entry in found if not is_system(entry.name)} or {path: path.name}
    kind = next((kind for kind in SUFFIXES if any(suffix_of(name) == kind for name in candidates.values())), None)
    files = {file: name for file, name in candidates.items() if suffix_of(name) == kind and file.is_file()}
    if kind is None:
        raise DataError(
            f"{path} holds no dataset: --corpus hf needs what save_to_disk wrote, or .parquet or .arrow files"
        )
    folder = path if path.is_dir() else path.parent
    for file, name in files.items():
        yield Unit(name, partial(_read_file, folder, wanted, name, file))
    yield from (told(entry.unpaired(NOT_READ)) for entry in found if entry.path not in files)


def _saved_units(path: Path, wanted: Wanted) -> Iterator[Unit]:
    import datasets

    try:
        loaded = datasets.load_from_disk(str(path))
        splits = dict(loaded) if isinstance(loaded, datasets.DatasetDict) else {path.name: loaded}
        splits = {split: _undecoded(rows) for split, rows in splits.items()}
    except Exception as error:  # whatever datasets and Arrow stumble on in a damaged one, from OSError to KeyError
        raise DataError(f"{path} cannot be opened as a saved dataset: {shown(str(error))}") from error
    for split, rows in splits.items():
        try:
            columns = _columns(rows.column_names, wanted, path)
        except DataError as error:
            if len(splits) == 1:
                raise
            yield told(Broken(f"{split} ({error})", NO_COLUMN, len(rows)))
            continue
        if not len(rows):
            yield told(Unpaired(split, NOTHING_IN_IT))
        for number in range(len(rows)):
            name = f"{split} row {number}"
            yield Unit(name, partial(_read_saved_row, path, columns, name, rows, number))


def _undecoded(rows: Any) -> Any:
    """The dataset with pictures left encoded."""
    import datasets

    for column, feature in (rows.features or {}).items():
        if isinstance(feature, datasets.Image):
            rows = rows.cast_column(column, datasets.Image(decode=False))
    return rows


def _read_saved_row(folder: Path, columns: Columns, name: str, rows: Any, number: int) -> Iterator[RawPair | Broken]:
    try:
        # Arrow follows offsets without looking; in a damaged file they lead anywhere.
        rows.data.fast_slice(number, 1).validate(full=True)
        row = rows[number]
    except Exception:  # see _saved_units
        yield Broken(name, UNREADABLE)
        return
    yield _row_pair(folder, name, row[columns[0]], row[columns[1]])


def _columns(names: list[str], wanted: Wanted, where: Path) -> Columns:
    image = column_of("image_column", wanted[0], IMAGE_COLUMNS, names, where)
    return image, column_of("caption_column", wanted[1], CAPTION_COLUMNS, names, where)


def _read_file(folder: Path, wanted: Wanted, name: str, file: Path) -> Iterator[RawPair | Broken]:
    is_parquet = suffix_of(file.name) == ".parquet"
    empty = True
    for row in (parquet_rows if is_parquet else _arrow_rows)(file, name, partial(_columns, wanted=wanted, where=file)):
        empty = False
        yield row if isinstance(row, Broken) else _row_pair(folder, *row)
    if empty:
        yield Unpaired(name, NOTHING_IN_IT)


def parquet_rows(path: Path, name: str, columns_of: Any) -> Iterator[tuple[Any, ...] | Broken]:
    """(name, values of some columns) for each row of a file. Where a group of rows cannot be read, the next one is.

    Args:
        columns_of: chooses among the names of columns; `DataError` where they are not there.
    """
    import pyarrow as pa
    import pyarrow.parquet

    try:
        with pyarrow.parquet.ParquetFile(path) as table:
            try:
                columns = columns_of(table.schema_arrow.names)
            except DataError as error:
                yield Broken(f"{name} ({error})", NO_COLUMN, table.metadata.num_rows)
                return
            end = 0
            for group in range(table.num_row_groups):
                number, end = end, end + table.metadata.row_group(group).num_rows
                try:
                    for batch in table.iter_batches(_ROWS, row_groups=[group], columns=list(columns)):
                        for row in batch.to_pylist():
                            yield (f"{name} row {number}", *(row[column] for column in columns))
                            number += 1
                except (OSError, ValueError, pa.ArrowException):
                    yield Broken(f"{name} row {number}", UNREADABLE, end - number)
    except (OSError, ValueError, pa.ArrowException):
        yield Broken(name, UNREADABLE)


def _arrow_rows(path: Path, name: str, columns_of: Any) -> Iterator[tuple[Any, ...] | Broken]:
    """`parquet_rows` of a file of Arrow, in either of its formats."""
    import pyarrow as pa

    number = 0
    try:
        with path.open("rb") as file:
            schema, batches = _arrow_batches(file)
            try:
                columns = columns_of(schema.names)
            except DataError as error:
                yield Broken(f"{name} ({error})", NO_COLUMN, sum(map(len, batches)))
                return
            for batch in batches:
                batch.validate(full=True)  # see _read_saved_row
                for first in range(0, len(batch), _ROWS):
                    for row in batch.select(list(columns)).slice(first, _ROWS).to_pylist():
                        yield (f"{name} row {number}", *(row[column] for column in columns))
                        number += 1
    except (OSError, ValueError, pa.ArrowException):
        yield Broken(f"{name} row {number}", UNREADABLE)


def _arrow_batches(file: Any) -> tuple[Any, Iterator[Any]]:
    import pyarrow as pa

    try:
        opened = pa.ipc.open_file(file)
    except pa.ArrowInvalid:
        file.seek(0)
        stream = pa.ipc.open_stream(file)
        return stream.schema, iter(stream)
    return opened.schema, (opened.get_batch(number) for number in range(opened.num_record_batches))


def _row_pair(folder: Path, name: str, picture: Any, caption: Any) -> RawPair | Broken:
    if isinstance(picture, dict):  # an Image feature: the bytes, or the path of a file that has them
        content = picture.get("bytes")
        picture = picture.get("path") if content is None else content
    if not isinstance(picture, bytes):
        return pair_of_file(folder, picture, as_captions(caption), name)
    if len(picture) > MAX_PICTURE_BYTES:
        return Broken(name, TOO_BIG)
    return pair_of(picture, as_captions(caption), name)
