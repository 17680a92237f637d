"""Memory that the C library keeps; each case in a process of its own, since the settings are a process's."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest

PROGRAM = """
import json, resource, sys
import torch
from dalle_ds.allocator import keep_freed_memory

def faults():
    return resource.getrusage(resource.RUSAGE_SELF).ru_minflt

if "limited" in sys.argv:
    resource.setrlimit(resource.RLIMIT_AS, (2**40, resource.RLIM_INFINITY))
taken = keep_freed_memory() if "keep" in sys.argv else None
kept = torch.ones(2**24)
huge = [line for line in open("/proc/self/smaps_rollup") if line.startswith("AnonHugePages")]
torch.ones(2**24)
before = faults()
for _ in range(5):
    torch.ones(2**24)  # 64 MiB, freed at once
addresses = [line for line in open("/proc/self/status") if line.startswith("VmData")][0]
kibibytes = {"addresses": int(addresses.split()[1]), "huge": int(huge[0].split()[1]) if huge else 0}
print(json.dumps({"taken": taken, "faults": faults() - before, **kibibytes}))
"""


def figures(*arguments: str) -> dict[str, int]:
    command = [sys.executable, "-c", PROGRAM, *arguments]
    return json.loads(subprocess.run(command, check=True, capture_output=True, text=True).stdout)


@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="tests a Linux C library")
def test_freed_memory_is_used_again() -> None:
    without, kept = figures(), figures("keep")
    if not kept["taken"]:
        pytest.skip("tests glibc, and this C library is another")
    assert without["faults"] > 5000  # 16,384 pages each time, fewer where the system makes huge ones by itself
    assert kept["faults"] < 1000


def test_huge_pages_are_asked_for() -> None:
    setting = Path("/sys/kernel/mm/transparent_hugepage/enabled")
    if not setting.is_file() or "[madvise]" not in setting.read_text():
        pytest.skip("this system gives huge pages to nobody, or to everybody")
    assert figures("keep")["huge"] >= 2**15  # KiB, of 2**16


@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="tests a Linux C library")
def test_no_addresses_are_taken_where_they_are_limited() -> None:
    free, limited = figures("keep"), figures("keep", "limited")
    if not free["taken"]:
        pytest.skip("tests glibc, and this C library is another")
    assert limited["taken"]
    assert free["addresses"] - limited["addresses"] > 2**20  # KiB
