"""What happens to pictures that are copied: cropped, stretched, scaled, turned, compressed, recoloured (CLIP App. C).

Each distortion takes (H, W, 3) pixels and a generator, and returns a new picture, of which only `stretch` changes the size.
All randomness comes from the generator, so equal generators give equal bytes.
"""

from __future__ import annotations

import io
import math
from collections.abc import Callable

import numpy as np
from PIL import Image

from dalle_ds.config.overlap import DistortionConfig
from dalle_ds.data.images import Pixels

RESAMPLERS = (
    Image.Resampling.NEAREST,
    Image.Resampling.BOX,
    Image.Resampling.BILINEAR,
    Image.Resampling.HAMMING,
    Image.Resampling.BICUBIC,
    Image.Resampling.LANCZOS,
)
"""Those that some program or other scales pictures with; every change of size takes one of them at random."""
_TURNING = (Image.Resampling.NEAREST, Image.Resampling.BILINEAR, Image.Resampling.BICUBIC)
_BEST_QUALITY = 95


def distort(pixels: Pixels, config: DistortionConfig, rng: np.random.Generator) -> Pixels:
    """A picture after a random choice of distortions, in the order of the functions below.

    Each distortion has a stream of random numbers of its own: leaving one out changes nothing in the others.

    Args:
        pixels: (H, W, 3) of any size; unchanged.

    Returns:
        (H', W', 3): another size than before only if the picture was stretched.
    """
    steps: tuple[tuple[bool, Callable[[Pixels, np.random.Generator], Pixels]], ...] = (
        (config.smallest_crop < 1, lambda picture, own: crop_and_zoom(picture, config.smallest_crop, own)),
        (config.most_stretch > 1, lambda picture, own: stretch(picture, config.most_stretch, own)),
        (config.smallest_scale < 1, lambda picture, own: rescale(picture, config.smallest_scale, own)),
        (config.most_degrees > 0, lambda picture, own: rotate(picture, config.most_degrees, own)),
        (
            config.hue + config.saturation + config.value > 0,
            lambda picture, own: jitter(picture, config.hue, config.saturation, config.value, own),
        ),
        (config.lowest_quality <= _BEST_QUALITY, lambda picture, own: compress(picture, config.lowest_quality, own)),
    )
    for (is_on, step), own in zip(steps, rng.spawn(len(steps)), strict=True):
        if own.random() < config.probability and is_on:
            pixels = step(pixels, own)
    return pixels


def crop_and_zoom(pixels: Pixels, smallest: float, rng: np.random.Generator) -> Pixels:
    """A random part with the picture's aspect ratio, `smallest` to 1 of each side, enlarged to the picture's size."""
    height, width = pixels.shape[:2]
    share = rng.uniform(smallest, 1.0)
    inner_height, inner_width = max(1, round(share * height)), max(1, round(share * width))
    top, left = rng.integers(height - inner_height + 1), rng.integers(width - inner_width + 1)
    part = pixels[top : top + inner_height, left : left + inner_width]
    return _resized(part, height, width, rng)


def stretch(pixels: Pixels, most: float, rng: np.random.Generator) -> Pixels:
    """Width / height multiplied by 1 / `most` to `most`, while width · height stays about what it was."""
    height, width = pixels.shape[:2]
    root = math.sqrt(math.exp(rng.uniform(-math.log(most), math.log(most))))
    return _resized(pixels, max(1, round(height / root)), max(1, round(width * root)), rng)


def rescale(pixels: Pixels, smallest: float, rng: np.random.Generator) -> Pixels:
    """Shrunk to `smallest` to 1 of each side and enlarged again, by another resampler."""
    height, width = pixels.shape[:2]
    share = rng.uniform(smallest, 1.0)
    small = _resized(pixels, max(1, round(share * height)), max(1, round(share * width)), rng)
    return _resized(small, height, width, rng)


def rotate(pixels: Pixels, most: float, rng: np.random.Generator) -> Pixels:
    """Turned by up to `most` degrees either way; the corners are white, black, or as the border is on average."""
    border = np.concatenate([pixels[0], pixels[-1], pixels[:, 0], pixels[:, -1]]).mean(axis=0)
    corners = ((255, 255, 255), (0, 0, 0), tuple(int(channel) for channel in border))
    turned = Image.fromarray(pixels).rotate(
        rng.uniform(-most, most),
        resample=_TURNING[int(rng.integers(len(_TURNING)))],
        fillcolor=corners[int(rng.integers(len(corners)))],
    )
    return np.asarray(turned)


def jitter(pixels: Pixels, hue: float, saturation: float, value: float, rng: np.random.Generator) -> Pixels:
    """HSV jitter: hue turned by up to `hue` of the circle, the other two multiplied by 1 minus to 1 plus theirs."""
    turn, *factors = rng.uniform((-hue, 1 - saturation, 1 - value), (hue, 1 + saturation, 1 + value))
    hsv = np.asarray(Image.fromarray(pixels).convert("HSV")).astype(np.float64)
    hsv[..., 0] += 256 * turn
    hsv[..., 1:] *= factors
    hsv = np.floor(hsv + 0.5)
    hsv[..., 0] %= 256  # after rounding, which may end at 256
    moved = np.clip(hsv, 0, 255).astype(np.uint8)
    return np.asarray(Image.fromarray(moved, "HSV").convert("RGB"))


def compress(pixels: Pixels, lowest: int, rng: np.random.Generator) -> Pixels:
    """Written as a JPEG of quality `lowest` to 95, with or without chroma subsampling, and read again."""
    buffer = io.BytesIO()
    quality, subsampling = int(rng.integers(lowest, _BEST_QUALITY + 1)), int(rng.choice((0, 2)))
    Image.fromarray(pixels).save(buffer, format="JPEG", quality=quality, subsampling=subsampling)
    return np.asarray(Image.open(buffer))


def _resized(pixels: Pixels, height: int, width: int, rng: np.random.Generator) -> Pixels:
    resampler = RESAMPLERS[int(rng.integers(len(RESAMPLERS)))]
    return np.asarray(Image.fromarray(pixels).resize((width, height), resampler))
