"""Run directories and checkpoints: refused when they do not fit, never half-written."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path

import pytest
import torch
import yaml

from dalle_ds.config import DvaeRun, OptimConfig, ReportConfig
from dalle_ds.errors import CheckpointError, ConfigError
from dalle_ds.optim import WeightAverage
from dalle_ds.parallel import Mesh
from dalle_ds.training.checkpoint import (
    drop_checkpoints_after,
    load_checkpoint,
    load_state,
    newest_checkpoint,
    newest_good_checkpoint,
    save_checkpoint,
)
from dalle_ds.training.run_directory import RunDirectory

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


class Engine:
    """The two calls of a DeepSpeed engine that checkpoints use, with one tensor."""

    def __init__(self, value: float, disk: float | None = None) -> None:
        self.value = torch.tensor([value])
        self.disk = disk

    def save_checkpoint(self, folder: str, tag: str, save_latest: bool) -> None:
        (Path(folder) / tag).mkdir()
        (Path(folder) / tag / "weights").write_text(str(self.value.item()))
        if self.disk is not None:
            raise OSError(28, "No space left on device")

    def load_checkpoint(self, folder: str, tag: str) -> tuple[str | None, dict]:
        self.value = torch.tensor([float((Path(folder) / tag / "weights").read_text())])
        return folder, {}


def test_the_newest_complete_checkpoint_counts_and_old_ones_go(tmp_path: Path) -> None:
    for step in (2, 10, 9):
        shard = torch.tensor([float(step)])
        save_checkpoint(tmp_path, step, Engine(step), WeightAverage([shard], 0.9), state(step), ALONE, keep=2)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["step-10", "step-9"]
    newest = newest_checkpoint(tmp_path)
    assert newest is not None and newest.name == "step-10"
    engine, shard = Engine(0.0), torch.zeros(1)
    average = WeightAverage([shard], 0.9)
    load_checkpoint(newest, engine, average, ALONE)
    assert engine.value.item() == average.averages[0].item() == 10
    assert load_state(newest) == state(10)


def test_a_checkpoint_written_amid_bad_updates_is_gone_past_and_removed(tmp_path: Path) -> None:
    for step, bad in ((1, 0), (2, 0), (3, 1)):
        written = state(step) | {"guard": {"bad_in_a_row": bad, "losses": []}}
        save_checkpoint(tmp_path, step, Engine(step), None, written, ALONE, keep=3)
    assert newest_checkpoint(tmp_path) == tmp_path / "step-3"
    assert newest_good_checkpoint(tmp_path) == tmp_path / "step-2"
    drop_checkpoints_after(tmp_path, 2)
    assert newest_checkpoint(tmp_path) == tmp_path / "step-2" and (tmp_path / "step-1").is_dir()
    assert newest_good_checkpoint(tmp_path / "nothing") is None


def test_a_full_disk_leaves_nothing_half_written_and_is_told(tmp_path: Path) -> None:
    save_checkpoint(tmp_path, 1, Engine(1), None, state(1), ALONE, keep=2)
    with pytest.raises(CheckpointError, match=r"step 2 to .*step-2 .*MiB free.*No space left.*free some space"):
        save_checkpoint(tmp_path, 2, Engine(2, disk=0.0), None, state(2), ALONE, keep=2)
    assert [path.name for path in tmp_path.iterdir()] == ["step-1"]


def test_an_unfinished_checkpoint_is_not_taken(tmp_path: Path) -> None:
    save_checkpoint(tmp_path, 1, Engine(1), None, state(1), ALONE, keep=2)
    (tmp_path / "partial-step-2" / "engine").mkdir(parents=True)
    (tmp_path / "step-3").mkdir()  # no state: the renaming of something incomplete by hand
    newest = newest_checkpoint(tmp_path)
    assert newest is not None and newest.name == "step-1"
    assert newest_checkpoint(tmp_path / "nowhere") is None


def test_a_broken_checkpoint_is_named(tmp_path: Path) -> None:
    final = save_checkpoint(tmp_path, 1, Engine(1), None, state(1), ALONE, keep=2)
    (final / "engine" / "weights").unlink()
    with pytest.raises(
        CheckpointError, match=r"step-1 has a broken or missing file.*delete it to resume from an older one"
    ):
        load_checkpoint(final, Engine(0), None, ALONE)
    for broken, words in (
        ("{", "cannot be read"),
        ("{}", "it has no identity, layout, learning_rate, step"),
        ("[]", "it has no"),
    ):
        (final / "state.json").write_text(broken)
        with pytest.raises(CheckpointError, match=words):
            load_state(final)


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
