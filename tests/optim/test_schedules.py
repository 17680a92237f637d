"""Schedules against torch's own and against their sentences in the paper."""

from __future__ import annotations

import math

import pytest
import torch

from dalle_ds.config import DvaeRun, OptimConfig, load_preset
from dalle_ds.errors import ConfigError
from dalle_ds.optim import LearningRate, gumbel_temperature, kl_weight
from dalle_ds.optim.schedules import half_cosine


def test_half_cosine_follows_torchs_cosine_annealing_and_then_holds() -> None:
    optimizer = torch.optim.SGD([torch.zeros(1, requires_grad=True)], lr=1e-4)
    reference = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, T_max=50, eta_min=1.25e-6)
    for step in range(51):
        assert half_cosine(step, 50, 1e-4, 1.25e-6) == pytest.approx(optimizer.param_groups[0]["lr"], rel=1e-9)
        optimizer.step()
        reference.step()
    assert half_cosine(51, 50, 1e-4, 1.25e-6) == half_cosine(10**6, 50, 1e-4, 1.25e-6) == 1.25e-6


def test_the_papers_dvae_schedules_have_the_papers_ends() -> None:
    run = load_preset("dalle-12b", "dvae", DvaeRun)
    objective, optim = run.objective, run.optim
    assert kl_weight(objective, 0) == 0
    assert kl_weight(objective, 5_000) == 6.6
    temperatures = [gumbel_temperature(objective, step) for step in (0, 75_000, 150_000, 3_000_000)]
    # Not compounding: DALLE-pytorch's schedule reaches its floor after 12k steps.
    assert temperatures == pytest.approx([1.0, (1 + 1 / 16) / 2, 1 / 16, 1 / 16])
    rate = LearningRate(optim)
    assert [rate.at(step) for step in (0, 600_000, 1_200_000, 2_999_999)] == pytest.approx(
        [1e-4, (1e-4 + 1.25e-6) / 2, 1.25e-6, 1.25e-6]
    )


def test_warm_up_is_linear_and_reaches_the_peak() -> None:
    rate = LearningRate(OptimConfig(lr=4.5e-4, warmup_steps=5_000, schedule="constant"))
    assert rate.at(0) == pytest.approx(4.5e-4 / 5_000)
    assert rate.at(2_499) == pytest.approx(4.5e-4 / 2)
    assert rate.at(4_999) == rate.at(5_000) == rate.at(10**6) == 4.5e-4


def plateau(**fields: float) -> LearningRate:
    defaults = {
        "lr": 1.0,
        "warmup_steps": 5,
        "plateau_patience": 20,
        "plateau_smoothing": 0.5,
        "plateau_threshold": 0.01,
    }
    return LearningRate(OptimConfig(schedule="plateau", **{**defaults, **fields}))  # type: ignore[arg-type]


def test_a_falling_loss_keeps_the_rate_and_a_flat_one_halves_it_at_most_five_times() -> None:
    rate = plateau()
    step = 0
    for step in range(200):
        rate.observe(step, 10 * 0.97**step)
    assert rate.at(step) == 1.0
    flat = 10 * 0.97**step
    rates = []
    for step in range(200, 500):
        rate.observe(step, flat)
        rates.append(rate.at(step + 1))
    assert sorted(set(rates), reverse=True) == [1.0, 0.5, 0.25, 0.125, 0.0625, 0.03125]
    first_half = rates.index(0.5)
    assert rates.index(0.25) - first_half == 20, "the patience starts anew after a halving"


def test_noise_below_the_threshold_is_no_progress() -> None:
    rate = plateau()
    for step in range(5, 60):
        rate.observe(step, 5.0 - 1e-4 * step)
    assert rate.halvings >= 1


def test_warm_up_losses_do_not_count() -> None:
    rate = plateau(warmup_steps=100)
    for step in range(100):
        rate.observe(step, 1.0)
    assert rate.halvings == 0 and rate.state_dict()["observed"] == 0


def test_the_plateau_state_resumes_exactly() -> None:
    generator = torch.Generator().manual_seed(0)
    losses = (3 + torch.rand(300, generator=generator)).tolist()
    straight, first = plateau(), plateau()
    for step, loss in enumerate(losses):
        straight.observe(step, loss)
        if step < 150:
            first.observe(step, loss)
    import json

    second = plateau()
    second.load_state_dict(json.loads(json.dumps(first.state_dict())))
    for step in range(150, 300):
        second.observe(step, losses[step])
    assert second.state_dict() == straight.state_dict()
    assert straight.halvings > 0
    fresh = plateau()
    fresh.load_state_dict(json.loads(json.dumps(plateau().state_dict())))
    fresh.observe(5, 1.0)
    fresh.observe(6, 1.0)
    assert math.isfinite(fresh.state_dict()["best"])


def test_one_lucky_batch_after_the_warm_up_is_no_record() -> None:
    rate = plateau(plateau_smoothing=0.99, plateau_patience=300, plateau_threshold=1e-3, warmup_steps=0)
    for step in range(3000):
        rate.observe(step, 3.0 if step == 0 else 4.0 - 1e-4 * step)
    assert rate.halvings == 0


@pytest.mark.parametrize("schedule", ["constant", "plateau"])
def test_halving_by_hand_takes_over_from_the_plateau_rule(schedule: str) -> None:
    fields = {"lr": 1.0, "warmup_steps": 10, "plateau_patience": 3, "plateau_smoothing": 0.0, "plateau_threshold": 0.5}
    rate = LearningRate(OptimConfig(schedule=schedule, halve_at=(20, 30, 30), **fields))
    rates = []
    for step in range(40):
        rates.append(rate.at(step))
        rate.observe(step, 1.0)  # a plateau from the beginning
    assert rates[9:20] == [1.0] * 11 and rates[20:30] == [0.5] * 10 and rates[30:] == [0.125] * 10


def test_a_run_resumed_with_halvings_by_hand_keeps_those_made_before() -> None:
    fields = {"lr": 1.0, "warmup_steps": 0, "plateau_patience": 3, "plateau_smoothing": 0.0, "schedule": "plateau"}
    before = LearningRate(OptimConfig(**fields))
    for step in range(6):
        before.observe(step, 1.0)
    assert before.at(6) == 0.5
    after = LearningRate(OptimConfig(halve_at=(8,), **fields))
    after.load_state_dict(before.state_dict())
    for step in range(6, 20):
        after.observe(step, 1.0)
    assert [after.at(step) for step in (7, 8, 19)] == [0.5, 0.25, 0.25]


def test_halving_by_hand_works_on_a_cosine_and_not_in_the_warm_up() -> None:
    cosine = OptimConfig(lr=1.0, schedule="cosine", warmup_steps=10, decay_steps=30)
    by_hand = OptimConfig(lr=1.0, schedule="cosine", warmup_steps=10, decay_steps=30, halve_at=(20,))
    assert LearningRate(by_hand).at(25) == LearningRate(cosine).at(25) / 2
    with pytest.raises(ConfigError, match=r"optim.halve_at has update 5, which lies in the warm-up"):
        OptimConfig(warmup_steps=10, halve_at=(5,))
