"""Image embeddings of captions, sampled from a prior (unCLIP §2.2).

A sample is a function of (seed, its number, its caption): its noise is drawn ahead on the CPU, and nothing that is sampled
beside it changes it.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

import torch
import torch.nn.functional as F
from torch import Tensor

from dalle_ds.config import PADDING, DecoderConfig, LatentPriorConfig, PriorConfig
from dalle_ds.diffusion import (
    AnalyticVariance,
    NoiseSchedule,
    clip_x0,
    ddim_step,
    ddpm_step,
    dpm_solver,
    guide,
    step_grid,
)
from dalle_ds.errors import ConfigError
from dalle_ds.models.clip import Clip
from dalle_ds.models.latent_prior import AutoregressivePrior, LatentSampler
from dalle_ds.models.latents import EmbeddingScaling, LatentCodec
from dalle_ds.models.prior import Caption, DiffusionPrior
from dalle_ds.models.prior_sampling import CachedPrior, DenoisingWeights
from dalle_ds.sampling.codes import Sampling, candidate_generator, sample

STEPS = "64"
"""Grid of the paper's sampler (Table 3)."""


@dataclass(frozen=True)
class PriorSampling:
    """How image embeddings are sampled. The defaults are the paper's (Table 3)."""

    method: Literal["analytic", "ddpm", "ddim", "dpm"] | None = None
    """Variance of the reverse steps: Analytic-DPM's, which is measured after training; the posterior's; or DDIM's, by eta; dpm
    is DPM-Solver++ of second order, which is deterministic (`diffusers`). None takes analytic where it was measured on these
    steps, else ddpm."""
    steps: str | None = None
    """Timesteps visited, as `dalle_ds.diffusion.step_grid` takes them; None takes those that analytic was measured on, or
    64."""
    eta: float = 0.0
    """Of DDIM: 0 is deterministic, 1 has DDPM's variance."""
    guidance: float = 1.0
    """Classifier-free guidance; 1 is none."""
    bound: float | None = None
    """Scaled embeddings are kept in [−bound, bound] at every step; None leaves them."""
    best_of: int = 2
    """Samples of which the one with the greatest dot product with the text embedding is taken."""

    def __post_init__(self) -> None:
        if self.method not in ("analytic", "ddpm", "ddim", "dpm", None):
            raise ConfigError(f"prior_sampling.method must be analytic, ddpm, ddim or dpm, found {self.method!r}")
        if self.best_of < 1:
            raise ConfigError(f"prior_sampling.best_of must be at least 1, found {self.best_of}")
        if not 0 <= self.eta <= 1 or (self.eta and self.method != "ddim"):
            raise ConfigError(f"prior_sampling.eta must lie in [0, 1] and belongs to method ddim, found {self.eta}")
        if not 0 <= self.guidance < math.inf:
            raise ConfigError(
                f"prior_sampling.guidance must be 0 (ignore the caption), 1 (off) or greater, found {self.guidance}"
            )
        if self.bound is not None and not self.bound > 0:
            raise ConfigError(f"prior_sampling.bound must be greater than 0, or None, found {self.bound}")


def sample_noise(key: str, seed: int, sample: int, *shape: int) -> Tensor:
    """The normal numbers that decide sample number `sample` of the caption `key` under `seed`: fp32 on the CPU."""
    return torch.randn(*shape, generator=candidate_generator(key, seed, sample))


def trim_padding(config: PriorConfig | LatentPriorConfig | DecoderConfig, text: Tensor) -> Tensor:
    """(B, T) tokens up to the last that is no padding, where padding is masked: what nobody attends to is not computed."""
    return text[:, : int((text != PADDING).sum(dim=1).max().clamp(min=1))] if config.mask_padding else text


def empty_caption(clip: Clip) -> tuple[Tensor, Tensor]:
    """What `Caption.empty` is, on CLIP's device."""
    states, padded = clip.text_states([""])
    return states[0][~padded[0]], clip.scaled(clip.project_states(states, padded))[0]


def prepare_caption(
    config: PriorConfig | DecoderConfig,
    text: Tensor,
    embedding: Tensor,
    clip: Clip | None = None,
    states: Tensor | None = None,
    scaling: EmbeddingScaling | None = None,
) -> Caption:
    """Tokens as priors and decoders read them, in training and in sampling.

    Args:
        text: (B, T) int64, -1 behind a caption's tokens: those of CLIP where its states are read.
        embedding: (B, embed_dim), CLIP's.
        clip: where its states are read, and there are no `states`.
        states: (B, T, text_width) CLIP's of the tokens.
        scaling: a prior's.
    """
    text = trim_padding(config, text)
    if scaling is not None and config.text != "karlo":
        embedding = scaling.scale(embedding)
    if config.text == "tokens":
        return Caption(text, embedding)
    if states is not None:
        return Caption(states[:, : text.shape[1]], embedding, text == PADDING)
    assert clip is not None
    states, padded = clip.text_states(text)
    return Caption(states, embedding, padded, empty_caption(clip) if config.text == "karlo" else None)


@torch.no_grad()
def denoise(
    prior: DiffusionPrior,
    caption: Caption,
    noise: Tensor,
    schedule: NoiseSchedule,
    sampling: PriorSampling,
    variance: AnalyticVariance | None = None,
    weights: DenoisingWeights | None = None,
) -> Tensor:
    """Sample scaled image embeddings.

    Args:
        prior: in eval mode.
        caption: of B captions, on the prior's device.
        noise: (B, K, N + 1, embed_dim) normal numbers: x_T, then one for each step of the grid, noisiest first.
        schedule: the one of training.
        variance: of the grid of `sampling.steps`, for the method analytic.
        weights: the prior's, where it is sampled from again and again.

    Returns:
        (B, K, embed_dim) fp32.

    Raises:
        ConfigError: the method is analytic and there is no variance; noise of another number of steps.
    """
    grid = schedule.on(step_grid(sampling.steps or STEPS, len(schedule)))
    if noise.shape[2] != len(grid) + 1:
        raise ConfigError(
            f"a grid of {len(grid)} steps needs {len(grid) + 1} noises for each sample, found {noise.shape[2]}"
        )
    if sampling.method == "analytic" and variance is None:
        raise ConfigError(
            "prior_sampling.method=analytic needs the variances that are measured after training: take ddpm or ddim"
        )
    is_analytic = variance is not None and sampling.method in ("analytic", None)
    variances = variance.ddpm() if variance is not None and is_analytic else grid.posterior_variances
    draws = noise.shape[1]
    guided = sampling.guidance != 1
    device = caption.embedding.device
    cached = CachedPrior(weights or DenoisingWeights(prior), caption, draws, grid.timesteps.to(device), guided)
    factors = [_factors(grid, step, sampling, variances[step]) for step in range(len(grid))]
    solver = dpm_solver(schedule, grid.timesteps.tolist()) if sampling.method == "dpm" else None
    noise = noise.to(device)
    x = noise[:, :, 0]
    for number, step in enumerate(reversed(range(len(grid))), start=1):
        x0 = cached(torch.cat([x, x]) if guided else x, step)
        if guided:
            conditional, null = x0.chunk(2)
            x0 = guide(conditional, null, sampling.guidance)
        x0 = clip_x0(x0, sampling.bound)
        if solver is not None:
            x = solver(x0, x)
            continue
        of_x, of_x0, of_noise = factors[step]
        x = of_x * x + of_x0 * x0 + of_noise * noise[:, :, number]
    return x


def _factors(grid: NoiseSchedule, step: int, sampling: PriorSampling, variance: Tensor) -> list[float]:
    """What a step multiplies x, x₀ and the noise with. It is linear in them: three unit vectors find out, and sampling has
    three products to compute instead of some thirty operators, each of which takes longer to start than to run."""
    x, x0, noise = torch.eye(3, dtype=torch.float64)
    if sampling.method == "ddim":
        found: list[float] = ddim_step(grid, step, x, x0, sampling.eta, noise).tolist()
    else:
        found = ddpm_step(grid, step, x, x0, noise, variance).tolist()
    return found


@torch.no_grad()
def sample_codes(
    prior: AutoregressivePrior,
    codec: LatentCodec,
    text: Tensor,
    embedding: Tensor,
    uniforms: Tensor,
    sampling: Sampling,
) -> Tensor:
    """Sample image embeddings code by code, under a similarity from the upper half of its distribution (unCLIP §2.2).

    Args:
        prior: in eval mode.
        text, embedding: of B rows, as `AutoregressivePrior.forward` takes them.
        uniforms: (B, components + 1) float64 in [0, 1): the first chooses the similarity, the others a code each.

    Returns:
        (B, embed_dim) fp32.
    """
    config, rows = prior.config, len(text)
    half = config.similarity_buckets // 2
    similarity = half + (uniforms[:, 0].to(text.device) * half).long()
    guided = sampling.guidance != 1
    inputs = (text, embedding, similarity)
    if guided:
        inputs = tuple(torch.cat([part, part]) for part in inputs)  # type: ignore[assignment]
    dropped = torch.arange(2 * rows, device=text.device) >= rows if guided else None
    sampler = LatentSampler(prior, *inputs, dropped)
    codes: list[Tensor] = []
    for number in range(config.components):
        logits = sampler.logits
        if guided:
            conditional, null = logits.chunk(2)
            logits = guide(conditional, null, sampling.guidance)
        codes.append(sample(logits, uniforms[:, number + 1].to(logits.device), sampling))
        if number + 1 < config.components:
            sampler.step(torch.cat([codes[-1]] * 2) if guided else codes[-1])
    return codec.decode(torch.stack(codes, dim=1))


def best_of(samples: Tensor, text_embedding: Tensor, count: int) -> Tensor:
    """Of each `count` samples the one with the greatest dot product with the caption's embedding (unCLIP §2.2: of two), both
    brought to length 1, as embeddings are.

    Args:
        samples: (B, K · count, embed_dim), of any length.
        text_embedding: (B, embed_dim).

    Returns:
        (B, K, embed_dim).
    """
    groups = samples.unflatten(1, (-1, count))
    product = (F.normalize(groups, dim=-1) * F.normalize(text_embedding, dim=-1)[:, None, None]).sum(-1)
    chosen = product.argmax(dim=2)[..., None, None].expand(-1, -1, 1, groups.shape[-1])
    return groups.gather(2, chosen).squeeze(2)


def caption_noise(keys: Sequence[str], seed: int, samples: int, steps: int, dim: int) -> Tensor:
    """(B, K, steps + 1, dim) noise for `denoise`, of samples 0 … K − 1 of each caption."""
    return torch.stack(
        [torch.stack([sample_noise(key, seed, number, steps + 1, dim) for number in range(samples)]) for key in keys]
    )
