"""A run's figures over its updates."""

from __future__ import annotations

import io
from pathlib import Path

from matplotlib.figure import Figure

from dalle_ds.errors import DataError
from dalle_ds.metrics import read_records

Series = list[tuple[int, float]]


def read_metrics(run_dir: str | Path) -> dict[str, Series]:
    """Every figure in a run's `metrics.jsonl`: name → (update, value) pairs.

    Raises:
        DataError: the folder has no metrics.
    """
    path = Path(run_dir) / "metrics.jsonl"
    if not path.is_file():
        raise DataError(f"{run_dir} has no metrics.jsonl: name a run directory")
    figures: dict[str, Series] = {}
    for record in read_records(path):
        for name, value in record.items():
            if name != "step" and value is not None:
                figures.setdefault(name, []).append((record["step"], value))
    return figures


def curves_svg(panels: dict[str, dict[str, Series]], columns: int = 3) -> str:
    """Line plots as an SVG element.

    Args:
        panels: title → (label → series).
        columns: panels side by side.
    """
    rows = -(-len(panels) // columns)
    figure = Figure(figsize=(4 * columns, 2.9 * rows), layout="constrained")
    axes = figure.subplots(rows, columns, squeeze=False).flatten()
    for axis, (title, lines) in zip(axes, panels.items(), strict=False):
        for label, series in lines.items():
            steps, values = zip(*series, strict=True)
            marker = "o" if len(series) < 40 else ""
            axis.plot(steps, values, label=label, linewidth=1.2, marker=marker, markersize=3)
        axis.set_title(title, fontsize=10)
        axis.set_xlabel("update", fontsize=8)
        axis.tick_params(labelsize=8)
        axis.grid(alpha=0.25)
        if len(lines) > 1:
            axis.legend(fontsize=8, frameon=False)
    for axis in axes[len(panels) :]:
        axis.set_axis_off()
    buffer = io.StringIO()
    figure.savefig(buffer, format="svg")
    text = buffer.getvalue()
    return text[text.index("<svg") :]
