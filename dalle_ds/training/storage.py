"""The tensors of a checkpoint on disk: safetensors files, and an index of what lies where in them.

PyTorch's distributed checkpoints (torch.distributed.checkpoint) decide who writes which rectangle of which tensor, so that
every element is written once, and what a process must read that is cut in another way. Their own storage is left out: it
pickles its index and every tensor, and reads a stored rectangle whole to get at a few of its rows. Here,

    rank-N.safetensors  what process N wrote; any reader of safetensors opens it
    index.json          the model's parameters with what is not a tensor; each tensor's type, size and rectangles, with file
                        and place of the first byte

All tensors are matrices (`matrix_size`), called KIND/PARAMETER.
"""

from __future__ import annotations

import json
import os
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any, BinaryIO

import torch
import torch.distributed as dist
import torch.distributed.checkpoint as dcp
import xxhash
from torch import Tensor
from torch.distributed.checkpoint.metadata import (
    ChunkStorageMetadata,
    Metadata,
    MetadataIndex,
    TensorProperties,
    TensorStorageMetadata,
)
from torch.distributed.checkpoint.planner import (
    SavePlan,
    TensorWriteData,
    WriteItem,
    WriteItemType,
)
from torch.distributed.checkpoint.planner_helpers import create_read_items_for_chunk_list

from dalle_ds.errors import CheckpointError
from dalle_ds.parsing import parse_json
from dalle_ds.training.fragments import Rectangle
from dalle_ds.training.manifest import FileRecord

INDEX_NAME = "index.json"
_DTYPES = {
    torch.float32: "F32",
    torch.bfloat16: "BF16",
    torch.float16: "F16",
    torch.int16: "I16",
}
"""Those that are stored, by their names in safetensors."""
_BUFFER_BYTES = 2**24
"""Read at a time where bytes cannot go straight to their place."""


@dataclass(frozen=True)
class Pieces:
    """What a process has of one tensor."""

    size: tuple[int, int]
    """Rows and columns of the whole tensor."""
    parts: Sequence[tuple[Rectangle, Tensor]]
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
            dtypes = {code: dtype for dtype, code in _DTYPES.items()}
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

    def read(self, pieces: Mapping[str, Pieces]) -> None:
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
        everything = Rectangle(0, 0, *stored.size, 0, stored.size[1])
        self.read({name: Pieces(stored.size, [(everything, whole)])})
        return whole


class Plan:
    """Who writes which rectangle of which tensor, so that each is written once, and where in which file it goes.

    Made by `plan`; holds for as long as the processes have the same pieces.
    """

    def __init__(self, rank: int, plans: Sequence[SavePlan] | None, own: SavePlan, metadata: Metadata | None) -> None:
        self.file_name = _file_name(rank)
        """Of this process's file."""
        self._own = _FileLayout(_rectangles(own))
        self._plans, self._metadata = plans, metadata

    @cached_property
    def _files(self) -> list[_FileLayout]:
        """Of all processes, on the group's first."""
        return [_FileLayout(_rectangles(each)) for each in self._plans or ()]

    @cached_property
    def total_size(self) -> int:
        """On the group's first process, bytes of all files."""
        return sum(file.size for file in self._files)

    def snapshot(self, pieces: Mapping[str, Pieces], buffer: Tensor | None) -> Tensor:
        """A copy, in the host's memory, of what this process writes, which may then change.

        Args:
            buffer: an earlier copy, whose memory is used again where it fits.

        Returns:
            (bytes,) uint8, what `write` takes.
        """
        found = [(rectangle, offset, rectangle.find(pieces)) for rectangle, offset in self._own.places]
        on_gpu = any(part.is_cuda for _, _, part in found)
        if buffer is None or buffer.numel() != self._own.body_size:
            buffer = torch.empty(self._own.body_size, dtype=torch.uint8)
            if on_gpu:
                _pin(buffer)
        for rectangle, offset, part in found:
            size = rectangle.size * rectangle.dtype.itemsize
            place = buffer[offset : offset + size].view(rectangle.dtype).view(rectangle.rows, rectangle.columns)
            place.copy_(part, non_blocking=True)
        if on_gpu:
            torch.cuda.synchronize()
        return buffer

    def write(self, folder: Path, source: Tensor | Mapping[str, Pieces]) -> FileRecord | None:
        """Write this process's file into `folder` and force it to the disk. Communicates with nobody.

        Args:
            source: from `snapshot`, or the pieces themselves, of which one tensor at a time is copied to the host.

        Returns:
            What a manifest says of the file; None where this process has none to write.

        Raises:
            OSError: it cannot be written.
        """
        if not self._own.places:
            return None
        contents: Iterable[Tensor]
        if isinstance(source, Tensor):
            contents = source.split(_BUFFER_BYTES)
        else:
            contents = (rectangle.find(source).detach().cpu() for rectangle, _ in self._own.places)
        return _write_file(folder / self.file_name, self._own.header, contents)

    def write_index(self, folder: Path, parameters: Mapping[str, dict[str, Any]]) -> None:
        """Write `INDEX_NAME`, on the group's first process.

        Args:
            parameters: what is known of the model's parameters besides tensors.
        """
        text = json.dumps({"parameters": parameters})
        (folder / INDEX_NAME).write_text(f"{text[:-1]}, {self._chunks_text[1:]}\n")

    @cached_property
    def _chunks_text(self) -> str:
        """All of an index but parameters, which is the same as long as the plan is."""
        assert self._metadata is not None
        places: dict[tuple[str, int, int], tuple[int, int]] = {}
        names: list[str] = []
        for rank, file in enumerate(self._files):
            for rectangle, offset in file.in_file:
                places[rectangle.name, rectangle.row, rectangle.column] = len(names), offset
            if file.places:
                names.append(_file_name(rank))
        tensors = {}
        for name, stored in self._metadata.state_dict_metadata.items():
            assert isinstance(stored, TensorStorageMetadata)
            chunks = [
                [*chunk.offsets, *chunk.sizes, *places[name, chunk.offsets[0], chunk.offsets[1]]]
                for chunk in stored.chunks
            ]
            tensors[name] = {"dtype": _DTYPES[stored.properties.dtype], "size": list(stored.size), "chunks": chunks}
        return json.dumps({"files": names, "tensors": tensors})


class Planner:
    """Makes plans, and keeps the last for as long as it holds.

    Args:
        group: the processes that write; None stands for all.
    """

    def __init__(self, group: Any = None) -> None:
        self._group = group
        self._alone = not dist.is_initialized() or dist.get_world_size(group) == 1
        self._rank = 0 if self._alone else dist.get_rank(group)
        self._offered: list[Any] = []
        self._plan: Plan | None = None

    def plan(self, pieces: Mapping[str, Pieces]) -> Plan:
        """The plan for what this process, and the others, have. Collective within the group."""
        offered = [
            (name, each.size, [(place, part.dtype) for place, part in each.parts]) for name, each in pieces.items()
        ]
        changed = torch.tensor(int(self._plan is None or offered != self._offered))
        if not self._alone:
            dist.all_reduce(changed, group=self._group)
        if changed or self._plan is None:
            self._plan, self._offered = self._make(pieces), offered
        return self._plan

    def _make(self, pieces: Mapping[str, Pieces]) -> Plan:
        planner = _OfferingPlanner()
        planner.set_up_planner(dict(pieces), is_coordinator=self._rank == 0)
        offers: list[Any] = [planner.create_local_plan()]
        if not self._alone:
            is_first, count = self._rank == 0, dist.get_world_size(self._group)
            gathered: list[Any] | None = [None] * count if is_first else None
            dist.gather_object(offers[0], gathered, group=self._group, group_dst=0)
            offers = gathered or []
        if self._rank > 0:
            received: list[Any] = [None]
            dist.scatter_object_list(received, None, group=self._group, group_src=0)
            return Plan(self._rank, None, received[0], None)
        plans, metadata = planner.create_global_plan(offers)
        if not self._alone:
            dist.scatter_object_list([None], plans, group=self._group, group_src=0)
        return Plan(0, plans, plans[0], metadata)


def write_safetensors(
    path: Path,
    tensors: Iterable[tuple[str, torch.dtype, Sequence[int], Callable[[], Tensor]]],
    metadata: Mapping[str, str] | None = None,
) -> None:
    """Write a safetensors file with one tensor in memory at a time, and force it to the disk.

    Byte for byte what `safetensors.torch.save_file` writes of tensors of one type.

    Args:
        tensors: names, types, shapes, and what returns the tensors when their turn comes.
        metadata: goes into the file's header.
    """
    given = {name: (dtype, shape, tensor) for name, dtype, shape, tensor in tensors}
    header, offsets, _ = _header([(name, dtype, shape) for name, (dtype, shape, _) in given.items()], metadata)

    def contents() -> Iterable[Tensor]:
        for name in offsets:
            dtype, shape, tensor = given[name]
            value = tensor().detach().to("cpu", dtype)
            assert value.shape == torch.Size(shape)
            yield value

    _write_file(path, header, contents())


def _header(
    tensors: Iterable[tuple[str, torch.dtype, Sequence[int]]], metadata: Mapping[str, str] | None = None
) -> tuple[bytes, dict[str, int], int]:
    """What a safetensors file begins with; where, behind it, each tensor begins, in their order; bytes of all tensors."""
    # Wider types first, so that every element lies at a multiple of its size.
    ordered = sorted(tensors, key=lambda tensor: (-tensor[1].itemsize, tensor[0]))
    header: dict[str, Any] = {} if metadata is None else {"__metadata__": dict(metadata)}
    offsets, end = {}, 0
    for name, dtype, shape in ordered:
        begin, end = end, end + torch.Size(shape).numel() * dtype.itemsize
        header[name] = {"dtype": _DTYPES[dtype], "shape": list(shape), "data_offsets": [begin, end]}
        offsets[name] = begin
    text = json.dumps(header, separators=(",", ":"), ensure_ascii=False).encode()
    text += b" " * (-len(text) % 8)
    return len(text).to_bytes(8, "little") + text, offsets, end


def _write_file(path: Path, header: bytes, contents: Iterable[Tensor]) -> FileRecord:
    digest, size = xxhash.xxh3_128(header), len(header)
    with path.open("wb") as file:
        file.write(header)
        for tensor in contents:
            content = _bytes(tensor.contiguous())
            file.write(content)
            digest.update(content)
            size += len(content)
        file.flush()
        os.fsync(file.fileno())
    return FileRecord(size, digest.hexdigest())


@dataclass(frozen=True)
class _Rectangle:
    """A rectangle that a process writes."""

    name: str
    """Of its tensor."""
    row: int
    column: int
    rows: int
    columns: int
    dtype: torch.dtype

    @property
    def size(self) -> int:
        return self.rows * self.columns

    @property
    def key(self) -> str:
        """Its name in its file."""
        return f"{self.name}[{self.row}:{self.row + self.rows}, {self.column}:{self.column + self.columns}]"

    def find(self, pieces: Mapping[str, Pieces]) -> Tensor:
        """It, among what the process has."""
        return next(part for at, part in pieces[self.name].parts if (at.row, at.column) == (self.row, self.column))


class _FileLayout:
    """Where rectangles lie in a file that has them."""

    def __init__(self, rectangles: Sequence[_Rectangle]) -> None:
        by_key = {rectangle.key: rectangle for rectangle in rectangles}
        shapes = [(key, each.dtype, (each.rows, each.columns)) for key, each in by_key.items()]
        self.header, offsets, self.body_size = _header(shapes)
        self.places = [(by_key[key], offset) for key, offset in offsets.items()]
        """Rectangles in their order, and where they begin behind the header."""

    @property
    def in_file(self) -> list[tuple[_Rectangle, int]]:
        """Rectangles, and where they begin in the file."""
        return [(rectangle, len(self.header) + offset) for rectangle, offset in self.places]

    @property
    def size(self) -> int:
        """Of the file, in bytes."""
        return len(self.header) + self.body_size if self.places else 0


def _rectangles(plan: SavePlan) -> list[_Rectangle]:
    found = []
    for item in plan.items:
        data = item.tensor_data
        assert data is not None
        (row, column), (rows, columns) = data.chunk.offsets, data.chunk.sizes
        found.append(_Rectangle(item.index.fqn, row, column, rows, columns, data.properties.dtype))
    return found


def _pin(buffer: Tensor) -> None:
    """Lock memory in place, so that GPUs copy to it at full speed.

    Not by PyTorch's allocator, which takes the next power of two. Where it is refused, copies are slower.
    """
    torch.cuda.cudart().cudaHostRegister(buffer.data_ptr(), buffer.numel(), 0)


def _file_name(rank: int) -> str:
    return f"rank-{rank}.safetensors"


class _OfferingPlanner(dcp.DefaultSavePlanner):
    """Offers what a process has; who writes what several have is decided by the default planner."""

    def __init__(self) -> None:
        super().__init__(flatten_state_dict=False, flatten_sharded_tensors=False)

    def create_local_plan(self) -> SavePlan:
        self.plan = SavePlan([item for name, pieces in self.state_dict.items() for item in _write_items(name, pieces)])
        return self.plan


def _write_items(name: str, pieces: Pieces) -> list[WriteItem]:
    properties = TensorProperties(dtype=pieces.parts[0][1].dtype)
    return [
        WriteItem(
            MetadataIndex(name, (at.row, at.column)),
            WriteItemType.SHARD,
            tensor_data=TensorWriteData(_as_chunk(at), properties, torch.Size(pieces.size)),
        )
        for at, _ in pieces.parts
    ]


def _chunk(entries: Sequence[int], files: Sequence[str]) -> Chunk:
    row, column, rows, columns, file, offset = map(_count, entries)
    return Chunk(row, column, rows, columns, files[file], offset)


def _count(value: Any) -> int:
    if type(value) is not int or not 0 <= value < 2**48:
        raise ValueError(f"{value!r} is no number of bytes or elements")
    return value


def _as_chunk(at: Rectangle | Chunk) -> ChunkStorageMetadata:
    return ChunkStorageMetadata(torch.Size((at.row, at.column)), torch.Size((at.rows, at.columns)))


def _overlaps(name: str, stored: Stored, wanted: Pieces) -> list[tuple[Chunk, Rectangle, Tensor]]:
    """What is to be read: the stored rectangle, what of it (placed within it), and where to.

    Raises:
        CheckpointError: the stored rectangles do not have all that is wanted.
    """
    metadata = TensorStorageMetadata(
        TensorProperties(dtype=stored.dtype), torch.Size(stored.size), [_as_chunk(chunk) for chunk in stored.chunks]
    )
    places = {torch.Size((at.row, at.column)): part for at, part in wanted.parts}
    found = []
    for item in create_read_items_for_chunk_list(name, metadata, [_as_chunk(at) for at, _ in wanted.parts]):
        assert item.storage_index.index is not None and item.dest_index.offset is not None
        chunk = stored.chunks[item.storage_index.index]
        (row, column), (rows, columns) = item.storage_offsets, item.lengths
        source = Rectangle(row, column, rows, columns, 0, chunk.columns)
        row, column = item.dest_offsets
        into = places[item.dest_index.offset][row : row + rows, column : column + columns]
        found.append((chunk, source, into))
    if sum(into.numel() for _, _, into in found) != sum(part.numel() for _, part in wanted.parts):
        raise CheckpointError(f"{name} is not stored whole")
    return found


def _read(file: BinaryIO, dtype: torch.dtype, chunk: Chunk, source: Rectangle, into: Tensor) -> None:
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
    step = max(1, _BUFFER_BYTES // (width * dtype.itemsize))
    for rows in into.split(step):
        buffer = torch.empty(len(rows), width, dtype=dtype)
        _fill(file, buffer)
        rows.copy_(buffer[:, skipped : skipped + source.columns])


def _fill(file: BinaryIO, tensor: Tensor) -> None:
    buffer = _bytes(tensor)
    read = 0
    while read < len(buffer):
        count = file.readinto(buffer[read:])  # type: ignore[attr-defined]
        if not count:
            raise OSError(f"{file.name} is cut off")
        read += count


def _bytes(tensor: Tensor) -> memoryview:
    """The memory of a contiguous CPU tensor."""
    return tensor.view(-1).view(torch.uint8).numpy().data
