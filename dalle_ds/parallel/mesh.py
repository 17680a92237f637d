"""The processes of a run, how they divide its work, and what they do together.

Ranks are numbered along four axes, the last of which changes fastest, so that the processes that talk most are neighbours
(design decision 1):

    rank = ((replica · pipe + stage) · shards + shard) · tensor + part

    replica   holds everything once; gradients cross between replicas once per update
    stage     of a pipeline: a run of consecutive residual blocks
    shard     sees data of its own; ZeRO divides optimizer state, gradients and weights among the shards
    part      of every layer's matrices
"""

from __future__ import annotations

import datetime
import math
import os
import re
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from functools import cache
from typing import Any, Literal, TypeVar

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed import distributed_c10d

from dalle_ds.config import DalleConfig, LatentPriorConfig, ParallelConfig, PriorConfig
from dalle_ds.errors import ConfigError, DalleError, Interrupted
from dalle_ds.parallel.tensor import WHOLE, TensorGroup

Value = TypeVar("Value")
Axis = Literal["world", "data", "replica", "pipe", "shard", "tensor", "model"]
"""Processes that differ in these places only: "data" in replica and shard, "model" in stage and part, "world" in all."""

_COORDINATES: dict[Axis, tuple[int, ...]] = {
    "world": (0, 1, 2, 3),
    "data": (0, 2),
    "replica": (0,),
    "pipe": (1,),
    "shard": (2,),
    "tensor": (3,),
    "model": (1, 3),
}


@dataclass(frozen=True)
class Mesh:
    """This process's place among the processes of a run; also what DeepSpeed calls an `mpu`.

    Every method that communicates must be called by all ranks, in the same order.
    """

    rank: int
    """Index of this process."""
    world_size: int
    """Number of processes."""
    device: torch.device
    """Where this process computes."""
    degrees: ParallelConfig = field(default_factory=ParallelConfig)
    """Replicas, stages and parts; `shards` is what they leave over."""
    groups: Mapping[str, Any] = field(default_factory=dict, repr=False)
    """Process groups by `Axis`; None or absent where they are all processes."""

    @property
    def is_main(self) -> bool:
        """Whether this process is the one that writes files and talks to the user."""
        return self.rank == 0

    # --- places

    @property
    def shards(self) -> int:
        """Processes of one replica, stage and part, which divide data and, under ZeRO, state."""
        return self.world_size // (self.degrees.replicas * self.degrees.pipe * self.degrees.tensor)

    @property
    def sizes(self) -> tuple[int, int, int, int]:
        """Replicas, stages, shards, parts."""
        return self.degrees.replicas, self.degrees.pipe, self.shards, self.degrees.tensor

    @property
    def place(self) -> tuple[int, int, int, int]:
        """Number of this process's replica, stage, shard and part."""
        return _place(self.rank, self.sizes)

    def size(self, axis: Axis) -> int:
        """Processes along an axis."""
        return math.prod(self.sizes[coordinate] for coordinate in _COORDINATES[axis])

    def index(self, axis: Axis) -> int:
        """This process's number along an axis."""
        index = 0
        for coordinate in _COORDINATES[axis]:
            index = index * self.sizes[coordinate] + self.place[coordinate]
        return index

    def ranks(self, axis: Axis) -> list[int]:
        """Ranks of this process's group along an axis, in their order."""
        return next(ranks for ranks in _lines(self.world_size, self.sizes, axis) if self.rank in ranks)

    def group(self, axis: Axis) -> Any:
        """The process group along an axis; None stands for all processes."""
        return self.groups.get(axis)

    @property
    def tensor(self) -> TensorGroup:
        """The processes that divide this one's layers."""
        return TensorGroup(self.index("tensor"), self.degrees.tensor, self.group("tensor"), self.degrees.sequence)

    def describe(self) -> str:
        """Processes, where they compute, and how they are arranged, for the user."""
        counts = zip(self.sizes, ("replicas", "stages", "shards", "tensor parts"), strict=True)
        axes = " × ".join(f"{count} {name}" for count, name in counts if count > 1)
        arranged = f" ({axes})" if self.world_size > self.shards else ""
        return f"{self.world_size} × {self.device.type}{arranged}"

    # --- how it begins and ends

    @classmethod
    def start(cls, device: str = "auto", timeout_minutes: int = 30) -> Mesh:
        """Join the process group that the `deepspeed` launcher, srun or torchrun described in the environment.

        A process started with none of them becomes a group of one.

        Args:
            device: "auto" (CUDA where there is one), "cpu" or "cuda".

        Raises:
            ConfigError: CUDA asked for where there is none, fewer GPUs than processes on this machine, or a port that another
                run uses.
            Interrupted: another process did not come.
        """
        local_rank = int(os.environ.get("LOCAL_RANK", "0"))
        chosen = _pick_device(device, local_rank)
        if chosen.type == "cpu":
            # Before DeepSpeed is imported, which would take a GPU that is there.
            os.environ["DS_ACCELERATOR"] = "cpu"
        import deepspeed

        if chosen.type == "cpu":
            # DeepSpeed would compile a shared-memory operator on first use; gloo needs none and is no slower.
            deepspeed.ops.__compatible_ops__["deepspeed_shm_comm"] = False
        else:
            torch.cuda.set_device(chosen)
        if not dist.is_initialized():
            backend, timeout = "nccl" if chosen.type == "cuda" else "gloo", datetime.timedelta(minutes=timeout_minutes)
            if "RANK" not in os.environ:
                # No port that another may take, and nothing in the environment that processes started from here would take
                # for theirs, but what DeepSpeed insists on.
                os.environ.setdefault("LOCAL_RANK", "0")
                dist.init_process_group(backend, timeout=timeout, store=dist.HashStore(), rank=0, world_size=1)
            try:
                deepspeed.init_distributed(backend, auto_mpi_discovery=False, timeout=timeout, verbose=False)
            except dist.DistError as error:
                place = f"{os.environ.get('MASTER_ADDR', 'unknown')}, port {os.environ.get('MASTER_PORT', 'unknown')}"
                if re.search("EADDRINUSE|address already in use", str(error), re.IGNORECASE):
                    raise ConfigError(
                        f"the processes cannot meet at {place} ({error}); where another run uses it, give the deepspeed "
                        "launcher another one: --master_port N"
                    ) from error
                # Most likely one of the others has died at its start.
                raise Interrupted(f"the processes did not meet at {place} ({error}): start them again") from error
        return cls(dist.get_rank(), dist.get_world_size(), chosen)

    @classmethod
    def join(cls, device: str = "auto") -> Mesh:
        """As `start`, but a process that was started alone joins no process group, at no cost."""
        if int(os.environ.get("WORLD_SIZE", "1")) == 1:
            return cls(0, 1, _pick_device(device, 0))
        return cls.start(device)

    @classmethod
    def tensor_group(cls, device: str) -> TensorGroup:
        """All processes of the launch as one tensor group; `WHOLE`, at no cost, where the process was started alone.

        Raises:
            ConfigError: as `start`.
        """
        if int(os.environ.get("WORLD_SIZE", "1")) == 1:
            return WHOLE
        mesh = cls.start(device)
        return mesh.divide(ParallelConfig(tensor=mesh.world_size)).tensor

    def divide(self, degrees: ParallelConfig) -> Mesh:
        """The same processes, arranged along the axes. Collective.

        Raises:
            ConfigError: the degrees do not divide the number of processes.
        """
        taken = degrees.replicas * degrees.pipe * degrees.tensor
        if self.world_size % taken:
            raise ConfigError(
                f"parallel.replicas={degrees.replicas} × parallel.pipe={degrees.pipe} × parallel.tensor={degrees.tensor} = "
                f"{taken} does not divide the {self.world_size} processes: start a multiple of {taken} processes, or lower a "
                "degree"
            )
        bare = replace(self, degrees=degrees, groups={})
        return replace(bare, groups=_groups(self.world_size, bare.sizes))

    def check(self, model: DalleConfig | PriorConfig | LatentPriorConfig) -> None:
        """Raise a `ConfigError` where a transformer cannot be divided so."""
        self.tensor.check(model)
        pipe = self.degrees.pipe
        if pipe > 2 * model.depth:
            raise ConfigError(
                f"parallel.pipe={pipe} is more than the model's {2 * model.depth} residual blocks (model.depth="
                f"{model.depth}): lower it"
            )

    def sum(self, value: Tensor, over: Axis = "data") -> Tensor:
        """The sum of `value` over the processes along an axis, as a new tensor on this process's device."""
        total = value.detach().to(self.device, copy=True)
        if self.size(over) > 1:
            dist.all_reduce(total, group=self.group(over))
        return total

    def decide(self, choose: Callable[[], Value]) -> Value:
        """What `choose` returns on the main process, on every process; where it raises a `DalleError`, all raise it.

        For what must not be decided by each process for itself, such as anything read from a disk that they may see at
        different times.
        """
        outcome: list[Any] = [None, None]
        if self.is_main:
            try:
                outcome[0] = choose()
            except DalleError as error:
                outcome[1] = error
        if self.world_size > 1:
            dist.broadcast_object_list(outcome, src=0)
        if outcome[1] is not None:
            raise outcome[1]
        return outcome[0]

    def gather_objects(self, value: Value) -> list[Value]:
        """What every process gives, by rank, on all of them."""
        everyone: list[Any] = [value]
        if self.world_size > 1:
            everyone = [None] * self.world_size
            dist.all_gather_object(everyone, value)
        return everyone

    def barrier(self) -> None:
        """Wait until every rank is here."""
        if self.world_size > 1:
            dist.barrier()

    def set_timeout(self, minutes: float) -> None:
        """Set how long operations that begin from now on may wait for other processes, on all groups that there are.

        Long at first, for loading and compiling; short afterwards. To be called by all ranks, though none waits for another.
        One that waits longer raises an error (gloo), or has its process ended by a thread of NCCL's. Either ends the run
        (`Watch`).
        """
        for group in _groups_in_use():
            distributed_c10d._set_pg_timeout(datetime.timedelta(minutes=minutes), group)

    @contextmanager
    def extended_timeout(self, minutes: float) -> Iterator[None]:
        """A context in which operations may wait for so long, where they wait less otherwise: for what takes processes
        different times, such as saving. Ends for all at once. Collective."""
        before = {group: _timeout(group) for group in _groups_in_use()}
        for group, timeout in before.items():
            distributed_c10d._set_pg_timeout(max(datetime.timedelta(minutes=minutes), timeout), group)
        try:
            yield
            if before:
                dist.barrier()  # else whoever is done first would wait for the others with the shorter timeout
        finally:
            for group, timeout in before.items():
                distributed_c10d._set_pg_timeout(timeout, group)

    def stop(self) -> None:
        """Leave the process group."""
        if dist.is_initialized():
            dist.destroy_process_group()
            _groups.cache_clear()

    # --- what DeepSpeed asks an `mpu`: the model axis is that of parts, the data axis that of shards

    def get_data_parallel_group(self) -> Any:
        """Process group of the shards."""
        return self.group("shard") or dist.group.WORLD

    def get_data_parallel_rank(self) -> int:
        """Number of this process's shard."""
        return self.index("shard")

    def get_data_parallel_world_size(self) -> int:
        """Shards."""
        return self.shards

    def get_data_parallel_group_ranks(self) -> list[int]:
        """Ranks of the shards."""
        return self.ranks("shard")

    def get_model_parallel_group(self) -> Any:
        """Process group of the parts."""
        return self.group("tensor") or dist.group.WORLD

    def get_model_parallel_rank(self) -> int:
        """Number of this process's part."""
        return self.index("tensor")

    def get_model_parallel_world_size(self) -> int:
        """Parts."""
        return self.degrees.tensor

    get_tensor_model_parallel_group = get_model_parallel_group
    get_tensor_model_parallel_rank = get_model_parallel_rank
    get_tensor_model_parallel_world_size = get_model_parallel_world_size


def share_tensors(
    tensors: dict[str, Tensor] | None, mesh: Mesh, axis: Axis, place: int = 0
) -> dict[str, Tensor] | None:
    """What one process along an axis gives, by default the first, on all of them: named tensors on the mesh's device, or
    None. Collective."""
    source, group = mesh.ranks(axis)[place], mesh.group(axis)
    is_source = mesh.rank == source
    told: list[Any] = [None]
    if is_source and tensors is not None:
        told = [[(name, tensor.shape, tensor.dtype) for name, tensor in tensors.items()]]
    dist.broadcast_object_list(told, src=source, group=group, device=mesh.device)
    if told[0] is None:
        return None
    shared: dict[str, Tensor] = {}
    for name, shape, dtype in told[0]:
        if is_source:
            assert tensors is not None
            shared[name] = tensors[name].contiguous()
        else:
            shared[name] = torch.empty(shape, dtype=dtype, device=mesh.device)
        dist.broadcast(shared[name], src=source, group=group)
    return shared


def _groups_in_use() -> list[Any]:
    """Groups of several processes that this one belongs to, DeepSpeed's own included."""
    groups = list(distributed_c10d._world.pg_map) if dist.is_initialized() else []
    return [group for group in groups if group.size() > 1]


def _timeout(group: Any) -> datetime.timedelta:
    backends = [group._get_backend(torch.device(kind.type)) for kind in group._device_types]
    return max(backend.options._timeout for backend in backends)


def _place(rank: int, sizes: tuple[int, int, int, int]) -> tuple[int, int, int, int]:
    rest, part = divmod(rank, sizes[3])
    rest, shard = divmod(rest, sizes[2])
    replica, stage = divmod(rest, sizes[1])
    return replica, stage, shard, part


def _lines(world_size: int, sizes: tuple[int, int, int, int], axis: Axis) -> list[list[int]]:
    """The ranks of every group along an axis."""
    fixed = [c for c in range(4) if c not in _COORDINATES[axis]]
    lines: dict[tuple[int, ...], list[int]] = {}
    for rank in range(world_size):
        place = _place(rank, sizes)
        lines.setdefault(tuple(place[c] for c in fixed), []).append(rank)
    return list(lines.values())


@cache
def _groups(world_size: int, sizes: tuple[int, int, int, int]) -> dict[str, Any]:
    """Groups along every axis that this process belongs to. Collective; kept, since groups are not given back."""
    own = dist.get_rank()
    found: dict[str, Any] = {}
    for axis in _COORDINATES:
        lines = _lines(world_size, sizes, axis)
        if len(lines) == 1:
            found[axis] = None  # all processes
            continue
        for ranks in lines:
            group = dist.new_group(ranks)  # every process must take part in making every group
            if own in ranks:
                found[axis] = group
    return found


def _pick_device(device: str, local_rank: int) -> torch.device:
    if device not in ("auto", "cpu", "cuda"):
        raise ConfigError(f"device must be auto, cpu or cuda, found {device!r}")
    available = torch.cuda.device_count() if torch.cuda.is_available() else 0
    if device == "cpu" or (device == "auto" and available == 0):
        return torch.device("cpu")
    if local_rank >= available:
        raise ConfigError(
            f"process {local_rank} of this machine needs a GPU of its own, but PyTorch sees {available}: "
            "start fewer processes (deepspeed --num_gpus), or train on the CPU with --device cpu"
        )
    return torch.device("cuda", local_rank)
