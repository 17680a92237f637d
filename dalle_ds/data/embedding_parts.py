"""Making CLIP's embeddings of prepared data in parts, which are the unit of restart and of what processes share.

The parts of `embeddings/ID/` lie in `embeddings/ID.parts/`: SPLIT-NUMBER.json says that one is complete,
SPLIT-NUMBER.safetensors has its sums, and `files/` all vectors; it takes the name ID when all parts are there. A split has a
thousand at most, so that files are few, and sums, which take 8 · dim² bytes each.
"""

from __future__ import annotations

import shutil
from collections.abc import Callable, Iterator
from contextlib import suppress
from dataclasses import dataclass
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

from dalle_ds.data.augment import clip_center_view, embedded_view
from dalle_ds.data.dataset import PairDataset
from dalle_ds.data.features import Kind
from dalle_ds.data.order import hash_integers
from dalle_ds.data.samples import channels_first
from dalle_ds.data.snapshot import DataFile, size_problem
from dalle_ds.data.store import vector_schema
from dalle_ds.data.store_writer import StoreWriter
from dalle_ds.data.workers import keep_sigchld_handler, next_batch
from dalle_ds.errors import CheckpointError, DataError
from dalle_ds.files import replace_folder, sync_directory, write_bytes, write_json
from dalle_ds.models.latents import EmbeddingMoments
from dalle_ds.parsing import parse_json

if TYPE_CHECKING:
    from dalle_ds.models import Clip

KIND = Kind("embeddings", "clip", (1,))
PART_ROWS = 1024
"""Rows of a part, or a thousandth of the split where that is more."""
_MOST_PARTS = 1000
NUMBER, PLACE = np.dtype("<f4"), np.dtype("<u4")
_SUMS = ("count", "total", "products", "norms")


def columns(dim: int, text_width: int) -> dict[str, int]:
    """Stores of a split, and the bytes of a vector of each: embeddings of views; embeddings of captions, each with its first
    state within its part, and how many; for each row its first text within its part, and how many; and states of captions,
    where their width is not 0."""
    place = 2 * PLACE.itemsize
    embedding, state = dim * NUMBER.itemsize, text_width * NUMBER.itemsize
    states = {"states": state} if state else {}
    return {"images": embedding, "texts": embedding + place, "captions": place, **states}


def seed_of_text(row: int, caption: int) -> int:
    """Of the check of a text's vector, whose place depends on what came before."""
    return row * 2**16 + caption


def seed_of_state(row: int, caption: int, number: int) -> int:
    """As `seed_of_text`, of one of its states."""
    return hash_integers(row, caption, number)


class Rows(Dataset[tuple[Tensor, bool, list[str]]]):
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
        if self.views > 1:
            # Views are of a part of the image, whose pixels are to be as many.
            pixels = self._dataset.image(row, 2 * size)
        for view in range(1, self.views):
            yield embedded_view(pixels, size, (self._seed, row, view))


def _collate(rows: list[tuple[Tensor, bool, list[str]]]) -> tuple[Tensor, list[bool], list[list[str]]]:
    return torch.stack([views for views, *_ in rows]), [readable for _, readable, _ in rows], [row[2] for row in rows]


@dataclass(frozen=True)
class Part:
    """Rows of a split."""

    split: str
    number: int
    rows: range

    @property
    def name(self) -> str:
        return f"{self.split}-{self.number:05d}"


def parts_of(splits: dict[str, int]) -> list[Part]:
    """The parts of splits of so many rows, in order."""
    return [
        Part(split, number, range(first, min(rows, first + rows_of_part(rows))))
        for split, rows in splits.items()
        for number, first in enumerate(range(0, rows, rows_of_part(rows)))
    ]


def rows_of_part(rows: int) -> int:
    """Rows of each part but the last, of a split of so many."""
    return max(PART_ROWS, -(-rows // _MOST_PARTS))


class Work:
    """A cache that is being made.

    Args:
        folder: what it becomes.
        identity: what it depends on. What was begun of another one is removed.
    """

    def __init__(self, folder: Path, identity: dict[str, Any]) -> None:
        self._target = folder
        self._identity = identity
        self._columns = columns(identity["embed_dim"], identity["text_width"])
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

    def remove(self) -> None:
        """Remove what a process left that was killed at the very end."""
        shutil.rmtree(self._folder, ignore_errors=True)

    def done(self, part: Part) -> dict[str, Any] | None:
        """What is told of a part whose files are there, or None."""
        try:
            about = dict(parse_json((self._folder / f"{part.name}.json").read_bytes()))
            for column in self._columns:
                for file in (DataFile(**entry) for entry in about["files"][column]):
                    if size_problem(self._files / part.split / column / file.file, file.bytes) is not None:
                        return None
            if about["moments"] is not None:
                read_moments(self._folder, about["moments"], self._identity["embed_dim"])
            return about
        except (OSError, ValueError, KeyError, TypeError):
            return None

    @torch.inference_mode()
    def write(
        self, part: Part, rows: Rows, clip: Clip, batch_size: int, workers: int, check_unchanged: Callable[[], None]
    ) -> None:
        """Make a part: always of the same batches, on which the last bits of an embedding depend."""
        dim, device = clip.config.embed_dim, clip.logit_scale.device
        folder = self._files / part.split
        writers = {
            column: StoreWriter(folder / column, vector_schema(width), f"{part.number:05d}")
            for column, width in self._columns.items()
        }
        images, texts, captions, *states = writers.values()
        moments, row, count, unreadable, state_count = EmbeddingMoments(dim), part.rows.start, 0, 0, 0
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
            of_texts = (text for chunk in chunks for text in _embedded(clip, chunk))
            for of_views, is_readable, row_captions in zip(embedded.split(rows.views), readable, told, strict=True):
                for view, vector in enumerate(of_views):
                    images.add_vector(_bytes(vector), row * rows.views + view, readable=is_readable)
                place = np.array([count, len(row_captions)], PLACE).tobytes()
                captions.add_vector(place, row, readable=bool(row_captions))
                for caption in range(len(row_captions)):
                    vector, of_tokens = next(of_texts)
                    kept = of_tokens if states else of_tokens[:0]
                    place = np.array([state_count, len(kept)], PLACE).tobytes()
                    texts.add_vector(_bytes(vector) + place, seed_of_text(row, caption))
                    for number, state in enumerate(kept):
                        states[0].add_vector(_bytes(state), seed_of_state(row, caption, number))
                    state_count += len(kept)
                count += len(row_captions)
                unreadable += not (is_readable and row_captions)
                row += 1
        files = {column: [vars(file) for file in writer.close()] for column, writer in writers.items()}
        for column in writers:
            sync_directory(folder / column)
        sums = f"{part.name}.safetensors"
        about = {
            "files": files,
            "texts": count,
            "states": state_count,
            "unreadable": unreadable,
            "moments": _write_moments(self._folder, moments, sums) if part.split == "train" else None,
        }
        check_unchanged()
        write_json(self._folder / f"{part.name}.json", about)

    def finish(self, parts: list[Part], splits: dict[str, int]) -> dict[str, int]:
        """Put the parts together: rows that could not be read, by split."""
        moments = EmbeddingMoments(self._identity["embed_dim"])
        files: dict[str, Any] = {column: {split: [] for split in splits} for column in self._columns}
        texts: dict[str, list[int]] = {split: [] for split in splits}
        states: dict[str, list[int]] = {split: [] for split in splits}
        unreadable = dict.fromkeys(splits, 0)
        for part in parts:  # in their order: sums of floats depend on it
            about = self.done(part)
            if about is None:
                raise DataError(f"part {part.name} in {self._folder} is damaged: give the same command again")
            if about["moments"] is not None:
                added = read_moments(self._folder, about["moments"], self._identity["embed_dim"])
                for total, term in zip(moments.sums, added.sums, strict=True):
                    total += term
            for column in files:
                files[column][part.split] += about["files"][column]
            texts[part.split].append(about["texts"])
            states[part.split].append(about["states"])
            unreadable[part.split] += about["unreadable"]
        manifest = {
            **self._identity,
            "rows": splits,
            "unreadable": unreadable,
            "texts": texts,
            "states": states,
            "moments": _write_moments(self._files, moments, "moments.safetensors"),
            "files": files,
        }
        write_json(self._files / KIND.manifest, manifest)
        replace_folder(self._files, self._target)
        self.remove()
        return unreadable


def _embedded(clip: Clip, captions: list[str]) -> Iterator[tuple[Tensor, Tensor]]:
    """Of each caption its vector, and its (tokens, text_width) states."""
    states, padded = clip.text_states(captions)
    vectors = _finite(clip.scaled(clip.project_states(states, padded)))
    lengths = (~padded).sum(dim=1).tolist()
    for vector, of_tokens, length in zip(vectors, states.cpu(), lengths, strict=True):
        yield vector, of_tokens[:length]


def _finite(embeddings: Tensor) -> Tensor:
    if not bool(embeddings.isfinite().all()):
        raise CheckpointError(
            "this CLIP gives embeddings that are not numbers: its training has diverged, take another one"
        )
    return embeddings.cpu()


def _bytes(vector: Tensor) -> bytes:
    return vector.numpy().astype(NUMBER).tobytes()


def _write_moments(folder: Path, moments: EmbeddingMoments, name: str) -> dict[str, Any]:
    """Write sums to a file: what a manifest says of it."""
    content = save(dict(zip(_SUMS, moments.sums, strict=True)))
    write_bytes(folder / name, content)
    return vars(DataFile(name, int(moments.count), len(content), xxhash.xxh3_128_hexdigest(content)))


def read_moments(folder: Path, about: dict[str, Any], dim: int) -> EmbeddingMoments:
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
