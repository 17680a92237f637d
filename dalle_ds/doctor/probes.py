"""What is measured of a launch's processes: versions and clocks, links along the axes of the mesh, a small training."""

from __future__ import annotations

import platform
import socket
import statistics
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeVar

import torch
import torch.distributed as dist
from torch import Tensor, nn

import dalle_ds
from dalle_ds.config import DalleConfig, RecomputingTrainConfig, TransformerRun
from dalle_ds.doctor.environment import processor_name, said
from dalle_ds.models import Dalle
from dalle_ds.models.dalle import ResidualBlock
from dalle_ds.optim import resblock_groups
from dalle_ds.parallel import Mesh
from dalle_ds.parallel.mesh import Axis

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


STEPS = 10
SMALL = DalleConfig(width=64, depth=2, heads=2, text_len=16, grid=8, text_vocab=512, image_vocab=256)
LARGE = DalleConfig(width=1024, depth=8, heads=16, text_len=64, grid=16, text_vocab=4096, image_vocab=4096)
"""For GPUs: enough for one to be busy."""
BATCH = 4


@dataclass(frozen=True)
class Trial:
    """Of one process."""

    compute: float
    """Seconds of a forward and a backward pass, with no one to wait for: slow processes are told by this one."""
    step: float
    """Seconds of a step with all others."""
    loss: float
    """Of the last step. All processes train on the same rows, so all should have the same."""


def run_trial(mesh: Mesh) -> Trial:
    """Train. Collective.

    Args:
        mesh: before it is divided: ZeRO-3 divides weights among all processes.
    """
    config = LARGE if mesh.device.type == "cuda" else SMALL
    rows = _rows(config, mesh.device)
    torch.manual_seed(0)
    mesh.barrier()
    compute = _step_seconds(_alone(config, rows, mesh.device), mesh)
    losses: list[float] = []
    step = _step_seconds(_together(config, rows, mesh, losses), mesh)
    return Trial(compute, step, losses[-1])


def _alone(config: DalleConfig, rows: tuple[Tensor, Tensor], device: torch.device) -> Callable[[], None]:
    """A forward and a backward pass of this process's own."""
    model = Dalle(config).to(device)

    def step() -> None:
        model.zero_grad()
        with torch.autocast(device.type, torch.bfloat16, enabled=device.type == "cuda"):
            loss = model(*rows, logits=False).loss
        loss.backward()

    return step


def _together(config: DalleConfig, rows: tuple[Tensor, Tensor], mesh: Mesh, losses: list[float]) -> Callable[[], None]:
    """A step under ZeRO-3, which adds its loss to a list."""
    from dalle_ds.config.deepspeed import resolve
    from dalle_ds.training.engine import build_engine

    def groups(model: nn.Module) -> list[dict[str, Any]]:
        return resblock_groups(model, [part for part in model.modules() if isinstance(part, ResidualBlock)], run.optim)

    run = TransformerRun(model=config, train=RecomputingTrainConfig(batch_size=BATCH * mesh.world_size))
    json: dict[str, Any] = {"bf16": {"enabled": mesh.device.type == "cuda"}, "zero_optimization": {"stage": 3}}
    engine = build_engine(lambda: Dalle(config), groups, run.optim, resolve(json, run, mesh.world_size), mesh)

    def step() -> None:
        loss = engine(*rows, logits=False).loss
        engine.backward(loss)
        engine.step()
        losses.append(float(loss.detach()))

    return step


def _rows(config: DalleConfig, device: torch.device) -> tuple[Tensor, Tensor]:
    """(B, T) text and (B, grid²) codes, the same on all processes."""
    random = torch.Generator().manual_seed(0)
    text = torch.randint(config.text_vocab, (BATCH, config.text_len), generator=random)
    codes = torch.randint(config.image_vocab, (BATCH, config.grid**2), generator=random)
    return text.to(device), codes.to(device)


def _step_seconds(step: Callable[[], None], mesh: Mesh) -> float:
    """Median of `STEPS` steps, after two that set things up."""
    found = []
    for _ in range(2 + STEPS):
        synchronize(mesh)
        began = time.perf_counter()
        step()
        synchronize(mesh)
        found.append(time.perf_counter() - began)
    return statistics.median(found[2:])
