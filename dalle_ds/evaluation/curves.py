"""Figures over a run's updates, or over the number of candidates."""

from __future__ import annotations

import io
import math
from collections.abc import Mapping
from pathlib import Path

from matplotlib import colormaps
from matplotlib.figure import Figure
from matplotlib.ticker import ScalarFormatter

from dalle_ds.errors import DataError
from dalle_ds.jsonl import read_records

Series = list[tuple[int, float]]
Panels = dict[str, dict[str, Series]]
"""Title → (label → series)."""
NAMED = 6
"""The most lines of a panel that have a legend."""

NUMERICS = {
    "loss": {"training": "loss", "validation": "validation/loss"},
    "gradient norm": {"raw": "grad_norm", "clipped": "grad_norm_clipped"},
    "learning rate": {"rate": "lr"},
    "updates skipped so far": {"skipped": "skipped_updates_total"},
}
"""What shows whether any run is well: title → (label → name of the figure)."""
DVAE = {
    "negative log-likelihood per value": {"training": "nll", "validation": "validation/nll"},
    "KL per code, nats": {"training": "kl", "validation": "validation/kl"},
    "codebook perplexity": {"training": "perplexity", "validation": "validation/perplexity"},
    "validation PSNR, dB": {"validation": "validation/psnr"},
    "temperature": {"temperature": "temperature"},
    "gradient norm": {"norm": "grad_norm"},
}
TRANSFORMER = {
    "image loss, nats per code": {
        "training": "image_loss",
        "validation": "validation/image_loss",
        "entropy": "validation/code_entropy",
    },
    "text loss, nats per token": {"training": "text_loss", "validation": "validation/text_loss"},
    "caption gain, nats per code": {"validation": "validation/caption_gain"},
    "learning rate": {"rate": "lr"},
    "gradient norm": {"norm": "grad_norm"},
    "tokens per second": {"speed": "tokens_per_second"},
}


def read_metrics(run_dir: str | Path) -> dict[str, Series]:
    """Every figure in a run's `metrics.jsonl`: name → (update, value) pairs. What is no finite number is left out.

    Raises:
        DataError: the folder has no metrics.
    """
    path = Path(run_dir) / "metrics.jsonl"
    if not path.is_file():
        raise DataError(f"{run_dir} has no metrics.jsonl: name a run directory")
    figures: dict[str, Series] = {}
    for record in read_records(path):
        for name, value in record.items():
            if name != "step" and type(value) in (int, float) and abs(value) < 1e300:
                figures.setdefault(name, []).append((record["step"], value))
    return figures


def panels_of(metrics: dict[str, Series], wanted: Mapping[str, Mapping[str, str]]) -> Panels:
    """Those of the wanted panels, and of the gradient scales, that a run has anything for."""
    panels = {
        title: {label: metrics[name] for label, name in lines.items() if name in metrics}
        for title, lines in wanted.items()
    }
    panels["log2 of gradient scales, first block dark, last bright"] = gradient_scales(metrics)
    return {title: lines for title, lines in panels.items() if lines}


def gradient_scales(metrics: dict[str, Series]) -> dict[str, Series]:
    """log2 of every residual block's gradient scale, first block to last (DALL·E Fig. 12); empty where none are kept."""
    blocks = [name.removeprefix("gradient_scale/") for name in metrics if name.startswith("gradient_scale/")]
    scales = {
        f"block {block}": [(step, math.log2(value)) for step, value in metrics[f"gradient_scale/{block}"] if value > 0]
        for block in sorted(filter(str.isdecimal, blocks), key=int)
    }
    return {block: series for block, series in scales.items() if series}


def curves_figure(panels: Panels, columns: int = 3) -> Figure:
    """Line plots, so many side by side. More than `NAMED` series of a panel are coloured from first to last, not named."""
    rows = max(1, -(-len(panels) // columns))
    figure = Figure(figsize=(4 * columns, 2.9 * rows), layout="constrained")
    axes = figure.subplots(rows, columns, squeeze=False).flatten()
    for axis, (title, lines) in zip(axes, panels.items(), strict=False):
        named = len(lines) <= NAMED
        for number, (label, series) in enumerate(lines.items()):
            steps, values = zip(*series, strict=True)
            marker = "o" if len(series) < 40 and named else ""
            colour = None if named else colormaps["viridis"](number / (len(lines) - 1))
            axis.plot(steps, values, label=label, color=colour, linewidth=1.2, marker=marker, markersize=3)
        axis.set_title(title, fontsize=10)
        axis.set_xlabel("update", fontsize=8)
        axis.tick_params(labelsize=8)
        axis.grid(alpha=0.25)
        if 1 < len(lines) <= NAMED:
            axis.legend(fontsize=8, frameon=False)
    for axis in axes[len(panels) :]:
        axis.set_axis_off()
    return figure


def svg_of(figure: Figure) -> str:
    """A figure as an SVG element."""
    buffer = io.StringIO()
    figure.savefig(buffer, format="svg")
    text = buffer.getvalue()
    return text[text.index("<svg") :]


def best_of_curves(metrics: Mapping[str, float]) -> str:
    """An SVG of an evaluation's figures over n, the number of candidates; "" where there are fewer than two n."""
    series: dict[str, Series] = {}
    for name, value in metrics.items():
        start, _, rest = name.partition("/")
        if start.startswith("best_of_"):
            series.setdefault(rest, []).append((int(start.removeprefix("best_of_")), value))
    if max(map(len, series.values()), default=0) < 2:
        return ""
    figure = curves_figure({name: {"": sorted(points)} for name, points in series.items()}, columns=4)
    for axis in figure.axes[: len(series)]:
        axis.set_xscale("log", base=2)
        axis.xaxis.set_major_formatter(ScalarFormatter())
        axis.set_xlabel("n", fontsize=8)
    return svg_of(figure)


def pareto_of_guidance(metrics: Mapping[str, float]) -> str:
    """An SVG of distance from real images over cosine to the true image, a point for each guidance of a decoder; "" where
    there are fewer than two."""
    found: dict[float, dict[str, float]] = {}
    for name, value in metrics.items():
        part, _, figure = name.partition("/")[2].partition("/")
        if name.startswith("unclip/guidance_"):
            found.setdefault(float(part.removeprefix("guidance_")), {})[figure] = value
    if len(found) < 2:
        return ""
    guidances = sorted(found)
    cosine = "judge_cosine" if "judge_cosine" in found[guidances[0]] else "cosine"
    distance = next(name for name in found[guidances[0]] if "/blur_" in name)  # the least
    x, y = ([found[guidance][name] for guidance in guidances] for name in (cosine, distance))
    drawing = Figure(figsize=(6, 4), layout="constrained")
    axis = drawing.add_subplot()
    axis.plot(x, y, marker="o", linewidth=1)
    for guidance, at in zip(guidances, zip(x, y, strict=True), strict=True):
        axis.annotate(f"{guidance:g}", at, textcoords="offset points", xytext=(5, 5), fontsize=8)
    axis.set_xlabel(f"{cosine} to the true image")
    axis.set_ylabel(distance)
    axis.grid(alpha=0.25)
    return svg_of(drawing)
