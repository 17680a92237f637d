"""What is done to the small images that upsamplers learn from, so that they can make use of a decoder's, which are not
perfect (unCLIP §2.1): a Gaussian blur (SR3), or BSRGAN's chain of degradations (Zhang et al. 2021; Rombach et al. 2022).

All randomness is from the generator that is passed in: a sample's own, in a loader's worker.
"""

from __future__ import annotations

import io
import math
from dataclasses import dataclass
from typing import Literal

import numpy as np
import numpy.typing as npt
import torch
import torch.nn.functional as F
from PIL import Image
from torch import Tensor

from dalle_ds.errors import DataError

Pixels = npt.NDArray[np.uint8]
Interpolation = Literal["bilinear", "bicubic", "area"]
_INTERPOLATIONS: tuple[Interpolation, ...] = ("bilinear", "bicubic", "area")


def shrink(image: Pixels, scale: int) -> Pixels:
    """(H, W, 3) → (H / scale, W / scale, 3), each pixel the mean of scale².

    Raises:
        DataError: sides that are no multiples of `scale`.
    """
    height, width = image.shape[:2]
    if height % scale or width % scale:
        raise DataError(f"an image of {height} × {width} pixels cannot be made {scale} times smaller")
    blocks = image.reshape(height // scale, scale, width // scale, scale, 3)
    return np.rint(blocks.mean(axis=(1, 3))).astype(np.uint8)


def blur(image: Pixels, size: int = 3, sigma: float = 0.6) -> Pixels:
    """Gaussian blur of (H, W, 3), by default the first upsampler's (unCLIP App. C)."""
    return _to_pixels(_convolve(_to_tensor(image), _gaussian(size, (sigma**2, sigma**2))))


# --- BSR


@dataclass(frozen=True)
class BsrSettings:
    """What differs between the variants."""

    blurs: int = 2
    """How many."""
    blur_strength: float = 1.0
    """Factor of the blurs' greatest variances and deviations."""
    resize_share: float = 0.75
    """How often the first of the two resizings is by interpolation, not by blur and stride."""
    noise_levels: tuple[int, int] = (2, 25)
    """Least and greatest standard deviation of noise, of 255."""
    qualities: tuple[int, int] = (30, 95)
    """Least and greatest of JPEG."""


FULL = BsrSettings()
LIGHT = BsrSettings(blurs=1, blur_strength=0.25, resize_share=0.8, noise_levels=(1, 2), qualities=(80, 95))
JPEG_SHARE = 0.9
"""How often the chain has a JPEG before the one at its end."""
HALVE_SHARE = 0.25
"""How often, where images become four times smaller, half of it is done first."""
NOISES = {"grey": 0.4, "correlated": 0.2, "colour": 0.4}
"""Kinds of noise, and how often each is drawn."""


@dataclass(frozen=True)
class Step:
    """One degradation of a chain."""

    kind: Literal["halve", "blur", "resize", "stride", "to_size", "noise", "jpeg"]
    interpolation: Interpolation | Literal["antialiased"] = "bilinear"
    """Of halve, resize, to_size."""
    factor: float = 1.0
    """How many times smaller resize and stride make sides."""
    kernel: Tensor | None = None
    """Of blur and stride, (k, k) fp32 with a sum of 1."""
    noise: str = ""
    """Kind of noise."""
    level: int = 0
    """Standard deviation of noise, of 255, or JPEG's quality."""


def bsr_steps(scale: int, rng: np.random.Generator, settings: BsrSettings = FULL) -> list[Step]:
    """Draw a chain: blurs, a resizing to any size, one to the final size behind it, noise and JPEG in random order; then a
    JPEG."""
    steps: list[Step] = []
    if scale == 4 and rng.random() < HALVE_SHARE:
        kind = "antialiased" if rng.random() < 0.5 else _interpolation(rng)
        steps.append(Step("halve", kind))
        scale = 2
    middle = ["blur"] * settings.blurs + ["resize", "to_size", "noise", "jpeg"]
    order = [middle[place] for place in rng.permutation(len(middle))]
    first, second = sorted((order.index("resize"), order.index("to_size")))
    order[first], order[second] = "resize", "to_size"
    for kind in order:
        if kind == "blur":
            steps.append(Step("blur", kernel=_blur_kernel(scale, rng, settings.blur_strength)))
        elif kind == "resize" and rng.random() < settings.resize_share:
            steps.append(Step("resize", _interpolation(rng), factor=rng.uniform(1, 2 * scale)))
        elif kind == "resize":
            variance = rng.uniform(0.1, 0.6 * scale) ** 2
            # Off centre, so that every scale-th pixel is the middle of those that it stands for.
            kernel = _gaussian(25, (variance, variance), shift=(scale - 1) / 2)
            steps.append(Step("stride", factor=scale, kernel=kernel))
        elif kind == "to_size":
            steps.append(Step("to_size", _interpolation(rng)))
        elif kind == "noise":
            noise = str(rng.choice(list(NOISES), p=list(NOISES.values())))
            low, high = settings.noise_levels
            steps.append(Step("noise", noise=noise, level=int(rng.integers(low, high + 1))))
        elif rng.random() < JPEG_SHARE:
            steps.append(_jpeg_step(rng, settings))
    return [*steps, _jpeg_step(rng, settings)]


def bsr(image: Pixels, scale: int, rng: np.random.Generator, settings: BsrSettings = FULL) -> Pixels:
    """Degrade (H, W, 3) to (H / scale, W / scale, 3).

    Raises:
        DataError: sides that are no multiples of `scale`.
    """
    height, width = image.shape[:2]
    if height % scale or width % scale:
        raise DataError(f"an image of {height} × {width} pixels cannot be made {scale} times smaller")
    x = _to_tensor(image)
    for step in bsr_steps(scale, rng, settings):
        x = _apply(step, x, (height // scale, width // scale), rng, settings).clamp(0, 1)
    return _to_pixels(x)


def _apply(step: Step, x: Tensor, target: tuple[int, int], rng: np.random.Generator, settings: BsrSettings) -> Tensor:
    height, width = x.shape[1:]
    if step.kind == "blur":
        assert step.kernel is not None
        return _convolve(x, step.kernel)
    if step.kind == "stride":
        assert step.kernel is not None
        stride = int(step.factor)
        return _convolve(x, step.kernel)[:, ::stride, ::stride]
    if step.kind == "noise":
        return x + torch.from_numpy(_noise(step, (height, width), rng, settings)).permute(2, 0, 1)
    if step.kind == "jpeg":
        buffer = io.BytesIO()
        Image.fromarray(_to_pixels(x)).save(buffer, format="JPEG", quality=step.level)
        return _to_tensor(np.asarray(Image.open(buffer)))
    if step.kind == "to_size":
        return _resize(x, target, step.interpolation)
    factor = 2 if step.kind == "halve" else step.factor
    return _resize(x, (max(1, int(height / factor)), max(1, int(width / factor))), step.interpolation)


def _noise(
    step: Step, size: tuple[int, int], rng: np.random.Generator, settings: BsrSettings
) -> npt.NDArray[np.float32]:
    if step.noise != "correlated":
        channels = 3 if step.noise == "colour" else 1
        return rng.standard_normal((*size, channels), dtype=np.float32) * np.float32(step.level / 255)
    rotation = np.linalg.svd(rng.random((3, 3)))[0]
    covariance = np.abs((settings.noise_levels[1] / 255) ** 2 * rotation.T @ np.diag(rng.random(3)) @ rotation)
    values, vectors = np.linalg.eigh(covariance)  # which the absolute values may have made negative
    root = (vectors * np.sqrt(values.clip(min=0))).astype(np.float32)
    return rng.standard_normal((*size, 3), dtype=np.float32) @ root.T


def _jpeg_step(rng: np.random.Generator, settings: BsrSettings) -> Step:
    low, high = settings.qualities
    return Step("jpeg", level=int(rng.integers(low, high + 1)))


def _interpolation(rng: np.random.Generator) -> Interpolation:
    return _INTERPOLATIONS[int(rng.integers(3))]


def _blur_kernel(scale: int, rng: np.random.Generator, strength: float) -> Tensor:
    """Round or elliptic, as often; its size does not go with its width."""
    round_one = rng.random() < 0.5
    size = 2 * int(rng.integers(2, 12)) + 3
    if round_one:
        variance = ((2 + 0.2 * scale) * strength * rng.random()) ** 2
        return _gaussian(size, (variance, variance))
    across, along = (4 + scale) * strength * rng.random(2)
    return _gaussian(size, (across, along), angle=math.pi * rng.random())


def _gaussian(size: int, variances: tuple[float, float], angle: float = 0.0, shift: float = 0.0) -> Tensor:
    """(size, size) fp32 with a sum of 1: variances along two axes, the first of which is turned by `angle`."""
    places = np.arange(size) - (size - 1) / 2 - shift
    y, x = places[:, None], places[None]
    along, across = x * math.cos(angle) + y * math.sin(angle), y * math.cos(angle) - x * math.sin(angle)
    first, second = (max(variance, 1e-3) for variance in variances)
    exponent = 0.5 * (along**2 / first + across**2 / second)
    kernel = np.exp(exponent.min() - exponent)  # however narrow, its greatest entry is 1
    return torch.from_numpy((kernel / kernel.sum()).astype(np.float32))


def _convolve(x: Tensor, kernel: Tensor) -> Tensor:
    """(3, H, W) with a (k, k) kernel, the image mirrored at its edges; kernels larger than the image lose their margins."""
    excess = max(0, kernel.shape[0] // 2 - (min(x.shape[1:]) - 1))
    if excess:
        kernel = kernel[excess:-excess, excess:-excess]
        kernel = kernel / kernel.sum()
    margin = kernel.shape[0] // 2
    if not margin:
        return x
    padded = F.pad(x[None], [margin] * 4, mode="reflect")[0]
    if kernel.shape[0] <= 3:
        return F.conv2d(padded[:, None], kernel[None, None])[:, 0]
    # A product of Fourier transforms: a kernel of 25² would take 25 times as long.
    size = padded.shape[1:]
    spectrum = torch.fft.rfft2(padded) * torch.fft.rfft2(kernel.flip(0, 1), s=size)
    whole = torch.fft.irfft2(spectrum, s=size)
    return whole[:, 2 * margin :, 2 * margin :]


def _resize(x: Tensor, size: tuple[int, int], interpolation: str) -> Tensor:
    """Without a low-pass filter, as BSRGAN's, but for "area" and "antialiased" (bicubic)."""
    if interpolation == "area":
        return F.interpolate(x[None], size, mode="area")[0]
    mode = "bicubic" if interpolation == "antialiased" else interpolation
    return F.interpolate(x[None], size, mode=mode, antialias=interpolation == "antialiased", align_corners=False)[0]


def _to_tensor(image: Pixels) -> Tensor:
    return torch.from_numpy(np.array(image.transpose(2, 0, 1), np.float32)) / 255


def _to_pixels(x: Tensor) -> Pixels:
    return (x.clamp(0, 1) * 255).round().byte().permute(1, 2, 0).numpy()
