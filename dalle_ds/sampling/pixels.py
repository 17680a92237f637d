"""Tensors to images."""

from __future__ import annotations

from PIL import Image
from torch import Tensor


def to_pil_images(images: Tensor) -> list[Image.Image]:
    """(B, 3, H, W) floats in [0, 1] → B RGB images."""
    pixels = (images.detach().float().clamp(0, 1) * 255).round().byte().permute(0, 2, 3, 1).cpu().numpy()
    return [Image.fromarray(picture) for picture in pixels]
