"""Pictures that look alike: whose perceptual hashes differ in few bits.

Of pictures that are alike, the first stays: one is dropped if it is like an earlier one that is kept itself, so that a
chain of small changes does not lead from one picture to another that is nothing like it.
"""

from __future__ import annotations

from collections.abc import Iterator
from itertools import pairwise
from typing import Any

import numpy as np
import numpy.typing as npt
from PIL import Image

from dalle_ds.errors import ConfigError

_BLOCK = 4096
Rows = npt.NDArray[np.intp]


def perceptual_hash(pixels: npt.NDArray[np.uint8]) -> str:
    """The 64 signs of the lowest frequencies of a picture (pHash), in hexadecimal.

    Args:
        pixels: (H, W, 3).

    Raises:
        ConfigError: imagehash is not installed.
    """
    try:
        import imagehash
    except ImportError as error:
        raise ConfigError(
            "filters.max_hash_distance needs imagehash, which is not installed: pip install dalle-ds[filters]"
        ) from error
    return str(imagehash.phash(Image.fromarray(pixels)))


def close_hashes(hashes: npt.NDArray[np.uint64], distance: int) -> Rows:
    """Rows that differ in at most `distance` bits from an earlier row that is not one of them.

    Hashes that differ in d bits are equal in one of d + 1 parts (Norouzi et al., 2012, "Fast Search in Hamming Space"), so
    that only those that share a part are compared. 40 bytes a hash in memory, and the pairs found.
    """
    values, first, inverse = np.unique(hashes, return_index=True, return_inverse=True)
    order = np.argsort(first)
    values, first = values[order], first[order]  # distinct hashes, in the order in which they come
    found = [np.zeros((0, 2), dtype=np.int64)]
    for part in _parts(distance) if distance else ():
        keys = values & part
        by_key = np.argsort(keys, kind="stable")
        edges = np.flatnonzero(np.diff(keys[by_key], prepend=~keys[by_key[:1]], append=~keys[by_key[-1:]]))
        for start, end in pairwise(edges):
            if end - start > 1:
                found.extend(_pairs_within(values, by_key[start:end], distance))
    pairs = np.unique(np.concatenate(found), axis=0)  # (later, earlier)
    dropped = np.zeros(len(values), dtype=bool)
    for later, earlier in pairs:
        dropped[later] |= not dropped[earlier]
    place = np.empty(len(order), dtype=np.intp)
    place[order] = np.arange(len(order))
    of_row = place[inverse.reshape(-1)]
    return np.flatnonzero(dropped[of_row] | (first[of_row] != np.arange(len(hashes))))


def _parts(distance: int) -> list[np.uint64]:
    edges = np.linspace(0, 64, distance + 2).astype(int).tolist()
    return [np.uint64((1 << end) - (1 << start)) for start, end in pairwise(edges)]


def _pairs_within(values: npt.NDArray[np.uint64], rows: Rows, distance: int) -> Iterator[npt.NDArray[np.int64]]:
    """(later, earlier) of all pairs of the ascending `rows` that differ in at most `distance` bits."""
    for start in range(0, len(rows), _BLOCK):
        for other in range(0, start + 1, _BLOCK):
            later, earlier = rows[start : start + _BLOCK], rows[other : other + _BLOCK]
            close = _bits(values[later][:, None] ^ values[earlier]) <= distance
            close &= later[:, None] > earlier
            at_later, at_earlier = np.nonzero(close)
            yield np.stack([later[at_later], earlier[at_earlier]], axis=1)


def _bits(numbers: npt.NDArray[np.uint64]) -> npt.NDArray[Any]:
    """How many bits are set (NumPy has it from 2.0 on)."""
    one, two, four = (np.uint64(number) for number in (0x5555555555555555, 0x3333333333333333, 0x0F0F0F0F0F0F0F0F))
    numbers = numbers - ((numbers >> np.uint64(1)) & one)
    numbers = (numbers & two) + ((numbers >> np.uint64(2)) & two)
    numbers = (numbers + (numbers >> np.uint64(4))) & four
    return (numbers * np.uint64(0x0101010101010101)) >> np.uint64(56)
