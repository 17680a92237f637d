"""The tensors of a checkpoint on disk: safetensors files, and an index of what lies where in them.

PyTorch's distributed checkpoints (torch.distributed.checkpoint) decide who writes which rectangle of which tensor, so that
every element is written once, and what a process must read that is cut in another way. Their own storage is left out: it
pickles its index and every tensor, and reads a stored rectangle whole to get at a few of its rows. Here,

    rank-N.safetensors  what process N wrote; any reader of safetensors opens it
    index.json          the model's parameters with what is not a tensor; each tensor's type, size and rectangles, with file
                        and place of the first byte; the files and their sizes

All tensors are matrices (`matrix_size`), called KIND/PARAMETER.
"""

from __future__ import annotations

import json
import os
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, BinaryIO

import torch
import torch.distributed as dist
import torch.distributed.checkpoint as dcp
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
    SavePlanner,
    TensorWriteData,
    WriteItem,
    WriteItemType,
)
from torch.distributed.checkpoint.planner_helpers import create_read_items_for_chunk_list
from torch.distributed.checkpoint.storage import StorageWriter, WriteResult
from torch.futures import Future

from dalle_ds.errors import CheckpointError
from dalle_ds.training.fragments import Rectangle

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
        files: names and bytes.
    """

    def __init__(
        self,
        folder: Path,
        parameters: Mapping[str, dict[str, Any]],
        tensors: Mapping[str, Stored],
        files: Mapping[str, int],
    ) -> None:
        self.folder = folder
        self.parameters = parameters
        self.tensors = tensors
        self.files = files

    @classmethod
    def open(cls, folder: Path) -> Index:
        """Read a folder's index.

        Raises:
            CheckpointError: it is missing or broken.
        """
        try:
            content = json.loads((folder / INDEX_NAME).read_text())
            names = list(content["files"])
            dtypes = {code: dtype for dtype, code in _DTYPES.items()}
            tensors = {
                name: Stored(
                    dtypes[entry["dtype"]],
                    (entry["size"][0], entry["size"][1]),
                    [_chunk(entries, names) for entries in entry["chunks"]],
                )
                for name, entry in content["tensors"].items()
            }
            return cls(folder, dict(content["parameters"]), tensors, dict(content["files"]))
        except (OSError, ValueError, KeyError, TypeError, IndexError) as error:
            raise CheckpointError(f"{folder / INDEX_NAME} cannot be read: {error!r}") from error

    def faults(self) -> list[str]:
        """A sentence for every file that is missing or not as long as it was when it was written."""
        found = []
        for name, size in self.files.items():
            path = self.folder / name
            if not path.is_file():
                found.append(f"{path} is missing")
            elif path.stat().st_size != size:
                found.append(f"{path} has {path.stat().st_size:,} bytes, and had {size:,} when it was written")
        return found

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
        whole = torch.empty(stored.size, dtype=stored.dtype)
        everything = Rectangle(0, 0, *stored.size, 0, stored.size[1])
        self.read({name: Pieces(stored.size, [(everything, whole)])})
        return whole


def write(
    folder: Path,
    pieces: Mapping[str, Pieces],
    parameters: Mapping[str, dict[str, Any]],
    group: Any = None,
) -> None:
    """Write tensors and index into `folder`, which exists. Collective within the group.

    What several processes have is written once. The tensors of this process go to the disk one by one.

    Args:
        pieces: what this process has.
        parameters: goes into the index, on the group's first process.
        group: the processes that write; None stands for all.

    Raises:
        OSError: on every process of the group, where writing failed on one.
    """
    alone = not dist.is_initialized() or dist.get_world_size(group) == 1
    rank = 0 if alone else dist.get_rank(group)
    try:
        dcp.save(
            dict(pieces),
            storage_writer=_Writer(folder, f"rank-{rank}.safetensors", parameters),
            planner=_Planner(),
            process_group=group,
        )
    except dcp.CheckpointException as error:
        failure, _ = next(iter(error.failures.values()))
        if not isinstance(failure, OSError):
            raise
        raise OSError(f"{failure}") from error


def write_safetensors(
    path: Path,
    tensors: Iterable[tuple[str, torch.dtype, Sequence[int], Callable[[], Tensor]]],
    metadata: Mapping[str, str] | None = None,
) -> dict[str, int]:
    """Write a safetensors file with one tensor in memory at a time, and force it to the disk.

    Byte for byte what `safetensors.torch.save_file` writes of tensors of one type.

    Args:
        tensors: names, types, shapes, and what returns the tensors when their turn comes.
        metadata: goes into the file's header.

    Returns:
        The place of each tensor's first byte in the file.
    """
    # Wider types first, so that every element lies at a multiple of its size.
    ordered = sorted(tensors, key=lambda tensor: (-tensor[1].itemsize, tensor[0]))
    header: dict[str, Any] = {} if metadata is None else {"__metadata__": dict(metadata)}
    end = 0
    for name, dtype, shape, _ in ordered:
        begin, end = end, end + torch.Size(shape).numel() * dtype.itemsize
        header[name] = {"dtype": _DTYPES[dtype], "shape": list(shape), "data_offsets": [begin, end]}
    text = json.dumps(header, separators=(",", ":"), ensure_ascii=False).encode()
    text += b" " * (-len(text) % 8)
    with path.open("wb") as file:
        file.write(len(text).to_bytes(8, "little") + text)
        for _, dtype, shape, tensor in ordered:
            value = tensor().detach().to("cpu", dtype)
            assert value.shape == torch.Size(shape)
            file.write(_bytes(value.contiguous()))
        file.flush()
        os.fsync(file.fileno())
    return {name: 8 + len(text) + header[name]["data_offsets"][0] for name, *_ in ordered}


class _Planner(dcp.DefaultSavePlanner):
    """Offers what a process has; who writes what several have is decided by the default planner."""

    def __init__(self) -> None:
        super().__init__(flatten_state_dict=False, flatten_sharded_tensors=False)

    def create_local_plan(self) -> SavePlan:
        self.plan = SavePlan([item for name, pieces in self.state_dict.items() for item in _write_items(name, pieces)])
        return self.plan

    def lookup_object(self, index: MetadataIndex) -> Tensor:
        place = tuple(index.offset or ())
        return next(part for at, part in self.state_dict[index.fqn].parts if (at.row, at.column) == place)


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


class _Writer(StorageWriter):
    """Writes what the planner gives to this process into one file, and on the first process the index."""

    def __init__(self, folder: Path, file: str, parameters: Mapping[str, dict[str, Any]]) -> None:
        self._folder, self._file, self._parameters = folder, file, parameters

    def reset(self, checkpoint_id: str | os.PathLike[str] | None = None) -> None:
        """Nothing is kept from one checkpoint to the next."""

    def set_up_storage_writer(self, is_coordinator: bool, *args: Any, **kwargs: Any) -> None:
        """The folder is there."""

    def prepare_local_plan(self, plan: SavePlan) -> SavePlan:
        return plan

    def prepare_global_plan(self, plans: list[SavePlan]) -> list[SavePlan]:
        return plans

    def write_data(self, plan: SavePlan, planner: SavePlanner) -> Future[list[WriteResult]]:
        entries: list[tuple[str, torch.dtype, Sequence[int], Callable[[], Tensor]]] = []
        for item in plan.items:
            data = item.tensor_data
            assert data is not None
            resolve = _later(planner, item)
            entries.append((_key(item), data.properties.dtype, data.chunk.sizes, resolve))
        offsets = write_safetensors(self._folder / self._file, entries) if entries else {}
        size = (self._folder / self._file).stat().st_size if entries else 0
        written: Future[list[WriteResult]] = Future()
        written.set_result(
            [WriteResult(item.index, size, (self._file, offsets[_key(item)], size)) for item in plan.items]
        )
        return written

    def finish(self, metadata: Metadata, results: list[list[WriteResult]]) -> None:
        places = {result.index: result.storage_data for written in results for result in written}
        files = {file: size for file, _, size in sorted(places.values())}
        numbers = {file: number for number, file in enumerate(files)}
        tensors = {}
        for name, stored in metadata.state_dict_metadata.items():
            assert isinstance(stored, TensorStorageMetadata)
            chunks = []
            for chunk in stored.chunks:
                file, offset, _ = places[MetadataIndex(name, chunk.offsets)]
                chunks.append([*chunk.offsets, *chunk.sizes, numbers[file], offset])
            tensors[name] = {"dtype": _DTYPES[stored.properties.dtype], "size": list(stored.size), "chunks": chunks}
        content = {"parameters": self._parameters, "files": files, "tensors": tensors}
        (self._folder / INDEX_NAME).write_text(json.dumps(content) + "\n")

    @classmethod
    def validate_checkpoint_id(cls, checkpoint_id: str | os.PathLike[str]) -> bool:
        return Path(checkpoint_id).is_dir()


def _later(planner: SavePlanner, item: WriteItem) -> Callable[[], Tensor]:
    def resolve() -> Tensor:
        data = planner.resolve_data(item)
        assert isinstance(data, Tensor)
        return data

    return resolve


def _key(item: WriteItem) -> str:
    """A rectangle's name in its file."""
    assert item.tensor_data is not None
    (row, column), (rows, columns) = item.tensor_data.chunk.offsets, item.tensor_data.chunk.sizes
    return f"{item.index.fqn}[{row}:{row + rows}, {column}:{column + columns}]"


def _chunk(entries: Sequence[int], files: Sequence[str]) -> Chunk:
    row, column, rows, columns, file, offset = entries
    return Chunk(row, column, rows, columns, files[file], offset)


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
