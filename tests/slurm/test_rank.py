"""The shell around a process of a job: signals reach the process, and its status is noted. No SLURM is needed."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import pytest

from tests.conftest import ROOT

LOYAL = """
import signal, sys, time
told = []
signal.signal({number}, lambda *_: told.append(1))
print("begins", flush=True)
while not told:
    time.sleep(0.01)
time.sleep(0.5)  # an interpreter that is about to end heeds no more signals
sys.exit(75)
"""


def start(folder: Path, *command: str) -> subprocess.Popen[str]:
    """A rank's shell, once its process has printed a line."""
    places = {"SLURM_PROCID": "3", "SLURM_NTASKS": "4", "SLURM_LOCALID": "1", "DALLE_STATUS": str(folder)}
    shell = subprocess.Popen(
        [str(ROOT / "slurm" / "rank.sh"), *command],
        env={**os.environ, **places}, stdout=subprocess.PIPE, text=True, start_new_session=True,
    )  # fmt: skip
    assert shell.stdout is not None
    assert shell.stdout.readline().startswith("--- ")
    return shell


def until(done: Callable[[], bool]) -> None:
    end = time.monotonic() + 60
    while not done():
        assert time.monotonic() < end
        time.sleep(0.02)


@pytest.mark.parametrize("status", [0, 1, 75])
def test_the_status_is_noted_and_handed_on(tmp_path: Path, status: int) -> None:
    shell = start(tmp_path, "sh", "-c", f"echo $RANK $WORLD_SIZE $LOCAL_RANK; exit {status}")
    assert shell.stdout is not None
    assert shell.stdout.read() == "3 4 1\n"  # `communicate` would lose what came with the first line
    assert shell.wait(60) == status
    assert [path.name for path in tmp_path.iterdir()] == [f"3.{status}"]


@pytest.mark.parametrize("number", [signal.SIGUSR1, signal.SIGTERM])
@pytest.mark.parametrize("ways", ["shell", "all"])
def test_signals_reach_the_process(tmp_path: Path, number: signal.Signals, ways: str) -> None:
    """Whether they are sent to the shell alone (cgroups) or to all processes of a job."""
    shell = start(tmp_path, sys.executable, "-c", LOYAL.format(number=int(number)))
    assert shell.stdout is not None and shell.stdout.readline() == "begins\n"
    if ways == "all":
        for process in children(shell.pid):
            os.kill(process, number)
    shell.send_signal(number)
    assert shell.wait(60) == 75
    assert [path.name for path in tmp_path.iterdir()] == ["3.75"]


def test_a_process_that_heeds_no_signals_yet_dies_of_one(tmp_path: Path) -> None:
    shell = start(tmp_path, "sh", "-c", "echo begins; exec sleep 60")
    assert shell.stdout is not None and shell.stdout.readline() == "begins\n"
    shell.send_signal(signal.SIGTERM)
    assert shell.wait(60) == 143
    assert [path.name for path in tmp_path.iterdir()] == ["3.143"]


def test_signals_around_the_end_do_not_lose_the_status(tmp_path: Path) -> None:
    for attempt in range(10):
        folder = tmp_path / str(attempt)
        folder.mkdir()
        shell = start(folder, "sh", "-c", "trap '' USR1; echo begins; sleep 0.05; exit 7")
        assert shell.stdout is not None and shell.stdout.readline() == "begins\n"
        while shell.poll() is None:
            shell.send_signal(signal.SIGUSR1)
            time.sleep(0.002)
        assert shell.returncode == 7
        assert [path.name for path in folder.iterdir()] == ["3.7"]


def test_a_process_does_not_outlive_its_shell(tmp_path: Path) -> None:
    shell = start(tmp_path, "sh", "-c", "echo $$; exec sleep 60")
    assert shell.stdout is not None
    process = int(shell.stdout.readline())
    shell.kill()
    shell.wait(60)
    until(lambda: not running(process))
    assert list(tmp_path.iterdir()) == []


def children(process: int) -> list[int]:
    """All below a process."""
    found = []
    for child in Path(f"/proc/{process}/task/{process}/children").read_text().split():
        found += [int(child), *children(int(child))]
    return found


def running(process: int) -> bool:
    try:
        return Path(f"/proc/{process}/stat").read_text().rsplit(")", 1)[1].split()[0] != "Z"
    except OSError:
        return False
