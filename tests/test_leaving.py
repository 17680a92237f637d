"""How one of several processes ends: with its status, after what must be done, and without taking the interpreter down."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

from tests.conftest import ROOT

PROGRAM = """
import atexit, pathlib, sys, threading, time
from dalle_ds.cli import run_launcher
from dalle_ds.errors import DataError, Interrupted

class Last:
    def __del__(self):
        print("finalized")

kept = Last()

def late():
    time.sleep(0.3)
    print("thread done")

def main():
    atexit.register(print, "exit handler")
    threading.Thread(target=late).start()
    print("main done")
    {end}

run_launcher(main)
"""


@pytest.mark.parametrize(
    ("end", "status"),
    [
        ("pass", 0),
        ("raise DataError('no rows')", 1),
        ("raise Interrupted('stopped')", 75),
        ("raise KeyboardInterrupt", 130),
    ],
)
@pytest.mark.parametrize("processes", [1, 2])
def test_everything_is_done_and_the_status_is_that_of_the_run(
    end: str, status: int, processes: int, tmp_path: Path
) -> None:
    output = tmp_path / "output"
    with output.open("w") as stdout:  # a file: what is not flushed would be lost
        done = subprocess.run(
            [sys.executable, "-c", PROGRAM.format(end=end)],
            cwd=ROOT,
            env={**os.environ, "WORLD_SIZE": str(processes), "RANK": "0"},
            stdout=stdout,
            stderr=subprocess.PIPE,
            text=True,
            check=False,
        )
    lines = output.read_text().splitlines()
    assert done.returncode == status, done.stderr
    assert [line for line in lines if line not in ("stopped", "finalized")] == [
        "main done",
        "thread done",
        "exit handler",
    ]
    assert ("finalized" in lines) == (processes == 1)
    assert ("no rows" in done.stderr) == (status == 1)
