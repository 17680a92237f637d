"""Captions of pictures in tab-separated tables of any length, looked up by the URL of the picture.

A table is read once for an index of 16 bytes a row, which lies on the disk (in TMPDIR); the rows are read where they are
asked for.
"""

from __future__ import annotations

import tempfile
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, replace
from functools import cached_property, partial
from pathlib import Path
from typing import BinaryIO

import numpy as np
import xxhash

from dalle_ds.data.corpora.downloads import NO_URL, DownloadShard, download_shards
from dalle_ds.data.corpora.files import ARCHIVE, Found, is_system, suffix_of, unpaired_reason, walk
from dalle_ds.data.corpora.pairs import (
    MAX_TEXT_BYTES,
    NOT_LISTED,
    TOO_LONG,
    Broken,
    Corpus,
    RawPair,
    Unit,
    Unpaired,
    Unusable,
    encoding_of,
    existing,
    pair_of,
)
from dalle_ds.data.corpora.rows import Line, Row, quoted_rows
from dalle_ds.errors import DataError
from dalle_ds.files import unreadable_is_a_data_error

_DIVISIONS = 64
_BUFFERED = 2**16
_FILE_SHIFT = 48  # of a position: the file's number above, the place in it below
_RECORD = np.dtype([("key", "<u8"), ("position", "<u8")])
_EXAMPLES = 5

Rows = Callable[[BinaryIO], Iterator[tuple[int, Row | str]]]
"""From where a file stands: (place at which the row begins, its fields or the reason for which it cannot be read)."""


@dataclass(frozen=True)
class TableFormat:
    """How a kind of table is read."""

    rows: Rows
    url: Callable[[Row], str | None]
    """Of the picture; "" where there is none, None in a heading; `Unusable` in rows that are not of this kind of table."""
    captions: Callable[[Row], list[str]]
    """None where the row has no use."""


class CaptionTable:
    """The captions of one or more tables.

    Args:
        source: a table, or a folder of .tsv files, searched with its subfolders.

    Raises:
        DataError: there is none, it is packed, or not in UTF-8.
    """

    def __init__(self, source: str, form: TableFormat) -> None:
        path = existing(source)
        found = walk(path) if path.is_dir() else [Found(path, path.name)]
        plain = [entry.path for entry in found if suffix_of(entry.name) == ".tsv" and not is_system(entry.name)]
        self._files = [file for file in plain if file.is_file()] if path.is_dir() else [path]
        tables = set(self._files)
        self._beside = [entry for entry in found if entry.path not in tables]
        self._form = form
        self._unused: dict[str, list[Unpaired]] = {}
        packed = [entry.name for entry in found if unpaired_reason(entry.name) == ARCHIVE]
        if not self._files:
            raise DataError(f"{path} has no .tsv files" + (f": unpack {', '.join(packed)[:200]}" if packed else ""))
        if path.is_file() and packed:
            raise DataError(f"{path} is packed, so that no row can be read by itself: unpack it")

    def captions(self, url: str) -> list[str] | None:
        """All captions of a picture, in the order of the table; None where it is not in there.

        Raises:
            DataError: a table cannot be read.
        """
        rows = [row for row in map(self._row, self._index.positions(url)) if self._form.url(row) == url]
        return [caption for row in rows for caption in self._form.captions(row)] if rows else None

    def unpaired(self, pictures: str) -> Iterator[Broken]:
        """Rows that cannot be looked up, some of each kind by name, and files that are neither tables nor pictures."""
        _ = self._index
        yield from (row for rows in self._unused.values() for row in rows)
        places = {entry.path.parent for entry in self._beside}
        told_of = {place for place in places if not place.resolve().is_relative_to(Path(pictures).resolve())}
        yield from (entry.unpaired() for entry in self._beside if entry.path.parent in told_of)

    @cached_property
    def _index(self) -> UrlIndex:
        return UrlIndex(self._urls())

    def _urls(self) -> Iterator[tuple[str, int]]:
        for number, path in enumerate(self._files):
            with unreadable_is_a_data_error(path), path.open("rb") as file:
                encoding = encoding_of(file.read(4))
                if not encoding.startswith("utf-8"):
                    raise DataError(f"{path} is in {encoding.upper()}: convert it to UTF-8")
                file.seek(3 if encoding == "utf-8-sig" else 0)
                for count, (place, row) in enumerate(self._form.rows(file), start=1):
                    reason = row if isinstance(row, str) else NO_URL
                    try:
                        url = "" if isinstance(row, str) else self._form.url(row)
                    except Unusable as error:
                        url, reason = "", error.reason
                    if url:
                        yield url, (number << _FILE_SHIFT) + place
                    elif url is not None:
                        self._tell(Unpaired(f"{path.name} row {count}", reason))

    def _tell(self, row: Unpaired) -> None:
        rows = self._unused.setdefault(row.reason, [])
        if len(rows) < _EXAMPLES:
            rows.append(row)
        else:
            rows[-1] = replace(rows[-1], count=rows[-1].count + 1)

    def _row(self, position: int) -> Row:
        path = self._files[position >> _FILE_SHIFT]
        with unreadable_is_a_data_error(path), path.open("rb") as file:
            file.seek(position & ((1 << _FILE_SHIFT) - 1))
            row = next(self._form.rows(file), (0, ""))[1]
        if isinstance(row, str):
            raise DataError(f"{path} has changed while it was read: begin again with --overwrite True")
        return row


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

    def units() -> Iterator[Unit]:
        for shard in shards:
            yield Unit(shard.name, partial(_read_shard, table, shard))
        yield Unit("rows of the table", partial(table.unpaired, pictures))

    return Corpus(units, units_per_part=1)


def _read_shard(table: CaptionTable, shard: DownloadShard) -> Iterator[RawPair | Broken]:
    for item in shard.read():
        if isinstance(item, Broken):
            yield item
            continue
        captions = table.captions(item.url)
        yield Broken(item.name, NOT_LISTED) if captions is None else pair_of(item.image, captions, item.name)


def plain_rows(file: BinaryIO) -> Iterator[tuple[int, Row | str]]:
    """Rows that are lines, without quotes."""
    for place, line, problem in _lines(file):
        if problem or line.strip():
            yield place, problem or line.rstrip("\r\n").split("\t")


def tsv_rows(file: BinaryIO, columns: int) -> Iterator[tuple[int, Row | str]]:
    """Rows of so many columns with fields in quotes, which may have tabs and ends of lines in them."""
    return quoted_rows(_lines(file), "\t", lambda fields: len(fields) >= columns)


def _lines(file: BinaryIO) -> Iterator[Line]:
    """What is not UTF-8 stays recognizable: it costs the captions in which it is."""
    place = file.tell()
    while line := file.readline(MAX_TEXT_BYTES + 1):
        too_long = len(line) > MAX_TEXT_BYTES
        yield place, "" if too_long else line.decode("utf-8", "surrogateescape"), TOO_LONG if too_long else None
        while too_long and line and not line.endswith(b"\n"):
            line = file.readline(MAX_TEXT_BYTES)
        place = file.tell()


def _key(url: str) -> int:
    return xxhash.xxh3_64_intdigest(url.encode("utf-8", "surrogatepass"))
