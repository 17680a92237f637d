"""The diffusion prior: its causal order, the shared prefix, the cache, nulls and padding."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from torch import Tensor

from dalle_ds.config import PriorConfig
from dalle_ds.errors import ConfigError, DataError
from dalle_ds.models.prior import Caption, DiffusionPrior
from dalle_ds.models.prior_sampling import CachedPrior, DenoisingWeights

TOKENS = PriorConfig(width=32, depth=3, heads=4, text_len=7, embed_dim=12, text_vocab=50)
STATES = PriorConfig(width=32, depth=3, heads=4, text_len=7, embed_dim=12, text="clip_states", text_width=20)


def prior_of(config: PriorConfig) -> DiffusionPrior:
    torch.manual_seed(0)
    prior = DiffusionPrior(config)
    with torch.no_grad():  # fresh embeddings are so small that mistakes with them would not show
        for parameter in prior.parameters():
            parameter.add_(0.2 * torch.randn_like(parameter))
    return prior


def caption_of(config: PriorConfig, rows: int = 3) -> Caption:
    generator = torch.Generator().manual_seed(1)
    padded = torch.arange(config.text_len) >= torch.tensor([3, 7, 5])[:rows, None]
    embedding = torch.randn(rows, config.embed_dim, generator=generator)
    if config.text == "tokens":
        text = torch.randint(config.text_vocab, (rows, config.text_len), generator=generator)
        return Caption(text.masked_fill(padded, -1), embedding)
    return Caption(torch.randn(rows, config.text_len, config.text_width, generator=generator), embedding, padded)


def noised_of(config: PriorConfig, rows: int = 3, draws: int = 4) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(2)
    return (
        torch.randn(rows, draws, config.embed_dim, generator=generator),
        torch.randint(1000, (rows, draws), generator=generator),
    )


def repeated(caption: Caption, draws: int) -> Caption:
    return Caption(*(None if part is None else part.repeat_interleave(draws, 0) for part in caption))  # type: ignore[arg-type]


@pytest.mark.parametrize("mask_padding", [False, True])
@pytest.mark.parametrize("config", [TOKENS, STATES])
def test_draws_over_one_prefix_are_as_many_rows(config: PriorConfig, mask_padding: bool) -> None:
    """Predictions and gradients."""
    prior, caption, (noised, times) = (
        prior_of(replace(config, mask_padding=mask_padding)),
        caption_of(config),
        noised_of(config),
    )
    together = prior(caption, noised, times)
    apart = prior(repeated(caption, 4), noised.flatten(0, 1)[:, None], times.flatten()[:, None])
    torch.testing.assert_close(together, apart.view_as(together), rtol=1e-5, atol=1e-5)
    gradients = []
    for output in (together, apart):
        prior.zero_grad()
        output.square().mean().backward()
        gradients.append([p.grad.clone() for p in prior.parameters() if p.grad is not None])
    assert len(gradients[0]) == len(gradients[1]) > 40
    for one, other in zip(*gradients, strict=True):
        torch.testing.assert_close(one, other, rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize("mask_padding", [False, True])
@pytest.mark.parametrize(("rows", "draws"), [(1, 1), (3, 1), (3, 4)])
@pytest.mark.parametrize("config", [TOKENS, STATES])
def test_the_cache_changes_nothing(config: PriorConfig, rows: int, draws: int, mask_padding: bool) -> None:
    """Neither in what order steps come, nor whose weights were made ready before."""
    prior = prior_of(replace(config, mask_padding=mask_padding)).eval()
    caption, weights, timesteps = caption_of(config, rows), DenoisingWeights(prior), torch.tensor([3, 500, 999])
    for guided in (False, True):
        cached = CachedPrior(weights, caption, draws, timesteps, guided)
        for number in (2, 0, 1, 2):
            noised = number + noised_of(config, rows * (1 + guided), draws)[0]
            with torch.no_grad():
                want = [
                    prior(caption, part, timesteps[number].expand(rows, draws), dropped=torch.tensor([null] * rows))
                    for null, part in zip((False, True), noised.split(rows), strict=False)
                ]
            torch.testing.assert_close(cached(noised, number), torch.cat(want), rtol=1e-5, atol=1e-5)


def test_the_cache_of_a_bf16_prior() -> None:
    prior, caption, timesteps = prior_of(STATES).eval(), caption_of(STATES), torch.tensor([3, 500])
    noised, _ = noised_of(STATES)
    with torch.no_grad():
        want = prior(caption, noised, timesteps[1].expand(3, 4))
    found = CachedPrior(DenoisingWeights(prior.bfloat16()), caption, 4, timesteps)(noised, 1)
    assert found.dtype == torch.float32
    assert 0 < (found - want).abs().max() < 0.05 * want.abs().max()


@pytest.mark.parametrize("config", [TOKENS, STATES])
def test_masked_padding_may_be_trimmed(config: PriorConfig) -> None:
    prior, (noised, times) = prior_of(replace(config, mask_padding=True)), noised_of(config, rows=1)
    caption = caption_of(config, rows=1)  # 3 tokens of 7
    short = Caption(caption.text[:, :4], caption.embedding, None if caption.padded is None else caption.padded[:, :4])
    for dropped in (None, torch.ones(1, dtype=torch.bool)):
        found = (prior(some, noised, times, dropped=dropped) for some in (caption, short))
        torch.testing.assert_close(*found, rtol=1e-5, atol=1e-5)
    attended = prior_of(replace(config, mask_padding=False))
    assert (attended(caption, noised, times) - attended(short, noised, times)).abs().max() > 1e-3


def test_a_dropped_caption_says_nothing_and_the_noised_embedding_stays() -> None:
    prior, caption, (noised, times) = prior_of(TOKENS), caption_of(TOKENS), noised_of(TOKENS)
    other = Caption(caption.text.flip(0), caption.embedding.flip(0))
    everything = torch.ones(3, dtype=torch.bool)
    with torch.no_grad():
        null = prior(caption, noised, times, dropped=everything)
        torch.testing.assert_close(prior(other, noised, times, dropped=everything), null)
        assert (prior(other, noised, times) - prior(caption, noised, times)).abs().max() > 1e-2
        # Guidance with a null that forgot x_t would not depend on it.
        assert (prior(caption, noised + 1, times, dropped=everything) - null).abs().max() > 1e-2
        assert (prior(caption, noised, (times + 300) % 1000, dropped=everything) - null).abs().max() > 1e-2
        some = prior(caption, noised, times, dropped=torch.tensor([False, True, False]))
        torch.testing.assert_close(some[1], null[1])
        torch.testing.assert_close(some[0], prior(caption, noised, times)[0])


def test_denoisings_do_not_see_each_other() -> None:
    prior, caption, (noised, times) = prior_of(TOKENS), caption_of(TOKENS), noised_of(TOKENS)
    noised = noised.requires_grad_()
    output = prior(caption, noised, times)
    (gradient,) = torch.autograd.grad(output[:, 2].sum(), noised)
    assert gradient[:, 2].any() and not gradient[:, [0, 1, 3]].any()


def test_the_prefix_is_causal_too() -> None:
    """A prefix's keys and values may be kept only if nothing behind it, and no later text, changes them."""
    prior, caption = prior_of(TOKENS), caption_of(TOKENS)
    noised, times = noised_of(TOKENS)
    seen: list[Tensor] = []
    handle = prior.blocks[4].register_forward_hook(lambda module, inputs, output: seen.append(output))  # type: ignore[arg-type]
    with torch.no_grad():
        prior(caption, noised, times)
        prior(caption, noised + 1, times)
        later = caption.text.clone()
        later[:, 2] = (later[:, 2] + 1) % 50
        prior(Caption(later, caption.embedding), noised, times)
    handle.remove()
    length = TOKENS.text_len + 1
    assert torch.equal(seen[0][:, :length], seen[1][:, :length])
    torch.testing.assert_close(seen[0][:, :2], seen[2][:, :2])
    assert (seen[0][:, 2] - seen[2][:, 2]).abs().max() > 1e-3


def test_a_callers_tensors_stay() -> None:
    prior, caption, (noised, times) = prior_of(STATES), caption_of(STATES), noised_of(STATES)
    copies = [tensor.clone() for tensor in (*caption[:3], noised, times)]  # type: ignore[union-attr]
    prior(caption, noised, times, dropped=torch.tensor([True, False, True]))
    CachedPrior(DenoisingWeights(prior), caption, 4, times[0])(noised, 0)
    assert all(torch.equal(a, b) for a, b in zip((*caption[:3], noised, times), copies, strict=True))  # type: ignore[arg-type]


@pytest.mark.parametrize(("depth", "millions"), [(20, 1024), (24, 1226)])
def test_the_papers_prior_has_about_a_billion_parameters(depth: int, millions: int) -> None:
    """Reading a CLIP's states of width 1,024: what was counted on `diffusers`' modules, within 0.1 %."""
    with torch.device("meta"):
        prior = DiffusionPrior(PriorConfig(depth=depth, text="clip_states", text_len=77, embed_dim=768, text_width=768))
    found = sum(parameter.numel() for parameter in prior.parameters())
    assert found == pytest.approx(millions * 1e6, rel=2e-3)


def test_wrong_shapes_are_refused() -> None:
    prior, caption, (noised, times) = prior_of(TOKENS), caption_of(TOKENS), noised_of(TOKENS)
    for bad in (
        (caption, noised[:, 0], times),
        (caption, noised[..., :5], times),
        (caption, noised, times[:, :2]),
        (Caption(caption.text.repeat(1, 2), caption.embedding), noised, times),
        (Caption(caption.text, caption.embedding[:, :5]), noised, times),
    ):
        with pytest.raises(DataError):
            prior(*bad)
    for fields in ({"heads": 5}, {"width": 0}, {"text": "bytes"}, {"dropout": 1.0}):
        with pytest.raises(ConfigError):
            PriorConfig(**fields)  # type: ignore[arg-type]
