"""Stragglers: which rank the others wait for, by how much, and whether for its data or for its computation.

Ranks that train in lockstep have the same step time, since each waits for the slowest, in collectives. A rank's own time is
its step time without that, and the straggler the rank with the most own time. Collectives are timed in `TIMED_UPDATES` before
each comparison, on GPUs with the device synchronized around each, which costs the overlap of communication in these updates.

Seen: throttled or shared GPUs, busy hosts, slow disks. Not seen: a slow network, in which all wait alike; what a rank loses in
point-to-point transfers of a pipeline; a rank that is alone in its pipeline stage, since stages differ in their work.
"""

from __future__ import annotations

import socket
import statistics
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any, NamedTuple

import torch
from torch.distributed import ProcessGroup, Work

from dalle_ds.config.parallel import WatchConfig
from dalle_ds.parallel import Mesh

TIMED_UPDATES = 3
"""Their median counts, so that one hiccup does not."""
QUIET_INTERVALS = 10
"""Comparisons that say nothing new of a rank that has been named, before it is named again."""
_COLLECTIVES = ("reduce", "gather", "scatter", "broadcast", "barrier", "alltoall", "all_to_all")


class RankTimes(NamedTuple):
    """Seconds per update of one rank."""

    host: str
    stage: int  # of the pipeline
    update: float
    data: float  # of that, waiting for its data
    compute: float  # of that, neither waiting for data nor in collectives


class Straggler(NamedTuple):
    """The rank that an update waits for."""

    rank: int
    ratio: float  # the step time, over what it would be if this rank were like the median one
    cause: str  # "data" or "compute", whichever it spends more of the difference on


class Stragglers:
    """Compares ranks every `watch.straggler_every` updates.

    Args:
        say: shows a line to the user; called on the main process only.
    """

    def __init__(self, mesh: Mesh, config: WatchConfig, say: Callable[[str], None]) -> None:
        self._mesh, self._config, self._say = mesh, config, say
        self._every = config.straggler_every if mesh.world_size > 1 else 0
        self._timer = CollectiveTimer(mesh.device)
        self._updates: list[float] = []
        self._data: list[float] = []
        self._compute: list[float] = []
        self._named: tuple[int, str] | None = None
        self._quiet = 0  # comparisons in which that one goes unmentioned

    @contextmanager
    def waiting(self, step: int) -> Iterator[None]:
        """Around the wait for the data of an update, with which it begins; `step` updates are done."""
        began = time.perf_counter()
        yield
        if self._every:
            self._data.append(time.perf_counter() - began)
            if self._is_timed(step + 1):
                self._timer.start()

    def after(self, step: int, seconds: float) -> dict[str, float]:
        """Take note of an update. Collective every `straggler_every` updates.

        Args:
            step: updates done.
            seconds: how long this one took, the wait for its data included.

        Returns:
            "straggler_rank" and "straggler_ratio" (1: none) after a comparison; nothing otherwise.
        """
        if not self._every:
            return {}
        self._updates.append(seconds)
        if self._is_timed(step):
            self._compute.append(max(0.0, seconds - self._data[-1] - self._timer.stop()))
        if step % self._every:
            return {}
        update, data = statistics.fmean(self._updates), statistics.fmean(self._data)
        compute = statistics.median(self._compute)
        self._updates, self._data, self._compute = [], [], []
        own = RankTimes(socket.gethostname(), self._mesh.index("pipe"), update, data, compute)
        everyone = self._mesh.gather_objects(own)
        found = find_straggler(everyone)
        if self._mesh.is_main:
            self._report(step, found, everyone[found.rank].host)
        return {"straggler_rank": float(found.rank), "straggler_ratio": found.ratio}

    def _is_timed(self, step: int) -> bool:
        return -step % self._every < TIMED_UPDATES

    def _report(self, step: int, found: Straggler, host: str) -> None:
        who = found.rank, found.cause
        if found.ratio < self._config.straggler_ratio:
            self._named = None
            return
        self._quiet -= 1
        if self._named != who or self._quiet <= 0:
            self._named, self._quiet = who, QUIET_INTERVALS
            self._say(
                f"straggler rank={found.rank} host={host} step={step} ratio={found.ratio:.2f} cause={found.cause}"
            )


def find_straggler(times: Sequence[RankTimes]) -> Straggler:
    """The rank that has the most own time beyond the median rank of its pipeline stage; `times` are in the order of ranks."""

    def excess(own: RankTimes) -> tuple[float, float]:
        peers = sorted((each.data + each.compute, each.data) for each in times if each.stage == own.stage)
        total, data = peers[(len(peers) - 1) // 2]  # of an even number the lower one: of two ranks, the other one
        return own.data - data, own.compute - (total - data)

    rank = max(range(len(times)), key=lambda rank: sum(excess(times[rank])))
    data, compute = excess(times[rank])
    update = statistics.median(each.update for each in times)
    ratio = update / max(update - data - compute, 0.01 * update)
    return Straggler(rank, ratio, "data" if data > compute else "compute")


class CollectiveTimer:
    """How long this process is in collectives. From `start` to `stop`, it stands in for those calls of torch's groups."""

    def __init__(self, device: torch.device) -> None:
        self._cuda = device.type == "cuda"
        self._originals: list[tuple[type, str, Any]] = []
        self._seconds = 0.0

    def start(self) -> None:
        self._seconds = 0.0
        names = [name for name in vars(ProcessGroup) if any(part in name for part in _COLLECTIVES)]
        for owner, name in [(Work, "wait"), *((ProcessGroup, name) for name in names)]:
            self._originals.append((owner, name, vars(owner)[name]))
            setattr(owner, name, self._timed(getattr(owner, name)))

    def stop(self) -> float:
        """The seconds since `start` that passed in collectives."""
        for owner, name, original in self._originals:
            setattr(owner, name, original)
        self._originals.clear()
        return self._seconds

    def _timed(self, call: Callable[..., Any]) -> Callable[..., Any]:
        def timed(*arguments: Any, **options: Any) -> Any:
            began = self._now()
            try:
                return call(*arguments, **options)
            finally:
                self._seconds += self._now() - began

        return timed

    def _now(self) -> float:
        if self._cuda:
            torch.cuda.synchronize()
        return time.perf_counter()
