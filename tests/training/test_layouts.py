"""One computation, many layouts: ZeRO stage, processes, micro-batches, checkpointing and interruption change nothing.

Three launches do everything: one process alone, two processes under every layout, and two processes that resume.
"""

from __future__ import annotations

import json
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from safetensors.torch import load_file

from dalle_ds.config import to_dict
from dalle_ds.sampling import TextToImage
from dalle_ds.training.export import export_checkpoint
from tests.conftest import EVERYTHING, TINY_DALLE, TINY_DVAE, thorough
from tests.processes import run_ranks

pytestmark = pytest.mark.launch

STEPS = 10
WORKER = Path(__file__).with_name("layouts_worker.py")
# Small parameters are not sharded by default, which would hide what sharding breaks.
SHARD_ALL = {"stage3_param_persistence_threshold": 0}
# The paper's optimizer and average, and what makes a resumed run of few updates depend on all of their state.
PAPER = {"moments": "16-bit", "stochastic_rounding": True, "second_moment_clip": 1e-4}
AVERAGED = {"average_every": 3, "average_device": "cpu"}
STAGES = {"fp32": (0, 3), "bf16": (1, 2), "fp16": (3,), "offloaded": (2,), "dvae": (1,)}
"""ZeRO stages that each kind of run is tried with."""
PLATEAU = thorough("plateau-resumed")
if EVERYTHING:
    STAGES = {"fp32": (0, 1, 2, 3), "bf16": (0, 1, 2, 3), "fp16": (0, 1, 2, 3), "offloaded": (2, 3), "dvae": (1, 3)}


def deepspeed_json(stage: int, precision: str = "fp32", offload: bool = False) -> dict[str, Any]:
    zero: dict[str, Any] = {"stage": stage, **(SHARD_ALL if stage == 3 else {})}
    if offload:
        zero["offload_optimizer"] = {"device": "cpu"}
    return {name: {"enabled": name == precision} for name in ("bf16", "fp16")} | {"zero_optimization": zero}


def launch(jobs: list[dict[str, Any]], processes: int, folder: Path) -> str:
    """Run the worker and return what it printed; fails the test with its output if it fails."""
    description = folder / f"jobs-{processes}-{len(jobs)}.json"
    description.write_text(json.dumps(jobs))
    done = run_ranks(WORKER, description, processes=processes)
    assert done.returncode == 0, done.stdout[-6000:] + done.stderr[-6000:]
    return done.stdout


def metrics(folder: Path) -> dict[int, dict[str, float]]:
    """Training metrics of a run: step → figures that do not depend on the clock."""
    records: dict[int, dict[str, float]] = {}
    for line in (folder / "metrics.jsonl").read_text().splitlines():
        record = json.loads(line)
        if "loss" in record:
            assert record["step"] not in records, "a step was recorded twice"
            records[record["step"]] = {
                name: value
                for name, value in record.items()
                if "second" not in name and "memory" not in name and name != "step"
            }
    return records


class Runs:
    """Everything that the tests below look at."""

    def __init__(self, folder: Path, data: Path, dvae: Path, tokenizer: Path) -> None:
        self.folder = folder
        common = {
            "data": str(data),
            "steps": STEPS,
            "seed": 3,
            "save_every": 4,
            "optim": {"lr": 1e-2, "warmup_steps": 3, "schedule": "cosine", "decay_steps": STEPS, "clip": 0.5},
            "loader": {"workers": 0},
            "report": {"log_every": 1, "validate_every": 5, "preview_every": 0},
        }
        reads = {"loader": {"workers": 0, "caption_dropout": 0.2}}
        self.transformer = {
            **common,
            **reads,
            "model": to_dict(TINY_DALLE),
            "dvae": str(dvae),
            "tokenizer": str(tokenizer),
        }
        self.dvae = {
            **common,
            "model": to_dict(TINY_DVAE),
            "objective": {"temperature_steps": 20, "kl_warmup_steps": 4},
        }
        reference = [self.job("reference", 0), self.job("dvae-reference", 0, stage="dvae")]
        reference += [self.job("unaveraged", 0, train={"average_every": STEPS + 1})]
        reference += [self.job("forgetful", 0, train={"average_decay": 0.0})]
        layouts = [self.job(f"zero{stage}", stage) for stage in STAGES["fp32"]]
        layouts += [self.job(f"zero{stage}-bf16", stage, precision="bf16", steps=4) for stage in STAGES["bf16"]]
        layouts += [self.job(f"zero{stage}-fp16", stage, precision="fp16") for stage in STAGES["fp16"]]
        half = {"precision": "fp16", "optim": PAPER, "train": AVERAGED}
        layouts += [self.job(f"offloaded{stage}", stage, offload=True) for stage in STAGES["offloaded"]]
        layouts += [self.job("fp16-accumulated", 2, precision="fp16", micro_batch=2, recompute="full")]
        layouts += [self.job("fp16-paper", 3, **half), self.job("fp16-resumed", 3, steps=6, **half)]
        layouts += [self.job(f"dvae-zero{stage}", stage, stage="dvae") for stage in STAGES["dvae"]]
        layouts += [self.job("accumulated", 2, micro_batch=2), self.job("checkpointed", 3, recompute="full")]
        layouts += [self.job("selective", 3, recompute="selective")]
        layouts += [self.job("resumed", 3, steps=6), self.job("dvae-resumed", 1, stage="dvae", steps=6)]
        # Half of nothing is an improvement here: the rate falls by half every other update.
        plateau = {"schedule": "plateau", "plateau_patience": 2, "plateau_smoothing": 0.0, "plateau_threshold": 0.99}
        layouts += [self.job("plateau", 1, optim=plateau)]
        layouts += [self.job(name, 1, optim=plateau, steps=6) for name in PLATEAU]
        resumed = [
            self.job("fp16-resumed", 3, **half),
            *(self.job(name, 1, optim=plateau) for name in PLATEAU),
            self.job("resumed", 3),
            self.job("dvae-resumed", 1, stage="dvae"),
        ]
        launch(reference, 1, folder)
        self.output = launch(layouts, 2, folder)
        self.resumed_output = launch(resumed, 2, folder)

    def job(
        self,
        name: str,
        zero: int,
        *,
        stage: str = "transformer",
        precision: str = "fp32",
        steps: int = STEPS,
        micro_batch: int | None = None,
        recompute: str = "none",
        optim: dict[str, Any] | None = None,
        train: dict[str, Any] | None = None,
        offload: bool = False,
    ) -> dict[str, Any]:
        base = self.transformer if stage == "transformer" else self.dvae
        train = {
            "batch_size": 8,
            "micro_batch": micro_batch,
            "average_decay": 0.9,
            **({"activation_checkpointing": recompute} if stage == "transformer" else {}),
            **(train or {}),
        }
        base = {**base, "optim": {**base["optim"], **(optim or {})}}
        run = {**base, "run_dir": str(self.folder / name), "steps": steps, "train": train}
        return {"name": name, "stage": stage, "run": run, "deepspeed": deepspeed_json(zero, precision, offload)}

    def __getitem__(self, name: str) -> Path:
        return self.folder / name


@pytest.fixture(scope="module")
def runs(tmp_path_factory: pytest.TempPathFactory, data: Path, dvae_export: Path, tokenizer_file: Path) -> Runs:
    return Runs(tmp_path_factory.mktemp("runs"), data, dvae_export, tokenizer_file)


OFFLOADED = [f"offloaded{stage}" for stage in STAGES["offloaded"]]
LAYOUTS = [f"zero{stage}" for stage in STAGES["fp32"]] + ["accumulated", "checkpointed", "selective", *OFFLOADED]
LAYOUTS += [f"dvae-zero{stage}" for stage in STAGES["dvae"]]


@pytest.mark.parametrize("name", LAYOUTS)
def test_a_layout_does_not_change_losses_norms_or_weights(runs: Runs, name: str) -> None:
    reference = "dvae-reference" if name.startswith("dvae") else "reference"
    expected, found = metrics(runs[reference]), metrics(runs[name])
    assert sorted(found) == list(range(1, STEPS + 1))
    # How many codes a micro-batch uses does depend on its size.
    compared = {"loss", "text_loss", "image_loss", "nll", "kl", "lr"}
    for step, figures in expected.items():
        for figure in compared & figures.keys():
            assert found[step][figure] == pytest.approx(figures[figure], rel=1e-5, abs=1e-5), (step, figure)
    ours = load_file(runs[name] / "export" / "model.safetensors")
    for weight, value in load_file(runs[reference] / "export" / "model.safetensors").items():
        assert (ours[weight] - value).abs().max() < 2e-4, weight


def test_the_losses_fall(runs: Runs) -> None:
    """Equal losses prove nothing if nothing is learned."""
    for name in ("reference", "dvae-reference"):
        losses = [figures["loss"] for figures in metrics(runs[name]).values()]
        assert losses[-1] < losses[0] - 0.1


@pytest.mark.parametrize("name", ["zero0", *thorough("zero1", "zero2"), "accumulated", "checkpointed", *OFFLOADED])
def test_reported_gradient_norms_agree_and_are_those_before_clipping(runs: Runs, name: str) -> None:
    expected = [figures["grad_norm"] for figures in metrics(runs["zero3"]).values()]
    found = [figures["grad_norm"] for figures in metrics(runs[name]).values()]
    assert found == pytest.approx(expected, rel=1e-4)
    assert max(found) > 0.5, "this test needs steps that are clipped"
    clipped = [figures["grad_norm_clipped"] for figures in metrics(runs[name]).values()]
    assert clipped == pytest.approx([min(norm, 0.5) for norm in found], rel=1e-5)


@pytest.mark.parametrize(
    ("name", "straight"),
    [
        ("resumed", "zero3"),
        ("dvae-resumed", "dvae-zero1"),
        *((name, "plateau") for name in PLATEAU),
        ("fp16-resumed", "fp16-paper"),
    ],
)
def test_a_resumed_run_continues_bit_for_bit(runs: Runs, name: str, straight: str) -> None:
    expected, found = metrics(runs[straight]), metrics(runs[name])
    assert found == expected
    ours = load_file(runs[name] / "export" / "model.safetensors")
    for weight, value in load_file(runs[straight] / "export" / "model.safetensors").items():
        assert bool((ours[weight] == value).all()), weight
    assert "resumed from" in runs.resumed_output


def test_the_rate_is_halved_on_a_plateau_of_the_training_loss(runs: Runs) -> None:
    rates = [figures["lr"] for figures in metrics(runs["plateau"]).values()]
    peak = max(rates)
    assert peak == 1e-2 and rates.index(peak) == 2, "the warm-up takes three updates"
    assert rates[-1] in (peak / 4, peak / 8)
    assert all(after in (before, before / 2) for before, after in pairwise(rates[2:]))


@pytest.mark.parametrize("stage", STAGES["bf16"])
def test_bf16_follows_fp32(runs: Runs, stage: int) -> None:
    expected, found = metrics(runs["reference"]), metrics(runs[f"zero{stage}-bf16"])
    for step in range(1, 5):
        assert found[step]["loss"] == pytest.approx(expected[step]["loss"], rel=0.02)
        assert found[step]["loss"] != expected[step]["loss"], "bf16 was not used"


@pytest.mark.parametrize("name", ["zero3", "zero2-bf16", *thorough("zero3-bf16", "accumulated")])
def test_every_run_exports_pictures_and_a_model_that_draws(runs: Runs, name: str) -> None:
    pipeline = TextToImage.from_pretrained(runs[name])
    (pictures,) = pipeline.generate("a red circle", num=2, seed=1)
    assert [picture.size for picture in pictures] == [(16, 16)] * 2
    assert list((runs[name] / "samples").glob("step-*.png"))


def test_validation_uses_the_averaged_weights_and_reports_them(runs: Runs) -> None:
    """Validation figures of the reference, recomputed from the exported, averaged weights."""
    from dalle_ds.config import TransformerRun, from_dict
    from dalle_ds.data import evaluation_batches
    from dalle_ds.models import Dalle
    from dalle_ds.tasks.transformer import TransformerTask

    saved = yaml.safe_load((runs["reference"] / "config.yaml").read_text())
    task = TransformerTask(from_dict(TransformerRun, saved["run"], "test"))
    model = Dalle.from_pretrained(runs["reference"])
    total = rows = 0.0
    with torch.no_grad():
        for batch in evaluation_batches(task.samples("validation"), 8, rank=0, world_size=1):
            batch = task.prepare(batch)
            logits = model(batch["text"], batch["codes"]).image_logits.log_softmax(-1)
            each = -logits.gather(-1, batch["codes"][..., None])[..., 0].mean(dim=1)
            total += float((each * batch["valid"]).sum())
            rows += float(batch["valid"].sum())
    assert rows == len(task.samples("validation"))
    lines = [json.loads(line) for line in (runs["reference"] / "metrics.jsonl").read_text().splitlines()]
    reported = [line["validation/image_loss"] for line in lines if "validation/image_loss" in line]
    assert len(reported) == 2
    assert reported[-1] == pytest.approx(total / rows, abs=1e-5)
    for name in ("zero3", "accumulated"):  # ZeRO-2 computes with copies of the weights that are averaged
        lines = [json.loads(line) for line in (runs[name] / "metrics.jsonl").read_text().splitlines()]
        found = [line["validation/image_loss"] for line in lines if "validation/image_loss" in line]
        assert found == pytest.approx(reported, abs=1e-4), name


@pytest.mark.parametrize("name", ["unaveraged", "forgetful"])
def test_an_average_of_nothing_or_of_the_last_weights_is_these(runs: Runs, name: str, tmp_path: Path) -> None:
    """`average_every` and `average_decay` reach the average: more updates than the run has, and 0, leave weights raw."""
    export_checkpoint(runs["reference"], weights="raw", out=tmp_path / "raw")
    found = load_file(runs[name] / "export" / "model.safetensors")
    expected = load_file(tmp_path / "raw" / "model.safetensors")
    assert found.keys() == expected.keys()
    assert all(torch.equal(found[name], expected[name]) for name in expected)


def test_a_finished_run_says_so_and_does_nothing(runs: Runs) -> None:
    before = (runs["reference"] / "metrics.jsonl").read_bytes()
    output = launch([runs.job("reference", 0)], 1, runs.folder)
    assert "is done: all 10 updates" in output
    assert (runs["reference"] / "metrics.jsonl").read_bytes() == before


@pytest.mark.parametrize("name", [*(f"zero{stage}-fp16" for stage in STAGES["fp16"]), "fp16-accumulated"])
def test_fp16_follows_fp32_in_every_layout(runs: Runs, name: str) -> None:
    expected, found = metrics(runs["reference"]), metrics(runs[name])
    assert sorted(found) == sorted(expected)
    for step, figures in expected.items():
        assert found[step]["loss"] == pytest.approx(figures["loss"], rel=1e-3)
        assert found[step]["grad_norm"] == pytest.approx(figures["grad_norm"], rel=5e-3)
    assert any(found[step]["loss"] != figures["loss"] for step, figures in expected.items()), "fp16 was not used"


def test_gradient_scales_start_at_the_papers_value_times_the_processes_and_grow(runs: Runs) -> None:
    records = metrics(runs["zero3-fp16"])
    for block in range(2 * TINY_DALLE.depth):
        scales = [records[step][f"gradient_scale/{block}"] for step in range(1, STEPS + 1)]
        assert scales == pytest.approx([2 * 2**13 * 2 ** (step / 1000) for step in range(1, STEPS + 1)], rel=1e-9)
