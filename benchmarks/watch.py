"""What being watched costs: pulses, monitors with their heartbeats, comparisons of ranks; per update of 100 ms.

deepspeed --num_gpus 2 benchmarks/watch.py --json watch.json
"""

from __future__ import annotations

import json
import os
import statistics
import tempfile
import time
import timeit
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from rich import print
from rich.table import Table

from dalle_ds.cli import explain, parse_options, run_launcher
from dalle_ds.config.parallel import WatchConfig
from dalle_ds.parallel import Mesh
from dalle_ds.resilience.stragglers import Stragglers
from dalle_ds.resilience.watch import Watch

UPDATE = 0.1
"""Seconds of the update that costs are compared with."""
PULSES_PER_UPDATE = 4


@dataclass(frozen=True)
class Options:
    """Measure what being watched costs."""

    seconds: float = 30.0
    """For which a monitor's work is measured."""
    comparisons: int = 20
    """Of processes, each timed; the median counts."""
    device: str = "auto"
    """Where the processes compute."""
    json: str | None = None
    """File that the figures are written to."""
    local_rank: int = 0
    """What the launcher gives."""


def processor_seconds(pid: int) -> float:
    """Processor time that a process has taken."""
    fields = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
    return (int(fields[11]) + int(fields[12])) / os.sysconf("SC_CLK_TCK")


def measure(options: Options, mesh: Mesh, logs: Path) -> Iterator[tuple[str, float]]:
    """(what, figure) one after another. Collective."""
    config = WatchConfig(straggler_every=1)
    usual = WatchConfig().straggler_every
    with Watch(mesh, explain, config, logs) as watch:
        pulse = min(timeit.repeat(lambda: watch.pulse(123_456, "waiting for data"), number=100_000)) / 100_000
        yield "pulse_seconds", pulse
        before = processor_seconds(watch.monitor_pid)
        time.sleep(options.seconds)
        monitor = (processor_seconds(watch.monitor_pid) - before) / options.seconds
        yield "monitor_share_of_a_core", monitor
        stragglers = Stragglers(mesh, config, lambda _: None)
        times = []
        for step in range(options.comparisons + 2):
            mesh.barrier()
            with stragglers.waiting(step):
                pass
            began = time.perf_counter()
            stragglers.after(step + 1, UPDATE)
            times.append(time.perf_counter() - began)
        comparison = statistics.median(times[2:])
        yield "comparison_seconds", comparison
        yield "share_of_an_update", PULSES_PER_UPDATE * pulse / UPDATE + monitor + comparison / usual / UPDATE


def main() -> None:
    """Measure, show, write."""
    options = parse_options(Options)
    mesh = Mesh.start(options.device)
    with tempfile.TemporaryDirectory() as folder:
        figures = dict(measure(options, mesh, Path(folder)))
    if mesh.is_main:
        table = Table("figure", "value")
        for name, value in figures.items():
            table.add_row(name, f"{value:,.4g}")
        print(table)
        if options.json is not None:
            Path(options.json).write_text(json.dumps(figures, indent=2) + "\n")
    mesh.stop()


if __name__ == "__main__":
    run_launcher(main)
