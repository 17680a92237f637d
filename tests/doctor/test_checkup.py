"""A check of two processes that are sound, of two that do not share a folder, and what it would say of a sick cluster."""

from __future__ import annotations

import io
import os
import socket
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from rich.console import Console

from dalle_ds.doctor.cluster import Checkup
from dalle_ds.doctor.probes import Disk, Facts, Link, Trial, offsets
from tests.conftest import ROOT

SMALL = ["--megabytes", "2", "--disk_megabytes", "3", "--slow", "50"]  # two processes share this machine's cores


def check(folders: list[Path], *options: str) -> list[tuple[int, str]]:
    """The doctor on one process for each folder, as launchers start them: statuses and what was printed."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = str(probe.getsockname()[1])
    running = []
    for rank, folder in enumerate(folders):
        places = {"RANK": str(rank), "LOCAL_RANK": str(rank), "WORLD_SIZE": str(len(folders))}
        environment = {**os.environ, **places, "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port, "PYTHONPATH": str(ROOT)}
        # As the deepspeed launcher calls it.
        command = [sys.executable, str(ROOT / "launchers" / "doctor.py"), f"--local_rank={rank}"]
        command += ["cluster", str(folder), *SMALL, *options]
        running.append(
            subprocess.Popen(command, env=environment, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)
        )
    return [(process.wait(), output) for process in running for output in process.communicate(timeout=100)[:1]]


@pytest.mark.launch
def test_two_sound_processes_pass(tmp_path: Path) -> None:
    folder = tmp_path / "runs"
    left = folder / ".doctor-killed"
    left.mkdir(parents=True)
    os.utime(left, (0, 0))
    (status, told), (other_status, other_told) = check([folder, folder], "--parallel.replicas", "2")
    assert (status, other_status) == (0, 0), told
    assert other_told == ""
    assert "nothing is wrong" in told and "DeepSpeed 0.19" in told
    rows = [[cell.strip() for cell in line.split("│")[1:-1]] for line in told.splitlines() if line.startswith("│")]
    for rank, row in enumerate(rows[:2]):
        assert row[:2] == [str(rank), socket.gethostname()]
        clock, alone, step, write, read = map(float, row[3:])
        assert abs(clock) < 100 and min(alone, step, write, read) > 0
    (axis, processes, groups, *speeds, ranks), *none = rows[2:]
    assert (axis, processes, groups, ranks) == ("replica", "2", "1", "ranks 0 … 1") and not none
    assert all(float(speed) > 0 for speed in speeds)
    assert list(folder.iterdir()) == []


@pytest.mark.slow
@pytest.mark.launch
def test_a_folder_that_is_not_shared_is_told_on_all_processes(tmp_path: Path) -> None:
    folders = [tmp_path / "here", tmp_path / "there"]
    folders[1].mkdir()
    (status, told), (other_status, _) = check(folders)
    assert (status, other_status) == (1, 1)
    assert f"rank 1 ({socket.gethostname()}): does not see a file that rank 0 wrote" in " ".join(told.split())
    assert "shard" in told
    assert [list(folder.iterdir()) for folder in folders] == [[], []]


def checkup(**changes: Any) -> Checkup:
    """A sound one of four processes on two hosts, two groups of two; with changes by rank, as `clocks={3: 2.0}`."""
    versions = {"torch": "2.13", "NCCL": "2.27"}
    values: dict[str, list[Any]] = {
        "facts": [Facts(host, "GPU", versions) for host in ("a", "a", "b", "b")],
        "clocks": [0.0, 0.001, -0.001, 0.0],
        "links": [Link("shard", ranks, 9e10, 9e10) for ranks in ((0, 1), (2, 3), (4, 5))],
        "disks": [Disk(1e9, 1e9, 10**12)] * 4,
        "trials": [Trial(0.1, 0.2, 5.0)] * 4,
    }
    for name, new in changes.items():
        values[name] = [new.get(rank, value) for rank, value in enumerate(values[name])]
    return Checkup(Path("/runs"), slow=1.5, **values)


@pytest.mark.parametrize(
    ("changes", "sentences"),
    [
        ({}, []),
        (
            {"facts": {3: Facts("b", "GPU", {"torch": "2.12", "NCCL": "2.27"})}},
            ["torch is not the same everywhere: 2.12 on rank 3 (b), and 2.13 on the other ranks"],
        ),
        (
            {"facts": {1: Facts("a", "CPU", {"torch": "2.13"})}},
            ["NCCL is not the same everywhere: none on rank 1 (a), and 2.27 on the other ranks"],
        ),
        ({"clocks": {3: 2.0}}, ["clocks differ by 2.0 s, between rank 3 (b) and rank 2 (b)"]),
        (
            {"links": {1: Link("shard", (2, 3), 1e10, 9e10)}},
            ["the shard group of rank 2 (b), rank 3 (b) reduces 10 GB/s, the median one 90"],
        ),
        ({"disks": {0: Disk(0, 0, 0, "cannot be read")}}, ["rank 0 (a): cannot be read"]),
        ({"disks": {2: Disk(1e9, 1e9, 10**9)}}, ["/runs has 1.0 GB left: free some space"]),
        ({"trials": {2: Trial(0.3, 0.5, 5.0)}}, ["rank 2 (b) computes 3.0 times as long as the median process"]),
        (
            {"trials": {1: Trial(0.1, 0.2, float("nan"))}},
            ["rank 1 (a) computes another loss from the same numbers: nan, not 5.0"],
        ),
        (
            {"trials": {0: Trial(0.1, 0.2, 5.2)}},
            ["rank 0 (a) computes another loss from the same numbers: 5.2, not 5.0"],
        ),
    ],
)  # fmt: skip
def test_what_is_wrong_is_named(changes: dict[str, Any], sentences: list[str]) -> None:
    found = checkup(**changes)
    assert found.faults() == sentences
    told = io.StringIO()
    Console(width=127, file=told).print(found.report())
    for sentence in sentences or ["nothing is wrong"]:
        assert sentence in told.getvalue()


def test_offsets_are_of_the_clock_and_not_of_late_barriers() -> None:
    """Rank 2's clock is 3 s ahead; rank 1 was late once."""
    times = [[10.0, 20.0, 30.0], [10.0, 20.5, 30.0], [13.0, 23.0, 33.0]]
    assert offsets(times) == pytest.approx([0, 0, 3])
