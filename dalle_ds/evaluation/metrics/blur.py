"""Gaussian blur of pictures before their features are taken (DALL·E §3.1, Fig. 9).

The paper blurs generated and real pictures alike, at radii of 0, 1, 2, 4 and 8 pixels, so that a model is judged by its
low-frequency structure where its decoder cannot draw fine detail. "Radius" is the standard deviation in pixels, as in
Pillow's `ImageFilter.GaussianBlur`, which approximates by three box blurs what is computed exactly here.
"""

from __future__ import annotations

import math

import torch
import torch.nn.functional as F
from torch import Tensor

from dalle_ds.errors import ConfigError

BLUR = "Gaussian, radius = standard deviation in pixels, edge repeated, rounded to 8 bits"
"""What `gaussian_blur` does, for protocols."""
TRUNCATE = 4.0
"""Standard deviations at which the kernel ends."""


def gaussian_blur(pixels: Tensor, radius: float) -> Tensor:
    """Pictures blurred and rounded to whole levels again, as if they had been stored blurred.

    Args:
        pixels: (B, 3, H, W) uint8. Beyond the border, the border's pixels are repeated.
        radius: standard deviation of the kernel, pixels; 0 returns `pixels` themselves.

    Returns:
        (B, 3, H, W) uint8.

    Raises:
        ConfigError: a radius that is negative or not finite.
    """
    if not (math.isfinite(radius) and radius >= 0):
        raise ConfigError(f"a blur radius must be 0 or greater, found {radius}")
    if radius == 0:
        return pixels
    reach = int(TRUNCATE * radius + 0.5)
    offsets = torch.arange(-reach, reach + 1, dtype=torch.float64, device=pixels.device)
    kernel = torch.exp(-0.5 * (offsets / radius) ** 2)
    kernel = (kernel / kernel.sum()).float()
    batch, channels, height, width = pixels.shape
    planes = pixels.reshape(batch * channels, 1, height, width).float()
    planes = F.conv2d(_extended(planes, 2, reach), kernel.view(1, 1, -1, 1))
    planes = F.conv2d(_extended(planes, 3, reach), kernel.view(1, 1, 1, -1))
    return planes.round().clamp(0, 255).byte().view(batch, channels, height, width)


def _extended(planes: Tensor, dim: int, reach: int) -> Tensor:
    """`reach` more rows or columns at either end; `F.pad` does the same, but not further than a picture is long."""
    size = planes.shape[dim]
    index = torch.arange(-reach, size + reach, device=planes.device).clamp(0, size - 1)
    return planes.index_select(dim, index)
