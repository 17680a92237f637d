"""Results of evaluations: figures with the protocol that they were obtained by, as JSON, tables and a page; comparisons of
what is comparable."""

from __future__ import annotations

import html
import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Annotated, Any

import tyro
from PIL import Image
from rich.console import Console
from rich.table import Table

from dalle_ds.cli import parse_options
from dalle_ds.errors import ConfigError, DataError
from dalle_ds.evaluation.curves import best_of_curves, pareto_of_guidance
from dalle_ds.evaluation.pages import encoded, figures_table, image_element, write_document
from dalle_ds.files import write_bytes, write_json
from dalle_ds.parsing import parse_json, shown

METHOD = 1
"""Raised whenever a figure would come out otherwise from the same images."""
STANDARD_ERROR, LOW, HIGH = "standard_error", "low_95", "high_95"
"""Last parts of the names of what belongs to another figure: NAME/standard_error, and the bounds of a 95 % interval."""
DEPTH = 20
"""How deep a protocol may be nested; files that others made may be nested deeper."""


@dataclass(frozen=True)
class Result:
    """Figures of one evaluation."""

    protocol: dict[str, Any]
    """How it was measured: equal in results that may be compared. Nested dicts and plain values."""
    models: dict[str, str]
    """What was measured: fingerprints by name."""
    metrics: dict[str, float]
    """Figures by name; "/" divides a name into groups."""
    version: str
    """Of dalle_ds."""
    notes: list[str] = field(default_factory=list)
    """What a reader must know beside the figures."""
    seconds: dict[str, float] = field(default_factory=dict)
    """How long each part took."""

    def save(self, path: Path) -> None:
        """Write it as JSON, whole or not at all."""
        write_json(path, vars(self))

    @classmethod
    def load(cls, path: str | Path) -> Result:
        """Read what `save` wrote.

        Raises:
            DataError: there is no such file, or it holds something else.
        """
        try:
            content = parse_json(Path(path).read_bytes())
        except (OSError, ValueError) as error:
            raise DataError(f"{path} cannot be read as a result of an evaluation: {error}") from error
        kinds = {"protocol": dict, "models": dict, "metrics": dict, "version": str, "notes": list, "seconds": dict}
        if not isinstance(content, dict) or set(content) != set(kinds):
            raise DataError(f"{path} is no result of an evaluation: launchers/evaluate.py writes them as result.json")
        for name, kind in kinds.items():
            if not isinstance(content[name], kind):
                raise DataError(f"{path}: {name} must be a {kind.__name__}, found {shown(content[name])}")
        for name, value in content["metrics"].items():
            if type(value) not in (int, float):
                raise DataError(f"{path}: metrics.{name} must be a number, found {shown(value)}")
        return cls(**content)


def compare(one: Result, other: Result, allow: Sequence[str] = ()) -> dict[str, tuple[float, float]]:
    """The figures that two results share: name → (one's, other's).

    Args:
        allow: fields of the protocol that may differ, with all below them ("sampling", "sampling.temperature").

    Raises:
        ConfigError: their protocols differ elsewhere; every differing field is named, with both values.
    """
    differing = differences(one.protocol, other.protocol, allow)
    if differing:
        raise ConfigError(
            f"these results were obtained by different protocols and cannot be compared: {'; '.join(differing)}. Evaluate "
            "one of them again like the other; where a difference is what you are after, name its field with --allow"
        )
    return {name: (value, other.metrics[name]) for name, value in one.metrics.items() if name in other.metrics}


def differences(one: dict[str, Any], other: dict[str, Any], allow: Sequence[str] = ()) -> list[str]:
    """The fields in which two protocols differ, with both values."""
    first, second = flat(one), flat(other)
    return [
        f"{name}: {shown(first.get(name))} and {shown(second.get(name))}"
        for name in sorted({*first, *second})
        if first.get(name) != second.get(name) and not any(name == a or name.startswith(f"{a}.") for a in allow)
    ]


def flat(protocol: dict[str, Any], prefix: str = "") -> dict[str, Any]:
    """Nested dicts as one, with dots in the names."""
    found: dict[str, Any] = {}
    for name, value in protocol.items():
        nested = isinstance(value, dict) and prefix.count(".") < DEPTH
        found |= flat(value, f"{prefix}{name}.") if nested else {f"{prefix}{name}": value}
    return found


MEANING = {
    "fid": "Fréchet distance from real images in Inception features; less is better",
    "inception_score": "Inception Score; more is better",
    "efficientnet_frechet": "Fréchet distance from real images in EfficientNet features; not FID",
    "efficientnet_score": "the Inception Score's formula on EfficientNet",
    "psnr": "mean peak signal-to-noise ratio, dB",
    "ssim": "mean structural similarity",
    "perplexity": "exp of the entropy of the codes' frequencies",
    "used": "codes that occur",
    "dead": "codes that do not",
    "usage": "share of codes that occur",
    "clip_score": "100 · cosine of image and caption, by the judge",
    "retrieval_at_1": "captions whose own image comes first among all",
    "retrieval_at_5": "… is among the first 5",
    "retrieval_at_10": "… is among the first 10",
    "reranker_score": "100 · cosine, by the model that chose",
    "text_nats_per_token": "−ln P of captions, nats per token",
    "image_nats_per_token": "−ln P of codes given captions, nats per code",
    "codes_bits_per_dimension": "the same in bits per pixel value",
    "pixels_bits_per_dimension": "−log2 P of 8-bit images given their codes, per pixel value",
    "bits_per_dimension": "the sum: upper bound on −log2 P of images given captions",
    "captions_cut": "captions with more tokens than fit, share",
    "gain": "cosine of samples less that of another guess",
    "cosine": "to the true image embedding, mean",
    "centred_cosine": "the same, the training images' mean taken off both",
    "text_cosine": "to the caption's embedding",
    "diversity": "1 − cosine, mean over pairs of different rows",
    "caption_diversity": "1 − cosine, mean over pairs of samples of one caption",
    "judge_cosine": "of the images' embeddings, generated and true, by the judge",
    "consistency_psnr": "of the result made small again, from what it was made of, dB",
    "swapped": "1 − cosine to the image before, where this alone is another's",
    "norm": "length, where true embeddings have 1",
}


def meaning(name: str) -> str:
    """What a figure is, by a part of its name."""
    return next((MEANING[part] for part in name.split("/") if part in MEANING), "")


def shown_figures(metrics: Mapping[str, float]) -> dict[str, str]:
    """Name → value for people, with its standard error and 95 % interval where there are any."""
    found = {}
    for name, value in metrics.items():
        first, _, last = name.rpartition("/")
        if last in (STANDARD_ERROR, LOW, HIGH) and first in metrics:
            continue
        found[name] = f"{value:.4f}"
        if (error := metrics.get(f"{name}/{STANDARD_ERROR}")) is not None:
            found[name] += f" ± {error:.4f}"
        if (low := metrics.get(f"{name}/{LOW}")) is not None and (high := metrics.get(f"{name}/{HIGH}")) is not None:
            found[name] += f" ({low:.4f} to {high:.4f})"
    return found


def print_result(result: Result) -> None:
    """Print the figures as a table, and the notes."""
    table = Table("figure", "value", "meaning", title="evaluation")
    for name, value in shown_figures(result.metrics).items():
        table.add_row(name, value, meaning(name))
    console = _console()
    console.print(table, *[f"note: {note}" for note in result.notes], sep="\n")


def _console() -> Console:
    return Console(width=None if Console().is_terminal else 140)


@dataclass(frozen=True)
class CompareOptions:
    """Show the figures of two evaluations side by side, if they were measured by one protocol."""

    results: tyro.conf.Positional[tuple[str, str]]
    """Two files result.json."""
    allow: Annotated[tuple[str, ...], tyro.conf.UseAppendAction] = ()
    """Field of the protocol that may differ, such as generation.sampling.guidance; given again, another one."""


def compare_command(arguments: Sequence[str]) -> None:
    """Print the figures of two results side by side.

    Raises:
        ConfigError: their protocols differ.
        DataError: a file is no result.
    """
    options = parse_options(CompareOptions, arguments)
    one, other = (Result.load(path) for path in options.results)
    figures = compare(one, other, options.allow)
    console = _console()
    for name in sorted({*one.models, *other.models}):
        models = [str(result.models.get(name))[:12] for result in (one, other)]
        same = one.models.get(name) == other.models.get(name)
        console.print(f"{name}: " + ("the same" if same else " and ".join(models)))
    table = Table("figure", *options.results, "difference")
    for name, (before, after) in figures.items():
        table.add_row(name, f"{before:.4f}", f"{after:.4f}", f"{after - before:+.4f}")
    console.print(table)


SHEETS = {
    "pictures": "Images generated for captions",
    "reconstructions": "Reconstructions by the dVAE",
    "codebook": "The most and the least used codes",
    "unclip": "Images of each kind of embedding",
}
"""Headings of the page's images, by their files' names."""


def write_page(out: Path, result: Result, sheets: Mapping[str, Image.Image]) -> None:
    """Write `evaluation.html` and the images on it, `NAME.png`, into the folder `out`."""
    sections = [
        f"<p>Made by dalle_ds {result.version}. Figures are comparable with those of results that have the same protocol, "
        "below.</p>",
        *[f"<p><b>{html.escape(note)}</b></p>" for note in result.notes],
    ]
    if curves := best_of_curves(result.metrics):
        sections += ["<h2>Best of n</h2>", curves]
    if curves := pareto_of_guidance(result.metrics):
        sections += ["<h2>Guidance of the decoder</h2>", curves]
    for name, sheet in sheets.items():
        content = encoded(sheet)
        write_bytes(out / f"{name}.png", content)
        sections += [f"<h2>{SHEETS[name]}</h2>", image_element(content, name)]
    rows = {name: (value, meaning(name)) for name, value in shown_figures(result.metrics).items()}
    protocol = {"protocol": result.protocol, "models": result.models, "seconds": result.seconds}
    text = html.escape(json.dumps(protocol, indent=2, ensure_ascii=False))
    sections += ["<h2>Figures</h2>", figures_table(rows), "<h2>Protocol</h2>", f"<pre>{text}</pre>"]
    write_document(out / "evaluation.html", "dalle_ds: evaluation", sections)
