"""Images from bytes: every common format and colour mode becomes (H, W, 3) uint8, everything else a `DataError`."""

from __future__ import annotations

import io
import threading
from functools import cache

import numpy as np
import numpy.typing as npt
from PIL import Image, UnidentifiedImageError

from dalle_ds.errors import DataError

MAX_PIXELS = 150_000_000
"""Images of more pixels than this are refused by default, from their header, before memory is spent on them."""

# What images come in. Pillow reads much more, some of it by calling other programs (EPS: Ghostscript), and tells formats
# by content: a corpus from anywhere must not choose which of its decoders run.
_FORMATS = ("BMP", "DIB", "GIF", "JPEG", "MPO", "PNG", "PPM", "TIFF", "WEBP", "AVIF", "JPEG2000")

Pixels = npt.NDArray[np.uint8]

_ORIENTATION_TAG = 0x0112
# EXIF orientation (TIFF 6.0, tag 274) → the transposition that shows the image upright
_UPRIGHT = {
    2: Image.Transpose.FLIP_LEFT_RIGHT,
    3: Image.Transpose.ROTATE_180,
    4: Image.Transpose.FLIP_TOP_BOTTOM,
    5: Image.Transpose.TRANSPOSE,
    6: Image.Transpose.ROTATE_270,
    7: Image.Transpose.TRANSVERSE,
    8: Image.Transpose.ROTATE_90,
}
_OPENING = threading.Lock()


def decode_image(data: bytes, *, max_pixels: int = MAX_PIXELS, short_side: int | None = None) -> Pixels:
    """Decode an image, upright and on white where it is transparent.

    Args:
        data: a BMP, GIF, JPEG, PNG, PPM, TIFF, WebP, AVIF or JPEG 2000 file; of an animation the first frame.
        max_pixels: width · height above which the image is refused before it is decoded.
        short_side: a hint that no more pixels than this are needed along the shorter side. JPEGs are then decoded at
            1/2, 1/4 or 1/8 of their size, while the shorter side stays at least this long. Other formats ignore it.

    Returns:
        (H, W, 3), 0 to 255.

    Raises:
        DataError: the bytes are no image, are broken or end early, or the image has too many pixels.
    """
    image = _open(data)
    if image.width * image.height > max_pixels:
        raise DataError(f"image has {image.width}×{image.height} pixels, more than the {max_pixels:,} that are allowed")
    try:
        if short_side is not None and image.format == "JPEG":
            image.draft(None, (short_side, short_side))
        image.load()
        return np.asarray(_to_rgb(_upright(image)))
    except DataError:
        raise
    except Exception as error:  # Pillow's decoders raise whatever their parsers stumble on, from OSError to IndexError
        raise DataError(f"image cannot be decoded: {error}") from error


def image_size_of(data: bytes) -> tuple[int, int]:
    """(width, height) as stored, from the header only, however many pixels it announces; `DataError` if it is no image."""
    return _open(data).size


def encode_png(pixels: Pixels) -> bytes:
    """A lossless PNG of (H, W, 3) pixels."""
    buffer = io.BytesIO()
    Image.fromarray(pixels).save(buffer, format="PNG")
    return buffer.getvalue()


def resize_short_side(pixels: Pixels, size: int) -> Pixels:
    """Lanczos-resize (H, W, 3) pixels so that the shorter side is `size`, keeping the aspect ratio."""
    height, width = pixels.shape[:2]
    short = min(height, width)
    if short == size:
        return pixels
    target = (max(size, round(width * size / short)), max(size, round(height * size / short)))
    return np.asarray(Image.fromarray(pixels).resize(target, Image.Resampling.LANCZOS))


def center_crop_resize(pixels: Pixels, size: int) -> Pixels:
    """The (size, size, 3) view of (H, W, 3) pixels that evaluation uses: the shorter side resized to `size`, then the central
    square."""
    resized = resize_short_side(pixels, size)
    top, left = (resized.shape[0] - size) // 2, (resized.shape[1] - size) // 2
    return resized[top : top + size, left : left + size]


def _open(data: bytes) -> Image.Image:
    # Pillow's own limit is a global, below ours, that warns or raises by itself. It is lifted only while a header is
    # read, which allocates no pixels; decode_image applies ours before it loads any.
    with _OPENING:
        pillow_limit, Image.MAX_IMAGE_PIXELS = Image.MAX_IMAGE_PIXELS, None
        try:
            return Image.open(io.BytesIO(data), formats=_available_formats())
        except UnidentifiedImageError as error:
            raise DataError("image cannot be decoded: it has none of the known formats") from error
        except Exception as error:  # see decode_image
            raise DataError(f"image cannot be decoded: {error}") from error
        finally:
            Image.MAX_IMAGE_PIXELS = pillow_limit


@cache
def _available_formats() -> tuple[str, ...]:
    Image.init()  # Pillow may have been built without some
    return tuple(name for name in _FORMATS if name in Image.OPEN)


@cache
def image_suffixes() -> tuple[str, ...]:
    """Lower-case suffixes of the formats that `decode_image` reads, as Pillow registers them."""
    formats = _available_formats()
    return tuple(sorted(suffix for suffix, name in Image.registered_extensions().items() if name in formats))


@cache
def other_image_suffixes() -> tuple[str, ...]:
    """Lower-case suffixes of images that `decode_image` does not read."""
    known = {*Image.registered_extensions(), ".heic", ".heif", ".jxl", ".svg", ".avif"}
    no_images = {".pdf", ".ps", ".mpg", ".mpeg", ".h5", ".hdf", ".bufr", ".grib"}
    return tuple(sorted(known - {*image_suffixes(), *no_images}))


def _upright(image: Image.Image) -> Image.Image:
    try:
        orientation = image.getexif().get(_ORIENTATION_TAG)
    except Exception:  # a broken EXIF block does not make the image unusable
        return image
    return image.transpose(_UPRIGHT[orientation]) if orientation in _UPRIGHT else image


def _to_rgb(image: Image.Image) -> Image.Image:
    if image.mode.startswith("I"):  # "I;16", "I;16B", and "I" for what Pillow widens to 32 bits
        values = np.asarray(image)
        if values.min() < 0 or values.max() > 65535:
            found = f"values from {values.min()} to {values.max()}"
            raise DataError(f"image has {found}: more than 16 bits are not supported")
        eight_bits = ((values.astype(np.uint32) * 255 + 32767) // 65535).astype(np.uint8)
        return Image.fromarray(eight_bits).convert("RGB")
    if image.mode == "F":
        raise DataError("image has floating-point pixels, whose white is not defined: store it with 8 or 16 bits")
    if image.mode in ("LA", "La", "PA", "RGBA", "RGBa") or "transparency" in image.info:
        white = Image.new("RGBA", image.size, "white")
        return Image.alpha_composite(white, image.convert("RGBA")).convert("RGB")
    return image.convert("RGB")
