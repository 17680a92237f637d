"""How fast data is prepared and loaded, and how long a run waits for its first batch.

python benchmarks/data.py --json data.json
"""

from __future__ import annotations

import json
import tempfile
import time
from collections.abc import Iterator
from dataclasses import dataclass
from itertools import islice
from pathlib import Path

import numpy as np
from PIL import Image
from rich import print
from rich.table import Table

from dalle_ds.cli import parse_options
from dalle_ds.data import BatchLoader, DvaeSamples, PairDataset, UpsamplerSamples
from dalle_ds.data.prepare import PrepareOptions, prepare
from dalle_ds.diffusion.degradation import bsr

LARGE = 1024
"""Side of the images of unCLIP's second upsampler."""


@dataclass(frozen=True)
class Options:
    """Measure preparation, loading and start-up."""

    pairs: int = 400
    """JPEG images of 640×480 in the measured corpus."""
    image_size: int = 256
    """Side of the views that the loader makes."""
    micro_batch: int = 16
    """Images in each batch."""
    batches: int = 30
    """Batches measured, after two that are not."""
    json: str | None = None
    """File that the figures are written to."""


class NothingToDo:
    """As many rows as asked for, each empty: what remains is the loader's own time."""

    def __init__(self, length: int) -> None:
        self._length = length

    def __len__(self) -> int:
        return self._length

    def sample(self, row: int, rng: np.random.Generator) -> dict[str, np.ndarray | int]:
        return {"row": row}


def write_corpus(folder: Path, pairs: int, width: int = 640, height: int = 480) -> None:
    """Smooth noise, which takes about as long to decode as photographs do."""
    folder.mkdir()
    rng = np.random.default_rng(0)
    for number in range(pairs):
        noise = Image.fromarray(rng.integers(0, 256, (height // 8, width // 8, 3), dtype=np.uint8))
        noise.resize((width, height), Image.Resampling.BICUBIC).save(folder / f"{number:06d}.jpg", quality=90)
        (folder / f"{number:06d}.txt").write_text(f"an image of noise number {number}")


Samples = DvaeSamples | UpsamplerSamples | NothingToDo


def loader(samples: Samples, micro_batch: int, workers: int, start_step: int = 0) -> BatchLoader:
    return BatchLoader(
        samples,
        seed=0,
        batch_size=micro_batch,
        micro_batch=micro_batch,
        rank=0,
        world_size=1,
        workers=workers,
        start_step=start_step,
    )


def samples_per_second(samples: Samples, options: Options, workers: int) -> float:
    batches = iter(loader(samples, options.micro_batch, workers))
    list(islice(batches, 2))
    start = time.perf_counter()
    list(islice(batches, options.batches))
    return options.batches * options.micro_batch / (time.perf_counter() - start)


def measure(options: Options) -> Iterator[tuple[str, float]]:
    """(what, figure) one after another."""
    with tempfile.TemporaryDirectory() as folder:
        corpus, out = Path(folder) / "corpus", Path(folder) / "data"
        write_corpus(corpus, options.pairs)
        for workers in (1, 2):
            start = time.perf_counter()
            prepare(PrepareOptions(corpus="folder", source=str(corpus)), str(out), workers=workers, overwrite=True)
            yield f"prepare_pairs_per_second_workers_{workers}", options.pairs / (time.perf_counter() - start)
        views = DvaeSamples(PairDataset.open(out, "train"), options.image_size, train=True)
        for workers in (0, 2):
            yield f"load_pairs_per_second_workers_{workers}", samples_per_second(views, options, workers)
        large, out = Path(folder) / "large", Path(folder) / "large_data"
        write_corpus(large, options.pairs // 2, LARGE, LARGE)
        prepare(PrepareOptions(corpus="folder", source=str(large)), str(out), workers=2)
        crops = UpsamplerSamples(
            PairDataset.open(out, "train"), LARGE, train=True, scale=4, crop=LARGE // 4, degrade=bsr
        )
        for workers in (0, 2):
            yield f"load_degraded_crops_per_second_workers_{workers}", samples_per_second(crops, options, workers)
    for rows in (1_000_000, 250_000_000):
        start = time.perf_counter()
        next(iter(loader(NothingToDo(rows), options.micro_batch, workers=0, start_step=10**8)))
        yield f"seconds_to_first_batch_{rows // 10**6}M_rows", time.perf_counter() - start


def main() -> None:
    """Measure, show, write."""
    options = parse_options(Options)
    figures = dict(measure(options))
    table = Table("figure", "value")
    for name, value in figures.items():
        table.add_row(name, f"{value:,.4g}")
    print(table)
    if options.json is not None:
        Path(options.json).write_text(json.dumps(figures, indent=2) + "\n")


if __name__ == "__main__":
    main()
