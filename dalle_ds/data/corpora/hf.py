"""Datasets of Hugging Face's `datasets` on disk."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from typing import Any

from dalle_ds.data.corpora.pairs import (
    CAPTION_COLUMNS,
    IMAGE_COLUMNS,
    MAX_PICTURE_BYTES,
    TOO_BIG,
    UNREADABLE,
    Broken,
    Corpus,
    RawPair,
    Unit,
    as_captions,
    column_of,
    existing,
    pair_of,
    pair_of_file,
)
from dalle_ds.errors import DataError
from dalle_ds.parsing import shown

SUFFIXES = (".parquet", ".arrow")


def read_hf(source: str, image_column: str | None = None, caption_column: str | None = None) -> Corpus:
    """A Hugging Face dataset on disk: what `save_to_disk` wrote (all splits in turn), or .parquet or .arrow files.

    The image column holds encoded pictures (an `Image` feature or bytes) or paths of picture files, the caption column
    strings or lists of strings.

    Raises:
        DataError: no such folder, nothing in it that is a dataset, or no such column.
    """
    return Corpus(partial(_hf_units, existing(source), image_column, caption_column))


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
    files = next((found for kind in SUFFIXES if (found := [file for file in candidates if file.suffix == kind])), None)
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
    picture = row[column_of("image_column", image_column, IMAGE_COLUMNS, row, source)]
    captions = as_captions(row[column_of("caption_column", caption_column, CAPTION_COLUMNS, row, source)])
    if isinstance(picture, dict):  # an Image feature: the bytes, or the path of a file that has them
        picture = picture.get("bytes") or picture.get("path")
    if isinstance(picture, bytes):
        yield pair_of(picture, captions, name) if len(picture) <= MAX_PICTURE_BYTES else Broken(name, TOO_BIG)
    else:
        yield pair_of_file(source, picture, captions, name)
