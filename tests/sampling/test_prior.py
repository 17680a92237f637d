"""Sampling of image embeddings: against `diffusers`' loop, whatever the batch, and in distribution."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from dalle_ds.config import LatentPriorConfig, PriorConfig
from dalle_ds.diffusion import AnalyticVariance, ddim_step, ddpm_step, noise_schedule, step_grid
from dalle_ds.errors import ConfigError
from dalle_ds.models.latent_prior import AutoregressivePrior
from dalle_ds.models.latents import LatentCodec
from dalle_ds.models.prior import Caption, DiffusionPrior
from dalle_ds.sampling.codes import Sampling
from dalle_ds.sampling.prior import PriorSampling, best_of, caption_noise, denoise, prepare_caption, sample_codes

CONFIG = PriorConfig(width=32, depth=2, heads=4, text_len=5, embed_dim=6, text_vocab=30)
SCHEDULE = noise_schedule("cosine")


def prior_of(mask_padding: bool = False) -> DiffusionPrior:
    torch.manual_seed(0)
    prior = DiffusionPrior(replace(CONFIG, mask_padding=mask_padding)).eval()
    with torch.no_grad():
        for parameter in prior.parameters():
            parameter.add_(0.1 * torch.randn_like(parameter))
    return prior


def caption_of(rows: int = 3, length: int = 5) -> Caption:
    """The first one has `length` tokens, the others 5."""
    generator = torch.Generator().manual_seed(1)
    text = torch.randint(30, (3, 5), generator=generator)
    text[0, length:] = -1
    return Caption(text[:rows], torch.randn(3, 6, generator=generator)[:rows])


@torch.no_grad()
@pytest.mark.parametrize("guidance", [1.0, 3.0])
def test_ddpm_is_diffusers_loop_over_whole_passes(guidance: float, monkeypatch: pytest.MonkeyPatch) -> None:
    diffusers = pytest.importorskip("diffusers")
    scheduling = pytest.importorskip("diffusers.schedulers.scheduling_ddpm")
    prior, caption = prior_of(), caption_of()
    noise = caption_noise("abc", 0, 2, 10, 6)
    sampling = PriorSampling(method="ddpm", steps="10", guidance=guidance)
    found = denoise(prior, caption, noise, SCHEDULE, sampling)
    scheduler = diffusers.DDPMScheduler(
        1000,
        beta_schedule="squaredcos_cap_v2",
        prediction_type="sample",
        clip_sample=False,
        timestep_spacing="linspace",
        variance_type="fixed_small",
    )
    scheduler.set_timesteps(10)
    x = noise[:, :, 0]
    for number, time in enumerate(scheduler.timesteps, start=1):
        times = time.expand(3, 2)
        x0 = prior(caption, x, times)
        if guidance != 1:
            null = prior(caption, x, times, dropped=torch.ones(3, dtype=torch.bool))
            x0 = null + guidance * (x0 - null)
        monkeypatch.setattr(scheduling, "randn_tensor", lambda *_, number=number, **__: noise[:, :, number])
        x = scheduler.step(x0, time, x).prev_sample
    torch.testing.assert_close(found, x, rtol=1e-3, atol=1e-3)


@pytest.mark.parametrize("mask_padding", [False, True])
@pytest.mark.parametrize("method", ["analytic", "ddpm", "ddim"])
def test_a_sample_does_not_depend_on_what_is_sampled_beside_it(method: str, mask_padding: bool) -> None:
    prior, noise = prior_of(mask_padding), caption_noise("abc", 0, 4, 8, 6)
    sampling = PriorSampling(method=method, steps="8", guidance=2.0)  # type: ignore[arg-type]
    variance = AnalyticVariance(SCHEDULE.on(step_grid("8", 1000)), torch.ones(8), 0.3)
    length = 2 if mask_padding else 5
    several, one = (prepare_caption(prior.config, *caption_of(rows, length)[:2]) for rows in (3, 1))
    assert one.text.shape[1] == length
    together = denoise(prior, several, noise, SCHEDULE, sampling, variance)
    alone = denoise(prior, one, noise[:1, :2], SCHEDULE, sampling, variance)
    torch.testing.assert_close(alone, together[:1, :2], rtol=1e-4, atol=1e-4)
    assert torch.equal(caption_noise("c", 0, 2, 8, 6)[0], noise[2, :2])
    assert not torch.equal(caption_noise("c", 1, 2, 8, 6)[0], noise[2, :2])


@pytest.mark.parametrize(("method", "eta"), [("ddpm", 0.0), ("ddim", 0.0), ("ddim", 0.7)])
def test_sampling_takes_the_methods_steps(method: str, eta: float, monkeypatch: pytest.MonkeyPatch) -> None:
    class Half:
        def __init__(self, *arguments: object) -> None:
            pass

        def __call__(self, x: Tensor, step: int) -> Tensor:
            return x / 2

    monkeypatch.setattr("dalle_ds.sampling.prior.CachedPrior", Half)
    noise, grid = caption_noise("abc", 0, 2, 8, 6), SCHEDULE.on(step_grid("8", 1000))
    found = denoise(prior_of(), caption_of(), noise, SCHEDULE, PriorSampling(method=method, steps="8", eta=eta))  # type: ignore[arg-type]
    x = noise[:, :, 0]
    for number, step in enumerate(reversed(range(8)), start=1):
        if method == "ddim":
            x = ddim_step(grid, step, x, x / 2, eta, noise[:, :, number])
        else:
            x = ddpm_step(grid, step, x, x / 2, noise[:, :, number])
    torch.testing.assert_close(found, x, rtol=1e-5, atol=1e-5)


@torch.no_grad()
def test_analytic_sampling_has_the_datas_spread(monkeypatch: pytest.MonkeyPatch) -> None:
    """Eight steps of DDPM with the posterior's variance fall short of it."""
    grid, variance = SCHEDULE.on(step_grid("8", 1000)), 0.09

    class Best:
        def __init__(self, *arguments: object) -> None:
            pass

        def __call__(self, x: Tensor, step: int) -> Tensor:
            alpha_bar = grid.alpha_bars[step].float()
            return alpha_bar.sqrt() * variance / (alpha_bar * variance + 1 - alpha_bar) * x

    monkeypatch.setattr("dalle_ds.sampling.prior.CachedPrior", Best)
    noise = torch.randn(1, 20_000, 9, 6, generator=torch.Generator().manual_seed(0))
    exact = AnalyticVariance(grid, 1 / (grid.alpha_bars * variance + 1 - grid.alpha_bars), variance)
    caption = caption_of(1)
    analytic = denoise(prior_of(), caption, noise, SCHEDULE, PriorSampling(steps="8"), exact)
    plain = denoise(prior_of(), caption, noise, SCHEDULE, PriorSampling(method="ddpm", steps="8"))
    assert analytic.var().item() == pytest.approx(variance, rel=0.02)
    assert plain.var().item() < 0.9 * variance


def test_the_best_of_two_is_nearest_to_the_caption() -> None:
    generator = torch.Generator().manual_seed(0)
    samples, text = torch.randn(3, 8, 5, generator=generator), torch.randn(3, 5, generator=generator)
    best = best_of(samples, text, 2)
    cosines = F.cosine_similarity(samples, text[:, None], dim=-1)
    torch.testing.assert_close(F.cosine_similarity(best, text[:, None], dim=-1), cosines.unflatten(1, (4, 2)).amax(2))
    assert torch.equal(best_of(samples, text, 1), samples)


@torch.no_grad()
def test_codes_are_sampled_from_the_models_distribution() -> None:
    """Of two codes of four values, against the probabilities of all sixteen; the similarity comes from its upper half."""
    torch.manual_seed(0)
    config = LatentPriorConfig(
        text_width=16, text_depth=1, text_heads=2, text_len=4, text_vocab=20, width=16, depth=1, heads=2, embed_dim=3,
        components=2, buckets=4, similarity_buckets=2,
    )  # fmt: skip
    prior = AutoregressivePrior(config).eval()
    for parameter in prior.parameters():
        parameter.add_(0.5 * torch.randn_like(parameter))
    codec = LatentCodec(torch.zeros(3), torch.eye(3)[:2], -torch.ones(2), torch.ones(2), 4)
    rows = 4000
    text, embedding = torch.randint(20, (1, 4)).expand(rows, 4), torch.randn(1, 3).expand(rows, 3)
    uniforms = torch.rand(rows, 3, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    for guidance in (1.0, 2.0):
        codes = codec.encode(sample_codes(prior, codec, text, embedding, uniforms, Sampling(guidance=guidance)))
        found = torch.bincount(codes[:, 0] * 4 + codes[:, 1], minlength=16) / rows
        every = torch.cartesian_prod(torch.arange(4), torch.arange(4))
        options = (text[:16], embedding[:16], torch.ones(16, dtype=torch.int64), every)
        logits = prior(*options, logits=True)[1]
        null = prior(*options, dropped=torch.ones(16, dtype=torch.bool), logits=True)[1]
        log = (null + guidance * (logits - null)).log_softmax(-1)
        wanted = log.gather(2, every[..., None]).sum(dim=(1, 2)).exp()
        assert wanted.sum().item() == pytest.approx(1, abs=1e-5)
        torch.testing.assert_close(found, wanted, rtol=0, atol=4 * 0.5 / rows**0.5)


def test_impossible_sampling_is_refused() -> None:
    for fields in ({"method": "euler"}, {"best_of": 0}, {"eta": 0.5}, {"method": "ddim", "eta": 2.0}):
        with pytest.raises(ConfigError):
            PriorSampling(**fields)  # type: ignore[arg-type]
    prior, caption = prior_of(), caption_of()
    with pytest.raises(ConfigError, match="measured after training"):
        denoise(prior, caption, caption_noise("abc", 0, 1, 64, 6), SCHEDULE, PriorSampling("analytic"))
    with pytest.raises(ConfigError, match="noises"):
        denoise(prior, caption, caption_noise("abc", 0, 1, 9, 6), SCHEDULE, PriorSampling(method="ddpm"))
