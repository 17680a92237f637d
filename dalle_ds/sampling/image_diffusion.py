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
    ddim_step,
    ddpm_step,
    dpm_solver,
    noise_schedule,
    step_grid,
)
from dalle_ds.diffusion.steps import learned_log_variance
from dalle_ds.errors import CheckpointError
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
) -> Tensor:
    """Sample images from noise.

    Args:
        predict: (x_t, timestep) → (B, 3 or 6, H, W) fp32, what the model predicts, guided or not.
        shape: of an image, (3, H, W).
        generators: one for each image.
        base: like the images, where what is sampled is their difference from it (`DiffusionFacts.residual`).

    Returns:
        (B, 3, H, W) fp32 in [−1, 1].
    """
    schedule = facts.noise
    grid = schedule.on(step_grid(sampling.steps, len(schedule)))
    solver = dpm_solver(schedule, grid.timesteps.tolist()) if sampling.method == "dpm" else None
    bound = None if sampling.threshold == "none" else 1.0
    quantile = sampling.quantile if sampling.threshold == "dynamic" else None

    def noise() -> Tensor:
        return torch.stack([torch.randn(shape, generator=generator) for generator in generators]).to(device)

    x = noise()
    for done, step in enumerate(reversed(range(len(grid))), start=1):
        output = predict(x, int(grid.timesteps[step]))
        x0 = grid.x0_of(facts.predicts, output[:, :3], x, step)
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
            on_step(done, len(grid))
    return (x if base is None else base + x / facts.residual).clamp(-1, 1)
