"""Analytic-DPM (Bao et al. 2022): the reverse variance that is optimal given the model's mean.

Step n's depends on one number, Γ_n = E ‖∇ log q_n(x_n)‖² / d, which is measured on training data once the model is trained.
"""

from __future__ import annotations

import torch
from torch import Tensor

from dalle_ds.diffusion.schedules import NoiseSchedule
from dalle_ds.errors import ConfigError


class ScoreMoments:
    """Running sums of ‖score‖² / d for each step of a grid; sums of several processes add up.

    Args:
        schedule: the grid's, as `NoiseSchedule.on` makes it.
    """

    def __init__(self, schedule: NoiseSchedule) -> None:
        self.schedule = schedule
        self.sums = torch.zeros(3, len(schedule), dtype=torch.float64)
        """(3, N): how many rows, the sum of their values and of the values' squares; what processes sum over."""

    def add(self, step: int | Tensor, x: Tensor, x0: Tensor) -> None:
        """Count rows: x (B, …) noised training data at `step`, x0 (B, …) what the model makes of it, unclipped."""
        schedule = self.schedule
        root, rest = schedule.alpha_bars.sqrt(), 1 - schedule.alpha_bars
        score = (schedule.at(root, step, x) * x0 - x) / schedule.at(rest, step, x)
        values = score.flatten(1).double().square().mean(dim=1).cpu()
        steps = torch.as_tensor(step).cpu().expand(len(values))
        self.sums.index_add_(1, steps, torch.stack([torch.ones_like(values), values, values.square()]))

    def mean(self) -> tuple[Tensor, Tensor]:
        """(N,) Γ and (N,) its standard error, float64.

        Raises:
            ConfigError: a step with fewer than two rows.
        """
        count, total, squares = self.sums
        if bool((count < 2).any()):
            raise ConfigError(
                f"steps {(count < 2).nonzero().flatten().tolist()} have fewer than two rows to measure Γ on"
            )
        mean = total / count
        spread = (squares / count - mean.square()).clamp(min=0) * count / (count - 1)
        return mean, (spread / count).sqrt()


class AnalyticVariance:
    """Reverse variances of a sampler's grid (Bao et al. 2022, Theorem 1 with the bound of its Theorem 2).

    Γ gives the mean variance of x₀ given x_n, Cov = (1 − ᾱ)/ᾱ · (1 − (1 − ᾱ) Γ), which is kept in [0, `data_variance`]:
    nothing can be less certain than the data itself. (The reference keeps it in [0, 1], which holds for pixels only.)

    Args:
        schedule: the grid's.
        gamma: (N,) Γ of each step, as `ScoreMoments.mean` gives it.
        data_variance: mean variance of the data's elements.
    """

    def __init__(self, schedule: NoiseSchedule, gamma: Tensor, data_variance: float) -> None:
        if len(gamma) != len(schedule):
            raise ConfigError(
                f"Γ was measured on {len(gamma)} steps, the sampler's grid has {len(schedule)}: measure it on that grid"
            )
        self.gamma, self.data_variance = gamma.double(), data_variance
        rest = 1 - schedule.alpha_bars
        covariance = (rest / schedule.alpha_bars * (1 - rest * self.gamma)).clamp(0, data_variance)
        self._schedule, self._covariance = schedule, covariance

    def ddpm(self) -> Tensor:
        """(N,) σ² of each `ddpm_step`."""
        previous = self._schedule.previous_alpha_bars
        of_x0 = previous.sqrt() * self._schedule.betas / (1 - self._schedule.alpha_bars)
        return self._schedule.posterior_variances + of_x0.square() * self._covariance
