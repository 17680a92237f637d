"""What becomes of a job by how its processes end: done, put back into the queue, failed. The processes are stand-ins."""

from __future__ import annotations

import re

import pytest

from tests.conftest import ROOT
from tests.slurm.conftest import REQUEUE_LIMIT, STANDIN, Desk

pytestmark = [pytest.mark.launch, pytest.mark.slow]

WAIT = ("wait,wait", "0,0")


class Jobs:
    """All jobs of these tests, side by side."""

    def __init__(self, desk: Desk) -> None:
        self.desk = desk
        run = desk.cluster.run
        waiting = {name: desk.standin(*WAIT) for name in ("requeued", "told", "cancelled")}
        waiting["warned"] = desk.standin(
            *WAIT, options=("--signal=B:USR1@55", "--time=1")
        )  # five seconds after the start
        self.numbers = {
            **waiting,
            "limit": desk.standin(*["75,75"] * (REQUEUE_LIMIT + 2)),
            "idle": desk.standin(*["75,75"] * 3, CRASH_LIMIT="1"),
            "killed": desk.standin("75,137", "0,0"),
            "told early": desk.standin("138,143", "0,0"),
            "crashing": desk.standin("75,137", "75,137", "0,0", CRASH_LIMIT="1"),
            "lost at the end": desk.standin("0,lost", "0,0"),
            "lost": desk.standin("75,lost", "0,0"),
            "all killed": desk.standin("137,137"),
            "failed": desk.standin("75,3"),
        }
        chained = (f"--dependency=afterok:{self['failed']}", "--kill-on-invalid-dep=yes")
        self.numbers["chained"] = desk.standin("0,0", options=chained)
        for name, command in (
            ("requeued", ("scontrol", "requeue")),
            ("told", ("scancel", "--signal=TERM")),
            ("cancelled", ("scancel",)),
        ):
            desk.cluster.until(
                lambda name=name: "begins: " in desk.log(self[name], 0) and "begins: " in desk.log(self[name], 1), 120
            )
            if name == "told":
                self.meanwhile = desk.call("status.sh", self[name])
            run(*command, self[name], check=True)
        ends = {
            "limit": "FAILED",
            "idle": "FAILED",
            "all killed": "FAILED",
            "failed": "FAILED",
            "cancelled": "CANCELLED",
            "chained": "CANCELLED",
        }
        ends["crashing"] = "FAILED"
        for name, job in self.numbers.items():
            desk.cluster.wait(job, ends.get(name, "COMPLETED"), 120)

    def __getitem__(self, name: str) -> str:
        return self.numbers[name]


@pytest.fixture(scope="module")
def jobs(desk: Desk) -> Jobs:
    return Jobs(desk)


def starts(desk: Desk, job: str) -> list[int]:
    """Starts that a job has had, of which both ranks know."""
    found = [[int(number) for number in re.findall(r"begins: start (\d+)", desk.log(job, rank))] for rank in (0, 1)]
    assert found[0] == found[1]
    return found[0]


@pytest.mark.parametrize("name", ["requeued", "told", "warned", "told early"])
def test_a_job_that_is_stopped_goes_on_by_itself(jobs: Jobs, desk: Desk, name: str) -> None:
    """By SLURM's requeueing, by SIGTERM, by the warning before the time limit that only the batch shell gets, or
    by signals before there is anyone to heed them."""
    assert starts(desk, jobs[name]) == [0, 1]
    assert desk.outcomes(jobs[name])[-1] == "done"
    for rank in (
        (0, 1) if name != "told early" else ()
    ):  # the second signal would tell a training process to drop everything
        assert "told 1 times" in desk.log(jobs[name], rank)


def test_a_job_that_is_cancelled_stays_so(jobs: Jobs, desk: Desk) -> None:
    assert starts(desk, jobs["cancelled"]) == [0]
    assert "decides on what follows" in desk.outcomes(jobs["cancelled"])[-1]


@pytest.mark.parametrize(
    ("name", "why"),
    [
        ("killed", "rank 1 was killed by signal 9"),
        ("lost", "rank 1 was lost"),
        ("lost at the end", "rank 1 was lost"),
    ],
)
def test_a_lost_process_puts_the_job_back_if_the_others_say_so(jobs: Jobs, desk: Desk, name: str, why: str) -> None:
    assert starts(desk, jobs[name]) == [0, 1]
    first, last = desk.outcomes(jobs[name])
    assert re.match(rf"requeued after \d+ s: {why}", first) and last == "done"


def test_restarts_have_a_limit(jobs: Jobs, desk: Desk) -> None:
    assert starts(desk, jobs["limit"]) == list(range(REQUEUE_LIMIT + 1))
    last = desk.outcomes(jobs["limit"])[-1]
    assert last.startswith("failed: it stopped before its end; restarted 2 times already, and REQUEUE_LIMIT=2 in ")


@pytest.mark.parametrize(
    ("name", "why"), [("crashing", "rank 1 was killed by signal 9"), ("idle", "it stopped before its end")]
)
def test_restarts_that_get_nowhere_have_a_limit_of_their_own(jobs: Jobs, desk: Desk, name: str, why: str) -> None:
    assert starts(desk, jobs[name]) == [0, 1]
    last = desk.outcomes(jobs[name])[-1]
    assert last.startswith(f"failed: {why}; start 2 in a row that got nowhere, and CRASH_LIMIT=1 in ")


@pytest.mark.parametrize(
    ("name", "why"), [("failed", "rank 1 ended with status 3"), ("all killed", "rank 0 was killed by signal 9")]
)
def test_a_failure_is_not_tried_again(jobs: Jobs, desk: Desk, name: str, why: str) -> None:
    assert starts(desk, jobs[name]) == [0]
    assert desk.outcomes(jobs[name])[-1].startswith(f"failed: {why}")


def test_what_depends_on_a_failure_never_starts(jobs: Jobs, desk: Desk) -> None:
    assert starts(desk, jobs["chained"]) == []
    assert desk.cluster.show(jobs["chained"])["Reason"] == "DependencyNeverSatisfied"


def test_ranks_know_their_places_and_where_to_meet(jobs: Jobs, desk: Desk) -> None:
    for rank in (0, 1):
        settings = dict(re.findall(r"(\w+)=(\S+)", desk.log(jobs["failed"], rank)))
        port = 10000 + int(jobs["failed"]) % 20000
        expected = {"RANK": rank, "WORLD_SIZE": 2, "LOCAL_RANK": 0, "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port}
        assert settings == {name: str(value) for name, value in expected.items()}


def test_status_says_what_failed_and_why(jobs: Jobs, desk: Desk) -> None:
    told = desk.call("status.sh", desk.folder, jobs["failed"], jobs["chained"], check=False)
    lines = told.splitlines()
    assert re.fullmatch(rf"dvae +job {jobs['failed']} +FAILED \(NonZeroExitCode\)", lines[0])
    assert "failed: rank 1 ended with status 3; see" in lines[1]
    assert lines[2].endswith("rank-1.log:") and "    | error: this went wrong" in lines
    assert re.fullmatch(rf"dvae +job {jobs['chained']} +CANCELLED \(DependencyNeverSatisfied\)", lines[-1])
    assert re.fullmatch(rf"dvae +job {jobs['told']} +RUNNING\n    now: begins: start 0 .*\n", jobs.meanwhile)
    everything = desk.call("status.sh", check=False)
    assert all(f"job {job} " in everything for job in jobs.numbers.values())


def test_an_interactive_allocation_is_not_requeued(desk: Desk) -> None:
    command = ("salloc", "--nodes=2", "--ntasks-per-node=1", ROOT / "slurm" / "launch.sh", STANDIN, "75,75")
    told = desk.cluster.run(*map(str, command), **desk.environment)
    assert "stopped: it stopped before its end; give the same command to go on" in told
    assert "exited with code 75" in told or "exit code 75" in told


def test_mistakes_are_told(desk: Desk) -> None:
    assert "no .sbatch file named" in desk.call("submit.sh", "--nodes=2", check=False)
    assert "nowhere.sh does not exist" in desk.call("submit.sh", "x.sbatch", check=False, DALLE_SITE="/nowhere.sh")
    assert "neither a folder nor" in desk.call("status.sh", "/nowhere", check=False)
    assert "chain.sh PRESET DATA OUT" in desk.call("chain.sh", "toy", check=False)
    assert "prepare.sh SHARES" in desk.call("prepare.sh", "--corpus", "twemoji", check=False)
