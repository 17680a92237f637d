"""Which validation images are in the training data (DALL·E §3.1, after CLIP App. C).

From two sets of images and a CLIP, or perceptual hashes, to the nearest training images, a page on which a person chooses the
threshold by eye, and the rows that are held to be duplicates.
"""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any, Literal

import numpy as np
import numpy.typing as npt
import torch
from PIL import Image

from dalle_ds.config.plain import positive
from dalle_ds.data.dataset import PairDataset
from dalle_ds.data.faults import RowError
from dalle_ds.errors import ConfigError, DataError
from dalle_ds.evaluation.embeddings import PERCEPTUAL_HASHES, Embedder, IndexKind, embed_split, nearest
from dalle_ds.evaluation.pages import data_uri, encoded, write_template
from dalle_ds.files import disk_full_is_a_data_error, write_json, write_text
from dalle_ds.models import Clip

FORMAT_VERSION = 1
_DIGITS = 6
"""Of similarities, everywhere: what is above a threshold on the page is so in the files."""
_SHOWN_SIDE = 192
"""Longest side in pixels of an image on the page; larger ones shrink."""


@dataclass(frozen=True)
class OverlapOptions:
    """Find the most similar training image of every validation image, and write OUT/neighbours.jsonl and OUT/pairs.html.

    Choose a threshold on the page, by eye, so that no duplicate is missed (DALL·E §3.1). Given with --threshold,
    OUT/overlap.json lists the rows at or above it, which launchers/evaluate.py leaves out with --without. Embeddings stay in
    OUT/embeddings, so that a second call takes little time, and one that was stopped goes on.
    """

    train: str
    """Folder that launchers/prepare_data.py made: what models were trained on."""
    out: str
    """Folder for what is found."""
    clip: str | None = None
    """CLIP whose embeddings are compared: a run directory of launchers/train_clip.py, its export, or what
    launchers/import_clip.py made. None compares perceptual hashes (64 bits; imagehash), which finds copies that were
    compressed or resized, but not cropped ones."""
    train_split: str = "train"
    """Split of --train."""
    validation: str | None = None
    """Folder whose images are looked up; None takes that of --train."""
    split: str = "validation"
    """Split of --validation."""
    threshold: float | None = None
    """Cosine in [-1, 1] from which on a validation image is held to be a duplicate; None only shows pairs."""
    pairs: int = 200
    """Pairs on the page: half of them the closest, or closest to --threshold, the others spread over all cosines."""
    index: IndexKind = "auto"
    """How neighbours are found: `flat` exactly, by Faiss; `torch` exactly, without; `auto` by what is there; `ivf` by Faiss,
    looking through a part of the training set, which may miss some, for sets of many millions."""
    lists: int | None = None
    """Of `ivf`: parts into which the training set is divided; None takes 4 times the root of its size."""
    probes: int = 16
    """Of `ivf`: parts that are looked through for each image."""
    batch_size: int = 256
    """Images embedded at once."""
    workers: int = 0
    """Processes that read and decode; 0 does it here."""
    device: Literal["cpu", "cuda"] = "cpu"
    """Where images are embedded."""

    def __post_init__(self) -> None:
        positive("overlap", self, "pairs", "lists", "probes", "batch_size")
        if self.workers < 0:
            raise ConfigError(f"workers must not be negative, found {self.workers}")
        if self.threshold is not None and not -1.0 <= self.threshold <= 1.0:
            raise ConfigError(f"threshold must lie in [-1, 1], found {self.threshold}")


@dataclass(frozen=True)
class Overlap:
    """What was found; rows are those of the validation split."""

    rows: npt.NDArray[np.int64]
    """(N,) rows that could be read."""
    unreadable: npt.NDArray[np.int64]
    """Rows that could not."""
    nearest: npt.NDArray[np.int64]
    """(N,) training row that is most similar to each."""
    similarity: npt.NDArray[np.float64]
    """(N,) cosine of the two, rounded to 6 digits."""
    training_unreadable: int
    """Training images that could not be read, and were compared with nothing."""

    def at_or_above(self, threshold: float) -> list[int]:
        """Rows that are held to be duplicates."""
        return self.rows[self.similarity >= threshold].tolist()


def find_overlap(
    options: OverlapOptions, embedder: Embedder | None = None, say: Callable[[str], None] = print
) -> Overlap:
    """Do what `OverlapOptions` says, in this process alone.

    Args:
        embedder: used instead of the one that `options` names.
        say: is told how far it is, and what was found.

    Raises:
        ConfigError, CheckpointError, DataError: what the user asked for cannot be done.
    """
    train = PairDataset.open(options.train, options.train_split)
    validation = PairDataset.open(options.validation or options.train, options.split)
    if (train.fingerprint, train.split) == (validation.fingerprint, validation.split):
        raise ConfigError(
            f"both sets are the split {train.split!r} of {options.train}, each of whose images is its own duplicate: name "
            "another --split"
        )
    embedder = embedder or _load(options)
    out = Path(options.out)
    embed = partial(embed_split, embedder, batch_size=options.batch_size, workers=options.workers, say=say)
    of_train = embed(train, out / "embeddings" / "train")
    of_validation = embed(validation, out / "embeddings" / "validation")
    if not of_train.readable.any():
        raise DataError(f"no image of {train.data_dir / train.split} can be read: there is nothing to compare with")
    rows = np.flatnonzero(of_validation.readable)
    cosines, numbers = nearest(
        of_validation.vectors[rows], of_train, kind=options.index, lists=options.lists, probes=options.probes
    )
    found = Overlap(
        rows=rows,
        unreadable=np.flatnonzero(~of_validation.readable),
        nearest=numbers,
        similarity=cosines.astype(np.float64).round(_DIGITS),
        training_unreadable=int((~of_train.readable).sum()),
    )
    about: dict[str, Any] = {
        "format_version": FORMAT_VERSION,
        "split": validation.split,
        "fingerprint": validation.fingerprint,
        "of": len(validation),
        "unreadable": found.unreadable.tolist(),
        "detector": embedder.fingerprint,
        "train": {"split": train.split, "fingerprint": train.fingerprint},
        "index": options.index,
    }
    if options.index == "ivf":
        about |= {"lists": options.lists, "probes": options.probes}
    with disk_full_is_a_data_error(out):
        _write(out, found, about, options, train, validation)
    for line in _summary(found, options):
        say(line)
    return found


def _load(options: OverlapOptions) -> Embedder:
    if options.clip is None:
        return PERCEPTUAL_HASHES
    if options.device == "cuda" and not torch.cuda.is_available():
        raise ConfigError("device cuda finds no GPU: set --device cpu")
    clip = Clip.from_pretrained(options.clip, options.device)
    return Embedder(
        clip.fingerprint, clip.config.image_size, clip.config.embed_dim, partial(clip.embed_images, normalize=True)
    )


def _write(
    out: Path,
    found: Overlap,
    about: dict[str, Any],
    options: OverlapOptions,
    train: PairDataset,
    validation: PairDataset,
) -> None:
    """The files; pairs stand in them with the most similar first."""
    order = np.argsort(-found.similarity, kind="stable").tolist()
    pairs = {place: _pair(found, place, train, validation) for place in order}
    lines = (json.dumps(pair, ensure_ascii=False) + "\n" for pair in pairs.values())
    write_text(out / "neighbours.jsonl", "".join(lines))
    chosen = _shown(found.similarity, options)
    shown = [pair for place, pair in pairs.items() if place in chosen]
    for pair in shown:
        pair["pictures"] = [thumbnail_uri(validation, pair["row"]), thumbnail_uri(train, pair["nearest"])]
    threshold = options.threshold
    if threshold is None:
        threshold = shown[len(shown) // 2]["similarity"] if shown else 1.0
    # All similarities, by which the page's threshold moves.
    every = {"rows": found.rows.tolist(), "similarity": found.similarity.tolist()}
    page = {"about": about, **every, "threshold": threshold, "pairs": shown}
    write_template(out / "pairs.html", "overlap.html", page)
    if options.threshold is not None:
        duplicates = {"threshold": options.threshold, "rows": found.at_or_above(options.threshold)}
        write_json(out / "overlap.json", about | duplicates)


def _pair(found: Overlap, place: int, train: PairDataset, validation: PairDataset) -> dict[str, Any]:
    """Numbers, names and captions of a validation image and its neighbour."""
    row, other = int(found.rows[place]), int(found.nearest[place])
    return {
        "row": row,
        "nearest": other,
        "similarity": float(found.similarity[place]),
        "name": _text(validation.name, row),
        "nearest_name": _text(train.name, other),
        "caption": _text(lambda number: validation.captions(number)[0], row),
        "nearest_caption": _text(lambda number: train.captions(number)[0], other),
    }


def _text(read: Callable[[int], str], row: int) -> str:
    try:
        return read(row)
    except RowError:  # its image could be read, which is all that matters
        return "(unreadable)"


def _shown(similarity: npt.NDArray[np.float64], options: OverlapOptions) -> set[int]:
    """Which pairs stand on the page.

    In a set with many duplicates, the closest pairs are all beyond doubt; the others are there to find where doubt begins.
    """
    count = min(options.pairs, len(similarity))
    anchor = 1.0 if options.threshold is None else options.threshold
    chosen = np.argsort(np.abs(similarity - anchor), kind="stable")[: -(-count // 2)].tolist()
    rest = np.setdiff1d(np.arange(len(similarity)), chosen)
    rest = rest[np.argsort(similarity[rest], kind="stable")]
    for wanted in np.linspace(1, 0, count - len(chosen)):
        cosine = similarity[rest[0]] + wanted * (similarity[rest[-1]] - similarity[rest[0]])
        place = int(np.abs(similarity[rest] - cosine).argmin())
        chosen.append(int(rest[place]))
        rest = np.delete(rest, place)
    return set(chosen)


def thumbnail_uri(dataset: PairDataset, row: int) -> str:
    """An image for the page, as an address."""
    try:
        image = Image.fromarray(dataset.image(row))
    except RowError:  # damaged since it was embedded
        image = Image.new("RGB", (1, 1), "white")
    image.thumbnail((_SHOWN_SIDE, _SHOWN_SIDE), Image.Resampling.LANCZOS)
    if max(image.size) < _SHOWN_SIDE:
        return data_uri(encoded(image))
    return data_uri(encoded(image, "JPEG", quality=90, subsampling=0), "jpeg")


def _summary(found: Overlap, options: OverlapOptions) -> list[str]:
    lines = [f"{len(found.rows):,} validation images, each with its most similar training image:"]
    if len(found.rows):
        shares = ((100, "most similar"), (99, "99th percentile"), (90, "90th"), (50, "median"), (0, "least similar"))
        lines.append("cosine " + ", ".join(f"{name} {np.percentile(found.similarity, at):.3f}" for at, name in shares))
    if len(found.unreadable) or found.training_unreadable:
        lines.append(
            f"left out, since they cannot be read: {len(found.unreadable):,} validation and {found.training_unreadable:,} "
            "training images"
        )
    lines.append(f"wrote {options.out}/neighbours.jsonl and {options.out}/pairs.html")
    if options.threshold is None:
        return [
            *lines,
            "look at the page, choose a threshold, and call this again with --threshold, or save it on the page",
        ]
    rows = found.at_or_above(options.threshold)
    share = f"{len(rows):,} rows ({len(rows) / max(1, len(found.rows)):.1%}) at or above {options.threshold:g}"
    return [*lines, f"wrote {options.out}/overlap.json: {share}"]
