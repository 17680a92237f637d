"""Does the transformer read? Picking a caption's own picture by likelihood."""

from __future__ import annotations

import torch
from torch import Tensor

from dalle_ds.config import PADDING
from dalle_ds.errors import DataError
from dalle_ds.models.dalle import Dalle
from dalle_ds.sampling import score


def ranking_accuracy(model: Dalle, text: Tensor, codes: Tensor, candidates: int = 16) -> float:
    """Share of captions whose own picture ranks first of `candidates` by log p(codes | caption) − log p(codes | no caption).

    Subtracting the likelihood without a caption removes what makes a picture likely whatever is said of it. Rows are taken
    in groups of `candidates`, each caption against the pictures of its group; rows that fill no group are left out. Chance
    is 1 / candidates.

    Args:
        text: (N, T) int64, −1 where padded.
        codes: (N, W²) int64.

    Raises:
        DataError: fewer rows than candidates.
    """
    if len(text) < candidates:
        raise DataError(f"ranking {candidates} pictures needs as many rows, found {len(text)}")
    groups = len(text) // candidates
    right = 0
    for group in range(groups):
        rows = slice(group * candidates, (group + 1) * candidates)
        captions, pictures = text[rows], codes[rows]
        unconditional = score(model, torch.full_like(captions, PADDING), pictures)
        for index in range(candidates):
            repeated = captions[index : index + 1].expand(candidates, -1)
            gain = score(model, repeated, pictures) - unconditional
            right += int(gain.argmax() == index)
    return right / (groups * candidates)
