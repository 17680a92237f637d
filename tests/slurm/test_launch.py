"""What launch.sh makes of an allocation, with an srun and a scontrol that only play their parts: no SLURM is needed."""

from __future__ import annotations

import os
import re
import subprocess
from pathlib import Path

import pytest

from tests.conftest import ROOT

SRUN = """#!/bin/bash
echo $MASTER_PORT > port
rank=0
for status in $FATES; do
    [[ $status == lost ]] || : > "$DALLE_STATUS/$rank.$status"
    rank=$((rank + 1))
done
exit 0
"""
SCONTROL = """#!/bin/bash
echo "$*" >> asked
case "$*" in
    *hostnames*) echo localhost ;;
    *"show job"*) echo "JobId=1 JobState=${STATE:-RUNNING} Reason=None" ;;
esac
"""
SITE = """
REQUEUE_LIMIT=9 CRASH_LIMIT=2 LAST_EXIT_SECONDS=20
prepare_environment() { [[ -z ${SIGNALED:-} ]] || kill -USR1 $$; }
"""


class Allocation:
    """Of two processes, in a folder."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        (folder / "bin").mkdir()
        for name, text in (("srun", SRUN), ("scontrol", SCONTROL)):
            (folder / "bin" / name).write_text(text)
            (folder / "bin" / name).chmod(0o755)
        (folder / "site.sh").write_text(SITE)

    def launch(self, fates: str, **environment: str) -> tuple[int, str]:
        """Status of the job, and the last line about its outcome."""
        places = {"SLURM_JOB_ID": "12", "SLURM_NTASKS": "2", "SLURM_JOB_NODELIST": "localhost", "ENVIRONMENT": "BATCH"}
        ours = {"DALLE_SITE": f"{self.folder}/site.sh", "DALLE_LOGS": f"{self.folder}/logs", "FATES": fates}
        path = {"PATH": f"{self.folder}/bin:{os.environ['PATH']}"}
        done = subprocess.run(
            [str(ROOT / "slurm" / "launch.sh"), "launcher.py"],
            env={**os.environ, **places, **ours, **path, **environment},
            cwd=self.folder, capture_output=True, text=True, timeout=120, check=False,
        )  # fmt: skip
        line = done.stdout.splitlines()[-1] if done.stdout else done.stderr
        return done.returncode, line.partition(" ")[2]

    def asked(self) -> list[str]:
        """What scontrol was asked for."""
        return (self.folder / "asked").read_text().splitlines()

    def before(self, *lines: str) -> None:
        """How earlier starts ended."""
        (self.folder / "logs" / "job-12").mkdir(parents=True, exist_ok=True)
        told = "".join(f"2026-01-01T00:00:00Z {line}\n" for line in lines)
        (self.folder / "logs" / "job-12" / "outcome").write_text(told)


@pytest.fixture
def allocation(tmp_path: Path) -> Allocation:
    return Allocation(tmp_path)


IDLE = "requeued after 20 s: it stopped before its end; restart 1 of at most 9"
CRASHED = "requeued after 2000 s: rank 1 was killed by signal 9; restart 1 of at most 9"
LONG = "requeued after 4000 s: rank 1 was killed by signal 9; restart 1 of at most 9"
USEFUL = "requeued after 1000 s: it stopped before its end; restart 1 of at most 9"


@pytest.mark.parametrize(
    ("before", "again"),
    [
        ([], True),
        ([IDLE], True),
        ([IDLE, IDLE], False),
        ([IDLE, CRASHED], False),
        ([CRASHED, CRASHED, LONG], True),
        ([CRASHED, CRASHED, USEFUL, CRASHED], True),
    ],
)
@pytest.mark.parametrize("fates", ["75 75", "75 137"])
def test_starts_that_get_nowhere_are_counted_until_one_does(
    allocation: Allocation, before: list[str], again: bool, fates: str
) -> None:
    allocation.before(*before)
    status, line = allocation.launch(fates)
    assert (status == 0) == again
    assert line.startswith("requeued after " if again else "failed: ")
    assert ("requeue 12" in allocation.asked()) == again


def test_one_lost_process_beside_many_that_are_done_is_tried_once_more(allocation: Allocation) -> None:
    assert allocation.launch("0 lost")[1].startswith("requeued after ")
    status, line = allocation.launch("0 lost")
    assert status == 1 and line.startswith("failed: rank 1 was lost")


def test_a_warning_before_the_processes_begin_is_heeded(allocation: Allocation) -> None:
    _, line = allocation.launch("0 0", SIGNALED="1")
    assert re.match(r"requeued after \d+ s: told to stop as it began; restart 1", line)
    assert not (allocation.folder / "port").exists()


def test_a_task_of_an_array_asks_for_itself(allocation: Allocation) -> None:
    allocation.launch("75 75", SLURM_ARRAY_JOB_ID="10", SLURM_ARRAY_TASK_ID="2")
    assert allocation.asked()[1:] == ["--oneliner show job 10_2", "requeue 10_2"]


def test_the_doctor_is_not_started_again(allocation: Allocation) -> None:
    status, line = allocation.launch("75 75", DALLE_ONCE="1")
    assert status == 1 and line.startswith("failed: it stopped before its end; ")


def test_each_start_meets_at_a_port_of_its_own(allocation: Allocation) -> None:
    ports = set()
    for restarts in range(5):
        allocation.launch("0 0", SLURM_RESTART_COUNT=str(restarts))
        ports.add(int((allocation.folder / "port").read_text()))
    assert len(ports) == 5 and min(ports) >= 10_000 and max(ports) < 30_000


def test_a_full_disk_does_not_end_the_script(allocation: Allocation) -> None:
    tee = allocation.folder / "bin" / "tee"
    tee.write_text("#!/bin/bash\ncat\nexit 1\n")
    tee.chmod(0o755)
    assert allocation.launch("0 0") == (0, "done")
    assert allocation.launch("75 75")[0] == 0
    assert "requeue 12" in allocation.asked()


def test_a_controller_that_is_away_for_a_moment_is_waited_for(allocation: Allocation) -> None:
    script = allocation.folder / "bin" / "scontrol"
    script.write_text(
        SCONTROL.replace("case", '[[ "$*" == *hostnames* || $(wc -l < asked) -gt 3 ]] || exit 1\ncase', 1)
    )
    assert allocation.launch("75 75")[0] == 0
    assert allocation.asked()[-1] == "requeue 12"
