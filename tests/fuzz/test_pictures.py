"""Images of any bytes."""

from __future__ import annotations

import io

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image

from dalle_ds.data.images import decode_image, image_size_of
from tests.fuzz.harness import survives_in_child
from tests.fuzz.strategies import damaged_bytes


def pictures() -> dict[str, bytes]:
    noise = Image.fromarray(np.random.default_rng(0).integers(0, 256, (6, 6, 3), dtype=np.uint8)).resize((40, 30))
    exif = Image.Exif()
    exif[0x0112] = 6
    found = {}
    for format, mode, options in (
        ("PNG", "RGB", {}),
        ("PNG", "RGBA", {}),
        ("PNG", "P", {"transparency": 0}),
        ("PNG", "I;16", {}),
        ("JPEG", "RGB", {"exif": exif}),
        ("JPEG", "CMYK", {"progressive": True}),
        ("WEBP", "RGB", {"exif": exif}),
        ("WEBP", "RGBA", {"lossless": True}),
        ("GIF", "P", {"save_all": True, "append_images": [noise.convert("L")]}),
        ("BMP", "RGB", {}),
        ("TIFF", "RGB", {"compression": "tiff_lzw"}),
        ("TIFF", "CMYK", {}),
        ("PPM", "RGB", {}),
        ("JPEG2000", "RGB", {}),
        ("AVIF", "RGB", {}),
    ):
        buffer = io.BytesIO()
        noise.convert("L").convert("I;16").save(buffer, format) if mode == "I;16" else noise.convert(mode).save(
            buffer, format, **options
        )
        found[f"{format} {mode}"] = buffer.getvalue()
    return found


PICTURES = pictures()


@given(name=st.sampled_from(sorted(PICTURES)), data=st.data(), short_side=st.sampled_from([None, 8]))
def test_pictures(name: str, data: st.DataObject, short_side: int | None) -> None:
    content = data.draw(
        damaged_bytes(PICTURES[name]) | st.binary(max_size=80).map(lambda tail: PICTURES[name][:16] + tail)
    )

    def check() -> None:
        pixels = decode_image(content, max_pixels=4_000_000, short_side=short_side)
        assert pixels.dtype == np.uint8 and pixels.ndim == 3 and pixels.shape[2] == 3 and pixels.size <= 12_000_000
        assert len(image_size_of(content)) == 2

    survives_in_child(f"images, {name.split()[0]}", check)


@pytest.mark.parametrize("name", sorted(PICTURES))
def test_what_is_whole_is_taken(name: str) -> None:
    survives_in_child(f"images, {name.split()[0]}", lambda: decode_image(PICTURES[name]), must_take=True)


@given(content=st.binary(max_size=200))
def test_bytes(content: bytes) -> None:
    survives_in_child("images of random bytes", lambda: decode_image(content))
