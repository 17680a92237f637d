"""Where gradients lie in the range of 16-bit numbers: histograms of their exponents (DALL·E App. D, guideline 3)."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

LOWEST, HIGHEST = -64, 16
"""Exponents that are told apart; smaller and greater ones count with these. fp16 reaches from -24 to 15."""


@torch.no_grad()
def exponent_counts(pieces: Sequence[Tensor]) -> Tensor:
    """How many elements have each exponent: (HIGHEST − LOWEST + 3,) int64, then those that are 0 and those not finite.

    The exponent of x is the greatest e with 2^e ≤ |x|.
    """
    bins = HIGHEST - LOWEST + 1
    device = pieces[0].device if pieces else None
    counts = torch.zeros(bins + 2, dtype=torch.int64, device=device)
    for piece in pieces:
        values = piece.flatten().float()
        exponents = torch.frexp(values).exponent - 1
        index = exponents.clamp(LOWEST, HIGHEST).long() - LOWEST
        index[values == 0] = bins
        index[~values.isfinite()] = bins + 1
        counts += torch.bincount(index, minlength=bins + 2)
    return counts


def exponent_report(counts: Tensor) -> dict[str, Any]:
    """Counts as `exponent_counts` returns them, JSON-able: exponent → elements, where there are any."""
    *finite, zero, nonfinite = (int(count) for count in counts)
    exponents = {str(exponent): count for exponent, count in enumerate(finite, LOWEST) if count}
    return {"exponents": exponents, "zero": zero, "nonfinite": nonfinite}
