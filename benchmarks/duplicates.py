"""What a duplicate detector finds: copies planted among pictures that are none, against pixels and perceptual hashes.

python benchmarks/duplicates.py --detector DIR --data DIR

Distorted copies of training pictures are looked up among all training pictures, and so are pictures of the validation split,
which are no copies. A method's threshold is the most permissive one at which no more than 0 or 1 % of the latter pass for
copies; its recall is the share of copies that do. Emoji come in variants by skin tone and gender, some of them all but the
same picture ("guard", "man guard"); validation pictures of which the training split has a variant are left out.
"""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import imagehash
import numpy as np
import numpy.typing as npt
import torch
from measure import check_flags
from PIL import Image
from rich.console import Console
from rich.table import Table

from dalle_ds.cli import parse_options, run_launcher
from dalle_ds.config import DistortionConfig
from dalle_ds.data import PairDataset
from dalle_ds.data.distortions import distort
from dalle_ds.data.images import Pixels, center_crop_resize
from dalle_ds.models.duplicates import DuplicateDetector

STRENGTHS = {
    "one or two distortions": DistortionConfig(probability=0.25),
    "as in training": DistortionConfig(),
    "all at once": DistortionConfig(probability=1.0),
}
PEOPLE = {"man", "woman", "men", "women", "person", "people"}
FALSE_POSITIVES = (0.0, 0.01)
_PIXELS = 32
_BATCH = 256
Floats = npt.NDArray[np.float32]


@dataclass(frozen=True)
class Options:
    """Plant copies and count which are found."""

    detector: str
    """Run directory of launchers/train_duplicates.py, or its export."""
    data: str
    """Prepared folder of emoji, with splits train and validation."""
    copies: int = 300
    """Training pictures, spread over the split, of each of which a copy is planted."""
    seed: int = 1
    """Of the distortions."""
    device: str = "cpu"
    """Where pictures are embedded."""
    json: str | None = None
    """File for the figures."""


class Detector:
    """Cosine of embeddings."""

    def __init__(self, path: str, device: str) -> None:
        self._model = DuplicateDetector.from_pretrained(path, device)

    def describe(self, pictures: list[Pixels]) -> Floats:
        size = self._model.config.image_size
        squares = torch.from_numpy(np.stack([center_crop_resize(picture, size) for picture in pictures]))
        batches = squares.permute(0, 3, 1, 2).split(_BATCH)
        return torch.cat([self._model.embed_images(batch.float() / 255).cpu() for batch in batches]).numpy()

    def similarities(self, queries: Floats, base: Floats) -> Floats:
        return queries @ base.T


class PixelDistance:
    """Squared difference of pixels at 32×32."""

    def describe(self, pictures: list[Pixels]) -> Floats:
        return np.stack([center_crop_resize(p, _PIXELS).reshape(-1).astype(np.float32) / 255 for p in pictures])

    def similarities(self, queries: Floats, base: Floats) -> Floats:
        squares = (queries**2).sum(1)[:, None] + (base**2).sum(1) - 2 * queries @ base.T
        return -squares / queries.shape[1]


class PerceptualHash:
    """Different bits of `imagehash.phash`."""

    def describe(self, pictures: list[Pixels]) -> Floats:
        hashes = [imagehash.phash(Image.fromarray(picture)).hash.reshape(-1) for picture in pictures]
        return np.stack(hashes).astype(np.float32)

    def similarities(self, queries: Floats, base: Floats) -> Floats:
        return queries @ base.T + (1 - queries) @ (1 - base).T


def family(caption: str) -> str:
    """What an emoji's name says besides skin tone and gender."""
    return " ".join(word for word in caption.partition(":")[0].split() if word not in PEOPLE)


def measure(options: Options) -> dict[str, Any]:
    """Recalls, by method and strength of distortion."""
    train, validation = (PairDataset.open(options.data, split) for split in ("train", "validation"))
    base = [train.picture(row) for row in range(len(train))]
    families = {family(train.captions(row)[0]) for row in range(len(train))}
    alone = [row for row in range(len(validation)) if family(validation.captions(row)[0]) not in families]
    others = [validation.picture(row) for row in alone]
    sources = np.linspace(0, len(train) - 1, min(options.copies, len(train))).astype(int)
    copies = {
        name: [distort(base[row], config, np.random.default_rng((options.seed, row))) for row in sources]
        for name, config in STRENGTHS.items()
    }
    methods: dict[str, Any] = {
        "detector": Detector(options.detector, options.device),
        "pixel distance": PixelDistance(),
        "perceptual hash": PerceptualHash(),
    }
    figures: dict[str, Any] = {"copies": len(sources), "others": len(others), "training": len(base), "methods": {}}
    for name, method in methods.items():
        known = method.describe(base)
        negatives = np.sort(method.similarities(method.describe(others), known).max(axis=1))[::-1]
        found: dict[str, Any] = {}
        for strength, pictures in copies.items():
            similarities = method.similarities(method.describe(pictures), known)
            positives = similarities.max(axis=1)
            # Ties count for half, as in the area under the ROC curve.
            higher = positives[:, None] > negatives
            area = (higher + 0.5 * (positives[:, None] == negatives)).mean()
            recalls = {}
            for rate in FALSE_POSITIVES:
                allowed = int(rate * len(negatives))  # so many of the others may lie above the threshold
                recalls[f"recall at {rate:.0%}"] = float((positives > negatives[allowed]).mean())
            nearest = float((similarities.argmax(axis=1) == sources).mean())
            found[strength] = {**recalls, "area under ROC": float(area), "nearest is the source": nearest}
        figures["methods"][name] = found
    return figures


def main() -> None:
    """Measure and tell."""
    options = parse_options(Options)
    check_flags(options, "copies")
    figures = measure(options)
    console = Console(width=127)
    console.print(
        f"{figures['copies']} distorted copies and {figures['others']} pictures that are no copies, each looked up among "
        f"{figures['training']:,} training pictures"
    )
    names = list(next(iter(figures["methods"]["detector"].values())))
    table = Table("distortions", "method", *names)
    for strength in STRENGTHS:
        for method, found in figures["methods"].items():
            table.add_row(strength, method, *(f"{found[strength][name]:.3f}" for name in names))
    console.print(table)
    if options.json is not None:
        Path(options.json).write_text(json.dumps(figures, indent=2) + "\n")


if __name__ == "__main__":
    run_launcher(main)
