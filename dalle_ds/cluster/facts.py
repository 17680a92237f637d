"""What a process runs on: versions, device, clock."""

from __future__ import annotations

import platform
import socket
import statistics
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeVar

import torch
import torch.distributed as dist

import dalle_ds
from dalle_ds.cluster.environment import processor_name, said
from dalle_ds.parallel import Mesh

Value = TypeVar("Value")


@dataclass(frozen=True)
class Facts:
    """Of one process."""

    host: str
    device: str
    """What it computes on."""
    versions: dict[str, str]
    """Of what should be the same everywhere."""


def gather(value: Value, mesh: Mesh) -> list[Value]:
    """What every process gives, by rank. Collective."""
    found: list[Any] = [None] * mesh.world_size
    dist.all_gather_object(found, value)
    return found


def facts_here(mesh: Mesh) -> Facts:
    """Of this process."""
    import deepspeed

    versions = {
        "dalle_ds": dalle_ds.__version__,
        "Python": platform.python_version(),
        "torch": torch.__version__,
        "DeepSpeed": str(deepspeed.__version__),
    }
    device = processor_name()
    if mesh.device.type == "cuda":
        nccl: Any = torch.cuda.nccl.version()
        versions["NCCL"] = ".".join(map(str, nccl)) if isinstance(nccl, tuple) else str(nccl)
        versions["CUDA"] = str(torch.version.cuda)
        versions["NVIDIA driver"] = said(Path("/proc/driver/nvidia/version"), r"Module\s+([\d.]+)") or "unknown"
        device = torch.cuda.get_device_name(mesh.device)
    return Facts(socket.gethostname(), device, versions)


def clock_offsets(mesh: Mesh, rounds: int = 7) -> list[float]:
    """Seconds by which each rank's clock is ahead of the median one; a millisecond or so is how late a barrier lets go of
    some. Collective."""
    times = []
    for _ in range(rounds):
        mesh.barrier()
        times.append(time.time())
    return offsets(gather(times, mesh))


def offsets(times: Sequence[Sequence[float]]) -> list[float]:
    """`times[rank][round]`, read at one moment in each round → how far each rank is ahead of the median rank."""
    middle = [statistics.median(round_) for round_ in zip(*times, strict=True)]
    return [statistics.median(time - at for time, at in zip(own, middle, strict=True)) for own in times]
