"""The rank that all wait for is named, with what it spends its time on."""

from __future__ import annotations

import random
import socket
import statistics
import time
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
import torch.multiprocessing as multiprocessing
from torch.distributed import ProcessGroup, Work

from dalle_ds.config.parallel import WatchConfig
from dalle_ds.errors import ConfigError
from dalle_ds.parallel import Mesh
from dalle_ds.resilience.stragglers import RankTimes, Straggler, Stragglers, find_straggler

CPU = torch.device("cpu")


def times_of(update: float, data: list[float], compute: list[float], stages: int = 1) -> list[RankTimes]:
    return [RankTimes("h", rank % stages, update, *own) for rank, own in enumerate(zip(data, compute, strict=True))]


def test_the_rank_with_the_most_own_time_is_found_among_made_up_ones() -> None:
    """Their update lasts as long as the slowest one takes, and a transfer that all take part in."""
    generator = random.Random(0)
    causes = set()
    for _ in range(300):
        count = generator.randrange(2, 12)
        compute = [generator.uniform(0.8, 1.2) for _ in range(count)]
        data = [generator.uniform(0.0, 0.1) for _ in range(count)]
        slow = generator.randrange(count)
        (compute if generator.random() < 0.5 else data)[slow] += generator.uniform(1, 5)
        own = [sum(both) for both in zip(data, compute, strict=True)]
        transfer = generator.uniform(0, 3)
        found = find_straggler(times_of(max(own) + transfer, data, compute))
        assert found.rank == slow
        wanted = (max(own) + transfer) / (statistics.median_low(own) + transfer)
        assert found.ratio == pytest.approx(wanted, rel=1e-9)
        assert found.cause == ("data" if data[slow] > 0.5 else "compute")
        causes.add(found.cause)
    assert causes == {"data", "compute"}


def test_ranks_that_are_alike_have_no_straggler() -> None:
    assert find_straggler(times_of(0.1, [0.01] * 4, [0.08] * 4)).ratio == pytest.approx(1)
    # Waits that are long by far beside others, and short beside an update.
    assert find_straggler(times_of(0.1, [0.001, 0.0001, 0.0001, 0.0001], [0.08] * 4)).ratio < 1.02
    # A clock that makes the wait longer than the update it is a part of.
    assert find_straggler(times_of(0.1, [0.1001, 0.0], [0.0, 0.0])) == Straggler(0, pytest.approx(100), "data")


def test_ranks_are_compared_within_their_pipeline_stage() -> None:
    compute = [0.02, 0.09, 0.02, 0.09, 0.05, 0.09]
    assert find_straggler(times_of(0.1, [0.0] * 6, compute, stages=2)) == Straggler(
        4, pytest.approx(1 / 0.7), "compute"
    )
    assert find_straggler(times_of(0.1, [0.0] * 2, [0.02, 0.09], stages=2)).ratio == 1


def together(rank: int, store: str, results: Any) -> None:
    """Be one of two ranks, of which the second has a slow disk at first, and then a slow device."""
    dist.init_process_group("gloo", init_method=f"file://{store}", rank=rank, world_size=2)
    torch.set_num_threads(1)
    mesh = Mesh(rank, 2, CPU)
    lines: list[str] = []
    watched = Stragglers(mesh, WatchConfig(straggler_every=4, straggler_ratio=2.0), lines.append)
    metrics: dict[int, dict[str, float]] = {}

    def updates(first: int, last: int, data: float, compute: float) -> None:
        for step in range(first, last + 1):
            began = time.perf_counter()
            with watched.waiting(step - 1):
                time.sleep(data if rank == 1 else 0.0)
            for _ in range(3):
                time.sleep(0.01 + (compute if rank == 1 else 0.0) / 3)
                waiting = dist.all_reduce(torch.ones(3), async_op=True)
                time.sleep(0.001)
                waiting.wait()
                mesh.sum(torch.ones(3), "world")
            metrics[step] = watched.after(step, time.perf_counter() - began)

    before = [dict(vars(owner)) for owner in (ProcessGroup, Work)]
    updates(1, 12, 0.15, 0.0)
    told = len(lines)
    updates(13, 20, 0.0, 0.15)
    assert [dict(vars(owner)) for owner in (ProcessGroup, Work)] == before
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
        assert [step for step, figures in metrics.items() if figures] == [4, 8, 12, 16, 20]
        for figures in filter(None, metrics.values()):
            assert figures["straggler_rank"] == 1 and figures["straggler_ratio"] > 2
    who = f"straggler rank=1 host={socket.gethostname()}"
    (data,), (compute,) = found[0][1:]
    assert data.startswith(f"{who} step=4 ratio=") and data.endswith(" cause=data")
    assert compute.startswith(f"{who} step=16 ratio=") and compute.endswith(" cause=compute")
    assert found[1][1:] == ([], [])


class TwoRanks(Mesh):
    """Hears of another rank without there being any."""

    other = 1.0
    """How many times the step time of this rank the other one's own time is."""

    def gather_objects(self, value: Any) -> list[Any]:
        return [RankTimes("a", 0, 0.1, 0.0, 0.1 / self.other), RankTimes("b", 0, 0.1, 0.0, 0.1)]


def test_a_straggler_is_named_again_after_a_while_or_when_it_comes_back() -> None:
    lines: list[str] = []
    mesh = TwoRanks(0, 2, CPU)
    watched = Stragglers(mesh, WatchConfig(straggler_every=1), lines.append)
    told: list[int] = []
    slow = [1] * 2 + [2] * 12 + [1] + [2] * 2
    for step, other in enumerate(slow, 1):
        mesh.other = other
        with watched.waiting(step - 1):
            pass
        watched.after(step, 0.1)
        if len(lines) > len(told):
            told.append(step)
    assert told == [3, 13, 16]


def test_a_process_alone_has_no_one_to_wait_for() -> None:
    lines: list[str] = []
    for world_size, every in ((1, 1), (2, 0)):
        watched = Stragglers(Mesh(0, world_size, CPU), WatchConfig(straggler_every=every), lines.append)
        with watched.waiting(0):
            pass
        assert watched.after(1, 0.1) == {} and lines == []


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
