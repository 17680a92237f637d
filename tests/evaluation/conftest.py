"""Tiny models of random weights that belong together."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from dalle_ds.config import ClipConfig
from dalle_ds.models import Clip, Dalle, DiscreteVAE
from dalle_ds.sampling import TextToImage
from dalle_ds.text.clip_tokenizer import ClipTokenizer
from dalle_ds.text.tokenizer import Tokenizer
from tests.conftest import TINY_DALLE

TINY_CLIP = ClipConfig(
    embed_dim=8,
    image_size=16,
    patch_size=8,
    vision_width=16,
    vision_depth=1,
    vision_heads=2,
    text_width=16,
    text_depth=1,
    text_heads=2,
    text_len=12,
    text_vocab=402,
)


@pytest.fixture(scope="session")
def transformer_export(tmp_path_factory: pytest.TempPathFactory, dvae_export: Path, tokenizer_file: Path) -> Path:
    """A transformer with its dVAE and tokenizer."""
    torch.manual_seed(0)
    folder = tmp_path_factory.mktemp("transformer") / "export"
    vae, tokenizer = DiscreteVAE.from_pretrained(dvae_export), Tokenizer.load(tokenizer_file)
    TextToImage(Dalle(TINY_DALLE).eval(), vae, tokenizer).save_pretrained(folder)
    return folder


@pytest.fixture(scope="session")
def clip_exports(tmp_path_factory: pytest.TempPathFactory, tokenizer_file: Path) -> tuple[Path, Path]:
    """Two CLIPs."""
    folder = tmp_path_factory.mktemp("clip")
    for seed in (0, 1):
        torch.manual_seed(seed)
        tokenizer = ClipTokenizer.load(tokenizer_file, start=TINY_CLIP.start, end=TINY_CLIP.end)
        Clip(TINY_CLIP, tokenizer=tokenizer).save_pretrained(folder / str(seed))
    return folder / "0", folder / "1"
