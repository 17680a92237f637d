"""What earlier versions left behind is gone on with: a run, its prepared data with cached codes, exports."""

from __future__ import annotations

import json
import tarfile
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from dalle_ds.sampling import TextToImage
from tests.conftest import ROOT
from tests.processes import run_ranks

FIXTURE = ROOT / "tests" / "fixtures" / "run_before_rooms.tar.xz"
"""Of version 0.1.0, November 2026: data/ (codes in .npy files), tokenizer.model, dvae/, transformer/ (4 updates); metrics and
export of straight/, a run of 8."""
OPTIONS = (
    "--preset toy --steps 8 --save_every 4 --seed 3 --loader.workers 0 --optim.warmup_steps 2 --train.batch_size 4 "
    "--report.log_every 1 --report.validate_every 4 --report.preview_every 0 --report.keep_checkpoints 1 --model.width 16 "
    "--model.depth 2 --model.heads 2 --model.text_len 8 --model.grid 8 --model.text_vocab 320 --model.image_vocab 16"
)


@pytest.fixture
def old(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    with tarfile.open(FIXTURE) as archive:
        archive.extractall(tmp_path, filter="data")
    monkeypatch.chdir(tmp_path)
    return tmp_path


def test_an_old_export_draws(old: Path) -> None:
    (images,) = TextToImage.from_pretrained(old / "transformer").generate("a red circle", num=2, seed=1)
    assert [image.size for image in images] == [(16, 16)] * 2


@pytest.mark.launch
def test_an_old_run_goes_on_as_if_nothing_had_happened(old: Path) -> None:
    done = run_ranks(
        "launchers/train_transformer.py",
        *(
            "--deepspeed_config",
            ROOT / "ds_configs" / "zero1_fp32.json",
            "--data",
            old / "data",
            "--dvae",
            old / "dvae",
        ),
        *("--tokenizer", old / "tokenizer.model", "--run_dir", old / "transformer", *OPTIONS.split()),
        processes=1,
    )
    assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-3000:]
    assert "resumed from" in done.stdout and "codes: cached" in done.stdout
    found, expected = (
        {line["step"]: line["loss"] for line in map(json.loads, path.read_text().splitlines()) if "loss" in line}
        for path in (old / "transformer" / "metrics.jsonl", old / "straight" / "metrics.jsonl")
    )
    assert found == pytest.approx(expected, abs=1e-5) and len(found) == 8
    weights = (load_file(old / run / "export" / "model.safetensors") for run in ("transformer", "straight"))
    for one, other in zip(*(each.values() for each in weights), strict=True):
        torch.testing.assert_close(one, other, atol=1e-5, rtol=1e-4)
