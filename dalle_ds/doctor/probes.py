"""What is measured of a launch's processes: versions, clocks, links along the axes of the mesh, the disk, a small training."""

from __future__ import annotations

import os
import platform
import secrets
import shutil
import socket
import statistics
import time
from collections.abc import Callable, Sequence
from contextlib import suppress
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
import torch.distributed as dist
from torch import Tensor, nn

import dalle_ds
from dalle_ds.config import DalleConfig, RecomputingTrainConfig, TransformerRun
from dalle_ds.config.deepspeed import resolve
from dalle_ds.doctor.environment import nccl_version, processor_name, said
from dalle_ds.errors import CheckpointError
from dalle_ds.parallel import Mesh
from dalle_ds.parallel.mesh import Axis
from dalle_ds.tasks.transformer import TransformerTask


def _median_seconds(step: Callable[[], None], mesh: Mesh, *, warmup: int, times: int, at_once: bool = False) -> float:
    """Median time of a step, after some that set things up.

    Args:
        at_once: whether all processes begin each together.
    """
    found = []
    for _ in range(warmup + times):
        if at_once:
            mesh.barrier()
        _synchronize(mesh)
        began = time.perf_counter()
        step()
        _synchronize(mesh)
        found.append(time.perf_counter() - began)
    return statistics.median(found[warmup:])


def _synchronize(mesh: Mesh) -> None:
    """Wait until this process's device has done what it was given."""
    if mesh.device.type == "cuda":
        torch.cuda.synchronize(mesh.device)


# --- versions and clocks


class Facts(NamedTuple):
    """Of one process."""

    host: str
    device: str  # what it computes on
    versions: dict[str, str]  # of what should be the same everywhere


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
        versions["NCCL"] = nccl_version()
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
    return offsets(mesh.gather_objects(times))


def offsets(times: Sequence[Sequence[float]]) -> list[float]:
    """`times[rank][round]`, read at one moment in each round → how far each rank is ahead of the median rank."""
    middle = [statistics.median(round_) for round_ in zip(*times, strict=True)]
    return [statistics.median(time - at for time, at in zip(own, middle, strict=True)) for own in times]


# --- links

AXES: tuple[Axis, ...] = ("replica", "pipe", "shard", "tensor")
_all_gather = getattr(dist, "all_gather_single", dist.all_gather_into_tensor)  # the newer name, where there is one


class Link(NamedTuple):
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
    return [_measure_link(mesh, axis, megabytes) for axis in AXES if mesh.size(axis) > 1]


def _measure_link(mesh: Mesh, axis: Axis, megabytes: int) -> Link:
    size, group = mesh.size(axis), mesh.group(axis)
    part = torch.ones(megabytes * 250_000 // size, device=mesh.device)  # 4 bytes each
    whole = torch.empty(part.numel() * size, device=mesh.device)
    sent = 4 * whole.numel() * (size - 1) / size

    def speed(exchange: Callable[[], Any], size: float) -> float:
        return size / _median_seconds(exchange, mesh, warmup=1, times=5, at_once=True)

    all_reduce = speed(lambda: dist.all_reduce(whole.zero_(), group=group), 2 * sent)
    return Link(axis, tuple(mesh.ranks(axis)), all_reduce, speed(lambda: _all_gather(whole, part, group=group), sent))


# --- the disk

SEEN_WITHIN = 10.0
"""Seconds that a file of another machine may take to be seen."""
LEFT_BEHIND = 3600.0
"""Seconds after which the files of a check that was killed are removed: none takes so long."""
MEGABYTE = 10**6


class Disk(NamedTuple):
    """A folder, as one process sees it."""

    write: float  # bytes per second, forced to the disk, while all processes write
    read: float  # bytes per second of a file that another process wrote, while all read
    free: int  # bytes that can still be written
    trouble: str | None = None  # what went wrong, in words


def measure_disk(folder: Path, mesh: Mesh, megabytes: int) -> Disk:
    """Write a file, as for a checkpoint, and read the next rank's. Leaves nothing behind. Collective.

    Args:
        folder: of runs; made where it does not exist.
        megabytes: size of each process's file.

    Raises:
        CheckpointError: the main process cannot write there.
    """
    scratch = folder / mesh.decide(lambda: _make_scratch(folder))
    write = read = 0.0
    free, trouble = 0, None
    try:
        free = shutil.disk_usage(folder).free
        # Where the folder is another one than the main process's, too: the reader will tell.
        scratch.mkdir(exist_ok=True)
        write = megabytes * MEGABYTE / _write(scratch / str(mesh.rank), _content(mesh.rank, megabytes))
    except OSError as error:
        trouble = f"{error.filename or folder} cannot be written: {error.strerror}"
    mesh.barrier()
    neighbour = (mesh.rank + 1) % mesh.world_size
    try:
        if trouble is None:
            read, trouble = _read(scratch / str(neighbour), neighbour, megabytes)
    except OSError as error:
        trouble = f"{error.filename or folder} cannot be read: {error.strerror}"
    mesh.barrier()
    shutil.rmtree(scratch, ignore_errors=True)
    return Disk(write, read, free, trouble)


def _make_scratch(folder: Path) -> str:
    name = f".doctor-{secrets.token_hex(4)}"
    try:
        folder.mkdir(parents=True, exist_ok=True)
        for old in folder.glob(".doctor-*"):
            with suppress(OSError):  # another check may have been faster
                if time.time() - old.stat().st_mtime > LEFT_BEHIND:
                    shutil.rmtree(old, ignore_errors=True)
        (folder / name).mkdir()
    except OSError as error:
        raise CheckpointError(
            f"{folder} cannot be written: {error.strerror}; name a folder where runs can be"
        ) from error
    return name


def _content(rank: int, megabytes: int) -> bytes:
    """The file of a rank: nothing that a disk could compress."""
    return np.random.default_rng(rank).bytes(megabytes * MEGABYTE)


def _write(path: Path, content: bytes) -> float:
    began = time.perf_counter()
    with path.open("wb") as handle:
        handle.write(content)
        handle.flush()
        os.fsync(handle.fileno())
        # So that the reader, where it is on this machine, has it from the disk and not from memory.
        os.posix_fadvise(handle.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)
    return time.perf_counter() - began


def _read(path: Path, rank: int, megabytes: int) -> tuple[float, str | None]:
    """Bytes per second, and what is wrong with the file of another rank."""
    size = megabytes * MEGABYTE
    end = time.monotonic() + SEEN_WITHIN
    while not path.exists() or path.stat().st_size < size:
        if time.monotonic() > end:
            return 0.0, f"does not see a file that rank {rank} wrote in {path.parent.parent}: the folder is not shared"
        time.sleep(0.1)
    began = time.perf_counter()
    found = path.read_bytes()
    seconds = time.perf_counter() - began
    if found != _content(rank, megabytes):
        return 0.0, f"reads something else than rank {rank} wrote in {path.parent.parent}"
    return size / seconds, None


# --- a small training

SMALL = DalleConfig(width=64, depth=2, heads=2, text_len=16, grid=8, text_vocab=512, image_vocab=256)
LARGE = DalleConfig(width=1024, depth=8, heads=16, text_len=64, grid=16, text_vocab=4096, image_vocab=4096)
"""For GPUs: enough for one to be busy."""
BATCH = 4


class Trial(NamedTuple):
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
    from dalle_ds.training.engine import build_engine  # imports DeepSpeed, which picks a device

    on_gpu = mesh.device.type == "cuda"
    train = RecomputingTrainConfig(batch_size=BATCH * mesh.world_size)
    run = TransformerRun(model=LARGE if on_gpu else SMALL, train=train)
    task, rows = TransformerTask.planned(run), _rows(run.model, mesh.device)
    torch.manual_seed(0)
    mesh.barrier()

    def alone(model: nn.Module) -> None:
        model.zero_grad()
        with torch.autocast(mesh.device.type, torch.bfloat16, enabled=on_gpu):
            loss = model(*rows, logits=False).loss
        loss.backward()

    # A model that is gone again when the engine is built.
    compute = _median_seconds(partial(alone, task.build_model().to(mesh.device)), mesh, warmup=2, times=10)
    json: dict[str, Any] = {"bf16": {"enabled": on_gpu}, "zero_optimization": {"stage": 3}}
    config = resolve(json, run, mesh.world_size)
    engine = build_engine(task.build_model, task.parameter_groups, run.optim, config, mesh)
    losses: list[float] = []

    def together() -> None:
        loss = engine(*rows, logits=False).loss
        engine.backward(loss)
        engine.step()
        losses.append(float(loss.detach()))

    step = _median_seconds(together, mesh, warmup=2, times=10)
    return Trial(compute, step, losses[-1])


def _rows(config: DalleConfig, device: torch.device) -> tuple[Tensor, Tensor]:
    """(B, T) text and (B, grid²) codes, the same on all processes."""
    random = torch.Generator().manual_seed(0)
    text = torch.randint(config.text_vocab, (BATCH, config.text_len), generator=random)
    codes = torch.randint(config.image_vocab, (BATCH, config.grid**2), generator=random)
    return text.to(device), codes.to(device)
