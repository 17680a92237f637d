"""Small corpora for the tests of the data room."""

from __future__ import annotations

import io
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from dalle_ds.data.prepare import PrepareOptions, prepare

MakePicture = Callable[..., bytes]


def picture_bytes(seed: int, size: tuple[int, int] = (40, 40), format: str = "PNG", mode: str = "RGB") -> bytes:
    """A random but smooth image of (width, height), encoded."""
    noise = np.random.default_rng(seed).integers(0, 256, (4, 4, 3), dtype=np.uint8)
    image = Image.fromarray(noise).resize(size, Image.Resampling.BICUBIC).convert(mode)
    buffer = io.BytesIO()
    image.save(buffer, format=format)
    return buffer.getvalue()


@pytest.fixture(scope="session")
def folder_corpus(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Thirty images of different sizes with a caption each."""
    folder = tmp_path_factory.mktemp("corpus")
    for number in range(30):
        (folder / f"{number:02d}.png").write_bytes(picture_bytes(number, (40 + number, 40)))
        (folder / f"{number:02d}.txt").write_text(f"image number {number}\nanother caption of {number}\n")
    return folder


@pytest.fixture(scope="session")
def prepared(folder_corpus: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """`folder_corpus`, prepared with a fifth for validation."""
    out = tmp_path_factory.mktemp("prepared") / "data"
    prepare(PrepareOptions(corpus="folder", source=str(folder_corpus), validation=0.2), str(out))
    return out
