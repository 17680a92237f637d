"""Blur: what "radius" means, and that none is none."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from PIL import Image, ImageFilter
from scipy.ndimage import gaussian_filter

from dalle_ds.errors import ConfigError
from dalle_ds.evaluation.features import gaussian_blur

RADII = (1.0, 2.0, 4.0, 8.0)


def noise(height: int, width: int, count: int = 2) -> torch.Tensor:
    """Random images: nothing is harder to blur right."""
    return torch.randint(
        0, 256, (count, 3, height, width), dtype=torch.uint8, generator=torch.Generator().manual_seed(0)
    )


def test_radius_0_is_no_blur() -> None:
    pixels = noise(9, 12)
    assert torch.equal(gaussian_blur(pixels, 0), pixels)


@pytest.mark.parametrize("radius", RADII)
@pytest.mark.parametrize("shape", [(48, 40), (5, 7)])  # the second one smaller than the kernel
def test_radius_is_the_standard_deviation_as_scipy_has_it(radius: float, shape: tuple[int, int]) -> None:
    pixels = noise(*shape)
    exact = gaussian_filter(pixels.numpy().astype(np.float64), (0, 0, radius, radius), mode="nearest", truncate=4)
    blurred = gaussian_blur(pixels, radius)
    assert blurred.dtype == torch.uint8
    assert np.abs(blurred.numpy() - exact).max() < 0.501  # rounding


@pytest.mark.parametrize("radius", RADII)
def test_pillow_approximates_the_same_blur(radius: float) -> None:
    pixels = noise(64, 64, 1)
    picture = Image.fromarray(pixels[0].permute(1, 2, 0).numpy())
    theirs = np.asarray(picture.filter(ImageFilter.GaussianBlur(radius)), dtype=np.float64)
    ours = gaussian_blur(pixels, radius)[0].permute(1, 2, 0).numpy().astype(np.float64)
    unblurred = pixels[0].permute(1, 2, 0).numpy().astype(np.float64)
    assert np.abs(ours - theirs).mean() < 1.5  # of 256 levels: three box blurs are not quite a Gaussian
    assert np.abs(ours - theirs).mean() < 0.05 * np.abs(ours - unblurred).mean()


@pytest.mark.parametrize("radius", [-1.0, float("nan"), float("inf")])
def test_a_radius_that_is_none_is_refused(radius: float) -> None:
    with pytest.raises(ConfigError, match="0 or greater"):
        gaussian_blur(noise(4, 4), radius)
