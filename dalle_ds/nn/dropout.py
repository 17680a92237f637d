"""Dropout whose noise belongs to a sample and a place in the model, not to a process."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from dalle_ds.parallel import TensorGroup

_ODD = 0x9E3779B97F4A7C15
"""Spreads the numbers of blocks over 64 bits."""


def dropout(x: Tensor, seeds: Tensor, block: int, rate: float, tensor: TensorGroup) -> Tensor:
    """`x` with elements set to 0 at random, and the rest divided by 1 − rate.

    What is dropped of a sample depends on its seed and the block alone. Noise drawn from one stream per process would change
    with the number of processes and the micro-batch; and the processes of a tensor group, which all hold the same
    residual stream, or positions of the same one, would each drop something else of it. Nothing is kept for the backward
    pass, nor must a random state be restored where activations are computed again.

    Args:
        x: (B, n, width), a branch's output, or this process's positions of it.
        seeds: (B,) int64.
        block: the residual block's number.
        rate: in [0, 1).
        tensor: the group that may divide positions.

    Returns:
        The same shape and dtype.
    """
    return _Dropout.apply(x, seeds, block, rate, tensor)


class _Dropout(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, seeds: Tensor, block: int, rate: float, tensor: TensorGroup) -> Tensor:
        ctx.save_for_backward(seeds)
        ctx.settings = block, rate, tensor
        return _dropped(x, seeds, block, rate, tensor)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor | None, ...]:
        (seeds,) = ctx.saved_tensors
        return _dropped(gradient, seeds, *ctx.settings), None, None, None, None


def _dropped(x: Tensor, seeds: Tensor, block: int, rate: float, tensor: TensorGroup) -> Tensor:
    divided = tensor.sequence and tensor.size > 1
    own = slice(tensor.rank * x.shape[1], (tensor.rank + 1) * x.shape[1]) if divided else slice(None)
    noise = torch.empty(x.shape[1] * (tensor.size if divided else 1), x.shape[2], device=x.device)
    generator = torch.Generator(device=x.device)
    out = torch.empty_like(x)
    for row, into, seed in zip(x, out, seeds.tolist(), strict=True):
        generator.manual_seed((seed ^ (block + 1) * _ODD) % 2**63)
        torch.mul(row, noise.bernoulli_(1 - rate, generator=generator)[own].to(x.dtype), out=into)
    return out.mul_(1 / (1 - rate))
