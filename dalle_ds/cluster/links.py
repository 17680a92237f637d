"""How fast processes exchange tensors along each axis of the mesh."""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable
from dataclasses import dataclass

import torch
import torch.distributed as dist

from dalle_ds.parallel import Mesh
from dalle_ds.parallel.mesh import Axis

AXES: tuple[Axis, ...] = ("replica", "pipe", "shard", "tensor")
REPEATS = 5
_all_gather = getattr(dist, "all_gather_single", dist.all_gather_into_tensor)  # the newer name, where there is one


@dataclass(frozen=True)
class Link:
    """A group of processes along an axis, while the other groups of this axis are busy as well.

    Speeds are bytes per second that leave one process by the usual algorithms ("bus bandwidth" in nccl-tests): of k processes,
    an all-reduce of n bytes sends 2 n · (k − 1) / k, an all-gather to n bytes half of that.
    """

    axis: str
    ranks: tuple[int, ...]
    all_reduce: float
    all_gather: float


def measure_links(mesh: Mesh, megabytes: int) -> list[Link]:
    """Groups that this process belongs to, along axes of more than one process. Collective.

    Args:
        megabytes: size of what is exchanged.
    """
    return [_measure(mesh, axis, megabytes) for axis in AXES if mesh.size(axis) > 1]


def _measure(mesh: Mesh, axis: Axis, megabytes: int) -> Link:
    size, group = mesh.size(axis), mesh.group(axis)
    part = torch.ones(megabytes * 250_000 // size, device=mesh.device)  # 4 bytes each
    whole = torch.empty(part.numel() * size, device=mesh.device)
    sent = 4 * whole.numel() * (size - 1) / size

    def reduce() -> None:
        dist.all_reduce(whole.zero_(), group=group)

    def collect() -> None:
        _all_gather(whole, part, group=group)

    return Link(axis, tuple(mesh.ranks(axis)), 2 * sent / _seconds(reduce, mesh), sent / _seconds(collect, mesh))


def _seconds(exchange: Callable[[], None], mesh: Mesh) -> float:
    """Median time of an exchange, after one that connects and warms up."""
    found = []
    for _ in range(1 + REPEATS):
        mesh.barrier()
        synchronize(mesh)
        began = time.perf_counter()
        exchange()
        synchronize(mesh)
        found.append(time.perf_counter() - began)
    return statistics.median(found[1:])


def synchronize(mesh: Mesh) -> None:
    """Wait until this process's device has done what it was given."""
    if mesh.device.type == "cuda":
        torch.cuda.synchronize(mesh.device)
