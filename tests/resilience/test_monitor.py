"""Failure classes, root cause and log line: coordinator, monitor and their helpers without the processes around them."""

from __future__ import annotations

import contextlib
import faulthandler
import os
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
import torch
import torch.distributed as dist

from dalle_ds.cli import explain
from dalle_ds.errors import EXIT_REQUEUE, CheckpointError, DataError
from dalle_ds.parallel import Mesh
from dalle_ds.resilience import coordinator, processes
from dalle_ds.resilience.coordinator import Coordinator, FailureClassifier, behind
from dalle_ds.resilience.messages import KINDS, Channel, Failure, Position, Settings, log_line
from dalle_ds.resilience.monitor import MonitorProcess, raise_file_limit
from dalle_ds.resilience.processes import Clock, Progress, TrainingProcess, main_thread
from dalle_ds.resilience.watch import Watch, classify

FAILURES = {kind: Failure(kind, f"{kind}!") for kind in KINDS}


# --- the root cause


@pytest.mark.parametrize("kind", KINDS)
def test_the_root_cause_waits_as_long_as_a_better_explanation_may_still_come(kind: str) -> None:
    seconds = {"error": 2, "interrupted": 2, "disconnected": 32}.get(kind, 0)
    classifier = FailureClassifier(world_size=3, timeout=30)
    assert not classifier.is_due(1e9)
    classifier.add(1, FAILURES[kind], 100)
    assert classifier.is_due(100 + seconds)
    assert not classifier.is_due(100 + seconds - 0.01)
    assert classifier.root_cause() == (1, FAILURES[kind])


@pytest.mark.parametrize("best", range(len(KINDS)))
def test_what_explains_the_others_is_the_root_cause(best: int) -> None:
    classifier = FailureClassifier(world_size=9, timeout=30)
    for rank, failure in reversed(list(enumerate(FAILURES.values()))[best:]):
        classifier.add(rank, failure, 100 - rank)
    assert classifier.root_cause() == (best, FAILURES[KINDS[best]])


def test_of_one_class_the_earliest_counts_and_of_one_rank_the_best_explanation() -> None:
    classifier = FailureClassifier(world_size=9, timeout=30)
    for rank in (5, 3, 7):
        classifier.add(rank, Failure("error", f"{rank}"), 100)
    assert classifier.root_cause() == (5, Failure("error", "5"))
    classifier.add(3, FAILURES["crash"], 101)
    classifier.add(3, FAILURES["disconnected"], 102)
    assert classifier.is_due(101) and classifier.root_cause() == (3, FAILURES["crash"])


def test_what_all_ranks_report_is_of_no_rank_and_due_at_once() -> None:
    for texts, rank in ((("no such file", "no such file"), None), (("no such file", "the disk is full"), 1)):
        classifier = FailureClassifier(world_size=2, timeout=30)
        classifier.add(1, Failure("error", texts[0]), 100)
        classifier.add(0, Failure("error", texts[1]), 100.1)
        assert classifier.is_due(100.1)
        assert classifier.root_cause() == (rank, Failure("error", "no such file"))


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
        (DataError("row 7"), "error", "row 7"),
        (FileNotFoundError(2, "No such file", "/x"), "error", "/x cannot be read or written: No such file"),
        (KeyboardInterrupt(), "interrupted", "KeyboardInterrupt"),
        (SystemExit(3), "error", "the process ended itself with status 3"),
        (KeyError("row 7"), "error", "KeyError: 'row 7'"),
        (RuntimeError("CUDA out of memory"), "error", "RuntimeError: CUDA out of memory"),
        (TimeoutError("timed out"), "error", "TimeoutError: timed out"),
        (dist.DistBackendError("NCCL error"), "disconnected", "torch.distributed.DistBackendError: NCCL error"),
        (dist.DistStoreError("wait timeout"), "disconnected", "torch.distributed.DistStoreError: wait timeout"),
        (wrapped(RuntimeError("[/gloo/x.cc:1] reset")), "disconnected", "could not save ([/gloo/x.cc:1] reset)"),
        (wrapped(RuntimeError("pair closure")), "disconnected", "could not save (pair closure)"),
        (wrapped(RuntimeError("disk full")), "error", "could not save (disk full)"),
    ],
)
def test_a_collective_that_fails_is_told_from_other_errors_even_in_other_words(
    error: BaseException, kind: str, text: str
) -> None:
    failure = classify(error, explain)
    assert (failure.kind, failure.text) == (kind, text)
    assert bool(failure.traceback) == (explain(error) is None and not isinstance(error, KeyboardInterrupt | SystemExit))


def test_only_an_error_needs_a_person() -> None:
    statuses = {kind: failure.status for kind, failure in FAILURES.items()}
    assert statuses.pop("error") == 1
    assert set(statuses.values()) == {EXIT_REQUEUE}


def test_a_line_has_class_rank_host_and_last_step() -> None:
    at = Position(120, "waiting for data", begun=True)
    assert log_line("crash", [3], ["n1"], at, 75, "killed").startswith(
        'dalle_ds monitor: crash rank=3 host=n1 step=120 phase="waiting for data" exit=75: killed; '
    )
    assert log_line("error", ["all"], ["n1", "n2", "n1"], Position(), 1, "row 7") == (
        "dalle_ds monitor: error rank=all host=n1,n2 step=none exit=1: row 7\n"
    )
    assert " rank=0,1,2,3,4,5,6,7,… host=unknown " in log_line("lost", range(20), [], at, 75, "")


# --- the coordinator, with a clock of its own


def settings_of(rank: int, world_size: int, **changes: Any) -> Settings:
    """A monitor's settings; its training process is whatever started this one."""
    usual = Settings(
        rank=rank,
        world_size=world_size,
        pid=os.getppid(),
        can_stop=True,
        progress=-1,
        stacks=-1,
        channel=-1,
        coordinator=-1,
        listener=None,
        token="secret",
        timeout=30,
        hang=1200,
        stalled=675,
        heartbeat=10,
        logs="run/logs",
    )
    return replace(usual, **changes)


def clock_at(now: float) -> Clock:
    clock = Clock()
    clock.now = now
    return clock


class Office:
    """A coordinator, and as many monitors as a test wants to play."""

    def __init__(self, world_size: int) -> None:
        self.told: list[str] = []
        self.selector = selectors.DefaultSelector()
        self.clock = clock_at(1000.0)
        self.process = TrainingProcess(os.getppid(), 30, self.clock)
        self.listener = socket.create_server(("127.0.0.1", 0), backlog=world_size)
        self.coordinator = Coordinator(settings_of(0, world_size), self.listener, self.selector, self.process)

    def connect(self) -> Channel:
        return Channel(socket.create_connection(self.listener.getsockname(), timeout=5))

    def join(self, rank: int, token: str = "secret") -> Channel:
        channel = self.connect()
        channel.send(kind="join", token=token, rank=rank, host=f"n{rank}")
        self.pump(0.0)
        return channel

    def pump(self, timeout: float = 0.05) -> None:
        """Let the coordinator read what there is, until nothing comes for so many seconds."""
        for _ in range(10_000):
            ready = self.selector.select(timeout)
            for key, _ in ready:
                key.data()
            if not ready:
                return

    def after(self, seconds: float, *alive: Channel) -> list[str]:
        """What is told once that time has passed, in which some gave signs of life."""
        self.clock.now += seconds
        for channel in alive:
            tell(channel, "beat", Position())
        self.pump()
        self.coordinator.tick()
        return self.told


def tell(channel: Channel, kind: str, position: Position, **message: Any) -> None:
    """What a monitor says."""
    channel.send(kind=kind, position=asdict(position), **message)


@pytest.fixture
def office(monkeypatch: pytest.MonkeyPatch) -> Iterator[Any]:
    made: list[Office] = []

    def make(world_size: int) -> Office:
        made.append(Office(world_size))
        monkeypatch.setattr(coordinator, "show", made[-1].told.append)
        return made[-1]

    before = resource.getrlimit(resource.RLIMIT_NOFILE)
    yield make
    for each in made:
        each.listener.close()
    resource.setrlimit(resource.RLIMIT_NOFILE, before)


def outcome(channel: Channel) -> str:
    """The first message to a monitor that is no sign of life."""
    while True:
        messages = channel.receive()
        for message in messages or ({"kind": "closed"},):
            if message["kind"] != "beat":
                return str(message["kind"])


def test_silence_is_told_after_the_timeout_and_sooner_where_another_process_crashed_of_it(office: Any) -> None:
    at = office(3)
    first, second, third = (at.join(rank) for rank in range(3))
    assert at.after(29, first, second, third) == []
    assert at.after(29, first, third) == []
    (line,) = at.after(2, first, third)
    assert line.startswith("dalle_ds monitor: lost rank=1 host=n1 step=none exit=75: no sign of life for 31 s")
    assert [outcome(channel) for channel in (first, second, third)] == ["exit"] * 3

    at = office(3)
    first, second, third = (at.join(rank) for rank in range(3))
    assert at.after(13, first, third) == []
    tell(third, "crash", Position(), text="killed")
    (line,) = at.after(0, first)
    assert line.startswith("dalle_ds monitor: lost rank=1 ") and "no sign of life for 13 s" in line


def test_a_crash_is_told_at_once_with_the_last_step_where_no_one_is_silent(office: Any) -> None:
    at = office(3)
    first, second, third = (at.join(rank) for rank in range(3))
    assert at.after(12, first, third) == []
    tell(third, "crash", place(7), text="killed")
    (line,) = at.after(0, first)
    assert line.startswith('dalle_ds monitor: crash rank=2 host=n2 step=7 phase="step" exit=75: killed')
    assert outcome(second) == "exit"


def test_a_rank_that_never_comes_is_missed(office: Any) -> None:
    at = office(3)
    assert at.after(1000) == []  # no one is late before anyone has come
    first = at.join(0)
    second = at.join(2)
    assert at.after(29, first, second) == []
    (line,) = at.after(2, first, second)
    assert line.startswith("dalle_ds monitor: lost rank=1 host=unknown step=none exit=75: ") and "31 s" in line


def is_closed(channel: Channel) -> bool:
    """Whether the coordinator has hung up."""
    channel.connection.settimeout(0.5)
    try:
        return channel.connection.recv(1) == b""
    except TimeoutError:
        return False
    except OSError:
        return True


def test_strangers_are_turned_away(office: Any) -> None:
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


def test_the_end_of_rank_0_ends_the_watch_and_is_no_failure(office: Any) -> None:
    at = office(3)
    first, second, third = (at.join(rank) for rank in range(3))
    tell(second, "bye", Position())
    at.pump()
    assert outcome(second) == "end"
    second.connection.close()
    assert at.after(1, first, third) == []
    assert at.after(1000, first, third) == []
    tell(first, "bye", Position())
    assert at.after(0) == []
    assert outcome(third) == "end"
    assert not at.coordinator.done
    for channel in (first, third):
        channel.connection.close()
    at.pump()
    assert at.coordinator.done


@pytest.mark.parametrize(("last", "expected"), [({"kind": "bye"}, "end"), ({"kind": "crash", "text": "!"}, "exit")])
def test_who_is_slow_to_join_still_learns_how_it_ended(office: Any, last: dict[str, str], expected: str) -> None:
    at = office(2)
    first = at.join(0)
    tell(first, position=Position(), **last)
    at.after(0)
    assert outcome(first) == expected
    first.connection.close()
    at.after(4)
    assert not at.coordinator.done
    second = at.join(1)
    at.pump()
    assert outcome(second) == expected
    second.connection.close()
    at.pump()
    assert at.coordinator.done


def test_there_may_be_more_ranks_than_open_files_allow_by_default(office: Any) -> None:
    _, most = resource.getrlimit(resource.RLIMIT_NOFILE)
    if most < 2048:
        pytest.skip(f"{most} open files are allowed at most")
    resource.setrlimit(resource.RLIMIT_NOFILE, (256, most))
    raise_file_limit()
    at = office(400)
    channels = [at.join(rank) for rank in range(400)]
    at.pump()
    channels[300].connection.close()
    (line,) = at.after(0)
    assert line.startswith("dalle_ds monitor: lost rank=300 host=n300 ")
    assert {outcome(channel) for rank, channel in enumerate(channels) if rank != 300} == {"exit"}


@pytest.mark.parametrize(("signalled", "ranks", "lines"), [(True, [1], 0), (False, [1, 0, 2], 0), (False, [1], 1)])
def test_that_all_of_a_run_is_told_to_end_needs_no_line(
    office: Any, signalled: bool, ranks: list[int], lines: int
) -> None:
    at = office(3)
    members = [at.join(rank) for rank in range(3)]
    if signalled:
        at.process.note_signal()
    for rank in ranks:
        tell(members[rank], "interrupted", Position(), text="KeyboardInterrupt")
        at.pump()
    assert at.told == []
    assert len(at.after(3, *members)) == lines
    assert [outcome(member) for member in members] == ["exit"] * 3


@pytest.mark.parametrize("kind", ["hang", "crash", "disconnected"])
def test_after_a_hang_all_stacks_are_written_and_the_rank_that_is_behind_is_named(office: Any, kind: str) -> None:
    at = office(4)
    members = [at.join(rank) for rank in range(4)]
    for member in members:
        tell(member, "beat", place(7, idle=800))
    tell(members[2], kind, place(7, idle=800), text="words")
    assert at.after(0) == []
    if kind == "disconnected":
        for seconds in (16, 16.5):
            at.clock.now += seconds
            for member in members:
                tell(member, "beat", place(7, idle=800))
            assert at.after(0) == []
    assert [outcome(member) for member in members] == ["dump"] * 4
    for rank, member in enumerate(members):
        phase, where = ("saving", "read at x.py:1 (f)") if rank == 1 else ("step", "")
        tell(member, "beat", place(7, phase, idle=803, waits=rank != 1, where=where))
    at.pump()
    at.clock.now += 2.5
    at.coordinator.tick()
    assert at.told == []
    at.clock.now += 1
    at.coordinator.tick()
    *first, hang = at.told
    assert [line[: len(f"dalle_ds monitor: {kind} rank=2 host=n2 step=7 ")] for line in first] == [
        f"dalle_ds monitor: {kind} rank=2 host=n2 step=7 " for _ in range(kind != "hang")
    ]
    assert hang.startswith('dalle_ds monitor: hang rank=1 host=n1 step=7 phase="saving" exit=75: no progress for 803 s')
    assert "in read at x.py:1 (f)" in hang and "run/logs/stacks" in hang
    assert [outcome(member) for member in members] == ["exit"] * 4


# --- who is behind


def place(step: int, phase: str = "step", idle: float = 100.0, **more: Any) -> Position:
    return Position(step, phase, idle, begun=True, **more)


@pytest.mark.parametrize(
    ("positions", "ranks"),
    [
        ([place(7), place(6, idle=90), place(7)], [1]),  # fewer steps, though its pulse is younger
        ([place(7, waits=True), place(7), place(7, waits=True)], [1]),  # the others wait for it
        ([place(7), place(7, idle=160), place(7, idle=101)], [1]),  # it came to no pulse that the others gave
        ([place(6, waits=True), place(7), place(7, waits=True)], [0]),
        ([place(7), place(7, idle=100.4), place(7, idle=100.9)], [0, 1, 2]),
        ([place(7, waits=True)] * 3, [0, 1, 2]),
        ([Position(idle=120), place(1), place(1)], [0]),
    ],
)
def test_who_holds_up_the_others(positions: list[Position], ranks: list[int]) -> None:
    assert behind(dict(enumerate(positions))) == ranks


# --- a monitor and its training process


def test_a_signal_explains_a_death_soon_after_it_and_no_later_one() -> None:
    kinds = []
    for seconds in (59.0, 61.0):
        clock = clock_at(1000.0)
        process = TrainingProcess(os.getppid(), 30, clock)
        process.note_signal()
        clock.now += seconds - 1
        process.note_ending()
        clock.now += 0.5
        failure = process.check()
        kinds.append(failure and failure.kind)
    assert kinds == ["interrupted", "crash"]


def test_an_orphan_and_one_that_was_hung_up_on_each_know_of_the_death() -> None:
    clock = clock_at(100.0)
    orphan, hung_up, well = (TrainingProcess(pid, 30, clock) for pid in (os.getpid(), os.getppid(), os.getppid()))
    hung_up.note_ending()
    assert orphan.check() is None and hung_up.check() is None  # a signal may still explain it
    clock.now += 0.2
    for process in (orphan, hung_up):
        failure = process.check()
        assert failure is not None and failure.kind == "crash"
    assert well.check() is None


def test_a_process_that_is_stopped_for_too_long_is_told(monkeypatch: pytest.MonkeyPatch) -> None:
    clock = clock_at(100.0)
    process = TrainingProcess(os.getppid(), 30, clock)
    found = []
    for seconds, letter in ((0, "T"), (29, "T"), (29, "S"), (0, "T"), (29, "T"), (2, "T")):
        monkeypatch.setattr(processes, "state", lambda _, letter=letter: letter)
        clock.now += seconds
        found.append(process.check())
    assert found[:-1] == [None] * 5 and found[-1].kind == "stopped" and "SIGSTOP" in found[-1].text


def test_the_time_of_a_suspension_does_not_count(monkeypatch: pytest.MonkeyPatch) -> None:
    times = iter([10.0, 10.2, 3610.2, 3610.4])
    monkeypatch.setattr(processes, "time", SimpleNamespace(monotonic=lambda: next(times)))
    clock = Clock()
    for _ in range(3):
        clock.advance()
    assert clock.now == pytest.approx(0.4)


@contextlib.contextmanager
def monitor_of(**changes: Any) -> Iterator[SimpleNamespace]:
    """A monitor with the other ends of what it is connected to."""
    (ours, theirs), (coordinators, to_coordinator) = socket.socketpair(), socket.socketpair()
    with tempfile.TemporaryFile() as shared, contextlib.ExitStack() as stack:
        for connection in (ours, theirs, coordinators, to_coordinator):
            stack.enter_context(connection)
        shared.truncate(Progress.SIZE)
        changes = {"progress": shared.fileno(), "stacks": shared.fileno(), "logs": None, **changes}
        selector, clock = selectors.DefaultSelector(), clock_at(0.0)
        settings = settings_of(changes.pop("rank", 1), changes.pop("world_size", 2), **changes)
        monitor = MonitorProcess(settings, Channel(theirs), Channel(to_coordinator), selector, clock)
        yield SimpleNamespace(
            monitor=monitor, clock=clock, selector=selector, training=Channel(ours), coordinator=Channel(coordinators)
        )


def test_a_monitor_whose_process_closes_the_connection_knows_that_it_is_ending() -> None:
    with monitor_of() as at:
        assert not at.monitor.process.ending
        at.training.connection.close()
        for key, _ in at.selector.select(1):
            key.data()
        assert at.monitor.process.ending and not at.monitor.process.gone


def test_a_coordinator_that_cannot_be_reached_is_told_as_lost(capfd: pytest.CaptureFixture[str]) -> None:
    with socket.create_server(("127.0.0.1", 0)) as gone:
        port = gone.getsockname()[1]
    with pytest.raises(SystemExit) as ended:
        Watch(Mesh(1, 2, torch.device("cpu")), explain)._connect("127.0.0.1", port, "secret")
    assert ended.value.code == EXIT_REQUEUE
    assert capfd.readouterr().err.startswith("dalle_ds monitor: lost rank=0 host=127.0.0.1 step=none exit=75: rank 1 ")


# --- what a training process shows of itself


def test_a_pulse_is_seen_at_once_and_whole() -> None:
    clock = clock_at(100.0)
    with tempfile.TemporaryFile() as shared:
        shared.truncate(Progress.SIZE)
        ours, theirs = Progress(shared.fileno()), Progress(shared.fileno(), clock)
        assert theirs.read() == Position()
        for step, phase in ((0, "starting"), (123_456_789, "waiting for data"), (2, "größte"), (3, "x" * 100)):
            ours.pulse(step, phase, allowed=60.0 * step)
            assert theirs.read() == Position(step, phase[:32], 0.0, 60.0 * step, begun=True)
            clock.now += 5
            assert theirs.read().idle == 5
        ours.pulse(3, "x" * 100)  # the same again is progress, too
        assert theirs.read().idle == 0


@pytest.mark.alone
def test_a_pulse_that_is_being_written_is_not_taken_for_an_old_one() -> None:
    clock = Clock()
    with tempfile.TemporaryFile() as shared:
        shared.truncate(Progress.SIZE)
        ours, theirs = Progress(shared.fileno()), Progress(shared.fileno(), clock)
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
            clock.advance()
            position = theirs.read()
            reads += 1
            assert position.begun and position.idle < 1 and 0 <= position.step < 1000, position
        assert reads > 1000


def stacks_of(*frames: tuple[str, str]) -> str:
    lines = "".join(f'  File "{file}", line 9 in {function}\n' for file, function in frames)
    other = 'Thread 0x00007f (most recent call first):\n  File "/x/other.py", line 1 in run\n\n'
    return f"{other}Current thread 0x00007e (most recent call first):\n{lines}"


C10D = "/venv/lib/python3.11/site-packages/torch/distributed/distributed_c10d.py"


@pytest.mark.parametrize(
    ("stacks", "expected"),
    [
        (stacks_of(("/x/loop.py", "_update"), ("/x/trainer.py", "fit")), ("loop.py:9 (_update)", False)),
        (stacks_of((C10D, "all_reduce"), ("/x/mesh.py", "sum")), ("all_reduce at mesh.py:9 (sum)", True)),
        (stacks_of(("/usr/lib/python3.11/queue.py", "get"), ("/x/a.py", "f")), ("get at a.py:9 (f)", False)),
        (stacks_of(("/usr/lib/python3.11/threading.py", "wait")), ("threading.py:9 (wait)", True)),
        ("Thread 0x00007e (most recent call first):\n  <no Python frame>\n", ("outside Python", False)),
        ("no answer: the process is waiting for a disk\n", ("no answer: the process is waiting for a disk", False)),
    ],
)
def test_where_the_main_thread_is(stacks: str, expected: tuple[str, bool]) -> None:
    assert main_thread(stacks) == expected


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
    where, waits = main_thread(stacks)
    assert where.startswith("test_monitor.py:") and "test_the_stacks_that_faulthandler" in where and not waits
