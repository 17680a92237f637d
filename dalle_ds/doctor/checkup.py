"""The checks of a cluster, put together."""

from __future__ import annotations

import math
import statistics
from collections import defaultdict
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from rich.console import Group, RenderableType
from rich.table import Table
from rich.text import Text

from dalle_ds.config import ParallelConfig
from dalle_ds.doctor.disk import Disk, measure_disk
from dalle_ds.doctor.probes import Facts, Link, Trial, clock_offsets, facts_here, gather, measure_links, run_trial
from dalle_ds.parallel import Mesh

CLOCKS_APART = 1.0
"""Seconds. Logs are read side by side, and files are told old from new."""
LEAST_FREE = 5 * 10**9
"""Bytes."""
LOSSES_APART = 1e-2
"""Relative: GPUs of different kinds round differently."""
SLOW_LINK = 0.5
"""Of the median speed along the axis."""


@dataclass(frozen=True)
class Checkup:
    """What was found; lists are by rank."""

    folder: Path
    facts: list[Facts]
    clocks: list[float]
    """Seconds ahead of the median."""
    links: list[Link]
    """One for each group of each axis, as its slowest process had it."""
    disks: list[Disk]
    trials: list[Trial]
    slow: float
    """How many times the median's computing time is a fault."""

    def faults(self) -> list[str]:
        """What is wrong, a sentence each."""
        return [*self._versions(), *self._clocks(), *self._slow_links(), *self._disks(), *self._trials()]

    def report(self) -> RenderableType:
        """For a terminal."""
        faults = self.faults()
        verdict = "\n".join(faults) if faults else "nothing is wrong"
        parts: list[RenderableType] = [self._processes(), *([self._links()] if self.links else []), self._shared()]
        return Group(*parts, Text(verdict, style="bold red" if faults else "green"))

    def _who(self, ranks: list[int]) -> str:
        """Ranks and their hosts, few enough to be read."""
        shown = [f"rank {rank} ({self.facts[rank].host})" for rank in ranks[:4]]
        return ", ".join(shown) + (f" and {len(ranks) - 4} more" if len(ranks) > 4 else "")

    def _versions(self) -> Iterator[str]:
        names = {name: None for facts in self.facts for name in facts.versions}
        for name in names:
            having: dict[str, list[int]] = defaultdict(list)
            for rank, facts in enumerate(self.facts):
                having[facts.versions.get(name, "none")].append(rank)
            if len(having) > 1:
                # The odd ones are named, the many are not.
                usual = max(having, key=lambda version: len(having[version]))
                others = "; ".join(
                    f"{version} on {self._who(ranks)}" for version, ranks in having.items() if version != usual
                )
                yield f"{name} is not the same everywhere: {others}, and {usual} on the other ranks"

    def _clocks(self) -> Iterator[str]:
        ahead, behind = max(self.clocks), min(self.clocks)
        if ahead - behind > CLOCKS_APART:
            first, last = self.clocks.index(ahead), self.clocks.index(behind)
            yield f"clocks differ by {ahead - behind:.1f} s, between {self._who([first])} and {self._who([last])}"

    def _slow_links(self) -> Iterator[str]:
        for axis in dict.fromkeys(link.axis for link in self.links):
            links = [link for link in self.links if link.axis == axis]
            usual = statistics.median_high(link.all_reduce for link in links)
            for link in links:
                if link.all_reduce < SLOW_LINK * usual:
                    yield (
                        f"the {axis} group of {self._who(list(link.ranks))} reduces {_speed(link.all_reduce)} GB/s, the "
                        f"median one {_speed(usual)}"
                    )

    def _disks(self) -> Iterator[str]:
        for trouble, ranks in _alike([disk.trouble for disk in self.disks]).items():
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
        finite = [trial.loss for trial in self.trials if math.isfinite(trial.loss)]
        usual = statistics.median(finite) if finite else math.nan
        odd = [
            rank
            for rank, trial in enumerate(self.trials)
            # Not the other way round: a loss that is not finite compares as false.
            if not abs(trial.loss - usual) <= LOSSES_APART * abs(usual)
        ]
        if odd:
            yield f"{self._who(odd)} computes another loss from the same numbers: {self.trials[odd[0]].loss}, not {usual}"

    def _processes(self) -> Table:
        usual = self.facts[0].versions
        title = ", ".join(f"{name} {version}" for name, version in usual.items())
        table = _table(title, "rank", "host", "device", "clock ms", "alone ms", "step ms", "write MB/s", "read MB/s")
        rows = zip(self.facts, self.clocks, self.trials, self.disks, strict=True)
        for rank, (facts, clock, trial, disk) in enumerate(rows):
            figures = (f"{1e3 * clock:+.1f}", f"{1e3 * trial.compute:.1f}", f"{1e3 * trial.step:.1f}")
            table.add_row(
                str(rank), facts.host, facts.device, *figures, f"{disk.write / 1e6:.0f}", f"{disk.read / 1e6:.0f}"
            )
        return table

    def _links(self) -> Table:
        table = _table(
            "GB/s that leave a process", "axis", "processes", "groups", "all-reduce", "all-gather", "slowest group"
        )
        for axis in dict.fromkeys(link.axis for link in self.links):
            links = [link for link in self.links if link.axis == axis]
            slowest = min(links, key=lambda link: link.all_reduce)
            reduce, collect = min(link.all_reduce for link in links), min(link.all_gather for link in links)
            ranks = f"ranks {slowest.ranks[0]} … {slowest.ranks[-1]}"
            table.add_row(axis, str(len(slowest.ranks)), str(len(links)), _speed(reduce), _speed(collect), ranks)
        return table

    def _shared(self) -> Text:
        write, read = (sum(getattr(disk, name) for disk in self.disks) / 1e6 for name in ("write", "read"))
        free = min(disk.free for disk in self.disks) / 1e9
        return Text(f"{self.folder}: {write:,.0f} MB/s written and {read:,.0f} MB/s read together, {free:,.0f} GB free")


def examine(
    mesh: Mesh, degrees: ParallelConfig, folder: Path, *, megabytes: int, disk_megabytes: int, slow: float
) -> Checkup:
    """Check the processes of a launch. Collective; all get the same.

    Args:
        mesh: before it is divided.
        degrees: how runs will divide it.
        folder: where runs will be.
        megabytes: what a collective exchanges.
        disk_megabytes: what each process writes.
        slow: how many times the median process's computing time is a fault.

    Raises:
        ConfigError: the degrees do not fit the processes.
        CheckpointError: the main process cannot write in the folder.
    """
    divided = mesh.divide(degrees)
    slowest: dict[tuple[str, tuple[int, ...]], Link] = {}
    for link in (link for links in gather(measure_links(divided, megabytes), mesh) for link in links):
        other = slowest.get((link.axis, link.ranks), link)
        speeds = min(link.all_reduce, other.all_reduce), min(link.all_gather, other.all_gather)
        slowest[link.axis, link.ranks] = Link(link.axis, link.ranks, *speeds)
    return Checkup(
        folder,
        gather(facts_here(mesh), mesh),
        clock_offsets(mesh),
        list(slowest.values()),
        gather(measure_disk(folder, mesh, disk_megabytes), mesh),
        gather(run_trial(mesh), mesh),
        slow,
    )


def _alike(values: list[str | None]) -> dict[str | None, list[int]]:
    """Value → ranks that have it."""
    found: dict[str | None, list[int]] = defaultdict(list)
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
