"""Reading the Arrow shards of a split, any of which may be missing, cut off or damaged.

A shard is opened when a row of it is first wanted. Nothing of it is believed: its size and its number of rows must be
those of `info.json`; a record batch is validated before one of its values is touched, since Arrow follows offsets without
looking; and every row carries checksums, so that a picture or caption is the one that was prepared, or an error. What is
mapped into memory is read from the file once before it is touched: a page that the disk cannot deliver is an error there,
and the end of the process in a map.
"""

from __future__ import annotations

import errno
import mmap
import os
import resource
from bisect import bisect_right
from collections import OrderedDict
from collections.abc import Iterator
from dataclasses import dataclass
from functools import cache
from itertools import accumulate
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import xxhash

from dalle_ds.data.faults import DAMAGED_SHARD, MISSING_SHARD, READ_ERROR, TRUNCATED_SHARD, Fault, RowError

SCHEMA = pa.schema(
    {
        "image": pa.binary(),
        "captions": pa.list_(pa.string()),
        "name": pa.string(),
        "group": pa.string(),
        "image_check": pa.uint64(),
        "text_check": pa.uint64(),
    }
)
"""Columns of a split; `image` is the first. The last two are `checksum(image)` and `checksum(*captions, name, group)`."""

_FILES_OF_A_SHARD = 2  # the file, and the map's own handle of it
_SHARE_OF_FILES = 4  # of those that the process may have open
_MOST_OPEN = 8192  # Linux gives a process 65,530 maps, to libraries and threads, too
_USED_UP = (errno.EMFILE, errno.ENFILE, errno.ENOMEM)
_MOST_BATCHES = 4
_HEADER_BYTES = 4096
_CHUNK = 2**20


@dataclass(frozen=True)
class Shard:
    """What `info.json` says of a shard."""

    file: str
    """Its name in the folder of the split."""
    rows: int
    bytes: int
    """Its size."""
    xxh3_128: str
    """Digest of its bytes, in hexadecimal."""


def checksum(*parts: bytes | str) -> int:
    """XXH3-64 of strings, which depends on where one ends and the next begins."""
    digest = xxhash.xxh3_64()
    for part in parts:
        data = part.encode("utf-8") if isinstance(part, str) else part
        digest.update(len(data).to_bytes(8, "little"))
        digest.update(data)
    return digest.intdigest()


def digest_of(path: Path) -> str:
    """XXH3-128 of a file, in hexadecimal.

    Raises:
        OSError: it cannot be read.
    """
    digest = xxhash.xxh3_128()
    with path.open("rb") as file:
        while chunk := file.read(_CHUNK):
            digest.update(chunk)
    return digest.hexdigest()


Stamp = tuple[int, int]
"""(bytes, time of the last change in nanoseconds since the epoch) of a file."""


def stamp_of(path: Path) -> Stamp | OSError:
    """A file's stamp, or why there is none."""
    try:
        found = path.stat()
    except OSError as error:
        return error
    return found.st_size, found.st_mtime_ns


def check_size(path: Path, size: int, stamp: Stamp | OSError | None = None) -> tuple[str, str] | None:
    """(reason, sentence) for which a file that should have `size` bytes cannot be used, or None.

    Args:
        stamp: its stamp, if it was looked at already.
    """
    found = stamp_of(path) if stamp is None else stamp
    if isinstance(found, FileNotFoundError):
        return MISSING_SHARD, f"{path} is missing"
    if isinstance(found, OSError):
        return READ_ERROR, f"{path} cannot be read: {found.strerror}"
    if found[0] != size:
        return TRUNCATED_SHARD, f"{path} has {found[0]:,} bytes instead of {size:,}"
    return None


class Shards:
    """The rows of a split by number, whatever has become of its shards. Instances can be sent to other processes."""

    def __init__(self, folder: Path, shards: list[Shard]) -> None:
        self.folder = folder
        self.shards = shards
        self._ends = list(accumulate(shard.rows for shard in shards))
        self._opened: OrderedDict[int, _OpenShard] = OrderedDict()
        self._damaged: dict[int, str] = {}
        # Kept of shards that are closed, so that opening one again is no search through it.
        self._positions: dict[int, _Positions] = {}
        self.stamps = {folder / shard.file: stamp_of(folder / shard.file) for shard in shards}
        """Of the shards when this was made."""
        self.faults: tuple[Fault, ...] = tuple(self._faults())
        """Shards that were missing or of the wrong size then."""

    def __len__(self) -> int:
        return self._ends[-1] if self._ends else 0

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "_opened": OrderedDict()}

    def value(self, row: int, column: str) -> Any:
        """A value, as Python has it.

        Raises:
            IndexError: no such row.
            RowError: the shard, or the part of it that has the row, cannot be read.
        """
        if not 0 <= row < len(self):
            raise IndexError(f"row {row} of {len(self)}")
        number = bisect_right(self._ends, row)
        shard = self._open(number)
        return shard.value(row - (self._ends[number] - self.shards[number].rows), column)

    def _faults(self) -> Iterator[Fault]:
        for shard in self.shards:
            path = self.folder / shard.file
            fault = check_size(path, shard.bytes, self.stamps[path])
            if fault is not None:
                yield Fault(fault[0], str(path), shard.rows)

    def _open(self, number: int) -> _OpenShard:
        """A shard, of which a limited number is kept open. What could not be read is tried again, damage is not."""
        if number in self._opened:
            self._opened.move_to_end(number)
            return self._opened[number]
        path = self.folder / self.shards[number].file
        if number in self._damaged:
            raise RowError(self._damaged[number], DAMAGED_SHARD, str(path))
        try:
            opened = self._newly_opened(path, number)
        except RowError as error:
            if error.reason == DAMAGED_SHARD:
                self._damaged[number] = str(error)
            raise
        self._opened[number] = opened
        self._positions[number] = opened.positions
        while len(self._opened) > _most_open():
            self._opened.popitem(last=False)
        return opened

    def _newly_opened(self, path: Path, number: int) -> _OpenShard:
        shard, positions = self.shards[number], self._positions.get(number)
        try:
            return _OpenShard(path, shard, positions)
        except RowError as error:
            if not self._opened or getattr(error.__cause__, "errno", None) not in _USED_UP:
                raise
        # Others of this process, or of the machine, use files and maps as well; those of this split can be spared.
        self._opened.clear()
        return _OpenShard(path, shard, positions)


@cache
def _most_open() -> int:
    """Shards kept open by a process; with a greater `ulimit -n`, more of a corpus of thousands."""
    files, _ = resource.getrlimit(resource.RLIMIT_NOFILE)
    if files == resource.RLIM_INFINITY:
        return _MOST_OPEN
    return min(_MOST_OPEN, max(4, files // (_FILES_OF_A_SHARD * _SHARE_OF_FILES)))


@dataclass(frozen=True)
class _Positions:
    """Where a shard's record batches begin, in bytes, and by which row they end."""

    offsets: list[int]
    ends: list[int]


class _OpenShard:
    """One shard, mapped.

    Args:
        positions: what an earlier one has found, or None.
    """

    def __init__(self, path: Path, shard: Shard, positions: _Positions | None) -> None:
        self._path = path
        self._size = shard.bytes
        try:
            self._file = path.open("rb", buffering=0)
            self._check_size()
            # Of the same open file as is read from: one that replaces it under its name is none of this one's business.
            self._map = pa.py_buffer(mmap.mmap(self._file.fileno(), shard.bytes, access=mmap.ACCESS_READ))
        except FileNotFoundError as error:
            raise RowError(f"{path} is missing", MISSING_SHARD, str(path)) from error
        except OSError as error:
            raise RowError(f"{path} cannot be read: {error.strerror}", READ_ERROR, str(path)) from error
        self.positions = positions or self._search(shard.rows)
        self._batches: OrderedDict[int, pa.RecordBatch] = OrderedDict()  # sound ones, the last used at the end
        self._unsound: dict[int, str] = {}

    def value(self, row: int, column: str) -> Any:
        """See `Shards.value`; `row` counts from the first of this shard."""
        self._check_size()
        number = bisect_right(self.positions.ends, row)
        batch = self._batch(number)
        place = row - (self.positions.ends[number] - len(batch))
        if column == "image":
            image = self._image(batch.column(0), place)
            self._check(batch, "image_check", place, image)
            return image
        text = {name: batch.column(name)[place].as_py() for name in ("captions", "name", "group")}
        self._check(batch, "text_check", place, *text["captions"], text["name"], text["group"])
        return text[column]

    def _check(self, batch: pa.RecordBatch, column: str, place: int, *parts: bytes | str) -> None:
        if batch.column(column)[place].as_py() != checksum(*parts):
            raise self._damage(f"has a row whose {column.removesuffix('_check')} is not what was written")

    def _search(self, rows: int) -> _Positions:
        """Look through the whole stream, of which no pictures are read."""
        source = pa.BufferReader(self._map)
        offsets, lengths = [], []
        try:
            self._read(0, _HEADER_BYTES)
            messages = pa.ipc.MessageReader.open_stream(source)
            messages.read_next_message()  # the schema, which is known
            while True:
                offset = source.tell()
                self._read(offset, _HEADER_BYTES)
                lengths.append(len(pa.ipc.read_record_batch(messages.read_next_message(), SCHEMA)))
                offsets.append(offset)
        except StopIteration:
            pass
        except RowError:
            raise
        except Exception as error:  # pyarrow raises errors of many kinds on damage, some of them Python's own
            raise self._damage(f"cannot be opened ({_short(error)})") from error
        if sum(lengths) != rows:
            raise self._damage(f"does not have {rows:,} rows")
        return _Positions(offsets, list(accumulate(lengths)))

    def _batch(self, number: int) -> pa.RecordBatch:
        """A record batch that is sound; few are kept, since each holds its arrays."""
        if number in self._batches:
            self._batches.move_to_end(number)
            return self._batches[number]
        if number in self._unsound:
            raise self._damage(self._unsound[number])
        ends, offset = self.positions.ends, self.positions.offsets[number]
        rows = ends[number] - (ends[number - 1] if number else 0)
        try:
            self._read(offset, _HEADER_BYTES)
            batch = pa.ipc.read_record_batch(pa.ipc.read_message(self._map.slice(offset)), SCHEMA)
            self._validate(batch, rows)
        except RowError:
            raise
        except Exception as error:  # see above
            self._unsound[number] = f"has a damaged part of {rows:,} rows ({_short(error)})"
            raise self._damage(self._unsound[number]) from error
        self._batches[number] = batch
        while len(self._batches) > _MOST_BATCHES:
            self._batches.popitem(last=False)
        return batch

    def _validate(self, batch: pa.RecordBatch, rows: int) -> None:
        if len(batch) != rows:
            raise ValueError(f"{len(batch)} rows instead of {rows}")
        image_data = batch.column(0).buffers()[2]
        for column in batch.columns:
            for buffer in column.buffers():
                if buffer is None:
                    continue
                offset = buffer.address - self._map.address
                if not 0 <= offset <= offset + buffer.size <= self._map.size:
                    raise ValueError("a part lies outside of the file")
                if image_data is None or buffer.address != image_data.address:
                    self._read(offset, buffer.size)
        batch.validate(full=True)
        if any(column.null_count for column in (*batch.columns, batch.column("captions").values)):
            raise ValueError("values are missing")
        if len(batch) and np.diff(np.asarray(batch.column("captions").offsets)).min() < 1:
            raise ValueError("captions are missing")

    def _image(self, images: pa.BinaryArray, place: int) -> bytes:
        """A picture read from the file, not from the map: one call instead of a fault for every page of it."""
        offsets, data = images.buffers()[1:]
        first, end = np.frombuffer(offsets, dtype=np.int32, count=2, offset=4 * (images.offset + place)).tolist()
        if first == end:
            return b""
        return self._read(data.address - self._map.address + first, end - first, whole=True)

    def _read(self, offset: int, length: int, whole: bool = False) -> bytes:
        """Bytes of the file, all of them if `whole`, else what the last read had."""
        end = min(offset + length, self._size)
        chunk = b""
        step = length if whole else _CHUNK
        while offset < end:
            try:
                chunk = os.pread(self._file.fileno(), min(step, end - offset), offset)
            except OSError as error:
                raise RowError(
                    f"{self._path} cannot be read at byte {offset:,}: {error.strerror}", READ_ERROR, str(self._path)
                ) from error
            if not chunk or (whole and len(chunk) < length):
                raise RowError(f"{self._path} was cut off while in use", TRUNCATED_SHARD, str(self._path))
            offset += len(chunk)
        return chunk

    def _check_size(self) -> None:
        found = os.fstat(self._file.fileno()).st_size
        if found != self._size:
            raise RowError(
                f"{self._path} has {found:,} bytes instead of {self._size:,}", TRUNCATED_SHARD, str(self._path)
            )

    def _damage(self, what: str) -> RowError:
        return RowError(f"{self._path} {what}: it is damaged", DAMAGED_SHARD, str(self._path))


def _short(error: BaseException) -> str:
    return (str(error).splitlines() or [type(error).__name__])[0][:200]
