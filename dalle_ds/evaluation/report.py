"""The page that shows a finished pair of runs: images, figures, loss curves."""

from __future__ import annotations

import warnings
from collections.abc import Iterable, Sequence
from pathlib import Path

import torch
from PIL import Image
from torch import Tensor

import dalle_ds
from dalle_ds.data import PairDataset
from dalle_ds.data.faults import FaultLog, RowError
from dalle_ds.data.images import Pixels, center_crop_resize
from dalle_ds.errors import DataError
from dalle_ds.evaluation.curves import DVAE, TRANSFORMER, Series, curves_figure, panels_of, read_metrics, svg_of
from dalle_ds.evaluation.metrics import ranking_accuracy
from dalle_ds.evaluation.pages import encoded, figures_table, image_element, write_document
from dalle_ds.evaluation.sets import stacked
from dalle_ds.files import write_bytes
from dalle_ds.sampling import TextToImage, image_grid

Pair = tuple[str, Pixels]
"""A caption, and its image as the models see it."""
CANDIDATES = 16
TITLES = ["image", "dVAE", "samples"]
_OF_ORDER = "entropy of the codes' frequencies, nats: what a model knows that has seen no order"
_OF_CAPTIONS = "how much worse images are predicted under another image's caption, nats per code"
FIGURES = {
    "dvae_psnr": ("dvae", "psnr", "reconstruction of validation images, dB"),
    "dvae_perplexity": ("dvae", "perplexity", "perplexity of the codes of validation images"),
    "dvae_codes_used": ("dvae", "codes_used", "different codes in validation images"),
    "transformer_image_loss": ("transformer", "image_loss", "validation loss per code, nats"),
    "code_entropy": ("transformer", "code_entropy", _OF_ORDER),
    "gain_over_entropy": ("", "", "how far the loss is below it, nats per code"),
    "caption_gain": ("transformer", "caption_gain", _OF_CAPTIONS),
    "transformer_text_loss": ("transformer", "text_loss", "validation loss per text token, nats"),
    "ranking_accuracy_16": ("", "", "share of validation captions that find their image among 16 (chance 0.06)"),
}
"""Name → (stage and name of the validation figure whose last value it is, "" where it is computed; meaning)."""


def write_report(
    data: str, dvae_run: str, transformer_run: str, out: str, *, num: int = 4, seed: int = 0
) -> dict[str, float]:
    """Write `OUT/pictures.png` and `OUT/report.html`. A warning counts the rows that cannot be read; they are left out.

    Args:
        data: prepared data folder.
        dvae_run, transformer_run: finished run directories.
        num: samples per caption.

    Returns:
        The figures on the page.

    Raises:
        CheckpointError: a run has exported no model.
        DataError: a folder is not what it should be.
    """
    runs = {"dvae": dvae_run, "transformer": transformer_run}
    metrics = {stage: read_metrics(run) for stage, run in runs.items()}
    figures = _figures(runs, metrics)
    pipeline = TextToImage.from_pretrained(transformer_run)
    faults = FaultLog()
    size = pipeline.dvae.config.image_size
    train, validation = PairDataset.open(data, "train"), PairDataset.open(data, "validation")
    unseen = _readable(validation, range(len(validation)), size, faults)
    seen = _readable(train, _spread(len(train), 4), size, faults)
    folder = Path(out)
    folder.mkdir(parents=True, exist_ok=True)
    chosen = [unseen[row] for row in _spread(len(unseen), 10)]
    content = encoded(_sheet(pipeline, {"validation": chosen, "seen in training": seen}, num, seed))
    write_bytes(folder / "pictures.png", content)
    if len(unseen) >= CANDIDATES:
        figures["ranking_accuracy_16"] = _ranking(pipeline, unseen)
    if left_out := faults.left_out():
        warnings.warn(f"{data}: {left_out}", stacklevel=2)
    sections = [
        f"<p>Made by dalle_ds {dalle_ds.__version__}. Each row of the sheet: a caption, its image, the image through the "
        "dVAE's codes, and samples that the transformer generated from the caption alone. Captions marked [validation] were "
        "never seen in training.</p>",
        image_element(content, "captions, images, reconstructions and samples"),
        "<h2>Figures</h2>",
        figures_table({name: (f"{value:.3f}", FIGURES[name][-1]) for name, value in figures.items()}),
        "<h2>dVAE</h2>",
        svg_of(curves_figure(panels_of(metrics["dvae"], DVAE))),
        "<h2>Transformer</h2>",
        svg_of(curves_figure(panels_of(metrics["transformer"], TRANSFORMER))),
    ]
    write_document(folder / "report.html", "DALL·E: report", sections)
    return figures


def _figures(runs: dict[str, str], metrics: dict[str, dict[str, Series]]) -> dict[str, float]:
    """The last validation figures of both runs; DataError where a run has none of its stage."""
    figures: dict[str, float] = {}
    for name, (stage, source, _) in FIGURES.items():
        if name == "gain_over_entropy":
            figures[name] = figures["code_entropy"] - figures["transformer_image_loss"]
        elif stage:
            series = metrics[stage].get(f"validation/{source}")
            if series is None:
                raise DataError(
                    f"{runs[stage]} has no validation figure {source!r}: name a run of the other stage, let it finish, or "
                    "train on data with validation rows"
                )
            figures[name] = series[-1][1]
    return figures


def _spread(rows: int, count: int) -> list[int]:
    """At most `count` of the rows, far from each other: neighbouring rows are often of one family."""
    return [index * rows // count for index in range(min(count, rows))]


def _readable(dataset: PairDataset, rows: Iterable[int], size: int, faults: FaultLog) -> list[Pair]:
    """Those of the rows that can be read; the others are added to `faults`."""
    pairs: list[Pair] = []
    for row in rows:
        try:
            pairs.append((dataset.captions(row)[0], center_crop_resize(dataset.image(row), size)))
        except RowError as error:
            faults.add(error)
    return pairs


def _sheet(pipeline: TextToImage, pairs: dict[str, list[Pair]], num: int, seed: int) -> Image.Image:
    """Rows of caption, real image, reconstruction, samples; beside each caption stands what its pairs are called."""
    rows: list[tuple[str, list[Image.Image]]] = []
    for name, of_split in pairs.items():
        if not of_split:
            continue
        generated = pipeline.generate([caption for caption, _ in of_split], num=num, seed=seed)
        for (caption, pixels), samples in zip(of_split, generated, strict=True):
            restored = pipeline.decode(_codes(pipeline, [pixels]))
            rows.append((f"{caption} [{name}]", [Image.fromarray(pixels), *restored, *samples]))
    return image_grid(rows, titles=[*TITLES, *[""] * (num - 1)], cell=96, label_width=240)


def _ranking(pipeline: TextToImage, pairs: Sequence[Pair]) -> float:
    """`ranking_accuracy` on the validation split, in an order that does not put one family into one group."""
    order = torch.randperm(len(pairs), generator=torch.Generator().manual_seed(0)).tolist()
    codes = [_codes(pipeline, [pairs[row][1] for row in order[at : at + 64]]) for at in range(0, len(order), 64)]
    text = pipeline.encode([pairs[row][0] for row in order])
    return ranking_accuracy(pipeline.model, text, torch.cat(codes), CANDIDATES)


def _codes(pipeline: TextToImage, images: Sequence[Pixels]) -> Tensor:
    """(B, W²) of images of the dVAE's size."""
    return pipeline.dvae.encode(stacked(images).to(pipeline.device).float() / 255).flatten(1)
