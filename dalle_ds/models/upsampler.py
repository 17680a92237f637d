"""unCLIP's upsamplers: from a small image to one four times as long on each side, by diffusion (unCLIP §2.1, App. C).

They have no attention and are told nothing of captions: trained on crops, they take images of any size.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from dalle_ds.config import Checkpointing, UpsamplerConfig
from dalle_ds.errors import DataError
from dalle_ds.models.pretrained import load_model, loaded, save_model
from dalle_ds.models.unet import upsampler_unet, use_keyed_dropout


class Upsampler(nn.Module):
    """Predicts noise, clean image or v from a noised image and a smaller clean one; with `learned_variance`, behind them what
    `diffusion.steps.learned_log_variance` takes.

    Args:
        config: shape of the model.
        checkpointing: "none" or "full".
    """

    def __init__(self, config: UpsamplerConfig, *, checkpointing: Checkpointing = "none") -> None:
        super().__init__()
        self.config = config
        self.unet: Any = upsampler_unet(config, checkpointing)
        self._give_seeds = use_keyed_dropout(self.unet, config.dropout)

    def forward(
        self,
        x: Tensor,
        timesteps: Tensor,
        low: Tensor,
        *,
        noise_steps: Tensor | None = None,
        dropout_seeds: Tensor | None = None,
    ) -> Tensor:
        """Predict.

        Args:
            x: (B, 3, H, W), noised images whose clean pixels are in [−1, 1]; sides are multiples of `config.factor`.
            timesteps: (B,) int64 training timesteps.
            low: (B, 3, H / scale, W / scale) in [−1, 1].
            noise_steps: (B,) int64, with noise augmentation: the timestep of the noise in `low`; None: none.
            dropout_seeds: as `UnclipDecoder.forward`.

        Returns:
            (B, 3 or 6, H, W) fp32.

        Raises:
            DataError: a wrong shape.
        """
        scale, factor = self.config.scale, self.config.factor
        small = (x.shape[0], 3, x.shape[2] // scale, x.shape[3] // scale)
        if x.shape[1] != 3 or low.shape != small or x.shape[2] % factor or x.shape[3] % factor:
            raise DataError(
                f"images need sides that are multiples of {factor} and {scale}, and small ones 1/{scale} of these, found "
                f"{tuple(x.shape)} and {tuple(low.shape)}"
            )
        self._give_seeds(dropout_seeds)
        dtype = self.unet.conv_in.weight.dtype
        labels = None
        if self.config.noise_augmentation:
            labels = torch.zeros_like(timesteps) if noise_steps is None else noise_steps
        output = self.unet(torch.cat([x, enlarge(low, scale)], dim=1).to(dtype), timesteps, class_labels=labels)
        predicted: Tensor = output.sample
        return predicted.float()

    @classmethod
    def from_pretrained(cls, path: str | Path) -> Upsampler:
        """The upsampler exported in `path`, or in `path`/export where that is a run directory, in eval mode on the CPU.

        Raises:
            CheckpointError: nothing there, another kind of model, or weights that do not fit.
        """
        config, weights = load_model(path, "upsampler", UpsamplerConfig)
        return loaded(lambda: cls(config), config, weights, path)

    def save_pretrained(self, path: str | Path) -> None:
        """Export to folder `path`: `config.json` and `model.safetensors`; CheckpointError where it cannot be written."""
        save_model(path, "upsampler", self.config, self.state_dict())


def enlarge(images: Tensor, scale: int) -> Tensor:
    """(B, 3, h, w) → (B, 3, scale · h, scale · w) fp32, smoothly: bicubic, with the kernel that keeps a ramp a ramp."""
    size = [side * scale for side in images.shape[2:]]
    return F.interpolate(images.float(), size, mode="bicubic", align_corners=False, antialias=True)
