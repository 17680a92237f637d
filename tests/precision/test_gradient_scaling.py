"""The state machine of gradient scales, row by row of the paper's rule (App. D)."""

from __future__ import annotations

import json
import math

import pytest

from dalle_ds.config import ScalingConfig
from dalle_ds.errors import ConfigError
from dalle_ds.precision import GradientScales

PAPER = ScalingConfig()


def test_it_starts_at_m_times_2_to_the_13() -> None:
    scales = GradientScales(PAPER, 3, replicas=1024)
    assert scales.scales == [2.0**23] * 3
    assert scales.factors.tolist() == [2.0**13] * 3


def test_a_thousand_clean_updates_double_it() -> None:
    scales = GradientScales(PAPER, 2, replicas=2)
    for _ in range(1000):
        scales.update((), applied=True)
    assert scales.scales == pytest.approx([2 * 2.0**14] * 2, rel=1e-9)
    assert scales.factors.tolist() == pytest.approx([2.0**14] * 2, rel=1e-6)


def test_one_backoff_costs_five_hundred_clean_updates() -> None:
    scales = GradientScales(PAPER, 1, replicas=1)
    scales.update([0], applied=False)
    assert scales.scales[0] == pytest.approx(2.0**12.5)
    for _ in range(500):
        scales.update((), applied=True)
    assert scales.scales[0] == pytest.approx(2.0**13)


def test_only_the_block_that_overflowed_moves_on_a_skipped_update() -> None:
    scales = GradientScales(PAPER, 4, replicas=1)
    scales.update([2], applied=False)
    assert scales.scales == [2.0**13, 2.0**13, 2.0**13 / math.sqrt(2), 2.0**13]


def test_it_is_not_divided_twice_within_125_updates() -> None:
    scales = GradientScales(PAPER, 2, replicas=1)
    seen = []
    for _ in range(251):
        scales.update([0], applied=False)
        seen.append(math.log2(scales.scales[0]))
    # Updates 0, 125 and 250 divide; those between do not, and do not grow either.
    assert seen == pytest.approx([12.5] * 125 + [12.0] * 125 + [11.5])
    assert scales.scales[1] == 2.0**13


def test_updates_within_the_window_count_whether_or_not_they_are_skipped() -> None:
    scales = GradientScales(PAPER, 1, replicas=1)
    scales.update([0], applied=False)
    for _ in range(123):
        scales.update((), applied=True)
    grown = scales.scales[0]
    scales.update([0], applied=False)  # the 124th after the division
    assert scales.scales[0] == grown
    scales.update([0], applied=False)  # the 125th
    assert scales.scales[0] == pytest.approx(grown / math.sqrt(2))


@pytest.mark.parametrize(("replicas", "lowest", "highest"), [(1, 2.0**7, 2.0**24), (1024, 2.0**17, 2.0**34)])
def test_it_stays_within_the_papers_bounds(replicas: int, lowest: float, highest: float) -> None:
    scales = GradientScales(ScalingConfig(window=0, doubling_updates=1), 2, replicas)
    for _ in range(60):
        scales.update([0], applied=True)
    assert scales.scales == [lowest, highest]


def test_at_the_floor_no_scale_will_help() -> None:
    scales = GradientScales(ScalingConfig(initial_log2=7.5, window=0), 2, replicas=4)
    assert not scales.at_floor(0)
    scales.update([0], applied=False)
    assert scales.at_floor(0) and not scales.at_floor(1)


def test_under_the_block_policy_the_others_go_on_growing() -> None:
    scales = GradientScales(PAPER, 2, replicas=1)
    scales.update([0], applied=True)
    assert scales.scales == [2.0**13 / math.sqrt(2), 2.0**13 * 2 ** (1 / 1000)]


def test_blocks_see_a_new_scale_at_once() -> None:
    import torch

    scales = GradientScales(PAPER, 2, replicas=4)
    inside = scales.precision(1, torch.float16)
    scales.update([1], applied=False)
    assert inside.factor.tolist() == pytest.approx([2.0**12.5])


def test_state_survives_json_bit_for_bit() -> None:
    scales, other = GradientScales(PAPER, 3, 2), GradientScales(PAPER, 3, 2)
    for update in range(200):
        scales.update([update % 3] if update % 7 == 0 else (), applied=update % 7 != 0)
    other.load_state_dict(json.loads(json.dumps(scales.state_dict())))
    for update in range(200):
        for each in (scales, other):
            each.update([1] if update % 50 == 0 else (), applied=update % 50 != 0)
    assert scales.scales == other.scales
    assert scales.factors.tolist() == other.factors.tolist()


def test_scales_of_another_number_of_processes_are_taken_over_as_multiples_of_it() -> None:
    scales = GradientScales(PAPER, 2, replicas=8)
    scales.update([0], applied=False)
    for _ in range(100):
        scales.update((), applied=True)
    other = GradientScales(PAPER, 2, replicas=2)
    other.load_state_dict(json.loads(json.dumps(scales.state_dict())))
    assert other.scales == [scale / 4 for scale in scales.scales]
    assert other.factors.tolist() == scales.factors.tolist(), "inside of the branches nothing changes"
    # The window goes on: the 101st update since the division does not divide again, the 125th does.
    other.update([0], applied=False)
    assert other.scales[0] == scales.scales[0] / 4
    for _ in range(23):
        other.update((), applied=False)
    other.update([0], applied=False)
    assert other.scales[0] == pytest.approx(scales.scales[0] / 4 / math.sqrt(2))


@pytest.mark.parametrize(
    ("fields", "words"),
    [
        ({"backoff": 1.0}, "scaling.backoff must be greater than 1"),
        ({"initial_log2": 25.0}, "scaling.initial_log2=25.0 must lie between"),
        ({"doubling_updates": 0}, "scaling.doubling_updates must be greater than 0"),
        ({"window": -1}, "scaling.window must be at least 0"),
    ],
)
def test_constants_that_cannot_work_are_refused(fields: dict, words: str) -> None:
    with pytest.raises(ConfigError, match=words):
        ScalingConfig(**fields)
