"""Embeddings of all images of a split, in files that grow over restarts; nearest neighbours by cosine.

No `CodesCache`: that one has all splits of a folder, training images in augmented views, and is made at once or not at all.
"""

from __future__ import annotations

import math
import os
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor
from torch.utils.data import DataLoader, Subset

from dalle_ds.data.codes import Views, collate
from dalle_ds.data.dataset import PairDataset
from dalle_ds.data.dedup import perceptual_hash
from dalle_ds.data.workers import keep_sigchld_handler, next_batch
from dalle_ds.errors import CheckpointError, ConfigError, DataError
from dalle_ds.files import disk_full_is_a_data_error, only_process, write_json
from dalle_ds.parsing import parse_json

FORMAT_VERSION = 1
_SAVED_ROWS = 4096
"""Rows after which what was embedded is forced to the disk."""
_KIND = np.dtype("<f4")

Vectors = npt.NDArray[np.float32]


@dataclass(frozen=True)
class Embedder:
    """What makes vectors of images."""

    fingerprint: str
    """Names the vectors."""
    image_size: int
    """S."""
    embed_dim: int
    """D."""
    embed: Callable[[Tensor], Tensor]
    """(B, 3, S, S) in [0, 1] → (B, D) of length 1."""


def hash_bits(images: Tensor) -> Tensor:
    """The bits of images' perceptual hashes: (B, 3, S, S) in [0, 1] → (B, 64), −1/8 or 1/8 each, so that the cosine of two is
    1 − (bits that differ) / 32. ConfigError where imagehash is not installed."""
    pixels = (images * 255).round().to(torch.uint8).permute(0, 2, 3, 1).numpy()
    hashes = np.array([int(perceptual_hash(image), 16) for image in pixels], dtype=">u8")
    bits = np.unpackbits(hashes.view(np.uint8).reshape(-1, 8), axis=1)
    return torch.from_numpy(bits).float().sub(0.5).div(4)


PERCEPTUAL_HASHES = Embedder("phash-64", 128, 64, hash_bits)


@dataclass(frozen=True)
class Embeddings:
    """What `embed_split` made."""

    vectors: Vectors
    """(rows, D) of length 1, in a file; zeros where an image could not be read."""
    readable: npt.NDArray[np.bool_]
    """(rows,) whether it could."""


def embed_split(
    embedder: Embedder,
    dataset: PairDataset,
    folder: Path,
    *,
    batch_size: int = 256,
    workers: int = 0,
    say: Callable[[str], None] = lambda line: None,
) -> Embeddings:
    """Embed the central square of every image of a split into `folder`, or go on with what is there.

    At any time, `batch_size` images are in memory, and those that workers read ahead.

    Args:
        say: is told how far it is.

    Raises:
        DataError: the folder holds embeddings of another model or other data, or damaged ones; another process embeds into
            it; or the disk is full.
        DataChangedError: the data was prepared again meanwhile.
        CheckpointError: the model gives something that is no number.
    """
    rows, width = len(dataset), embedder.embed_dim
    identity = {
        "format_version": FORMAT_VERSION,
        "detector": embedder.fingerprint,
        "data": dataset.fingerprint,
        "split": dataset.split,
        "rows": rows,
        "embed_dim": width,
    }
    of_vectors, of_readable = folder / "vectors.f32", folder / "readable.u8"
    with disk_full_is_a_data_error(folder), only_process(folder, f".{folder.name}.lock"):
        done = saved = _resume(folder, identity, {of_vectors: width * _KIND.itemsize, of_readable: 1})
        images = Subset(Views(dataset, embedder.image_size, None, 0), range(done, rows))
        batches = DataLoader(images, batch_size=batch_size, num_workers=workers, collate_fn=collate)
        with of_vectors.open("ab") as vectors, of_readable.open("ab") as readable:
            loaded = keep_sigchld_handler(lambda: iter(batches))
            for _ in range(len(batches)):
                views, could_read = next_batch(loaded)
                embedded = embedder.embed(views.flatten(0, 1).float() / 255).float().cpu().numpy()
                embedded[~could_read] = 0
                if not np.isfinite(embedded).all():  # which would be like nothing, and so be no duplicate
                    raise CheckpointError(
                        "the model gives embeddings that are not numbers: its training has diverged, take another one"
                    )
                vectors.write(embedded.astype(_KIND).tobytes())
                readable.write(could_read.astype(np.uint8).tobytes())
                done += len(views)
                if done - saved >= _SAVED_ROWS or done == rows:
                    dataset.check_unchanged()
                    for file in (vectors, readable):
                        file.flush()
                        os.fsync(file.fileno())
                    # Only what is on the disk by now counts when this is gone on with.
                    write_json(folder / "progress.json", identity | {"done": done})
                    saved = done
                    say(f"{dataset.data_dir}, {dataset.split}: {done:,} of {rows:,} images embedded")
        all_readable = np.fromfile(of_readable, dtype=np.uint8).astype(bool)
        if rows == 0:
            return Embeddings(np.zeros((0, width), np.float32), all_readable)
        return Embeddings(np.memmap(of_vectors, dtype=_KIND, mode="r", shape=(rows, width)), all_readable)


def _resume(folder: Path, identity: dict[str, Any], sizes: dict[Path, int]) -> int:
    """How many rows the files are known to have, which take so many bytes each; what was written beyond them is cut off."""

    def wrong(what: str) -> DataError:
        return DataError(f"the embeddings in {folder} {what}: remove that folder, or name another --out")

    progress = folder / "progress.json"
    if not progress.exists():
        folder.mkdir(parents=True, exist_ok=True)
        for path in sizes:
            path.write_bytes(b"")
        write_json(progress, identity | {"done": 0})
        return 0
    try:
        found = parse_json(progress.read_bytes())
        done = found["done"]
        differing = [name for name, value in identity.items() if found.get(name) != value]
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        raise wrong(f"cannot be read ({error})") from error
    if differing:
        raise wrong(f"are of another {', '.join(differing)}")
    if not isinstance(done, int) or not 0 <= done <= identity["rows"]:
        raise wrong("are damaged")
    for path, size in sizes.items():
        if not path.is_file() or path.stat().st_size < done * size:
            raise wrong("are damaged")
        os.truncate(path, done * size)
    return done


# --- neighbours ---------------------------------------------------------------------------------------------------------

IndexKind = Literal["auto", "torch", "flat", "ivf"]
BLOCK = 65_536
"""Rows of the greater set that are in memory at a time."""
_QUERIES = 1_024
# Faiss wants 39 to 256 vectors for each list.
_TRAINING_PER_LIST = 64

Found = tuple[npt.NDArray[np.float32], npt.NDArray[np.int64]]
"""Cosine and number of the most similar row, for each row; −1 and −1 where there is none."""


def nearest(
    queries: Vectors, base: Embeddings, *, kind: IndexKind = "auto", lists: int | None = None, probes: int = 16
) -> Found:
    """For each query, the most similar readable row of `base`.

    Args:
        queries: (Q, D) of length 1.
        kind: `flat` compares all with all by Faiss, `torch` does the same without it, and `auto` is the former where Faiss is
            installed. `ivf` divides the base into lists by similarity and looks through few of them, for sets that are too
            large for `flat`; it holds the base in memory, and may miss the most similar row.
        lists: of `ivf`; None takes 4 √rows.
        probes: of `ivf`, the lists that are looked through for each query.

    Returns:
        (Q,) cosines, and (Q,) row numbers.

    Raises:
        ConfigError: Faiss is needed and not installed.
    """
    queries = np.ascontiguousarray(queries, dtype=np.float32)
    faiss = None if kind == "torch" else _faiss(needed=kind != "auto")
    if kind != "ivf" or not base.readable.any():
        return _exact(queries, base, faiss)
    cosines, rows = _by_lists(queries, base, lists, probes, faiss)
    missing = rows < 0  # all lists that were looked through were empty
    if missing.any():
        cosines[missing], rows[missing] = _exact(queries[missing], base, faiss)
    return cosines, rows


def _exact(queries: Vectors, base: Embeddings, faiss: Any) -> Found:
    """By comparing all with all, where `faiss` is None by PyTorch."""
    cosines, rows = np.full(len(queries), -1.0, np.float32), np.full(len(queries), -1, np.int64)
    for numbers, vectors in blocks(base, BLOCK):
        if faiss is None:
            parts = torch.from_numpy(queries).split(_QUERIES)
            found = [(part @ torch.from_numpy(vectors).T).max(dim=1) for part in parts]
            best, places = (np.concatenate([part[index].numpy() for part in found]) for index in (0, 1))
        else:
            index = faiss.IndexFlatIP(queries.shape[1])
            index.add(vectors)
            best, places = (each[:, 0] for each in index.search(queries, 1))
        won = (best > cosines) | (rows < 0)
        cosines[won], rows[won] = best[won], numbers[places[won]]
    return cosines, rows


def _by_lists(queries: Vectors, base: Embeddings, lists: int | None, probes: int, faiss: Any) -> Found:
    readable = np.flatnonzero(base.readable)
    count = min(lists or math.ceil(4 * math.sqrt(len(readable))), max(1, len(readable) // _TRAINING_PER_LIST))
    sample = np.linspace(0, len(readable) - 1, min(len(readable), _TRAINING_PER_LIST * count)).astype(np.int64)
    quantizer = faiss.IndexFlatIP(queries.shape[1])
    index = faiss.IndexIVFFlat(quantizer, queries.shape[1], count, faiss.METRIC_INNER_PRODUCT)
    index.train(np.ascontiguousarray(base.vectors[readable[sample]], dtype=np.float32))
    for numbers, vectors in blocks(base, BLOCK):
        index.add_with_ids(vectors, numbers)
    index.nprobe = min(probes, count)
    best, found = index.search(queries, 1)
    return np.where(found[:, 0] < 0, -1.0, best[:, 0]).astype(np.float32), found[:, 0].astype(np.int64)


def blocks(embeddings: Embeddings, rows: int) -> Iterator[tuple[npt.NDArray[np.int64], Vectors]]:
    """The numbers of readable rows and their vectors, of `rows` rows at a time."""
    for start in range(0, len(embeddings.readable), rows):
        numbers = start + np.flatnonzero(embeddings.readable[start : start + rows])
        if len(numbers):
            yield numbers, np.ascontiguousarray(embeddings.vectors[numbers], dtype=np.float32)


def _faiss(needed: bool) -> Any:
    try:
        import faiss
    except ImportError as error:
        if needed:
            raise ConfigError(
                "this index needs Faiss: pip install 'dalle-ds[overlap]', or set --index torch, which is exact too, but slower"
            ) from error
        return None
    return faiss
