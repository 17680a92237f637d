"""Small images to large ones: an upsampler with all that using it needs (unCLIP §2.1)."""

from __future__ import annotations

import math
from collections.abc import Sequence
from functools import partial
from pathlib import Path
from typing import cast

import torch
from torch import Tensor, nn

from dalle_ds.config import ImageSampling
from dalle_ds.diffusion import step_grid
from dalle_ds.errors import CheckpointError, ConfigError, DataError
from dalle_ds.files import built_beside
from dalle_ds.models.pretrained import export_folder
from dalle_ds.models.upsampler import Upsampler, enlarge
from dalle_ds.sampling.image_diffusion import (
    DiffusionFacts,
    Known,
    OnStep,
    denoise_images,
    image_generators,
    invert_images,
    invertible_grid,
    of_all,
)

LAST_NAME = "last"
"""In an export: the folder of `SuperResolution.last`."""


class SuperResolution:
    """Samples large images, given small ones.

    Args:
        upsampler: in eval mode; its device is where everything runs.
        facts: of its training.
        last: makes the last step, in eval mode, of the same configuration and on the same device; Karlo's is tuned for detail.
            None: `upsampler` makes all.
    """

    def __init__(self, upsampler: Upsampler, facts: DiffusionFacts, last: Upsampler | None = None) -> None:
        self.upsampler, self.facts, self.last = upsampler, facts, last

    @property
    def device(self) -> torch.device:
        """Where everything runs."""
        return next(self.upsampler.parameters()).device

    @property
    def module(self) -> nn.Module:
        """What has the weights."""
        return self.upsampler if self.last is None else nn.ModuleList([self.upsampler, self.last])

    def to(self, device: str | torch.device) -> None:
        """Move the model."""
        self.module.to(device)

    @classmethod
    def from_pretrained(
        cls, path: str | Path, device: str | torch.device = "cpu", dtype: torch.dtype = torch.float32
    ) -> SuperResolution:
        """Load what a run of launchers/train_upsampler.py exports, from the run directory or its export; CheckpointError where
        something is missing."""
        folder = export_folder(path)
        facts, _ = DiffusionFacts.read(folder)
        parts = [folder, *([folder / LAST_NAME] if (folder / LAST_NAME).is_dir() else [])]
        first, *last = (Upsampler.from_pretrained(part).to(device, dtype) for part in parts)
        return cls(first, facts, *last)

    def save_pretrained(self, path: str | Path) -> None:
        """Write what `from_pretrained` reads into folder `path`, whole or not at all; CheckpointError where it cannot be."""
        try:
            with built_beside(Path(path)) as partial:
                self.upsampler.save_pretrained(partial)
                if self.last is not None:
                    self.last.save_pretrained(partial / LAST_NAME)
                self.facts.write(partial)
        except OSError as error:
            raise CheckpointError(f"could not write the upsampler to {path}: {error}; free some space") from error

    @torch.no_grad()
    def sample(
        self,
        low: Tensor,
        captions: Sequence[str],
        *,
        seed: int = 0,
        numbers: Sequence[int] | None = None,
        sampling: ImageSampling | None = None,
        tile: int | None = None,
        batch_size: int = 4,
        on_step: OnStep | None = None,
        start: Tensor | None = None,
        known: Known | None = None,
    ) -> Tensor:
        """Enlarge images, of any size whose sides, enlarged, are multiples of `config.factor`.

        Args:
            low: (B, 3, h, w) in [0, 1].
            captions, seed, numbers: choose the noise, as `EmbeddingToImage.sample`.
            sampling: None takes that of the export.
            tile: side in pixels of overlapping squares of the large image that are computed one at a time, for small memory:
                what is predicted is blended at every step. None computes it whole; the two differ a little, since
                normalization then is over a tile.
            batch_size: images at a time.
            on_step: told of steps done, over all images.
            start, known: as `denoise_images` takes them.

        Returns:
            (B, 3, scale · h, scale · w) fp32 in [0, 1], on the CPU.

        Raises:
            ConfigError: noise for a model that is not told of it; a tile that is no multiple of what sides must be.
        """
        sampling, config = sampling or self.facts.sampling, self.upsampler.config
        if sampling.guidance != 1:
            raise ConfigError(f"sampling.guidance={sampling.guidance}: upsamplers have no guidance, leave it out")
        if sampling.noise and not (config.noise_augmentation and sampling.noise <= self.facts.noise_share):
            raise ConfigError(
                f"sampling.noise={sampling.noise} needs an upsampler trained with model.noise_augmentation and as much of "
                f"objective.noise, of which this one had {self.facts.noise_share}"
            )
        self.check_tile(tile)
        last_step = step_grid(sampling.steps, self.facts.timesteps)[0]
        if len(low) != len(captions):
            raise DataError(f"{len(low)} images need as many captions, found {len(captions)}")
        # Of a number of its own for each size: two upsamplers in a row must not begin with the same noise.
        generators = image_generators(f"upsampler {config.image_size}", captions, seed, numbers)
        height, width = (side * config.scale for side in low.shape[2:])
        found, chunks = [], range(0, len(low), batch_size)
        for number, first in enumerate(chunks):
            chunk = slice(first, first + batch_size)
            small = low[chunk].to(self.device) * 2 - 1
            schedule = self.facts.noise
            noise_step = int(sampling.noise * len(schedule))
            if noise_step:
                drawn = [torch.randn(small.shape[1:], generator=generator) for generator in generators[chunk]]
                small = schedule.add_noise(small, torch.stack(drawn).to(small), noise_step)

            images = denoise_images(
                partial(self._predict, low=small, noise_step=noise_step, tile=tile, last_step=last_step),
                (3, height, width),
                generators[chunk],
                self.facts,
                sampling,
                self.device,
                self._base(small),
                of_all(on_step, number, len(chunks)),
                None if start is None else start[chunk],
                None if known is None else known.of(chunk),
            )
            found.append(images.cpu())
        return (torch.cat(found) + 1) / 2 if found else torch.empty(0, 3, height, width)

    @torch.no_grad()
    def invert(
        self,
        images: Tensor,
        low: Tensor,
        *,
        steps: str,
        iterations: int = 0,
        batch_size: int = 4,
        on_step: OnStep | None = None,
    ) -> Tensor:
        """Noise of which `sample`, by DDIM with η = 0, makes (B, 3, H, W) images in [0, 1] of small ones again, on the CPU;
        the other arguments are those of `sample` and `invert_images`."""
        last_step = int(invertible_grid(self.facts.noise, steps).timesteps[0])
        found, chunks = [], range(0, len(images), batch_size)
        for number, first in enumerate(chunks):
            chunk = slice(first, first + batch_size)
            signed, small = (part[chunk].to(self.device) * 2 - 1 for part in (images, low))
            predict, told = partial(self._predict, low=small, last_step=last_step), of_all(on_step, number, len(chunks))
            inverted = invert_images(predict, signed, self.facts, steps, iterations, self._base(small), told)
            found.append(inverted.cpu())
        return torch.cat(found)

    def _base(self, low: Tensor) -> Tensor | None:
        """What images are sampled as differences from."""
        return enlarge(low, self.upsampler.config.scale) if self.facts.residual else None

    def check_tile(self, tile: int | None) -> None:
        """Raise a `ConfigError` for a side of tiles that this model cannot have."""
        step = math.lcm(self.upsampler.config.factor, self.upsampler.config.scale)
        if tile is not None and (tile < 2 * step or tile % step):
            side = self.upsampler.config.image_size
            raise ConfigError(
                f"tile must be a multiple of {step}, at least {2 * step}, to make {side} pixels, found {tile}"
            )

    def _predict(
        self, x: Tensor, timestep: int, low: Tensor, last_step: int, noise_step: int = 0, tile: int | None = None
    ) -> Tensor:
        model = self.last if self.last is not None and timestep == last_step else self.upsampler
        scale = model.config.scale
        steps, noise_steps = (torch.full((len(x),), value, device=x.device) for value in (timestep, noise_step))
        if tile is None or tile >= max(x.shape[2:]):
            return cast(Tensor, model(x, steps, low, noise_steps=noise_steps))
        step = math.lcm(model.config.factor, scale)
        total: Tensor | None = None
        weights = x.new_zeros(1, 1, *x.shape[2:])
        for top in _starts(x.shape[2], tile, step):
            for left in _starts(x.shape[3], tile, step):
                rows, columns = slice(top, top + tile), slice(left, left + tile)
                small = low[:, :, top // scale : (top + tile) // scale, left // scale : (left + tile) // scale]
                part = model(x[:, :, rows, columns], steps, small, noise_steps=noise_steps)
                if total is None:
                    total = x.new_zeros(len(x), part.shape[1], *x.shape[2:])
                # Falls toward the edges, where a tile sees least of what is around.
                ramp_y, ramp_x = (_ramp(size, tile, x.device) for size in part.shape[2:])
                weight = ramp_y[:, None] * ramp_x
                total[:, :, rows, columns] += part * weight
                weights[:, :, rows, columns] += weight
        assert total is not None
        return total / weights


def _starts(side: int, tile: int, step: int) -> list[int]:
    """Where tiles of a side begin, multiples of `step`, which overlap by a quarter at least."""
    if side <= tile:
        return [0]
    count = math.ceil((side - tile) / (tile * 3 // 4 // step * step or step)) + 1
    return [round(place * (side - tile) / (count - 1) / step) * step for place in range(count)]


def _ramp(size: int, tile: int, device: torch.device) -> Tensor:
    """(size,) weights: 1 in the middle, falling to near 0 over an eighth of a tile at both ends."""
    places = torch.arange(size, device=device) + 0.5
    return (torch.minimum(places, size - places) / (tile / 8)).clamp(max=1)
