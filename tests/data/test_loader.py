"""Batches: a pure function of seed and step, whatever the processes; bad rows are replaced and counted."""

from __future__ import annotations

import itertools
import os
import signal
import subprocess
import sys
import time
from collections import Counter
from pathlib import Path

import numpy as np
import pytest
import torch

from dalle_ds.data.faults import WorkerError
from dalle_ds.data.loader import BatchLoader, evaluation_batches
from dalle_ds.data.order import rows_of
from dalle_ds.data.workers import Flag, next_batch, worker_context
from dalle_ds.errors import ConfigError, DataError


class Rows:
    """Samples that tell which row they are and what their generator drew."""

    def __init__(self, length: int, bad: frozenset[int] = frozenset()) -> None:
        self.length = length
        self.bad = bad

    def __len__(self) -> int:
        return self.length

    def sample(self, row: int, rng: np.random.Generator) -> dict[str, np.ndarray | int]:
        if row in self.bad:
            raise DataError(f"row {row} is bad")
        return {"row": row, "draw": rng.standard_normal(3).astype(np.float32), "pid": os.getpid()}


def loader(samples: Rows, **changes) -> BatchLoader:
    options = {"seed": 5, "batch_size": 12, "micro_batch": 12, "rank": 0, "world_size": 1, **changes}
    return BatchLoader(samples, **options)


def steps(samples: Rows, count: int, world_size: int = 1, **changes) -> list[list[tuple]]:
    """Per step, the samples of all ranks, each as a tuple of everything but the process."""
    result: list[list[tuple]] = [[] for _ in range(count)]
    for rank in range(world_size):
        batches = loader(samples, rank=rank, world_size=world_size, **changes)
        micro = batches.micro_batches_per_step
        for number, batch in enumerate(itertools.islice(batches, count * micro)):
            for i in range(len(batch["row"])):
                values = (
                    int(batch["row"][i]),
                    *batch["draw"][i].tolist(),
                    int(batch["key"][i]),
                    int(batch["skipped"][i]),
                )
                result[number // micro].append(values)
    return result


def test_rows_come_in_the_keyed_order() -> None:
    rows = torch.cat([batch["row"] for batch in itertools.islice(loader(Rows(30)), 10)])
    assert rows.tolist() == rows_of(np.arange(120), 5, 30).tolist()
    assert Counter(rows.tolist()) == Counter(list(range(30)) * 4)


def test_what_a_batch_is_made_of() -> None:
    batch = next(iter(loader(Rows(30))))
    assert {name: (value.dtype, tuple(value.shape)) for name, value in batch.items() if name != "pid"} == {
        "row": (torch.int64, (12,)),
        "draw": (torch.float32, (12, 3)),
        "key": (torch.int64, (12,)),
        "skipped": (torch.int64, (12,)),
    }
    assert (batch["key"] >= 0).all() and len(set(batch["key"].tolist())) == 12


@pytest.mark.parametrize(
    ("world_size", "micro_batch", "workers"),
    [(1, 3, 0), (1, 1, 0), (2, 6, 0), (2, 3, 0), (3, 2, 0), (4, 3, 0), (2, 3, 2)],
)
def test_a_steps_samples_do_not_depend_on_how_it_is_divided(world_size: int, micro_batch: int, workers: int) -> None:
    samples = Rows(31, bad=frozenset({3, 4, 17}))
    whole = steps(samples, 4)
    divided = steps(samples, 4, world_size=world_size, micro_batch=micro_batch, workers=workers)
    assert [sorted(step) for step in divided] == [sorted(step) for step in whole]


def test_micro_batches_are_the_documented_positions() -> None:
    micro_batches = itertools.islice(loader(Rows(1000), micro_batch=2, rank=1, world_size=3, start_step=7), 2)
    positions = [[7 * 12 + m * 6 + 2, 7 * 12 + m * 6 + 3] for m in range(2)]
    assert [batch["row"].tolist() for batch in micro_batches] == [
        rows_of(np.array(here), 5, 1000).tolist() for here in positions
    ]


@pytest.mark.parametrize("workers", [0, 2])
def test_resuming_continues_exactly(workers: int) -> None:
    samples = Rows(50, bad=frozenset({1, 2}))
    assert steps(samples, 3, start_step=4, workers=workers, micro_batch=4) == steps(samples, 7, micro_batch=4)[4:]


def test_resuming_late_costs_nothing() -> None:
    batches = loader(Rows(250_000_000), start_step=10**9)
    next(iter(batches))
    start = time.perf_counter()
    next(iter(batches))
    assert time.perf_counter() - start < 0.05


def test_iterating_twice_begins_again_and_leaves_torchs_generator_alone() -> None:
    batches = loader(Rows(50))
    torch.manual_seed(0)
    before = torch.get_rng_state()
    first, second = next(iter(batches)), next(iter(batches))
    assert torch.equal(first["draw"], second["draw"])
    assert torch.equal(torch.get_rng_state(), before)


def test_seeds_and_positions_have_their_own_randomness() -> None:
    # One row: every position shows it, with new draws each time.
    draws = {sample[1:5] for step in steps(Rows(1), 20) for sample in step}
    assert len(draws) == 240
    assert not draws & {sample[1:5] for step in steps(Rows(1), 20, seed=6) for sample in step}


# --- bad rows -------------------------------------------------------------------------------------------------------


def test_bad_rows_are_replaced_by_various_others_and_counted() -> None:
    bad = frozenset(range(0, 40, 4))
    rows = [sample for step in steps(Rows(40, bad), 40, micro_batch=4) for sample in step]  # 12 epochs
    assert not {sample[0] for sample in rows} & bad
    skipped = [sample[-1] for sample in rows]
    first_tries = rows_of(np.arange(480), 5, 40)
    assert [skip > 0 for skip in skipped] == [row in bad for row in first_tries]
    assert max(skipped) > 1  # a replacement may be bad in turn
    assert len({sample[0] for sample, skip in zip(rows, skipped, strict=True) if skip}) > 20
    assert all(sample[0] == row for sample, row, skip in zip(rows, first_tries, skipped, strict=True) if not skip)


@pytest.mark.parametrize("workers", [0, 1])
def test_nothing_but_bad_rows_ends_the_run(workers: int) -> None:
    with pytest.raises(
        DataError, match=r"^of the last 256 rows tried none could be read; the last one: row [0-9] is bad$"
    ):
        next(iter(loader(Rows(10, bad=frozenset(range(10))), workers=workers)))


def test_other_errors_are_not_taken_for_bad_rows() -> None:
    class Broken(Rows):
        def sample(self, row: int, rng: np.random.Generator) -> dict[str, np.ndarray | int]:
            raise ZeroDivisionError

    with pytest.raises(ZeroDivisionError):
        next(iter(loader(Broken(10))))


# --- workers --------------------------------------------------------------------------------------------------------


def test_workers_live_on_and_survive_the_signals_of_a_job() -> None:
    batches = iter(loader(Rows(100), workers=2))
    pids = {int(pid) for _ in range(6) for pid in next(batches)["pid"]}
    assert len(pids) == 2 and os.getpid() not in pids
    for pid in pids:
        for number in (signal.SIGINT, signal.SIGUSR1, signal.SIGUSR2):
            subprocess.run(["kill", f"-{number.value}", str(pid)], check=True)  # not from the workers' parent
    assert {int(pid) for _ in range(20) for pid in next(batches)["pid"]} == pids
    del batches
    assert seconds_until_gone(pids, 10) < 5


@pytest.mark.parametrize("workers", [0, 2])
def test_a_process_that_fails_with_its_loader_in_use_ends(workers: int) -> None:
    script = (
        "from tests.data.test_loader import Rows, loader\n"
        f"batches = iter(loader(Rows(100), workers={workers}))\n"
        "next(batches)\n"
        "raise SystemExit(3)\n"
    )
    assert subprocess.run([sys.executable, "-c", script], timeout=60, check=False).returncode == 3


def test_workers_live_through_sigterms_but_for_their_trainers() -> None:
    """Launchers and SLURM send some, more than once; the trainer only what it means."""
    batches = iter(loader(Rows(100), workers=2))
    pids = {int(pid) for _ in range(6) for pid in next(batches)["pid"]}
    for _ in range(3):
        for pid in pids:
            subprocess.run(["kill", "-TERM", str(pid)], check=True)
        time.sleep(0.1)
    assert {int(pid) for _ in range(20) for pid in next(batches)["pid"]} == pids
    for pid in pids:
        os.kill(pid, signal.SIGTERM)  # from here, which is where the loader is
    with pytest.raises(DataError, match=r"^loader process \d+ \(and 1 more\) was told to end \(SIGTERM\)$"):
        list(itertools.islice(batches, 100))


def alive(pid: int) -> bool:
    """Whether a process runs; one that ended and was not waited for does not."""
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
    except FileNotFoundError:
        return False


def seconds_until_gone(pids: set[int], at_most: float) -> float:
    start = time.monotonic()
    while any(map(alive, pids)) and time.monotonic() - start < at_most:
        time.sleep(0.05)
    return time.monotonic() - start


@pytest.mark.parametrize("warned", [False, True])
def test_workers_end_with_the_trainer(warned: bool) -> None:
    script = (
        "import itertools, time\n"
        "from tests.data.test_loader import Rows, loader\n"
        "batches = iter(loader(Rows(100), workers=2))\n"
        "print(*{int(pid) for _ in range(6) for pid in next(batches)['pid']}, flush=True)\n"
        "time.sleep(60)\n"
    )
    trainer = subprocess.Popen([sys.executable, "-c", script], stdout=subprocess.PIPE, text=True)
    assert trainer.stdout is not None
    pids = {int(pid) for pid in trainer.stdout.readline().split()}
    assert len(pids) == 2 and all(map(alive, pids))
    if warned:
        for pid in pids:
            os.kill(pid, signal.SIGTERM)
        assert all(map(alive, pids))
    trainer.kill()
    trainer.wait()
    assert seconds_until_gone(pids, 15) < 10


def test_a_worker_stuck_on_its_disk_ends_when_the_trainer_does() -> None:
    """The trainer's own end must neither wait for it for ever nor leave it behind."""
    row = rows_of(np.array([8]), 5, 1000)[0]
    script = (
        "import os, time\n"
        "from tests.data.test_loader import Rows, loader\n"
        "class Stuck(Rows):\n"
        "    def sample(self, row, rng):\n"
        f"        if row == {row}: print(os.getpid(), flush=True); time.sleep(600)\n"
        "        return super().sample(row, rng)\n"
        "for batch in loader(Stuck(1000), workers=1, batch_size=1, micro_batch=1): pass\n"
    )
    trainer = subprocess.Popen([sys.executable, "-c", script], stdout=subprocess.PIPE, text=True)
    assert trainer.stdout is not None
    worker = int(trainer.stdout.readline())  # said by the worker when it gets stuck
    time.sleep(0.5)  # by now, the trainer waits for it
    assert trainer.poll() is None and alive(worker)
    trainer.send_signal(signal.SIGINT)
    assert trainer.wait(timeout=30) != 0
    assert seconds_until_gone({worker}, 5) < 3


@pytest.mark.parametrize(
    ("number", "words"),
    [
        (signal.SIGKILL, "was killed .SIGKILL., most likely for lack of memory"),
        (signal.SIGBUS, "was ended by SIGBUS"),
    ],
)
def test_a_killed_worker_is_an_error_that_names_it(number: signal.Signals, words: str) -> None:
    batches = iter(loader(Rows(10_000), workers=2))
    pids = sorted({int(pid) for _ in range(6) for pid in next(batches)["pid"]})
    os.kill(pids[0], number)
    start = time.monotonic()
    with pytest.raises(DataError, match=rf"^loader process {pids[0]} ({words})"):
        list(itertools.islice(batches, 1000))
    assert time.monotonic() - start < 15
    del batches
    assert seconds_until_gone(set(pids), 10) < 8


def test_what_a_worker_breaks_long_before_it_is_gone_is_told_by_its_death() -> None:
    class Dying:
        pid = 7
        ends = time.monotonic() + 0.6

        @property
        def exitcode(self) -> int | None:
            return -signal.SIGKILL if time.monotonic() > self.ends else None

    class Broken:
        _workers = (Dying(),)

        def __next__(self) -> None:
            raise EOFError

    with pytest.raises(WorkerError, match=r"^loader process 7 was killed"):
        next_batch(Broken())


def test_a_worker_that_dies_does_not_interrupt_what_the_trainer_does() -> None:
    batches = iter(loader(Rows(100), workers=1))
    worker = int(next(batches)["pid"][0])
    os.kill(worker, signal.SIGKILL)
    time.sleep(0.5)  # torch's handler of SIGCHLD would raise a RuntimeError here
    with pytest.raises(DataError, match=f"loader process {worker} was killed"):
        list(itertools.islice(batches, 100))


def test_a_worker_killed_at_any_moment_keeps_no_lock_that_the_trainer_needs() -> None:
    context = worker_context()
    event = context.Event()

    def look() -> None:
        while not event.is_set():
            pass

    for number in range(20):
        worker = context.Process(target=look, daemon=True)
        worker.start()
        time.sleep(0.01 + number * 1e-4)
        worker.kill()
        worker.join()
    assert not event.is_set()  # multiprocessing's own waits here for ever
    worker = context.Process(target=look, daemon=True)
    worker.start()
    event.set()
    worker.join(timeout=20)
    assert worker.exitcode == 0
    assert isinstance(iter(loader(Rows(100), workers=1)._started())._workers_done_event, Flag)


# --- mistakes -------------------------------------------------------------------------------------------------------


def test_batches_that_cannot_be_divided() -> None:
    with pytest.raises(ConfigError, match=r"train.batch_size=12 .* train.micro_batch=5 times 1"):
        loader(Rows(10), micro_batch=5)
    with pytest.raises(ConfigError, match="times 2 processes"):
        loader(Rows(10), micro_batch=4, world_size=2)
    with pytest.raises(DataError, match="no rows"):
        loader(Rows(0))


# --- evaluation -----------------------------------------------------------------------------------------------------


def counted_rows(length: int, micro_batch: int, world_size: int, rows: int | None = None) -> list[int]:
    """Rows that are valid, over all ranks, in the order of the batches."""
    ranks = [
        list(evaluation_batches(Rows(length), micro_batch, rank=rank, world_size=world_size, rows=rows))
        for rank in range(world_size)
    ]
    assert len({tuple(len(batch["row"]) for batch in batches) for batches in ranks}) == 1, "ranks must call alike"
    assert all(len(batch["row"]) <= micro_batch for batch in ranks[0])
    return [
        int(row)
        for batches in zip(*ranks, strict=True)
        for batch in batches
        for row, valid in zip(batch["row"], batch["valid"], strict=True)
        if valid
    ]


@pytest.mark.parametrize("world_size", [1, 2, 3, 7])
@pytest.mark.parametrize("micro_batch", [1, 4, 64])
@pytest.mark.parametrize("length", [1, 5, 25])
def test_evaluation_counts_every_row_once_under_every_layout(length: int, micro_batch: int, world_size: int) -> None:
    assert counted_rows(length, micro_batch, world_size) == list(range(length))


@pytest.mark.parametrize("world_size", [1, 2, 3])
def test_evaluation_of_some_rows_spreads_them_evenly(world_size: int) -> None:
    rows = counted_rows(100, 4, world_size, rows=10)
    assert rows == list(range(0, 100, 10))
    assert counted_rows(100, 4, world_size, rows=1000) == list(range(100))


def test_evaluation_randomness_belongs_to_the_row() -> None:
    one = torch.cat([batch["draw"] for batch in evaluation_batches(Rows(24), 8, rank=0, world_size=1)])
    other = torch.cat([next(evaluation_batches(Rows(24), 8, rank=rank, world_size=3))["draw"] for rank in range(3)])
    assert torch.equal(one, other)
    keys = torch.cat([batch["key"] for batch in evaluation_batches(Rows(24), 8, rank=0, world_size=1)])
    assert len(set(keys.tolist())) == 24


def test_evaluation_replaces_bad_rows_and_needs_some() -> None:
    batch = next(evaluation_batches(Rows(100, bad=frozenset({1})), 8, rank=0, world_size=1))
    assert batch["skipped"].tolist() == [0, 1, 0, 0, 0, 0, 0, 0]
    assert batch["row"][1] != 1
    with pytest.raises(DataError, match="no rows"):
        next(evaluation_batches(Rows(0), 8, rank=0, world_size=1))
