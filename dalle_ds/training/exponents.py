"""Histograms of gradient exponents per residual block, for choosing scales and formats (DALL·E App. D, guideline 3)."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from dalle_ds.jsonl import LineFile
from dalle_ds.parallel import Mesh
from dalle_ds.precision import GradientScales
from dalle_ds.training.zero_state import GroupLayout, MasterGradients

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
    """What `exponent_counts` returns, JSON-able: exponent → elements, where there are any."""
    *finite, zero, nonfinite = counts.tolist()
    exponents = {str(exponent): count for exponent, count in enumerate(finite, LOWEST) if count}
    return {"exponents": exponents, "zero": zero, "nonfinite": nonfinite}


class NumericsReport:
    """Appends a line on every `every`-th update.

    A line is {"step": updates done with this one, "blocks": {block or "others": {"exponents": {exponent: elements}, "zero":
    elements, "nonfinite": elements, "log2_scale": of the block, where gradients are scaled}}}. The gradients are those of
    the parameters, averaged, before clipping and without their scale; inside the block they lie log2_scale (of the scale of
    one process) higher.

    Args:
        lines: gets them, on the main process; None elsewhere.
    """

    def __init__(self, lines: LineFile | None, every: int, mesh: Mesh, scales: GradientScales | None) -> None:
        self._lines, self._every, self._mesh, self._scales = lines, every, mesh, scales

    def note(self, step: int, gradients: MasterGradients, layout: GroupLayout) -> None:
        """Look at the gradients of update `step`, counted from 0, if it is one to look at. Collective."""
        if (step + 1) % self._every:
            return
        groups = gradients.groups()
        owners = [layout.blocks[number] for number in layout.numbers]
        report = {}
        for block in dict.fromkeys(layout.blocks):
            own = zip(groups, owners, layout.counted, strict=True)
            pieces = [piece for group, owner, is_counted in own if is_counted and owner == block for piece in group]
            counts = self._mesh.sum(exponent_counts(pieces).to(self._mesh.device), "world")
            entry = exponent_report(counts)
            if self._scales is not None and block is not None:
                entry["log2_scale"] = float(self._scales.factors[block].log2())
            report["others" if block is None else str(block)] = entry
        if self._lines is not None:
            self._lines.append({"step": step + 1, "blocks": report})
