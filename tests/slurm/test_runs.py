"""Training on a cluster of two nodes: the whole chain, a run that is stopped in every way, a stage that fails."""

from __future__ import annotations

import json
import os
import re
import shutil
import signal
from pathlib import Path
from typing import Any

import pytest
from PIL import Image

from dalle_ds.config import to_dict
from tests.conftest import TINY_DALLE, TINY_DVAE
from tests.slurm.conftest import Desk

pytestmark = [pytest.mark.launch, pytest.mark.slow]

STAGES = ("tokenizer", "dvae", "codes", "transformer", "evaluate")
STEPS = 180
WARN, KILL, REQUEUE = "SIGUSR1 to all ranks", "SIGKILL to rank 1", "scontrol requeue"
SAVE_EVERY = 75
STOPS = {20: WARN, 90: KILL, 120: REQUEUE}
"""Update from which on the disturbed run is stopped → how; far enough from what comes next for a fast machine."""


def options(model: Any, **more: Any) -> str:
    """Of a launcher, for a tiny run."""
    sections = {f"model.{name}": value for name, value in to_dict(model).items()}
    common = {"train.batch_size": 8, "loader.workers": 0, "report.validation_rows": 8, "report.preview_every": 0}
    words = []
    for name, value in {**sections, **common, **more}.items():
        values = value if isinstance(value, (list, tuple)) else [value]
        words += [f"--{name}", *map(str, values)]
    return " ".join(words)


DVAE = options(TINY_DVAE, steps=10, **{"objective.temperature_steps": 10, "optim.decay_steps": 60})
TRANSFORMER = options(TINY_DALLE, steps=STEPS, save_every=SAVE_EVERY)


class Jobs:
    """All jobs of these tests, side by side."""

    def __init__(self, desk: Desk, data: Path) -> None:
        self.desk = desk
        self.data = desk.folder / "data"
        shutil.copytree(data, self.data)  # for it gets the codes
        self.out, self.failing = desk.folder / "out", desk.folder / "failing"
        more = {
            "TOKENIZER_ARGS": "--vocab_size 400",
            "CODES_ARGS": "--views 1",
            "EVALUATE_ARGS": "--captions 4 --blur 0",
        }
        self.chain = self.submit(self.out, DVAE_ARGS=DVAE, TRANSFORMER_ARGS=TRANSFORMER, **more)
        bad = DVAE.replace("--train.batch_size 8", "--train.batch_size 7")
        self.failed = self.submit(self.failing, DVAE_ARGS=bad, **more)
        small = ("--megabytes", "2", "--disk_megabytes", "2", "--slow", "50")  # the nodes share two cores
        self.doctor = desk.submit("slurm/doctor.sbatch", "cluster", desk.folder / "runs", *small)
        self.disturbed = self.disturb()
        for job in self.chain.values():
            desk.cluster.wait(job, "COMPLETED", 240)
        desk.cluster.wait(self.failed["evaluate"], "CANCELLED", 120)
        desk.cluster.wait(self.doctor, "COMPLETED", 120)

    def submit(self, out: Path, **arguments: str) -> dict[str, str]:
        """Stage → job."""
        told = self.desk.call("chain.sh", "toy", self.data, out, **arguments)
        return dict(line.split() for line in told.splitlines() if line.split()[0] in STAGES)

    def disturb(self) -> str:
        """The chain's transformer once more, stopped again and again."""
        desk, run_dir = self.desk, self.desk.folder / "disturbed"
        command = ["--preset", "toy", "--deepspeed_config", "ds_configs/zero3_bf16.json", "--data", self.data]
        command += ["--dvae", self.out / "dvae", "--tokenizer", self.out / "tokenizer.model", "--run_dir", run_dir]
        job = desk.submit(
            f"--dependency=afterok:{self.chain['codes']}", "slurm/transformer.sbatch", *command, *TRANSFORMER.split()
        )
        for restarts, (step, how) in enumerate(STOPS.items(), 1):
            desk.cluster.until(lambda step=step: max(steps(run_dir), default=0) >= step, 240)
            if how == KILL:
                (rank,) = desk.cluster.processes("train_transformer.py", SLURM_JOB_ID=job, RANK="1")
                os.kill(rank, signal.SIGKILL)
            else:
                command = ("scancel", "--signal=USR1") if how == WARN else ("scontrol", "requeue")
                desk.cluster.run(*command, job, check=True)
            desk.cluster.until(lambda n=restarts: desk.cluster.show(job)["Restarts"] == str(n), 120)
        desk.cluster.wait(job, "COMPLETED", 240)
        return job


def steps(run_dir: Path) -> list[int]:
    """Updates in a run's metrics, in their order."""
    path = run_dir / "metrics.jsonl"
    lines = path.read_text().splitlines(keepends=True) if path.exists() else []
    records = [json.loads(line) for line in lines if line.endswith("\n")]
    return [record["step"] for record in records if "loss" in record]


@pytest.fixture(scope="module")
def jobs(desk: Desk, data: Path) -> Jobs:
    return Jobs(desk, data)


def test_the_chain_ends_with_pictures(jobs: Jobs) -> None:
    with Image.open(jobs.out / "report" / "pictures.png") as opened:
        assert min(opened.size) > 100
    assert (jobs.out / "transformer" / "export" / "model.safetensors").is_file()
    assert steps(jobs.out / "dvae") == list(range(1, 11))
    status = jobs.desk.call("status.sh", jobs.out)
    assert [line.split()[0] for line in status.splitlines() if "COMPLETED" in line] == list(STAGES)


def test_two_nodes_train_together_and_log_apart(jobs: Jobs) -> None:
    folder = jobs.out / "logs" / f"transformer-{jobs.chain['transformer']}"
    assert {path.name for path in folder.glob("*.log")} == {"rank-0.log", "rank-1.log"}
    assert "2 × cpu" in (folder / "rank-0.log").read_text()
    assert "rank 1 of 2 on" in (folder / "rank-1.log").read_text()
    assert jobs.desk.cluster.show(jobs.chain["transformer"])["NodeList"] == "n[1-2]"


def test_a_run_that_is_stopped_in_every_way_is_the_run_that_never_was(jobs: Jobs) -> None:
    undisturbed, disturbed = jobs.out / "transformer", jobs.desk.folder / "disturbed"
    assert steps(disturbed) == steps(undisturbed) == list(range(1, STEPS + 1))
    weights = [folder / "export" / "model.safetensors" for folder in (undisturbed, disturbed)]
    assert weights[0].read_bytes() == weights[1].read_bytes()
    assert jobs.desk.cluster.show(jobs.disturbed)["Restarts"] == str(len(STOPS))


def test_a_run_that_is_told_to_stop_loses_no_update(jobs: Jobs) -> None:
    """It goes on from where the signal reached it; one that lost a process, from the last checkpoint that was due."""
    resumed = [
        int(step)
        for step in re.findall(r"resumed from \S+/step-(\d+)", jobs.desk.log(jobs.disturbed, 0, "transformer"))
    ]
    assert len(resumed) == len(STOPS)
    warned, killed, requeued = resumed
    assert 20 <= warned < SAVE_EVERY and killed in (warned, SAVE_EVERY) and requeued >= 120
    first, second, third, last = jobs.desk.outcomes(jobs.disturbed, "transformer")
    assert re.fullmatch(r"requeued after \d+ s: it stopped before its end; restart 1 of at most 2", first)
    assert re.fullmatch(r"requeued after \d+ s: rank 1 was killed by signal 9; restart 2 of at most 2", second)
    assert third.endswith("decides on what follows") and last == "done"


def test_the_doctor_sees_both_nodes(jobs: Jobs) -> None:
    told = jobs.desk.log(jobs.doctor, 0, "doctor")
    assert "nothing is wrong" in told
    assert [line.split("│")[1].strip() for line in told.splitlines() if line.startswith("│")] == ["0", "1", "shard"]


def test_a_stage_that_fails_stops_the_chain_and_says_why(jobs: Jobs) -> None:
    status = jobs.desk.call("status.sh", jobs.failing, check=False)
    assert "train.batch_size" in status and "rank-0.log:" in status
    lines = {line.split()[0]: line for line in status.splitlines() if not line.startswith(" ")}
    assert list(lines) == list(STAGES)
    assert "COMPLETED" in lines["tokenizer"] and "FAILED" in lines["dvae"]
    assert all("CANCELLED (DependencyNeverSatisfied)" in lines[stage] for stage in STAGES[2:])
    assert not (jobs.failing / "transformer").exists()
