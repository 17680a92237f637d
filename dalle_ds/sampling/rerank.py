"""What scores images for reranking (DALL·E §2.6)."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Protocol

from PIL import Image
from torch import Tensor

from dalle_ds.errors import ConfigError

if TYPE_CHECKING:
    from dalle_ds.models.clip import Clip

DIGITS = 6
"""Decimals of a CLIP score. What lies beyond is rounding, and depends on which images are embedded together."""


class Reranker(Protocol):
    """Says how well images match a prompt, each image by itself."""

    def __call__(self, prompt: str, images: list[Image.Image]) -> Sequence[float]:
        """One score per image, greater is better. Called several times for a prompt of many images."""
        ...


class ClipReranker:
    """Scores images by the cosine of CLIP's embeddings of image and prompt.

    Args:
        clip: with its tokenizer.
        batch_size: images embedded at once.

    Raises:
        ConfigError: batch_size below 1, or a CLIP that reads no captions.
    """

    def __init__(self, clip: Clip, batch_size: int = 64) -> None:
        if batch_size < 1:
            raise ConfigError(f"batch_size must be at least 1, found {batch_size}")
        if clip.tokenizer is None:
            raise ConfigError("the CLIP that is to rerank has no tokenizer: export it with the one it was trained with")
        self.clip = clip
        self.batch_size = batch_size
        self._embedded: tuple[str, Tensor] | None = None

    @property
    def fingerprint(self) -> str:
        """Of the CLIP."""
        return self.clip.fingerprint

    def __call__(self, prompt: str, images: list[Image.Image]) -> list[float]:
        """Cosines in [−1, 1], rounded to 6 decimals."""
        if self._embedded is None or self._embedded[0] != prompt:
            self._embedded = prompt, self.clip.embed_texts([prompt])[0]
        scores: list[float] = []
        for start in range(0, len(images), self.batch_size):
            cosines = self.clip.embed_images(images[start : start + self.batch_size]) @ self._embedded[1]
            scores += [round(float(cosine), DIGITS) for cosine in cosines]
        return scores


def as_reranker(rerank: Reranker | Clip) -> Reranker:
    """A `ClipReranker` of a `Clip`; anything else as it is."""
    from dalle_ds.models.clip import Clip

    return ClipReranker(rerank) if isinstance(rerank, Clip) else rerank
