"""The forward process q(x_t | x₀) = N(√ᾱ_t x₀, 1 − ᾱ_t), on all timesteps or on a grid of them."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from itertools import pairwise
from typing import Literal, get_args

import torch
from torch import Tensor

from dalle_ds.errors import ConfigError

Prediction = Literal["epsilon", "x0", "v"]
"""What a model's output is: the noise ε, the clean x₀, or v = √ᾱ ε − √(1 − ᾱ) x₀ (Salimans and Ho 2022)."""
ScheduleName = Literal["cosine", "linear"]


@dataclass(frozen=True, eq=False)
class NoiseSchedule:
    """ᾱ at N timesteps, the first the least noisy.

    Steps of a sampler are numbered 0 … N − 1 by their place on the grid; the model is told `timesteps[step]`. Where a method
    takes `step`, it is one number or (B,) int64, one for each row of x.

    Args:
        alpha_bars: (N,) float64, in (0, 1), falling.
        timesteps: (N,) int64, rising: the places of these in the schedule the model is trained on.
    """

    alpha_bars: Tensor
    timesteps: Tensor

    def __post_init__(self) -> None:
        falls = bool((self.alpha_bars[1:] < self.alpha_bars[:-1]).all())
        if not len(self.alpha_bars) or not falls or not self.alpha_bars[-1] > 0 or not self.alpha_bars[0] < 1:
            raise ConfigError("a noise schedule needs alpha_bars that fall strictly and lie in (0, 1)")

    def __len__(self) -> int:
        return len(self.alpha_bars)

    @cached_property
    def previous_alpha_bars(self) -> Tensor:
        """(N,) ᾱ of the next less noisy step of the grid; 1 for the first, whose next is x₀ itself."""
        return torch.cat([self.alpha_bars.new_ones(1), self.alpha_bars[:-1]])

    @cached_property
    def betas(self) -> Tensor:
        """(N,) β = 1 − ᾱ_t / ᾱ_{t−1}, between neighbours of the grid."""
        return 1 - self.alpha_bars / self.previous_alpha_bars

    @cached_property
    def posterior_variances(self) -> Tensor:
        """(N,) β̃, the variance of q(x_{t−1} | x_t, x₀); 0 for the first step."""
        return self.betas * (1 - self.previous_alpha_bars) / (1 - self.alpha_bars)

    def on(self, grid: Sequence[int]) -> NoiseSchedule:
        """The same process on some of its timesteps.

        Args:
            grid: places in this schedule, rising, as `step_grid` makes them.

        Raises:
            ConfigError: none, not rising, or beyond the schedule.
        """
        rising = all(a < b for a, b in pairwise(grid))
        if not len(grid) or not rising or grid[0] < 0 or grid[-1] >= len(self):
            raise ConfigError(
                f"a grid must be timesteps from 0 to {len(self) - 1} that rise strictly, found {list(grid)}"
            )
        places = torch.as_tensor(grid)
        return NoiseSchedule(self.alpha_bars[places], self.timesteps[places])

    def at(self, table: Tensor, step: int | Tensor, like: Tensor) -> Tensor:
        """Entries of a float64 `table` for `step`, in the dtype of `like` and broadcasting against it."""
        values = table.to(like.device)[step].to(like.dtype)
        return values.reshape(values.shape + (1,) * (like.dim() - values.dim()))

    def add_noise(self, x0: Tensor, noise: Tensor, step: int | Tensor) -> Tensor:
        """x_t = √ᾱ x₀ + √(1 − ᾱ) ε, of the shape of x0 and noise (B, …)."""
        return self._root(step, x0) * x0 + self._root_rest(step, x0) * noise

    def target(self, predicts: Prediction, x0: Tensor, noise: Tensor, step: int | Tensor) -> Tensor:
        """What the model's output should be, of the shape of x0 and noise (B, …)."""
        if predicts == "x0":
            return x0
        return noise if predicts == "epsilon" else self._root(step, x0) * noise - self._root_rest(step, x0) * x0

    def x0_of(self, predicts: Prediction, output: Tensor, x: Tensor, step: int | Tensor) -> Tensor:
        """The clean x₀ that an output means at x_t = x; all (B, …).

        Raises:
            ConfigError: an unknown kind of prediction.
        """
        if predicts not in get_args(Prediction):
            raise ConfigError(f"predicts must be one of {', '.join(get_args(Prediction))}, found {predicts!r}")
        if predicts == "x0":
            return output
        root, rest = self._root(step, x), self._root_rest(step, x)
        return (x - rest * output) / root if predicts == "epsilon" else root * x - rest * output

    def epsilon_of(self, x0: Tensor, x: Tensor, step: int | Tensor) -> Tensor:
        """The noise that leads from x₀ to x_t = x; all (B, …)."""
        return (x - self._root(step, x) * x0) / self._root_rest(step, x)

    def _root(self, step: int | Tensor, like: Tensor) -> Tensor:
        return self.at(self.alpha_bars.sqrt(), step, like)

    def _root_rest(self, step: int | Tensor, like: Tensor) -> Tensor:
        return self.at((1 - self.alpha_bars).sqrt(), step, like)


def noise_schedule(name: ScheduleName, steps: int = 1000) -> NoiseSchedule:
    """The schedules of unCLIP's Table 3.

    `cosine`: ᾱ(t) = cos²((t + 0.008) / 1.008 · π/2), β at most 0.999 (Nichol and Dhariwal 2021). `linear`: β from
    1e-4 · 1000/T to 0.02 · 1000/T (Ho et al. 2020).

    Raises:
        ConfigError: an unknown name, or too few steps: `linear` needs more than 20 for β < 1.
    """
    if steps < 1:
        raise ConfigError(f"a noise schedule needs at least 1 step, found {steps}")
    if name == "cosine":
        shares = torch.arange(steps + 1, dtype=torch.float64, device="cpu") / steps
        ideal = torch.cos((shares + 0.008) / 1.008 * math.pi / 2).square()
        betas = (1 - ideal[1:] / ideal[:-1]).clamp(max=0.999)
    elif name == "linear":
        if steps <= 20:
            raise ConfigError(
                f"the linear schedule's last beta, 20 / steps, must be below 1: {steps} steps are too few"
            )
        betas = torch.linspace(0.1 / steps, 20 / steps, steps, dtype=torch.float64, device="cpu")
    else:
        raise ConfigError(f"the noise schedule must be one of {', '.join(get_args(ScheduleName))}, found {name!r}")
    return NoiseSchedule(torch.cumprod(1 - betas, 0), torch.arange(steps, device="cpu"))
