"""A process that dies, hangs or fails ends its run, with its rank in the message; one that takes its time does not."""

from __future__ import annotations

import contextlib
import json
import os
import re
import resource
import selectors
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
import torch.distributed as dist

from dalle_ds.cli import explain
from dalle_ds.config import to_dict
from dalle_ds.errors import CheckpointError, DataError
from dalle_ds.parallel import Mesh, watchman
from dalle_ds.parallel.watch import Watch, _report
from dalle_ds.parallel.watchman import Channel, Chief, Judge, Parent, Report, Settings, sentence
from tests.conftest import ROOT, TINY_DALLE, deepspeed_command
from tests.parallel.watch_worker import PATIENCE

DEAD, FAILED, TOLD, CUT_OFF, SILENT = (
    Report(kind, f"{kind}!") for kind in ("dead", "failed", "told", "cut off", "silent")
)


# --- the verdict


@pytest.mark.parametrize(
    ("report", "seconds"), [(SILENT, 0), (DEAD, 0), (FAILED, 2), (TOLD, 2), (CUT_OFF, 32)], ids=lambda value: str(value)[:20]
)  # fmt: skip
def test_a_verdict_waits_as_long_as_a_better_reason_may_still_come(report: Report, seconds: float) -> None:
    judge = Judge(world_size=3, patience=30, settle=2)
    assert not judge.is_due(1e9)
    judge.hear(1, report, 100)
    assert judge.is_due(100 + seconds)
    assert not judge.is_due(100 + seconds - 0.01)
    assert judge.verdict() == (1, report)


@pytest.mark.parametrize("best", range(5))
def test_what_explains_the_others_is_named(best: int) -> None:
    order = (SILENT, DEAD, FAILED, TOLD, CUT_OFF)
    judge = Judge(world_size=9, patience=30, settle=2)
    for rank, report in reversed(list(enumerate(order))[best:]):
        judge.hear(rank, report, 100 - rank)
    assert judge.verdict() == (best, order[best])


def test_the_earliest_among_equals_is_named() -> None:
    judge = Judge(world_size=9, patience=30, settle=2)
    for rank in (5, 3, 7):
        judge.hear(rank, Report("dead", f"{rank}"), 100)
    assert judge.verdict() == (5, Report("dead", "5"))


def test_a_process_that_was_cut_off_may_turn_out_to_have_died_but_not_the_reverse() -> None:
    judge = Judge(world_size=9, patience=30, settle=2)
    judge.hear(2, CUT_OFF, 100)
    judge.hear(2, DEAD, 101)
    judge.hear(2, CUT_OFF, 102)
    assert judge.is_due(101) and judge.verdict() == (2, DEAD)


def test_what_all_processes_find_is_nobodys_fault_and_told_at_once() -> None:
    judge = Judge(world_size=2, patience=30, settle=2)
    judge.hear(1, Report("failed", "no such file"), 100)
    judge.hear(0, Report("failed", "no such file"), 100.1)
    assert judge.is_due(100.1)
    rank, report = judge.verdict()
    assert rank is None and sentence(None, report) == "error: no such file\n"
    other = Judge(world_size=2, patience=30, settle=2)
    other.hear(1, Report("failed", "no such file"), 100)
    other.hear(0, Report("failed", "the disk is full"), 100.1)
    assert other.is_due(100.1) and other.verdict() == (1, Report("failed", "no such file"))


def wrapped(error: Exception) -> Exception:
    try:
        try:
            raise error
        except Exception as cause:
            raise CheckpointError(f"could not save ({cause})") from cause
    except CheckpointError as found:
        return found


@pytest.mark.parametrize(
    ("error", "kind", "text"),
    [
        (DataError("row 7"), "failed", "row 7"),
        (FileNotFoundError(2, "No such file", "/x"), "failed", "/x cannot be read or written: No such file"),
        (KeyboardInterrupt(), "told", "was interrupted"),
        (KeyError("row 7"), "failed", "KeyError: 'row 7'"),
        (RuntimeError("CUDA out of memory"), "failed", "RuntimeError: CUDA out of memory"),
        (dist.DistBackendError("NCCL error"), "cut off", "torch.distributed.DistBackendError: NCCL error"),
        (wrapped(RuntimeError("[/src/gloo/x.cc:1] reset")), "cut off", "could not save ([/src/gloo/x.cc:1] reset)"),
        (wrapped(RuntimeError("disk full")), "failed", "could not save (disk full)"),
    ],
)  # fmt: skip
def test_an_error_of_communication_is_told_from_others_even_where_it_was_put_in_other_words(
    error: BaseException, kind: str, text: str
) -> None:
    report = _report(error, explain)
    assert (report.kind, report.text) == (kind, text)
    assert bool(report.detail) == (kind != "told" and explain(error) is None)


# --- the chief, with a clock of its own


class Office:
    """A chief, and as many watchmen as a test wants to play."""

    def __init__(self, world_size: int) -> None:
        self.clock = 1000.0
        self.told: list[str] = []
        self.selector = selectors.DefaultSelector()
        ours, theirs = socket.socketpair()
        settings = Settings(0, world_size, os.getppid(), "rank 0", True, beat=5, patience=30, settle=2)
        self.parent = Parent(os.getppid(), 30)
        self.chief = Chief(settings, Channel(theirs), self.selector, self.parent)
        place = Channel(ours).wait()
        assert place is not None
        self.port, self.token = place["port"], place["token"]

    def connect(self) -> Channel:
        connection = socket.create_connection(("127.0.0.1", self.port), timeout=5)
        return Channel(connection)

    def join(self, rank: int, token: str | None = None) -> Channel:
        channel = self.connect()
        channel.send(kind="join", token=token or self.token, rank=rank, who=f"rank {rank} (host h)")
        self.pump(0.0)
        return channel

    def pump(self, patience: float = 0.05) -> None:
        """Let the chief read what there is, until nothing comes for so many seconds."""
        for _ in range(10_000):
            ready = self.selector.select(patience)
            for key, _ in ready:
                key.data()
            if not ready:
                return

    def after(self, seconds: float, *alive: Channel) -> list[str]:
        """What is told once that time has passed, in which some gave signs of life."""
        self.clock += seconds
        for channel in alive:
            channel.send(kind="beat")
        self.pump()
        self.chief.tick(self.clock)
        return self.told


@pytest.fixture
def office(monkeypatch: pytest.MonkeyPatch) -> Iterator[Any]:
    made: list[Office] = []

    def make(world_size: int) -> Office:
        made.append(Office(world_size))
        monkeypatch.setattr(watchman, "time", SimpleNamespace(monotonic=lambda: made[-1].clock))
        monkeypatch.setattr(watchman, "show", made[-1].told.append)
        return made[-1]

    before = resource.getrlimit(resource.RLIMIT_NOFILE)
    yield make
    resource.setrlimit(resource.RLIMIT_NOFILE, before)


def outcome(channel: Channel) -> str:
    """The first message to a watchman that is no sign of life."""
    while True:
        messages = channel.receive()
        for message in messages or ({"kind": "closed"},):
            if message["kind"] != "beat":
                return str(message["kind"])


def test_silence_is_told_after_patience_and_a_shorter_one_where_another_process_died_of_it(office: Any) -> None:
    at = office(3)
    first, second, third = (at.join(rank) for rank in range(3))
    assert at.after(29, first, second, third) == []
    assert at.after(29, first, third) == []
    (line,) = at.after(2, first, third)
    assert line.startswith("error: rank 1 (host h) has died, or its host cannot be reached: no sign of life for 31 s;")
    assert [outcome(channel) for channel in (first, second, third)] == ["verdict"] * 3

    at = office(3)
    first, second, third = (at.join(rank) for rank in range(3))
    assert at.after(13, first, third) == []
    third.send(kind="dead", text="has died", detail="")
    (line,) = at.after(0, first)
    assert line.startswith("error: rank 1 (host h) has died, or its host cannot be reached: no sign of life for 13 s;")


def test_a_death_is_told_at_once_and_names_the_dead_where_no_one_is_silent(office: Any) -> None:
    at = office(3)
    first, second, third = (at.join(rank) for rank in range(3))
    assert at.after(12, first, third) == []
    third.send(kind="dead", text="has died", detail="")
    (line,) = at.after(0, first)
    assert line.startswith("error: rank 2 (host h) has died;")
    assert outcome(second) == "verdict"


def test_a_rank_that_never_comes_is_missed(office: Any) -> None:
    at = office(3)
    assert at.after(1000) == []  # no one is late before anyone has come
    first = at.join(0)
    second = at.join(2)
    assert at.after(29, first, second) == []
    (line,) = at.after(2, first, second)
    assert line.startswith("error: rank 1 has died at the start, or cannot connect: no sign of life for 31 s;")


def test_silences_are_counted_afresh_after_a_suspension(office: Any) -> None:
    at = office(2)
    first = at.join(0)
    at.clock += 3600
    at.chief.forgive(at.clock)
    assert at.after(29) == []
    assert len(at.after(2, first)) == 1


def is_closed(channel: Channel) -> bool:
    """Whether the chief has hung up."""
    channel.connection.settimeout(0.5)
    try:
        return channel.connection.recv(1) == b""
    except TimeoutError:
        return False
    except OSError:
        return True


def test_strangers_are_shown_the_door(office: Any) -> None:
    at = office(3)
    first, second = at.join(0), at.join(1)
    strangers = [at.join(2, token="guess"), at.join(1), at.join(3), at.connect(), at.connect(), at.connect()]
    nonsense = (b"GET / HTTP/1.1\r\n\r\n", b'["join"]\n', b"x" * (2 << 20))
    for stranger, words in zip(strangers[3:], nonsense, strict=True):
        with contextlib.suppress(OSError):  # the last one is cut off in the midst of it
            stranger.connection.sendall(words)
    at.pump()
    assert [is_closed(stranger) for stranger in strangers] == [True] * 6
    third = at.join(2)
    assert at.after(1, first, second, third) == []
    assert not any(map(is_closed, (first, second, third)))


def test_the_end_of_rank_0_is_the_end_of_the_watch_and_no_ones_death(office: Any) -> None:
    at = office(3)
    first, second, third = (at.join(rank) for rank in range(3))
    second.send(kind="bye")
    at.pump()
    assert outcome(second) == "end"
    second.connection.close()
    assert at.after(1, first, third) == []
    assert at.after(1000, first, third) == []
    first.send(kind="bye")
    assert at.after(0) == []
    assert outcome(third) == "end"
    assert not at.chief.done
    for channel in (first, third):
        channel.connection.close()
    at.pump()
    assert at.chief.done


@pytest.mark.parametrize(
    ("last", "expected"), [({"kind": "bye"}, "end"), ({"kind": "dead", "text": "has died"}, "verdict")]
)
def test_who_is_slow_to_join_still_learns_how_it_ended(office: Any, last: dict[str, str], expected: str) -> None:
    at = office(2)
    first = at.join(0)
    first.send(**last)
    at.after(0)
    assert outcome(first) == expected
    first.connection.close()
    at.after(4)
    assert not at.chief.done
    second = at.join(1)
    at.pump()
    assert outcome(second) == expected
    second.connection.close()
    at.pump()
    assert at.chief.done


def test_there_may_be_more_ranks_than_open_files_allow_by_default(office: Any) -> None:
    _, most = resource.getrlimit(resource.RLIMIT_NOFILE)
    if most < 2048:
        pytest.skip(f"{most} open files are allowed at most")
    resource.setrlimit(resource.RLIMIT_NOFILE, (256, most))
    at = office(400)
    channels = [at.join(rank) for rank in range(400)]
    at.pump()
    channels[300].connection.close()
    (line,) = at.after(0)
    assert line.startswith(
        "error: rank 300 (host h) has died, or its host cannot be reached: the connection to it broke;"
    )
    assert {outcome(channel) for rank, channel in enumerate(channels) if rank != 300} == {"verdict"}


def test_a_signal_explains_a_death_soon_after_it_and_no_later_one(monkeypatch: pytest.MonkeyPatch) -> None:
    clock = SimpleNamespace(now=1000.0)
    monkeypatch.setattr(watchman, "time", SimpleNamespace(monotonic=lambda: clock.now))
    reports = []
    for seconds in (59.0, 61.0):
        parent = Parent(os.getppid(), 30)
        parent.is_told()
        clock.now += seconds
        parent.hangs_up(clock.now - 1)
        reports.append(parent.check(clock.now))
    assert [report.kind for report in reports if report is not None] == ["told", "dead"]


def test_an_orphan_and_one_that_was_hung_up_on_each_know_of_the_death() -> None:
    orphan, hung_up, well = Parent(os.getpid(), 30), Parent(os.getppid(), 30), Parent(os.getppid(), 30)
    assert orphan.check(100) is None  # a signal may still explain it
    hung_up.hangs_up(100)
    assert hung_up.check(100) is None
    for parent in (orphan, hung_up):
        report = parent.check(100.2)
        assert report is not None and report.kind == "dead"
    assert well.check(1000) is None


def test_a_watchman_whose_process_closes_the_connection_knows_that_it_is_ending() -> None:
    ours, theirs = socket.socketpair()
    selector = selectors.DefaultSelector()
    settings = Settings(1, 2, os.getppid(), "rank 1", True, beat=5, patience=30, settle=2)
    watching = watchman.Watchman(settings, Channel(theirs), selector)
    assert not watching.parent.ending
    ours.close()
    for key, _ in selector.select(1):
        key.data()
    assert watching.parent.ending and not watching.parent.gone


@pytest.mark.parametrize(("signalled", "ranks", "lines"), [(True, [1], 0), (False, [1, 0, 2], 0), (False, [1], 1)])
def test_that_all_of_a_run_is_told_to_end_needs_no_line(
    office: Any, signalled: bool, ranks: list[int], lines: int
) -> None:
    at = office(3)
    members = [at.join(rank) for rank in range(3)]
    if signalled:
        at.parent.is_told()
    for rank in ranks:
        members[rank].send(kind="told", text="was interrupted", detail="")
        at.pump()
    assert at.told == []
    assert len(at.after(3, *members)) == lines
    assert [outcome(member) for member in members] == ["verdict"] * 3


def test_a_single_process_is_not_watched_and_its_errors_pass() -> None:
    with pytest.raises(DataError), Watch(Mesh(0, 1, torch.device("cpu")), explain):
        raise DataError("row 7")


# --- real processes


@pytest.fixture(scope="module")
def results(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    """What `watch_worker.py` found, by job."""
    folder = tmp_path_factory.mktemp("watch")
    done = subprocess.run(
        [sys.executable, "-m", "tests.parallel.watch_worker", str(folder)],
        capture_output=True,
        text=True,
        cwd=ROOT,
        timeout=300,
    )
    assert done.returncode == 0, done.stdout[-4000:] + done.stderr[-4000:]
    found: dict[str, Any] = json.loads((folder / "results.json").read_text())
    return found


AT_MOST = 20
"""Seconds to the end of all processes. With the patience of these jobs it is 10 at most, but the machine may be busy."""

RESUME = r"; all processes end, and the same command goes on from the last complete checkpoint"
KILLED = r"has died: killed or crashed \(dmesg on its host tells whether memory ran out\)" + RESUME
LOST = r"has died, or its host cannot be reached: the connection to it broke" + RESUME
SILENCE = r"has died, or its host cannot be reached: no sign of life for \d s" + RESUME
STOPPED = rf"has been stopped by a signal \(SIGSTOP\) for {PATIENCE:.0f} s" + RESUME


@pytest.mark.launch
@pytest.mark.parametrize(
    ("job", "statuses", "teller", "line"),
    [
        ("killed-1-of-2", [1, -9], 0, f"rank 1 WHO {KILLED}"),
        ("killed-2-of-4", [1, 1, -9, 1], 0, f"rank 2 WHO {KILLED}"),
        ("killed-0-of-2", [-9, 1], 0, f"rank 0 WHO {KILLED}"),
        ("killed-with-watchman", [1, -9], 0, f"rank 1 WHO {LOST}"),
        ("killed-with-chief", [-9, 1], 1, f"rank 0 WHO {LOST}"),
        ("killed-with-child", [1, -9], 0, f"rank 1 WHO {KILLED}"),
        ("killed-while-stuck", [-9, -9], 0, f"rank 1 WHO {KILLED}"),
        ("gone-before", [1, 3], 0, rf"rank 1 has died at the start, or cannot connect: no sign of life for \d s{RESUME}"),
        ("stopped", [1, -9], 0, f"rank 1 WHO {STOPPED}"),
        ("silent", [1, -9], 0, f"rank 1 WHO {SILENCE}"),
        ("silent-chief", [-9, 1], 1, f"rank 0 WHO {SILENCE}"),
        ("data-error", [1, 1], 0, "rank 1 WHO failed: row 7 is broken: mend it"),
        ("data-error-everywhere", [1, 1], 0, "row 7 is broken: mend it"),
        ("interrupted-alone", [1, 1], 0, f"rank 1 WHO was interrupted{RESUME}"),
        ("terminated", [1, -15], 0, f"rank 1 WHO {KILLED}"),
        ("watched-twice", [1, 1], 0, "rank 1 WHO failed: in the second context"),
    ],
)  # fmt: skip
def test_one_line_names_the_rank_and_all_processes_end(
    results: dict[str, Any], job: str, statuses: list[int], teller: int, line: str
) -> None:
    found = results[job]
    pattern = "error: " + line.replace("WHO", r"\(host \S+, pid \d+\)") + "\n"
    assert re.fullmatch(pattern, found["outputs"][teller]), found["outputs"][teller]
    assert [output for rank, output in enumerate(found["outputs"]) if rank != teller] == [""] * (len(statuses) - 1)
    assert found["statuses"] == statuses
    assert found["seconds"] is not None and found["seconds"] < AT_MOST
    assert found["watchmen_seconds"] is not None and found["watchmen_seconds"] < AT_MOST


@pytest.mark.launch
def test_a_watchman_that_dies_takes_its_process_along(results: dict[str, Any]) -> None:
    found = results["watchman-killed"]
    assert found["statuses"] == [1, 1]
    assert re.fullmatch(rf"error: rank 1 \(.*\) {LOST}\n", found["outputs"][0])
    assert re.fullmatch(
        r"error: the process that watches rank 1 \(.*\) has died, and so this one ends\n", found["outputs"][1]
    )


@pytest.mark.launch
def test_an_error_of_no_one_in_particular_is_shown_with_its_traceback(results: dict[str, Any]) -> None:
    found = results["unexpected"]
    assert found["statuses"] == [1, 1] and found["outputs"][1] == ""
    assert re.fullmatch(
        r"Traceback \(most recent call last\):\n[^$]*KeyError: 'row 7'\nerror: rank 1 \(.*\) failed: KeyError: 'row 7'\n",
        found["outputs"][0],
    )


@pytest.mark.launch
def test_a_broken_collective_that_no_death_explains_is_told_after_patience(results: dict[str, Any]) -> None:
    found = results["cut-off"]
    assert found["statuses"] == [1, 1]
    assert "Traceback" in found["outputs"][0] and found["outputs"][1] == ""
    assert re.search(r"\nerror: rank 0 \(.*\) failed: RuntimeError: .*/gloo/.*\n$", found["outputs"][0])
    assert PATIENCE - 1 < found["seconds"] < AT_MOST


@pytest.mark.launch
@pytest.mark.parametrize(
    "job", ["busy", "first-ends-last", "first-ends-first", "suspended", "stopped-for-a-while", "slow-to-leave"]
)
def test_no_alarm_where_a_process_only_takes_its_time(results: dict[str, Any], job: str) -> None:
    found = results[job]
    assert found["statuses"] == [0, 0]
    assert found["outputs"] == ["", ""]
    assert found["watchmen_seconds"] is not None


@pytest.mark.launch
@pytest.mark.parametrize(("job", "status"), [("cancelled", -15), ("interrupted", 1)])
def test_a_run_that_is_ended_as_a_whole_says_nothing(results: dict[str, Any], job: str, status: int) -> None:
    found = results[job]
    assert found["statuses"] == [status] * 2 and found["outputs"] == ["", ""]
    assert found["watchmen_seconds"] < AT_MOST


@pytest.mark.launch
def test_an_error_after_the_end_of_rank_0_is_the_process_own(results: dict[str, Any]) -> None:
    found = results["fails-after-the-end"]
    assert found["statuses"] == [0, 1]
    assert found["outputs"] == ["", "error on rank 1: too late\n"]


@pytest.mark.launch
def test_a_training_run_ends_when_one_of_its_processes_is_killed(
    tmp_path: Path, data: Path, dvae_export: Path, tokenizer_file: Path
) -> None:
    """Through the launcher and its script, with data loaders' processes."""
    run = tmp_path / "run"
    options = {"data": data, "dvae": dvae_export, "tokenizer": tokenizer_file, "run_dir": run, "steps": 100_000}
    options |= {f"model.{name}": value for name, value in to_dict(TINY_DALLE).items() if isinstance(value, int)}
    options |= {"preset": "toy", "deepspeed_config": ROOT / "ds_configs" / "zero1_fp32.json", "train.batch_size": 8}
    options |= {"loader.workers": 1, "report.log_every": 1}
    command = [*deepspeed_command(2), str(ROOT / "launchers" / "train_transformer.py")]
    command += [word for name, value in options.items() for word in (f"--{name}", str(value))]
    log = tmp_path / "log"
    with log.open("w") as output:
        launcher = subprocess.Popen(
            command, stdout=output, stderr=output, cwd=tmp_path, env={**os.environ, "PYTHONPATH": str(ROOT)}
        )
    metrics = run / "metrics.jsonl"
    deadline = time.monotonic() + 300
    while not (metrics.exists() and metrics.read_text()) and launcher.poll() is None and time.monotonic() < deadline:
        time.sleep(0.2)
    assert launcher.poll() is None and metrics.read_text(), log.read_text()
    ranks = [int(pid) for pid in re.findall(r"process (\d+) spawned", log.read_text())]
    os.kill(ranks[1], signal.SIGKILL)
    assert launcher.wait(timeout=60) != 0
    assert re.search(rf"^error: rank 1 \(host \S+, pid {ranks[1]}\) {KILLED}$", log.read_text(), re.MULTILINE)
    assert "Traceback" not in log.read_text()
    assert not any(Path(f"/proc/{pid}").exists() for pid in ranks)
