"""Codebook, likelihood, reconstruction and match with captions: against torchmetrics, slow sums, and as probabilities that sum
to 1."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torchmetrics.functional.image import peak_signal_noise_ratio
from torchmetrics.functional.retrieval import retrieval_hit_rate

from dalle_ds.config import PADDING
from dalle_ds.errors import DataError
from dalle_ds.evaluation import metrics
from dalle_ds.evaluation.metrics import (
    clip_scores,
    code_image,
    codebook_panel,
    codebook_usage,
    level_nats,
    pixel_nats,
    psnr,
    recalls,
    retrieval_ranks,
    ssim,
    transformer_nats,
)
from dalle_ds.models import Dalle, DiscreteVAE
from dalle_ds.models.dvae import EPSILON, logit_laplace_nll
from tests.conftest import TINY_DALLE, TINY_DVAE

# --- the codebook


@pytest.fixture(scope="module")
def vae() -> DiscreteVAE:
    torch.manual_seed(0)
    return DiscreteVAE(TINY_DVAE).eval()


def test_perplexity_is_the_number_of_codes_that_are_used_alike() -> None:
    assert codebook_usage(torch.tensor([5, 5, 5, 5])) == pytest.approx(
        {"perplexity": 4, "used": 4, "dead": 0, "usage": 1}
    )
    assert codebook_usage(torch.tensor([9, 0, 0, 0])) == pytest.approx(
        {"perplexity": 1, "used": 1, "dead": 3, "usage": 0.25}
    )
    share = np.array([3, 1]) / 4
    expected = float(np.exp(-(share * np.log(share)).sum()))
    assert codebook_usage(torch.tensor([3, 0, 1]))["perplexity"] == pytest.approx(expected)


def test_a_code_alone_is_the_middle_of_a_grid_full_of_it(vae: DiscreteVAE) -> None:
    whole = vae.decode(torch.full((1, 4, 4), 7))[0].permute(1, 2, 0).numpy() * 255
    found = np.asarray(code_image(vae, 7), dtype=np.float64)
    assert found.shape == (14, 14, 3)  # three codes of four pixels, and the frame
    assert np.abs(found[1:-1, 1:-1] - whole[2:14, 2:14]).max() <= 0.5
    assert (found[0] == metrics.OUTSIDE).all()


def test_examples_show_the_code_in_their_middle(vae: DiscreteVAE) -> None:
    """Images whose pixels are their code: each example is centred on the code's own colour."""
    codes = torch.randint(0, 32, (20, 4, 4), generator=torch.Generator().manual_seed(0))

    def picture(row: int) -> np.ndarray:
        shades = (7 * codes[row]).byte().numpy().repeat(4, axis=0).repeat(4, axis=1)
        return np.stack([shades] * 3, axis=-1)

    for code in (0, 31):
        patches = metrics._occurrences(vae, codes, code, picture)
        assert 1 <= len(patches) <= metrics.EXAMPLES
        for patch in patches:
            assert patch.size == (12, 12) and (np.asarray(patch)[4:8, 4:8] == 7 * code).all()
    assert codebook_panel(vae, codes, picture).width > 8 * 96


# --- likelihood


def test_nats_are_those_of_the_dense_logits() -> None:
    torch.manual_seed(0)
    model = Dalle(TINY_DALLE).eval()
    text = torch.randint(0, TINY_DALLE.text_vocab, (3, TINY_DALLE.text_len))
    text[0, 3:], text[1] = PADDING, PADDING
    codes = torch.randint(0, TINY_DALLE.image_vocab, (3, TINY_DALLE.image_len))
    output = model(text, codes)
    for logits, targets, found in zip(
        (output.text_logits, output.image_logits), (text, codes), transformer_nats(model, text, codes), strict=True
    ):
        for row in range(3):
            expected = 0.0
            for position, target in enumerate(targets[row].tolist()):
                if target != PADDING:
                    values = logits[row, position].tolist()
                    expected -= math.log(math.exp(values[target]) / sum(map(math.exp, values)))
            assert float(found[row]) == pytest.approx(expected, rel=1e-5)
    assert float(transformer_nats(model, text, codes)[0][1]) == 0  # a caption of padding alone


@pytest.mark.parametrize("log_b", [-12.0, -4.0, 0.0, 3.0])
@pytest.mark.parametrize("mu", [-30.0, -2.1, 0.0, 0.3, 9.0])
def test_levels_are_a_distribution(mu: float, log_b: float) -> None:
    levels = torch.arange(256, dtype=torch.uint8)
    nats = level_nats(levels, torch.full((256,), mu).double(), torch.full((256,), log_b).double())
    assert not nats.isnan().any() and float(nats.min()) >= -1e-12
    assert float(torch.exp(-nats).sum()) == pytest.approx(1, abs=1e-9)


@pytest.mark.parametrize("log_b", [-1.5, 0.0, 1.0])
def test_a_levels_probability_is_the_density_times_its_width(log_b: float) -> None:
    levels = torch.arange(1, 255, dtype=torch.uint8)
    step = (1 - 2 * EPSILON) / 255
    mu, scale = torch.full((254,), 0.2).double(), torch.full((254,), log_b).double()
    mapped = EPSILON + step * levels.double()
    # The mean of the density over each level's interval, by the midpoint rule.
    offsets = (torch.arange(64, dtype=torch.float64) + 0.5) / 64 - 0.5
    densities = torch.exp(-logit_laplace_nll(mapped[:, None] + step * offsets, mu[:, None], scale[:, None]))
    expected = -torch.log(densities.mean(dim=1) * step)
    assert torch.allclose(level_nats(levels, mu, scale), expected, atol=2e-4)


def test_a_picture_costs_what_its_levels_cost() -> None:
    torch.manual_seed(0)
    vae = DiscreteVAE(TINY_DVAE).eval()
    pixels = torch.randint(0, 256, (2, 3, 16, 16), dtype=torch.uint8)
    codes = vae.encode(pixels.float() / 255)
    nats = pixel_nats(vae, pixels, codes)
    density = vae.nll(pixels.float() / 255, codes).double() * 3 * 16 * 16
    # A density of 1 per unit of mapped pixels, which a level is a 255 / 0.8th of.
    rough = density + 3 * 16 * 16 * math.log(255 / (1 - 2 * EPSILON))
    assert nats.shape == (2,) and torch.allclose(nats, rough, rtol=0.02)


# --- reconstruction, and match with captions


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
