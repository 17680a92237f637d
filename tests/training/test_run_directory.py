"""Run directories and checkpoints: refused when they do not fit, never half-written."""

from __future__ import annotations

import dataclasses
import json
import os
import signal
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml

from dalle_ds.config import (
    ClipRun,
    DvaeRun,
    OptimConfig,
    ParallelConfig,
    RecomputingTrainConfig,
    ReportConfig,
    Run,
    SharpnessConfig,
    TrainConfig,
    TransformerLoaderConfig,
    TransformerRun,
    to_dict,
)
from dalle_ds.errors import CheckpointError, ConfigError
from dalle_ds.parallel import Mesh
from dalle_ds.training.export import read_run
from dalle_ds.training.launch import parse_command
from dalle_ds.training.run_directory import RunDirectory
from tests.conftest import ROOT

pytestmark = pytest.mark.filterwarnings("ignore:torch.distributed is disabled")

ALONE = Mesh(rank=0, world_size=1, device=torch.device("cpu"))
RUN = DvaeRun(data="data", run_dir="run", steps=10)


def claimed(path: Path, run: DvaeRun = RUN) -> RunDirectory:
    directory = RunDirectory(path, "dvae", run)
    directory.claim()
    directory.write_config({})
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


@pytest.mark.parametrize(("stage", "run"), [("dvae", RUN), ("clip", ClipRun(data="data", run_dir="run", steps=10))])
def test_a_run_of_when_every_stage_took_all_settings_is_taken_up_again(tmp_path: Path, stage: str, run: Run) -> None:
    """They were in every `config.yaml`, whatever was done with them; nothing else is forgiven."""
    file = tmp_path / "run" / "config.yaml"
    directory = RunDirectory(tmp_path / "run", stage, run)
    directory.claim()
    directory.write_config({})
    directory.release()
    content = yaml.safe_load(file.read_text())
    content["run"]["loader"] |= {"codes": "auto", "caption_dropout": 0.1, "bpe_dropout": 0.1}
    content["run"]["train"] |= {"activation_checkpointing": "full"}
    content["run"]["optim"]["moments"] = "16-bit"  # did nothing; a checkpoint says which it has
    file.write_text(yaml.safe_dump(content))
    if stage == "clip":
        run = dataclasses.replace(run, train=RecomputingTrainConfig(activation_checkpointing="full"))
    assert read_run(tmp_path / "run")[0] == stage
    directory = RunDirectory(tmp_path / "run", stage, run)
    directory.claim()
    directory.write_config({})
    directory.release()
    saved = yaml.safe_load(file.read_text())["run"]
    assert "bpe_dropout" not in saved["loader"]
    content["run"]["loader"]["max_reading"] = 3
    file.write_text(yaml.safe_dump(content))
    with pytest.raises(ConfigError, match="max_reading"):
        RunDirectory(tmp_path / "run", stage, run)


def test_a_transformer_keeps_the_settings_that_only_it_has(tmp_path: Path) -> None:
    run = TransformerRun(data="data", run_dir="run", loader=TransformerLoaderConfig(bpe_dropout=0.2))
    directory = RunDirectory(tmp_path / "run", "transformer", run)
    directory.claim()
    directory.write_config({})
    directory.release()
    with pytest.raises(CheckpointError, match=r"loader\.bpe_dropout: 0\.2 in the run, 0\.1 now"):
        RunDirectory(tmp_path / "run", "transformer", dataclasses.replace(run, loader=TransformerLoaderConfig()))


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


@pytest.mark.parametrize(
    ("stage", "kind", "preset", "began_with", "options"),
    [
        (
            "transformer",
            TransformerRun,
            "dalle-1b",
            {"model": {"width": 1280, "heads": 20}},
            "--model.width 1280 --model.heads 20",
        ),
        ("clip", ClipRun, "dalle-12b", {"sharpness": {"pairs": None}}, "--sharpness.pairs None"),
        (
            "dvae",
            DvaeRun,
            "toy",
            {"data_weights": [2, 1], "optim": {"clip": 0.5}},
            "--data_weights 2 1 --optim.clip 0.5",
        ),
    ],
)
def test_the_refusal_ends_with_the_options_that_resume(
    tmp_path: Path, stage: str, kind: type[Run], preset: str, began_with: dict[str, Any], options: str
) -> None:
    command = ["--preset", preset, "--deepspeed_config", str(ROOT / "ds_configs" / "zero1_fp32.json")]
    command += ["--data", "a", "b", "--run_dir", str(tmp_path)]
    run = parse_command(kind, stage, command).run
    content = to_dict(run)
    for name, value in began_with.items():
        content[name] = {**content[name], **value} if isinstance(value, dict) else value
    (tmp_path / "config.yaml").write_text(yaml.safe_dump({"stage": stage, "run": content}))
    with pytest.raises(CheckpointError) as caught:
        RunDirectory(tmp_path, stage, run)
    assert str(caught.value).endswith(options)
    RunDirectory(tmp_path, stage, parse_command(kind, stage, [*command, *options.split()]).run)


def test_replicas_that_once_perturbed_by_themselves_are_groups_of_pairs_now(tmp_path: Path) -> None:
    sharp = {"sharpness": SharpnessConfig(rho=0.1), "train": RecomputingTrainConfig(batch_size=48)}
    run = ClipRun(data="data", run_dir="run", **sharp)  # type: ignore[arg-type]
    for replicas, pairs in ((1, None), (3, 16)):
        content = to_dict(dataclasses.replace(run, parallel=ParallelConfig(replicas=replicas)))
        del content["sharpness"]["pairs"]
        (tmp_path / "config.yaml").write_text(yaml.safe_dump({"stage": "clip", "run": content}))
        if pairs is not None:
            with pytest.raises(CheckpointError, match=r"--sharpness\.pairs 16$"):
                RunDirectory(tmp_path, "clip", run)
        RunDirectory(tmp_path, "clip", dataclasses.replace(run, sharpness=SharpnessConfig(rho=0.1, pairs=pairs)))
        content["sharpness"]["pairs"] = None  # a run of now, whose replicas share a perturbation
        (tmp_path / "config.yaml").write_text(yaml.safe_dump({"stage": "clip", "run": content}))
        RunDirectory(tmp_path, "clip", run)


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


def test_a_first_start_on_a_full_disk_can_be_repeated(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    directory = RunDirectory(tmp_path / "run", "dvae", RUN)
    directory.claim()
    with monkeypatch.context() as full:

        def no_space(handle: int) -> None:
            raise OSError(28, "No space left on device")

        full.setattr("dalle_ds.files.os.fsync", no_space)
        with pytest.raises(CheckpointError, match=r"cannot be written: .*No space left"):
            directory.write_config({})
    directory.release()
    claimed(tmp_path / "run").release()


def test_what_killed_runs_left_unfinished_is_removed(tmp_path: Path) -> None:
    directory = claimed(tmp_path / "run")
    (directory.checkpoints.path / "partial-step-7").mkdir()
    directory.release()
    claimed(tmp_path / "run").release()
    assert not list(directory.checkpoints.path.iterdir())


def test_the_export_says_of_which_update_it_is(tmp_path: Path) -> None:
    directory = claimed(tmp_path / "run")
    assert directory.exported_step() is None
    directory.export.mkdir()
    assert directory.exported_step() is None
    directory.mark_exported(7)
    assert directory.exported_step() == 7
    directory.release()


def test_a_first_start_that_was_killed_while_it_wrote_can_be_repeated(tmp_path: Path) -> None:
    (tmp_path / "run").mkdir()
    left = tmp_path / "run" / ".config.yaml.partial-123"
    left.write_text("stage: dv")
    claimed(tmp_path / "run").release()
    assert not left.exists()


def test_validation_that_is_due_again_is_forgotten(tmp_path: Path) -> None:
    directory = claimed(tmp_path / "run")
    records = [{"step": 2, "loss": 1.0}, {"step": 3, "loss": 1.0}, {"step": 3, "validation/loss": 2.0}]
    directory.metrics_file.write_text("".join(json.dumps(record) + "\n" for record in records))
    before = directory.metrics_file.stat().st_ino
    directory.drop_metrics_after(3)
    assert directory.metrics_file.stat().st_ino == before, "nothing is written where nothing goes"
    directory.drop_metrics_after(3, unvalidated=True)
    assert [json.loads(line) for line in directory.metrics_file.read_text().splitlines()] == records[:2]
    directory.release()


def test_what_a_run_learns_from_and_its_name_elsewhere_are_kept(tmp_path: Path) -> None:
    directory = RunDirectory(tmp_path / "run", "dvae", RUN)
    assert directory.identity() is None and directory.wandb_id() is None
    directory.claim()
    directory.write_config({"data": "abc"})
    directory.keep_wandb_id(None)
    assert directory.wandb_id() is None
    directory.keep_wandb_id("x1")
    directory.keep_wandb_id(None)
    assert directory.identity() == {"data": "abc"} and directory.wandb_id() == "x1"
    (tmp_path / "run" / "identity.json").write_text("[")
    with pytest.raises(CheckpointError, match=r"identity.json cannot be read .*: restore it"):
        directory.identity()
    for step in (0, 7):
        directory.note_start(step, "1 × cpu")
    assert directory.starts() == 2
    directory.release()


def test_the_lock_goes_with_the_process_though_its_workers_live_on(tmp_path: Path) -> None:
    script = f"""
import os, signal, time
from tests.training.test_run_directory import RUN, RunDirectory
directory = RunDirectory({str(tmp_path / "run")!r}, "dvae", RUN)
directory.claim()
if os.fork() == 0:
    time.sleep(20)
print("claimed", flush=True)
os.kill(os.getpid(), signal.SIGKILL)
"""
    process = subprocess.Popen([sys.executable, "-c", script], stdout=subprocess.PIPE, cwd=ROOT, start_new_session=True)
    try:
        process.wait(120)
        directory = RunDirectory(tmp_path / "run", "dvae", RUN)
        directory.claim()
        directory.release()
    finally:
        os.killpg(process.pid, signal.SIGKILL)
