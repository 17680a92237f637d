"""What a run does when numbers go wrong: in one block, in the loss, for long. One launch on two processes shows all of it."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

import pytest
from safetensors.torch import load_file

from dalle_ds.config import to_dict
from tests.conftest import EVERYTHING, TINY_DALLE, thorough
from tests.processes import run_ranks
from tests.training.test_layouts import deepspeed_json, metrics

pytestmark = pytest.mark.launch

STEPS = 12
BLOCKS = 2 * TINY_DALLE.depth
WORKER = Path(__file__).with_name("faults_worker.py")
FIRST, SECOND = 1, 3
"""Blocks whose gradients are poisoned."""
WINDOW = 3
STAGES = (0, 1, 2, 3) if EVERYTHING else (0, 3)
OFFLOADED = (2, 3) if EVERYTHING else (2,)
LOSS_RUNS = ["fp32-zero0", "fp32-zero2", "bf16-zero1", "bf16-zero3", "fp16-zero3", "bf16-offloaded2"]
LOSS_RUNS += thorough("fp32-zero1", "fp32-zero3", "bf16-zero0", "bf16-zero2", "fp16-zero0", "fp16-zero1", "fp16-zero2")
LOSS_RUNS += thorough("bf16-offloaded1", "bf16-offloaded3")
GRADIENTS = {"2": FIRST, "3": FIRST, "4": SECOND, "6": FIRST}
"""In the third update the first block's; within the window again; then the second's; and the first's after the window."""


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
            "save_every": 4,
            "optim": {"lr": 1e-2, "warmup_steps": 3, "schedule": "cosine", "decay_steps": STEPS, "clip": 0.5},
            "train": {"batch_size": 8, "average_decay": 0.9},
            "loader": {"workers": 0},
            "report": {
                "log_every": 1,
                "validate_every": 0,
                "preview_every": 0,
                "numerics_every": 5,
                "background_saves": False,  # one that is still being written would put off the next
            },
        }
        jobs = [self.job(f"update-zero{stage}", stage, "fp16", {"gradients": GRADIENTS}) for stage in STAGES]
        jobs += [self.job("block", 3, "fp16", {"gradients": GRADIENTS}, skip="block")]
        jobs += [self.job("clean", 3, "fp16", {})]
        for stage in OFFLOADED:
            faults = {"gradients": GRADIENTS}
            jobs += [self.job(f"block-offloaded{stage}", stage, "fp16", faults, skip="block", offload=True)]
        # Ended in the midst of bad updates, and taken up again: the second of them leads back past that checkpoint.
        jobs += [self.job("prolonged", 3, "bf16", {"losses": [7]}, guard={"patience": 2}, steps=8)]
        jobs += [self.job("prolonged", 3, "bf16", {"losses": [0]}, guard={"patience": 2})]
        jobs += [self.job("straddling", 1, "fp32", {"losses": [7]})]
        # At the floor from the beginning: no scale can help.
        always = {"gradients": {str(call): FIRST for call in range(99)}}
        jobs += [self.job("floor", 1, "fp16", always, guard={"patience": 4}, scaling={"initial_log2": 7.0})]
        for layout in LOSS_RUNS:
            precision, stage = layout.split("-")[0], int(layout[-1])
            # The very first update too: nothing has any state yet.
            faults = {"losses": [0, 5, 6]}
            jobs.append(self.job(f"loss-{layout}", stage, precision, faults, offload="offloaded" in layout))
        jobs += [self.job("back", 3, "fp16", {"losses": [5, 6]}, guard={"patience": 2})]
        for _ in thorough("back-dense"):
            jobs += [self.job("back-dense", 0, "fp32", {"losses": [5, 6]}, guard={"patience": 2})]
        jobs += [self.job("spikes", 1, "bf16", {"spikes": [9, 10]}, guard={"patience": 2, "window": 4})]
        forever = {"losses": list(range(5, 99))}
        jobs += [self.job("hopeless", 2, "bf16", forever, guard={"patience": 2, "rollbacks": 2})]
        jobs += [self.job("early", 3, "fp32", {"losses": [0, 1, 2]}, guard={"patience": 3})]
        description = folder / "jobs.json"
        description.write_text(json.dumps(jobs))
        done = run_ranks(WORKER, description, processes=2)
        assert done.returncode == 0, done.stdout[-6000:] + done.stderr[-6000:]
        self.output = done.stdout

    def job(
        self,
        name: str,
        zero: int,
        precision: str,
        faults: dict[str, Any],
        *,
        skip: str = "update",
        guard: Any = None,
        offload: bool = False,
        scaling: Any = None,
        steps: int = STEPS,
    ) -> dict[str, Any]:
        scaling = {"window": WINDOW, "skip": skip, **(scaling or {})}
        run = {
            **self.base,
            "run_dir": str(self.folder / name),
            "steps": steps,
            "scaling": scaling,
            "guard": guard or {},
        }
        return {"name": name, "run": run, "deepspeed": deepspeed_json(zero, precision, offload), "faults": faults}

    def __getitem__(self, name: str) -> Path:
        return self.folder / name

    def scales(self, name: str, block: int) -> list[float]:
        """log2 of a block's scale after each update, for one process."""
        records = metrics(self[name])
        return [math.log2(records[step][f"gradient_scale/{block}"] / 2) for step in sorted(records)]


@pytest.fixture(scope="module")
def runs(tmp_path_factory: pytest.TempPathFactory, data: Path, dvae_export: Path, tokenizer_file: Path) -> Runs:
    return Runs(tmp_path_factory.mktemp("faults"), data, dvae_export, tokenizer_file)


@pytest.mark.parametrize("name", [*(f"update-zero{stage}" for stage in STAGES), "block", "block-offloaded2"])
def test_the_right_scale_drops_once_in_its_window_and_no_other_moves(runs: Runs, name: str) -> None:
    grown = 1 / 1000
    for block in range(BLOCKS):
        expected, scale, last = [], 13.0, -WINDOW
        for update in range(STEPS):
            poisoned = GRADIENTS.get(str(update))
            if poisoned == block and update - last >= WINDOW:
                scale, last = scale - 0.5, update
            elif poisoned is None or (name.startswith("block") and poisoned != block):
                scale += grown
            expected.append(scale)
        assert runs.scales(name, block) == pytest.approx(expected, abs=1e-9), block


@pytest.mark.parametrize("name", [f"update-zero{stage}" for stage in STAGES])
def test_an_update_with_non_finite_gradients_is_skipped_and_training_goes_on(runs: Runs, name: str) -> None:
    records = metrics(runs[name])
    assert records[STEPS]["skipped_updates_total"] == len(GRADIENTS)
    assert [step for step in records if records[step]["grad_norm"] is None] == [3, 4, 5, 7]
    assert all(math.isfinite(records[step]["loss"]) for step in records)
    assert records[STEPS]["loss"] < records[1]["loss"] - 0.1
    for weight, value in load_file(runs[name] / "export" / "model.safetensors").items():
        assert bool(value.isfinite().all()), weight


def test_skipping_does_not_depend_on_the_zero_stage(runs: Runs) -> None:
    expected = [figures["loss"] for figures in metrics(runs["update-zero0"]).values()]
    for stage in STAGES[1:]:
        found = [figures["loss"] for figures in metrics(runs[f"update-zero{stage}"]).values()]
        assert found == pytest.approx(expected, rel=1e-3)


def test_under_the_block_policy_all_other_blocks_are_updated(runs: Runs) -> None:
    clean, block = metrics(runs["clean"]), metrics(runs["block"])
    assert "skipped_updates_total" not in block[STEPS]
    assert [block[step]["loss"] for step in (1, 2, 3)] == [clean[step]["loss"] for step in (1, 2, 3)]
    assert block[4]["loss"] != clean[4]["loss"], "the first block was updated all the same"
    assert block[3]["grad_norm"] < clean[3]["grad_norm"], "its gradient was counted in the norm"
    assert block[STEPS]["loss"] < block[1]["loss"] - 0.1
    for weight, value in load_file(runs["block"] / "export" / "model.safetensors").items():
        assert bool(value.isfinite().all()), weight


@pytest.mark.parametrize("stage", OFFLOADED)
def test_offload_changes_nothing_of_the_block_policy(runs: Runs, stage: int) -> None:
    expected = [figures["loss"] for figures in metrics(runs["block"]).values()]
    found = [figures["loss"] for figures in metrics(runs[f"block-offloaded{stage}"]).values()]
    assert found == pytest.approx(expected, rel=1e-4)


def test_no_checkpoint_is_written_while_updates_are_bad(runs: Runs) -> None:
    """Update 8 is bad and a multiple of save_every: it is saved after the next."""
    saved = sorted(path.name for path in (runs["straddling"] / "checkpoints").iterdir())
    assert saved == ["latest", "step-12", "step-9"]


def test_overflow_that_no_scale_can_help_ends_the_run(runs: Runs) -> None:
    assert "floor rank 0 TrainingError: 4 updates in a row went wrong, up to update 4" in runs.output


@pytest.mark.parametrize("layout", LOSS_RUNS)
def test_a_loss_that_is_not_finite_on_one_rank_changes_nothing_anywhere(runs: Runs, layout: str) -> None:
    name = f"loss-{layout}"
    records = metrics(runs[name])
    assert [step for step in records if records[step]["loss"] is None] == [1, 6, 7]
    assert records[STEPS]["skipped_updates_total"] == 3
    assert "update 6 is left out: loss nan, gradient norm nan" in runs.output
    if layout.startswith("fp16"):
        expected = [13 + sum(u not in (0, 5, 6) for u in range(update + 1)) / 1000 for update in range(STEPS)]
        for block in range(BLOCKS):
            assert runs.scales(name, block) == pytest.approx(expected, abs=1e-9), "a bad loss is no overflow"
    assert records[STEPS]["loss"] < records[2]["loss"] - 0.1
    for weight, value in load_file(runs[name] / "export" / "model.safetensors").items():
        assert bool(value.isfinite().all()), weight


@pytest.mark.parametrize(
    ("name", "went_wrong", "back_to"),
    [("back", 7, 4), ("spikes", 11, 8), ("prolonged", 9, 4), *((name, 7, 4) for name in thorough("back-dense"))],
)
def test_a_run_goes_back_to_its_last_good_checkpoint_and_leaves_out_the_data(
    runs: Runs, name: str, went_wrong: int, back_to: int
) -> None:
    (event,) = json.loads((runs[name] / "rollbacks.json").read_text())
    assert event == {"from_update": went_wrong, "to_update": back_to, "skip_from": back_to, "skip_to": went_wrong}
    assert f"WENT BACK to step {back_to}: 2 updates in a row went wrong" in " ".join(runs.output.split())
    records = metrics(runs[name])  # fails where a step is recorded twice
    assert sorted(records) == list(range(1, STEPS + 1))
    assert all(math.isfinite(figures["loss"]) for figures in records.values())
    assert (runs[name] / "export" / "model.safetensors").is_file()


def test_what_a_run_goes_back_to_is_exactly_what_it_was(runs: Runs) -> None:
    """Up to the checkpoint, the losses are those of the undisturbed run; after it, they are those of other data."""
    clean, back = metrics(runs["clean"]), metrics(runs["back"])
    assert [back[step] for step in range(1, 5)] == [clean[step] for step in range(1, 5)]
    assert back[5]["loss"] != clean[5]["loss"]
    assert [back[5][name] for name in ("lr", "gradient_scale/0")] == [clean[5][n] for n in ("lr", "gradient_scale/0")]


def test_going_back_again_and_again_ends_with_a_typed_error_on_every_rank(runs: Runs) -> None:
    for rank in range(2):
        assert f"hopeless rank {rank} TrainingError: 2 updates in a row went wrong" in runs.output
    assert "2 times of going back to an earlier checkpoint have not helped: look at the data" in runs.output
    assert len(json.loads((runs["hopeless"] / "rollbacks.json").read_text())) == 2


def test_before_the_first_checkpoint_there_is_nothing_to_go_back_to(runs: Runs) -> None:
    assert "early rank 0 TrainingError: 3 updates in a row went wrong, up to update 3" in runs.output
    assert "there is no checkpoint yet to go back to" in runs.output


def test_histograms_of_exponents_count_every_parameter(runs: Runs) -> None:
    lines = [json.loads(line) for line in (runs["update-zero3"] / "numerics.jsonl").read_text().splitlines()]
    assert [line["step"] for line in lines] == [5, 10]
    bad, good = (line["blocks"] for line in lines)
    assert sorted(good) == sorted([*map(str, range(BLOCKS)), "others"])
    assert bad[str(SECOND)]["nonfinite"] > 0
    assert all(bad[block]["nonfinite"] == 0 for block in bad if block != str(SECOND))
    weights = load_file(runs["update-zero3"] / "export" / "model.safetensors")
    for block in range(BLOCKS):
        counted = sum(good[str(block)]["exponents"].values()) + good[str(block)]["zero"]
        size = sum(value.numel() for name, value in weights.items() if name.startswith(f"blocks.{block}."))
        assert counted == size
        assert good[str(block)]["log2_scale"] == pytest.approx(runs.scales("update-zero3", block)[8], abs=1e-5)
