"""Training of the duplicate detector: the loss and figures by hand, the same under every layout, and used for a search."""

from __future__ import annotations

import dataclasses
import json
import runpy
import sys
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
import torch.nn.functional as F

from dalle_ds.config import (
    DistortionConfig,
    DuplicateDetectorConfig,
    DuplicateObjective,
    DuplicateRun,
    ReportConfig,
)
from dalle_ds.data import BatchLoader, PairDataset, evaluation_batches
from dalle_ds.data.faults import RowError
from dalle_ds.errors import ConfigError
from dalle_ds.models.duplicates import DuplicateDetector
from dalle_ds.tasks.duplicates import DuplicatesTask
from dalle_ds.training.export import export_checkpoint
from tests.conftest import ROOT
from tests.processes import run_ranks

TINY = DuplicateDetectorConfig(image_size=16, width=4, blocks=(1, 1), stem_halvings=1, embed_dim=8)
STEPS = 6


@pytest.fixture
def task(data: Path) -> DuplicatesTask:
    return DuplicatesTask(DuplicateRun(data=str(data), model=TINY, report=ReportConfig(validation_rows=10)))


def test_the_loss_is_the_symmetric_cross_entropy_of_cosines(task: DuplicatesTask) -> None:
    torch.manual_seed(0)
    model = task.build_model()
    images, copies = torch.rand(2, 7, 3, 16, 16)
    with torch.no_grad():
        loss, metrics = task.loss(model, {"image": images, "copy": copies}, 0)
        a, b = (F.normalize(model.embed_images(rows, normalize=False)).double() for rows in (images, copies))
    logits, targets = a @ b.T / 0.07, torch.arange(7)
    wanted = (F.cross_entropy(logits, targets) + F.cross_entropy(logits.T, targets)) / 2
    assert loss.item() == pytest.approx(wanted.item(), rel=1e-5)
    assert metrics["accuracy"].item() == pytest.approx((logits.argmax(dim=0) == targets).double().mean().item())
    pairs = (a @ a.T).mean().item()
    assert task.digest(metrics)["spread"] == pytest.approx(1 - pairs, abs=1e-6)


def test_the_spread_is_that_of_the_batch_where_processes_have_one_row_each(task: DuplicatesTask) -> None:
    torch.manual_seed(0)
    image, copy = F.normalize(torch.randn(2, 6, 8), dim=2)
    parts = [task.loss_of({"image": image[n : n + 1], "copy": copy[n : n + 1]})[1] for n in range(6)]
    found = task.digest({name: sum(part[name] for part in parts) for name in ("rows", "image_sum")})["spread"]
    assert found == pytest.approx(1 - (image @ image.T).mean().item(), abs=1e-6) and found > 0.5
    assert task.alarm({"spread": found}, task.run.optim.warmup_steps) is None


def test_validation_figures_are_those_of_all_rows_whatever_the_batches(task: DuplicatesTask) -> None:
    torch.manual_seed(0)
    model = task.build_model()
    figures = []
    for micro_batch, ranks in ((10, 1), (3, 2)):
        sums: dict[str, torch.Tensor] = {}
        for rank in range(ranks):
            rows = task.samples("validation")
            for batch in evaluation_batches(rows, micro_batch, rank=rank, world_size=ranks, rows=10):
                with torch.no_grad():
                    for name, value in task.evaluate(model, task.prepare(batch)).items():
                        sums[name] = sums.get(name, 0) + value
        figures.append(task.summarize(sums))
        cosines = (sums["copy"] @ sums["image"].T).double().numpy()
    assert figures[0] == pytest.approx(figures[1], rel=1e-4)
    own = np.diagonal(cosines)
    others = np.where(np.eye(10, dtype=bool), -1, cosines)
    assert figures[1]["own"] == pytest.approx(own.mean(), abs=1e-5)
    assert figures[1]["other"] == pytest.approx(others.max(axis=1).mean(), abs=1e-5)
    assert figures[1]["accuracy"] == pytest.approx((cosines.argmax(axis=1) == np.arange(10)).mean())


def test_validation_compares_copies_with_the_pictures_themselves(data: Path) -> None:
    objective, distortions = DuplicateObjective(views="distorted"), DistortionConfig(probability=1.0)
    task = DuplicatesTask(DuplicateRun(data=str(data), model=TINY, objective=objective, distortions=distortions))
    picture = PairDataset.open(data, "validation").picture(0)
    validation = task.samples("validation").sample(0, np.random.default_rng(0))
    training = [task.samples("train").sample(0, np.random.default_rng(seed))["image"] for seed in range(3)]
    assert abs(float(validation["image"].mean()) - picture.mean()) < 4  # type: ignore[union-attr]
    assert len({view.tobytes() for view in training}) == 3  # type: ignore[union-attr]


def test_every_process_begins_with_the_same_weights(task: DuplicatesTask, monkeypatch: pytest.MonkeyPatch) -> None:
    torch.manual_seed(5)
    state = torch.get_rng_state()
    weights = task.initial_weights()
    assert torch.equal(torch.get_rng_state(), state)
    torch.manual_seed(6)
    again = DuplicatesTask(task.run).initial_weights()
    assert weights.keys() == task.build_model().state_dict().keys()
    assert all(torch.equal(value, again[name]) for name, value in weights.items())
    other = DuplicatesTask(dataclasses.replace(task.run, seed=1)).initial_weights()
    assert not torch.equal(weights["stem.v"], other["stem.v"])
    model = task.build_model()
    model.load_state_dict(weights)
    batch = task.prepare(next(evaluation_batches(task.samples("validation"), 10, rank=0, world_size=1, rows=10)))
    _, metrics = task.loss(model, batch, 0)
    assert task.digest(metrics)["spread"] > 0.5
    # Pictures that cannot be read are left out.
    picture = PairDataset.picture

    def broken(self: PairDataset, row: int, short_side: int | None = None) -> object:
        if row % 2:
            raise RowError("broken")
        return picture(self, row, short_side)

    monkeypatch.setattr(PairDataset, "picture", broken)
    assert torch.isfinite(task.initial_weights()["stem.g"]).all()


@pytest.fixture
def one_thread() -> Iterator[None]:
    """Layers are so small here that threads spend ten times as long on waiting for each other."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


def test_it_learns(task: DuplicatesTask, one_thread: None) -> None:
    model = task.build_model()
    model.load_state_dict(task.initial_weights())
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2)
    batches = BatchLoader(task.samples("train"), seed=0, batch_size=32, micro_batch=32, rank=0, world_size=1)
    found: list[float] = []
    for step, batch in zip(range(40), batches, strict=False):
        loss, _ = task.loss(model, task.prepare(batch), step)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        found.append(loss.item())
    assert np.mean(found[-10:]) < 0.75 * np.mean(found[:10])


def test_preview_export_alarm(task: DuplicatesTask, tmp_path: Path) -> None:
    torch.manual_seed(0)
    model = task.build_model().eval()
    batch = task.prepare(next(evaluation_batches(task.samples("validation"), 5, rank=0, world_size=1, rows=5)))
    sheet = task.preview(model, batch)
    assert sheet.width > 6 * 64 and sheet.height > 5 * 64
    task.export(model, tmp_path)
    assert DuplicateDetector.from_pretrained(tmp_path).fingerprint == model.fingerprint
    late = task.run.optim.warmup_steps
    assert task.alarm({"spread": 0.001}, late - 1) is None and task.alarm({"spread": 0.5}, late) is None
    assert "collapsing" in (task.alarm({"spread": 0.001}, late) or "")
    assert task.flops_per_sample() > 0
    with pytest.raises(ConfigError, match="temperature"):
        DuplicateObjective(temperature=0.0)


# --- the launchers --------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def runs(data: Path, tmp_path_factory: pytest.TempPathFactory) -> SimpleNamespace:
    """The same training on one process, and on two with ZeRO-3 and two micro-batches each."""
    folder = tmp_path_factory.mktemp("duplicates")
    shared = {"stage3_param_persistence_threshold": 0}  # or small parameters are not divided at all
    layouts = {"one": (0, 1, 12), "divided": (3, 2, 3)}
    for name, (stage, processes, micro_batch) in layouts.items():
        path = folder / f"{name}.json"
        path.write_text(json.dumps({"zero_optimization": {"stage": stage, **(shared if stage == 3 else {})}}))
        command = ["--deepspeed_config", str(path), "--preset", "toy"]
        command += ["--data", str(data), "--run_dir", str(folder / name), "--steps", str(STEPS), "--seed", "1"]
        command += [
            "--model.image_size",
            "16",
            "--model.width",
            "4",
            "--model.blocks",
            "1",
            "1",
            "--model.embed_dim",
            "8",
        ]
        command += ["--train.batch_size", "12", "--train.micro_batch", str(micro_batch), "--optim.warmup_steps", "1"]
        command += ["--report.log_every", "1", "--report.validate_every", "0"]
        done = run_ranks("launchers/train_duplicates.py", *command, processes=processes)
        assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-3000:]
    return SimpleNamespace(folder=folder, one=folder / "one", divided=folder / "divided")


def losses(run: Path) -> list[float]:
    records = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    return [record["loss"] for record in records if "loss" in record]


@pytest.mark.slow
@pytest.mark.launch
def test_processes_shards_and_micro_batches_change_nothing(runs: SimpleNamespace, tmp_path: Path) -> None:
    one, divided = losses(runs.one), losses(runs.divided)
    assert len(set(one)) == STEPS
    assert divided == pytest.approx(one, rel=1e-4)
    image = torch.rand(4, 3, 16, 16)
    models = [DuplicateDetector.from_pretrained(run) for run in (runs.one, runs.divided)]
    first, second = (model.embed_images(image) for model in models)
    torch.testing.assert_close(first, second, rtol=1e-3, atol=1e-3)
    folder, step = export_checkpoint(runs.divided, out=tmp_path / "again")
    assert step == STEPS
    assert DuplicateDetector.from_pretrained(folder).fingerprint == models[1].fingerprint


@pytest.mark.slow
@pytest.mark.launch
def test_the_trained_detector_searches_for_overlap(
    runs: SimpleNamespace,
    data: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    options = ["--train", str(data), "--out", str(tmp_path / "out"), "--threshold", "0.5", "--pairs", "6", "--detector"]

    def search(detector: Path) -> None:
        monkeypatch.setattr(sys, "argv", ["overlap.py", *options, str(detector)])
        runpy.run_path(str(ROOT / "launchers" / "overlap.py"), run_name="__main__")

    search(runs.one)
    overlap = json.loads((tmp_path / "out" / "overlap.json").read_text())
    validation = PairDataset.open(data, "validation")
    assert overlap["detector"] == DuplicateDetector.from_pretrained(runs.one).fingerprint
    assert overlap["fingerprint"] == validation.fingerprint and overlap["split"] == "validation"
    assert set(overlap["rows"]) <= set(range(len(validation)))
    assert f"{len(overlap['rows'])} rows" in capsys.readouterr().out
    with pytest.raises(SystemExit, match="1"):
        search(runs.divided)
    assert "another detector" in capsys.readouterr().err
