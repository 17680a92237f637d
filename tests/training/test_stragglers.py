"""The process that all wait for is named, with what it spends its time on."""

from __future__ import annotations

import random
import re
import socket
import statistics
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
import torch.multiprocessing as multiprocessing

from dalle_ds.config.watch import WatchConfig
from dalle_ds.errors import ConfigError
from dalle_ds.parallel import Mesh
from dalle_ds.training import stragglers
from dalle_ds.training.stragglers import Slowest, Stragglers, find_slowest

CPU = torch.device("cpu")


def test_what_processes_take_by_themselves_is_found_from_what_they_take_together() -> None:
    """Of processes that are made up: their update lasts as long as the slowest one takes."""
    generator = random.Random(0)
    causes = set()
    for _ in range(300):
        count = generator.randrange(2, 12)
        speeds = [generator.uniform(0.8, 1.2) for _ in range(count)]
        waits = [generator.uniform(0.0, 0.1) for _ in range(count)]
        slow = generator.randrange(count)
        (speeds if generator.random() < 0.5 else waits)[slow] += generator.uniform(1, 5)
        own = [wait + speed for wait, speed in zip(waits, speeds, strict=True)]
        found = find_slowest([max(own)] * count, waits, [speed * 3e-4 for speed in speeds])
        assert found.rank == slow
        assert found.ratio == pytest.approx(max(own) / statistics.median_low(own), rel=1e-9)
        assert found.cause == ("data" if waits[slow] > 0.5 else "compute")
        causes.add(found.cause)
    assert causes == {"data", "compute"}


def test_processes_that_are_alike_have_no_straggler() -> None:
    assert find_slowest([0.1] * 4, [0.01] * 4, [2e-4] * 4).ratio == pytest.approx(1)
    # Waits that are long by far beside others, and short beside an update.
    assert find_slowest([0.1] * 4, [0.001, 0.0001, 0.0001, 0.0001], [2e-4] * 4).ratio < 1.01
    # A clock that makes the wait longer than the update it is a part of.
    assert find_slowest([0.1, 0.1], [0.1001, 0.0], [2e-4, 2e-4]) == Slowest(0, 1.0, "data")


def together(rank: int, store: str, results: Any) -> None:
    """Be one of two processes, of which the second has a slow disk at first, and then a slow device."""
    dist.init_process_group("gloo", init_method=f"file://{store}", rank=rank, world_size=2)
    torch.set_num_threads(1)
    mesh = Mesh(rank, 2, CPU)
    lines: list[str] = []
    watched = Stragglers(mesh, WatchConfig(straggler_every=2, straggler_ratio=2.0), lines.append)
    metrics: dict[int, dict[str, float]] = {}

    def updates(first: int, last: int, wait: float) -> None:
        for step in range(first, last + 1):
            began = time.perf_counter()
            with watched.waiting():
                time.sleep(wait if rank == 1 else 0.0)
            dist.barrier()  # an update is over when the last one has come
            seconds = time.perf_counter() - began
            before = torch.get_rng_state()
            metrics[step] = watched.after(step, seconds)
            assert torch.equal(before, torch.get_rng_state())

    updates(1, 6, 0.1)
    told = len(lines)
    if rank == 1:
        stragglers.PRODUCTS["cpu"] *= 30
    updates(7, 10, 0.0)
    results[rank] = (metrics, lines[:told], lines[told:])
    dist.destroy_process_group()


@pytest.mark.alone
def test_who_is_slow_is_told_once_with_its_host_and_its_cause(tmp_path: Path) -> None:
    with multiprocessing.Manager() as manager:
        results = manager.dict()
        multiprocessing.spawn(together, (str(tmp_path / "store"), results), nprocs=2)
        found = dict(results)
    for metrics, *_ in found.values():
        assert metrics == found[0][0]
        assert [step for step, figures in metrics.items() if figures] == [2, 4, 6, 8, 10]
        for figures in filter(None, metrics.values()):
            assert figures["straggler_rank"] == 1 and figures["straggler_ratio"] > 2
    data, compute = found[0][1:]
    who = rf"rank 1 \(host {re.escape(socket.gethostname())}\) takes \d+\.\d\d times as long as the median process"
    assert len(data) == len(compute) == 1
    assert re.fullmatch(rf"straggler at step 2: {who}, because of its data", data[0])
    assert re.fullmatch(rf"straggler at step 8: {who}, because of its device, which computes slowly", compute[0])
    assert found[1][1:] == ([], [])


class Alone(Stragglers):
    """Hears of other processes without there being any."""

    def __init__(self, config: WatchConfig, say: Callable[[str], None]) -> None:
        super().__init__(Mesh(0, 2, CPU), config, say)
        self._hosts = ["a", "b"]
        self.other = 1.0
        """How many times what this process takes the other one takes."""

    def _gather(self, own: torch.Tensor) -> torch.Tensor:
        own = torch.tensor([self.other, 0.0, 1e-4], dtype=torch.float64)
        return torch.stack([own, own * torch.tensor([1, 1, self.other])])


def test_a_straggler_is_named_again_after_a_while_or_when_it_comes_back() -> None:
    lines: list[str] = []
    watched = Alone(WatchConfig(straggler_every=1), lines.append)
    told: list[int] = []
    slow = [1] * 2 + [2] * 12 + [1] + [2] * 2
    for step, watched.other in enumerate(slow, 1):
        watched.after(step, 0.1)
        if len(lines) > len(told):
            told.append(step)
    assert told == [3, 13, 16]


def test_a_process_alone_has_no_one_to_wait_for() -> None:
    lines: list[str] = []
    watched = Stragglers(Mesh(0, 1, CPU), WatchConfig(straggler_every=1), lines.append)
    with watched.waiting():
        pass
    assert watched.after(1, 0.1) == {} and lines == []
    assert Stragglers(Mesh(0, 2, CPU), WatchConfig(straggler_every=0), lines.append).after(1, 0.1) == {}


@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("straggler_ratio", 1.0),
        ("straggler_every", -1),
        ("hang_minutes", 0),
        ("collective_minutes", -1),
        ("heartbeat_seconds", 0),
    ],
)
def test_what_cannot_work_is_refused(field: str, value: float) -> None:
    with pytest.raises(ConfigError, match=rf"watch\.{field} must .*, found {value}"):
        WatchConfig(**{field: value})
    assert WatchConfig(hang_minutes=None, straggler_every=0).hang_minutes is None
