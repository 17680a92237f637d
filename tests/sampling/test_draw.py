"""From logits to a code: against `transformers`' logits warpers, and against the distribution itself."""

from __future__ import annotations

import pytest
import torch
from transformers import TopKLogitsWarper, TopPLogitsWarper

from dalle_ds.errors import ConfigError
from dalle_ds.sampling.draw import Sampling, candidate_uniforms, draw, guide, keep_top_k, keep_top_p

NO_TOKENS = torch.empty(0)


def random_logits(rows: int = 50, vocab: int = 40, scale: float = 3.0) -> torch.Tensor:
    return torch.randn(rows, vocab, generator=torch.Generator().manual_seed(0), dtype=torch.float64) * scale


@pytest.mark.parametrize("top_k", [1, 2, 7, 40, 1000])
def test_top_k_is_that_of_transformers(top_k: int) -> None:
    logits = random_logits().round()  # with ties
    assert torch.equal(keep_top_k(logits, top_k), TopKLogitsWarper(top_k)(NO_TOKENS, logits.clone()))


@pytest.mark.parametrize("top_p", [1e-9, 0.1, 0.5, 0.9, 0.999])
def test_top_p_is_that_of_transformers(top_p: float) -> None:
    logits = random_logits()
    assert torch.equal(keep_top_p(logits, top_p), TopPLogitsWarper(top_p)(NO_TOKENS, logits.clone()))


@pytest.mark.parametrize(
    "sampling",
    [Sampling(), Sampling(temperature=0.5), Sampling(2.0, top_k=4), Sampling(1.5, top_p=0.7), Sampling(1, 5, 0.8)],
)
def test_frequencies_are_the_probabilities(sampling: Sampling) -> None:
    """Evenly spaced uniform numbers hit each code in proportion to its probability, as `transformers` filters it."""
    logits = random_logits(rows=1, vocab=12, scale=1.5)
    count = 20_000
    uniforms = (torch.arange(count, dtype=torch.float64) + 0.5) / count
    drawn = draw(logits.expand(count, -1), uniforms, sampling)
    warped = logits / sampling.temperature
    if sampling.top_k is not None:
        warped = TopKLogitsWarper(sampling.top_k)(NO_TOKENS, warped)
    if sampling.top_p is not None:
        warped = TopPLogitsWarper(sampling.top_p)(NO_TOKENS, warped)
    frequencies = drawn.bincount(minlength=12).double() / count
    torch.testing.assert_close(frequencies, warped.softmax(-1)[0], atol=2 / count, rtol=0)


def test_extreme_uniform_numbers_never_draw_an_impossible_code() -> None:
    logits = torch.tensor([[-torch.inf, 0.3, 0.1, -torch.inf, 0.7, -torch.inf]]).expand(2, -1)
    uniforms = torch.tensor([0.0, 1 - 2**-53], dtype=torch.float64)
    assert draw(logits, uniforms, Sampling()).tolist() == [1, 4]


def test_temperature_0_is_the_likeliest_code() -> None:
    logits = random_logits()
    uniforms = torch.rand(len(logits), dtype=torch.float64)
    assert torch.equal(draw(logits, uniforms, Sampling(temperature=0)), logits.argmax(-1))


def test_guidance_is_the_formula() -> None:
    conditional, unconditional = random_logits(2)[:, :5], random_logits(4)[2:, :5]
    torch.testing.assert_close(guide(conditional, unconditional, 1.0), conditional)
    torch.testing.assert_close(guide(conditional, unconditional, 0.0), unconditional)
    torch.testing.assert_close(guide(conditional, unconditional, 3.0), 3 * conditional - 2 * unconditional)


def test_uniforms_depend_on_seed_candidate_and_caption() -> None:
    base = candidate_uniforms((1, 2, -1), 0, 0, 64)
    assert torch.equal(base, candidate_uniforms((1, 2, -1), 0, 0, 64))
    assert base.dtype == torch.float64
    for other in (((1, 2, -1), 1, 0), ((1, 2, -1), 0, 1), ((1, 3, -1), 0, 0)):
        assert not torch.isclose(base, candidate_uniforms(*other, 64)).any()
    many = torch.cat([candidate_uniforms((5,), 3, candidate, 1024) for candidate in range(20)])
    assert abs(many.mean().item() - 0.5) < 0.01
    assert abs(many.var().item() - 1 / 12) < 0.005


@pytest.mark.parametrize(
    ("arguments", "named"),
    [
        ({"temperature": -0.1}, "temperature .*-0.1"),
        ({"temperature": float("nan")}, "temperature .*nan"),
        ({"top_k": 0}, "top_k .*0"),
        ({"top_p": 0.0}, "top_p .*0.0"),
        ({"top_p": 1.5}, "top_p .*1.5"),
        ({"guidance": -1.0}, "guidance .*-1.0"),
        ({"guidance": float("inf")}, "guidance .*inf"),
    ],
)
def test_mistakes_are_named(arguments: dict, named: str) -> None:
    with pytest.raises(ConfigError, match=named):
        Sampling(**arguments)
