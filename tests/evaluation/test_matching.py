"""Retrieval against torchmetrics, CLIP score, reconstruction figures."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from torchmetrics.functional.image import peak_signal_noise_ratio
from torchmetrics.functional.retrieval import retrieval_hit_rate

from dalle_ds.errors import DataError
from dalle_ds.evaluation import metrics
from dalle_ds.evaluation.metrics import clip_scores, psnr, recalls, retrieval_ranks, ssim


def unit(count: int, seed: int) -> torch.Tensor:
    return F.normalize(torch.randn(count, 8, generator=torch.Generator().manual_seed(seed)), dim=-1)


def test_recalls_are_hit_rates(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(metrics, "BLOCK", 16)  # more than one block
    text = unit(50, 0)
    image = F.normalize(text + 0.9 * unit(50, 1), dim=-1)
    found = recalls(retrieval_ranks(image, text), 50)
    for k in (1, 5, 10):
        hits = [retrieval_hit_rate(row, torch.arange(50) == index, top_k=k) for index, row in enumerate(text @ image.T)]
        assert found[f"retrieval_at_{k}"] == pytest.approx(float(torch.stack(hits).mean()), abs=1e-6)
    assert 0.2 < found["retrieval_at_1"] < found["retrieval_at_5"] < 1


def test_several_captions_may_have_one_picture() -> None:
    image, text = unit(3, 2), unit(3, 2)[[0, 0, 2, 1]]
    assert retrieval_ranks(image, text, torch.tensor([0, 0, 2, 1])).tolist() == [0, 0, 0, 0]


def test_equal_pictures_are_no_retrieval() -> None:
    image, text = unit(1, 3).expand(20, -1), unit(20, 4)
    assert retrieval_ranks(image, text).tolist() == [19] * 20


def test_pictures_that_are_equal_but_for_rounding_are_no_retrieval() -> None:
    """Such as those of one image that was embedded in batches of several sizes."""
    noise = 1e-7 * torch.randn(20, 8, generator=torch.Generator().manual_seed(1))
    assert retrieval_ranks(unit(1, 3) + noise, unit(20, 4)).tolist() == [19] * 20


def test_cutoffs_that_all_pictures_are_within_say_nothing() -> None:
    assert list(recalls(torch.zeros(5, dtype=torch.int64), 5)) == ["retrieval_at_1"]


def test_embeddings_that_are_not_numbers_are_told() -> None:
    with pytest.raises(DataError, match="not numbers"):
        retrieval_ranks(unit(3, 5) * float("nan"), unit(3, 5))


def test_clip_score_is_a_hundredfold_cosine_and_never_negative() -> None:
    text = torch.eye(3)
    image = torch.stack([text[0], F.normalize(text[0] + text[1], dim=0), -text[2]])
    assert clip_scores(image, text).tolist() == pytest.approx([100, 100 / 2**0.5, 0])


def test_psnr_is_torchmetrics_for_each_picture() -> None:
    generator = torch.Generator().manual_seed(6)
    one, other = (torch.randint(0, 256, (3, 3, 20, 20), dtype=torch.uint8, generator=generator) for _ in range(2))
    expected = [peak_signal_noise_ratio(a / 255, b / 255, data_range=1.0) for a, b in zip(one, other, strict=True)]
    assert psnr(one, other).tolist() == pytest.approx([float(value) for value in expected], abs=1e-4)
    assert psnr(one, one).tolist() == [100] * 3


def test_ssim_is_one_of_each_picture_and_1_for_equal_ones() -> None:
    generator = torch.Generator().manual_seed(7)
    one = torch.randint(0, 256, (3, 3, 20, 20), dtype=torch.uint8, generator=generator)
    other = one.clone()
    other[1] = torch.randint(0, 256, (3, 20, 20), dtype=torch.uint8, generator=generator)
    found = ssim(one, other)
    assert found.shape == (3,) and found[[0, 2]].tolist() == pytest.approx([1, 1], abs=1e-6) and found[1] < 0.2
