"""What training minimizes."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from dalle_ds.diffusion.schedules import NoiseSchedule, Prediction
from dalle_ds.diffusion.steps import learned_log_variance, posterior_mean
from dalle_ds.errors import ConfigError


def simple_loss(output: Tensor, target: Tensor) -> Tensor:
    """(B,) mean squared error of each row, fp32; both (B, …) of one shape."""
    return (output.float() - target.float()).square().flatten(1).mean(dim=1)


def hybrid_loss(
    schedule: NoiseSchedule,
    predicts: Prediction,
    output: Tensor,
    x0: Tensor,
    noise: Tensor,
    step: Tensor,
    levels: int | None,
) -> tuple[Tensor, Tensor]:
    """The simple loss and the variational term of a learned variance (Nichol and Dhariwal 2021, eq. 16).

    The mean's gradient comes from the first, the variance's from the second, whose mean is detached. The second is scaled by
    T/1000, and its share λ is for the caller.

    Args:
        output: (B, 2C, …): prediction, then what `learned_log_variance` takes.
        x0, noise: (B, C, …).
        step: (B,) int64.
        levels: of images in [−1, 1] with as many levels, whose first step is a discretized Gaussian; None for
            data that is continuous.

    Returns:
        (B,) and (B,), fp32: mean squared error, and bits per element · T/1000.

    Raises:
        ConfigError: outputs with another number of channels.
    """
    channels = x0.shape[1]
    if output.shape[1] != 2 * channels:
        raise ConfigError(f"a learned variance needs {2 * channels} channels of output, found {output.shape[1]}")
    output, x0, noise = output.float(), x0.float(), noise.float()
    prediction, raw = output[:, :channels], output[:, channels:]
    simple = simple_loss(prediction, schedule.target(predicts, x0, noise, step))
    x = schedule.add_noise(x0, noise, step)
    seen = schedule.x0_of(predicts, prediction.detach(), x, step)
    mean, log_variance = posterior_mean(schedule, step, x, seen), learned_log_variance(schedule, step, raw)
    true_mean = posterior_mean(schedule, step, x, x0)
    true_log_variance = learned_log_variance(schedule, step, torch.full_like(raw, -1.0))
    divergence = 0.5 * (
        log_variance
        - true_log_variance
        + (true_log_variance - log_variance).exp()
        + (true_mean - mean).square() * (-log_variance).exp()
        - 1
    )
    first = (step == 0).reshape(-1, *[1] * (x0.dim() - 1))
    at_data = discretized_nll(x0, mean, log_variance, levels) if levels else gaussian_nll(x0, mean, log_variance)
    bits = torch.where(first, at_data, divergence) / math.log(2)
    return simple, bits.flatten(1).mean(dim=1) * len(schedule) / 1000


def gaussian_nll(x0: Tensor, mean: Tensor, log_variance: Tensor) -> Tensor:
    """−log density of each element, nats."""
    return 0.5 * (math.log(2 * math.pi) + log_variance + (x0 - mean).square() * (-log_variance).exp())


def discretized_nll(x0: Tensor, mean: Tensor, log_variance: Tensor, levels: int) -> Tensor:
    """−log probability of each element's level, of `levels` evenly spaced ones in [−1, 1], nats; the outermost two reach to
    infinity (Ho et al. 2020, eq. 13)."""
    half = 1 / (levels - 1)
    deviations = (-0.5 * log_variance).exp()
    above, below = (x0 + half - mean) * deviations, (x0 - half - mean) * deviations
    # log of Φ(above) − Φ(below), on the side where both are small, so that the difference keeps its digits
    flip = below > 0
    high, low = torch.where(flip, -below, above), torch.where(flip, -above, below)
    log_high, log_low = torch.special.log_ndtr(high), torch.special.log_ndtr(low)
    inside = log_high + torch.log1p(-(log_low - log_high).exp().clamp(max=1 - 1e-6))
    edge_low = torch.special.log_ndtr(above)
    edge_high = torch.special.log_ndtr(-below)
    inside = torch.where(x0 < -1 + half, edge_low, inside)
    return -torch.where(x0 > 1 - half, edge_high, inside)
