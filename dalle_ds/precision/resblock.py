"""Arithmetic of a residual block whose branch runs in 16 bits (DALL·E §2.4, Fig. 4).

The identity path is fp32, activations and gradients alike; so are all parameters, and the layer normalization that a
branch begins with. Between `enter_branch` and `join_branch` everything is 16-bit, and gradients are multiplied by the
block's factor:

    x ──────────────────────────────────────────────(+)──▶        backward, from right to left:
    │                                                │             join:    g · factor, cast to 16 bits
    └─▶ norm ─▶ enter ─▶ linear ─▶ … ─▶ linear ─▶ join             linear:  weight gradients cast to fp32, / factor
         fp32    16-bit                                            enter:   cast to fp32, Inf and NaN → 0, / factor

The filter in `enter_branch` keeps what overflows in one block from reaching the blocks before it. The block's own weight
gradients are not filtered: that they are not finite is how the block is found out, after they have been averaged over
the processes (`GradientScales`).
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable


@dataclass(frozen=True)
class BranchPrecision:
    """How one block's branch computes."""

    dtype: torch.dtype
    """Of its activations and their gradients."""
    factor: Tensor
    """(1,) fp32, what gradients inside are multiplied by; its owner may change the value between updates."""


def enter_branch(x: Tensor, precision: BranchPrecision) -> Tensor:
    """Into the branch: `x` in the branch's dtype.

    Its gradient leaves the branch in fp32, divided by the factor, with 0 in place of what is not finite.
    """
    return _Enter.apply(x, precision)


def branch_linear(
    x: Tensor, weight: Tensor, bias: Tensor | None, precision: BranchPrecision, *, input_major: bool = False
) -> Tensor:
    """x · weightᵀ + bias inside the branch.

    Args:
        x: (…, inputs) in the branch's dtype.
        weight: (outputs, inputs) fp32; bias: (outputs,) fp32. Their gradients are fp32, without the factor; that of the
            weight comes from a 16-bit product, that of the bias is summed in fp32.
        input_major: the weight is (inputs, outputs).

    Returns:
        (…, outputs) in the branch's dtype.
    """
    return _Linear.apply(x, weight, bias, precision, input_major)


def branch_bias(x: Tensor, bias: Tensor, precision: BranchPrecision) -> Tensor:
    """x + bias inside the branch, for a product that had none; gradients as those of `branch_linear`."""
    return _Bias.apply(x, bias, precision)


def join_branch(x: Tensor, branch: Tensor, precision: BranchPrecision) -> Tensor:
    """x + branch: out of the branch, whose gradient enters it multiplied by the factor and cast to 16 bits.

    Args:
        x: fp32, the identity path.
        branch: of the same shape, in the branch's dtype.

    Returns:
        The sum, fp32.
    """
    return _Join.apply(x, branch, precision)


class _Enter(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, precision: BranchPrecision) -> Tensor:
        ctx.precision = precision
        return x.to(precision.dtype)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, None]:
        filtered = gradient.nan_to_num(nan=0.0, posinf=0.0, neginf=0.0)
        return _unscaled(filtered, ctx.precision), None


class _Linear(torch.autograd.Function):
    # Written out because autograd would keep the 16-bit copy of every weight until the backward pass: a whole model that
    # ZeRO-3 had just split. The fp32 parameter itself costs nothing to keep, and ZeRO-3 brings it back when it is needed.

    @staticmethod
    def forward(
        ctx: Any, x: Tensor, weight: Tensor, bias: Tensor | None, precision: BranchPrecision, input_major: bool
    ) -> Tensor:
        ctx.save_for_backward(x, weight)
        ctx.precision, ctx.input_major = precision, input_major
        dtype = precision.dtype
        matrix = weight.to(dtype) if input_major else weight.to(dtype).t()
        rows = x.flatten(0, -2)
        product = rows @ matrix if bias is None else torch.addmm(bias.to(dtype), rows, matrix)
        return product.view(*x.shape[:-1], matrix.shape[1])

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor | None, ...]:
        x, weight = ctx.saved_tensors
        precision: BranchPrecision = ctx.precision
        of_x, of_weight, of_bias, *_ = ctx.needs_input_grad
        rows, inputs = gradient.flatten(0, -2), x.flatten(0, -2)
        d_x = d_weight = None
        if of_x:
            matrix = weight.to(precision.dtype)
            d_x = (rows @ (matrix.t() if ctx.input_major else matrix)).view(x.shape)
        if of_weight:
            d_weight = _unscaled(inputs.t() @ rows if ctx.input_major else rows.t() @ inputs, precision)
        d_bias = _summed(rows, precision) if of_bias else None
        return d_x, d_weight, d_bias, None, None


class _Bias(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, bias: Tensor, precision: BranchPrecision) -> Tensor:
        ctx.precision = precision
        return x + bias.to(precision.dtype)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, Tensor, None]:
        return gradient, _summed(gradient.flatten(0, -2), ctx.precision), None


class _Join(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, branch: Tensor, precision: BranchPrecision) -> Tensor:
        ctx.precision = precision
        return x + branch

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, Tensor, None]:
        precision: BranchPrecision = ctx.precision
        return gradient, (gradient * precision.factor).to(precision.dtype), None


def _unscaled(gradient: Tensor, precision: BranchPrecision) -> Tensor:
    # A factor of shape (1,), not (), makes the division one of fp32 numbers.
    return gradient / precision.factor


def _summed(rows: Tensor, precision: BranchPrecision) -> Tensor:
    """Gradient of a bias."""
    return rows.sum(0, dtype=torch.float32).div_(precision.factor)
