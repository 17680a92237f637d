"""Several corpora as one: whose turn it is, and which of its rows."""

from __future__ import annotations

import math
from collections.abc import Sequence
from functools import lru_cache
from typing import TYPE_CHECKING

import numpy as np
import numpy.typing as npt

from dalle_ds.data.faults import Fault
from dalle_ds.data.order import KeyedPermutation, hash_integers, rows_of

if TYPE_CHECKING:
    from dalle_ds.data.loader import Arrays, Samples

_TURNS = 1 << 63  # in a key: the place of a sample, which other keys have there, is less
_LEAST_BLOCK = 256


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
    places = KeyedPermutation(sum(counts), key)(np.arange(sum(counts)))
    turns = np.searchsorted(np.cumsum(counts), places, side="right")
    before = np.empty_like(turns)
    for number, count in enumerate(counts):
        before[turns == number] = np.arange(count)
    return turns, before
