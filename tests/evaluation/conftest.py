"""Tiny models of random weights that belong together."""

from __future__ import annotations

import shutil
from pathlib import Path

import pytest
import torch

from dalle_ds.config import ClipConfig, LatentPriorConfig, PriorConfig
from dalle_ds.data.embeddings import EmbeddingCache, cache_embeddings
from dalle_ds.models import Clip, Dalle, DiscreteVAE
from dalle_ds.models.latent_prior import AutoregressivePrior
from dalle_ds.models.latents import EmbeddingScaling, LatentCodec
from dalle_ds.models.prior import DiffusionPrior
from dalle_ds.sampling import TextToImage
from dalle_ds.sampling.text_to_embedding import DiffusionTextToEmbedding, LatentTextToEmbedding
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


@pytest.fixture(scope="session")
def embedded(data: Path, clip_exports: tuple[Path, Path], tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The corpus with embeddings of a CLIP."""
    folder = Path(shutil.copytree(data, tmp_path_factory.mktemp("embedded") / "data"))
    cache_embeddings(Clip.from_pretrained(clip_exports[0]), folder)
    return folder


@pytest.fixture(scope="session")
def prior_exports(
    embedded: Path, clip_exports: tuple[Path, Path], tokenizer_file: Path, tmp_path_factory: pytest.TempPathFactory
) -> dict[str, Path]:
    """A prior of either kind, of random weights."""
    torch.manual_seed(0)
    clip, tokenizer = Clip.from_pretrained(clip_exports[0]), Tokenizer.load(tokenizer_file)
    dim, folder = clip.config.embed_dim, tmp_path_factory.mktemp("priors")
    cache = EmbeddingCache.open(embedded, clip.fingerprint, "train")
    known = torch.stack([torch.from_numpy(cache.image(row, 0)) for row in range(len(cache))])
    shape = PriorConfig(width=16, depth=1, heads=2, text_len=8, embed_dim=dim, text_vocab=400)
    scaling = EmbeddingScaling.constant(dim, 17.2)
    diffusion = DiffusionTextToEmbedding(DiffusionPrior(shape).eval(), clip, tokenizer, scaling, "cosine", 1000)
    latent = LatentPriorConfig(
        text_width=16, text_depth=1, text_heads=2, text_len=8, text_vocab=400, width=16, depth=1, heads=2, embed_dim=dim,
        components=4, buckets=8, similarity_buckets=4,
    )  # fmt: skip
    codec = LatentCodec.fitted(cache.moments, known, 4, 8)
    pipelines = [diffusion, LatentTextToEmbedding(AutoregressivePrior(latent).eval(), clip, tokenizer, codec)]
    for pipeline in pipelines:
        pipeline.save_pretrained(folder / pipeline.kind)
    return {pipeline.kind: folder / pipeline.kind for pipeline in pipelines}
