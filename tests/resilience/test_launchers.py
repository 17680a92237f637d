"""A launcher that dies or is told to stop takes its training processes along, behind a checkpoint, and says how they ended."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path
from typing import Any

import psutil
import pytest

from dalle_ds.resilience.processes import LAUNCH, Launchers, TrainingProcess, state
from tests.conftest import ROOT, deepspeed_command
from tests.resilience.test_monitor import monitor_of

# Starts the program that its arguments name, waits, and passes its status on, as deepspeed does.
STARTER = """
import os, subprocess, sys
print(os.getpid(), flush=True)
words = [word for word in sys.argv[1:] if not word.startswith("--node_rank")]
sys.exit(max(0, subprocess.Popen(words).wait()))
"""


class Chain:
    """Plain processes, each the parent of the next, the last of which sleeps; each by the name of its script."""

    def __init__(self, folder: Path, *names: str, options: tuple[str, ...], before: tuple[str, ...]) -> None:
        words = list(before)
        for name in names:
            (folder / name).write_text(STARTER)
            words += [sys.executable, str(folder / name), *(options if name == LAUNCH else ())]
        (folder / "rank").write_text("import os, time; print(os.getpid(), flush=True); time.sleep(60)")
        words += [sys.executable, str(folder / "rank")]
        self.top = subprocess.Popen(words, stdout=subprocess.PIPE, text=True, start_new_session=True)
        assert self.top.stdout is not None
        self.pids = [int(self.top.stdout.readline()) for _ in range(len(names) + 1)]
        self.rank = self.pids[-1]

    def kill(self, number: int) -> None:
        """One of them, and wait until it is seen to be gone."""
        os.kill(self.pids[number], signal.SIGKILL)
        while state(self.pids[number]) not in ("Z", ""):
            time.sleep(0.01)


@pytest.fixture
def chain(tmp_path: Path) -> Iterator[Any]:
    started = []

    def begin(*names: str, options: tuple[str, ...] = (), before: tuple[str, ...] = ()) -> Chain:
        started.append(Chain(tmp_path, *names, options=options, before=before))
        return started[-1]

    yield begin
    for each in started:
        for pid in each.pids:
            with suppress(ProcessLookupError):
                os.kill(pid, signal.SIGKILL)
        each.top.wait()


@pytest.mark.parametrize(
    ("names", "killed", "missed"),
    [
        (("deepspeed", LAUNCH), 0, "deepspeed"),
        (("deepspeed", LAUNCH), 1, LAUNCH),
        (("dalle_ds.launch", LAUNCH), 0, "dalle_ds.launch"),
        (("job", "deepspeed", "numactl", LAUNCH), 1, "deepspeed"),
        (("torchrun",), 0, "torchrun"),
        (("job", "deepspeed", LAUNCH), 0, None),
        (("job",), 0, None),
    ],
)
def test_a_launcher_that_dies_is_missed_and_nothing_else_is(
    chain: Any, names: tuple[str, ...], killed: int, missed: str | None
) -> None:
    processes = chain(*names)
    launchers = Launchers(processes.rank, by_deepspeed=LAUNCH in names)
    assert launchers.lost() is None
    processes.kill(killed)  # the first of them is a zombie then, as where process 1 of a container does not wait
    assert launchers.lost() == (missed and f"{missed}, pid {processes.pids[killed]}")


@pytest.mark.parametrize(("killed", "missed"), [(0, "deepspeed"), (1, LAUNCH)])
def test_a_launcher_that_died_before_anyone_looked_is_missed(chain: Any, killed: int, missed: str) -> None:
    processes = chain("deepspeed", LAUNCH)
    processes.kill(killed)
    while str(processes.pids[killed]) == Path(f"/proc/{processes.pids[killed + 1]}/stat").read_text().split()[3]:
        time.sleep(0.01)
    adopted_by = Path(f"/proc/{processes.pids[killed + 1]}/stat").read_text().split()[3]
    if killed == 0 and b"python" in Path(f"/proc/{adopted_by}/cmdline").read_bytes():
        pytest.skip("orphans become children of a program in Python here, which may be a launcher")
    assert Launchers(processes.rank, by_deepspeed=True).lost() == missed


@pytest.mark.parametrize(("options", "missed"), [((), "deepspeed"), (("--node_rank=1",), None)])
def test_a_launch_that_was_started_from_another_machine_needs_no_command_above_it(
    chain: Any, options: tuple[str, ...], missed: str | None
) -> None:
    processes = chain(LAUNCH, options=options, before=("sh", "-c", '"$@"; true', "sh"))
    assert Launchers(processes.rank, by_deepspeed=True).lost() == missed


@pytest.mark.parametrize("can_stop", [True, False])
def test_a_monitor_asks_its_process_to_stop_once_or_ends_it(
    chain: Any, monkeypatch: pytest.MonkeyPatch, can_stop: bool
) -> None:
    processes = chain("deepspeed", LAUNCH)
    monkeypatch.setenv("CROSS_RANK", "0")
    monkeypatch.setattr(TrainingProcess, "check", lambda *_: None)
    with monitor_of(pid=processes.rank, can_stop=can_stop) as at:
        at.monitor.tick()
        at.training.connection.setblocking(False)
        assert at.training.receive() is None, "it was told nothing"
        processes.kill(0)
        for _ in range(3):
            at.monitor.tick()
        lost = f"deepspeed, pid {processes.pids[0]}"
        dead = [message["text"] for message in at.coordinator.receive() if message["kind"] == "launcher-lost"]
        if can_stop:
            (told,) = at.training.receive()
            assert told["kind"] == "stop" and lost in told["why"] and dead == []
        else:
            assert at.training.receive() is None and dead == [lost]


# --- python -m dalle_ds.launch, with plain processes in the place of deepspeed's ------------------------------------------

WRAPPER = """
import sys
from dalle_ds.launch import Launch
launched = Launch([sys.executable, *sys.argv[1:]])
sys.exit(launched.wait())
"""
CHILD = """
import os, subprocess, sys, time
words = [sys.executable, "-c", RANK, *sys.argv[1:]]
ranks = [subprocess.Popen([*words, str(n)], env={**os.environ, "RANK": str(n)}) for n in range(2)]
print(os.getpid(), *[rank.pid for rank in ranks], flush=True)
statuses = [rank.wait() for rank in ranks]
sys.exit(next((status for status in statuses if status), 0))
"""
# Stands for a training process: the first signal and the end of its launcher are requests, a second one is an order.
RANK = """
import os, signal, sys, time
got = []
for number in (signal.SIGTERM, signal.SIGINT, signal.SIGUSR1):
    signal.signal(number, lambda number, _: got.append(number))
parent, (ready, status, slow, n) = os.getppid(), sys.argv[1:]
open(f"{ready}-{n}", "w").close()
while not got and os.getppid() == parent:
    time.sleep(0.01)
    if os.path.exists(f"{ready}-end"):
        sys.exit(int(status))
until = time.monotonic() + float(slow)
while time.monotonic() < until and len(got) < 2:
    time.sleep(0.01)
status = 128 + got[1] if len(got) > 1 else int(status) if n == "1" or status == "0" else 75
os._exit(status)  # as `run_launcher` leaves; signals kill an interpreter that is going down
"""

# One of a training process, with its environment.
WORKER = """
import subprocess, sys
if sys.argv[-1] == "0":
    subprocess.Popen(["sleep", "60"])
"""


class Wrapped:
    """`Launch` around a child and two training processes, which end `slow` seconds after a signal, with `status` and 75; both
    with 0 where that is the status."""

    def __init__(self, folder: Path, status: int = 75, slow: float = 0.0, worker: bool = False) -> None:
        self.ready = folder / "ready"
        child = f"RANK = {(WORKER if worker else '') + RANK!r}\n{CHILD}"
        self.process = subprocess.Popen(
            [sys.executable, "-c", WRAPPER, "-c", child, str(self.ready), str(status), str(slow)],
            stdout=subprocess.PIPE, text=True, start_new_session=True, env={**os.environ, "PYTHONPATH": str(ROOT)},
        )  # fmt: skip
        assert self.process.stdout is not None
        self.child, *self.ranks = map(int, self.process.stdout.readline().split())
        while not all(Path(f"{self.ready}-{n}").exists() for n in range(2)):
            time.sleep(0.01)

    def end(self, *signals: tuple[int, int]) -> int:
        """Send signals to processes; the status that the wrapper then ends with, all others having ended before."""
        for pid, number in signals:
            os.kill(pid, number)
            time.sleep(0.3)
        status = self.process.wait(20)
        assert not any(Path(f"/proc/{pid}").exists() for pid in (self.child, *self.ranks))
        return status


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT, signal.SIGUSR1])
def test_a_signal_reaches_the_training_processes_and_their_status_comes_back(tmp_path: Path, number: int) -> None:
    began = time.monotonic()
    wrapped = Wrapped(tmp_path, slow=1.0)
    assert wrapped.end((wrapped.process.pid, number)) == 75
    assert time.monotonic() - began >= 1


def test_a_second_signal_reaches_them_too(tmp_path: Path) -> None:
    wrapped = Wrapped(tmp_path, slow=30.0)
    assert wrapped.end(*[(wrapped.process.pid, signal.SIGTERM)] * 2) == 143


def test_a_run_that_is_done_as_it_is_told_to_stop_is_done(tmp_path: Path) -> None:
    wrapped = Wrapped(tmp_path, status=0)
    assert wrapped.end((wrapped.process.pid, signal.SIGTERM)) == 0


def test_a_failure_counts_more_than_a_stop(tmp_path: Path) -> None:
    wrapped = Wrapped(tmp_path, status=1)
    assert wrapped.end((wrapped.process.pid, signal.SIGTERM)) == 1


@pytest.mark.parametrize(("status", "wanted"), [(75, 75), (0, 75), (1, 1)])
def test_the_loss_of_deepspeeds_child_is_never_0_and_the_processes_are_waited_for(
    tmp_path: Path, status: int, wanted: int
) -> None:
    wrapped = Wrapped(tmp_path, status=status, slow=1.0)
    assert wrapped.end((wrapped.child, signal.SIGKILL)) == wanted


def test_what_a_dead_process_leaves_behind_is_not_waited_for(tmp_path: Path) -> None:
    """A worker of the first training process, which the launcher inherits."""
    wrapped = Wrapped(tmp_path, slow=1.0, worker=True)
    (worker,) = psutil.Process(wrapped.ranks[0]).children()
    try:
        os.kill(wrapped.ranks[0], signal.SIGKILL)
        while Path(f"/proc/{wrapped.ranks[0]}").exists():  # its parent has learned of its end
            time.sleep(0.01)
        assert wrapped.end((wrapped.process.pid, signal.SIGTERM)) == 75
        assert worker.is_running() and worker.status() != psutil.STATUS_ZOMBIE, "and it was told nothing"
    finally:
        worker.kill()


def test_a_loss_with_all_processes_gone_is_the_signal(tmp_path: Path) -> None:
    wrapped = Wrapped(tmp_path)
    for rank in wrapped.ranks:
        os.kill(wrapped.child, signal.SIGSTOP)
        os.kill(rank, signal.SIGKILL)
    assert wrapped.end((wrapped.child, signal.SIGKILL)) == 137


@pytest.mark.parametrize(("status", "wanted"), [(0, 0), (75, 75), (3, 3)])
def test_an_end_without_signals_is_passed_on(tmp_path: Path, status: int, wanted: int) -> None:
    wrapped = Wrapped(tmp_path, status=status)
    Path(f"{wrapped.ready}-end").touch()
    assert wrapped.end() == wanted


def test_a_process_that_was_killed_is_told_as_a_shell_would(tmp_path: Path) -> None:
    wrapped = Wrapped(tmp_path, status=0)
    os.kill(wrapped.ranks[0], signal.SIGKILL)
    Path(f"{wrapped.ready}-end").touch()
    assert wrapped.end() == 137


# --- the real ones ----------------------------------------------------------------------------------------------------------


@pytest.mark.slow
@pytest.mark.launch
def test_a_run_stops_behind_a_checkpoint_and_goes_on_whoever_of_its_launchers_is_told_or_killed(
    tmp_path: Path, data: Path
) -> None:
    """Each start resumes from the checkpoint of the one before."""
    run, wrapper = tmp_path / "run", [sys.executable, "-m", "dalle_ds.launch"]
    options = ["--preset", "toy", "--steps", "100000", "--data", str(data), "--run_dir", str(run)]
    options += ["--deepspeed_config", str(ROOT / "ds_configs" / "zero1_fp32.json"), "--train.batch_size", "4"]
    options += ["--model.image_size", "16", "--report.validate_every", "0", "--report.preview_every", "0"]
    options += ["--report.log_every", "1", "--loader.workers", "0"]
    scenarios = [
        ([], "top", signal.SIGTERM, -15),
        (wrapper, "top", signal.SIGTERM, 75),
        (wrapper, "child", signal.SIGKILL, 75),
        (wrapper, "top", signal.SIGKILL, -9),
        ([], "child", signal.SIGKILL, 0),
    ]
    step = 0
    for number, (command, to, what, status) in enumerate(scenarios):
        plain = deepspeed_command(2)
        command = [*(command or plain[:1]), *plain[1:]]
        log = tmp_path / f"log-{number}"
        with log.open("w") as output:
            launcher = subprocess.Popen(
                [*command, str(ROOT / "launchers" / "train_dvae.py"), *options], stdout=output, stderr=output,
                cwd=tmp_path, env={**os.environ, "PYTHONPATH": str(ROOT)},
            )  # fmt: skip
        metrics = run / "metrics.jsonl"
        until = time.monotonic() + 180
        while not (metrics.exists() and metrics.read_text().count("\n") > step):
            assert launcher.poll() is None and time.monotonic() < until, log.read_text()
            time.sleep(0.1)
        assert step == 0 or f"step-{step}" in log.read_text().replace("\n", ""), "resumed"
        children = Path(f"/proc/{launcher.pid}/task/{launcher.pid}/children").read_text().split()
        (child,) = map(int, children)
        ranks = [int(pid) for pid in Path(f"/proc/{child}/task/{child}/children").read_text().split()]
        os.kill(launcher.pid if to == "top" else child, what)
        assert launcher.wait(60) == status, log.read_text()
        until = time.monotonic() + 60
        while any(state(rank) not in ("Z", "") for rank in ranks):
            assert time.monotonic() < until, log.read_text()
            time.sleep(0.1)
        latest = int((run / "checkpoints" / "latest").read_text().strip().removeprefix("step-"))
        assert latest > step and f"stopped after update {latest} by" in log.read_text(), log.read_text()
        assert "Traceback" not in log.read_text(), log.read_text()
        step = latest
