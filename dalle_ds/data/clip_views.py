"""Views of pictures for CLIP: squares, resized by Pillow's antialiased bicubic filter as in its own pipeline."""

from __future__ import annotations

import math

import numpy as np
from PIL import Image

from dalle_ds.data.images import Pixels

LONGEST = 16
"""How many times as long as it is wide a picture may be without being cut before it is resized."""


def center_view(pixels: Pixels, size: int) -> Pixels:
    """The view that CLIP's evaluation takes: the shorter side resized to `size`, then the central square.

    Args:
        pixels: (H, W, 3) of any size; smaller pictures are enlarged.

    Returns:
        (size, size, 3).
    """
    short = min(pixels.shape[:2])
    # The shorter side of a picture of 1 × 50,000 pixels, resized, would make it one of many gigabytes.
    spare = [max(0, side - LONGEST * short) // 2 for side in pixels.shape[:2]]
    pixels = pixels[spare[0] : pixels.shape[0] - spare[0], spare[1] : pixels.shape[1] - spare[1]]
    height, width = pixels.shape[:2]
    resized = np.asarray(
        Image.fromarray(pixels).resize((size * width // short, size * height // short), Image.Resampling.BICUBIC)
    )
    top, left = (resized.shape[0] - size) // 2, (resized.shape[1] - size) // 2
    return resized[top : top + size, left : left + size]


def random_view(
    pixels: Pixels, size: int, rng: np.random.Generator, min_crop: float = 1.0, mirror: bool = False
) -> Pixels:
    """A random square of a picture, resized.

    Args:
        pixels: (H, W, 3) of any size.
        size: side of the view.
        min_crop: the least share of the area of the greatest possible square that is taken, in (0, 1]; areas are drawn evenly
            from there to 1. At 1, the greatest square at a random place: "a random square crop from resized images" (CLIP
            §2.3). open_clip takes 0.9.
        mirror: mirror every other view.

    Returns:
        (size, size, 3), a new array.
    """
    height, width = pixels.shape[:2]
    side = min(height, width) * math.sqrt(rng.uniform(min_crop, 1.0))
    left, top = rng.uniform(0, width - side), rng.uniform(0, height - side)
    box = (left, top, left + side, top + side)
    view = np.asarray(Image.fromarray(pixels).resize((size, size), Image.Resampling.BICUBIC, box=box))
    mirrored = mirror and rng.random() < 0.5
    return np.ascontiguousarray(view[:, ::-1] if mirrored else view)
