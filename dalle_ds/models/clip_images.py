"""Images as CLIP takes them: central squares of its size, whatever they are given as."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image
from torch import Tensor

from dalle_ds.errors import DataError


def square_pixels(images: Tensor | Sequence[Image.Image], size: int) -> Tensor:
    """The central squares of images.

    Args:
        images: (B, 3, H, W) floats in [0, 1]; or PIL images of any sizes and modes, shown on white where transparent.
        size: side of the squares.

    Returns:
        (B, 3, size, size) fp32 in [0, 1]. PIL images are resized by Pillow, in bytes, as in OpenAI's and Hugging Face's
        pipelines; tensors by torch's antialiased bicubic filter, which differs from that by rounding only. A crop that
        cannot be central is half a pixel to the left and to the top, as Hugging Face's; torchvision's may be half a pixel to
        the right.

    Raises:
        DataError: a tensor of another shape or type, or no image at all.
    """
    if isinstance(images, Tensor):
        check_images(images)
        return _center(_resized(images.float(), size), size)
    if isinstance(images, Image.Image):
        raise DataError("images must be one tensor or a list of PIL images, found one PIL image: put it into a list")
    if len(images) == 0:
        raise DataError("there are no images to embed: give at least one")
    for image in images:
        if not isinstance(image, Image.Image):
            raise DataError(f"images must be one tensor or a list of PIL images, found a {type(image).__name__}")
    squares = [_square(image, size) for image in images]
    return torch.stack(squares).permute(0, 3, 1, 2).float() / 255


def check_images(images: Tensor, size: int | None = None) -> None:
    """Raise a `DataError` unless `images` are (B, 3, H, W) floats, of H = W = `size` if that is given."""
    sides = "(B, 3, H, W)" if size is None else f"(B, 3, {size}, {size})"
    fits = images.ndim == 4 and images.shape[1] == 3 and min(images.shape) > 0
    if not fits or (size is not None and images.shape[2:] != (size, size)):
        raise DataError(f"images must be {sides} with B of at least 1, found shape {tuple(images.shape)}")
    if not images.is_floating_point():
        raise DataError(f"images must be floats in [0, 1], found {images.dtype}: divide bytes by 255")


def _resized_shape(height: int, width: int, size: int) -> tuple[int, int]:
    """(height, width) whose shorter one is `size`; the longer one is rounded down, as in CLIP's pipeline."""
    short = min(height, width)
    return size * height // short, size * width // short


def _resized(images: Tensor, size: int) -> Tensor:
    shape = _resized_shape(images.shape[2], images.shape[3], size)
    if images.shape[2:] == shape:
        return images
    return F.interpolate(images, shape, mode="bicubic", antialias=True).clamp(0, 1)


def _square(image: Image.Image, size: int) -> Tensor:
    height, width = _resized_shape(image.height, image.width, size)
    resized = _rgb(image).resize((width, height), Image.Resampling.BICUBIC)
    return _center(torch.from_numpy(np.array(resized)).permute(2, 0, 1), size).permute(1, 2, 0)


def _rgb(image: Image.Image) -> Image.Image:
    if image.has_transparency_data:
        white = Image.new("RGBA", image.size, "white")
        return Image.alpha_composite(white, image.convert("RGBA")).convert("RGB")
    return image.convert("RGB")


def _center(images: Tensor, size: int) -> Tensor:
    top, left = (images.shape[-2] - size) // 2, (images.shape[-1] - size) // 2
    return images[..., top : top + size, left : left + size]
