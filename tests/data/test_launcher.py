"""`launchers/prepare_data.py` as people call it."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest
import torch

from dalle_ds.config import DiscreteVAEConfig
from dalle_ds.data import CodesCache, PairDataset
from dalle_ds.data.images import center_crop_resize

ROOT = Path(__file__).resolve().parents[2]


def launch(*arguments: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "launchers/prepare_data.py", *arguments],
        cwd=ROOT,
        env={"PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1", "PATH": ""},
        capture_output=True,
        text=True,
        check=False,
    )


def test_mistakes_are_one_line_and_status_1(tmp_path: Path) -> None:
    result = launch("--corpus", "folder", "--source", str(tmp_path / "no"), "--out", str(tmp_path / "out"))
    assert result.returncode == 1
    assert result.stderr == f"error: source {tmp_path / 'no'} does not exist\n"
    assert not (tmp_path / "out").exists()


def test_prepare_and_cache_in_one_call(folder_corpus: Path, tmp_path: Path) -> None:
    models = pytest.importorskip("dalle_ds.models")
    torch.manual_seed(0)
    vae = models.DiscreteVAE(
        DiscreteVAEConfig(image_size=16, groups=2, blocks_per_group=1, encoder_width=8, decoder_width=8, vocab_size=32)
    )
    vae.save_pretrained(tmp_path / "dvae")
    out = tmp_path / "out"
    result = launch(
        *("--corpus", "folder", "--source", str(folder_corpus), "--out", str(out), "--validation", "0.3"),
        *("--filters.max_aspect_ratio", "1.5", "--cache_codes", str(tmp_path / "dvae"), "--views", "2"),
    )
    assert result.returncode == 0, result.stderr
    assert "dropped: aspect ratio" in result.stdout
    validation = PairDataset.open(out, "validation")
    cache = CodesCache.open(out, vae.fingerprint, "validation")
    picture = torch.from_numpy(center_crop_resize(validation.image(0), 16).copy()).permute(2, 0, 1)[None]
    assert cache.codes(0, 0).tolist() == vae.eval().encode(picture.float() / 255).flatten().tolist()
    assert CodesCache.open(out, vae.fingerprint, "train").views == 2
