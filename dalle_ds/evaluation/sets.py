"""Sets that models are measured on: which rows, which captions, their images, and the processes that share them out.

Rows go out in chunks of a fixed size, chunk i to process i mod P. What shares a batch is therefore the same for any number of
processes, and so are the bits of each row's results on CPUs.
"""

from __future__ import annotations

import hashlib
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from dalle_ds.data import PairDataset
from dalle_ds.data.corpora.files import is_read, walk
from dalle_ds.data.images import Pixels, center_crop_resize, decode_image, image_suffixes
from dalle_ds.data.samples import channels_first
from dalle_ds.errors import DataError
from dalle_ds.parallel import Mesh
from dalle_ds.parsing import parse_json, shown

RESIZE = "shorter side by Lanczos, then the central square"
"""Of images decoded at their full size, for protocols."""
CHUNK = 16
"""Rows in a chunk."""
TELL_SECONDS = 30.0
"""Time between two lines that say how far it is."""
Selections = dict[str, Tensor]
"""Name → (N,) bool, which of N rows or captions belong to it; "" is all of them."""


@dataclass(frozen=True)
class Caption:
    """A caption to generate an image for."""

    row: int
    """Whose it is."""
    text: str


def choose_captions(dataset: PairDataset, number: int | None, seed: int) -> list[Caption]:
    """A random choice of `number` of the different captions of a split, or all; of equal ones the first counts.

    It depends on the captions and the seed only; a greater number chooses the same ones and more.
    """
    different: dict[str, int] = {}
    for row in range(len(dataset)):
        for text in dataset.captions(row):
            different.setdefault(text, row)
    captions = [Caption(row, text) for text, row in different.items()]
    order = np.random.default_rng(seed).permutation(len(captions))
    return [captions[index] for index in order[:number]]


def images_of(dataset: PairDataset, rows: Sequence[int], size: int) -> Tensor:
    """(B, 3, size, size) uint8 images of some rows, resized and cropped as `RESIZE` says."""
    return stacked([center_crop_resize(dataset.image(row), size) for row in rows])


def stacked(images: Sequence[Pixels]) -> Tensor:
    """(H, W, 3) images of one size → (B, 3, H, W) uint8."""
    return torch.stack([torch.tensor(channels_first(image)) for image in images])


def to_size(pixels: Tensor, size: int) -> Tensor:
    """(B, 3, H, W) uint8 images resized and cropped as `RESIZE` says; those that have the size are returned as they are."""
    if pixels.shape[2:] == (size, size):
        return pixels
    resized = [center_crop_resize(image.permute(1, 2, 0).cpu().numpy(), size) for image in pixels]
    return stacked(resized).to(pixels.device)


def without_overlap(path: str | Path, dataset: PairDataset) -> Tensor:
    """(rows,) bool: False where the overlap analysis, JSON of {"split": …, "fingerprint": …, "rows": […]}, lists the row.

    Raises:
        DataError: the file is damaged, of other data or another split, or leaves no two rows.
    """
    try:
        listed = parse_json(Path(path).read_bytes())
        rows = listed["rows"]
        split, fingerprint = listed["split"], listed["fingerprint"]
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise DataError(f"--without {path} cannot be read as a list of rows ({error})") from error
    if (split, fingerprint) != (dataset.split, dataset.fingerprint):
        raise DataError(
            f"--without {path} lists rows of split {shown(split)} of data {shown(fingerprint)}, and measured is "
            f"{dataset.split!r} of {dataset.fingerprint!r}: analyse the overlap of this one"
        )
    if not isinstance(rows, list) or not all(type(row) is int and 0 <= row < len(dataset) for row in rows):
        raise DataError(f"--without {path}: rows must be whole numbers below {len(dataset)}")
    kept = torch.ones(len(dataset), dtype=torch.bool)
    kept[rows] = False
    if int(kept.sum()) < 2:
        raise DataError(
            f"--without {path} leaves {int(kept.sum())} rows of {dataset.split}, of which nothing can be said"
        )
    return kept


class ImageFolder:
    """The images in a folder and its subfolders, in the order of their names: all whose suffix is that of one.

    Raises:
        DataError: no such folder, or fewer than two images in it.
    """

    def __init__(self, folder: str | Path) -> None:
        self.folder = Path(folder)
        self.paths: list[Path] = []
        left_out: dict[str, list[str]] = {}
        for entry in walk(self.folder) if self.folder.is_dir() else []:
            if entry.problem is None and is_read(entry.name):
                self.paths.append(entry.path)
            else:
                left_out.setdefault(entry.unpaired().reason, []).append(entry.name)
        if len(self.paths) < 2:
            raise DataError(f"{folder} is no folder of at least 2 images ({', '.join(image_suffixes())})")
        self.notes = [
            f"{self.folder}: left out {len(names):,}: {reason}, such as {names[0]}"
            for reason, names in left_out.items()
        ]
        """A sentence for each reason for which something is left out."""

    def __len__(self) -> int:
        return len(self.paths)

    def read(self, row: int, size: int | None = None) -> tuple[Pixels, bytes]:
        """An image, (H, W, 3), resized and cropped as `RESIZE` says where a size is given, and the SHA-256 of its file.

        Raises:
            DataError: it cannot be read.
        """
        try:
            content = self.paths[row].read_bytes()
            pixels = decode_image(content)
        except (OSError, DataError) as error:
            raise DataError(f"{self.paths[row]}: {error}; repair it or take it out") from error
        return pixels if size is None else center_crop_resize(pixels, size), hashlib.sha256(content).digest()


def shard_rows(rows: int, mesh: Mesh, what: str = "", chunk: int = CHUNK) -> Iterator[list[int]]:
    """This process's chunks of the rows 0 … rows − 1.

    Args:
        what: what is done with them, for a line about every half minute from the main process; "" says nothing.
    """
    started = told = time.monotonic()
    for start in range(mesh.rank * chunk, rows, mesh.world_size * chunk):
        yield list(range(start, min(rows, start + chunk)))
        now = time.monotonic()
        if what and mesh.is_main and now - told > TELL_SECONDS:
            told = now
            print(f"{what}: {min(rows, start + chunk):,} of {rows:,} after {now - started:.0f} s", flush=True)


class GatheredRows:
    """One value per row, filled in by whichever process has the row.

    Args:
        rows: how many there are.
        shape: of a value.
        dtype: of a value; sums of it with zeros must be exact.
    """

    def __init__(self, rows: int, shape: tuple[int, ...] = (), dtype: torch.dtype = torch.float64) -> None:
        self._values = torch.zeros(rows, *shape, dtype=dtype)
        self._filled = torch.zeros(rows, dtype=torch.int64)

    def put(self, rows: list[int], values: Tensor) -> None:
        """The values (len(rows), *shape) of some rows."""
        index = torch.tensor(rows, dtype=torch.int64)
        self._values[index] = values.detach().cpu().to(self._values.dtype)
        self._filled[index] += 1

    def gather(self, mesh: Mesh) -> Tensor:
        """(rows, *shape) on the CPU, on all processes. Collective."""
        filled = mesh.sum(self._filled, "world").cpu()
        assert bool((filled == 1).all()), "every row is one process's, once"
        return mesh.sum(self._values, "world").cpu()
