"""Images of every kind that corpora contain: shown right, or refused with a DataError."""

from __future__ import annotations

import io
import struct
import zlib

import numpy as np
import pytest
from PIL import Image

from dalle_ds.data.images import center_crop_resize, decode_image, encode_png, image_size_of, resize_short_side
from dalle_ds.errors import DataError
from tests.data.conftest import picture_bytes


def encoded(image: Image.Image, format: str = "PNG", **options) -> bytes:
    buffer = io.BytesIO()
    image.save(buffer, format=format, **options)
    return buffer.getvalue()


def single(color: tuple[int, ...] | int, mode: str, **options) -> np.ndarray:
    """The one pixel of a decoded one-pixel PNG."""
    return decode_image(encoded(Image.new(mode, (1, 1), color), **options))[0, 0]


@pytest.mark.parametrize("format", ["PNG", "BMP", "GIF", "WEBP", "TIFF", "JPEG"])
def test_formats(format: str) -> None:
    pixels = decode_image(encoded(Image.new("RGB", (5, 3), (200, 40, 90)), format))
    assert pixels.shape == (3, 5, 3) and pixels.dtype == np.uint8
    assert np.abs(pixels.astype(int) - (200, 40, 90)).max() <= 4


def test_transparency_shows_white() -> None:
    assert single((10, 20, 30, 0), "RGBA").tolist() == [255, 255, 255]
    assert single((10, 20, 30, 255), "RGBA").tolist() == [10, 20, 30]
    assert single((0, 128), "LA").tolist() == [127, 127, 127]
    assert single((9, 9, 9), "RGB", transparency=(9, 9, 9)).tolist() == [255, 255, 255]


def test_palette_with_alpha() -> None:
    image = Image.new("P", (2, 1))
    image.putpalette([255, 0, 0, 0, 0, 255])
    image.putpixel((1, 0), 1)
    pixels = decode_image(encoded(image, transparency=b"\xff\x00"))  # red opaque, blue transparent
    assert pixels[0].tolist() == [[255, 0, 0], [255, 255, 255]]


@pytest.mark.parametrize(
    ("value", "expected"), [(0, 0), (257, 1), (32896, 128), (65278, 254), (65535, 255), (385, 1), (386, 2)]
)
def test_sixteen_bits_are_scaled_not_clipped(value: int, expected: int) -> None:
    pixels = decode_image(encoded(Image.fromarray(np.full((2, 2), value, dtype=np.uint16))))
    assert np.array_equal(pixels, np.full((2, 2, 3), expected))


def test_float_pictures_are_refused() -> None:
    with pytest.raises(DataError, match="floating-point"):
        decode_image(encoded(Image.new("F", (2, 2), 0.5), "TIFF"))


def test_cmyk() -> None:
    pixels = decode_image(encoded(Image.new("CMYK", (8, 8), (0, 255, 255, 0)), "JPEG"))  # no cyan: red
    assert np.abs(pixels[4, 4].astype(int) - (255, 0, 0)).max() <= 6


@pytest.mark.parametrize("orientation", range(1, 9))
def test_exif_orientation_is_applied(orientation: int) -> None:
    image = Image.fromarray(np.arange(24, dtype=np.uint8).reshape(4, 6) * 10)
    exif = Image.Exif()
    exif[0x0112] = orientation
    # The definition of TIFF 6.0: where the stored row 0 and column 0 are shown.
    stored = np.asarray(image)
    shown = {
        1: stored,
        2: stored[:, ::-1],
        3: stored[::-1, ::-1],
        4: stored[::-1],
        5: stored.T,
        6: np.rot90(stored, -1),
        7: np.rot90(stored, 2).T,
        8: np.rot90(stored),
    }[orientation]
    assert np.array_equal(decode_image(encoded(image, exif=exif))[..., 0], shown)


@pytest.mark.parametrize("format", ["JPEG", "PNG", "WEBP", "GIF"])
def test_truncated_and_corrupt_files_are_refused(format: str) -> None:
    data = picture_bytes(0, (64, 64), format)
    for broken in (b"", b"not a picture", data[:10], data[: len(data) // 2], b"\0" * 100 + data[100:]):
        with pytest.raises(DataError, match="cannot be decoded"):
            decode_image(broken)


@pytest.mark.parametrize("format", ["JPEG", "PNG", "WEBP", "GIF", "TIFF", "BMP"])
def test_random_damage_never_raises_anything_else(format: str) -> None:
    data, rng = picture_bytes(1, (32, 32), format), np.random.default_rng(0)
    for _ in range(60):
        damaged = bytearray(data)
        for place in rng.integers(0, len(data), 5):
            damaged[place] = rng.integers(256)
        try:
            pixels = decode_image(bytes(damaged), max_pixels=10**6)
        except DataError:
            continue
        assert pixels.ndim == 3 and pixels.shape[2] == 3


def test_bombs_are_refused_from_the_header() -> None:
    def chunk(kind: bytes, data: bytes) -> bytes:
        return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))

    header = struct.pack(">IIBBBBB", 60_000, 60_000, 8, 2, 0, 0, 0)
    bomb = b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", header) + chunk(b"IDAT", zlib.compress(b"\0")) + chunk(b"IEND", b"")
    assert image_size_of(bomb) == (60_000, 60_000)
    with pytest.raises(DataError, match="60000×60000 pixels, more than the 150,000,000"):
        decode_image(bomb)


def test_the_limit_is_inclusive_and_pillows_own_is_left_alone() -> None:
    data = picture_bytes(0, (10, 10))
    assert decode_image(data, max_pixels=100).shape == (10, 10, 3)
    with pytest.raises(DataError, match="more than the 99"):
        decode_image(data, max_pixels=99)
    assert Image.MAX_IMAGE_PIXELS == 1024**3 // 4 // 3  # Pillow's default


def test_forty_megapixels() -> None:
    data = picture_bytes(0, (8000, 5000), "JPEG")
    assert decode_image(data).shape == (5000, 8000, 3)
    small = decode_image(data, short_side=384)
    assert small.shape == (625, 1000, 3)  # 1/8 is the smallest scale of a JPEG, and still more than 384


@pytest.mark.parametrize(("hint", "side"), [(100, 100), (101, 200), (50, 50), (51, 100), (13, 25), (400, 200)])
def test_the_hint_never_goes_below_what_is_needed(hint: int, side: int) -> None:
    assert decode_image(picture_bytes(0, (300, 200), "JPEG"), short_side=hint).shape[0] == side


def test_png_keeps_every_pixel() -> None:
    pixels = np.random.default_rng(0).integers(0, 256, (5, 7, 3), dtype=np.uint8)
    assert np.array_equal(decode_image(encode_png(pixels)), pixels)


@pytest.mark.parametrize("size", [(64, 64), (40, 90), (90, 40), (1, 1), (3, 200), (31, 32)])
def test_center_crop_has_the_size_and_the_middle(size: tuple[int, int]) -> None:
    pixels = np.zeros((*size, 3), dtype=np.uint8)
    view = center_crop_resize(pixels, 32)
    assert view.shape == (32, 32, 3)


def test_center_crop_is_pillows_lanczos_then_the_middle() -> None:
    pixels = np.random.default_rng(0).integers(0, 256, (60, 100, 3), dtype=np.uint8)
    resized = np.asarray(Image.fromarray(pixels).resize((50, 30), Image.Resampling.LANCZOS))
    assert np.array_equal(center_crop_resize(pixels, 30), resized[:, 10:40])
    assert resize_short_side(pixels, 60) is pixels
