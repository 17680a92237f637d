"""CLIP's embeddings of images and captions, computed once, and the moments of the former: what unCLIP's priors learn from.

A cache (`features`) has three stores for each split: images, a vector for each view; texts, one for each caption; and
captions, of each row the number of its first text within its part and how many there are. View 0 of an image is the central
one; a training image's others are random.

It is made in parts of a fixed number of rows, in a folder beside: ID.parts/files becomes the cache when all are there. A part
is complete when ID.parts/SPLIT-NUMBER.json is. Parts of a split are a thousand at most, so that what each adds to the moments,
8 · dim² bytes until then, stays less than what it adds to the vectors.
"""

from __future__ import annotations

import shutil
from collections.abc import Callable, Iterator
from contextlib import ExitStack, suppress
from dataclasses import dataclass
from itertools import accumulate
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import numpy.typing as npt
import torch
import xxhash
from safetensors import SafetensorError
from safetensors.torch import load, save
from torch import Tensor
from torch.utils.data import DataLoader, Dataset, Subset

from dalle_ds.data.augment import clip_center_view, clip_random_view
from dalle_ds.data.dataset import PairDataset, read_info
from dalle_ds.data.features import CacheReport, FeatureCache, Kind, Vectors, check_counts
from dalle_ds.data.order import hash_integers
from dalle_ds.data.samples import channels_first
from dalle_ds.data.snapshot import DataFile, size_problem
from dalle_ds.data.store import Store, vector_schema
from dalle_ds.data.store_writer import StoreWriter
from dalle_ds.data.workers import keep_sigchld_handler, next_batch
from dalle_ds.errors import CheckpointError, ConfigError, DataError
from dalle_ds.files import (
    disk_full_is_a_data_error,
    only_process,
    replace_folder,
    sync_directory,
    write_bytes,
    write_json,
)
from dalle_ds.models.latents import EmbeddingMoments
from dalle_ds.parallel import Mesh
from dalle_ds.parsing import parse_json

if TYPE_CHECKING:
    from dalle_ds.models import Clip

KIND = Kind("embeddings", "clip", (1,))
MIN_CROP = 0.9
"""Of random views (`clip_random_view`): what CLIP is trained with by default, so that views of square images differ, too."""
PART_ROWS = 1024
"""Rows of a part, or a thousandth of the split where that is more."""
_MOST_PARTS = 1000
_COLUMNS = ("images", "texts", "captions")
_MOMENTS = "moments.safetensors"
_SUMS = ("count", "total", "products", "norms")
_KIND = np.dtype("<f4")
_RANGE = np.dtype("<u4")


class _Rows(Dataset[tuple[Tensor, bool, list[str]]]):
    """((views, 3, R, R) uint8, whether the image could be read, captions) of a row; without captions where they could not."""

    def __init__(self, dataset: PairDataset, image_size: int, views: int, seed: int) -> None:
        self._dataset = dataset
        self._size = image_size
        self._seed = seed
        self.views = views

    def __getitem__(self, row: int) -> tuple[Tensor, bool, list[str]]:
        try:
            captions = self._dataset.captions(row)
        except DataError:
            captions = []
        try:
            return torch.from_numpy(np.stack([channels_first(view) for view in self._views(row)])), True, captions
        except DataError:
            return torch.zeros(self.views, 3, self._size, self._size, dtype=torch.uint8), False, captions

    def _views(self, row: int) -> Iterator[npt.NDArray[np.uint8]]:
        size = self._size
        yield clip_center_view(self._dataset.image(row, size), size)
        for view in range(1, self.views):  # of a part of the image, whose pixels are to be as many
            rng = np.random.default_rng(hash_integers(self._seed, row, view))
            yield clip_random_view(self._dataset.image(row, 2 * size), size, rng, MIN_CROP)


def _collate(rows: list[tuple[Tensor, bool, list[str]]]) -> tuple[Tensor, list[bool], list[list[str]]]:
    return torch.stack([views for views, *_ in rows]), [readable for _, readable, _ in rows], [row[2] for row in rows]


@dataclass(frozen=True)
class _Part:
    """The unit of restart, and of what processes share."""

    split: str
    number: int
    rows: range

    @property
    def name(self) -> str:
        return f"{self.split}-{self.number:05d}"


def _parts(splits: dict[str, int]) -> list[_Part]:
    return [
        _Part(split, number, range(first, min(rows, first + _rows_of_part(rows))))
        for split, rows in splits.items()
        for number, first in enumerate(range(0, rows, _rows_of_part(rows)))
    ]


def _rows_of_part(rows: int) -> int:
    return max(PART_ROWS, -(-rows // _MOST_PARTS))


def cache_embeddings(
    clip: Clip,
    data_dir: str | Path,
    *,
    views: int = 1,
    seed: int = 0,
    batch_size: int = 64,
    workers: int = 0,
    overwrite: bool = False,
    mesh: Mesh | None = None,
) -> CacheReport:
    """Embed every image and every caption of a prepared folder. Collective; the result is the same on any number of processes.

    What was killed goes on with the parts that are not complete when it is called again with the same arguments.

    Args:
        clip: is moved to the process's device.
        data_dir: what `prepare` made.
        views: of each training image: the central one, then random ones.
        seed: of the random views.
        batch_size: images, and captions, embedded at a time, images rounded to whole rows; another one changes rounding only.
        workers: processes that decode; the result does not depend on it.
        overwrite: replace a cache of the same CLIP, once the new one is complete.
        mesh: the processes that share the work; None is this one alone.

    Raises:
        ConfigError: views or batch_size is not positive, or the CLIP has no tokenizer.
        DataError: no prepared folder, another cache of this CLIP is there, the disk is full, a worker was killed, or another
            process makes this cache.
        DataChangedError: the data was prepared again meanwhile.
        CheckpointError: the CLIP gives something that is no number.
    """
    if views <= 0 or batch_size <= 0:
        raise ConfigError(f"views and batch_size must be greater than 0, found {views} and {batch_size}")
    if clip.tokenizer is None:
        raise ConfigError("this CLIP has no tokenizer, so it cannot embed captions: export it with one")
    mesh = mesh or Mesh(0, 1, torch.device("cuda" if torch.cuda.is_available() else "cpu"))
    data = Path(data_dir)
    info = read_info(data)
    folder = KIND.folder(data, clip.fingerprint)
    identity = {"data_fingerprint": info["fingerprint"], "clip_fingerprint": clip.fingerprint}
    identity |= {"embed_dim": clip.config.embed_dim, "views": views, "seed": seed}
    identity["part_rows"] = {split: _rows_of_part(rows) for split, rows in info["splits"].items()}
    parts = _parts(info["splits"])
    work = _Work(folder, {"format_version": KIND.versions[0], **identity})

    def begin() -> tuple[CacheReport | None, list[_Part]]:
        held.enter_context(only_process(folder, f".{folder.name}.lock"))
        existing = None if overwrite else KIND.existing(folder, identity)
        if existing is None:
            work.begin()
        return existing, [part for part in parts if existing is None and work.done(part) is None]

    with ExitStack() as held, disk_full_is_a_data_error(folder):
        existing, missing = mesh.decide(begin)
        if existing is not None:
            return existing
        clip.to(mesh.device)
        for part in missing[mesh.rank :: mesh.world_size]:
            dataset = PairDataset.open(data, part.split)
            rows = _Rows(dataset, clip.config.image_size, views if part.split == "train" else 1, seed)
            work.write(part, rows, clip, batch_size, workers, dataset.check_unchanged)
        mesh.barrier()
        unreadable = mesh.decide(lambda: work.finish(parts, info["splits"]))
    return CacheReport(KIND.name, str(folder), info["splits"], unreadable)


class _Work:
    """A cache that is being made.

    Args:
        folder: what it becomes.
        identity: what it depends on. What was begun of another one is removed.
    """

    def __init__(self, folder: Path, identity: dict[str, Any]) -> None:
        self._target = folder
        self._identity = identity
        self._folder = folder.with_name(f"{folder.name}.parts")
        self._files = self._folder / "files"

    def begin(self) -> None:
        """Make the folder, or go on with it."""
        begun = self._folder / "begun.json"
        with suppress(OSError, ValueError):
            if parse_json(begun.read_bytes()) == self._identity:
                return
        begun.unlink(missing_ok=True)  # first, so that nobody can take for begun what is half removed
        if self._folder.exists():
            shutil.rmtree(self._folder)
        self._files.mkdir(parents=True)
        write_json(begun, self._identity)

    def done(self, part: _Part) -> dict[str, Any] | None:
        """What is told of a part whose files are there, or None."""
        try:
            about = dict(parse_json((self._folder / f"{part.name}.json").read_bytes()))
            for column in _COLUMNS:
                for file in (DataFile(**entry) for entry in about["files"][column]):
                    if size_problem(self._files / part.split / column / file.file, file.bytes) is not None:
                        return None
            if about["moments"] is not None:
                _read_moments(self._folder, about["moments"], self._identity["embed_dim"])
            return about
        except (OSError, ValueError, KeyError, TypeError):
            return None

    @torch.inference_mode()
    def write(
        self, part: _Part, rows: _Rows, clip: Clip, batch_size: int, workers: int, check_unchanged: Callable[[], None]
    ) -> None:
        """Make a part: always of the same batches, on which the last bits of an embedding depend."""
        dim, device = clip.config.embed_dim, clip.logit_scale.device
        folder, widths = self._files / part.split, (dim * _KIND.itemsize, dim * _KIND.itemsize, 2 * _RANGE.itemsize)
        images, texts, captions = writers = [
            StoreWriter(folder / column, vector_schema(width), f"{part.number:05d}")
            for column, width in zip(_COLUMNS, widths, strict=True)
        ]
        moments, row, count, unreadable = EmbeddingMoments(dim), part.rows.start, 0, 0
        batches = DataLoader(
            Subset(rows, part.rows),
            batch_size=max(1, batch_size // rows.views),
            num_workers=workers,
            collate_fn=_collate,
        )
        loaded = keep_sigchld_handler(lambda: iter(batches))
        for _ in range(len(batches)):
            views, readable, told = next_batch(loaded)
            embedded = _finite(clip.embed_images(views.flatten(0, 1).to(device).float() / 255))
            moments.add(embedded.unflatten(0, views.shape[:2])[torch.tensor(readable)].flatten(0, 1))
            flat = [caption for row_captions in told for caption in row_captions]
            chunks = (flat[start : start + batch_size] for start in range(0, len(flat), batch_size))
            of_texts = (vector for chunk in chunks for vector in _finite(clip.embed_texts(chunk)))
            for of_views, is_readable, row_captions in zip(embedded.split(rows.views), readable, told, strict=True):
                for view, vector in enumerate(of_views):
                    images.add_vector(_bytes(vector), row * rows.views + view, readable=is_readable)
                place = np.array([count, len(row_captions)], _RANGE).tobytes()
                captions.add_vector(place, row, readable=bool(row_captions))
                for caption in range(len(row_captions)):
                    texts.add_vector(_bytes(next(of_texts)), _seed_of_text(row, caption))
                count += len(row_captions)
                unreadable += not (is_readable and row_captions)
                row += 1
        files = {
            column: [vars(file) for file in writer.close()] for column, writer in zip(_COLUMNS, writers, strict=True)
        }
        for column in _COLUMNS:
            sync_directory(folder / column)
        sums = f"{part.name}.safetensors"
        about = {
            "files": files,
            "texts": count,
            "unreadable": unreadable,
            "moments": _write_moments(self._folder, moments, sums) if part.split == "train" else None,
        }
        check_unchanged()
        write_json(self._folder / f"{part.name}.json", about)

    def finish(self, parts: list[_Part], splits: dict[str, int]) -> dict[str, int]:
        """Put the parts together: rows that could not be read, by split."""
        moments = EmbeddingMoments(self._identity["embed_dim"])
        files: dict[str, Any] = {column: {split: [] for split in splits} for column in _COLUMNS}
        texts: dict[str, list[int]] = {split: [] for split in splits}
        unreadable = dict.fromkeys(splits, 0)
        for part in parts:  # in their order: sums of floats depend on it
            about = self.done(part)
            if about is None:
                raise DataError(f"part {part.name} in {self._folder} is damaged: give the same command again")
            if about["moments"] is not None:
                added = _read_moments(self._folder, about["moments"], self._identity["embed_dim"])
                for total, term in zip(moments.sums, added.sums, strict=True):
                    total += term
            for column in _COLUMNS:
                files[column][part.split] += about["files"][column]
            texts[part.split].append(about["texts"])
            unreadable[part.split] += about["unreadable"]
        manifest = {
            **self._identity,
            "rows": splits,
            "unreadable": unreadable,
            "texts": texts,
            "moments": _write_moments(self._files, moments, _MOMENTS),
            "files": files,
        }
        write_json(self._files / KIND.manifest, manifest)
        replace_folder(self._files, self._target)
        shutil.rmtree(self._folder)
        return unreadable


class EmbeddingCache(FeatureCache):
    """Cached embeddings of one split."""

    kind = KIND

    def _stores(self, manifest: dict[str, Any]) -> tuple[Vectors, ...]:
        self.dim: int = manifest["embed_dim"]
        """Of the embeddings."""
        self._part_rows: int = manifest["part_rows"][self._split]
        texts = manifest["texts"][self._split]
        check_counts(self.dim, self._part_rows, *(count + 1 for count in texts))
        self._first_texts = [0, *accumulate(texts)]  # of each part
        self._of_moments = DataFile(**manifest["moments"])
        self._images, self._texts, self._captions = (
            Store(self._folder / self._split / column, [DataFile(**file) for file in files], width)
            for column, width in zip(_COLUMNS, (4 * self.dim, 4 * self.dim, 2 * _RANGE.itemsize), strict=True)
            for files in (manifest["files"][column][self._split],)
        )
        found = len(self._images), len(self._texts), len(self._captions), len(texts)
        parts = -(-self._rows // self._part_rows)
        if found != (self._rows * self.views, self._first_texts[-1], self._rows, parts):
            raise ValueError("its files have other rows")
        return self._images, self._texts, self._captions

    def image(self, row: int, view: int) -> npt.NDArray[np.float32]:
        """(dim,) of unit length, of one view of a row's image; `RowError` where it could not be read when the cache was made,
        or where it is not what was written."""
        stored = self._images.vector(self._view(row, view))
        if stored is None:
            raise self._none(row)
        return np.frombuffer(stored, _KIND).astype(np.float32)

    def text(self, row: int, caption: int) -> npt.NDArray[np.float32]:
        """(dim,) of unit length, of one of a row's captions, in the order of `PairDataset.captions`; raises as `image`."""
        first, count = self._texts_of(row)
        if not 0 <= caption < count:
            raise IndexError(f"caption {caption} of {count}")
        stored = self._texts.vector(first + caption, _seed_of_text(row, caption))
        if stored is None:
            raise self._none(row, "caption")
        return np.frombuffer(stored, _KIND).astype(np.float32)

    def _texts_of(self, row: int) -> tuple[int, int]:
        """The first text of a row, and how many it has."""
        stored = self._captions.vector(row)
        if stored is None:
            raise self._none(row, "captions")
        first, count = np.frombuffer(stored, _RANGE).tolist()
        return self._first_texts[row // self._part_rows] + first, count

    def read_row(self, row: int) -> None:
        for view in range(self.views):
            self.image(row, view)
        for caption in range(self._texts_of(row)[1]):
            self.text(row, caption)

    @property
    def files(self) -> Iterator[tuple[Path, DataFile]]:
        yield from super().files
        if self._split == "train":
            yield self._folder, self._of_moments

    @property
    def moments(self) -> EmbeddingMoments:
        """Of the image embeddings of the training split, all views; DataError where their file is not what was written."""
        return _read_moments(self._folder, vars(self._of_moments), self.dim)


def _seed_of_text(row: int, caption: int) -> int:
    """Of the check of a text's vector, whose place depends on what came before."""
    return row * 2**16 + caption


def _finite(embeddings: Tensor) -> Tensor:
    if not bool(embeddings.isfinite().all()):
        raise CheckpointError(
            "this CLIP gives embeddings that are not numbers: its training has diverged, take another one"
        )
    return embeddings.cpu()


def _bytes(vector: Tensor) -> bytes:
    return vector.numpy().astype(_KIND).tobytes()


def _write_moments(folder: Path, moments: EmbeddingMoments, name: str) -> dict[str, Any]:
    """Write sums to a file: what a manifest says of it."""
    content = save(dict(zip(_SUMS, moments.sums, strict=True)))
    write_bytes(folder / name, content)
    return vars(DataFile(name, int(moments.count), len(content), xxhash.xxh3_128_hexdigest(content)))


def _read_moments(folder: Path, about: dict[str, Any], dim: int) -> EmbeddingMoments:
    file, moments = DataFile(**about), EmbeddingMoments(dim)
    path = folder / file.file
    try:
        content = path.read_bytes()
        if xxhash.xxh3_128_hexdigest(content) != file.xxh3_128:
            raise ValueError("it is not what was written")
        tensors = load(content)
        for name, total in zip(_SUMS, moments.sums, strict=True):
            total.copy_(tensors[name])
    except (OSError, ValueError, KeyError, RuntimeError, SafetensorError) as error:
        raise DataError(f"the moments in {path} cannot be read ({error}): {KIND.again}") from error
    return moments
