"""What both priors' tasks share: CLIP's cached embeddings, the captions beside them, previews and exports."""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Callable
from contextlib import suppress
from functools import cached_property, partial
from pathlib import Path
from typing import Any, TypeVar, cast

import torch
from PIL import Image
from torch import Tensor, nn

from dalle_ds.config import LatentPriorRun, PriorRun
from dalle_ds.data import EmbeddingSamples, PairDataset
from dalle_ds.data.embeddings import EmbeddingCache
from dalle_ds.data.samples import clip_tokens, own_tokens
from dalle_ds.errors import ConfigError, DataError
from dalle_ds.models.clip import Clip
from dalle_ds.models.latents import EmbeddingMoments
from dalle_ds.sampling.grid import image_grid
from dalle_ds.sampling.text_to_embedding import TextToEmbedding
from dalle_ds.tasks.base import Batch, ModelParallelTask, Samples, numbered
from dalle_ds.text.tokenizer import Tokenizer

PREVIEW_ROWS = 6
PREVIEW_MATCHES = 4
PREVIEW_IMAGES = 512
"""Validation images among which a preview looks for those of sampled embeddings."""
AnyPriorRun = TypeVar("AnyPriorRun", bound=PriorRun | LatentPriorRun)


class TextToEmbeddingTask(ModelParallelTask[AnyPriorRun]):
    """What trains on CLIP's embeddings of images and captions.

    Raises:
        ConfigError: no CLIP or tokenizer is named, or one does not fit the model.
        DataError: the embeddings of a corpus are not cached.
    """

    def __init__(self, run: AnyPriorRun) -> None:
        super().__init__(run)
        if not run.clip:
            raise ConfigError("--clip is missing: name a CLIP's run directory or export")
        self.clip = Clip.from_pretrained(run.clip)
        found, wanted = self.clip.config.embed_dim, run.model.embed_dim
        if found != wanted:
            raise ConfigError(
                f"the CLIP in {run.clip} has embeddings of {found} dimensions but model.embed_dim is {wanted}: set "
                f"--model.embed_dim {found}, or name the CLIP that belongs to this preset"
            )
        self.tokenizer: Tokenizer | None = self._tokenizer()

    def _tokenizer(self) -> Tokenizer | None:
        run = self.run
        if not run.tokenizer:
            raise ConfigError("--tokenizer is missing: name a tokenizer's file")
        tokenizer = Tokenizer.load(run.tokenizer)
        if tokenizer.vocab_size > run.model.text_vocab:
            raise ConfigError(
                f"the tokenizer {run.tokenizer} has {tokenizer.vocab_size} pieces but model.text_vocab is only "
                f"{run.model.text_vocab}: set --model.text_vocab {tokenizer.vocab_size}"
            )
        return tokenizer

    @cached_property
    def caches(self) -> list[EmbeddingCache]:
        """The embeddings of all corpora's training splits."""
        return [EmbeddingCache.open(folder, self.clip.fingerprint, "train") for folder in self.run.corpora]

    @property
    def has_states(self) -> bool:
        """Whether CLIP's text states are read, and from the caches."""
        return False

    @cached_property
    def moments(self) -> EmbeddingMoments:
        """Of all training images' embeddings."""
        return EmbeddingMoments.merged([cache.moments for cache in self.caches])

    def corpus_samples(self, folder: str, split: str) -> Samples:
        cache = EmbeddingCache.open(folder, self.clip.fingerprint, split)
        length, encode = self.run.model.text_len, cast(Callable[..., Any], own_tokens)
        tokenizer: Any = self.tokenizer
        if tokenizer is None:
            encode, tokenizer = clip_tokens, self.clip.tokenizer
        return EmbeddingSamples(
            PairDataset.open(folder, split),
            cache,
            partial(encode, tokenizer, length),
            train=split == "train",
            states=self.has_states,
        )

    def identity(self) -> dict[str, str]:
        return {**self.data_identity(), **self.embeddings(), **self.parts()}

    def embeddings(self) -> dict[str, str]:
        """Fingerprints of the caches."""
        return numbered("embeddings", [cache.fingerprint for cache in self.caches])

    def parts(self) -> dict[str, str]:
        tokenizer = "none" if self.tokenizer is None else self.tokenizer.fingerprint
        return {"clip": self.clip.fingerprint, "tokenizer": tokenizer}

    @abstractmethod
    def pipeline(self, model: nn.Module) -> TextToEmbedding[Any, Any]:
        """The plain model, with all that using it needs."""

    def preview(self, model: nn.Module, batch: Batch) -> Image.Image:
        """Captions, each with its image and the validation images whose embeddings are most like a sampled one."""
        known: list[tuple[PairDataset, int, Tensor, str]] = []
        for folder in self.run.corpora:
            images = PairDataset.open(folder, "validation")
            cache = EmbeddingCache.open(folder, self.clip.fingerprint, "validation")
            count = min(len(images), PREVIEW_IMAGES // len(self.run.corpora))
            for row in (number * len(images) // count for number in range(count)):
                with suppress(DataError):
                    known.append((images, row, torch.from_numpy(cache.image(row, 0)), images.captions(row)[0]))
        if not known:
            raise DataError("no validation image can be read")
        own = known[:: -(-len(known) // PREVIEW_ROWS)]
        captions = [caption for *_, caption in own]
        device = self.clip.logit_scale.device
        samples = self.pipeline(model).sample(captions, seed=self.run.seed)[:, 0].cpu()
        self.clip.to(device)  # the pipeline has moved it to the model's
        likeness = samples @ torch.stack([embedding for _, _, embedding, _ in known]).T
        best = likeness.topk(min(PREVIEW_MATCHES, len(known)), dim=1).indices.tolist()
        shown = []
        for (images, row, *_), caption, matches in zip(own, captions, best, strict=True):
            places = [(images, row), *(known[match][:2] for match in matches)]
            shown.append((caption, [Image.fromarray(of.image(row)) for of, row in places]))
        return image_grid(shown, titles=["its own", *(f"match {n + 1}" for n in range(PREVIEW_MATCHES))], cell=64)

    def export(self, model: nn.Module, folder: Path) -> None:
        """A folder that `TextToEmbedding.from_pretrained` reads: the prior, CLIP, the tokenizer."""
        self.pipeline(model).save_pretrained(folder)

    def items_per_sample(self) -> tuple[str, int]:
        return "tokens", self.run.model.text_len


def row_noise(seeds: Tensor, draws: int, dim: int, device: torch.device) -> tuple[Tensor, Tensor]:
    """Random numbers of each row, from its seed alone: the same in every layout.

    Args:
        seeds: (B,) int64.

    Returns:
        (B, 2) uniform in [0, 1), and (B, draws, dim) normal, fp32.
    """
    uniforms, noise = torch.empty(len(seeds), 2, device=device), torch.empty(len(seeds), draws, dim, device=device)
    if not noise.is_meta:
        generator = torch.Generator(device=device)
        for seed, few, many in zip(seeds.tolist(), uniforms, noise, strict=True):
            generator.manual_seed(seed)
            few.uniform_(generator=generator)
            many.normal_(generator=generator)
    return uniforms, noise
