"""Small corpora for the tests of the data room."""

from __future__ import annotations

import io
from collections.abc import Callable
from dataclasses import replace
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

from dalle_ds.data import store_writer
from dalle_ds.data.prepare import PrepareOptions, prepare
from dalle_ds.models import Clip
from dalle_ds.text.clip_tokenizer import ClipTokenizer
from dalle_ds.text.tokenizer import Tokenizer
from tests.clip_shapes import CLIP_SHAPES

MakePicture = Callable[..., bytes]
TINY_CLIP = replace(
    CLIP_SHAPES["toy"],
    embed_dim=6,
    vision_width=16,
    vision_depth=1,
    text_width=16,
    text_depth=1,
    text_len=12,
    text_vocab=402,
)


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


@pytest.fixture(scope="session")
def clip_export(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A CLIP of random weights."""
    folder = tmp_path_factory.mktemp("clip")
    captions = (f"image number {number}, another caption of {number}" for number in range(30))
    Tokenizer.train(captions, folder / "tokenizer.model", TINY_CLIP.start)
    tokenizer = ClipTokenizer.load(folder / "tokenizer.model", start=TINY_CLIP.start, end=TINY_CLIP.end)
    torch.manual_seed(0)
    Clip(TINY_CLIP, tokenizer=tokenizer).save_pretrained(folder / "export")
    return folder / "export"


@pytest.fixture(scope="session")
def clip(clip_export: Path) -> Clip:
    return Clip.from_pretrained(clip_export)


def wait_before_rows(steps: Connection) -> None:
    """From here on, this process waits for a word before each row that it writes to a store."""
    add = store_writer.StoreWriter.add

    def awaited(writer: store_writer.StoreWriter, row: dict[str, Any], size: int) -> None:
        steps.send("row")
        steps.recv()
        add(writer, row, size)

    store_writer.StoreWriter.add = awaited  # type: ignore[method-assign]
