"""What trains on CLIP's cached embeddings of images and captions: both priors and the decoder."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import suppress
from functools import cached_property, partial
from typing import Any, NamedTuple, TypeVar, cast

import torch
from torch import Tensor

from dalle_ds.config import DecoderRun, LatentPriorRun, PriorRun
from dalle_ds.data import EmbeddingSamples, PairDataset
from dalle_ds.data.embeddings import EmbeddingCache
from dalle_ds.data.samples import clip_tokens, own_tokens
from dalle_ds.errors import ConfigError, DataError
from dalle_ds.models.clip import Clip
from dalle_ds.models.latents import EmbeddingMoments
from dalle_ds.models.prior import Caption
from dalle_ds.sampling.prior import empty_caption
from dalle_ds.sampling.text_to_embedding import CLIP_NAME, TOKENIZER_NAME
from dalle_ds.tasks.base import Batch, Samples, Task, numbered
from dalle_ds.text.tokenizer import Tokenizer

EmbeddedRun = TypeVar("EmbeddedRun", bound=PriorRun | LatentPriorRun | DecoderRun)


class EmbeddedImage(NamedTuple):
    """A validation image, as previews show it."""

    dataset: PairDataset
    row: int
    embedding: Tensor
    """(embed_dim,)."""
    caption: str


class EmbeddedDataTask(Task[EmbeddedRun]):
    """What trains on CLIP's embeddings of images and captions.

    Raises:
        ConfigError: no CLIP or tokenizer is named, or one does not fit the model.
        DataError: the embeddings of a corpus are not cached.
    """

    image_size = 0
    """Side in pixels of the images that it trains on; 0: none."""

    def __init__(self, run: EmbeddedRun) -> None:
        super().__init__(run)
        self.clip = self.part("clip", CLIP_NAME, Clip.from_pretrained, "a CLIP's run directory or export")
        found, wanted = self.clip.config.embed_dim, run.model.embed_dim
        if found != wanted:
            raise ConfigError(
                f"the CLIP in {run.clip} has embeddings of {found} dimensions but model.embed_dim is {wanted}: set "
                f"--model.embed_dim {found}, or name the CLIP that belongs to this preset"
            )
        unit = self.clip.config.unit_length
        if unit == (self._text == "karlo"):
            needed = (
                "takes them as they are: name one with"
                if unit
                else "needs them at length 1: set model.text karlo, or name one with"
            )
            raise ConfigError(
                f"the CLIP in {run.clip} gives embeddings with model.unit_length={unit}, and model.text={self._text} {needed} "
                f"model.unit_length {not unit}"
            )
        self.tokenizer: Tokenizer | None = None
        if self.reads_states:
            self._check_states()
        else:
            self.tokenizer = self._own_tokens()

    @property
    def _text(self) -> str:
        return getattr(self.run.model, "text", "tokens")

    @property
    def reads_states(self) -> bool:
        """Whether captions are read as the states of CLIP's text tower."""
        return self._text != "tokens"

    @cached_property
    def _empty(self) -> tuple[Tensor, Tensor]:
        if hasattr(self, "clip"):
            return empty_caption(self.clip)
        with torch.device("meta"):  # a task that is only planned has none
            return torch.empty(2, self.run.model.text_width), torch.empty(self.run.model.embed_dim)

    def caption(self, batch: Batch) -> Caption:
        """What `prepare` made of captions."""
        empty = self._empty if self._text == "karlo" else None
        return Caption(batch["text"], batch["text_embedding"], batch.get("padded"), empty)

    @property
    def has_states(self) -> bool:
        """Whether these are in all caches."""
        return self.reads_states and all(cache.text_width for cache in self.caches)

    def _own_tokens(self) -> Tokenizer:
        run = self.run
        tokenizer = self.part("tokenizer", TOKENIZER_NAME, Tokenizer.load, "a tokenizer's file")
        if tokenizer.vocab_size > run.model.text_vocab:
            raise ConfigError(
                f"the tokenizer {run.tokenizer} has {tokenizer.vocab_size} pieces but model.text_vocab is only "
                f"{run.model.text_vocab}: set --model.text_vocab {tokenizer.vocab_size}"
            )
        return tokenizer

    def _check_states(self) -> None:
        run, clip = self.run, self.clip.config
        if run.tokenizer:
            raise ConfigError(f"--tokenizer {run.tokenizer} is not for model.text={self._text}: leave it out")
        if self.clip.tokenizer is None:
            raise ConfigError(f"the CLIP in {run.clip} has no tokenizer: import it again with --tokenizer")
        for name, found in (("text_width", clip.text_width), ("text_len", clip.text_len)):
            if getattr(run.model, name) != found:
                raise ConfigError(
                    f"the CLIP in {run.clip} has a {name} of {found} but model.{name} is {getattr(run.model, name)}: set "
                    f"--model.{name} {found}"
                )

    @cached_property
    def caches(self) -> list[EmbeddingCache]:
        """The embeddings of all corpora's training splits."""
        return [EmbeddingCache.open(folder, self.clip.fingerprint, "train") for folder in self.run.corpora]

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
            image_size=self.image_size,
        )

    def identity(self) -> dict[str, str]:
        return {**self.data_identity(), **self.embeddings(), **self.parts()}

    def embeddings(self) -> dict[str, str]:
        """Fingerprints of the caches."""
        return numbered("embeddings", [cache.fingerprint for cache in self.caches])

    def parts(self) -> dict[str, str]:
        tokenizer = "none" if self.tokenizer is None else self.tokenizer.fingerprint
        return {"clip": self.clip.fingerprint, "tokenizer": tokenizer}

    def validation_images(self, limit: int) -> list[EmbeddedImage]:
        """At most `limit`, evenly spread over all corpora; DataError where none can be read."""
        found: list[EmbeddedImage] = []
        for folder in self.run.corpora:
            images = PairDataset.open(folder, "validation")
            cache = EmbeddingCache.open(folder, self.clip.fingerprint, "validation")
            count = min(len(images), max(1, limit // len(self.run.corpora)))
            for row in (number * len(images) // count for number in range(count)):
                with suppress(DataError):
                    embedding = torch.from_numpy(cache.image(row, 0))
                    found.append(EmbeddedImage(images, row, embedding, images.captions(row)[0]))
        if not found:
            raise DataError("no validation image can be read")
        return found
