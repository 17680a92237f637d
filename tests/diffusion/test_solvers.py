"""`diffusers`' solver on our schedules: its first order is our DDIM, its second is nearer to the exact solution."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from dalle_ds.config import PriorConfig
from dalle_ds.diffusion import ddim_step, dpm_solver, noise_schedule, step_grid
from dalle_ds.diffusion.schedules import Prediction
from dalle_ds.models.prior import Caption, DiffusionPrior
from dalle_ds.sampling.prior import PriorSampling, denoise

pytest.importorskip("diffusers")
SCHEDULE, VARIANCE = noise_schedule("cosine"), 0.29


def solved(x: Tensor, steps: int, order: int) -> tuple[Tensor, Tensor, Tensor]:
    """What the solver, DDIM and the exact solution make of noise, where data are normal and the model knows all of them."""
    places = step_grid(str(steps), len(SCHEDULE))
    grid, solver, by_ddim = SCHEDULE.on(places), dpm_solver(SCHEDULE, places, order=order), x
    found = x.clone()
    for step in reversed(range(len(grid))):
        a = float(grid.alpha_bars[step])
        shrunk = a**0.5 * VARIANCE / (a * VARIANCE + 1 - a)
        found, by_ddim = solver(shrunk * found, found), ddim_step(grid, step, by_ddim, shrunk * by_ddim, 0.0)
    last = float(grid.alpha_bars[-1])
    return found, by_ddim, x * (VARIANCE / (last * VARIANCE + 1 - last)) ** 0.5


def test_its_first_order_is_ddim() -> None:
    found, by_ddim, _ = solved(torch.randn(3, 7, generator=torch.Generator().manual_seed(0)), 15, 1)
    torch.testing.assert_close(found, by_ddim, rtol=1e-4, atol=1e-4)


def test_its_second_order_is_nearer_to_the_exact_solution() -> None:
    found, by_ddim, exact = solved(torch.randn(3, 7, generator=torch.Generator().manual_seed(0)), 64, 2)
    assert (found - exact).abs().max() < 0.5 * (by_ddim - exact).abs().max()


@pytest.mark.parametrize("predicts", ["epsilon", "x0", "v"])
def test_what_the_model_predicts_makes_no_difference(predicts: Prediction) -> None:
    places = step_grid("6", len(SCHEDULE) - 40)  # at the very end, x says nothing of x0
    grid, found, of_x0 = SCHEDULE.on(places), torch.full((2, 3), 0.7), torch.full((2, 3), 0.7)
    solver, plain = dpm_solver(SCHEDULE, places, predicts), dpm_solver(SCHEDULE, places)
    for step in reversed(range(len(grid))):
        a = float(grid.alpha_bars[step])
        epsilon = (found - a**0.5 * found / 2) / (1 - a) ** 0.5
        predicted = {"epsilon": epsilon, "x0": found / 2, "v": a**0.5 * epsilon - (1 - a) ** 0.5 * found / 2}[predicts]
        found, of_x0 = solver(predicted, found), plain(of_x0 / 2, of_x0)
    torch.testing.assert_close(found, of_x0, rtol=1e-3, atol=1e-3)


@torch.no_grad()
def test_priors_are_sampled_with_it() -> None:
    torch.manual_seed(0)
    prior = DiffusionPrior(PriorConfig(width=32, depth=2, heads=4, text_len=5, embed_dim=6, text_vocab=30)).eval()
    caption, noise = Caption(torch.randint(30, (2, 5)), torch.randn(2, 6)), torch.randn(2, 3, 9, 6)
    found = denoise(prior, caption, noise, SCHEDULE, PriorSampling(method="dpm", steps="8"))
    places, x = step_grid("8", len(SCHEDULE)), noise[:, :, 0]
    solver = dpm_solver(SCHEDULE, places)
    for place in reversed(places):
        x = solver(prior(caption, x, torch.full((2, 3), place)), x)
    torch.testing.assert_close(found, x, rtol=1e-4, atol=1e-4)
