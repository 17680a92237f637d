"""The order of rows: bijections, different for every key, uniform, at no cost."""

from __future__ import annotations

import time

import numpy as np
import pytest

from dalle_ds.data.order import hash_integers, mix64, permuted, rows_of


def test_mix64_is_splitmix64() -> None:
    # First outputs of Vigna's reference splitmix64.c for seed 0: the finalizer of multiples of the golden ratio.
    golden = np.uint64(0x9E3779B97F4A7C15)
    states = np.arange(1, 4, dtype=np.uint64) * golden
    assert [hex(value) for value in mix64(states)] == ["0xe220a8397b1dcdaf", "0x6e789e6aa1b965f4", "0x6c45d188009454f"]


def test_hash_integers_depends_on_every_value_and_its_place() -> None:
    values = {hash_integers(*args) for args in [(), (0,), (0, 0), (1,), (0, 1), (1, 0), (2**63, 5), (5, 2**63)]}
    assert len(values) == 8
    assert all(0 <= value < 2**64 for value in values)


def test_hash_integers_is_the_same_for_ever() -> None:
    # Data orders of published runs rest on it.
    assert hash_integers(1, 2, 3) == 0x3F53A1FE784BBF


@pytest.mark.parametrize("length", [1, 2, 3, 5, 7, 8, 9, 63, 64, 65, 1000, 1023, 1024, 1025, 4097])
@pytest.mark.parametrize("key", [0, 1, 2**63])
def test_permutation_is_a_bijection(length: int, key: int) -> None:
    images = permuted(np.arange(length), length, key)
    assert np.array_equal(np.sort(images), np.arange(length))


def test_keys_give_unrelated_orders() -> None:
    index = np.arange(1000)
    orders = [permuted(index, 1000, key) for key in range(20)]
    fixed = [int((first == second).sum()) for i, first in enumerate(orders) for second in [index, *orders[:i]]]
    # Two independent permutations agree at a Poisson(1) number of places.
    assert max(fixed) <= 7
    assert 0.8 < np.mean(fixed) < 1.2


@pytest.mark.parametrize("length", [2, 3, 4, 5])
def test_every_order_of_a_small_set_occurs_about_equally_often(length: int) -> None:
    keys = 6000
    orders = np.stack([permuted(np.arange(length), length, key) for key in range(keys)])
    _, counts = np.unique(orders, axis=0, return_counts=True)
    possible = int(np.prod(np.arange(1, length + 1)))
    assert len(counts) == possible
    chi_square = ((counts - keys / possible) ** 2 / (keys / possible)).sum()
    assert chi_square < possible + 5 * np.sqrt(2 * possible)


def test_rows_are_spread_evenly_over_positions() -> None:
    length, bins = 100_003, 20
    rows = permuted(np.arange(length), length, 7)
    table, _, _ = np.histogram2d(np.arange(length), rows, bins=bins)
    expected = length / bins**2
    chi_square = ((table - expected) ** 2 / expected).sum()
    freedom = (bins - 1) ** 2
    assert abs(chi_square - freedom) < 5 * np.sqrt(2 * freedom)
    # Neighbours in position are not neighbours in row.
    assert abs(np.corrcoef(rows[:-1], rows[1:])[0, 1]) < 0.02


def test_epochs_each_visit_every_row_once_in_different_orders() -> None:
    rows = rows_of(np.arange(300), seed=3, length=100).reshape(3, 100)
    assert all(np.array_equal(np.sort(epoch), np.arange(100)) for epoch in rows)
    assert (rows[0] != rows[1]).sum() > 90 and (rows[1] != rows[2]).sum() > 90
    assert (rows_of(np.arange(100), seed=4, length=100) != rows[0]).sum() > 90


def test_250_million_rows_cost_nothing_to_start() -> None:
    seconds = min(_seconds_to_first_rows() for _ in range(5))
    assert seconds < 0.001


def _seconds_to_first_rows() -> float:
    start = time.perf_counter()
    rows_of(np.array([10**12]), 0, 250_000_000)
    return time.perf_counter() - start
