"""Gumbel noise that belongs to a sample, not to a process."""

from __future__ import annotations

import torch
from torch import Tensor


def gumbel_noise(seeds: Tensor, shape: tuple[int, ...], device: torch.device | str = "cpu") -> Tensor:
    """Standard Gumbel noise (len(seeds), *shape), fp32; row i depends on `seeds[i]` alone.

    Noise drawn from one stream per process would change with the number of processes and the micro-batch; drawn from the
    samples' own seeds, every layout trains on the same numbers.

    Args:
        seeds: (B,) int64.
    """
    noise = torch.empty((len(seeds), *shape), device=device)
    if not noise.is_meta:
        generator = torch.Generator(device=device)
        for row, seed in zip(noise, seeds.tolist(), strict=True):
            generator.manual_seed(seed)
            row.exponential_(generator=generator)
    # −ln of a standard exponential is standard Gumbel; the floor keeps a drawn 0 finite.
    return -torch.log(noise.clamp_min(1e-30))
