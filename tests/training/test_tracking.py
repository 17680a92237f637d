"""What is written and shown while a run goes on."""

from __future__ import annotations

import json
import math
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from dalle_ds.config import ReportConfig, Run, TrainConfig
from dalle_ds.errors import ConfigError
from dalle_ds.parallel import Mesh
from dalle_ds.training.tracking import Tracker


def tracker(path: Path, rank: int = 0, **report: object) -> Tracker:
    """Of one of two processes."""
    run = Run(steps=10, train=TrainConfig(batch_size=8), report=ReportConfig(**report))  # type: ignore[arg-type]
    task: Any = SimpleNamespace(
        run=run, name="transformer", items_per_sample=lambda: ("tokens", 100), flops_per_sample=lambda: 5e9
    )
    return Tracker(path, task, Mesh(rank, 2, torch.device("cpu")), start_step=0)


def test_metrics_are_one_json_object_per_line(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    with tracker(tmp_path / "metrics.jsonl", peak_tflops=0.1) as track:
        track.log(1, {"loss": 2.0}, seconds=0.5)
        track.log(2, {"loss": math.nan})
        track.log(10, {"loss": 1.0}, seconds=2.0)
    first, second, _ = [json.loads(line) for line in (tmp_path / "metrics.jsonl").read_text().splitlines()]
    assert first["step"] == 1 and first["loss"] == 2.0
    assert first["samples_per_second"] == 16 and first["tokens_per_second"] == 1600
    # 16 samples/s of 5 GFLOP on two devices of 0.1 TFLOP/s
    assert first["mfu"] == pytest.approx(16 * 5e9 / 2e11)
    assert first["peak_memory_bytes"] > 1e6
    assert second == {"step": 2, "loss": None}
    shown = capsys.readouterr().out
    assert "step 10/10, loss 1.0000, 4 samples/s, 400 tokens/s, MFU 10.0%" in shown


def test_other_ranks_write_and_say_nothing(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    with tracker(tmp_path / "metrics.jsonl", rank=1) as track:
        track.log(1, {"loss": 2.0}, seconds=0.5)
        track.say("hello")
    assert not (tmp_path / "metrics.jsonl").exists()
    assert capsys.readouterr().out == ""


def test_a_resumed_run_appends(tmp_path: Path) -> None:
    for step in (1, 2):
        with tracker(tmp_path / "metrics.jsonl") as track:
            track.log(step, {"loss": 1.0}, seconds=1.0)
    assert len((tmp_path / "metrics.jsonl").read_text().splitlines()) == 2


def test_wandb_without_its_package_is_told(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(__import__("sys").modules, "wandb", None)
    with pytest.raises(ConfigError, match="pip install wandb"):
        tracker(tmp_path / "metrics.jsonl", wandb="offline")


def test_wandb_offline_keeps_the_run_in_its_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("WANDB_SILENT", "true")
    with tracker(tmp_path / "metrics.jsonl", wandb="offline") as track:
        track.log(1, {"loss": 2.0}, seconds=0.5)
        assert track.run_id
    assert list((tmp_path / "wandb").glob(f"offline-run-*-{track.run_id}/*.wandb"))
