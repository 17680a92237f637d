"""CLIP's embeddings of images and captions, computed once, and the moments of the former: what unCLIP's priors learn from.

A cache (`features`) has SPLIT/COLUMN/PART-*.arrow (`embedding_parts`) and moments.safetensors. View 0 of an image is the
central one; a training image's others are random.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import ExitStack
from itertools import accumulate
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import numpy.typing as npt
import torch

from dalle_ds.data.dataset import PairDataset, read_info
from dalle_ds.data.embedding_parts import (
    KIND,
    NUMBER,
    PLACE,
    Part,
    Rows,
    Work,
    columns,
    parts_of,
    read_moments,
    rows_of_part,
    seed_of_state,
    seed_of_text,
)
from dalle_ds.data.features import CacheReport, FeatureCache, Vectors, check_counts
from dalle_ds.data.snapshot import DataFile
from dalle_ds.data.store import Store
from dalle_ds.errors import ConfigError
from dalle_ds.files import disk_full_is_a_data_error, only_process
from dalle_ds.models.latents import EmbeddingMoments
from dalle_ds.parallel import Mesh

if TYPE_CHECKING:
    from dalle_ds.models import Clip


def cache_embeddings(
    clip: Clip,
    data_dir: str | Path,
    *,
    views: int = 1,
    text_states: bool = False,
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
        text_states: also keep what CLIP makes of each token of a caption (`Clip.text_states`), in fp32, for priors that read
            it. They compute it otherwise, in every step.
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
    text_width = clip.config.text_width if text_states else 0
    identity |= {"embed_dim": clip.config.embed_dim, "text_width": text_width, "views": views, "seed": seed}
    identity["part_rows"] = {split: rows_of_part(rows) for split, rows in info["splits"].items()}
    parts = parts_of(info["splits"])
    work = Work(folder, {"format_version": KIND.versions[0], **identity})

    def begin() -> tuple[CacheReport | None, list[Part]]:
        held.enter_context(only_process(folder, f".{folder.name}.lock"))
        # States that are there although nobody asks for them are no reason to make all anew.
        wanted = {name: value for name, value in identity.items() if name != "text_width" or value}
        existing = None if overwrite else KIND.existing(folder, wanted)
        if existing is not None:
            work.remove()
            return existing, []
        work.begin()
        return None, [part for part in parts if work.done(part) is None]

    with ExitStack() as held, disk_full_is_a_data_error(folder):
        existing, missing = mesh.decide(begin)
        if existing is not None:
            return existing
        clip.to(mesh.device)
        for part in missing[mesh.rank :: mesh.world_size]:
            dataset = PairDataset.open(data, part.split)
            rows = Rows(dataset, clip.config.image_size, views if part.split == "train" else 1, seed)
            work.write(part, rows, clip, batch_size, workers, dataset.check_unchanged)
        mesh.barrier()
        unreadable = mesh.decide(lambda: work.finish(parts, info["splits"]))
    return CacheReport(KIND.name, str(folder), info["splits"], unreadable)


class EmbeddingCache(FeatureCache):
    """Cached embeddings of one split."""

    kind = KIND

    def _stores(self, manifest: dict[str, Any]) -> tuple[Vectors, ...]:
        self.dim: int = manifest["embed_dim"]
        """Of the embeddings."""
        self.text_width: int = manifest["text_width"]
        """Of the states of captions; 0 where they are not cached."""
        self.seed: int = manifest["seed"]
        """Of the random views (`augment.embedded_view`)."""
        self._part_rows: int = manifest["part_rows"][self._split]
        texts, states = (manifest[name][self._split] for name in ("texts", "states"))
        check_counts(self.dim, self.text_width + 1, self._part_rows, *(count + 1 for count in (*texts, *states)))
        self._first_texts, self._first_states = ([0, *accumulate(counts)] for counts in (texts, states))  # of each part
        self._of_moments = DataFile(**manifest["moments"])
        stores = [
            Store(self._folder / self._split / column, [DataFile(**file) for file in files], width)
            for column, width in columns(self.dim, self.text_width).items()
            for files in (manifest["files"][column][self._split],)
        ]
        self._images, self._texts, self._captions, *self._states = stores
        found = [len(texts), len(states), *map(len, stores)]
        parts = -(-self._rows // self._part_rows)
        wanted = [parts, parts, self._rows * self.views, self._first_texts[-1], self._rows, self._first_states[-1]]
        if found != wanted[: len(found)]:
            raise ValueError("its files have other rows")
        return tuple(stores)

    def image(self, row: int, view: int) -> npt.NDArray[np.float32]:
        """(dim,), what `Clip.embed_images` makes of one view of a row's image; `RowError` where it could not be read when the
        cache was made, or where it is not what was written."""
        stored = self._images.vector(self._view(row, view))
        if stored is None:
            raise self._none(row)
        return np.frombuffer(stored, NUMBER).astype(np.float32)

    def text(self, row: int, caption: int) -> npt.NDArray[np.float32]:
        """(dim,), what `Clip.embed_texts` makes of one of a row's captions, in the order of `PairDataset.captions`; raises as
        `image`."""
        return np.frombuffer(self._text(row, caption), NUMBER, self.dim).astype(np.float32)

    def states(self, row: int, caption: int) -> npt.NDArray[np.float32]:
        """(tokens, text_width), what CLIP makes of each token of a caption from start to end; raises as `image`.
        To be called where `text_width` is not 0."""
        first, count = np.frombuffer(self._text(row, caption), PLACE, offset=self.dim * NUMBER.itemsize).tolist()
        first += self._first_states[row // self._part_rows]
        stored = [self._states[0].vector(first + place, seed_of_state(row, caption, place)) for place in range(count)]
        if None in stored:
            raise self._none(row, "caption")
        return np.frombuffer(b"".join(map(bytes, stored)), NUMBER).astype(np.float32).reshape(count, -1)  # type: ignore[arg-type]

    def _text(self, row: int, caption: int) -> bytes:
        """What is stored of a caption: its vector, and where its states are."""
        first, count = self._texts_of(row)
        if not 0 <= caption < count:
            raise IndexError(f"caption {caption} of {count}")
        stored = self._texts.vector(first + caption, seed_of_text(row, caption))
        if stored is None:
            raise self._none(row, "caption")
        return stored

    def _texts_of(self, row: int) -> tuple[int, int]:
        """The first text of a row, and how many it has."""
        stored = self._captions.vector(row)
        if stored is None:
            raise self._none(row, "captions")
        first, count = np.frombuffer(stored, PLACE).tolist()
        return self._first_texts[row // self._part_rows] + first, count

    def read_row(self, row: int) -> None:
        for view in range(self.views):
            self.image(row, view)
        for caption in range(self._texts_of(row)[1]):
            self.states(row, caption) if self.text_width else self.text(row, caption)

    @property
    def files(self) -> Iterator[tuple[Path, DataFile]]:
        yield from super().files
        if self._split == "train":
            yield self._folder, self._of_moments

    @property
    def moments(self) -> EmbeddingMoments:
        """Of the image embeddings of the training split, all views; DataError where their file is not what was written."""
        return read_moments(self._folder, vars(self._of_moments), self.dim)
