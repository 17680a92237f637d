"""The autoregressive prior: its causal order, the cache, nulls, sizes."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from dalle_ds.config import LatentPriorConfig
from dalle_ds.errors import ConfigError, DataError
from dalle_ds.models.latent_prior import AutoregressivePrior, LatentSampler

SMALL = {"text_width": 24, "text_depth": 2, "text_heads": 4, "text_len": 6, "text_vocab": 40, "width": 32, "depth": 2}
SMALL |= {"heads": 4, "embed_dim": 12, "components": 9, "buckets": 16, "similarity_buckets": 8}
CONFIG = LatentPriorConfig(**SMALL)


def prior_of(**changes: object) -> AutoregressivePrior:
    torch.manual_seed(0)
    prior = AutoregressivePrior(LatentPriorConfig(**(SMALL | changes)))  # type: ignore[arg-type]
    with torch.no_grad():  # fresh embeddings are so small that mistakes with them would not show
        for parameter in prior.parameters():
            parameter.add_(0.2 * torch.randn_like(parameter))
    return prior


def inputs() -> tuple[Tensor, Tensor, Tensor, Tensor]:
    generator = torch.Generator().manual_seed(1)
    text = torch.randint(40, (3, 6), generator=generator)
    text[0, 3:] = -1
    codes = torch.randint(16, (3, 9), generator=generator)
    return text, torch.randn(3, 12, generator=generator), torch.tensor([0, 7, 3]), codes


def test_the_loss_is_the_cross_entropy_of_the_logits() -> None:
    prior, batch = prior_of(), inputs()
    loss, logits = prior(*batch, logits=True)
    chunked, none = prior(*batch)
    assert logits.shape == (3, 9, 16) and none is None
    torch.testing.assert_close(loss, F.cross_entropy(logits.reshape(27, 16), batch[3].reshape(27)))
    torch.testing.assert_close(chunked, loss, rtol=1e-5, atol=1e-5)


def test_a_code_is_predicted_from_the_ones_before_it_only() -> None:
    prior, (text, embedding, similarity, codes) = prior_of(), inputs()
    _, logits = prior(text, embedding, similarity, codes, logits=True)
    for place in range(9):
        changed = codes.clone()
        changed[:, place] = (changed[:, place] + 1) % 16
        _, other = prior(text, embedding, similarity, changed, logits=True)
        difference = (other - logits).abs().amax(dim=(0, 2))
        assert not difference[: place + 1].any()
        if place < 8:
            assert difference[place + 1] > 1e-3


@pytest.mark.parametrize("place", [0, 5])
def test_all_of_the_caption_counts_whatever_its_order(place: int) -> None:
    """The encoder is not causal: its first states see the last token."""
    prior, (text, embedding, similarity, codes) = prior_of(), inputs()
    states, _ = prior.encode(text)
    changed = text.clone()
    changed[1:, place] = (changed[1:, place] + 1) % 40
    assert ((prior.encode(changed)[0] - states)[1:].abs().amax(dim=2) > 1e-3).all()
    for bad in ((text, embedding + 1, similarity, codes), (text, embedding, (similarity + 1) % 8, codes)):
        assert (
            prior(*bad, logits=True)[1] - prior(text, embedding, similarity, codes, logits=True)[1]
        ).abs().max() > 1e-2


@pytest.mark.parametrize("mask_padding", [False, True])
def test_sampling_by_the_cache_equals_the_whole_pass(mask_padding: bool) -> None:
    prior, (text, embedding, similarity, codes) = prior_of(mask_padding=mask_padding).eval(), inputs()
    dropped = torch.tensor([False, True, False])
    with torch.no_grad():
        _, logits = prior(text, embedding, similarity, codes, dropped=dropped, logits=True)
    sampler = LatentSampler(prior, text, embedding, similarity, dropped)
    for place in range(9):
        torch.testing.assert_close(sampler.logits, logits[:, place], rtol=1e-4, atol=1e-4)
        if place < 8:
            sampler.step(codes[:, place])
    with pytest.raises(ConfigError):
        sampler.step(codes[:, 8])


def test_masked_padding_may_be_trimmed() -> None:
    """Also of dropped captions, which must not depend on how far others of a batch reach."""
    prior, (text, *others) = prior_of(mask_padding=True), inputs()
    first = [part[:1] for part in others]  # 3 tokens of 6
    for dropped in (None, torch.ones(1, dtype=torch.bool)):
        found = (prior(some, *first, dropped=dropped, logits=True)[1] for some in (text[:1], text[:1, :4]))
        torch.testing.assert_close(*found, rtol=1e-5, atol=1e-5)
    empty = prior(torch.full((1, 2), -1), *first, logits=True)[1]
    assert bool(empty.isfinite().all())
    whole, short = (prior_of()(some, *first, logits=True)[1] for some in (text[:1], text[:1].clamp(min=0)))
    assert (whole - short).abs().max() > 1e-3


def test_buckets_that_are_near_begin_alike() -> None:
    torch.manual_seed(0)
    prior = AutoregressivePrior(LatentPriorConfig(**(SMALL | {"buckets": 64, "width": 512})))  # type: ignore[arg-type]
    for weight, std in ((prior.code_input.weight, 0.02), (prior.head.weight, (3 * 512) ** -0.5)):
        rows = F.normalize(weight.detach(), dim=1)
        distance = torch.arange(64) - torch.arange(64)[:, None]
        torch.testing.assert_close(rows @ rows.T, torch.exp(-0.5 * (distance / 32).square()), rtol=0, atol=0.15)
        assert float(weight.detach().std()) == pytest.approx(std, rel=0.1)


def test_a_dropped_caption_says_nothing() -> None:
    prior, (text, embedding, similarity, codes) = prior_of(), inputs()
    everything = torch.ones(3, dtype=torch.bool)
    null = prior(text, embedding, similarity, codes, dropped=everything, logits=True)[1]
    other = prior(text.flip(0), embedding.flip(0), similarity, codes, dropped=everything, logits=True)[1]
    torch.testing.assert_close(other, null)
    assert (
        prior(text, embedding, similarity.flip(0), codes, dropped=everything, logits=True)[1] - null
    ).abs().max() > 1e-2


def test_checkpointing_changes_nothing() -> None:
    gradients = []
    for checkpointing in ("none", "full"):
        prior = prior_of()
        prior.checkpointing = prior.text_encoder.checkpointing = checkpointing  # type: ignore[assignment]
        prior(*inputs())[0].backward()
        gradients.append([parameter.grad for parameter in prior.parameters() if parameter.grad is not None])
    for one, other in zip(*gradients, strict=True):
        torch.testing.assert_close(one, other)
    with pytest.raises(ConfigError):
        AutoregressivePrior(CONFIG, checkpointing="selective")


def test_the_papers_sizes() -> None:
    """1.21 B of text encoder; the latent decoder's blocks 0.80 B without cross-attention, 1.10 B with it."""
    with torch.device("meta"):
        prior = AutoregressivePrior(LatentPriorConfig())
    count = {name: sum(p.numel() for p in part.parameters()) for name, part in prior.named_children()}
    cross = sum(p.numel() for number, block in enumerate(prior.blocks) if number % 3 == 1 for p in block.parameters())
    assert sum(p.numel() for p in prior.text_encoder.blocks.parameters()) == pytest.approx(1.209e9, rel=1e-3)
    assert count["blocks"] - cross == pytest.approx(0.798e9, rel=1e-3)
    assert count["blocks"] == pytest.approx(1.095e9, rel=1e-3)


def test_wrong_shapes_and_settings_are_refused() -> None:
    prior, (text, embedding, similarity, codes) = prior_of(), inputs()
    for bad in (
        (text[:, :3], embedding, similarity, codes),
        (text, embedding[:, :5], similarity, codes),
        (text, embedding, similarity + 8, codes),
        (text, embedding, similarity, codes + 16),
        (text[:2], embedding, similarity, codes),
    ):
        with pytest.raises(DataError):
            prior(*bad)
    for fields in ({"heads": 5}, {"components": 13}, {"similarity_buckets": 7}, {"buckets": 1}, {"width": 0}):
        with pytest.raises(ConfigError):
            LatentPriorConfig(**(SMALL | fields))  # type: ignore[arg-type]
