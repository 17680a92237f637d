"""Bad updates, and the data that are left out after going back."""

from __future__ import annotations

import json
import math
from pathlib import Path

import pytest

from dalle_ds.config import GuardConfig
from dalle_ds.errors import CheckpointError, ConfigError
from dalle_ds.resilience.rollback import Guard, Rollbacks


def noisy(update: int) -> float:
    return 3.0 + 0.1 * math.sin(update * 12.9898)


def trained(config: GuardConfig, updates: int = 50) -> Guard:
    guard = Guard(config)
    assert not any(guard.observe(noisy(update), finite=True) for update in range(updates))
    return guard


def test_as_many_bad_updates_as_patience_allows_lead_back() -> None:
    guard = trained(GuardConfig(patience=3))
    assert [guard.observe(math.nan, finite=False) for _ in range(3)] == [False, False, True]


def test_a_good_update_between_starts_the_count_anew() -> None:
    guard = trained(GuardConfig(patience=3))
    verdicts = [guard.observe(loss, math.isfinite(loss)) for loss in (math.nan, math.nan, 3.0, math.nan, math.inf)]
    assert not any(verdicts) and guard.bad_in_a_row == 2


def test_updates_that_only_overflows_prevented_are_neither_good_nor_bad() -> None:
    guard = trained(GuardConfig(patience=2))
    guard.observe(math.nan, finite=False)
    assert not guard.observe(3.0, finite=True, applied=False) and guard.bad_in_a_row == 1
    assert guard.observe(math.nan, finite=False)


def test_spikes_are_bad_and_do_not_become_normal() -> None:
    guard = trained(GuardConfig(patience=20, window=30))
    assert guard.is_spike(6.0) and not guard.is_spike(3.1)
    verdicts = [guard.observe(6.0, finite=True) for _ in range(20)]
    assert verdicts == [False] * 19 + [True]


def test_a_slow_rise_is_no_spike() -> None:
    guard = trained(GuardConfig(patience=2, window=30))
    assert not any(guard.observe(noisy(update) + update / 200, finite=True) for update in range(600))


def test_losses_that_hardly_vary_have_no_spikes_within_five_per_cent() -> None:
    guard = Guard(GuardConfig(window=10))
    for _ in range(10):
        guard.observe(2.0, finite=True)
    assert not guard.is_spike(2.09) and guard.is_spike(2.11)


def test_before_the_window_is_full_and_without_a_limit_nothing_is_a_spike() -> None:
    assert not trained(GuardConfig(window=100)).is_spike(1e6)
    assert not trained(GuardConfig(window=10, spike_deviations=None)).is_spike(1e6)


def test_the_guard_resumes_exactly() -> None:
    config = GuardConfig(patience=4, window=20)
    guard, other = trained(config), Guard(config)
    guard.observe(9.0, finite=True)
    other.load_state_dict(json.loads(json.dumps(guard.state_dict())))
    losses = [9.0, 9.0, 9.0]
    assert [guard.observe(x, True) for x in losses] == [other.observe(x, True) for x in losses] == [False, False, True]


@pytest.mark.parametrize("fields", [{"patience": 0}, {"rollbacks": -1}, {"window": 1}, {"spike_deviations": 0.0}])
def test_settings_that_cannot_work_are_refused(fields: dict) -> None:
    with pytest.raises(ConfigError, match=f"guard.{next(iter(fields))}"):
        GuardConfig(**fields)


def replayed(rollbacks: Rollbacks, updates: int) -> list[int]:
    return [rollbacks.data_step(update) for update in range(updates)]


def test_without_going_back_every_update_has_its_own_place() -> None:
    assert replayed(Rollbacks(), 5) == [0, 1, 2, 3, 4]


def test_the_data_since_the_checkpoint_are_left_out() -> None:
    rollbacks = Rollbacks().after(from_update=15, to_update=10)
    assert replayed(rollbacks, 13) == [*range(10), 15, 16, 17]
    again = rollbacks.after(from_update=13, to_update=10)
    assert replayed(again, 12) == [*range(10), 18, 19]
    later = again.after(from_update=30, to_update=25)
    assert [later.data_step(update) for update in (9, 10, 24, 25)] == [9, 18, 32, 38]


def test_going_back_further_leaves_out_all_that_was_seen_and_nothing_twice() -> None:
    rollbacks = Rollbacks().after(15, 10).after(12, 5)
    assert replayed(rollbacks, 8) == [0, 1, 2, 3, 4, 17, 18, 19]


def test_times_in_a_row_count_until_the_run_gets_beyond() -> None:
    rollbacks = Rollbacks().after(15, 10)
    assert rollbacks.in_a_row(10) == 1
    assert rollbacks.after(13, 10).in_a_row(10) == 2
    assert rollbacks.after(13, 10).after(14, 10).in_a_row(10) == 3
    assert rollbacks.in_a_row(15) == rollbacks.in_a_row(20) == 0
    assert rollbacks.after(30, 20).in_a_row(20) == 1


def test_they_are_kept_in_a_file(tmp_path: Path) -> None:
    file = tmp_path / "rollbacks.json"
    assert Rollbacks.read(file).events == ()
    rollbacks = Rollbacks().after(15, 10).after(12, 5)
    rollbacks.write(file)
    assert Rollbacks.read(file).events == rollbacks.events
    file.write_text('[{"from_update": 3}]')
    with pytest.raises(CheckpointError, match=r"rollbacks.json cannot be read.*restore it"):
        Rollbacks.read(file)
