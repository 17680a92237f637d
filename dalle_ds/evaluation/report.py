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
from dalle_ds.data.samples import channels_first
from dalle_ds.errors import DataError
from dalle_ds.evaluation.curves import Series, curves_figure, gradient_scales, read_metrics, svg_of
from dalle_ds.evaluation.metrics.likelihood import ranking_accuracy
from dalle_ds.evaluation.pages import encoded, figures_table, image_element, write_document
from dalle_ds.files import write_bytes
from dalle_ds.sampling import TextToImage, image_grid

Pair = tuple[str, Pixels]
"""A caption, and its image as the models see it."""
CANDIDATES = 16
TITLES = ["image", "dVAE", "samples"]


def write_report(
    data: str, dvae_run: str, transformer_run: str, out: str, *, num: int = 4, seed: int = 0
) -> dict[str, float]:
    """Draw `OUT/pictures.png` and write `OUT/report.html`. A warning counts the rows that cannot be read; they are left out.

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
    dvae, transformer = read_metrics(dvae_run), read_metrics(transformer_run)
    figures = _figures(dvae, dvae_run, transformer, transformer_run)
    pipeline = TextToImage.from_pretrained(transformer_run)
    faults = FaultLog()
    size = pipeline.dvae.config.image_size
    train, validation = PairDataset.open(data, "train"), PairDataset.open(data, "validation")
    unseen = _readable(validation, range(len(validation)), size, faults)
    seen = _readable(train, _spread(len(train), 4), size, faults)
    folder = Path(out)
    folder.mkdir(parents=True, exist_ok=True)
    chosen = [unseen[row] for row in _spread(len(unseen), 10)]
    sheet = _pictures(pipeline, {"validation": chosen, "seen in training": seen}, num, seed)
    content = encoded(sheet)
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
        figures_table({name: (f"{value:.3f}", MEANING[name]) for name, value in figures.items()}),
        "<h2>dVAE</h2>",
        svg_of(curves_figure(_dvae_panels(dvae))),
        "<h2>Transformer</h2>",
        svg_of(curves_figure(_transformer_panels(transformer))),
    ]
    write_document(folder / "report.html", "DALL·E: report", sections)
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


def _pictures(pipeline: TextToImage, pairs: dict[str, list[Pair]], num: int, seed: int) -> Image.Image:
    """Rows of caption, real image, reconstruction, samples; beside each caption stands what its pairs are called."""
    rows: list[tuple[str, list[Image.Image]]] = []
    for name, of_split in pairs.items():
        if not of_split:
            continue
        drawn = pipeline.generate([caption for caption, _ in of_split], num=num, seed=seed)
        for (caption, pixels), samples in zip(of_split, drawn, strict=True):
            tensor = torch.tensor(channels_first(pixels))[None].float() / 255
            restored = pipeline.decode(pipeline.dvae.encode(tensor.to(pipeline.device)).flatten(1))
            rows.append((f"{caption} [{name}]", [Image.fromarray(pixels), *restored, *samples]))
    return image_grid(rows, titles=[*TITLES, *[""] * (num - 1)], cell=96, label_width=240)


def _ranking(pipeline: TextToImage, pairs: Sequence[Pair]) -> float:
    """`ranking_accuracy` on the validation split, in an order that does not put one family into one group."""
    order = torch.randperm(len(pairs), generator=torch.Generator().manual_seed(0)).tolist()
    pixels = torch.stack([torch.tensor(channels_first(pairs[row][1])) for row in order])
    codes: Tensor = torch.cat(
        [pipeline.dvae.encode(chunk.to(pipeline.device).float() / 255).flatten(1) for chunk in pixels.split(64)]
    )
    text = pipeline.encode([pairs[row][0] for row in order])
    return ranking_accuracy(pipeline.model, text, codes, CANDIDATES)


def _figures(
    dvae: dict[str, Series], dvae_run: str, transformer: dict[str, Series], transformer_run: str
) -> dict[str, float]:
    """The last validation figures of both runs; DataError where a run has none of its stage."""

    def last(metrics: dict[str, Series], run: str, name: str) -> float:
        if f"validation/{name}" not in metrics:
            raise DataError(
                f"{run} has no validation figure {name!r}: name a run of the other stage, let it finish, or train on data "
                "with validation rows"
            )
        return metrics[f"validation/{name}"][-1][1]

    image_loss = last(transformer, transformer_run, "image_loss")
    code_entropy = last(transformer, transformer_run, "code_entropy")
    return {
        "dvae_psnr": last(dvae, dvae_run, "psnr"),
        "dvae_perplexity": last(dvae, dvae_run, "perplexity"),
        "dvae_codes_used": last(dvae, dvae_run, "codes_used"),
        "transformer_image_loss": image_loss,
        "code_entropy": code_entropy,
        "gain_over_entropy": code_entropy - image_loss,
        "caption_gain": last(transformer, transformer_run, "caption_gain"),
        "transformer_text_loss": last(transformer, transformer_run, "text_loss"),
    }


MEANING = {
    "dvae_psnr": "reconstruction of validation images, dB",
    "dvae_perplexity": "perplexity of the codes of validation images",
    "dvae_codes_used": "different codes in validation images",
    "transformer_image_loss": "validation loss per code, nats",
    "code_entropy": "entropy of the codes' frequencies, nats: what a model knows that has seen no order",
    "gain_over_entropy": "how far the loss is below it, nats per code",
    "caption_gain": "how much worse images are predicted under another image's caption, nats per code",
    "transformer_text_loss": "validation loss per text token, nats",
    "ranking_accuracy_16": "share of validation captions that find their image among 16 (chance 0.06)",
}


def _panel(metrics: dict[str, Series], **names: str) -> dict[str, Series]:
    return {label: metrics[name] for label, name in names.items() if name in metrics}


def _dvae_panels(metrics: dict[str, Series]) -> dict[str, dict[str, Series]]:
    return {
        "negative log-likelihood per value": _panel(metrics, training="nll", validation="validation/nll"),
        "KL per code, nats": _panel(metrics, training="kl", validation="validation/kl"),
        "codebook perplexity": _panel(metrics, training="perplexity", validation="validation/perplexity"),
        "validation PSNR, dB": _panel(metrics, validation="validation/psnr"),
        "temperature": _panel(metrics, temperature="temperature"),
        "gradient norm": _panel(metrics, norm="grad_norm"),
    }


def _transformer_panels(metrics: dict[str, Series]) -> dict[str, dict[str, Series]]:
    panels = {
        "image loss, nats per code": _panel(
            metrics, training="image_loss", validation="validation/image_loss", entropy="validation/code_entropy"
        ),
        "text loss, nats per token": _panel(metrics, training="text_loss", validation="validation/text_loss"),
        "caption gain, nats per code": _panel(metrics, validation="validation/caption_gain"),
        "learning rate": _panel(metrics, rate="lr"),
        "gradient norm": _panel(metrics, norm="grad_norm"),
        "tokens per second": _panel(metrics, speed="tokens_per_second"),
    }
    scales = gradient_scales(metrics)
    return panels | ({"log2 of gradient scales, first block to last": scales} if scales else {})
