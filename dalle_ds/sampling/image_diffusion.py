"""Images by diffusion: the loop that the decoder and upsamplers share, and what their exports tell of their training.

An image is a function of (seed, its number, its caption), up to the rounding of products of other sizes: its noise is drawn
step by step on the CPU from a generator of its own.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from dalle_ds.config import ImageSampling, from_dict, to_dict
from dalle_ds.diffusion import (
    NoiseSchedule,
    Prediction,
    clip_x0,
    ddim_inversion_step,
    ddim_step,
    ddpm_step,
    dpm_solver,
    noise_schedule,
    step_grid,
)
from dalle_ds.diffusion.steps import learned_log_variance
from dalle_ds.errors import CheckpointError, ConfigError
from dalle_ds.files import write_json
from dalle_ds.parsing import parse_json
from dalle_ds.sampling.codes import candidate_generator

PARTS_NAME = "diffusion.json"
"""In an export: the noise of training, how to sample, and fingerprints of what the model was trained with."""
OnStep = Callable[[int, int], None]
"""Told how many steps are done, of how many."""


@dataclass(frozen=True)
class DiffusionFacts:
    """What a model of images was trained to, and how it is sampled from where nothing else is said."""

    schedule: str
    timesteps: int
    predicts: Prediction
    sampling: ImageSampling
    residual: float = 0.0
    """Greater than 0: that is of the difference from a small image, enlarged, times this."""
    noise_share: float = 0.0
    """Share of the schedule whose noise small images had (`objective.noise`)."""
    x0_error: float = 0.0
    """Root-mean-square error of what a model that predicts x₀ makes of images without noise, measured after training."""

    @property
    def noise(self) -> NoiseSchedule:
        """Of training."""
        return noise_schedule(self.schedule, self.timesteps)  # type: ignore[arg-type]

    def write(self, folder: Path, **parts: str | None) -> None:
        """Write `PARTS_NAME` with these and the fingerprints of parts."""
        write_json(folder / PARTS_NAME, {**to_dict(self), **parts})

    @classmethod
    def read(cls, folder: Path) -> tuple[DiffusionFacts, Mapping[str, Any]]:
        """Those of an export, and what else its file has; CheckpointError where it cannot be read."""
        try:
            found = dict(parse_json((folder / PARTS_NAME).read_bytes()))
            where = str(folder / PARTS_NAME)
            facts = from_dict(cls, {name: found.pop(name) for name in cls.__dataclass_fields__ if name in found}, where)
        except (OSError, ValueError, TypeError, KeyError) as error:
            raise CheckpointError(f"{folder / PARTS_NAME} cannot be read ({error}): export the model again") from error
        return facts, found


def image_generators(
    stage: str, captions: Sequence[str], seed: int, numbers: Sequence[int] | None = None
) -> list[torch.Generator]:
    """Of the noise of sample number `numbers[i]` (0 where None) of each caption in a stage."""
    numbers = [0] * len(captions) if numbers is None else numbers
    return [candidate_generator(f"{stage}: {caption}", seed, n) for caption, n in zip(captions, numbers, strict=True)]


def of_all(on_step: OnStep | None, number: int, batches: int) -> OnStep | None:
    """Told of the steps of batch `number`, tells of those of all."""
    return None if on_step is None else lambda done, steps: on_step(number * steps + done, batches * steps)


@dataclass(frozen=True)
class Known:
    """Pixels that an image is to have, for inpainting."""

    images: Tensor
    """(B, 3, H, W) in [−1, 1]."""
    mask: Tensor
    """(B or 1, 1, H, W) bool, True where they are known."""
    rounds: int = 1
    """How often each step is taken, with noise added in between, so that what is new fits what is known (RePaint §4.2)."""

    def __post_init__(self) -> None:
        if self.rounds < 1:
            raise ConfigError(f"rounds must be at least 1, found {self.rounds}")

    def of(self, rows: slice) -> Known:
        """Of some of the images."""
        mask = self.mask if len(self.mask) == 1 else self.mask[rows]
        return Known(self.images[rows], mask, self.rounds)


MIN_ALPHA_BAR = 1e-3
"""ᾱ of the noisiest step that images are inverted to. Behind it hardly anything of an image is left in x, and dividing by √ᾱ
makes errors explode: the cosine schedule ends at 2.4e-9."""


def invertible_grid(schedule: NoiseSchedule, steps: str) -> NoiseSchedule:
    """The steps of inversion and of sampling from what it returns, over the timesteps where ᾱ is at least `MIN_ALPHA_BAR`."""
    return schedule.on(step_grid(steps, int((schedule.alpha_bars >= MIN_ALPHA_BAR).sum())))


@torch.no_grad()
def denoise_images(
    predict: Callable[[Tensor, int], Tensor],
    shape: tuple[int, int, int],
    generators: Sequence[torch.Generator],
    facts: DiffusionFacts,
    sampling: ImageSampling,
    device: torch.device,
    base: Tensor | None = None,
    on_step: OnStep | None = None,
    start: Tensor | None = None,
    known: Known | None = None,
) -> Tensor:
    """Sample images from noise.

    Args:
        predict: (x_t, timestep) → (B, 3 or 6, H, W) fp32, what the model predicts, guided or not.
        shape: of an image, (3, H, W).
        generators: one for each image.
        base: like the images, where what is sampled is their difference from it (`DiffusionFacts.residual`).
        start: (B, 3, H, W) x_T as `invert_images` returns it, on the grid of which `sampling.steps` then are; None: drawn.
        known: pixels that the images have anyway.

    Returns:
        (B, 3, H, W) fp32 in [−1, 1].

    Raises:
        ConfigError: `known` with the method dpm, whose steps remember those before.
    """
    schedule = facts.noise
    if start is None:
        grid = schedule.on(step_grid(sampling.steps, len(schedule)))
    else:
        grid = invertible_grid(schedule, sampling.steps)
    if known is not None and sampling.method == "dpm":
        raise ConfigError("sampling.method=dpm cannot inpaint: take ddpm or ddim")
    solver = dpm_solver(schedule, grid.timesteps.tolist()) if sampling.method == "dpm" else None
    bound = None if sampling.threshold == "none" else 1.0
    quantile = sampling.quantile if sampling.threshold == "dynamic" else None

    def noise() -> Tensor:
        return torch.stack([torch.randn(shape, generator=generator) for generator in generators]).to(device)

    x = noise() if start is None else start.to(device)
    kept = None if known is None else _difference(known.images.to(device), base, facts)
    rounds = 1 if known is None else known.rounds
    visits = [step for step in reversed(range(len(grid))) for _ in range(rounds if step else 1)]
    for done, step in enumerate(visits, start=1):
        if done > 1 and visits[done - 2] == step:  # back up, for another round
            beta = grid.betas[step]
            x = (1 - beta).sqrt().to(x) * x + beta.sqrt().to(x) * noise()
        if known is not None and kept is not None:
            x = torch.where(known.mask.to(device), grid.add_noise(kept, noise(), step), x)
        output = predict(x, int(grid.timesteps[step]))
        # What x has of an image is what it began with, not the noise that is added on the way.
        trust = 0.0 if start is None else 1 - sampling.eta
        x0 = _seen(grid, step, output, x, facts, trust)
        if base is None:
            x0 = clip_x0(x0, bound, quantile)
        else:
            x0 = facts.residual * (clip_x0(base + x0 / facts.residual, bound, quantile) - base)
        if solver is not None:
            x = solver(x0, x)
        elif sampling.method == "ddim":
            x = ddim_step(grid, step, x, x0, sampling.eta, noise() if sampling.eta else None)
        else:
            learned = output.shape[1] > 3
            variance = learned_log_variance(grid, step, output[:, 3:]).exp() if learned else None
            x = ddpm_step(grid, step, x, x0, noise() if step else x, variance)
        if on_step is not None:
            on_step(done, len(visits))
    images = (x if base is None else base + x / facts.residual).clamp(-1, 1)
    return images if known is None else torch.where(known.mask.to(device), known.images.to(device), images)


@torch.no_grad()
def invert_images(
    predict: Callable[[Tensor, int], Tensor],
    images: Tensor,
    facts: DiffusionFacts,
    steps: str,
    iterations: int = 0,
    base: Tensor | None = None,
    on_step: OnStep | None = None,
) -> Tensor:
    """The x_T of which DDIM with η = 0 makes images again, near enough (DDIM §4.3, unCLIP §3).

    Args:
        predict, base, on_step: as `denoise_images` takes them.
        images: (B, 3, H, W) in [−1, 1].
        steps: grid over the timesteps of `invertible_grid`.
        iterations: how often each step is corrected: its ε is that which the model sees where the step led, as it will see it
            on the way back. 0 takes the ε that it sees where the step begins, which is right for small steps.

    Returns:
        (B, 3, H, W) fp32.

    Raises:
        ConfigError: `iterations` is less than 0.
    """
    if iterations < 0:
        raise ConfigError(f"iterations must be at least 0, found {iterations}")
    grid = invertible_grid(facts.noise, steps)
    x = _difference(images, base, facts)
    for step in range(len(grid)):
        before = max(0, step - 1)
        there = ddim_inversion_step(grid, step, x, _epsilon(predict, grid, before, x, facts))
        for _ in range(iterations):
            there = ddim_inversion_step(grid, step, x, _epsilon(predict, grid, step, there, facts))
        x = there
        if on_step is not None:
            on_step(step + 1, len(grid))
    return x


def _difference(images: Tensor, base: Tensor | None, facts: DiffusionFacts) -> Tensor:
    """What is diffused of images."""
    return images if base is None else facts.residual * (images - base)


def _epsilon(
    predict: Callable[[Tensor, int], Tensor], grid: NoiseSchedule, step: int, x: Tensor, facts: DiffusionFacts
) -> Tensor:
    output = predict(x, int(grid.timesteps[step]))
    return grid.epsilon_of(_seen(grid, step, output, x, facts), x, step)


def _seen(
    grid: NoiseSchedule, step: int, output: Tensor, x: Tensor, facts: DiffusionFacts, trust: float = 1.0
) -> Tensor:
    """The clean images that an output means, on the way to noise and back.

    A model that predicts x₀ loses some of an image even where there is no noise, and no way leads back to that. Where noise is
    small, x_t itself is a good guess, too: each of both counts by the inverse of the variance of its error, x_t times `trust`.
    """
    x0 = grid.x0_of(facts.predicts, output[:, :3], x, step)
    if not facts.x0_error or not trust:
        return x0
    alpha_bar = float(grid.alpha_bars[step])
    share = facts.x0_error**2 / (facts.x0_error**2 + (1 - alpha_bar) / alpha_bar)
    return torch.lerp(x0, x / alpha_bar**0.5, trust * share)
