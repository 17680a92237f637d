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
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from itertools import accumulate
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import xxhash

from dalle_ds.data.faults import DAMAGED_FILE, MISSING_FILE, READ_ERROR, TRUNCATED_FILE, Fault, RowError
from dalle_ds.errors import DataChangedError, DataError
from dalle_ds.files import digest_of

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

Stamp = tuple[int, int]
"""(bytes, time of the last change in nanoseconds since the epoch) of a file."""


@dataclass(frozen=True)
class DataFile:
    """What a manifest says of a file."""

    file: str
    """Its name in the folder of the split."""
    rows: int
    bytes: int
    """Its size."""
    xxh3_128: str
    """Digest of its bytes, in hexadecimal."""

    def __post_init__(self) -> None:
        numbers = (self.rows, self.bytes)
        if not isinstance(self.file, str) or Path(self.file).name != self.file or not isinstance(self.xxh3_128, str):
            raise ValueError(f"no file of a store: {str(self.file)[:80]!r}")
        if any(type(number) is not int or number < 0 for number in numbers):
            raise ValueError(f"{self.file} has impossible sizes")


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


def size_problem(path: Path, size: int) -> tuple[str, str] | None:
    """(reason, sentence) for which a file that should have `size` bytes cannot be used, or None."""
    return _problem(path, size, _stamp_of(path))


def _stamp_of(path: Path) -> Stamp | OSError:
    try:
        found = path.stat()
    except OSError as error:
        return error
    return found.st_size, found.st_mtime_ns


def _problem(path: Path, size: int, stamp: Stamp | OSError) -> tuple[str, str] | None:
    if isinstance(stamp, FileNotFoundError):
        return MISSING_FILE, f"{path} is missing"
    if isinstance(stamp, OSError):
        return READ_ERROR, f"{path} cannot be read: {stamp.strerror}"
    if stamp[0] != size:
        return TRUNCATED_FILE, f"{path} has {stamp[0]:,} bytes instead of {size:,}"
    return None


class FileSnapshot:
    """Sizes and times of files when they were opened: tells later whether they are still what was written."""

    def __init__(self, folder: Path, files: Sequence[DataFile]) -> None:
        self._files = {folder / file.file: file for file in files}
        self._stamps = {path: _stamp_of(path) for path in self._files}

    @property
    def faults(self) -> Iterator[Fault]:
        """Files that were missing or of the wrong size then."""
        for path, file in self._files.items():
            problem = _problem(path, file.bytes, self._stamps[path])
            if problem is not None:
                yield Fault(problem[0], str(path), file.rows)

    def check(self) -> None:
        """See that each file that is still there is the same, or is again what was written.

        Contents are read only where the time differs. A file that is cut off is lost, like one that is gone: what reads of it
        finds that out. One that could not be looked at in the first place is not looked at now.

        Raises:
            DataChangedError: one has grown, or has another time and other contents.
        """
        for path, then in self._stamps.items():
            now, file = _stamp_of(path), self._files[path]
            if isinstance(then, OSError) or isinstance(now, OSError) or now == then or now[0] < file.bytes:
                continue
            if now[0] > file.bytes:
                raise _changed(path, f"it has {now[0]:,} bytes, and had {file.bytes:,}")
            try:
                same = digest_of(path) == file.xxh3_128
            except OSError:
                continue
            if not same:
                raise _changed(path, "its contents are other ones")
            self._stamps[path] = now  # copied, touched or put back, but the same


def check_same(folder: Path, read: Callable[[], Any], then: Any, otherwise: str) -> None:
    """See that `read` gives of a manifest what it gave then. An error of the disk or network says nothing of what is there.

    Raises:
        DataChangedError: `otherwise`, or that there is no manifest.
    """
    try:
        now = read()
    except DataError as error:
        cause = error.__cause__
        if isinstance(cause, OSError) and not isinstance(cause, FileNotFoundError):
            return
        raise DataChangedError(f"{folder} has changed since it was opened: {error}") from error
    if now != then:
        raise DataChangedError(f"{otherwise}: put back what was there, or begin a new run in another --run_dir")


def _changed(path: Path, what: str) -> DataChangedError:
    return DataChangedError(
        f"{path} has changed since it was opened ({what}): put back what was there, or begin a new run in another --run_dir"
    )


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
        self._damaged: dict[int, str] = {}
        # Kept of files that are closed, so that opening one again is no search through it.
        self._positions: dict[int, _Positions] = {}
        self.snapshot = FileSnapshot(folder, files)
        """Of the files when this was made."""
        self.faults: tuple[Fault, ...] = tuple(self.snapshot.faults)
        """Files that were missing or of the wrong size then."""

    def __len__(self) -> int:
        return self._ends[-1] if self._ends else 0

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "_opened": OrderedDict()}

    def value(self, row: int, column: str) -> Any:
        """A value of a pair, as Python has it.

        Raises:
            IndexError: no such row.
            RowError: the file, or the part of it that has the row, cannot be read.
        """
        number = self._number_of(row)
        return self._open(number).value(row - (self._ends[number] - self.files[number].rows), column)

    def vector(self, row: int) -> bytes | None:
        """The bytes of a vector, None where it was written that there is none; raises as `value`."""
        number = self._number_of(row)
        return self._open(number).vector(row - (self._ends[number] - self.files[number].rows), row)

    def _number_of(self, row: int) -> int:
        if not 0 <= row < len(self):
            raise IndexError(f"row {row} of {len(self)}")
        return bisect_right(self._ends, row)

    def _open(self, number: int) -> Any:
        """A file, of which a limited number is kept open. What could not be read is tried again, damage is not."""
        if number in self._opened:
            self._opened.move_to_end(number)
            return self._opened[number]
        path = self.folder / self.files[number].file
        if number in self._damaged:
            raise RowError(self._damaged[number], DAMAGED_FILE, str(path))
        try:
            opened = self._newly_opened(path, number)
        except RowError as error:
            if error.reason == DAMAGED_FILE:
                self._damaged[number] = str(error)
            raise
        self._opened[number] = opened
        self._positions[number] = opened.positions
        while len(self._opened) > _MOST_OPEN:
            self._opened.popitem(last=False)
        return opened

    def _newly_opened(self, path: Path, number: int) -> _OpenFile:
        about = path, self.files[number], self._positions.get(number)
        try:
            return self._kind(*about)
        except RowError as error:
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
            raise RowError(f"{path} is missing", MISSING_FILE, str(path)) from error
        except OSError as error:
            raise RowError(f"{path} cannot be read: {error.strerror}", READ_ERROR, str(path)) from error
        self.positions = positions or self._search(file.rows)

    def _search(self, rows: int) -> _Positions:
        """Look through the whole stream, of which no images or vectors are read."""
        source = pa.BufferReader(self._map)
        places, lengths = [], []
        try:
            self._read(0, _HEADER_BYTES)
            messages = pa.ipc.MessageReader.open_stream(source)
            messages.read_next_message()  # the schema, which is known
            while True:
                offset = source.tell()
                self._read(offset, _HEADER_BYTES)
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
                raise RowError(f"{self._path} was cut off while in use", TRUNCATED_FILE, str(self._path))
            offset += len(chunk)
        return chunk

    def _check_size(self) -> None:
        found = os.fstat(self._file.fileno()).st_size
        if found != self._size:
            raise RowError(
                f"{self._path} has {found:,} bytes instead of {self._size:,}", TRUNCATED_FILE, str(self._path)
            )

    def _damage(self, what: str) -> RowError:
        return RowError(f"{self._path} {what}: it is damaged", DAMAGED_FILE, str(self._path))


class _VectorFile(_OpenFile):
    """Rows of `vector_schema`: their places are known once the file is open, and Arrow is not asked again."""

    def __init__(self, width: int, path: Path, file: DataFile, positions: _Positions | None) -> None:
        self._width = width
        super().__init__(path, file, positions, vector_schema(width))

    def vector(self, row: int, seed: int) -> bytes | None:
        """See `Store.vector`; `row` counts from the first of this file, `seed` from the first of all."""
        number = bisect_right(self.positions.ends, row)
        row -= self.positions.ends[number - 1] if number else 0
        vectors, checks = self.positions.places[number]
        check = int.from_bytes(self._read(checks + row * _CHECK_BYTES, _CHECK_BYTES, whole=True), "little")
        if check == 0:
            return None
        vector = self._read(vectors + row * self._width, self._width, whole=True)
        if check != vector_check(vector, seed):
            raise self._damage(f"has a vector, row {seed}, that is not what was written")
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
            self._read(offset, _HEADER_BYTES)
            batch = pa.ipc.read_record_batch(pa.ipc.read_message(self._map.slice(offset)), PAIR_SCHEMA)
            self._validate(batch, rows)
        except RowError:
            raise
        except Exception as error:  # see `_search`
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
        for buffer in (buffer for column in batch.columns for buffer in column.buffers() if buffer is not None):
            offset = self._inside(buffer, buffer.size)
            if image_data is None or buffer.address != image_data.address:
                self._read(offset, buffer.size)
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
        return self._read(data.address - self._map.address + first, end - first, whole=True)


def _short(error: BaseException) -> str:
    return (str(error).splitlines() or [type(error).__name__])[0][:200]
