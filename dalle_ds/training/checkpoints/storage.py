"""The tensors of a checkpoint on disk: safetensors files, and an index of what lies where in them.

    rank-N.safetensors  what process N wrote; any reader of safetensors opens it
    index.json          the model's parameters with what is not a tensor; each tensor's type, size and slices, with file and
                        place of the first byte

All tensors are matrices (`matrix_size`), called KIND/PARAMETER.

DeepSpeed cuts parameters whatever their shapes: ZeRO-1 and 2 lay a parameter group's parameters end to end and cut the whole
into equal lengths, ZeRO-3 cuts every parameter by itself. What a process is left with of a parameter is a run of its elements
in row-major order, a `ParamShard`. Of a matrix, that is at most three slices: the end of a row, whole rows, the beginning of a
row. Slices can be put into a parameter, or taken out of it, by processes that cut it in another way.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, BinaryIO, NamedTuple

import torch
from torch import Tensor

from dalle_ds.errors import CheckpointError
from dalle_ds.parallel import Split
from dalle_ds.parsing import parse_json

INDEX_NAME = "index.json"
DTYPES = {torch.float32: "F32", torch.bfloat16: "BF16", torch.float16: "F16", torch.int16: "I16"}
"""Those that are stored, by their names in safetensors."""
BUFFER_BYTES = 2**24
"""Read at a time where bytes cannot go straight to their place."""


def matrix_size(shape: Sequence[int]) -> tuple[int, int]:
    """Rows and columns of a parameter that is seen as a matrix: its first axis, and all others."""
    return (shape[0], math.prod(shape[1:])) if shape else (1, 1)


class TensorSlice(NamedTuple):
    """A rectangle of a matrix."""

    row: int
    column: int
    rows: int
    columns: int

    def of(self, matrix: Tensor) -> Tensor:
        """A view (rows, columns) of the matrix."""
        return matrix[self.row : self.row + self.rows, self.column : self.column + self.columns]

    def overlap(self, other: TensorSlice) -> TensorSlice | None:
        """What lies in both."""
        row, column = max(self.row, other.row), max(self.column, other.column)
        rows = min(self.row + self.rows, other.row + other.rows) - row
        columns = min(self.column + self.columns, other.column + other.columns) - column
        return TensorSlice(row, column, rows, columns) if rows > 0 and columns > 0 else None

    def within(self, outer: TensorSlice) -> TensorSlice:
        """The same, counted from the first element of a slice that it lies in."""
        return self._replace(row=self.row - outer.row, column=self.column - outer.column)


@dataclass(frozen=True)
class ParamShard:
    """A run of a parameter's elements that this process keeps in one of its fp32 shards; padding is none of them."""

    name: str
    """The parameter's name in the plain model."""
    shape: tuple[int, ...]
    """Of the parameter, or of this process's piece of it where a tensor group divides it."""
    start: int
    """Place of the first element in that, flattened."""
    length: int
    """Number of elements, at least one."""
    shard: int
    """Number of the shard."""
    offset: int
    """Place of the first element in the shard, flattened."""
    split: Split | None = None
    """How the parameter is divided among the tensor group; None where it is not."""
    part: int = 0
    """Number of this process in its tensor group."""
    parts: int = 1
    """Processes in the tensor group."""

    @property
    def whole(self) -> tuple[int, ...]:
        """Shape of the parameter in the plain model."""
        shape = list(self.shape)
        if self.split is not None:
            shape[self.split.axis] *= self.parts
        return tuple(shape)

    def of(self, shard: Tensor) -> Tensor:
        """This run of the shard, or of a tensor that is laid out as it: a view (length,)."""
        return shard.detach().view(-1).narrow(0, self.offset, self.length)

    def slices(self, run: Tensor) -> list[tuple[TensorSlice, Tensor]]:
        """Which slices of the plain model's parameter, as a matrix, a run is made up of; of each a view (rows, columns).

        `run` is (length,), from `of`.
        """
        height, width = matrix_size(self.shape)
        found = []
        for own in _runs(self.start, self.length, width):
            start = run.storage_offset() + own.row * width + own.column - self.start
            for row, rows_before, rows in self._placed(0, own.row, own.rows, height):
                for column, columns_before, columns in self._placed(1, own.column, own.columns, width):
                    begin = start + rows_before * width + columns_before
                    view = run.as_strided((rows, columns), (width, 1), begin)
                    found.append((TensorSlice(row, column, rows, columns), view))
        return found

    def _placed(self, axis: int, first: int, count: int, size: int) -> Iterator[tuple[int, int, int]]:
        """An interval of a piece's matrix, `size` long along the axis, as intervals of the whole one: (first, how many come
        before, how many)."""
        if self.split is None or self.split.axis != axis:
            yield first, 0, count
            return
        block = size // self.split.parts  # what this process has of each part of the axis
        done = 0
        while done < count:
            number, inside = divmod(first + done, block)
            some = min(block - inside, count - done)
            yield (number * self.parts + self.part) * block + inside, done, some
            done += some


def _runs(start: int, length: int, width: int) -> Iterator[TensorSlice]:
    """A run of the elements of a matrix that is so wide, as slices."""
    while length > 0:
        row, column = divmod(start, width)
        if column or length < width:
            rows, columns = 1, min(width - column, length)
        else:
            rows, columns = length // width, width
        yield TensorSlice(row, column, rows, columns)
        start += rows * columns
        length -= rows * columns


class LocalShards(NamedTuple):
    """What a process has of one tensor."""

    size: tuple[int, int]
    """Rows and columns of the whole tensor."""
    parts: list[tuple[TensorSlice, Tensor]]
    """Slices, and their elements, (rows, columns) of any strides; at least one."""


class Chunk(NamedTuple):
    """A stored slice."""

    at: TensorSlice
    file: str
    """Name of its file."""
    offset: int
    """Place of its first byte there; the rest follows row by row."""


class Stored(NamedTuple):
    """A stored tensor."""

    dtype: torch.dtype
    size: tuple[int, int]
    """Rows and columns."""
    chunks: Sequence[Chunk]
    """What it consists of."""


class Index:
    """What a folder of tensors holds, by `INDEX_NAME`; CheckpointError where that is missing or broken."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        try:
            content = parse_json((folder / INDEX_NAME).read_bytes())
            names = list(content["files"])
            if not all(isinstance(name, str) and Path(name).name == name for name in names):
                raise ValueError("a file that is not beside it")
            dtypes = {code: dtype for dtype, code in DTYPES.items()}
            self.parameters: Mapping[str, dict[str, Any]] = dict(content["parameters"])
            """What is known of each of the model's parameters."""
            self.tensors: Mapping[str, Stored] = {
                name: Stored(
                    dtypes[entry["dtype"]],
                    (_count(entry["size"][0]), _count(entry["size"][1])),
                    [_chunk(numbers, names) for numbers in entry["chunks"]],
                )
                for name, entry in content["tensors"].items()
            }
        except (OSError, ValueError, KeyError, TypeError, IndexError, AttributeError) as error:
            raise CheckpointError(f"{folder / INDEX_NAME} cannot be read: {str(error)[:200]!r}") from error

    def read(self, shards: Mapping[str, LocalShards]) -> None:
        """Fill parts of tensors with what is stored, wherever they are and however they were cut when it was written.

        Raises:
            CheckpointError: a tensor or a part of it is not stored or has another size, or a file is missing or cut off.
        """
        jobs = []
        for name, wanted in shards.items():
            stored = self.tensors.get(name)
            if stored is None or stored.size != wanted.size:
                found = "none" if stored is None else f"one of {stored.size[0]} × {stored.size[1]}"
                raise CheckpointError(
                    f"{name} of {wanted.size[0]} × {wanted.size[1]} is needed, and {self.folder} has {found}"
                )
            needed = wanted.parts[0][1].dtype
            if stored.dtype.is_floating_point != needed.is_floating_point:
                raise CheckpointError(f"{name} is needed as {needed}, and {self.folder} has {stored.dtype}")
            missing = sum(part.numel() for _, part in wanted.parts)
            for chunk in stored.chunks:
                for at, part in wanted.parts:
                    common = chunk.at.overlap(at)
                    if common is not None:
                        jobs.append((chunk, stored.dtype, common.within(chunk.at), common.within(at).of(part)))
                        missing -= common.rows * common.columns
            if missing:
                raise CheckpointError(f"{name} is not stored whole")
        jobs.sort(key=lambda job: (job[0].file, job[0].offset))
        opened: dict[str, BinaryIO] = {}
        try:
            for chunk, dtype, source, into in jobs:
                if chunk.file not in opened:
                    opened[chunk.file] = (self.folder / chunk.file).open("rb")
                _read(opened[chunk.file], chunk, dtype, source, into)
        except OSError as error:
            raise CheckpointError(f"{self.folder} has a broken or missing file: {error}") from error
        finally:
            for file in opened.values():
                file.close()

    def tensor(self, name: str) -> Tensor:
        """A whole tensor, on the CPU, as a matrix; CheckpointError as from `read`."""
        stored = self.tensors[name]
        try:
            whole = torch.empty(stored.size, dtype=stored.dtype)
        except RuntimeError as error:
            raise CheckpointError(
                f"{name} of {stored.size[0]} × {stored.size[1]} does not fit into memory: {self.folder} is damaged, or of a "
                "larger machine"
            ) from error
        self.read({name: LocalShards(stored.size, [(TensorSlice(0, 0, *stored.size), whole)])})
        return whole


def _chunk(numbers: Sequence[int], files: Sequence[str]) -> Chunk:
    *at, file, offset = map(_count, numbers)
    return Chunk(TensorSlice(*at), files[file], offset)


def _count(value: Any) -> int:
    if type(value) is not int or not 0 <= value < 2**48:
        raise ValueError(f"{value!r} is no number of bytes or elements")
    return value


def _read(file: BinaryIO, chunk: Chunk, dtype: torch.dtype, source: TensorSlice, into: Tensor) -> None:
    """Read a slice of a chunk to where it belongs: at once where it lies in one piece here and there."""
    begin = chunk.offset + source.row * chunk.at.columns * dtype.itemsize
    if source.rows == 1:
        begin += source.column * dtype.itemsize
    file.seek(begin)
    width = chunk.at.columns if source.rows > 1 else source.columns
    skipped = source.column if source.rows > 1 else 0
    if width == source.columns and into.is_contiguous() and into.device.type == "cpu" and into.dtype == dtype:
        _fill(file, into)
        return
    step = max(1, BUFFER_BYTES // (width * dtype.itemsize))
    for rows in into.split(step):
        buffer = torch.empty(len(rows), width, dtype=dtype)
        _fill(file, buffer)
        rows.copy_(buffer[:, skipped : skipped + source.columns])


def _fill(file: BinaryIO, tensor: Tensor) -> None:
    buffer = as_bytes(tensor)
    read = 0
    while read < len(buffer):
        count = file.readinto(buffer[read:])  # type: ignore[attr-defined]
        if not count:
            raise OSError(f"{file.name} is cut off")
        read += count


def as_bytes(tensor: Tensor) -> memoryview:
    """The memory of a contiguous CPU tensor."""
    return tensor.view(-1).view(torch.uint8).numpy().data
