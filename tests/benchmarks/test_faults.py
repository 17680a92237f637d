"""benchmarks/faults.py at a tiny size: a short storm, and one damaged checkpoint, on two processes."""

from __future__ import annotations

import importlib
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest

from tests.conftest import ROOT, TINY_DALLE


@pytest.fixture
def faults(monkeypatch: pytest.MonkeyPatch) -> ModuleType:
    monkeypatch.syspath_prepend(str(ROOT / "benchmarks"))
    return importlib.import_module("faults")


@pytest.fixture
def runs(faults: ModuleType, tmp_path: Path, data: Path, dvae_export: Path, tokenizer_file: Path) -> Any:
    shape = [
        word
        for name in ("width", "depth", "heads", "text_len", "grid", "text_vocab", "image_vocab")
        for word in (f"--model.{name}", str(getattr(TINY_DALLE, name)))
    ]
    options = "--preset toy --train.batch_size 8 --loader.workers 0 --optim.warmup_steps 3"
    made = faults.Runs(tmp_path, (*options.split(), *shape))
    made.data, made.dvae, made.tokenizer = data, dvae_export, tokenizer_file
    return made


@pytest.mark.slow
@pytest.mark.launch
def test_a_short_storm_and_a_damaged_file(faults: ModuleType, runs: Any, capsys: pytest.CaptureFixture[str]) -> None:
    options = faults.Options(kills=4, steps=150, seed=5)
    (storm,) = faults.storm(runs, options, print)
    assert (storm.tried, storm.passed) == (4, 4), capsys.readouterr().out
    assert "the undisturbed run’s weights, checkpoint and metrics; " in storm.happened
    (damage,) = faults.damage(
        runs, options, print, files=["tensors/rank-1.safetensors"], kinds=["with one bit flipped"]
    )
    assert (damage.tried, damage.passed) == (1, 1), capsys.readouterr().out


@pytest.mark.slow
@pytest.mark.launch
def test_a_run_that_is_not_the_same_is_told_apart(faults: ModuleType, runs: Any, tmp_path: Path) -> None:
    for name, more in (("one", ()), ("other", ("--optim.lr", "1e-3"))):
        runs.finish(tmp_path / name, "--steps", "2", *more)
    assert faults.same(tmp_path / "one", tmp_path / "other") == [
        "other weights",
        "another last checkpoint",
        "other metrics",
    ]
    assert faults.same(tmp_path / "one", tmp_path / "one") == []
    lines = (tmp_path / "one" / "metrics.jsonl").read_text()
    (tmp_path / "one" / "metrics.jsonl").write_text(lines + lines)
    assert "updates missing or twice in the metrics" in faults.same(tmp_path / "one", tmp_path / "one")
