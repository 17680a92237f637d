"""benchmarks/duplicates.py: the methods that the detector is compared with are what they are called."""

from __future__ import annotations

import runpy
import sys
from pathlib import Path
from types import SimpleNamespace

import imagehash
import numpy as np
import pytest
import torch
from PIL import Image

from dalle_ds.config import DuplicateDetectorConfig
from dalle_ds.models.duplicates import DuplicateDetector
from tests.conftest import ROOT


@pytest.fixture(scope="module")
def bench() -> SimpleNamespace:
    sys.path.insert(0, str(ROOT / "benchmarks"))
    try:
        return SimpleNamespace(**runpy.run_path(str(ROOT / "benchmarks" / "duplicates.py"), run_name="duplicates"))
    finally:
        sys.path.remove(str(ROOT / "benchmarks"))


def test_similarities_are_bits_and_squares(bench: SimpleNamespace) -> None:
    pictures = [np.random.default_rng(seed).integers(0, 256, (32, 32, 3), dtype=np.uint8) for seed in range(5)]
    hashes = [imagehash.phash(Image.fromarray(picture)) for picture in pictures]
    method = bench.PerceptualHash()
    known = method.describe(pictures)
    differing = [[one - other for other in hashes] for one in hashes]
    assert np.array_equal(64 - method.similarities(known, known), differing)
    method = bench.PixelDistance()
    known = method.describe(pictures)
    floats = np.stack(pictures).astype(np.float64) / 255
    squares = ((floats[:, None] - floats[None]) ** 2).mean(axis=(2, 3, 4))
    np.testing.assert_allclose(-method.similarities(known, known), squares, atol=1e-5)


def test_variants_by_tone_and_gender_are_one_family(bench: SimpleNamespace) -> None:
    names = ("man guard: dark skin tone", "guard", "woman guard", "guard: light skin tone")
    assert {bench.family(name) for name in names} == {"guard"}
    assert bench.family("flag of Iceland") != bench.family("flag of Norway")


def test_figures_are_shares_and_weak_distortions_are_found_best(
    bench: SimpleNamespace, data: Path, tmp_path: Path
) -> None:
    torch.manual_seed(0)
    config = DuplicateDetectorConfig(image_size=16, width=4, blocks=(1, 1), stem_halvings=0, embed_dim=16)
    DuplicateDetector(config).save_pretrained(tmp_path / "detector")
    figures = bench.measure(bench.Options(detector=str(tmp_path / "detector"), data=str(data), copies=30))
    assert figures["copies"] == 30 and figures["others"] > 5
    for found in figures["methods"].values():
        for values in found.values():
            assert all(0 <= value <= 1 for value in values.values())
            assert values["recall at 0%"] <= values["recall at 1%"]
        weak, strong = found["one or two distortions"], found["all at once"]
        assert weak["nearest is the source"] > strong["nearest is the source"]
