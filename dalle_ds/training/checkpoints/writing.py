"""Writing tensors: who writes which slice of which, and safetensors files (`storage.py` says what is where)."""

from __future__ import annotations

import json
import os
import weakref
from collections import Counter
from collections.abc import Callable, Iterable, Mapping, Sequence
from functools import cached_property
from pathlib import Path
from typing import Any, NamedTuple, TypeVar

import torch
import torch.distributed as dist
import xxhash
from torch import Tensor

from dalle_ds.training.checkpoints.manifest import FileRecord
from dalle_ds.training.checkpoints.storage import BUFFER_BYTES, DTYPES, INDEX_NAME, LocalShards, TensorSlice, as_bytes

Value = TypeVar("Value")


class Entry(NamedTuple):
    """A slice of a tensor, as a process has or writes it."""

    name: str
    """Of the tensor."""
    size: tuple[int, int]
    """Rows and columns of the whole tensor."""
    at: TensorSlice
    dtype: torch.dtype

    @property
    def key(self) -> str:
        """Its name in its file."""
        row, column, rows, columns = self.at
        return f"{self.name}[{row}:{row + rows}, {column}:{column + columns}]"

    @property
    def num_bytes(self) -> int:
        return self.at.rows * self.at.columns * self.dtype.itemsize

    def find(self, shards: Mapping[str, LocalShards]) -> Tensor:
        """It, among what the process has."""
        return next(part for at, part in shards[self.name].parts if at == self.at)


class Plan:
    """Which slices this process writes of those that it has, and where in which file; on the group's first process, also what
    everyone writes. Made by `plan_for`; holds for as long as the processes have the same slices."""

    def __init__(
        self,
        rank: int,
        offered: Sequence[Entry],
        own: Sequence[Entry],
        everyone: Sequence[Sequence[Entry]],
        before: Plan | None = None,
    ) -> None:
        self.offered = offered
        self._file_name = file_name(rank)
        self._header, self._places, self._body_size = _layout(own)
        self._everyone = everyone
        # Of the plan before, where it fits: locking memory takes seconds.
        fits = before is not None and before._body_size == self._body_size
        self._buffer: Tensor | None = before._buffer if before is not None and fits else None

    @cached_property
    def total_size(self) -> int:
        """On the group's first process, bytes of all files with tensors."""
        layouts = [_layout(entries) for entries in self._everyone if entries]
        return sum(len(header) + size for header, _, size in layouts)

    def snapshot(self, shards: Mapping[str, LocalShards]) -> Mapping[str, LocalShards]:
        """What this process writes of them, copied to the host's memory, which holds it until the next call."""
        found = [(entry, offset, entry.find(shards)) for entry, offset in self._places]
        on_gpu = any(part.is_cuda for _, _, part in found)
        if self._buffer is None:
            self._buffer = torch.empty(self._body_size, dtype=torch.uint8)
            if on_gpu:
                _lock(self._buffer)
        copied: dict[str, LocalShards] = {}
        for entry, offset, part in found:
            copy = self._buffer[offset : offset + entry.num_bytes].view(entry.dtype).view(part.shape)
            copied.setdefault(entry.name, LocalShards(entry.size, [])).parts.append((entry.at, copy))
            copy.copy_(part, non_blocking=True)
        if on_gpu:
            torch.cuda.synchronize()
        return copied

    def write(self, folder: Path, shards: Mapping[str, LocalShards]) -> FileRecord | None:
        """Write this process's file into `folder` and force it to the disk; OSError where that fails. Talks to nobody.

        Returns what a manifest says of the file; None where this process has none to write.
        """
        if not self._places:
            return None
        contents = (entry.find(shards).detach().cpu() for entry, _ in self._places)
        return _write_file(folder / self._file_name, self._header, contents)

    def write_index(self, folder: Path, parameters: Mapping[str, dict[str, Any]]) -> None:
        """Write `INDEX_NAME`, with what is known of the model's parameters besides tensors, on the group's first process."""
        text = json.dumps({"parameters": parameters})
        (folder / INDEX_NAME).write_text(f"{text[:-1]}, {self._chunks_text[1:]}\n")

    @cached_property
    def _chunks_text(self) -> str:
        """All of an index but parameters, which is the same as long as the plan is."""
        names: list[str] = []
        tensors: dict[str, dict[str, Any]] = {}
        for rank, entries in enumerate(self._everyone):
            header, places, _ = _layout(entries)
            for entry, offset in places:
                tensor = {"dtype": DTYPES[entry.dtype], "size": entry.size, "chunks": []}
                chunks = tensors.setdefault(entry.name, tensor)["chunks"]
                chunks.append([*entry.at, len(names), len(header) + offset])
            if places:
                names.append(file_name(rank))
        return json.dumps({"files": names, "tensors": tensors})


def plan_for(shards: Mapping[str, LocalShards], group: Any, before: Plan | None = None) -> Plan:
    """The plan for what this process, and the others of a group (None stands for all), have: that of `before` where none has
    anything else than then. Collective within the group."""
    offered = [Entry(name, each.size, at, part.dtype) for name, each in shards.items() for at, part in each.parts]
    changed = torch.tensor(int(before is None or offered != before.offered))
    if dist.is_initialized():
        dist.all_reduce(changed, group=group)
    if before is not None and not changed:
        return before
    shared_out = _shared_out(gather_to_first(offered, group))
    if not dist.is_initialized():
        return Plan(0, offered, shared_out[0], shared_out, before)
    received: list[Any] = [None]
    dist.scatter_object_list(received, shared_out or None, group=group, group_src=0)
    return Plan(dist.get_rank(group), offered, received[0], shared_out, before)


def _shared_out(offers: Sequence[Sequence[Entry]]) -> list[list[Entry]]:
    """Who writes what of what each has: of several who have the same, the one with the fewest bytes so far."""
    holders: dict[Entry, list[int]] = {}
    for rank, entries in enumerate(offers):
        for entry in entries:
            holders.setdefault(entry, []).append(rank)
    written: list[list[Entry]] = [[] for _ in offers]
    sizes = [0] * len(offers)
    for entry, ranks in holders.items():
        rank = min(ranks, key=sizes.__getitem__)
        written[rank].append(entry)
        sizes[rank] += entry.num_bytes
    whole = {entry.name: entry.size for entry in holders}
    covered = Counter[str]()
    for entry in holders:
        covered[entry.name] += entry.at.rows * entry.at.columns
    wrong = [name for name, (rows, columns) in whole.items() if covered[name] != rows * columns]
    assert not wrong, f"slices that processes have do not make up {wrong[0]} once"
    return written


def _lock(buffer: Tensor) -> None:
    """Lock memory in place for as long as the tensor lives, so that GPUs copy to it at full speed; not by PyTorch's allocator,
    which takes the next power of two. Where it is refused, copies are slower."""
    cudart, address = torch.cuda.cudart(), buffer.data_ptr()
    if cudart.cudaHostRegister(address, buffer.numel(), 0) == cudart.cudaError.success:
        # Else the next memory at this address would be taken for locked.
        weakref.finalize(buffer, cudart.cudaHostUnregister, address).atexit = False


def gather_to_first(value: Value, group: Any) -> list[Value]:
    """What all processes of a group give, on its first; elsewhere, nothing. Collective within the group."""
    if not dist.is_initialized():
        return [value]
    everyone: list[Any] | None = [None] * dist.get_world_size(group) if dist.get_rank(group) == 0 else None
    dist.gather_object(value, everyone, group=group, group_dst=0)
    return everyone or []


def file_name(rank: int) -> str:
    """Of what the process of this number in its group writes."""
    return f"rank-{rank}.safetensors"


def write_safetensors(
    path: Path,
    tensors: Iterable[tuple[str, torch.dtype, Sequence[int], Callable[[], Tensor]]],
    metadata: Mapping[str, str] | None = None,
) -> None:
    """Write a safetensors file with one tensor in memory at a time, and force it to the disk.

    Byte for byte what `safetensors.torch.save_file` writes of tensors of one type. Given are names, types, shapes, and what
    returns the tensors when their turn comes.
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


def _layout(entries: Sequence[Entry]) -> tuple[bytes, list[tuple[Entry, int]], int]:
    """Of a file with these entries: its header; the entries in their order, and where each begins behind it; bytes of all."""
    by_key = {entry.key: entry for entry in entries}
    header, offsets, size = _header([(key, each.dtype, each.at[2:]) for key, each in by_key.items()])
    return header, [(by_key[key], offset) for key, offset in offsets.items()], size


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
            size += len(content)
            for begin in range(0, len(content), BUFFER_BYTES):  # other threads have their turn in between
                file.write(content[begin : begin + BUFFER_BYTES])
                digest.update(content[begin : begin + BUFFER_BYTES])
        file.flush()
        os.fsync(file.fileno())
    return FileRecord(size, digest.hexdigest())
