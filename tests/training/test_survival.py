"""What a run does when disks and data fail, and when it is told to stop. One launch on two processes shows all of it."""

from __future__ import annotations

import json
import re
import shutil
from pathlib import Path
from typing import Any

import pytest
from PIL import Image

from dalle_ds.config import to_dict
from dalle_ds.data.prepare import PrepareOptions, prepare
from dalle_ds.jsonl import read_records
from tests.conftest import TINY_DALLE, thorough
from tests.processes import run_ranks
from tests.training.test_layouts import deepspeed_json

pytestmark = pytest.mark.launch

STEPS = 12
WORKER = Path(__file__).with_name("survival_worker.py")
DISKS = ("tensors", "metrics", *thorough("rest", "folder"))
WAITING = thorough("disk-waits")


class Runs:
    """Everything that the tests below look at."""

    def __init__(self, folder: Path, data: Path, dvae: Path, tokenizer: Path) -> None:
        self.folder = folder
        self.base = {
            "data": str(data),
            "dvae": str(dvae),
            "tokenizer": str(tokenizer),
            "model": to_dict(TINY_DALLE),
            "steps": STEPS,
            "seed": 3,
            "save_every": 2,
            "optim": {"lr": 1e-2, "warmup_steps": 3, "schedule": "cosine", "decay_steps": STEPS, "clip": 0.5},
            "train": {"batch_size": 8, "average_decay": 0.9},
            "loader": {"workers": 0},
        }
        jobs = [self.job("straight"), self.job("workers", ["workers", 4], loader={"workers": 1})]
        jobs += [self.job(f"disk-{kind}", [kind, 5]) for kind in DISKS]
        for name in WAITING:
            jobs += [self.job(name, ["tensors", 5], report={"background_saves": False})]
        jobs += [self.job("disk-at-the-end", ["for ever", 9]), self.job("disk-at-the-end")]
        jobs += [self.job("by-the-clock", save_every=1000, save_minutes=1e-6)]
        jobs += [self.job("kept", save_every=1, report={"keep_checkpoints": 1, "keep_every": 5})]
        # Told while a validation is due, in the first update, and in the last; by one process only.
        told = {"save_every": 1000}
        jobs += [self.job("told", ["told", update, rank], **told) for update, rank in ((1, 0), (4, 1), (9, 0), (12, 1))]
        jobs += [self.job("told", **told)]
        jobs += [self.job("told-in-vain", ["told and in vain", 2, 0], save_every=1000)]
        jobs += [self.job("unread", ["rows", 1], train={"batch_size": 40})]
        tolerant = {"workers": 0, "max_unreadable": 0.7}
        jobs += [self.job("unread-allowed", ["rows", 1], train={"batch_size": 40}, loader=tolerant)]
        jobs += [self.job("one-image", data=str(one_image(folder)))]
        changing = shutil.copytree(data, folder / "changing-data")
        jobs += [self.job("changed", ["changed", 5], data=str(changing), report={"background_saves": False})]
        description = folder / "jobs.json"
        description.write_text(json.dumps(jobs))
        done = run_ranks(WORKER, description, processes=2)
        assert done.returncode == 0, done.stdout[-6000:] + done.stderr[-6000:]
        self.output = " ".join(done.stdout.split())

    def job(self, name: str, fault: list[Any] | None = None, **sections: Any) -> dict[str, Any]:
        report = {"log_every": 1, "validate_every": 3, "preview_every": 0, **sections.pop("report", {})}
        run = {**self.base, **sections, "report": report, "run_dir": str(self.folder / name)}
        return {"name": name, "run": run, "deepspeed": deepspeed_json(3, "fp32"), "fault": fault}

    def records(self, name: str) -> list[dict[str, Any]]:
        """Metrics without what depends on time and disks."""
        lines = list(read_records(self.folder / name / "metrics.jsonl"))
        left_out = ("second", "memory", "failed_saves")
        return [{k: v for k, v in line.items() if not any(word in k for word in left_out)} for line in lines]

    def weights(self, name: str) -> bytes:
        return (self.folder / name / "export" / "model.safetensors").read_bytes()

    def checkpoints(self, name: str) -> list[str]:
        return sorted(path.name for path in (self.folder / name / "checkpoints").iterdir())

    def error(self, name: str, rank: int = 0) -> str:
        found = re.search(rf"{name} rank {rank} (\w+Error|Interrupted): (.*?)(?= \S+ rank \d |$)", self.output)
        assert found is not None, f"{name} has not failed: {self.output[-3000:]}"
        return found[0]


def one_image(folder: Path) -> Path:
    """Data of one image: it is trained on, so there is none for validation."""
    (folder / "corpus").mkdir()
    Image.new("RGB", (24, 24), "red").save(folder / "corpus" / "red.png")
    (folder / "corpus" / "red.txt").write_text("a red square")
    prepare(PrepareOptions(corpus="folder", source=str(folder / "corpus")), str(folder / "one-image-data"))
    return folder / "one-image-data"


@pytest.fixture(scope="module")
def runs(tmp_path_factory: pytest.TempPathFactory, data: Path, dvae_export: Path, tokenizer_file: Path) -> Runs:
    return Runs(tmp_path_factory.mktemp("runs"), data, dvae_export, tokenizer_file)


@pytest.mark.parametrize("name", [*(f"disk-{kind}" for kind in DISKS), *WAITING])
def test_a_disk_that_fails_for_a_while_costs_nothing(runs: Runs, name: str) -> None:
    assert runs.weights(name) == runs.weights("straight")
    assert runs.records(name) == runs.records("straight")
    found = runs.checkpoints(name)
    assert len(found) == 3 and {"latest", "step-12"} < set(found)
    failed = max(line.get("failed_saves_total", 0) for line in read_records(runs.folder / name / "metrics.jsonl"))
    if name != "disk-metrics":
        # Of this run: what its last line tells is what it counted, with those that failed after the last line of metrics.
        told = re.search(
            rf"exported to \S*/{name}/export done: [^:]*?(\d+) checkpoints that could not be written", runs.output
        )
        assert told is not None and int(told[1]) >= failed >= 1


def test_a_disk_that_fails_is_told_with_its_reason(runs: Runs) -> None:
    pattern = (
        r"ALARM: the checkpoint of step \d+ could not be written to \S*disk-tensors/checkpoints, [\d,]+ MiB free "
        r"there: \[Errno 28\] No space left on device; the run goes on, earlier checkpoints stay as they are"
    )
    assert re.search(pattern, runs.output)
    assert "disk-metrics/metrics.jsonl cannot be written: [Errno 28] No space left on device; its lines" in runs.output


def test_the_last_checkpoint_must_be_written(runs: Runs) -> None:
    for rank in range(2):
        error = runs.error("disk-at-the-end", rank)
        assert "CheckpointError: the checkpoint of step 12 could not be written" in error
        assert "see to the disk and start the run again" in error
    # And so it was.
    assert runs.weights("disk-at-the-end") == runs.weights("straight")
    assert runs.records("disk-at-the-end") == runs.records("straight")
    assert "1 restarts" in runs.output


def test_a_run_that_is_told_to_stop_and_cannot_save_only_needs_to_be_started_again(runs: Runs) -> None:
    assert "Interrupted" in runs.error("told-in-vain")
    assert "ALARM: the checkpoint of step 2 could not be written" in runs.output
    assert "the run goes on from the last complete checkpoint" in runs.output
    assert runs.checkpoints("told-in-vain") == []


def test_checkpoints_by_the_clock(runs: Runs) -> None:
    lines = (runs.folder / "by-the-clock" / "checkpoints").iterdir()
    steps = sorted(int(path.name.removeprefix("step-")) for path in lines if path.name != "latest")
    assert steps[-1] == STEPS and len(steps) == 2  # the one before was written by the clock
    assert runs.weights("by-the-clock") == runs.weights("straight")


def test_one_image_is_enough_to_train_on(runs: Runs) -> None:
    """Nothing is validated, and the run says so."""
    records = runs.records("one-image")
    assert records[-1]["step"] == STEPS and not any("validation" in name for line in records for name in line)
    assert runs.weights("one-image") and "one-image-data has no validation rows" in runs.output


def test_which_checkpoints_are_kept(runs: Runs) -> None:
    steps = [int(name.removeprefix("step-")) for name in runs.checkpoints("kept") if name != "latest"]
    # One that falls due while another is being written is written later: the first from 5 on, the first from 10 on, the last.
    assert max(steps) == 12 and len(steps) <= 3
    assert len([step for step in steps if 5 <= step < 10]) == 1


def test_a_run_told_to_stop_four_times_is_the_one_never_told(runs: Runs) -> None:
    assert runs.weights("told") == runs.weights("straight")
    assert runs.records("told") == runs.records("straight")
    for update, how in ((1, " by SIGUSR1"), (4, ", as another process was told to"), (9, " by SIGUSR1")):
        sentence = f"told rank 0 Interrupted: {runs.folder / 'told'}: stopped after update {update}{how}"
        assert "".join(sentence.split()) in "".join(runs.output.split())
    starts = list(read_records(runs.folder / "told" / "starts.jsonl"))
    assert [start["step"] for start in starts] == [0, 1, 4, 9, 12]


def test_too_much_that_cannot_be_read_ends_a_run(runs: Runs) -> None:
    error = runs.error("unread")
    assert (
        "DataError" in error and "which is more than loader.max_unreadable=0.1 allows; most often: broken row" in error
    )
    assert runs.error("unread", 1)
    last = runs.records("unread-allowed")[-1]
    assert last["step"] == STEPS
    counted = runs.records("unread-allowed")[-2]["skipped_total"]
    assert 0.4 < counted / (40 * STEPS + counted) < 0.75
    assert f"{counted:,.0f} rows that could not be read" in runs.output


def test_loader_processes_that_are_killed_are_replaced(runs: Runs) -> None:
    assert runs.weights("workers") == runs.weights("straight")
    assert runs.records("workers") == runs.records("straight")
    assert (
        len(re.findall(r"rank 1: loader process \d+ was killed \(SIGKILL\).*?; others take their place", runs.output))
        == 2
    )


def test_data_that_changes_ends_a_run_at_the_next_checkpoint(runs: Runs) -> None:
    error = runs.error("changed")
    assert "DataChangedError" in error
    assert "step-4" in runs.checkpoints("changed") and "step-6" not in runs.checkpoints("changed")
