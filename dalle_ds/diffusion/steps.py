"""One step of a sampler, from x_t to the next less noisy x of the grid (or, for inversion, the next noisier one).

A step takes x₀ as the model sees it (`NoiseSchedule.x0_of`), clipped or not; all tensors are (B, …) of one shape. At the
first step of the grid each returns x₀ itself, up to the variance that is asked for.
"""

from __future__ import annotations

import torch
from torch import Tensor

from dalle_ds.diffusion.schedules import NoiseSchedule
from dalle_ds.errors import ConfigError


def guide(conditional: Tensor, unconditional: Tensor, guidance: float, channels: int | None = None) -> Tensor:
    """Classifier-free guidance: ∅ + s (c − ∅) (Ho and Salimans 2022).

    Args:
        channels: how many channels (axis 1) are predictions; those behind them are a learned variance, and stay the
            conditional ones. None: all are predictions.
    """
    guided = unconditional + guidance * (conditional - unconditional)
    if channels is None or channels == conditional.shape[1]:
        return guided
    return torch.cat([guided[:, :channels], conditional[:, channels:]], dim=1)


def clip_x0(x0: Tensor, bound: float | None = None, quantile: float | None = None) -> Tensor:
    """x₀ kept within what data can be.

    Args:
        bound: static: to [−bound, bound]. None leaves x0 as it is.
        quantile: dynamic (Imagen §2.3): each row's bound is this quantile of its |x₀|, at least `bound`, and the row is scaled
            back into [−bound, bound].

    Raises:
        ConfigError: `quantile` without `bound`.
    """
    if bound is None:
        if quantile is not None:
            raise ConfigError("dynamic thresholding needs the bound that values are scaled back into")
        return x0
    if quantile is None:
        return x0.clamp(-bound, bound)
    reach = torch.quantile(x0.flatten(1).abs().float(), quantile, dim=1).clamp(min=bound).to(x0.dtype)
    reach = reach.reshape(-1, *[1] * (x0.dim() - 1))
    return torch.maximum(torch.minimum(x0, reach), -reach) * (bound / reach)


def posterior_mean(schedule: NoiseSchedule, step: int | Tensor, x: Tensor, x0: Tensor) -> Tensor:
    """Mean of q(x_{t−1} | x_t, x₀)."""
    previous, betas, rest = schedule.previous_alpha_bars, schedule.betas, 1 - schedule.alpha_bars
    of_x0 = schedule.at(previous.sqrt() * betas / rest, step, x)
    of_x = schedule.at((1 - betas).sqrt() * (1 - previous) / rest, step, x)
    return of_x0 * x0 + of_x * x


def learned_log_variance(schedule: NoiseSchedule, step: int | Tensor, output: Tensor) -> Tensor:
    """log σ² between log β̃ and log β, by what a model gives for it (Nichol and Dhariwal 2021): output −1 is β̃, 1 is β.

    Outputs beyond count as −1 or 1, since the best variance never lies there; their gradients pass, and lead back.
    The first step's β̃ is 0; the second's stands in for it, and β where the grid has one step only.
    """
    smallest = schedule.posterior_variances.clone()
    smallest[0] = smallest[1] if len(schedule) > 1 else schedule.betas[0]
    low, high = schedule.at(smallest.log(), step, output), schedule.at(schedule.betas.log(), step, output)
    share = (output + 1) / 2
    share = share + (share.clamp(0, 1) - share).detach()
    return share * high + (1 - share) * low


def ddpm_step(
    schedule: NoiseSchedule, step: int, x: Tensor, x0: Tensor, noise: Tensor, variance: Tensor | None = None
) -> Tensor:
    """Ancestral sampling (Ho et al. 2020).

    Args:
        noise: N(0, 1), not used at step 0.
        variance: of the reverse step, () or broadcasting against x: a learned one, or Analytic-DPM's; None is β̃.
    """
    mean = posterior_mean(schedule, step, x, x0)
    if step == 0:
        return mean
    if variance is None:
        variance = schedule.at(schedule.posterior_variances, step, x)
    return mean + variance.to(x).sqrt() * noise


def ddim_step(
    schedule: NoiseSchedule, step: int, x: Tensor, x0: Tensor, eta: float = 0.0, noise: Tensor | None = None
) -> Tensor:
    """DDIM (Song et al. 2021): deterministic at η = 0, the variance of DDPM at η = 1.

    Raises:
        ConfigError: η > 0 without noise.
    """
    if eta and noise is None:
        raise ConfigError(f"DDIM with eta={eta} needs noise")
    previous = schedule.previous_alpha_bars
    variance = eta**2 * schedule.posterior_variances
    mean = schedule.at(previous.sqrt(), step, x) * x0
    mean = mean + schedule.at((1 - previous - variance).clamp(min=0).sqrt(), step, x) * schedule.epsilon_of(x0, x, step)
    return mean if noise is None or not eta else mean + schedule.at(variance.sqrt(), step, x) * noise


def ddim_inversion_step(schedule: NoiseSchedule, step: int, x: Tensor, epsilon: Tensor) -> Tensor:
    """From x one step less noisy (the data itself for step 0) to x at `step`: the inverse of `ddim_step` at η = 0 under the
    same ε (DDIM §4.3, unCLIP §3).

    Args:
        epsilon: as the model sees it at x (plain inversion), or at what this function returned before (fixed-point iteration).
    """
    alpha_bar, previous = schedule.alpha_bars, schedule.previous_alpha_bars
    shrink = (alpha_bar / previous).sqrt()
    return (
        schedule.at(shrink, step, x) * x
        + schedule.at((1 - alpha_bar).sqrt() - shrink * (1 - previous).sqrt(), step, x) * epsilon
    )
