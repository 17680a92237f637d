"""Reading the Arrow shards of a split, any of which may be missing, cut off or damaged.

A shard is opened when a row of it is first wanted. Nothing of it is believed: its size and its number of rows must be
those of `info.json`; a record batch is validated before one of its values is touched, since Arrow follows offsets without
looking; and every row carries checksums, so that a picture or caption is the one that was prepared, or an error. What is
mapped into memory is read from the file once before it is touched: a page that the disk cannot deliver is an error there,
and the end of the process in a map.
"""

from __future__ import annotations

import mmap
import os
from bisect import bisect_right
from collections import OrderedDict
from collections.abc import Iterator
from dataclasses import dataclass
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

_MOST_OPEN = 128
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
            opened = _OpenShard(path, self.shards[number])
        except RowError as error:
            if error.reason == DAMAGED_SHARD:
                self._damaged[number] = str(error)
            raise
        self._opened[number] = opened
        while len(self._opened) > _MOST_OPEN:
            self._opened.popitem(last=False)
        return opened


class _OpenShard:
    """One shard, mapped, with the positions of its record batches."""

    def __init__(self, path: Path, shard: Shard) -> None:
        self._path = path
        self._size = shard.bytes
        fault = check_size(path, shard.bytes)
        if fault is not None:
            raise RowError(fault[1], fault[0], str(path))
        try:
            self._file = path.open("rb", buffering=0)
        except OSError as error:
            raise RowError(f"{path} cannot be read: {error.strerror}", READ_ERROR, str(path)) from error
        self._check_size()
        # Of the same open file as is read from: one that replaces it under its name is none of this one's business.
        self._map = pa.py_buffer(mmap.mmap(self._file.fileno(), shard.bytes, access=mmap.ACCESS_READ))
        try:
            self._batches = list(self._messages())
        except RowError:
            raise
        except Exception as error:  # pyarrow raises errors of many kinds on damage, some of them Python's own
            raise self._damage(f"cannot be opened ({_short(error)})") from error
        self._ends = list(accumulate(len(batch) for batch in self._batches))
        if (self._ends[-1] if self._ends else 0) != shard.rows:
            raise self._damage(f"does not have {shard.rows:,} rows")
        self._sound: set[int] = set()
        self._unsound: dict[int, str] = {}

    def value(self, row: int, column: str) -> Any:
        """See `Shards.value`; `row` counts from the first of this shard."""
        self._check_size()
        number = bisect_right(self._ends, row)
        batch = self._validated(number)
        place = row - (self._ends[number] - len(batch))
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

    def _messages(self) -> Iterator[pa.RecordBatch]:
        source = pa.BufferReader(self._map)
        self._read(0, _HEADER_BYTES)
        messages = pa.ipc.MessageReader.open_stream(source)
        messages.read_next_message()  # the schema, which is known
        while True:
            self._read(source.tell(), _HEADER_BYTES)
            try:
                message = messages.read_next_message()
            except StopIteration:
                return
            yield pa.ipc.read_record_batch(message, SCHEMA)

    def _validated(self, number: int) -> pa.RecordBatch:
        batch = self._batches[number]
        if number in self._sound:
            return batch
        if number not in self._unsound:
            try:
                self._validate(batch)
                self._sound.add(number)
                return batch
            except RowError:
                raise
            except Exception as error:  # see above
                self._unsound[number] = f"has a damaged part of {len(batch):,} rows ({_short(error)})"
        raise self._damage(self._unsound[number])

    def _validate(self, batch: pa.RecordBatch) -> None:
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
