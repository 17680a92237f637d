"""Run directories and checkpoints: refused when they do not fit, never half-written."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path

import pytest
import torch
import yaml

from dalle_ds.config import DvaeRun, OptimConfig, ParallelConfig, ReportConfig, TrainConfig
from dalle_ds.errors import CheckpointError, ConfigError
from dalle_ds.optim import AdamW, WeightAverage
from dalle_ds.parallel import Mesh
from dalle_ds.training.checkpoint import (
    drop_checkpoints_after,
    load_checkpoint,
    load_state,
    newest_checkpoint,
    newest_good_checkpoint,
    save_checkpoint,
)
from dalle_ds.training.fragments import Fragment
from dalle_ds.training.run_directory import RunDirectory
from dalle_ds.training.weights import MasterWeights

pytestmark = pytest.mark.filterwarnings("ignore:torch.distributed is disabled")

ALONE = Mesh(rank=0, world_size=1, device=torch.device("cpu"))
RUN = DvaeRun(data="data", run_dir="run", steps=10)


def claimed(path: Path, run: DvaeRun = RUN) -> RunDirectory:
    directory = RunDirectory(path, "dvae", run)
    directory.claim()
    directory.write_config()
    return directory


def test_the_same_run_is_taken_up_again_and_free_fields_may_differ(tmp_path: Path) -> None:
    claimed(tmp_path / "run").release()
    longer = dataclasses.replace(RUN, steps=20, save_every=7, report=ReportConfig(log_every=1), data="moved")
    # How the work is divided is free too.
    longer = dataclasses.replace(
        longer, parallel=ParallelConfig(replicas=2), train=TrainConfig(zero_stage=3, micro_batch=4)
    )
    claimed(tmp_path / "run", longer).release()
    assert yaml.safe_load((tmp_path / "run" / "config.yaml").read_text())["run"]["steps"] == 20


def test_another_configuration_is_refused_with_its_differences(tmp_path: Path) -> None:
    claimed(tmp_path / "run").release()
    before = (tmp_path / "run" / "config.yaml").read_bytes()
    changed = dataclasses.replace(RUN, seed=1, optim=OptimConfig(lr=0.5))
    with pytest.raises(CheckpointError) as caught:
        RunDirectory(tmp_path / "run", "dvae", changed)
    assert "seed: 0 in the run, 1 now" in str(caught.value)
    assert "optim.lr: 0.00045 in the run, 0.5 now" in str(caught.value)
    assert "optim.beta1" not in str(caught.value)
    assert (tmp_path / "run" / "config.yaml").read_bytes() == before


def test_other_folders_are_refused(tmp_path: Path) -> None:
    claimed(tmp_path / "run").release()
    with pytest.raises(CheckpointError, match="holds a dvae run, this is transformer"):
        RunDirectory(tmp_path / "run", "transformer", RUN)
    (tmp_path / "notes").mkdir()
    (tmp_path / "notes" / "thesis.tex").write_text("dear to someone")
    with pytest.raises(CheckpointError, match="not empty and not a run"):
        RunDirectory(tmp_path / "notes", "dvae", RUN)
    (tmp_path / "file").write_text("")
    with pytest.raises(CheckpointError, match="is a file"):
        RunDirectory(tmp_path / "file", "dvae", RUN)
    with pytest.raises(ConfigError, match="--run_dir is missing"):
        RunDirectory("", "dvae", RUN)


def test_two_runs_in_one_directory_are_refused(tmp_path: Path) -> None:
    first = claimed(tmp_path / "run")
    with pytest.raises(CheckpointError, match="another run is training"):
        claimed(tmp_path / "run")
    first.release()
    claimed(tmp_path / "run").release()


def test_metrics_beyond_the_checkpoint_and_cut_off_lines_are_dropped(tmp_path: Path) -> None:
    directory = claimed(tmp_path / "run")
    lines = [json.dumps({"step": step, "loss": 1.0}) for step in range(1, 6)]
    directory.metrics_file.write_text("\n".join(lines) + '\n{"step": 6, "lo')
    directory.drop_metrics_after(3)
    assert [json.loads(line)["step"] for line in directory.metrics_file.read_text().splitlines()] == [1, 2, 3]
    directory.release()


def state(step: int) -> dict[str, object]:
    return {"step": step, "identity": {}, "layout": {}, "learning_rate": None, "scales": None, "guard": None}


class Weights(MasterWeights):
    """Of a model of one tensor, without an engine."""

    def __init__(self, value: float) -> None:
        self.shards = [torch.full((3,), float(value))]
        self.fragments = [Fragment("w", (3,), 0, 3, 0, 0)]
        self.published = False

    @property
    def group_of(self) -> list[int]:  # type: ignore[override]
        return [0] * len(self.shards)

    def publish(self) -> None:
        self.published = True


def save(folder: Path, step: int, keep: int = 2, **changes: object) -> Path:
    weights = Weights(step)
    optimizer, average = AdamW(weights.shards), WeightAverage(weights.shards, 0.9)
    moments = optimizer.begin(weights.shards[0], "fp32", step=step, index=7, ceiling=0.5)
    moments["exp_avg"].fill_(-step)
    moments["exp_avg_sq"].fill_(step / 2)
    return save_checkpoint(folder, step, state(step) | changes, weights, optimizer, ALONE, keep=keep, average=average)


def test_the_newest_complete_checkpoint_counts_and_old_ones_go(tmp_path: Path) -> None:
    for step in (2, 10, 9):
        save(tmp_path, step)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["step-10", "step-9"]
    newest = newest_checkpoint(tmp_path)
    assert newest is not None and newest.name == "step-10"
    weights = Weights(0.0)
    optimizer, average = AdamW(weights.shards, lr=0.5), WeightAverage(weights.shards, 0.9)
    load_checkpoint(newest, weights, optimizer, ALONE, average=average)
    assert weights.shards[0].tolist() == average.averages[0].tolist() == [10] * 3
    assert weights.published
    found = optimizer.state[weights.shards[0]]
    assert found["exp_avg"].tolist() == [-10] * 3 and found["exp_avg_sq"].tolist() == [5] * 3
    assert (float(found["step"]), found["index"], found["ceiling"]) == (10, 7, 0.5)
    assert optimizer.param_groups[0]["lr"] == 0.5
    assert load_state(newest) == state(10) | {"format": 2}


def test_a_checkpoint_written_amid_bad_updates_is_gone_past_and_removed(tmp_path: Path) -> None:
    for step, bad in ((1, 0), (2, 0), (3, 1)):
        save(tmp_path, step, keep=3, guard={"bad_in_a_row": bad, "losses": []})
    assert newest_checkpoint(tmp_path) == tmp_path / "step-3"
    assert newest_good_checkpoint(tmp_path) == tmp_path / "step-2"
    drop_checkpoints_after(tmp_path, 2)
    assert newest_checkpoint(tmp_path) == tmp_path / "step-2" and (tmp_path / "step-1").is_dir()
    assert newest_good_checkpoint(tmp_path / "nothing") is None


@pytest.mark.parametrize("place", ["dalle_ds.training.storage.os.fsync", "dalle_ds.training.checkpoint.sync_folder"])
def test_a_full_disk_leaves_nothing_half_written_and_is_told(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, place: str
) -> None:
    save(tmp_path, 1)

    def no_space(_: object) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(place, no_space)
    with pytest.raises(CheckpointError, match=r"step 2 to .*step-2 .*MiB free.*No space left.*free some space"):
        save(tmp_path, 2)
    assert [path.name for path in tmp_path.iterdir()] == ["step-1"]


def test_an_unfinished_checkpoint_is_not_taken(tmp_path: Path) -> None:
    save(tmp_path, 1)
    (tmp_path / "partial-step-2" / "tensors").mkdir(parents=True)
    (tmp_path / "step-3").mkdir()  # no state: the renaming of something incomplete by hand
    newest = newest_checkpoint(tmp_path)
    assert newest is not None and newest.name == "step-1"
    assert newest_checkpoint(tmp_path / "nowhere") is None


def test_a_broken_checkpoint_is_named(tmp_path: Path) -> None:
    final = save(tmp_path, 1)
    weights = Weights(0)
    file = final / "tensors" / "rank-0.safetensors"
    content = file.read_bytes()
    for harm, words in (
        (file.unlink, "broken or missing file"),
        (lambda: file.write_bytes(content[:-9]), "is cut off"),
    ):
        harm()
        with pytest.raises(
            CheckpointError, match=rf"step-1 cannot be loaded: .*{words}.*; delete it to resume from an older"
        ):
            load_checkpoint(final, weights, AdamW(weights.shards), ALONE)
    written = json.loads((final / "state.json").read_text())
    for broken, words in (
        ("{", "cannot be read"),
        ("{}", "it has no identity, layout, learning_rate, step"),
        ("[]", "it has no"),
        (json.dumps(written | {"format": 3}), "was written by another version of dalle_ds"),
        (
            json.dumps({k: v for k, v in written.items() if k != "format"}),
            "was written by an earlier version of dalle_ds",
        ),
    ):
        (final / "state.json").write_text(broken)
        with pytest.raises(CheckpointError, match=words):
            load_state(final)


def test_a_checkpoint_of_another_model_or_other_moments_is_refused(tmp_path: Path) -> None:
    final = save(tmp_path, 1)
    weights = Weights(0)
    with pytest.raises(CheckpointError, match=r"its moments are fp32, and optim.moments is 16-bit"):
        load_checkpoint(final, weights, AdamW(weights.shards, moments="16-bit"), ALONE)
    for fragment, words in (
        (Fragment("w", (1, 3), 0, 3, 0, 0), r"the model's w has shape \(1, 3\), and its has shape \(3,\)"),
        (Fragment("v", (3,), 0, 3, 0, 0), r"the model's v has shape \(3,\), and it has none"),
    ):
        weights.fragments = [fragment]
        with pytest.raises(CheckpointError, match=words):
            load_checkpoint(final, weights, AdamW(weights.shards), ALONE)
    weights.fragments = Weights(0).fragments
    unaveraged = save_checkpoint(tmp_path, 2, state(2), weights, AdamW(weights.shards), ALONE, keep=2, average=None)
    with pytest.raises(CheckpointError, match=r"average/w of 3 × 1 is needed, and .* has none"):
        load_checkpoint(unaveraged, weights, AdamW(weights.shards), ALONE, average=WeightAverage(weights.shards, 0.9))


def test_a_shard_that_was_not_updated_yet_is_begun_anew_by_its_first_update(tmp_path: Path) -> None:
    weights = Weights(0)
    final = save_checkpoint(tmp_path, 1, state(1), weights, AdamW(weights.shards), ALONE, keep=2)
    optimizer = AdamW(weights.shards)
    optimizer.begin(weights.shards[0], "fp32", step=9, index=0, ceiling=1.0)
    load_checkpoint(final, weights, optimizer, ALONE)
    assert not optimizer.state.get(weights.shards[0])


def test_a_parameter_that_was_never_updated_may_share_a_shard_with_one_that_was(tmp_path: Path) -> None:
    apart, together = Weights(0), Weights(0)
    apart.shards = [torch.ones(2), torch.full((1,), 2.0)]
    apart.fragments = [Fragment("a", (2,), 0, 2, 0, 0), Fragment("b", (1,), 0, 1, 1, 0)]
    optimizer = AdamW(apart.shards)
    optimizer.begin(apart.shards[0], "fp32", step=4, index=0, ceiling=1.0)["exp_avg"].fill_(3.0)
    final = save_checkpoint(tmp_path, 4, state(4), apart, optimizer, ALONE, keep=2)
    together.fragments = [Fragment("b", (1,), 0, 1, 0, 0), Fragment("a", (2,), 0, 2, 0, 1)]
    optimizer = AdamW(together.shards)
    load_checkpoint(final, together, optimizer, ALONE)
    assert together.shards[0].tolist() == [2, 1, 1]
    found = optimizer.state[together.shards[0]]
    assert found["exp_avg"].tolist() == [0, 3, 3] and float(found["step"]) == 4


def test_a_first_start_on_a_full_disk_can_be_repeated(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    directory = RunDirectory(tmp_path / "run", "dvae", RUN)
    directory.claim()
    with monkeypatch.context() as full:

        def no_space(handle: int) -> None:
            raise OSError(28, "No space left on device")

        full.setattr("dalle_ds.files.os.fsync", no_space)
        with pytest.raises(CheckpointError, match=r"cannot be written: .*No space left"):
            directory.write_config()
    directory.release()
    claimed(tmp_path / "run").release()


def test_what_killed_runs_left_unfinished_is_removed(tmp_path: Path) -> None:
    directory = claimed(tmp_path / "run")
    (directory.checkpoints / "partial-step-7").mkdir()
    directory.release()
    claimed(tmp_path / "run").release()
    assert not list(directory.checkpoints.iterdir())


def test_the_export_says_of_which_update_it_is(tmp_path: Path) -> None:
    directory = claimed(tmp_path / "run")
    assert directory.exported_step() is None
    directory.export.mkdir()
    assert directory.exported_step() is None
    directory.mark_exported(7)
    assert directory.exported_step() == 7
    directory.release()
