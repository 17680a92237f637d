"""Who is to blame and what the user is told: watchmen, stacks and time-outs without the processes around them."""

from __future__ import annotations

import contextlib
import faulthandler
import os
import re
import resource
import selectors
import socket
import tempfile
import threading
import time
from collections.abc import Iterator
from dataclasses import asdict, replace
from types import SimpleNamespace
from typing import Any

import pytest
import torch.distributed as dist

from dalle_ds.cli import explain
from dalle_ds.errors import EXIT_REQUEUE, CheckpointError, DataError
from dalle_ds.parallel.watch import _report
from dalle_ds.parallel.watchmen import chief
from dalle_ds.parallel.watchmen import parent as parent_module
from dalle_ds.parallel.watchmen.channel import Channel, Settings
from dalle_ds.parallel.watchmen.chief import Chief
from dalle_ds.parallel.watchmen.parent import Parent
from dalle_ds.parallel.watchmen.progress import Place, Progress
from dalle_ds.parallel.watchmen.stacks import innermost
from dalle_ds.parallel.watchmen.verdict import PRECEDENCE, REQUEUE, Judge, Report, behind, describe, sentence
from dalle_ds.parallel.watchmen.watchman import Watchman

SILENT, DEAD, FAILED, TOLD, HUNG, TIMED_OUT, CUT_OFF = (Report(kind, f"{kind}!") for kind in PRECEDENCE)


# --- the verdict


@pytest.mark.parametrize(
    ("report", "seconds"),
    [(SILENT, 0), (DEAD, 0), (HUNG, 0), (FAILED, 2), (TOLD, 2), (TIMED_OUT, 2), (CUT_OFF, 32)],
    ids=lambda value: str(value)[:20],
)
def test_a_verdict_waits_as_long_as_a_better_reason_may_still_come(report: Report, seconds: float) -> None:
    judge = Judge(world_size=3, patience=30, settle=2)
    assert not judge.is_due(1e9)
    judge.hear(1, report, 100)
    assert judge.is_due(100 + seconds)
    assert not judge.is_due(100 + seconds - 0.01)
    assert judge.verdict() == (1, report)


@pytest.mark.parametrize("best", range(7))
def test_what_explains_the_others_is_named(best: int) -> None:
    order = (SILENT, DEAD, FAILED, TOLD, HUNG, TIMED_OUT, CUT_OFF)
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


NO_END = "an operation of several processes did not end within 1.5 min"


@pytest.mark.parametrize(
    ("error", "kind", "text"),
    [
        (DataError("row 7"), "failed", "row 7"),
        (FileNotFoundError(2, "No such file", "/x"), "failed", "/x cannot be read or written: No such file"),
        (KeyboardInterrupt(), "told", "was interrupted"),
        (SystemExit(3), "failed", "it ended itself with status 3"),
        (KeyError("row 7"), "failed", "KeyError: 'row 7'"),
        (RuntimeError("CUDA out of memory"), "failed", "RuntimeError: CUDA out of memory"),
        (dist.DistBackendError("NCCL error"), "cut off", "torch.distributed.DistBackendError: NCCL error"),
        (wrapped(RuntimeError("[/src/gloo/x.cc:1] reset")), "cut off", "could not save ([/src/gloo/x.cc:1] reset)"),
        (wrapped(RuntimeError("timeout caused pair closure")), "cut off", "could not save (timeout caused pair closure)"),
        (RuntimeError("[/gloo/x.cc:1] Timed out waiting 90000ms"), "timed out", NO_END),
        (wrapped(RuntimeError("disk full")), "failed", "could not save (disk full)"),
    ],
)  # fmt: skip
def test_an_error_of_communication_is_told_from_others_even_where_it_was_put_in_other_words(
    error: BaseException, kind: str, text: str
) -> None:
    report = _report(error, explain)
    assert (report.kind, report.text) == (kind, text)
    plain = type(error) in (KeyError, RuntimeError, dist.DistBackendError)
    assert bool(report.detail) == (plain and kind != "timed out")


# --- the chief, with a clock of its own


def settings_of(rank: int, world_size: int, **changes: Any) -> Settings:
    """A watchman's settings; its training process is whatever started this one."""
    usual = Settings(
        rank=rank,
        world_size=world_size,
        pid=os.getppid(),
        host="h",
        who=f"rank {rank} (host h)",
        stops=True,
        prints=True,
        progress=-1,
        stacks=-1,
        beat=5,
        patience=30,
        settle=2,
        hang=1200,
        stalled=675,
        heartbeat=10,
        logs="run/logs",
    )
    return replace(usual, **changes)


class Office:
    """A chief, and as many watchmen as a test wants to play."""

    def __init__(self, world_size: int) -> None:
        self.clock = 1000.0
        self.told: list[str] = []
        self.selector = selectors.DefaultSelector()
        ours, theirs = socket.socketpair()
        self.parent = Parent(os.getppid(), 30)
        self.chief = Chief(settings_of(0, world_size), Channel(theirs), self.selector, self.parent)
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
        monkeypatch.setattr(chief, "time", SimpleNamespace(monotonic=lambda: made[-1].clock))
        monkeypatch.setattr(chief, "show", made[-1].told.append)
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
    monkeypatch.setattr(parent_module, "time", SimpleNamespace(monotonic=lambda: clock.now))
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
    with tempfile.TemporaryFile() as shared:
        shared.truncate(Progress.SIZE)
        settings = settings_of(1, 2, progress=shared.fileno(), stacks=shared.fileno(), logs=None)
        watching = Watchman(settings, Channel(theirs), selector)
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


# --- who is behind


def place(step: int, phase: str = "step", since: float = 100.0, **more: Any) -> Place:
    return Place(step, phase, since, begun=True, **more)


@pytest.mark.parametrize(
    ("places", "names"),
    [
        ([place(7), place(6, since=90), place(7)], "1"),  # fewer steps, though its pulse is younger
        ([place(7, waits=True), place(7), place(7, waits=True)], "1"),  # the others wait for it
        (
            [place(7, since=100), place(7, since=160), place(7, since=101)],
            "1",
        ),  # it came to no pulse that the others gave
        ([place(6, waits=True), place(7), place(7, waits=True)], "0"),
        ([place(7, since=100.0), place(7, since=100.4), place(7, since=100.9)], "012"),
        ([place(7, waits=True)] * 3, "012"),
        ([Place(since=120), place(1), place(1)], "0"),
    ],
)
def test_who_holds_up_the_others(places: list[Place], names: str) -> None:
    assert behind({str(rank): place for rank, place in enumerate(places)}) == list(names)


def test_places_in_words() -> None:
    stuck = place(6, "waiting for data", 1260, where="in read, called at shards.py:9 (rows)")
    ahead = place(6, "step", 1250, where="in all_reduce, called at mesh.py:212 (sum)", waits=True)
    assert (
        describe({"rank 0": stuck}) == "rank 0 is at step 6 (waiting for data), in read, called at shards.py:9 (rows)"
    )
    assert describe({"rank 0": ahead, "rank 1": stuck, "rank 2": ahead}) == (
        "rank 1 is behind, at step 6 (waiting for data) for 21 min, in read, called at shards.py:9 (rows), while the others "
        "are at step 6 (step), in all_reduce, called at mesh.py:212 (sum)"
    )
    many = {f"rank {rank}": stuck if rank < 6 else ahead if rank < 9 else place(9) for rank in range(10)}
    assert describe(many).startswith(
        "rank 0, rank 1, rank 2, rank 3 and 2 more are behind, at step 6 (waiting for data)"
    )
    assert describe(many).endswith("while most others are at step 6 (step), in all_reduce, called at mesh.py:212 (sum)")
    assert describe({"rank 0": ahead, "rank 1": ahead}) == "every process is at step 6 (step)"
    assert describe({"rank 0": place(6, "a"), "rank 1": place(6, "b"), "rank 2": place(6, "b")}) == (
        "no process is clearly behind: 2 at step 6 (b), 1 at step 6 (a)"
    )
    assert describe({"rank 0": Place()}) == "rank 0 is before its first pulse"


def test_only_an_error_of_a_process_needs_a_person() -> None:
    statuses = {kind: Report(kind, "").status for kind in PRECEDENCE}
    assert statuses.pop("failed") == 1
    assert set(statuses.values()) == {REQUEUE} == {EXIT_REQUEUE}


@pytest.mark.parametrize("kind", ["hung", "timed out", "dead"])
def test_after_a_hang_the_chief_has_all_stacks_written_before_its_verdict(office: Any, kind: str) -> None:
    at = office(3)
    members = [at.join(rank) for rank in range(3)]
    for member in members:
        member.send(kind="beat", place=asdict(place(7, since=800)))
    members[2].send(kind=kind, text="words", detail="")
    at.after(0)
    assert at.after(2.5) == []
    assert [outcome(member) for member in members] == ["dump"] * 3
    members[0].send(kind="stacks", place=asdict(place(7, since=803, waits=True)))
    assert at.after(0) == []
    members[1].send(kind="stacks", place=asdict(place(7, "saving", since=804, where="in read")))
    members[2].send(kind="stacks", place=asdict(place(7, since=805, waits=True)))
    (line,) = at.after(0)
    begin = {"hung": "no progress for 13 min: ", "timed out": "rank 2 (host h) waited in vain: words; "}
    assert line.startswith(
        f"error: {begin.get(kind, 'rank 2 (host h) words; ')}rank 1 (host h) is behind, at step 7 (saving)"
    )
    assert "; all stacks are in run/logs/stacks; the run ends," in line
    assert [outcome(member) for member in members] == ["verdict"] * 3


def test_a_verdict_waits_for_stacks_no_longer_than_it_must(office: Any) -> None:
    at = office(2)
    first, second = at.join(0), at.join(1)
    second.send(kind="beat", place=asdict(place(7, since=1201)))
    second.send(kind="hung", text="words", detail="")
    assert at.after(0) == []
    assert at.after(2.9, first, second) == []
    assert len(at.after(0.2)) == 1


# --- what a training process shows of itself


def test_a_pulse_is_seen_at_once_and_whole() -> None:
    with tempfile.TemporaryFile() as shared:
        shared.truncate(Progress.SIZE)
        ours, theirs = Progress(shared.fileno()), Progress(shared.fileno())
        assert not theirs.read(time.monotonic()).begun
        for step, phase in ((0, "starting"), (123_456_789, "waiting for data"), (2, "größte"), (3, "x" * 100)):
            ours.pulse(step, phase, allowed=60.0 * step)
            seen = theirs.read(time.monotonic() + 5)
            assert (seen.step, seen.phase, seen.allowed, seen.begun) == (step, phase[:32], 60.0 * step, True)
            assert 5 <= seen.since < 6


def test_half_a_pulse_is_not_read() -> None:
    """Packing clears the memory first; a writer that is held up in between must not look like one that hangs for ages."""
    with tempfile.TemporaryFile() as shared:
        shared.truncate(Progress.SIZE)
        ours, theirs = Progress(shared.fileno()), Progress(shared.fileno())
        ours.pulse(5, "step")
        before = theirs.read(time.monotonic())
        ours._memory[: Progress._LAYOUT.size] = bytes(Progress._LAYOUT.size)
        now = theirs.read(time.monotonic())
        assert (now.step, now.phase, now.begun) == (5, "step", True) and now.since < before.since + 1


@pytest.mark.alone
def test_a_pulse_that_is_being_written_is_not_taken_for_an_old_one() -> None:
    with tempfile.TemporaryFile() as shared:
        shared.truncate(Progress.SIZE)
        ours, theirs = Progress(shared.fileno()), Progress(shared.fileno())
        ours.pulse(0, "step")
        writer = os.fork()
        if writer == 0:
            until = time.monotonic() + 1.5
            while time.monotonic() < until:
                for step in range(1000):
                    ours.pulse(step, "step" if step % 2 else "waiting for data")
            os._exit(0)
        reads = 0
        while os.waitpid(writer, os.WNOHANG) == (0, 0):
            now = time.monotonic()
            place = theirs.read(now)
            reads += 1
            assert place.since < 1 and place.phase in ("step", "waiting for data"), place
        assert reads > 1000


def stacks_of(*frames: tuple[str, str]) -> str:
    lines = "".join(f'  File "{file}", line 9 in {function}\n' for file, function in frames)
    other = 'Thread 0x00007f (most recent call first):\n  File "/x/other.py", line 1 in run\n\n'
    return f"{other}Current thread 0x00007e (most recent call first):\n{lines}"


C10D = "/venv/lib/python3.11/site-packages/torch/distributed/distributed_c10d.py"


@pytest.mark.parametrize(
    ("stacks", "expected"),
    [
        (stacks_of(("/x/loop.py", "_update"), ("/x/trainer.py", "fit")), ("in loop.py:9 (_update)", False)),
        (stacks_of((C10D, "all_reduce"), ("/x/mesh.py", "sum")), ("in all_reduce, called at mesh.py:9 (sum)", True)),
        (stacks_of(("/usr/lib/python3.11/queue.py", "get"), ("/x/a.py", "f")), ("in get, called at a.py:9 (f)", False)),
        (stacks_of(("/usr/lib/python3.11/threading.py", "wait")), ("in threading.py:9 (wait)", True)),
        ("Thread 0x00007e (most recent call first):\n  <no Python frame>\n", ("outside Python", False)),
        ("no answer: the process is waiting for a disk\n", ("no answer: the process is waiting for a disk", False)),
    ],
)  # fmt: skip
def test_where_the_main_thread_is(stacks: str, expected: tuple[str, bool]) -> None:
    assert innermost(stacks) == expected


def test_the_stacks_that_faulthandler_writes_are_understood() -> None:
    """Of this very process, whose main thread is in a call of ours and another one in a lock."""
    lock = threading.Lock()
    with lock, tempfile.TemporaryFile() as file:
        other = threading.Thread(target=lambda: lock.acquire() and lock.release())
        other.start()
        faulthandler.dump_traceback(file, all_threads=True)
        file.seek(0)
        stacks = file.read().decode()
    other.join()
    where, waits = innermost(stacks)
    assert re.fullmatch(
        r"in test_watch_verdict.py:\d+ \(test_the_stacks_that_faulthandler_writes_are_understood\)", where
    )
    assert not waits
