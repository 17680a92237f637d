"""Rows in Arrow files, by number, whatever has become of the files: reading. `store_writer` writes them.

A row is an image with its captions, or a vector of fixed width: codes or an embedding of an image. Files may be missing, cut
off or damaged. One is opened when a row of it is first wanted, and nothing of it is believed: its size and its number of rows
must be those of the manifest, offsets are verified before they are followed, and every row carries a checksum, so that it is
what was written, or an error. What is mapped into memory is read from the file once before it is touched: a page that the
disk cannot deliver is an error there, and the end of the process in a map.
"""

from __future__ import annotations

import errno
import mmap
import os
import resource
from bisect import bisect_right
from collections import OrderedDict
from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial
from itertools import accumulate
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import xxhash

from dalle_ds.data.faults import DAMAGED_FILE, MISSING_FILE, READ_ERROR, TRUNCATED_FILE, Fault, RowError
from dalle_ds.data.snapshot import DataFile, FileSnapshot

PAIR_SCHEMA = pa.schema(
    {
        "image": pa.binary(),
        "captions": pa.list_(pa.string()),
        "name": pa.string(),
        "group": pa.string(),
        "image_check": pa.uint64(),
        "text_check": pa.uint64(),
    }
)
"""Rows of a split; `image` is the first column. The checks are `checksum(image)` and `checksum(*captions, name, group)`."""

# Files kept open, with two handles each: a quarter of what the process may have, and of the maps that Linux gives it.
_MOST_OPEN = min(8192, max(128, resource.getrlimit(resource.RLIMIT_NOFILE)[0] // 8))
_USED_UP = (errno.EMFILE, errno.ENFILE, errno.ENOMEM)
_MOST_BATCHES = 4
_HEADER_BYTES = 4096
_CHUNK = 2**20
_CHECK_BYTES = 8


def vector_schema(width: int) -> pa.Schema:
    """Rows of `width` bytes, which `vector_check` verifies."""
    return pa.schema({"vector": pa.binary(width), "check": pa.uint64()})


def checksum(*parts: bytes | str) -> int:
    """XXH3-64 of strings, which depends on where one ends and the next begins."""
    digest = xxhash.xxh3_64()
    for part in parts:
        data = part.encode("utf-8") if isinstance(part, str) else part
        digest.update(len(data).to_bytes(8, "little"))
        digest.update(data)
    return digest.intdigest()


def vector_check(vector: bytes, row: int) -> int:
    """XXH3-64 of a vector, seeded with its row, so that one in the place of another is noticed; never 0, which says that
    there is none."""
    return xxhash.xxh3_64_intdigest(vector, row) or 1


class Store:
    """The rows of a split. Instances can be sent to other processes.

    Args:
        folder: of the files.
        files: in the order of their rows.
        width: bytes of a vector; None for pairs of images and captions.

    Raises:
        ValueError: no file of its size has as many vectors.
    """

    def __init__(self, folder: Path, files: Sequence[DataFile], width: int | None = None) -> None:
        self.folder = folder
        self.files = tuple(files)
        self._kind = _PairFile if width is None else partial(_VectorFile, width)
        if any(file.rows * (width or 0) > file.bytes for file in files):
            raise ValueError("the files have other rows")
        self._ends = list(accumulate(file.rows for file in files))
        self._opened: OrderedDict[int, Any] = OrderedDict()
        # Kept of files that are closed, so that opening one again is no search through it.
        self._positions: dict[int, _Positions] = {}
        self._damaged: dict[int, str] = {}  # what was found once is not looked for again at every row
        self.snapshot = FileSnapshot(folder, files)
        """Of the files when this was made."""
        self.faults: tuple[Fault, ...] = tuple(self.snapshot.faults)
        """Files that were missing or of the wrong size then."""

    def __len__(self) -> int:
        return self._ends[-1] if self._ends else 0

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "_opened": OrderedDict()}

    def value(self, row: int, column: str) -> Any:
        """A value of a pair, as Python has it; `RowError` where the file, or the part of it with the row, cannot be read."""
        file, place = self._file_of(row)
        return file.value(place, column)

    def vector(self, row: int, seed: int | None = None) -> bytes | None:
        """The bytes of a vector, None where it was written that there is none; raises as `value`. `seed` is that of its check,
        where it is not the row."""
        file, place = self._file_of(row)
        return file.vector(place, row if seed is None else seed)

    def _file_of(self, row: int) -> tuple[Any, int]:
        """The open file that has a row, and its place there."""
        if not 0 <= row < len(self):
            raise IndexError(f"row {row} of {len(self)}")
        number = bisect_right(self._ends, row)
        return self._open(number), row - (self._ends[number] - self.files[number].rows)

    def _open(self, number: int) -> Any:
        """A file, of which a limited number is kept open."""
        if number in self._opened:
            self._opened.move_to_end(number)
            return self._opened[number]
        opened = self._opened[number] = self._newly_opened(number)
        self._positions[number] = opened.positions
        if len(self._opened) > _MOST_OPEN:
            self._opened.popitem(last=False)
        return opened

    def _newly_opened(self, number: int) -> _OpenFile:
        file = self.files[number]
        path = self.folder / file.file
        about = path, file, self._positions.get(number)
        if number in self._damaged:
            raise RowError(self._damaged[number], DAMAGED_FILE, str(path))
        try:
            return self._kind(*about)
        except RowError as error:
            if error.reason == DAMAGED_FILE:
                self._damaged[number] = str(error)
            if not self._opened or getattr(error.__cause__, "errno", None) not in _USED_UP:
                raise
        # Others of this process, or of the machine, use files and maps as well; those of this split can be spared.
        self._opened.clear()
        return self._kind(*about)


@dataclass(frozen=True)
class _Positions:
    """Of each record batch of a file: where it begins, or where its columns of fixed width do, in bytes; and by which row it
    ends."""

    places: list[tuple[int, ...]]
    ends: list[int]


class _OpenFile:
    """One file, mapped.

    Args:
        positions: what an earlier one has found, or None.
    """

    def __init__(self, path: Path, file: DataFile, positions: _Positions | None, schema: pa.Schema) -> None:
        self._path = path
        self._size = file.bytes
        self._schema = schema
        try:
            self._file = path.open("rb", buffering=0)
            self._check_size()
            # Of the same open file as is read from: one that replaces it under its name is none of this one's business.
            self._map = pa.py_buffer(mmap.mmap(self._file.fileno(), file.bytes, access=mmap.ACCESS_READ))
        except FileNotFoundError as error:
            raise self._error(MISSING_FILE, "is missing") from error
        except OSError as error:
            raise self._error(READ_ERROR, f"cannot be read: {error.strerror}") from error
        self.positions = positions or self._search(file.rows)

    def _search(self, rows: int) -> _Positions:
        """Look through the whole stream, of which no images or vectors are read."""
        source = pa.BufferReader(self._map)
        places, lengths = [], []
        try:
            self._touch(0, _HEADER_BYTES)
            messages = pa.ipc.MessageReader.open_stream(source)
            messages.read_next_message()  # the schema, which is known
            while True:
                offset = source.tell()
                self._touch(offset, _HEADER_BYTES)
                batch = pa.ipc.read_record_batch(messages.read_next_message(), self._schema)
                places.append(self._places(batch, offset))
                lengths.append(len(batch))
        except StopIteration:
            pass
        except RowError:
            raise
        except Exception as error:  # pyarrow raises errors of many kinds on damage, some of them Python's own
            raise self._damage(f"cannot be opened ({_short(error)})") from error
        if sum(lengths) != rows:
            raise self._damage(f"does not have {rows:,} rows")
        return _Positions(places, list(accumulate(lengths)))

    def _places(self, batch: pa.RecordBatch, offset: int) -> tuple[int, ...]:
        """What `_Positions.places` keeps of a batch that begins at `offset`."""
        return (offset,)

    def _inside(self, buffer: pa.Buffer, size: int) -> int:
        """Where a buffer of `size` bytes lies in the file; ValueError where it does not."""
        offset = buffer.address - self._map.address
        if not 0 <= offset <= offset + size <= self._size:
            raise ValueError("a part lies outside of the file")
        return offset

    def _touch(self, offset: int, length: int) -> None:
        """Read what is then looked at in the map."""
        end = min(offset + length, self._size)
        for start in range(offset, end, _CHUNK):
            self._read(start, min(_CHUNK, end - start))

    def _read(self, offset: int, length: int) -> bytes:
        content = b""
        while len(content) < length:  # some file systems give less than was asked for
            try:
                more = os.pread(self._file.fileno(), length - len(content), offset + len(content))
            except OSError as error:
                raise self._error(READ_ERROR, f"cannot be read at byte {offset:,}: {error.strerror}") from error
            if not more:
                raise self._error(TRUNCATED_FILE, "was cut off while in use")
            content = content + more if content else more
        return content

    def _check_size(self) -> None:
        found = os.fstat(self._file.fileno()).st_size
        if found != self._size:
            raise self._error(TRUNCATED_FILE, f"has {found:,} bytes instead of {self._size:,}")

    def _damage(self, what: str) -> RowError:
        return self._error(DAMAGED_FILE, f"{what}: it is damaged")

    def _error(self, reason: str, what: str) -> RowError:
        return RowError(f"{self._path} {what}", reason, str(self._path))


class _VectorFile(_OpenFile):
    """Rows of `vector_schema`: their places are known once the file is open, and Arrow is not asked again."""

    def __init__(self, width: int, path: Path, file: DataFile, positions: _Positions | None) -> None:
        self._width = width
        super().__init__(path, file, positions, vector_schema(width))

    def vector(self, row: int, seed: int) -> bytes | None:
        """See `Store.vector`; `row` counts from the first of this file."""
        number = bisect_right(self.positions.ends, row)
        row -= self.positions.ends[number - 1] if number else 0
        vectors, checks = self.positions.places[number]
        check = int.from_bytes(self._read(checks + row * _CHECK_BYTES, _CHECK_BYTES), "little")
        if check == 0:
            return None
        vector = self._read(vectors + row * self._width, self._width)
        if check != vector_check(vector, seed):
            raise self._damage(f"has a vector, number {seed}, that is not what was written")
        return vector

    def _places(self, batch: pa.RecordBatch, offset: int) -> tuple[int, ...]:
        if len(batch) == 0:
            return 0, 0
        buffers = [column.buffers() for column in batch.columns]
        if any(missing is not None for missing, _ in buffers):
            raise ValueError("values are missing")
        sizes = (len(batch) * self._width, len(batch) * _CHECK_BYTES)
        return tuple(self._inside(data, size) for (_, data), size in zip(buffers, sizes, strict=True))


class _PairFile(_OpenFile):
    """Rows of `PAIR_SCHEMA`. A record batch is validated before one of its values is touched, since Arrow follows offsets
    without looking."""

    def __init__(self, path: Path, file: DataFile, positions: _Positions | None) -> None:
        super().__init__(path, file, positions, PAIR_SCHEMA)
        self._batches: OrderedDict[int, pa.RecordBatch] = OrderedDict()  # sound ones, the last used at the end
        self._unsound: dict[int, str] = {}

    def value(self, row: int, column: str) -> Any:
        """See `Store.value`; `row` counts from the first of this file."""
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

    def _batch(self, number: int) -> pa.RecordBatch:
        """A record batch that is sound; few are kept, since each holds its arrays."""
        if number in self._batches:
            self._batches.move_to_end(number)
            return self._batches[number]
        if number in self._unsound:
            raise self._damage(self._unsound[number])
        ends, (offset,) = self.positions.ends, self.positions.places[number]
        rows = ends[number] - (ends[number - 1] if number else 0)
        try:
            self._touch(offset, _HEADER_BYTES)
            batch = pa.ipc.read_record_batch(pa.ipc.read_message(self._map.slice(offset)), PAIR_SCHEMA)
            self._validate(batch, rows)
        except RowError:
            raise
        except Exception as error:  # see `_search`
            self._unsound[number] = f"has a damaged part of {rows:,} rows ({_short(error)})"
            raise self._damage(self._unsound[number]) from error
        self._batches[number] = batch
        if len(self._batches) > _MOST_BATCHES:
            self._batches.popitem(last=False)
        return batch

    def _validate(self, batch: pa.RecordBatch, rows: int) -> None:
        if len(batch) != rows:
            raise ValueError(f"{len(batch)} rows instead of {rows}")
        image_data = batch.column(0).buffers()[2]
        for buffer in (buffer for column in batch.columns for buffer in column.buffers() if buffer is not None):
            offset = self._inside(buffer, buffer.size)
            if image_data is None or buffer.address != image_data.address:
                self._touch(offset, buffer.size)
        batch.validate(full=True)
        if any(column.null_count for column in (*batch.columns, batch.column("captions").values)):
            raise ValueError("values are missing")
        if len(batch) and np.diff(np.asarray(batch.column("captions").offsets)).min() < 1:
            raise ValueError("captions are missing")

    def _image(self, images: pa.BinaryArray, place: int) -> bytes:
        """An image read from the file, not from the map: one call instead of a fault for every page of it."""
        offsets, data = images.buffers()[1:]
        first, end = np.frombuffer(offsets, dtype=np.int32, count=2, offset=4 * (images.offset + place)).tolist()
        if first == end:
            return b""
        return self._read(data.address - self._map.address + first, end - first)


def _short(error: BaseException) -> str:
    return (str(error).splitlines() or [type(error).__name__])[0][:200]
