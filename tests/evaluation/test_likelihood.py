"""Likelihoods: against slow sums in float64, and as probabilities that sum to 1."""

from __future__ import annotations

import math

import pytest
import torch

from dalle_ds.config import PADDING
from dalle_ds.evaluation.metrics import level_nats, pixel_nats, transformer_nats
from dalle_ds.models import Dalle, DiscreteVAE
from dalle_ds.models.dvae import EPSILON, logit_laplace_nll
from tests.conftest import TINY_DALLE, TINY_DVAE


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
