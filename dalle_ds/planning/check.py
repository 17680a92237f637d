"""The plan of a run that is about to begin, held against the memory that is there."""

from __future__ import annotations

import socket
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist

from dalle_ds.config import DvaeRun, TransformerRun
from dalle_ds.config.deepspeed import EngineConfig
from dalle_ds.errors import ConfigError
from dalle_ds.parallel import Mesh
from dalle_ds.planning.layout import Layout
from dalle_ds.planning.memory import Memory, stage_memory
from dalle_ds.planning.report import gigabytes, remedy
from dalle_ds.planning.stages import stages_of
from dalle_ds.tasks import Task

DOUBT = 0.85
"""What a plan's bytes are multiplied by before a run is refused: formulas were at most a tenth too high, and nothing that
would fit may be refused."""


@dataclass(frozen=True)
class _Place:
    """A process, what it needs and what it has."""

    rank: int
    host: str
    device: str
    free: int
    """Bytes of the GPU that this process may take; of main memory without one."""
    host_free: int
    """Bytes of main memory, all processes of the machine together."""
    need: int
    host_need: int


def check_plan(task: Task[Any], engine: EngineConfig, mesh: Mesh, say: Callable[[str], None] = print) -> None:
    """Tell the plan of a run in one line, or refuse the run if it cannot fit. Collective.

    To be called before the model is built: what is free then is what the run has. Of stages that the planner does not know,
    nothing is said.

    Args:
        task: of the run.
        engine: from `resolve`.
        mesh: divided.
        say: how to tell the user; called on the main process.

    Raises:
        ConfigError: a process needs more memory than it has, however the plan's errors lie, and `report.plan_check` is
            "refuse". Raised on all processes; the message has the bytes by kind, and what to change.
    """
    run = task.run
    if run.report.plan_check == "off" or not isinstance(run, (TransformerRun, DvaeRun)):
        return
    layout = Layout.of(run, engine, mesh.world_size)
    device = mesh.device.type
    memories = [stage_memory(stage, layout, device) for stage in stages_of(run, layout, device)]
    memory = memories[mesh.index("pipe")]
    places = _gathered(
        _Place(mesh.rank, socket.gethostname(), device, *_free(mesh.device), memory.peak, memory.host), mesh
    )
    worst = max(places, key=lambda place: _ratio(place, places))
    ratio = _ratio(worst, places)
    planned = memories[mesh.size("pipe") * worst.rank // mesh.world_size] if len(memories) > 1 else memories[0]
    line = _line(worst, places, planned)
    if ratio * DOUBT > 1 and run.report.plan_check == "refuse":
        raise ConfigError(_refusal(line, planned, layout, device))
    if mesh.is_main:
        say(f"{line}: it may not fit. {remedy(planned, layout, device)}" if ratio > 1 else line)


def _ratio(place: _Place, places: list[_Place]) -> float:
    """What a process needs in relation to what it has; of GPU and main memory, the greater."""
    neighbours = Counter(other.host for other in places)[place.host]
    share = max(1, place.host_free // neighbours)
    if place.device == "cpu":
        return place.need / share
    return max(place.need / max(1, place.free), place.host_need / share)


def _line(place: _Place, places: list[_Place], memory: Memory) -> str:
    neighbours = Counter(other.host for other in places)[place.host]
    share = place.host_free // neighbours
    free = share if place.device == "cpu" else place.free
    what = "process" if place.device == "cpu" else "GPU"
    moment = memory.peak_moment
    kinds = sorted(((use.at(moment), use.kind) for use in memory.uses), reverse=True)
    shown = ", ".join(f"{kind} {gigabytes(size)}" for size, kind in kinds[:3] if size)
    host = f", {gigabytes(place.host_need)} of {gigabytes(share)} GB in main memory" if place.host_need else ""
    return f"plan: {gigabytes(place.need)} of {gigabytes(free)} GB per {what} ({shown}){host}"


def _refusal(line: str, memory: Memory, layout: Layout, device: str) -> str:
    moment = memory.peak_moment
    kinds = "\n".join(
        f"  {use.kind}: {gigabytes(use.at(moment))} GB"
        + (f", and {gigabytes(use.host)} GB in main memory" if use.host else "")
        for use in memory.uses
        if use.at(moment) or use.host
    )
    return (
        f"this run does not fit. {line}\n{kinds}\n{remedy(memory, layout, device)}\nlaunchers/plan.py shows other layouts; "
        "--report.plan_check warn tries nevertheless"
    )


def _gathered(place: _Place, mesh: Mesh) -> list[_Place]:
    if mesh.world_size == 1:
        return [place]
    places: list[_Place | None] = [None] * mesh.world_size
    dist.all_gather_object(places, place)
    return [found for found in places if found is not None]


def _free(device: torch.device) -> tuple[int, int]:
    """Bytes that can be had on a GPU, and in main memory."""
    host = host_memory()
    if device.type != "cuda":
        return host, host
    free, _ = torch.cuda.mem_get_info(device)
    return free + torch.cuda.memory_reserved(device) - torch.cuda.memory_allocated(device), host


def host_memory(system: Path = Path("/")) -> int:
    """Bytes of main memory that this machine, or the container that the process is in, has left.

    Args:
        system: where the system's files are.
    """
    left = [_available(system / "proc/meminfo")]
    for limit, used in (
        ("memory.max", "memory.current"),
        ("memory/memory.limit_in_bytes", "memory/memory.usage_in_bytes"),
    ):
        try:
            numbers = [int((system / "sys/fs/cgroup" / name).read_text()) for name in (limit, used)]
        except (OSError, ValueError):
            continue  # no such limit
        left.append(numbers[0] - numbers[1])
    return max(0, min(left))


def _available(meminfo: Path) -> int:
    try:
        for line in meminfo.read_text().splitlines():
            if line.startswith("MemAvailable:"):
                return int(line.split()[1]) * 1024
    except OSError:
        pass
    return 2**63 - 1  # a system that does not tell
