"""Which process holds up the others, by how much, and with what.

Processes that train together take the same time for an update, since each waits for the slowest. What a process takes by
itself is known from two figures: how long it waits for its data, and how long a fixed matrix product takes on its device.
That tells throttled GPUs, busy hosts and slow disks; not a slow network, nor a process that has more to compute.
"""

from __future__ import annotations

import socket
import statistics
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass

import torch
import torch.distributed as dist
from torch import Tensor

from dalle_ds.config.watch import WatchConfig
from dalle_ds.parallel import Mesh

SIZES = {"cpu": 192, "cuda": 2048}
"""Rows and columns of the probe's matrices: many times what starting a product takes, few milliseconds in all."""
PRODUCTS = {"cpu": 1, "cuda": 20}
"""Products that are timed together."""
REPEATS = 5
"""Timings, of which the shortest counts: the others tell of whatever else the host does at the moment."""
QUIET_INTERVALS = 10
"""Comparisons that say nothing new of a process that has been named, before it is named again."""


@dataclass(frozen=True)
class Slowest:
    """The process that an update waits for."""

    rank: int
    ratio: float
    """How many times what the update takes a process at the median."""
    cause: str
    """"data" or "compute", whichever it spends more of the difference on."""


class Stragglers:
    """Compares processes every `straggler_every` updates.

    Args:
        say: shows a line to the user; called on the main process only.
    """

    def __init__(self, mesh: Mesh, config: WatchConfig, say: Callable[[str], None]) -> None:
        self._mesh = mesh
        self._config = config
        self._say = say
        self._every = config.straggler_every if mesh.world_size > 1 else 0
        self._probe = _Probe(mesh.device) if self._every else None
        self._hosts: list[str] = []
        self._waited = 0.0
        self._taken = 0.0
        self._updates = 0
        self._named: tuple[int, str] | None = None
        self._quiet = 0
        """Comparisons in which the process named last goes unmentioned."""

    @contextmanager
    def waiting(self) -> Iterator[None]:
        """Around the wait for the data of an update."""
        began = time.perf_counter()
        yield
        self._waited += time.perf_counter() - began

    def after(self, step: int, seconds: float) -> dict[str, float]:
        """Take note of an update. Collective every `straggler_every` updates.

        Args:
            step: updates done.
            seconds: how long this one took, the wait for its data included.

        Returns:
            "straggler_rank" and "straggler_ratio" (1: none) after a comparison; nothing otherwise.
        """
        self._taken += seconds
        self._updates += 1
        if self._probe is None or step % self._every:
            return {}
        own = torch.tensor([self._taken, self._waited], dtype=torch.float64) / self._updates
        self._taken = self._waited = 0.0
        self._updates = 0
        figures = self._gather(torch.cat([own, own.new_tensor([self._probe.seconds()])]))
        slowest = find_slowest(*figures.unbind(1))
        if self._mesh.is_main:
            self._report(step, slowest)
        return {"straggler_rank": float(slowest.rank), "straggler_ratio": slowest.ratio}

    def _gather(self, own: Tensor) -> Tensor:
        """(3,) of every process → (processes, 3), in the main memory of each."""
        own = own.to(self._mesh.device)
        everyone = [torch.empty_like(own) for _ in range(self._mesh.world_size)]
        dist.all_gather(everyone, own)
        if not self._hosts:
            self._hosts = [""] * self._mesh.world_size
            dist.all_gather_object(self._hosts, socket.gethostname())
        return torch.stack(everyone).cpu()

    def _report(self, step: int, slowest: Slowest) -> None:
        if slowest.ratio < self._config.straggler_ratio:
            self._named = None
            return
        self._quiet -= 1
        if self._named == (slowest.rank, slowest.cause) and self._quiet > 0:
            return
        self._named, self._quiet = (slowest.rank, slowest.cause), QUIET_INTERVALS
        why = "its data" if slowest.cause == "data" else "its device, which computes slowly"
        self._say(
            f"straggler at step {step}: rank {slowest.rank} (host {self._hosts[slowest.rank]}) takes {slowest.ratio:.2f} "
            f"times as long as the median process, because of {why}"
        )


def find_slowest(
    seconds: Sequence[float] | Tensor, waits: Sequence[float] | Tensor, probes: Sequence[float] | Tensor
) -> Slowest:
    """The process that all wait for. Each argument has one value per process.

    Args:
        seconds: what an update takes, waiting for others included: about the same for all.
        waits: of that, waiting for data.
        probes: how long the fixed product takes.
    """
    seconds, waits, probes = ([float(value) for value in values] for values in (seconds, waits, probes))
    update = statistics.median(seconds)
    # Computing takes a process as long as its probe says, in units such that the slowest one needs the whole update.
    unit = max(0.0, min((update - wait) / probe for wait, probe in zip(waits, probes, strict=True)))
    own = [wait + unit * probe for wait, probe in zip(waits, probes, strict=True)]
    rank = own.index(max(own))
    # Of an even number the lower one: with two processes, the other one.
    wait, probe, median = (statistics.median_low(values) for values in (waits, probes, own))
    cause = "data" if waits[rank] - wait > unit * (probes[rank] - probe) else "compute"
    return Slowest(rank, own[rank] / median if median > 0 else 1.0, cause)


class _Probe:
    """Times a matrix product that is the same on every process and in every run."""

    def __init__(self, device: torch.device) -> None:
        self._device = device
        size = SIZES[device.type]
        # Not from the generator that training uses; not zeros, whose products take GPUs less power and time.
        values = torch.linspace(-1, 1, size * size, dtype=torch.float32).view(size, size)
        self._matrix = values.to(device, torch.float16 if device.type == "cuda" else torch.float32)
        self._product = torch.empty_like(self._matrix)

    @torch.no_grad()
    def seconds(self) -> float:
        """How long it takes now."""
        self._time()  # wakes what is asleep
        return min(self._time() for _ in range(REPEATS))

    def _time(self) -> float:
        if self._device.type == "cuda":
            begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
            begin.record()
            self._multiply()
            end.record()
            end.synchronize()
            return begin.elapsed_time(end) / 1000
        began = time.perf_counter()
        self._multiply()
        return time.perf_counter() - began

    def _multiply(self) -> None:
        for _ in range(PRODUCTS[self._device.type]):
            torch.matmul(self._matrix, self._matrix, out=self._product)
