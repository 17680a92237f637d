"""The order in which rows are visited: a pure function of (seed, position) in O(1) memory and start-up time.

A shuffled index list of 250 M rows takes 2 GB per process and seconds to make. Here an epoch's order is a keyed
permutation: a Feistel network over the smallest power of two that holds the rows, walked until it lands on a row.
"""

from __future__ import annotations

from typing import TypeVar

import numpy as np
import numpy.typing as npt

_MASK = (1 << 64) - 1
_GOLDEN = 0x9E3779B97F4A7C15
_HALF_ROUNDS = 16  # with eight, the orders of five rows are visibly not equally likely; with sixteen they are

Words = TypeVar("Words", int, npt.NDArray[np.uint64])


def mix64(words: Words) -> Words:
    """Finalizer of splitmix64 (Steele, Lea and Flood 2014): a bijection on 64-bit words that mixes all bits."""
    words = ((words ^ (words >> 30)) * 0xBF58476D1CE4E5B9) & _MASK
    words = ((words ^ (words >> 27)) * 0x94D049BB133111EB) & _MASK
    return words ^ (words >> 31)


def hash_integers(*values: int) -> int:
    """A 64-bit hash of a sequence of integers in [0, 2^64), the same on every machine and Python version."""
    state = 0
    for value in values:
        state = mix64(((state + _GOLDEN) & _MASK) ^ mix64((value + _GOLDEN) & _MASK))
    return state


class KeyedPermutation:
    """A bijection of [0, length) onto itself that looks random, chosen by `key`, in O(1) memory.

    Args:
        length: at least 1.
        key: in [0, 2^64).
    """

    def __init__(self, length: int, key: int) -> None:
        assert length >= 1
        self.length = length
        bits = max(1, (length - 1).bit_length())
        self._right_bits = np.uint64(bits // 2)
        self._left_mask = np.uint64((1 << (bits - bits // 2)) - 1)
        self._right_mask = np.uint64((1 << (bits // 2)) - 1)
        self._round_keys = [np.uint64(hash_integers(key, number)) for number in range(_HALF_ROUNDS)]

    def __call__(self, index: npt.NDArray[np.int64]) -> npt.NDArray[np.int64]:
        """Images of an array of indices in [0, length); any shape."""
        values = self._network(index.astype(np.uint64))
        # The network permutes a power of two less than twice `length`. Walking on from a value outside [0, length)
        # along its cycle must come back inside, since the cycle started there, and keeps the whole a bijection.
        outside = values >= self.length
        while outside.any():
            values[outside] = self._network(values[outside])
            outside = values >= self.length
        return values.astype(np.int64)

    def _network(self, values: npt.NDArray[np.uint64]) -> npt.NDArray[np.uint64]:
        left, right = values >> self._right_bits, values & self._right_mask
        for number in range(0, _HALF_ROUNDS, 2):
            left = left ^ (mix64(right + self._round_keys[number]) & self._left_mask)
            right = right ^ (mix64(left + self._round_keys[number + 1]) & self._right_mask)
        return (left << self._right_bits) | right


def rows_of(positions: npt.NDArray[np.int64], seed: int, length: int) -> npt.NDArray[np.int64]:
    """Rows at the given positions of endlessly many shuffled epochs; epoch e is positions [e·length, (e+1)·length).

    Args:
        positions: (N,), not negative.
        seed: chooses the orders of all epochs.
        length: rows in the data.

    Returns:
        (N,), each in [0, length).
    """
    epochs, offsets = np.divmod(positions, length)
    rows = np.empty_like(offsets)
    for epoch in np.unique(epochs):
        here = epochs == epoch
        rows[here] = KeyedPermutation(length, hash_integers(seed, int(epoch)))(offsets[here])
    return rows
