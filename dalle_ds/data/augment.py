"""Views of images: the two augmentations of DALL·E (Listings 1 and 2), for any size R in place of 256, and those of CLIP.

DALL·E's end in a random R×R crop of an area-resized square. The paper's images are at least R pixels on each side; here
smaller ones are enlarged to R by the same resize. CLIP's are squares, resized by Pillow's antialiased bicubic filter as in its
own pipeline. All randomness comes from the generator passed in, and no arithmetic depends on the number of threads, so equal
generators give equal bytes everywhere.
"""

from __future__ import annotations

import math
from functools import lru_cache

import numpy as np
import numpy.typing as npt
from PIL import Image

from dalle_ds.data.images import Pixels
from dalle_ds.data.order import hash_integers

EMBEDDED_CROP = 0.9
"""Of random views whose embeddings are cached: what CLIP is trained with by default, so that views of square images differ,
too."""
LONGEST = 16
"""How many times as long as it is wide an image of CLIP may be without being cut before it is resized."""


def useful_short_side(image_size: int) -> int:
    """The longest side that either augmentation resizes to: the `short_side` hint for `decode_image`."""
    return round(12 / 8 * image_size)


def augment_for_dvae(pixels: Pixels, image_size: int, rng: np.random.Generator) -> Pixels:
    """A random view for dVAE training (DALL·E Listing 1): random square, random scale, random crop, random mirroring.

    Args:
        pixels: (H, W, 3) of any size.
        image_size: R.

    Returns:
        (R, R, 3), a new array.
    """
    side = min(pixels.shape[:2])
    square = _random_crop(pixels, side, rng)
    smallest = max(image_size, min(side, round(9 / 8 * image_size)))
    largest = max(image_size, min(side, round(12 / 8 * image_size)))
    target = int(rng.integers(smallest, largest + 1))
    view = _random_crop(resize_area(square, target), image_size, rng)
    mirrored = rng.random() < 0.5
    return np.ascontiguousarray(view[:, ::-1] if mirrored else view)


def augment_for_transformer(pixels: Pixels, image_size: int, rng: np.random.Generator) -> Pixels:
    """A random view for transformer training (DALL·E Listing 2): a square near the middle, hardly scaled, not mirrored.

    Args and result are those of `augment_for_dvae`.
    """
    height, width = pixels.shape[:2]
    side = min(height, width)
    top, left = _offset_near_middle(height - side, rng), _offset_near_middle(width - side, rng)
    square = pixels[top : top + side, left : left + side]
    largest = max(image_size, min(side, round(9 / 8 * image_size)))
    target = int(rng.integers(image_size, largest + 1))
    return np.ascontiguousarray(_random_crop(resize_area(square, target), image_size, rng))


def clip_center_view(pixels: Pixels, size: int) -> Pixels:
    """The (size, size, 3) view of (H, W, 3) pixels that CLIP's evaluation takes: the shorter side resized to `size`, then the
    central square."""
    short = min(pixels.shape[:2])
    # The shorter side of an image of 1 × 50,000 pixels, resized, would make it one of many gigabytes.
    spare = [max(0, side - LONGEST * short) // 2 for side in pixels.shape[:2]]
    pixels = pixels[spare[0] : pixels.shape[0] - spare[0], spare[1] : pixels.shape[1] - spare[1]]
    height, width = pixels.shape[:2]
    resized = np.asarray(
        Image.fromarray(pixels).resize((size * width // short, size * height // short), Image.Resampling.BICUBIC)
    )
    top, left = (resized.shape[0] - size) // 2, (resized.shape[1] - size) // 2
    return resized[top : top + size, left : left + size]


def clip_random_view(
    pixels: Pixels, size: int, rng: np.random.Generator, min_crop: float = 1.0, mirror: bool = False
) -> Pixels:
    """A random square of an image, resized.

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


def embedded_view(pixels: Pixels, size: int, seed: tuple[int, int, int]) -> Pixels:
    """A random view whose embedding is cached, from the cache's seed, row and view: of any `size`, always of the same part of
    the image."""
    return clip_random_view(pixels, size, np.random.default_rng(hash_integers(*seed)), EMBEDDED_CROP)


def resize_area(square: Pixels, size: int) -> Pixels:
    """`tf.image.resize_area(align_corners=True)` of TensorFlow 1, clipped to [0, 255] and rounded half to even: (S, S, 3) →
    (size, size, 3)."""
    if square.shape[0] == size:  # the weights are the identity
        return square
    across = _weighted_rows(square, size).transpose(1, 0, 2)  # (S, size, 3)
    resized = _weighted_rows(np.ascontiguousarray(across), size).transpose(1, 0, 2)  # (size, size, 3)
    return np.rint(np.clip(resized, 0, 255)).astype(np.uint8)


def _offset_near_middle(slack: int, rng: np.random.Generator) -> int:
    start = 3 * slack // 8
    return int(rng.integers(start, max(start + 1, 5 * slack // 8)))


def _random_crop(pixels: Pixels, size: int, rng: np.random.Generator) -> Pixels:
    top = int(rng.integers(pixels.shape[0] - size + 1))
    left = int(rng.integers(pixels.shape[1] - size + 1))
    return pixels[top : top + size, left : left + size]


def _weighted_rows(pixels: npt.NDArray[np.uint8] | npt.NDArray[np.float32], size: int) -> npt.NDArray[np.float32]:
    """Resize the first axis. A matrix product would be slower, and round differently with more threads."""
    rows, weights = _area_weights(pixels.shape[0], size)
    flat = np.ascontiguousarray(pixels, dtype=np.float32).reshape(pixels.shape[0], -1)
    result = flat[rows[:, 0]] * weights[:, :1]
    term = np.empty_like(result)
    for tap in range(1, rows.shape[1]):
        np.take(flat, rows[:, tap], axis=0, out=term, mode="clip")  # "clip" writes to `out` without a buffer
        term *= weights[:, tap, None]
        result += term
    return result.reshape(size, *pixels.shape[1:])


@lru_cache(maxsize=1024)
def _area_weights(length: int, size: int) -> tuple[npt.NDArray[np.intp], npt.NDArray[np.float32]]:
    """Which input rows make up each output row, and with what weight: two (size, taps) arrays.

    Output y is the integral of the input over [y·scale, (y+1)·scale), divided by scale. With aligned corners the last
    interval reaches beyond the input, whose last row is then repeated.
    """
    scale = (length - 1) / (size - 1) if size > 1 else length / size
    if scale == 0.0:  # one pixel enlarged: TensorFlow divides by zero, here the pixel is repeated
        return np.zeros((size, 1), dtype=np.intp), np.ones((size, 1), dtype=np.float32)
    start = np.arange(size) * scale
    end = start + scale
    rows = np.floor(start).astype(np.intp)[:, None] + np.arange(math.ceil(scale) + 1)  # (size, taps)
    overlap = np.minimum(rows + 1, end[:, None]) - np.maximum(rows, start[:, None])
    weights = np.maximum(overlap, 0.0) / scale
    return np.minimum(rows, length - 1), weights.astype(np.float32)
