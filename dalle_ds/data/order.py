"""The order in which rows of one corpus or several are visited: a pure function of (seed, position) in O(1) memory and
start-up time.

A shuffled index list of 250 M rows takes 2 GB per process and seconds to make. Here an epoch's order is a keyed
permutation: a Feistel network over the smallest power of two that holds the rows, walked until it lands on a row.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from functools import lru_cache
from typing import TYPE_CHECKING, Any, TypeVar

import numpy as np
import numpy.typing as npt

from dalle_ds.data.faults import Fault

if TYPE_CHECKING:
    from dalle_ds.data.loader import Arrays, Samples

_MASK = (1 << 64) - 1
_GOLDEN = 0x9E3779B97F4A7C15
_HALF_ROUNDS = 16  # with eight, the orders of five rows are visibly not equally likely; with sixteen they are
_TURNS = 1 << 63  # in a key: the place of a sample, which other keys have there, is less
_LEAST_BLOCK = 256

Words = TypeVar("Words", int, npt.NDArray[Any])  # of 64 bits


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


def permuted(index: npt.NDArray[np.int64], length: int, key: int) -> npt.NDArray[np.int64]:
    """Where a bijection of [0, length) onto itself that looks random, chosen by `key` in [0, 2^64), takes each of an array of
    indices, in O(1) memory."""
    bits = max(1, (length - 1).bit_length())
    right_bits = np.uint64(bits // 2)
    left_mask, right_mask = np.uint64((1 << (bits - bits // 2)) - 1), np.uint64((1 << (bits // 2)) - 1)
    round_keys = [np.uint64(hash_integers(key, number)) for number in range(_HALF_ROUNDS)]

    def network(values: npt.NDArray[np.uint64]) -> npt.NDArray[np.uint64]:
        left, right = values >> right_bits, values & right_mask
        for of_left, of_right in zip(round_keys[::2], round_keys[1::2], strict=True):
            left = left ^ (mix64(right + of_left) & left_mask)
            right = right ^ (mix64(left + of_right) & right_mask)
        return (left << right_bits) | right

    values = network(index.astype(np.uint64))
    # The network permutes a power of two less than twice `length`. Walking on from a value outside [0, length)
    # along its cycle must come back inside, since the cycle started there, and keeps the whole a bijection.
    outside = values >= length
    while outside.any():
        values[outside] = network(values[outside])
        outside = values >= length
    return values.astype(np.int64)


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
        rows[here] = permuted(offsets[here], length, hash_integers(seed, int(epoch)))
    return rows


# --- several corpora ------------------------------------------------------------------------------------------------


class Mixture:
    """Samples of one or several corpora, numbered through: the rows of the first, then those of the next.

    Training draws from each in proportion to its weight, whatever its size, and goes through each in shuffled epochs of its
    own. The order of the first is that of a run on it alone.

    Args:
        corpora: at least one; those that are drawn from have rows.
        weights: whole numbers greater than 0, one for each corpus; none gives all the same.
    """

    def __init__(self, corpora: Sequence[Samples], weights: Sequence[int] = ()) -> None:
        self.corpora = tuple(corpora)
        self._weights = tuple(weights) or (1,) * len(self.corpora)
        assert len(self._weights) == len(self.corpora)
        self._bounds = np.cumsum([0, *map(len, self.corpora)])

    @property
    def shares(self) -> list[float]:
        """Of the samples that are drawn, for each corpus."""
        return [weight / sum(self._weights) for weight in self._weights]

    def __len__(self) -> int:
        return int(self._bounds[-1])

    def rows_at(self, positions: npt.NDArray[np.int64], seed: int) -> npt.NDArray[np.int64]:
        """(N,) rows at the given positions of the order of training; with one corpus, those of `order.rows_of`."""
        if len(self.corpora) == 1:
            return rows_of(positions, seed, len(self))
        corpora, draws = turns_of(positions, seed, self._weights)
        rows = np.empty_like(draws)
        for number, corpus in enumerate(self.corpora):
            here = corpora == number
            own_seed = hash_integers(seed, number) if number else seed
            rows[here] = self._bounds[number] + rows_of(draws[here], own_seed, len(corpus))
        return rows

    def rows_like(self, row: int) -> range:
        """All rows of the corpus that a row is of: those that may stand in for it."""
        number = self._number_of(row)
        return range(int(self._bounds[number]), int(self._bounds[number + 1]))

    def sample(self, row: int, rng: np.random.Generator) -> Arrays:
        number = self._number_of(row)
        return self.corpora[number].sample(row - int(self._bounds[number]), rng)

    @property
    def faults(self) -> tuple[Fault, ...]:
        return tuple(fault for corpus in self.corpora for fault in corpus.faults)

    def check_unchanged(self) -> None:
        for corpus in self.corpora:
            corpus.check_unchanged()

    def _number_of(self, row: int) -> int:
        return int(np.searchsorted(self._bounds, row, side="right")) - 1


def turns_of(
    positions: npt.NDArray[np.int64], seed: int, weights: tuple[int, ...]
) -> tuple[npt.NDArray[np.int64], npt.NDArray[np.int64]]:
    """Which of several corpora the sample at each position is drawn from, and how many were drawn from that corpus before.

    Positions are taken in blocks of at least 256. In a block every corpus has exactly its share of the turns, in an order
    that is as likely as any other: the sample at any position is of corpus k with probability `weights[k] / sum(weights)`, as
    if each were drawn by itself, but shares do not drift, and what was drawn before a block is known without counting.

    Args:
        positions: (N,), not negative.
        seed: chooses the orders of all blocks.
        weights: greater than 0.

    Returns:
        (N,) numbers of corpora, and (N,) numbers of draws, from 0: the positions at which one corpus has its turn have
        draws 0, 1, 2, …
    """
    weights = tuple(weight // math.gcd(*weights) for weight in weights)
    repeats = -(-_LEAST_BLOCK // sum(weights))
    counts = tuple(weight * repeats for weight in weights)
    blocks, offsets = np.divmod(positions, sum(counts))
    corpora, draws = np.empty_like(offsets), np.empty_like(offsets)
    for block in np.unique(blocks):
        here = blocks == block
        turns, before = _block(hash_integers(seed, _TURNS, int(block)), counts)
        corpora[here] = turns[offsets[here]]
        draws[here] = block * np.array(counts)[corpora[here]] + before[offsets[here]]
    return corpora, draws


@lru_cache(maxsize=4)
def _block(key: int, counts: tuple[int, ...]) -> tuple[npt.NDArray[np.int64], npt.NDArray[np.int64]]:
    """For each place in a block: whose turn it is, and how many turns of the same corpus come before it."""
    places = permuted(np.arange(sum(counts)), sum(counts), key)
    turns = np.searchsorted(np.cumsum(counts), places, side="right")
    before = np.empty_like(turns)
    for number, count in enumerate(counts):
        before[turns == number] = np.arange(count)
    return turns, before
