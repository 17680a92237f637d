"""What training of the decoder and of upsamplers shares: losses at random timesteps, and at evenly spread ones."""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Callable, Iterator
from functools import cached_property
from pathlib import Path
from typing import Any, TypeVar

import torch
from torch import Tensor

from dalle_ds.config import DecoderRun, UpsamplerRun
from dalle_ds.diffusion import NoiseSchedule, hybrid_loss, noise_schedule, simple_loss, step_grid
from dalle_ds.parallel import Mesh
from dalle_ds.sampling.image_diffusion import DiffusionFacts
from dalle_ds.tasks.base import Batch, Metrics, Task, row_noise

LEVELS = 256
"""Of a pixel's channel."""
_GOLDEN = (5**0.5 - 1) / 2
MEASURED_ROWS = 64
"""On which the error of images without noise is measured."""
ImageRun = TypeVar("ImageRun", bound=DecoderRun | UpsamplerRun)


class ImageDiffusionTask(Task[ImageRun]):
    """What learns to denoise images in [−1, 1]: the mean squared error of what it predicts, and with a learned variance its
    variational bound (`diffusion.losses.hybrid_loss`)."""

    x0_error = 0.0
    """As `measure` found it."""

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

    @abstractmethod
    def errors_at(self, model: Callable[..., Any], batch: Batch, steps: Tensor, noise: Tensor) -> Tensor:
        """(B,) mean squared errors at (B,) timesteps, nothing dropped."""

    @torch.no_grad()
    def measure(self, model: Callable[..., Any], batches: Iterator[Batch], mesh: Mesh) -> None:
        """`DiffusionFacts.x0_error`: on the same rows in any layout."""
        if self.run.objective.predicts != "x0":
            return
        found, seen = torch.zeros(2, dtype=torch.float64), 0
        rows = -(-MEASURED_ROWS // self.run.train.batch_size) * self.run.train.batch_size
        while seen < rows // mesh.size("data"):
            batch = next(batches)
            errors = self.errors_at(model, batch, torch.zeros_like(batch["key"]), torch.zeros_like(batch["image"]))
            found += torch.tensor([float(errors.double().sum()), len(errors)], dtype=torch.float64)
            seen += len(errors)
        total, count = mesh.sum(found).tolist()
        self.x0_error = (total / count) ** 0.5

    def recall(self, export: Path) -> None:
        self.x0_error = DiffusionFacts.read(export)[0].x0_error

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
