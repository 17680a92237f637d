"""Histograms of gradient exponents per residual block, for choosing scales and formats (DALL·E App. D)."""

from __future__ import annotations

from dalle_ds.parallel import Mesh
from dalle_ds.precision import GradientScales
from dalle_ds.precision.exponents import exponent_counts, exponent_report
from dalle_ds.training.lines import LineFile
from dalle_ds.training.zero_state import GroupLayout, MasterGradients


class NumericsReport:
    """Appends a line on every `every`-th update.

    A line is {"step": updates done with this one, "blocks": {block or "others": {"exponents": {exponent: elements}, "zero":
    elements, "nonfinite": elements, "log2_scale": of the block, where gradients are scaled}}}. The gradients are those of
    the parameters, averaged, before clipping and without their scale; inside the block they lie log2_scale (of the scale of
    one process) higher.

    Args:
        lines: gets them, on the main process; None elsewhere.
        every: updates between lines.
        mesh: the processes that share the gradients.
        scales: of the residual blocks, if there are any.
    """

    def __init__(self, lines: LineFile | None, every: int, mesh: Mesh, scales: GradientScales | None) -> None:
        self._lines = lines
        self._every = every
        self._mesh = mesh
        self._scales = scales

    def note(self, step: int, gradients: MasterGradients, layout: GroupLayout) -> None:
        """Look at the gradients of update `step`, counted from 0, if it is one to look at. Collective."""
        if (step + 1) % self._every:
            return
        groups = gradients.groups()
        own = [block for block, is_counted in zip(layout.own_blocks, layout.counted, strict=True) if is_counted]
        counted = [group for group, is_counted in zip(groups, layout.counted, strict=True) if is_counted]
        report = {}
        for block in dict.fromkeys(layout.blocks):
            pieces = [piece for group, of in zip(counted, own, strict=True) if of == block for piece in group]
            counts = self._mesh.sum(exponent_counts(pieces).to(self._mesh.device), "world")
            entry = exponent_report(counts)
            if self._scales is not None and block is not None:
                entry["log2_scale"] = float(self._scales.factors[block].log2())
            report["others" if block is None else str(block)] = entry
        if self._lines is not None:
            self._lines.append({"step": step + 1, "blocks": report})
