"""Captions of pictures in tab-separated tables of any length, looked up by the URL of the picture.

A table is read once for an index of 16 bytes a row, which lies on the disk (in TMPDIR); the rows are read where they are
asked for.
"""

from __future__ import annotations

import csv
import tempfile
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from functools import cached_property, partial
from pathlib import Path
from typing import BinaryIO

import numpy as np
import xxhash

from dalle_ds.data.corpora.downloads import DownloadShard, download_shards
from dalle_ds.data.corpora.pairs import MAX_TEXT_BYTES, NO_CAPTION, Broken, Corpus, RawPair, Unit, pair_of
from dalle_ds.data.disk import unreadable_is_a_data_error
from dalle_ds.errors import DataError

NOT_IN_TABLE = "not in the table"

_DIVISIONS = 64
_BUFFERED = 2**16
_FILE_SHIFT = 48  # of a position: the file's number above, the place in it below
_RECORD = np.dtype([("key", "<u8"), ("position", "<u8")])
_PACKED = (".gz", ".bz2", ".xz", ".zst", ".zip")

Row = list[str]
Rows = Callable[[BinaryIO], Iterator[tuple[int, Row]]]
"""From where a file stands: (place at which the row begins, its fields)."""


@dataclass(frozen=True)
class TableFormat:
    """How a kind of table is read."""

    rows: Rows
    url: Callable[[Row], str | None]
    """Of the picture; None in rows that have none, such as a heading."""
    captions: Callable[[Row], list[str]]
    """None where the row has no use."""


class CaptionTable:
    """The captions of one or more tables.

    Args:
        source: a table, or a folder of .tsv files.

    Raises:
        DataError: there is none, or it is packed.
    """

    def __init__(self, source: str, form: TableFormat) -> None:
        path = Path(source)
        self._files = sorted(path.glob("*.tsv")) if path.is_dir() else [path]
        self._form = form
        if not path.exists():
            raise DataError(f"source {path} does not exist")
        if not self._files:
            packed = sorted(file.name for file in path.iterdir() if file.suffix in _PACKED)
            raise DataError(f"{path} has no .tsv files" + (f": unpack {', '.join(packed)[:200]}" if packed else ""))
        if path.suffix in _PACKED:
            raise DataError(f"{path} is packed, so that no row can be read by itself: unpack it")

    def captions(self, url: str) -> list[str] | None:
        """All captions of a picture, each once, in the order of the table; None where it is not in there.

        Raises:
            DataError: a table cannot be read.
        """
        rows = [row for row in map(self._row, self._index.positions(url)) if self._form.url(row) == url]
        return list(dict.fromkeys(caption for row in rows for caption in self._form.captions(row))) if rows else None

    @cached_property
    def _index(self) -> UrlIndex:
        return UrlIndex(self._urls())

    def _urls(self) -> Iterator[tuple[str, int]]:
        for number, path in enumerate(self._files):
            with unreadable_is_a_data_error(path), path.open("rb") as file:
                for place, row in self._form.rows(file):
                    url = self._form.url(row)
                    if url:
                        yield url, (number << _FILE_SHIFT) + place

    def _row(self, position: int) -> Row:
        path = self._files[position >> _FILE_SHIFT]
        with unreadable_is_a_data_error(path), path.open("rb") as file:
            file.seek(position & ((1 << _FILE_SHIFT) - 1))
            return next(self._form.rows(file), (0, []))[1]


class UrlIndex:
    """Where each URL stands, on the disk; a sixty-fourth of it is in memory while it is made."""

    def __init__(self, urls: Iterable[tuple[str, int]]) -> None:
        self._folder = tempfile.TemporaryDirectory(prefix="dalle_ds-urls-")
        buffer: list[tuple[int, int]] = []
        for url, position in urls:
            buffer.append((_key(url), position))
            if len(buffer) == _BUFFERED:
                self._write(buffer)
                buffer = []
        self._write(buffer)
        for division in range(_DIVISIONS):
            path = self._path(division)
            if path.exists():
                records = np.fromfile(path, dtype=_RECORD)
                records[np.argsort(records["key"], kind="stable")].tofile(path)

    def positions(self, url: str) -> list[int]:
        """Where a URL, or one of the same hash, was; ascending."""
        key = _key(url)
        path = self._path(key % _DIVISIONS)
        if not path.exists():
            return []
        records = np.memmap(path, dtype=_RECORD, mode="r")
        first, end = (int(np.searchsorted(records["key"], np.uint64(key), side)) for side in ("left", "right"))
        return [int(position) for position in records["position"][first:end]]

    def _write(self, buffer: list[tuple[int, int]]) -> None:
        records = np.array(buffer, dtype=_RECORD)
        for division in np.unique(records["key"] % _DIVISIONS):
            with self._path(int(division)).open("ab") as file:
                file.write(records[records["key"] % _DIVISIONS == division].tobytes())

    def _path(self, division: int) -> Path:
        return Path(self._folder.name) / f"{division:02d}"


def joined(table: CaptionTable, pictures: str) -> Corpus:
    """The pictures that were downloaded, shard by shard, with their captions in the table.

    Raises:
        DataError: see `download_shards`.
    """
    shards = download_shards(pictures)
    return Corpus(lambda: (Unit(shard.name, partial(_read_shard, table, shard)) for shard in shards))


def _read_shard(table: CaptionTable, shard: DownloadShard) -> Iterator[RawPair | Broken]:
    for item in shard.read():
        if isinstance(item, Broken):
            yield item
            continue
        captions = table.captions(item.url)
        if captions:
            yield pair_of(item.image, captions, item.name)
        else:
            yield Broken(item.name, NOT_IN_TABLE if captions is None else NO_CAPTION)


def plain_rows(file: BinaryIO) -> Iterator[tuple[int, Row]]:
    """Rows that are lines, without quotes."""
    place = file.tell()
    for line in _bounded_lines(file):
        yield place, line.decode("utf-8", "replace").rstrip("\r\n").split("\t")
        place = file.tell()


def quoted_rows(file: BinaryIO) -> Iterator[tuple[int, Row]]:
    """Rows with fields in quotes, which may have tabs and ends of lines in them."""
    csv.field_size_limit(MAX_TEXT_BYTES)
    rows = csv.reader((line.decode("utf-8", "replace") for line in _bounded_lines(file)), delimiter="\t")
    while True:
        place = file.tell()
        try:
            yield place, next(rows)
        except StopIteration:
            return
        except csv.Error:  # goes on with the next line
            continue


def _bounded_lines(file: BinaryIO) -> Iterator[bytes]:
    """Lines, without those that are too long."""
    while line := file.readline(MAX_TEXT_BYTES + 1):
        if len(line) <= MAX_TEXT_BYTES:
            yield line
            continue
        while line and not line.endswith(b"\n"):
            line = file.readline(MAX_TEXT_BYTES)


def _key(url: str) -> int:
    return xxhash.xxh3_64_intdigest(url.encode("utf-8", "surrogatepass"))
