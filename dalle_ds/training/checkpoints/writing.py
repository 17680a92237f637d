"""Writing tensors: who writes which rectangle of which, and safetensors files (`storage.py` says what is where)."""

from __future__ import annotations

import json
import os
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
import torch.distributed.checkpoint as dcp
import xxhash
from torch import Tensor
from torch.distributed.checkpoint.metadata import (
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

from dalle_ds.training.checkpoints.folder import FileRecord
from dalle_ds.training.checkpoints.storage import BUFFER_BYTES, DTYPES, INDEX_NAME, LocalShards, as_bytes, as_chunk


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

    def snapshot(self, pieces: Mapping[str, LocalShards], buffer: Tensor | None) -> Tensor:
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

    def write(self, folder: Path, source: Tensor | Mapping[str, LocalShards]) -> FileRecord | None:
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
            contents = source.split(BUFFER_BYTES)
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
            tensors[name] = {"dtype": DTYPES[stored.properties.dtype], "size": list(stored.size), "chunks": chunks}
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

    def plan(self, pieces: Mapping[str, LocalShards]) -> Plan:
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

    def _make(self, pieces: Mapping[str, LocalShards]) -> Plan:
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
        header[name] = {"dtype": DTYPES[dtype], "shape": list(shape), "data_offsets": [begin, end]}
        offsets[name] = begin
    text = json.dumps(header, separators=(",", ":"), ensure_ascii=False).encode()
    text += b" " * (-len(text) % 8)
    return len(text).to_bytes(8, "little") + text, offsets, end


def _write_file(path: Path, header: bytes, contents: Iterable[Tensor]) -> FileRecord:
    digest, size = xxhash.xxh3_128(header), len(header)
    with path.open("wb") as file:
        file.write(header)
        for tensor in contents:
            content = as_bytes(tensor.contiguous())
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

    def find(self, pieces: Mapping[str, LocalShards]) -> Tensor:
        """It, among what the process has."""
        return next(part for at, part in pieces[self.name].parts if (at.row, at.column) == (self.row, self.column))


class _FileLayout:
    """Where rectangles lie in a file that has them."""

    def __init__(self, slices: Sequence[_Rectangle]) -> None:
        by_key = {rectangle.key: rectangle for rectangle in slices}
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


def _write_items(name: str, pieces: LocalShards) -> list[WriteItem]:
    properties = TensorProperties(dtype=pieces.parts[0][1].dtype)
    return [
        WriteItem(
            MetadataIndex(name, (at.row, at.column)),
            WriteItemType.SHARD,
            tensor_data=TensorWriteData(as_chunk(at), properties, torch.Size(pieces.size)),
        )
        for at, _ in pieces.parts
    ]
