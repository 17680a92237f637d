"""Training of unCLIP's upsamplers (unCLIP §2.1, App. C)."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any, cast

import numpy as np
import torch
from PIL import Image
from torch import Tensor, nn

from dalle_ds.config import UpsamplerRun
from dalle_ds.data import PairDataset, UpsamplerSamples
from dalle_ds.data.images import Pixels
from dalle_ds.diffusion.degradation import LIGHT, blur, bsr, shrink
from dalle_ds.models.upsampler import Upsampler, enlarge
from dalle_ds.sampling.grid import image_grid, to_pil_images
from dalle_ds.sampling.image_diffusion import DiffusionFacts
from dalle_ds.sampling.super_resolution import SuperResolution
from dalle_ds.tasks.base import Batch, Metrics, Samples, row_noise
from dalle_ds.tasks.image_diffusion import ImageDiffusionTask, to_signed

PREVIEW_PIXELS = 2**22
"""Of large images on a preview: 4 at 1,024 pixels."""
_OF_LOW = 0x5DEECE66D
"""Makes the seed of a small image's noise of its sample's."""


class UpsamplerTask(ImageDiffusionTask[UpsamplerRun]):
    """Learns to denoise large images, given small ones, on crops."""

    name = "upsampler"

    def build_model(self) -> Upsampler:
        return Upsampler(self.run.model, checkpointing=self.run.train.activation_checkpointing)

    def batch_spec(self, rows: int) -> Batch:
        crop, scale = self.run.crop_size, self.run.model.scale
        with torch.device("meta"):
            return {
                "image": torch.empty(rows, 3, crop, crop),
                "low": torch.empty(rows, 3, crop // scale, crop // scale),
                "key": torch.empty(rows, dtype=torch.int64),
            }

    def corpus_samples(self, folder: str, split: str) -> Samples:
        model, objective = self.run.model, self.run.objective
        return UpsamplerSamples(
            PairDataset.open(folder, split),
            model.image_size,
            train=split == "train",
            scale=model.scale,
            crop=self.run.crop_size,
            degrade=DEGRADATIONS[objective.degradation],
            degraded=objective.degraded,
            mirror=objective.mirror,
        )

    def identity(self) -> dict[str, str]:
        return self.data_identity()

    def prepare(self, batch: Batch) -> Batch:
        return {**batch, **{name: to_signed(batch[name]) for name in ("image", "low")}}

    def loss(self, model: nn.Module, batch: Batch, step: int) -> tuple[Tensor, Metrics]:
        steps, noise, uniforms = self.random_noise(batch, 1)
        low, noise_steps = batch["low"], None
        if self.run.model.noise_augmentation:
            noise_steps = (uniforms[:, 0] * self.run.objective.noise * len(self.schedule)).long()
            _, low_noise = row_noise(batch["key"] ^ _OF_LOW, 1, low[0].numel(), low.device)
            # The smallest timestep stands for none.
            noised = self.schedule.add_noise(low, low_noise.view_as(low), noise_steps)
            low = torch.where((noise_steps > 0)[:, None, None, None], noised, low)
        return self.total(*self._losses(model, batch, low, steps, noise, noise_steps, batch["key"]))

    def evaluate(self, model: Callable[..., Any], batch: Batch) -> Metrics:
        """The loss, of whole images whose small ones are not degraded, and what resizing makes of these."""
        _, noise, _ = self.random_noise(batch, 1)
        steps, valid = self.spread_timesteps(batch), batch["valid"]
        # As many pixels at a time as in training, whose images are crops.
        rows = max(1, len(valid) * self.run.crop_size**2 // self.run.model.image_size**2)
        parts = [
            self._losses(model, {"image": image}, low, some_steps, some_noise)
            for image, low, some_steps, some_noise in zip(
                *(part.split(rows) for part in (batch["image"], batch["low"], steps, noise)), strict=True
            )
        ]
        errors, bits = (torch.cat(each) for each in zip(*parts, strict=True))
        resized = enlarge(batch["low"], self.run.model.scale).clamp(-1, 1)
        return {
            "count": valid.sum(),
            "loss": ((errors + bits) * valid).sum(),
            "bicubic_psnr": (psnr(resized, batch["image"]) * valid).sum(),
        }

    def errors_at(self, model: Callable[..., Any], batch: Batch, steps: Tensor, noise: Tensor) -> Tensor:
        return self._losses(model, batch, batch["low"], steps, noise)[0]

    def summarize(self, sums: Metrics) -> dict[str, float]:
        return {name: float(sums[name] / sums["count"]) for name in ("loss", "bicubic_psnr")}

    def _losses(
        self,
        model: Callable[..., Any],
        batch: Batch,
        low: Tensor,
        steps: Tensor,
        noise: Tensor,
        noise_steps: Tensor | None = None,
        dropout_seeds: Tensor | None = None,
    ) -> tuple[Tensor, Tensor]:
        clean, factor = batch["image"], self.run.objective.residual
        if factor:
            clean = factor * (clean - enlarge(low, self.run.model.scale))
        noised = self.schedule.add_noise(clean, noise, steps)
        output = model(noised, steps, low, noise_steps=noise_steps, dropout_seeds=dropout_seeds)
        return self.losses(output, clean, noise, steps)

    def pipeline(self, model: nn.Module) -> SuperResolution:
        """The plain model, with all that using it needs."""
        objective, sampling = self.run.objective, self.run.sampling
        facts = DiffusionFacts(
            objective.schedule,
            objective.timesteps,
            objective.predicts,
            sampling,
            objective.residual,
            objective.noise,
            self.x0_error,
        )
        # What computes the last step alone goes along as it is.
        last = SuperResolution.from_pretrained(self.run.init).last if self.run.init else None
        return SuperResolution(cast(Upsampler, model), facts, last)

    def preview(self, model: nn.Module, batch: Batch) -> Image.Image:
        """Images, each made small, resized, and enlarged by the model."""
        size = self.run.model.image_size
        low, true = ((batch[name][: max(1, PREVIEW_PIXELS // size**2)] + 1) / 2 for name in ("low", "image"))
        rows = [str(number) for number in range(len(low))]
        enlarged = self.pipeline(model).sample(low, rows, seed=self.run.seed)
        resized = enlarge(low, self.run.model.scale)
        shown = [("", images) for images in zip(*map(to_pil_images, (low, resized, enlarged, true)), strict=True)]
        return image_grid(shown, titles=["small", "bicubic", "upsampler", "true"], cell=max(128, size))

    def export(self, model: nn.Module, folder: Path) -> None:
        """A folder that `SuperResolution.from_pretrained` reads."""
        self.pipeline(model).save_pretrained(folder)


def psnr(images: Tensor, true: Tensor) -> Tensor:
    """(B,) of images in [−1, 1], in dB."""
    error = ((images - true) / 2).square().flatten(1).mean(dim=1)
    return -10 * error.clamp(min=1e-10).log10()


def _blurred(view: Pixels, scale: int, rng: np.random.Generator) -> Pixels:
    return blur(shrink(view, scale))


DEGRADATIONS: dict[str, Callable[[Pixels, int, np.random.Generator], Pixels] | None] = {
    "none": None,
    "blur": _blurred,
    "bsr": bsr,
    "bsr_light": partial(bsr, settings=LIGHT),
}
