"""The most similar row of a set for each row of another, by cosine."""

from __future__ import annotations

import math
from collections.abc import Iterator
from typing import Any, Literal

import numpy as np
import numpy.typing as npt
import torch

from dalle_ds.errors import ConfigError
from dalle_ds.evaluation.overlap.embeddings import Embeddings, Vectors

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
        ConfigError: Faiss is needed and not installed, or a number that is not positive.
    """
    if (lists is not None and lists < 1) or probes < 1:
        raise ConfigError(f"lists and probes must be at least 1, found {lists} and {probes}")
    queries = np.ascontiguousarray(queries, dtype=np.float32)
    if kind == "torch" or (kind == "auto" and _faiss(needed=False) is None):
        return _by_torch(queries, base)
    if kind != "ivf":
        return _flat(queries, base)
    found = _by_lists(queries, base, lists, probes)
    missing = found[1] < 0  # all lists that were looked through were empty
    if missing.any():
        found[0][missing], found[1][missing] = _flat(queries[missing], base)
    return found


def _flat(queries: Vectors, base: Embeddings) -> Found:
    faiss = _faiss()
    cosines, rows = _nothing(len(queries))
    for numbers, vectors in blocks(base, BLOCK):
        index = faiss.IndexFlatIP(queries.shape[1])
        index.add(vectors)
        best, places = index.search(queries, 1)
        _take(cosines, rows, best[:, 0], numbers[places[:, 0]])
    return cosines, rows


def _by_torch(queries: Vectors, base: Embeddings) -> Found:
    cosines, rows = _nothing(len(queries))
    for numbers, vectors in blocks(base, BLOCK):
        transposed = torch.from_numpy(vectors).T
        for start in range(0, len(queries), _QUERIES):
            part = slice(start, start + _QUERIES)
            best, places = (torch.from_numpy(queries[part]) @ transposed).max(dim=1)
            _take(cosines[part], rows[part], best.numpy(), numbers[places.numpy()])
    return cosines, rows


def _by_lists(queries: Vectors, base: Embeddings, lists: int | None, probes: int) -> Found:
    faiss = _faiss()
    readable = np.flatnonzero(base.readable)
    if len(readable) == 0:
        return _nothing(len(queries))
    count = min(lists or math.ceil(4 * math.sqrt(len(readable))), max(1, len(readable) // _TRAINING_PER_LIST))
    sample = readable[
        np.linspace(0, len(readable) - 1, min(len(readable), _TRAINING_PER_LIST * count)).astype(np.int64)
    ]
    quantizer = faiss.IndexFlatIP(queries.shape[1])
    index = faiss.IndexIVFFlat(quantizer, queries.shape[1], count, faiss.METRIC_INNER_PRODUCT)
    index.train(np.ascontiguousarray(base.vectors[sample], dtype=np.float32))
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


def _nothing(count: int) -> Found:
    return np.full(count, -1.0, dtype=np.float32), np.full(count, -1, dtype=np.int64)


def _take(
    cosines: npt.NDArray[np.float32],
    rows: npt.NDArray[np.int64],
    better: npt.NDArray[np.float32],
    numbers: npt.NDArray[np.int64],
) -> None:
    """Put in what is more similar than what was found before."""
    won = (better > cosines) | (rows < 0)
    cosines[won], rows[won] = better[won], numbers[won]


def _faiss(needed: bool = True) -> Any:
    try:
        import faiss
    except ImportError as error:
        if needed:
            raise ConfigError(
                "this index needs Faiss: pip install 'dalle-ds[overlap]', or set --index torch, which is exact too, but slower"
            ) from error
        return None
    return faiss
