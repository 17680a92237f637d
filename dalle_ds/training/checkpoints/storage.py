"""The tensors of a checkpoint on disk: safetensors files, and an index of what lies where in them.

PyTorch's distributed checkpoints (torch.distributed.checkpoint) decide who writes which rectangle of which tensor, so that
every element is written once, and what a process must read that is cut in another way. Their own storage is left out: it
pickles its index and every tensor, and reads a stored rectangle whole to get at a few of its rows. Here,

    rank-N.safetensors  what process N wrote; any reader of safetensors opens it
    index.json          the model's parameters with what is not a tensor; each tensor's type, size and rectangles, with file
                        and place of the first byte

All tensors are matrices (`matrix_size`), called KIND/PARAMETER.

DeepSpeed cuts parameters in its own ways, whatever their shapes: ZeRO-1 and 2 lay a parameter group's parameters end to end
and cut the whole into equal lengths, ZeRO-3 cuts every parameter by itself. What a process is left with of a parameter is a
run of its elements in row-major order, a `ParamShard`. Of a matrix, and every parameter is seen as one here, a run is made up
of at most three rectangles: the end of a row, whole rows, the beginning of a row. Rectangles can be put into a parameter, or
taken out of it, by processes that cut it in another way.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, BinaryIO

import torch
from torch import Tensor
from torch.distributed.checkpoint.metadata import (
    ChunkStorageMetadata,
    TensorProperties,
    TensorStorageMetadata,
)
from torch.distributed.checkpoint.planner_helpers import create_read_items_for_chunk_list

from dalle_ds.errors import CheckpointError
from dalle_ds.parallel import Split
from dalle_ds.parsing import parse_json


@dataclass(frozen=True)
class TensorSlice:
    """Elements of a parameter that is seen as a matrix, its first axis by all others (`matrix_size`)."""

    row: int
    """First row, in the whole parameter."""
    column: int
    """First column."""
    rows: int
    """Number of rows."""
    columns: int
    """Number of columns."""
    start: int
    """Place of the first element in the fragment."""
    stride: int
    """From one row to the next in the fragment."""

    def of(self, run: Tensor) -> Tensor:
        """The rectangle of a fragment's elements, 1-D: a view (rows, columns)."""
        return run.as_strided((self.rows, self.columns), (self.stride, 1), run.storage_offset() + self.start)

    def in_matrix(self, whole: Tensor) -> Tensor:
        """The rectangle's place in the whole parameter's matrix: a view (rows, columns)."""
        return whole[self.row : self.row + self.rows, self.column : self.column + self.columns]


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

    def of(self, tensor: Tensor) -> Tensor:
        """This run of the shard, or of a tensor that is laid out as it: a view (length,)."""
        return tensor.detach().view(-1).narrow(0, self.offset, self.length)

    def slices(self) -> list[TensorSlice]:
        """What the run is made up of in the plain model's parameter."""
        height, width = matrix_size(self.shape)
        found: list[TensorSlice] = []
        for row, column, rows, columns in _runs(self.start, self.length, width):
            start = row * width + column - self.start
            for global_row, skipped_rows, some_rows in self._placed(0, row, rows, height):
                for global_column, skipped_columns, some_columns in self._placed(1, column, columns, width):
                    begin = start + skipped_rows * width + skipped_columns
                    found.append(TensorSlice(global_row, global_column, some_rows, some_columns, begin, width))
        return found

    def _placed(self, axis: int, first: int, count: int, size: int) -> Iterator[tuple[int, int, int]]:
        """An interval of a piece's matrix, as intervals of the whole one: (first, how many come before, how many).

        Args:
            size: of the piece's matrix along the axis.
        """
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


def matrix_size(shape: Sequence[int]) -> tuple[int, int]:
    """Rows and columns of a parameter that is seen as a matrix: its first axis, and all others."""
    return (shape[0], math.prod(shape[1:])) if shape else (1, 1)


def _runs(start: int, length: int, width: int) -> Iterator[tuple[int, int, int, int]]:
    """A run of a matrix's elements as rectangles: (row, column, rows, columns)."""
    while length > 0:
        row, column = divmod(start, width)
        if column or length < width:
            rows, columns = 1, min(width - column, length)
        else:
            rows, columns = length // width, width
        yield row, column, rows, columns
        start += rows * columns
        length -= rows * columns


INDEX_NAME = "index.json"
DTYPES = {
    torch.float32: "F32",
    torch.bfloat16: "BF16",
    torch.float16: "F16",
    torch.int16: "I16",
}
"""Those that are stored, by their names in safetensors."""
BUFFER_BYTES = 2**24
"""Read at a time where bytes cannot go straight to their place."""


@dataclass(frozen=True)
class LocalShards:
    """What a process has of one tensor."""

    size: tuple[int, int]
    """Rows and columns of the whole tensor."""
    parts: Sequence[tuple[TensorSlice, Tensor]]
    """Where its parts belong, and these, (rows, columns) of any strides; at least one."""


@dataclass(frozen=True)
class Chunk:
    """A stored rectangle."""

    row: int
    column: int
    rows: int
    columns: int
    file: str
    """Name of its file."""
    offset: int
    """Place of its first byte there; the rest follows row by row."""


@dataclass(frozen=True)
class Stored:
    """A stored tensor."""

    dtype: torch.dtype
    """Of its elements."""
    size: tuple[int, int]
    """Rows and columns."""
    chunks: Sequence[Chunk]
    """The rectangles that it consists of."""


class Index:
    """What a folder of tensors holds, by `INDEX_NAME`.

    Args:
        folder: where the files are.
        parameters: the model's parameters and what is known of each.
        tensors: by name.
    """

    def __init__(
        self,
        folder: Path,
        parameters: Mapping[str, dict[str, Any]],
        tensors: Mapping[str, Stored],
    ) -> None:
        self.folder = folder
        self.parameters = parameters
        self.tensors = tensors

    @classmethod
    def open(cls, folder: Path) -> Index:
        """Read a folder's index.

        Raises:
            CheckpointError: it is missing or broken.
        """
        try:
            content = parse_json((folder / INDEX_NAME).read_bytes())
            names = list(content["files"])
            if not all(isinstance(name, str) and Path(name).name == name for name in names):
                raise ValueError("a file that is not beside it")
            dtypes = {code: dtype for dtype, code in DTYPES.items()}
            tensors = {
                name: Stored(
                    dtypes[entry["dtype"]],
                    (_count(entry["size"][0]), _count(entry["size"][1])),
                    [_chunk(entries, names) for entries in entry["chunks"]],
                )
                for name, entry in content["tensors"].items()
            }
            return cls(folder, dict(content["parameters"]), tensors)
        except (OSError, ValueError, KeyError, TypeError, IndexError, AttributeError) as error:
            raise CheckpointError(f"{folder / INDEX_NAME} cannot be read: {str(error)[:200]!r}") from error

    def read(self, pieces: Mapping[str, LocalShards]) -> None:
        """Fill parts of tensors with what is stored, wherever they are and however they were cut when it was written.

        Raises:
            CheckpointError: a tensor or a part of it is not stored or has another size, or a file is missing or cut off.
        """
        jobs = []
        for name, wanted in pieces.items():
            stored = self.tensors.get(name)
            if stored is None or stored.size != wanted.size:
                found = "none" if stored is None else f"one of {stored.size[0]} × {stored.size[1]}"
                raise CheckpointError(
                    f"{name} of {wanted.size[0]} × {wanted.size[1]} is needed, and {self.folder} has {found}"
                )
            needed = wanted.parts[0][1].dtype
            if stored.dtype.is_floating_point != needed.is_floating_point:
                raise CheckpointError(f"{name} is needed as {needed}, and {self.folder} has {stored.dtype}")
            jobs += [(stored, chunk, source, into) for chunk, source, into in _overlaps(name, stored, wanted)]
        jobs.sort(key=lambda job: (job[1].file, job[1].offset))
        opened: dict[str, BinaryIO] = {}
        try:
            for stored, chunk, source, into in jobs:
                if chunk.file not in opened:
                    opened[chunk.file] = (self.folder / chunk.file).open("rb")
                _read(opened[chunk.file], stored.dtype, chunk, source, into)
        except OSError as error:
            raise CheckpointError(f"{self.folder} has a broken or missing file: {error}") from error
        finally:
            for file in opened.values():
                file.close()

    def tensor(self, name: str) -> Tensor:
        """A whole tensor, on the CPU, as a matrix.

        Raises:
            CheckpointError: as `read`.
        """
        stored = self.tensors[name]
        try:
            whole = torch.empty(stored.size, dtype=stored.dtype)
        except RuntimeError as error:
            raise CheckpointError(
                f"{name} of {stored.size[0]} × {stored.size[1]} does not fit into memory: {self.folder} is damaged, or of a "
                "larger machine"
            ) from error
        everything = TensorSlice(0, 0, *stored.size, 0, stored.size[1])
        self.read({name: LocalShards(stored.size, [(everything, whole)])})
        return whole


def _chunk(entries: Sequence[int], files: Sequence[str]) -> Chunk:
    row, column, rows, columns, file, offset = map(_count, entries)
    return Chunk(row, column, rows, columns, files[file], offset)


def _count(value: Any) -> int:
    if type(value) is not int or not 0 <= value < 2**48:
        raise ValueError(f"{value!r} is no number of bytes or elements")
    return value


def as_chunk(at: TensorSlice | Chunk) -> ChunkStorageMetadata:
    return ChunkStorageMetadata(torch.Size((at.row, at.column)), torch.Size((at.rows, at.columns)))


def _overlaps(name: str, stored: Stored, wanted: LocalShards) -> list[tuple[Chunk, TensorSlice, Tensor]]:
    """What is to be read: the stored rectangle, what of it (placed within it), and where to.

    Raises:
        CheckpointError: the stored rectangles do not have all that is wanted.
    """
    metadata = TensorStorageMetadata(
        TensorProperties(dtype=stored.dtype), torch.Size(stored.size), [as_chunk(chunk) for chunk in stored.chunks]
    )
    places = {torch.Size((at.row, at.column)): part for at, part in wanted.parts}
    found = []
    for item in create_read_items_for_chunk_list(name, metadata, [as_chunk(at) for at, _ in wanted.parts]):
        assert item.storage_index.index is not None and item.dest_index.offset is not None
        chunk = stored.chunks[item.storage_index.index]
        (row, column), (rows, columns) = item.storage_offsets, item.lengths
        source = TensorSlice(row, column, rows, columns, 0, chunk.columns)
        row, column = item.dest_offsets
        into = places[item.dest_index.offset][row : row + rows, column : column + columns]
        found.append((chunk, source, into))
    if sum(into.numel() for _, _, into in found) != sum(part.numel() for _, part in wanted.parts):
        raise CheckpointError(f"{name} is not stored whole")
    return found


def _read(file: BinaryIO, dtype: torch.dtype, chunk: Chunk, source: TensorSlice, into: Tensor) -> None:
    """Read a rectangle of a chunk to where it belongs: at once where it lies in one piece here and there."""
    begin = chunk.offset + source.row * chunk.columns * dtype.itemsize
    if source.rows == 1:
        begin += source.column * dtype.itemsize
    file.seek(begin)
    width = chunk.columns if source.rows > 1 else source.columns
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
