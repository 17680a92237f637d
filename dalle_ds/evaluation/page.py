"""What people read of a result: a table on the console, and a page with pictures."""

from __future__ import annotations

import base64
import html
import io
import json
from collections.abc import Mapping
from pathlib import Path

from matplotlib.figure import Figure
from PIL import Image
from rich.table import Table

from dalle_ds.evaluation.results import Result
from dalle_ds.files import write_bytes, write_text

MEANING = {
    "fid": "Fréchet distance from real pictures in Inception features; less is better",
    "inception_score": "Inception Score; more is better",
    "efficientnet_frechet": "Fréchet distance from real pictures in EfficientNet features; not FID",
    "efficientnet_score": "the Inception Score's formula on EfficientNet",
    "psnr": "mean peak signal-to-noise ratio, dB",
    "ssim": "mean structural similarity",
    "perplexity": "exp of the entropy of the codes' frequencies",
    "used": "codes that occur",
    "dead": "codes that do not",
    "usage": "share of codes that occur",
    "clip_score": "100 · cosine of picture and caption, by the judge",
    "retrieval_at_1": "captions whose own picture comes first among all",
    "retrieval_at_5": "… is among the first 5",
    "retrieval_at_10": "… is among the first 10",
    "reranker_score": "100 · cosine, by the model that chose",
    "text_nats_per_token": "−ln P of captions, nats per token",
    "image_nats_per_token": "−ln P of codes given captions, nats per code",
    "codes_bits_per_dimension": "the same in bits per pixel value",
    "pixels_bits_per_dimension": "−log2 P of 8-bit pictures given their codes, per pixel value",
    "bits_per_dimension": "the sum: upper bound on −log2 P of pictures given captions",
    "captions_cut": "captions with more tokens than fit, share",
}


def console_table(result: Result) -> Table:
    """The figures as a table."""
    table = Table("figure", "value", "meaning", title="evaluation")
    for name, value in result.metrics.items():
        table.add_row(name, f"{value:.4f}", meaning(name))
    return table


def comparison_table(figures: Mapping[str, tuple[float, float]], names: tuple[str, str]) -> Table:
    """Figures of two results side by side."""
    table = Table("figure", *names, "difference")
    for name, (one, other) in figures.items():
        table.add_row(name, f"{one:.4f}", f"{other:.4f}", f"{other - one:+.4f}")
    return table


def meaning(name: str) -> str:
    """What a figure is, by a part of its name."""
    return next((MEANING[part] for part in name.split("/") if part in MEANING), "")


def write_page(out: Path, result: Result, sheets: Mapping[str, Image.Image]) -> None:
    """Write `evaluation.html` and the pictures on it, `NAME.png`, into the folder `out`."""
    sections = []
    for name, sheet in sheets.items():
        buffer = io.BytesIO()
        sheet.save(buffer, "PNG")
        write_bytes(out / f"{name}.png", buffer.getvalue())
        encoded = base64.b64encode(buffer.getvalue()).decode()
        sections.append(f'<h2>{CAPTIONS[name]}</h2>\n<p><img alt="{name}" src="data:image/png;base64,{encoded}"></p>')
    curves = best_of_curves(result.metrics)
    if curves:
        sections.insert(0, f"<h2>Best of n</h2>\n{curves}")
    rows = "\n".join(
        f"<tr><td>{html.escape(name)}</td><td class=number>{value:.4f}</td><td>{html.escape(meaning(name))}</td></tr>"
        for name, value in result.metrics.items()
    )
    notes = "".join(f"<p><b>{html.escape(note)}</b></p>" for note in result.notes)
    protocol = json.dumps(
        {"protocol": result.protocol, "models": result.models, "seconds": result.seconds}, indent=2, ensure_ascii=False
    )
    page = PAGE.format(
        version=result.version, rows=rows, notes=notes, sections="\n".join(sections), protocol=html.escape(protocol)
    )
    write_text(out / "evaluation.html", page)


def best_of_curves(metrics: Mapping[str, float]) -> str:
    """An SVG of the figures over n; "" where there are fewer than two n."""
    series: dict[str, list[tuple[int, float]]] = {}
    for name, value in metrics.items():
        start, _, rest = name.partition("/")
        if start.startswith("best_of_"):
            series.setdefault(rest, []).append((int(start.removeprefix("best_of_")), value))
    if max(map(len, series.values()), default=0) < 2:
        return ""
    columns = 4
    lines = -(-len(series) // columns)
    figure = Figure(figsize=(3 * columns, 2.3 * lines), layout="constrained")
    axes = figure.subplots(lines, columns, squeeze=False).flatten()
    for axis, (name, points) in zip(axes, series.items(), strict=False):
        numbers, values = zip(*sorted(points), strict=True)
        axis.plot(numbers, values, marker="o", markersize=3)
        axis.set_xscale("log", base=2)
        axis.set_xticks(numbers, [str(number) for number in numbers])
        axis.set_title(name, fontsize=8)
        axis.tick_params(labelsize=7)
        axis.grid(alpha=0.25)
    for axis in axes[len(series) :]:
        axis.set_axis_off()
    buffer = io.StringIO()
    figure.savefig(buffer, format="svg")
    text = buffer.getvalue()
    return text[text.index("<svg") :]


CAPTIONS = {
    "pictures": "Pictures drawn for captions",
    "reconstructions": "Reconstructions by the dVAE",
    "codebook": "The most and the least used codes",
}

PAGE = """<!doctype html>
<html lang="en"><head><meta charset="utf-8"><title>DALL·E: evaluation</title>
<style>
body {{ font: 15px/1.5 system-ui, sans-serif; color: #222; max-width: 1000px; margin: 2em auto; padding: 0 1em; }}
table {{ border-collapse: collapse; }} td {{ border-top: 1px solid #ddd; padding: .2em .8em; }}
.number {{ text-align: right; font-variant-numeric: tabular-nums; }} img, svg {{ max-width: 100%; height: auto; }}
pre {{ background: #f4f4f4; padding: 1em; overflow: auto; font-size: 12px; }}
</style></head><body>
<h1>DALL·E: evaluation</h1>
<p>Made by dalle_ds {version}. Figures are comparable with those of results that have the same protocol, below.</p>
{notes}
{sections}
<h2>Figures</h2>
<table>
{rows}
</table>
<h2>Protocol</h2>
<pre>{protocol}</pre>
</body></html>
"""
