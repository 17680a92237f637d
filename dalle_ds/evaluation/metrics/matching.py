"""Whether images match their captions, judged by a contrastive model."""

from __future__ import annotations

import torch
from torch import Tensor

from dalle_ds.errors import DataError

CUTOFFS = (1, 5, 10)
BLOCK = 1024
"""Captions whose similarities to all images are in memory at once."""
ROUNDING = 1e-6
"""Cosines that differ by less count as equal. Two equal images' embeddings differ by 1e-7 if they were computed in batches
of different sizes, and a model that draws the same for every caption must not find any."""


def clip_scores(image: Tensor, text: Tensor) -> Tensor:
    """CLIP score of each image with its caption: 100 · max(cosine, 0) (Hessel et al., 2021, without their factor 2.5).

    Args:
        image, text: (N, D), L2-normalized.

    Returns:
        (N,) float64.
    """
    return 100 * (image.double() * text.double()).sum(dim=1).clamp_min(0)


def retrieval_ranks(image: Tensor, text: Tensor, own: Tensor | None = None) -> Tensor:
    """For each caption, how many other images match it at least as well as its own: 0 where its own comes first.

    Args:
        image: (P, D), L2-normalized.
        text: (N, D), L2-normalized.
        own: (N,) int64, which image is each caption's; None: row i of one belongs to row i of the other.

    Returns:
        (N,) int64.

    Raises:
        DataError: a value that is not finite, which would rank anywhere.
    """
    if not (image.isfinite().all() and text.isfinite().all()):
        raise DataError("the contrastive model gives embeddings that are not numbers: its weights are damaged")
    own = torch.arange(len(text)) if own is None else own
    ranks = []
    image = image.double()
    for start in range(0, len(text), BLOCK):
        similarity = text[start : start + BLOCK].double() @ image.T
        matched = similarity.gather(1, own[start : start + BLOCK, None])
        ranks.append((similarity >= matched - ROUNDING).sum(dim=1) - 1)
    return torch.cat(ranks)


def recalls(ranks: Tensor, pictures: int) -> dict[str, float]:
    """Share of captions whose own image is among the first 1, 5 and 10, where there are more images than that."""
    return {f"retrieval_at_{k}": float((ranks < k).double().mean()) for k in CUTOFFS if k < pictures}
