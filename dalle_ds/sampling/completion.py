"""Completing an image: the codes of its top rows are kept, the rest is sampled for a prompt (DALL·E §3.3)."""

from __future__ import annotations

import io
from pathlib import Path

import torch
from PIL import Image, ImageOps
from torch import Tensor

from dalle_ds.errors import ConfigError, DataError
from dalle_ds.models.vqgan import ImageTokenizer

_PNG_MODES = {"La": "LA", "PA": "RGBA", "RGBa": "RGBA", **dict.fromkeys(("CMYK", "YCbCr", "HSV", "RGBX"), "RGB")}
"""Of modes that PNGs do not have, those that hold the same."""


def default_rows(grid: int) -> int:
    """Rows of codes that are kept where nobody says: the paper's 15 of 32, or that share of another grid, at least 1."""
    return max(1, grid * 15 // 32)


def kept_rows_mask(grid: int, rows: int) -> Tensor:
    """Which codes of an image are kept: (grid, grid) bool, True in the top `rows` rows.

    Raises:
        ConfigError: rows outside of [0, grid].
    """
    if not 0 <= rows <= grid:
        raise ConfigError(
            f"rows of an image to keep must lie in [0, {grid}] for a grid of {grid} rows, found {rows}; "
            f"{default_rows(grid)} is the paper's share"
        )
    return (torch.arange(grid) < rows)[:, None].expand(grid, grid)


def open_image(image: str | Path | Image.Image, size: int) -> Image.Image:
    """The view of an image that the models know: upright, on white, its central square in `size` × `size` pixels.

    Args:
        image: a file, or an image of any size and mode.

    Raises:
        DataError: a file that cannot be read, or is no image; an image whose pixels are floats.
    """
    # `datasets` is not loaded to sample for prompts alone
    from dalle_ds.data.images import center_crop_resize, decode_image

    if isinstance(image, Image.Image):
        return Image.fromarray(center_crop_resize(decode_image(_as_png(image)), size))
    try:
        # Not `short_side`: it would decode a large JPEG in another way than the same image in memory.
        return Image.fromarray(center_crop_resize(decode_image(Path(image).read_bytes()), size))
    except OSError as error:
        raise DataError(f"the image {image} cannot be read: {error.strerror}; name a file") from error
    except DataError as error:
        raise DataError(f"{image}: {error}; name a file with an image") from error


def _as_png(image: Image.Image) -> bytes:
    """An image in memory as a file with the same pixels."""
    buffer = io.BytesIO()
    try:
        upright = ImageOps.exif_transpose(image)
        mode = _PNG_MODES.get(upright.mode, upright.mode)
        (upright if mode == upright.mode else upright.convert(mode)).save(buffer, format="PNG", compress_level=0)
    except Exception as error:  # lazily loaded, it may be damaged in whatever way its decoder stumbles on
        raise DataError(f"an image of mode {image.mode} cannot be used: {error}; convert it to RGB") from error
    return buffer.getvalue()


def top_rows(dvae: ImageTokenizer, image: Image.Image, rows: int | None = None) -> Tensor:
    """The codes of an image's top rows.

    Args:
        image: RGB, as `open_image` returns it.
        rows: how many, in [0, grid]; None keeps `default_rows`.

    Returns:
        (rows · grid,) int64 on the CPU, in raster order.

    Raises:
        ConfigError: rows out of range.
    """
    grid = dvae.config.grid
    mask = kept_rows_mask(grid, default_rows(grid) if rows is None else rows)
    pixels = torch.frombuffer(bytearray(image.tobytes()), dtype=torch.uint8).view(1, image.height, image.width, 3)
    device = next(dvae.parameters()).device
    codes = dvae.encode((pixels.permute(0, 3, 1, 2).float() / 255).to(device))
    return codes[0].cpu()[mask]
