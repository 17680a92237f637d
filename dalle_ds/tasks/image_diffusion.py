"""What training of the decoder and of upsamplers shares: losses at random timesteps, and at evenly spread ones."""

from __future__ import annotations

from functools import cached_property
from typing import TypeVar

import torch
from torch import Tensor

from dalle_ds.config import DecoderRun, UpsamplerRun
from dalle_ds.diffusion import NoiseSchedule, hybrid_loss, noise_schedule, simple_loss, step_grid
from dalle_ds.tasks.base import Batch, Metrics, Task, row_noise

LEVELS = 256
"""Of a pixel's channel."""
_GOLDEN = (5**0.5 - 1) / 2
ImageRun = TypeVar("ImageRun", bound=DecoderRun | UpsamplerRun)


class ImageDiffusionTask(Task[ImageRun]):
    """What learns to denoise images in [−1, 1]: the mean squared error of what it predicts, and with a learned variance its
    variational bound (`diffusion.losses.hybrid_loss`)."""

    def __init__(self, run: ImageRun) -> None:
        super().__init__(run)
        step_grid(run.sampling.steps, run.objective.timesteps)  # refuses what export and previews could not sample by

    @cached_property
    def schedule(self) -> NoiseSchedule:
        """Of the noise."""
        return noise_schedule(self.run.objective.schedule, self.run.objective.timesteps)

    def random_noise(self, batch: Batch, uniforms: int) -> tuple[Tensor, Tensor, Tensor]:
        """(B,) timesteps, noise like the images, and (B, `uniforms`) more numbers in [0, 1): each row's from its key."""
        image = batch["image"]
        channels, height, width = image.shape[1:]
        shares, noise = row_noise(batch["key"], channels, height * width, image.device, uniforms + 1)
        count = len(self.schedule)
        return (shares[:, 0] * count).long().clamp(max=count - 1), noise.view_as(image), shares[:, 1:]

    def spread_timesteps(self, batch: Batch) -> Tensor:
        """(B,) timesteps of validation rows, which all of them together cover evenly."""
        return ((batch["place"] * _GOLDEN % 1) * len(self.schedule)).long()

    def losses(self, output: Tensor, image: Tensor, noise: Tensor, steps: Tensor) -> tuple[Tensor, Tensor]:
        """(B,) mean squared errors, and (B,) variational terms; 0 without a learned variance."""
        predicts = self.run.objective.predicts
        if self.run.model.learned_variance:
            return hybrid_loss(self.schedule, predicts, output, image, noise, steps, LEVELS)
        errors = simple_loss(output, self.schedule.target(predicts, image, noise, steps))
        return errors, torch.zeros_like(errors)

    def total(self, errors: Tensor, bits: Tensor) -> tuple[Tensor, Metrics]:
        """() loss, and its parts."""
        metrics = {"mse": errors.detach().mean()}
        if self.run.model.learned_variance:
            metrics["vb"] = bits.detach().mean()
        return (errors + bits).mean(), metrics

    def items_per_sample(self) -> tuple[str, int]:
        return "pixels", self.run.model.image_size**2


def to_signed(image: Tensor) -> Tensor:
    """uint8 → fp32 in [−1, 1]."""
    return image.float() / 127.5 - 1
