"""Tensor groups, pipelines and replicas change nothing: losses, norms, exports, previews, and what a resumed run goes on to.

One process alone is the reference. One launch of two processes and one of four do all that is compared with it; a second pair
resumes runs in other layouts than those that wrote them.
"""

from __future__ import annotations

import json
import shutil
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from PIL import Image
from safetensors.torch import load_file

from dalle_ds.config import TransformerRun, from_dict, to_dict
from dalle_ds.data import evaluation_batches
from dalle_ds.models import Dalle
from dalle_ds.tasks.transformer import TransformerTask
from dalle_ds.training.batches import PREVIEW_ROWS
from tests.conftest import EVERYTHING, TINY_DALLE, thorough
from tests.processes import run_ranks
from tests.training.test_layouts import deepspeed_json, launch, metrics

pytestmark = pytest.mark.launch

STEPS, HALF = 8, 4
MODEL = replace(TINY_DALLE, heads=4, mask_padding=True)
DROPOUT = replace(MODEL, dropout=0.2)
TWO: dict[str, dict[str, Any]] = {
    "zero3": {"zero": 3},
    "tensor": {"zero": 1, "tensor": 2},
    "pipe": {"zero": 1, "pipe": 2},
    "tensor-sequence-selective": {"zero": 2, "tensor": 2, "sequence": True, "recompute": "selective"},
    "pipe-full": {"zero": 1, "pipe": 2, "recompute": "full"},
    "tensor-dropout": {"zero": 0, "tensor": 2, "model": DROPOUT},
    "pipe-dropout": {"zero": 1, "pipe": 2, "model": DROPOUT},
    "tensor-fp16": {"zero": 1, "tensor": 2, "precision": "fp16"},
    "pipe-fp16": {"zero": 1, "pipe": 2, "precision": "fp16"},
    "tensor-bf16": {"zero": 1, "tensor": 2, "precision": "bf16"},
    "pipe-bf16": {"zero": 1, "pipe": 2, "precision": "bf16"},
}
FOUR: dict[str, dict[str, Any]] = {
    "replicas": {"zero": 3, "replicas": 2},
    "replicas-full-rank": {"zero": 3, "replicas": 2, "powersgd": {"enabled": True, "rank": 2 * 4 * MODEL.width}},
    "replicas-tensor": {"zero": 2, "replicas": 2, "tensor": 2},
    "tensor-zero3": {"zero": 3, "tensor": 2},
    "pipe-tensor-sequence": {"zero": 1, "pipe": 2, "tensor": 2, "sequence": True},
    "pipe-data-dropout": {"zero": 1, "pipe": 2, "model": DROPOUT},
    "pipe4": {"zero": 1, "pipe": 4},
    "replicas-fp16": {"zero": 3, "replicas": 2, "precision": "fp16"},
}
ONE: dict[str, dict[str, Any]] = {"reference": {"zero": 0}, "dropout": {"zero": 0, "model": DROPOUT}}
QUICK = (
    "zero3",
    "tensor",
    "pipe",
    "tensor-sequence-selective",
    "tensor-dropout",
    "pipe-dropout",
    "pipe-fp16",
    "tensor-bf16",
)
QUICK += ("replicas-full-rank", "replicas-tensor", "pipe-tensor-sequence", "replicas-fp16")
if not EVERYTHING:
    TWO, FOUR = ({name: kinds[name] for name in QUICK if name in kinds} for kinds in (TWO, FOUR))
RESUMED = (
    [  # written by, resumed as, processes
        ("tensor", "pipe", 2),
        ("pipe-tensor-sequence", "zero3", 2),
        ("replicas", "tensor", 2),
        ("zero3", "pipe-tensor-sequence", 4),
        ("pipe", "tensor-zero3", 4),
        ("tensor", "tensor", 2),
        ("pipe", "pipe", 2),
        ("replicas-full-rank", "replicas-full-rank", 4),
    ]
    if EVERYTHING
    else []
)  # runs that move are tested in test_checkpoint_runs.py too


class Runs:
    """All runs that the tests below look at."""

    def __init__(self, folder: Path, data: Path, dvae: Path, tokenizer: Path) -> None:
        self.folder, self.data, self.dvae, self.tokenizer = folder, data, dvae, tokenizer
        launch([self.job(name, **layout) for name, layout in ONE.items()], 1, folder)
        self.output = launch([self.job(name, **layout) for name, layout in TWO.items()], 2, folder)
        self.output += launch([self.job(name, **layout) for name, layout in FOUR.items()], 4, folder)
        for processes in (2, 4):
            pairs = [pair for pair in RESUMED if pair[2] == processes]
            for source, target, _ in pairs:
                self.halve(source, f"{source}-to-{target}")
            if not pairs:
                continue
            layouts = TWO | FOUR
            launch([self.job(f"{a}-to-{b}", **layouts[b]) for a, b, _ in pairs], processes, folder)

    def job(
        self,
        name: str,
        zero: int,
        *,
        precision: str = "fp32",
        recompute: str = "none",
        model: Any = MODEL,
        powersgd: dict[str, Any] | None = None,
        **parallel: Any,
    ) -> dict[str, Any]:
        run = {
            "data": str(self.data),
            "dvae": str(self.dvae),
            "tokenizer": str(self.tokenizer),
            "run_dir": str(self.folder / name),
            "steps": STEPS,
            "seed": 3,
            "save_every": HALF,
            "model": to_dict(model),
            "optim": {"lr": 1e-2, "warmup_steps": 3, "schedule": "cosine", "decay_steps": STEPS, "clip": 0.5},
            "train": {"batch_size": 8, "average_decay": 0.9, "activation_checkpointing": recompute},
            "parallel": parallel,
            "powersgd": powersgd or {},
            "loader": {"workers": 0, "caption_dropout": 0.2},
            "report": {"log_every": 1, "validate_every": HALF, "preview_every": 0, "keep_checkpoints": 2},
        }
        return {"name": name, "stage": "transformer", "run": run, "deepspeed": deepspeed_json(zero, precision)}

    def halve(self, source: str, name: str) -> None:
        """A copy of a run as it was half-way."""
        shutil.copytree(self.folder / source, self.folder / name)
        shutil.rmtree(self.folder / name / "export")
        shutil.rmtree(self.folder / name / "checkpoints" / f"step-{STEPS}")

    def __getitem__(self, name: str) -> Path:
        return self.folder / name


@pytest.fixture(scope="module")
def runs(tmp_path_factory: pytest.TempPathFactory, data: Path, dvae_export: Path, tokenizer_file: Path) -> Runs:
    return Runs(tmp_path_factory.mktemp("runs"), data, dvae_export, tokenizer_file)


def reference_of(name: str) -> str:
    return "dropout" if "dropout" in name else "reference"


EXACT = [name for name, layout in (TWO | FOUR).items() if "precision" not in layout]


@pytest.mark.parametrize("name", EXACT)
def test_losses_norms_and_exports_are_those_of_one_process(runs: Runs, name: str) -> None:
    expected, found = metrics(runs[reference_of(name)]), metrics(runs[name])
    assert sorted(found) == list(range(1, STEPS + 1))
    for step, figures in expected.items():
        for figure in ("loss", "text_loss", "image_loss", "grad_norm", "grad_norm_clipped", "lr"):
            assert found[step][figure] == pytest.approx(figures[figure], abs=1e-5), (step, figure)
        assert figures["grad_norm"] > 0.5, "this test needs updates that are clipped"
    ours = load_file(runs[name] / "export" / "model.safetensors")
    theirs = load_file(runs[reference_of(name)] / "export" / "model.safetensors")
    assert ours.keys() == theirs.keys()
    for weight, value in theirs.items():
        assert (ours[weight] - value).abs().max() < 2e-4, weight


def test_dropout_does_something(runs: Runs) -> None:
    assert abs(metrics(runs["dropout"])[1]["loss"] - metrics(runs["reference"])[1]["loss"]) > 1e-3


@pytest.mark.parametrize("layout", [name for name in TWO | FOUR if name.endswith("16")])
def test_16_bits_follow_fp32(runs: Runs, layout: str) -> None:
    layout, _, name = layout.partition("-")
    loss, norm = {"fp16": (1e-3, 5e-3), "bf16": (2e-2, 5e-2)}[name]
    expected, found = metrics(runs["reference"]), metrics(runs[f"{layout}-{name}"])
    for step, figures in expected.items():
        assert found[step]["loss"] == pytest.approx(figures["loss"], rel=loss)
        assert found[step]["grad_norm"] == pytest.approx(figures["grad_norm"], rel=norm)
    assert any(found[step]["loss"] != figures["loss"] for step, figures in expected.items()), "16 bits were not used"
    if name == "fp16":
        # As many as the processes that see data of their own.
        readers = {"tensor": 1, "pipe": 1, "replicas": 4}[layout]
        for block in range(2 * MODEL.depth):
            assert found[1][f"gradient_scale/{block}"] == pytest.approx(readers * 2**13 * 2**1e-3)


def test_validation_is_that_of_one_process(runs: Runs) -> None:
    def validation(name: str) -> list[dict[str, float]]:
        lines = [json.loads(line) for line in (runs[name] / "metrics.jsonl").read_text().splitlines()]
        return [
            {key: value for key, value in line.items() if key.startswith("validation/")}
            for line in lines
            if "validation/loss" in line
        ]

    for name in EXACT:
        for found, expected in zip(validation(name), validation(reference_of(name)), strict=True):
            assert found == pytest.approx(expected, abs=1e-4), name


@pytest.mark.parametrize("name", ["zero3", "pipe-tensor-sequence", *thorough("tensor", "pipe", "replicas")])
def test_the_preview_is_what_the_exported_model_draws(runs: Runs, name: str) -> None:
    job = runs.job(name, **(TWO | FOUR)[name])
    task = TransformerTask(from_dict(TransformerRun, job["run"], "test"))
    rows = evaluation_batches(task.samples("validation"), PREVIEW_ROWS, rank=0, world_size=1, rows=PREVIEW_ROWS)
    with torch.no_grad():
        drawn = task.preview(Dalle.from_pretrained(runs[name]), task.prepare(next(rows)))
    with Image.open(runs[name] / "samples" / f"step-{STEPS}.png") as kept:
        assert kept.tobytes() == drawn.tobytes()


def test_processes_that_divide_a_model_draw_what_one_draws(runs: Runs) -> None:
    pictures = []
    for processes in (1, 2):
        out = runs.folder / f"drawn-{processes}.png"
        command = ["--model", str(runs["reference"]), "--out", str(out)]
        command += ["--prompt", "a red circle", "--prompt", "a blue square", "--pictures", "3", "--dtype", "fp32"]
        done = run_ranks("launchers/generate.py", *command, processes=processes)
        assert done.returncode == 0, done.stdout + done.stderr
        assert f"wrote {out}" in done.stdout
        pictures.append(out.read_bytes())
    assert pictures[0] == pictures[1]


@pytest.mark.parametrize(("source", "target", "processes"), RESUMED)
def test_a_run_goes_on_in_another_layout(runs: Runs, source: str, target: str, processes: int) -> None:
    expected, found = metrics(runs[source]), metrics(runs[f"{source}-to-{target}"])
    if source == target and "rank" not in source:  # PowerSGD's error buffers are summed and shared out anew
        assert found == expected, "the same layout goes on bit for bit"
        return
    assert sorted(found) == sorted(expected)
    for step in range(HALF + 1, STEPS + 1):
        for figure in ("loss", "grad_norm", "lr"):
            assert found[step][figure] == pytest.approx(expected[step][figure], abs=1e-5), (step, figure)
    ours = load_file(runs[f"{source}-to-{target}"] / "export" / "model.safetensors")
    for weight, value in load_file(runs[source] / "export" / "model.safetensors").items():
        assert (ours[weight] - value).abs().max() < 2e-4, weight


def test_the_user_is_told_of_the_layout(runs: Runs) -> None:
    assert "4 × cpu (2 replicas × 2 shards)" in runs.output
    assert "4 × cpu (2 stages × 2 tensor parts)" in runs.output
    assert "gradients are averaged over 2 replicas in fp32" in runs.output
