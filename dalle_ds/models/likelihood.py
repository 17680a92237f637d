"""Pixel mapping and the logit-Laplace distribution (DALL·E App. A.3)."""

from __future__ import annotations

import math

import torch
import torch.nn.functional as F
from torch import Tensor

EPSILON = 0.1
"""Width of the margin that keeps mapped pixels away from 0 and 1, where the density has poles."""


def map_pixels(images: Tensor) -> Tensor:
    """φ: pixels in [0, 1] → [ε, 1 − ε], where the likelihood is evaluated and what the encoder sees."""
    return (1 - 2 * EPSILON) * images + EPSILON


def unmap_pixels(mapped: Tensor) -> Tensor:
    """φ⁻¹, clamped to [0, 1]."""
    return ((mapped - EPSILON) / (1 - 2 * EPSILON)).clamp(0, 1)


def logit_laplace_nll(pixels: Tensor, mu: Tensor, log_b: Tensor) -> Tensor:
    """Negative log-likelihood of pixels under the logit-Laplace distribution, in nats (DALL·E App. A.3).

    It is the density of sigmoid(x) for x ~ Laplace(mu, exp(log_b)):
    ln f = −ln 2 − ln b − ln v − ln(1 − v) − |logit(v) − mu| / b.

    Args:
        pixels: (B, 3, H, W) in the open interval (0, 1), as `map_pixels` returns them.
        mu, log_b: (B, 3, H, W), location and log scale of the Laplace distribution in logit space.

    Returns:
        (B, 3, H, W), one value per pixel and channel; the caller averages.
    """
    logits = torch.logit(pixels)
    # −ln v − ln(1 − v) = softplus(−logit) + softplus(logit), exact where ln(1 − v) would round.
    log_jacobian = F.softplus(-logits) + F.softplus(logits)
    # exp(−ln b) overflows fp32 below −88; 0 · inf would be NaN where mu is exact.
    return math.log(2.0) + log_b - log_jacobian + (logits - mu).abs() * torch.exp(-log_b.clamp_min(-80))
