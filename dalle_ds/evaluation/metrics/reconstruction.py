"""How close a dVAE's reconstructions are to their pictures."""

from __future__ import annotations

import torch
from torch import Tensor

from dalle_ds.errors import ConfigError


def psnr(pixels: Tensor, others: Tensor) -> Tensor:
    """Peak signal-to-noise ratio of each pair, dB: (B, 3, H, W) uint8 twice → (B,) float64; equal pictures have 100."""
    squared = (pixels.double() - others.double()).square().mean(dim=(1, 2, 3)) / 255**2
    return -10 * torch.log10(squared.clamp_min(1e-10))


def ssim(pixels: Tensor, others: Tensor) -> Tensor:
    """Structural similarity of each pair (Wang et al., 2004): (B, 3, H, W) uint8 twice → (B,) float64 of at most 1.

    Gaussian windows of σ = 1.5 (11×11), constants 0.01² and 0.03² of the range, mean over pixels and channels.

    Raises:
        ConfigError: torchmetrics is not installed.
    """
    try:
        from torchmetrics.functional.image import structural_similarity_index_measure
    except ImportError as error:
        raise ConfigError('SSIM needs torchmetrics: pip install "dalle-ds[eval]"') from error
    one, other = pixels.float() / 255, others.float() / 255
    value = structural_similarity_index_measure(one, other, data_range=1.0, reduction="none")
    assert isinstance(value, Tensor)
    return value.double().view(len(pixels))
