"""The plan of a run that is about to begin, held against the memory that is there."""

from __future__ import annotations

import contextlib
import socket
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

import psutil
import torch

from dalle_ds.config.deepspeed import EngineConfig
from dalle_ds.errors import ConfigError
from dalle_ds.parallel import Mesh
from dalle_ds.planning.layout import Layout
from dalle_ds.planning.memory import stage_memory
from dalle_ds.planning.model import stages_of
from dalle_ds.planning.report import gigabytes, remedy
from dalle_ds.tasks import Task

SAFETY_FACTOR = 0.85
"""What a plan's bytes are multiplied by before a run is refused: plans were at most a tenth too high, and nothing that would
fit may be refused."""


def check_plan(task: Task[Any], engine: EngineConfig, mesh: Mesh, say: Callable[[str], None] = print) -> None:
    """Tell the plan of a run in one line, or refuse the run if it cannot fit. Collective.

    To be called before the model is built: what is free then is what the run has.

    Args:
        engine: from `resolve`.
        mesh: divided.
        say: how to tell the user; called on the main process.

    Raises:
        ConfigError: a process needs more memory than it has, whatever the plan's error, and `report.plan_check` is "refuse".
            Raised on all processes; the message has the bytes by kind, and what to change.
    """
    mode = task.run.report.plan_check
    if mode == "off":
        return
    if task.lora is not None:
        if mesh.is_main:
            say("no plan of memory: plans are of models that are trained whole")
        return
    layout, device = Layout.of(task.run, engine, mesh.world_size), mesh.device.type
    try:
        stages = stages_of(task, layout, device)
    except ConfigError:
        raise
    except Exception as error:  # operators of another version of a library, say, that have no shapes on "meta"
        if mesh.is_main:
            say(f"no plan of memory: {error}")
        return
    memories = [stage_memory(stage, layout, device) for stage in stages]
    processes = mesh.gather_objects((mesh.index("pipe"), socket.gethostname(), *_free(mesh.device)))
    neighbours = Counter(machine for _, machine, *_ in processes)
    found = []
    for number, machine, free, host_free in processes:
        memory, on_host = memories[number], max(1, host_free // neighbours[machine])
        on_device = on_host if device == "cpu" else max(1, free)
        found.append((max(memory.peak / on_device, memory.host / on_host), memory, on_device, on_host))
    ratio, memory, on_device, on_host = max(found, key=lambda process: process[0])
    moment, uses = memory.peak_moment, memory.uses
    most = sorted(((use.at(moment), use.kind) for use in uses if use.at(moment)), reverse=True)[:3]
    kinds = ", ".join(f"{kind} {gigabytes(size)}" for size, kind in most)
    where = "process" if device == "cpu" else "GPU"
    line = f"plan: {gigabytes(memory.peak)} of {gigabytes(on_device)} GB per {where} ({kinds})"
    if memory.host:
        line += f", {gigabytes(memory.host)} of {gigabytes(on_host)} GB in main memory"
    if ratio * SAFETY_FACTOR > 1 and mode == "refuse":
        held = [
            f"  {use.kind}: {gigabytes(use.at(moment))} GB"
            + (f", and {gigabytes(use.host)} GB in main memory" if use.host else "")
            for use in uses
            if use.at(moment) or use.host
        ]
        raise ConfigError(
            "\n".join([f"this run does not fit. {line}", *held, remedy(memory, layout, device)])
            + "\nlaunchers/plan.py shows other layouts; --report.plan_check warn tries nevertheless"
        )
    if mesh.is_main:
        say(f"{line}: it may not fit. {remedy(memory, layout, device)}" if ratio > 1 else line)


def _free(device: torch.device) -> tuple[int, int]:
    """Bytes that can be had on a GPU, and in main memory of the machine, all of its processes together."""
    host = host_memory()
    if device.type != "cuda":
        return host, host
    free, _ = torch.cuda.mem_get_info(device)
    return free + torch.cuda.memory_reserved(device) - torch.cuda.memory_allocated(device), host


def host_memory(groups: Path = Path("/sys/fs/cgroup")) -> int:
    """Bytes of main memory that this machine, or the container that the process is in, has left.

    Args:
        groups: where the system's limits of the container are.
    """
    left = [int(psutil.virtual_memory().available)]
    for limit, used in (
        ("memory.max", "memory.current"),
        ("memory/memory.limit_in_bytes", "memory/memory.usage_in_bytes"),
    ):
        with contextlib.suppress(OSError, ValueError):  # no such limit
            left.append(int((groups / limit).read_text()) - int((groups / used).read_text()))
    return max(0, min(left))
