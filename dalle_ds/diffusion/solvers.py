"""`diffusers`' solvers of the probability-flow equation, on a schedule and a grid of ours."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

from torch import Tensor

from dalle_ds.diffusion.schedules import NoiseSchedule, Prediction
from dalle_ds.errors import ConfigError

_PREDICTIONS: dict[Prediction, str] = {"epsilon": "epsilon", "x0": "sample", "v": "v_prediction"}


def dpm_solver(
    schedule: NoiseSchedule, grid: Sequence[int], predicts: Prediction = "x0", order: int = 2
) -> Callable[[Tensor, Tensor], Tensor]:
    """DPM-Solver++ (Lu et al. 2022), multistep and deterministic: few steps do.

    Args:
        schedule: the one of training.
        grid: timesteps visited, as `step_grid` makes them.
        order: 1 (which is DDIM), 2 or 3.

    Returns:
        (what the model predicts, x_t) → x of the grid's next timestep. To be called once for each, the noisiest first; it
        remembers its last steps, so every batch needs a new one.

    Raises:
        ConfigError: `diffusers` is not installed.
    """
    try:
        from diffusers import DPMSolverMultistepScheduler
    except ImportError as error:
        raise ConfigError("the method dpm is diffusers': pip install 'dalle_ds[unclip]'") from error
    solver: Any = DPMSolverMultistepScheduler(
        len(schedule),
        trained_betas=schedule.betas.tolist(),
        solver_order=order,
        prediction_type=_PREDICTIONS[predicts],
        algorithm_type="dpmsolver++",
        final_sigmas_type="zero",
    )
    solver.set_timesteps(timesteps=list(reversed(grid)))
    left = iter(solver.timesteps)

    def step(predicted: Tensor, x: Tensor) -> Tensor:
        following: Tensor = solver.step(predicted, next(left), x).prev_sample
        return following

    return step
