"""`launchers/doctor.py cluster`: the processes of a launch, measured (`probes.py`), and what is wrong with them."""

from __future__ import annotations

import math
import statistics
from collections import defaultdict
from collections.abc import Hashable, Iterable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import tyro
from rich.console import Group, RenderableType
from rich.table import Table
from rich.text import Text

from dalle_ds.cli import explain
from dalle_ds.config import ParallelConfig
from dalle_ds.config.parallel import WatchConfig
from dalle_ds.config.plain import positive
from dalle_ds.errors import ConfigError
from dalle_ds.parallel import Mesh
from dalle_ds.resilience.watch import Watch

if TYPE_CHECKING:
    from dalle_ds.doctor.probes import Disk, Facts, Link, Trial

MINUTES = 3
"""How long processes wait for each other before the check fails."""
CLOCKS_APART = 1.0
"""Seconds. Logs are read side by side, and files are told old from new."""
LEAST_FREE = 5 * 10**9
"""Bytes."""
LOSSES_APART = 1e-2
"""Relative: GPUs of different kinds round differently."""
SLOW_LINK = 0.5
"""Of the median speed along the axis."""


@dataclass(frozen=True)
class ClusterOptions:
    """Check the processes of a launch (slurm/doctor.sbatch, deepspeed, torchrun, or one alone) in about a minute: versions,
    clocks, collectives along each axis, the disk, a short training; status 1 where something is wrong."""

    path: Annotated[tyro.conf.Positional[str], tyro.conf.arg(metavar="DIR")]
    """Where runs will be: a folder that all machines share."""
    parallel: ParallelConfig = field(default_factory=ParallelConfig)
    """How runs will divide the processes."""
    device: str = "auto"
    """auto, cpu or cuda."""
    megabytes: int = 256
    """What a collective exchanges."""
    disk_megabytes: int = 256
    """What each process writes and reads."""
    slow: float = 1.5
    """How many times as long as the median process one may compute."""

    def __post_init__(self) -> None:
        positive("cluster", self, "megabytes", "disk_megabytes")
        if self.slow <= 1:
            raise ConfigError(f"slow must be greater than 1, found {self.slow}")


def check_cluster(options: ClusterOptions) -> tuple[RenderableType | None, list[str]]:
    """What there is to show, on the main process, and what is wrong, on all.

    Raises:
        ConfigError: the degrees do not fit the processes.
        CheckpointError: the main process cannot write in the folder.
    """
    mesh = Mesh.start(options.device, timeout_minutes=MINUTES)
    with Watch(mesh, explain, WatchConfig(hang_minutes=None)):
        checkup = _examine(mesh, options)
    mesh.stop()
    return checkup.report() if mesh.is_main else None, checkup.faults()


def _examine(mesh: Mesh, options: ClusterOptions) -> Checkup:
    """Collective; all get the same."""
    # Imports models and tasks, which --help and mistakes in options need not wait for.
    from dalle_ds.doctor import probes

    folder = Path(options.path)
    own_links = probes.measure_links(mesh.divide(options.parallel), options.megabytes)
    slowest: dict[tuple[str, tuple[int, ...]], Link] = {}
    for link in (link for links in mesh.gather_objects(own_links) for link in links):
        other = slowest.get((link.axis, link.ranks), link)
        speeds = min(link.all_reduce, other.all_reduce), min(link.all_gather, other.all_gather)
        slowest[link.axis, link.ranks] = probes.Link(link.axis, link.ranks, *speeds)
    return Checkup(
        folder,
        mesh.gather_objects(probes.facts_here(mesh)),
        probes.clock_offsets(mesh),
        list(slowest.values()),
        mesh.gather_objects(probes.measure_disk(folder, mesh, options.disk_megabytes)),
        mesh.gather_objects(probes.run_trial(mesh)),
        options.slow,
    )


@dataclass(frozen=True)
class Checkup:
    """What was found; lists are by rank."""

    folder: Path
    facts: list[Facts]
    clocks: list[float]  # seconds ahead of the median
    links: list[Link]  # one for each group of each axis, as its slowest process had it
    disks: list[Disk]
    trials: list[Trial]
    slow: float  # how many times the median's computing time is a fault

    def faults(self) -> list[str]:
        """What is wrong, a sentence each."""
        return [*self._versions(), *self._clocks(), *self._slow_links(), *self._disks(), *self._trials()]

    def report(self) -> RenderableType:
        """For a terminal."""
        faults = self.faults()
        verdict = "\n".join(faults) if faults else "nothing is wrong"
        parts: list[RenderableType] = [self._processes(), *([self._links()] if self.links else []), self._shared()]
        return Group(*parts, Text(verdict, style="bold red" if faults else "green"))

    def _who(self, ranks: Iterable[int]) -> str:
        """Ranks and their hosts, few enough to be read."""
        named = [f"rank {rank} ({self.facts[rank].host})" for rank in ranks]
        return ", ".join(named[:4]) + (f" and {len(named) - 4} more" if len(named) > 4 else "")

    def _versions(self) -> Iterator[str]:
        for name in dict.fromkeys(name for facts in self.facts for name in facts.versions):
            having = _alike(facts.versions.get(name, "none") for facts in self.facts)
            if len(having) > 1:
                # The odd ones are named, the many are not.
                usual = max(having, key=lambda version: len(having[version]))
                others = [f"{version} on {self._who(ranks)}" for version, ranks in having.items() if version != usual]
                yield f"{name} is not the same everywhere: {'; '.join(others)}, and {usual} on the other ranks"

    def _clocks(self) -> Iterator[str]:
        ahead, behind = max(self.clocks), min(self.clocks)
        if ahead - behind > CLOCKS_APART:
            first, last = self.clocks.index(ahead), self.clocks.index(behind)
            yield f"clocks differ by {ahead - behind:.1f} s, between {self._who([first])} and {self._who([last])}"

    def _slow_links(self) -> Iterator[str]:
        for axis, links in self._by_axis().items():
            usual = statistics.median_high(link.all_reduce for link in links)
            for link in links:
                if link.all_reduce < SLOW_LINK * usual:
                    yield (
                        f"the {axis} group of {self._who(link.ranks)} reduces {_speed(link.all_reduce)} GB/s, the "
                        f"median one {_speed(usual)}"
                    )

    def _by_axis(self) -> dict[str, list[Link]]:
        axes = dict.fromkeys(link.axis for link in self.links)
        return {axis: [link for link in self.links if link.axis == axis] for axis in axes}

    def _disks(self) -> Iterator[str]:
        for trouble, ranks in _alike(disk.trouble for disk in self.disks).items():
            if trouble is not None:
                yield f"{self._who(ranks)}: {trouble}"
        least = min(disk.free for disk in self.disks)
        if least < LEAST_FREE and all(disk.trouble is None for disk in self.disks):
            yield f"{self.folder} has {least / 1e9:.1f} GB left: free some space"

    def _trials(self) -> Iterator[str]:
        usual = statistics.median_low(trial.compute for trial in self.trials)
        for rank, trial in enumerate(self.trials):
            if trial.compute > self.slow * usual:
                yield f"{self._who([rank])} computes {trial.compute / usual:.1f} times as long as the median process"
        losses = [trial.loss for trial in self.trials]
        finite = [loss for loss in losses if math.isfinite(loss)]
        usual = statistics.median(finite) if finite else math.nan
        # Not the other way round: a loss that is not finite compares as false.
        odd = [rank for rank, loss in enumerate(losses) if not abs(loss - usual) <= LOSSES_APART * abs(usual)]
        if odd:
            yield f"{self._who(odd)} computes another loss from the same numbers: {losses[odd[0]]}, not {usual}"

    def _processes(self) -> Table:
        title = ", ".join(f"{name} {version}" for name, version in self.facts[0].versions.items())
        table = _table(title, "rank", "host", "device", "clock ms", "alone ms", "step ms", "write MB/s", "read MB/s")
        rows = zip(self.facts, self.clocks, self.trials, self.disks, strict=True)
        for rank, (facts, clock, trial, disk) in enumerate(rows):
            times = (f"{1e3 * clock:+.1f}", f"{1e3 * trial.compute:.1f}", f"{1e3 * trial.step:.1f}")
            speeds = (f"{disk.write / 1e6:.0f}", f"{disk.read / 1e6:.0f}")
            table.add_row(str(rank), facts.host, facts.device, *times, *speeds)
        return table

    def _links(self) -> Table:
        columns = ("axis", "processes", "groups", "all-reduce", "all-gather", "slowest group")
        table = _table("GB/s that leave a process", *columns)
        for axis, links in self._by_axis().items():
            slowest = min(links, key=lambda link: link.all_reduce)
            gather = min(link.all_gather for link in links)
            ranks = f"ranks {slowest.ranks[0]} … {slowest.ranks[-1]}"
            counts = (str(len(slowest.ranks)), str(len(links)))
            table.add_row(axis, *counts, _speed(slowest.all_reduce), _speed(gather), ranks)
        return table

    def _shared(self) -> Text:
        write, read = (sum(getattr(disk, name) for disk in self.disks) / 1e6 for name in ("write", "read"))
        free = min(disk.free for disk in self.disks) / 1e9
        return Text(f"{self.folder}: {write:,.0f} MB/s written and {read:,.0f} MB/s read together, {free:,.0f} GB free")


def _alike(values: Iterable[Hashable]) -> dict[Any, list[int]]:
    """Value → ranks that have it."""
    found: dict[Any, list[int]] = defaultdict(list)
    for rank, value in enumerate(values):
        found[value].append(rank)
    return found


def _speed(value: float) -> str:
    return f"{value / 1e9:.3g}"


def _table(title: str, *columns: str) -> Table:
    table = Table(title=title, title_justify="left", title_style="bold")
    for number, column in enumerate(columns):
        table.add_column(column, justify="left" if number < 3 and "rank" in columns else "right")
    return table
