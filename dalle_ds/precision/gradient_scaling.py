"""One gradient scale per residual block, and the block's arithmetic in 16 bits between scaling and unscaling (DALL·E §2.4).

The branch of a block runs in 16 bits (Fig. 4). The identity path is fp32, activations and gradients alike; so are all
parameters, and the layer normalization that a branch begins with. Between `enter_branch` and `join_branch` everything is
16-bit, and gradients are multiplied by the block's factor:

    x ──────────────────────────────────────────────(+)──▶        backward, from right to left:
    │                                                │             join:    g · factor, cast to 16 bits
    └─▶ norm ─▶ enter ─▶ linear ─▶ … ─▶ linear ─▶ join             linear:  weight gradients cast to fp32, / factor
         fp32    16-bit                                            enter:   cast to fp32, Inf and NaN → 0, / factor

The filter in `enter_branch` keeps what overflows in one block from reaching the blocks before it. The block's own weight
gradients are not filtered: that they are not finite is how the block is found out, after they have been averaged over
the processes (`GradientScales`).
"""

from __future__ import annotations

from collections.abc import Collection
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from dalle_ds.config import ScalingConfig


class GradientScales:
    """The scales of a model's residual blocks, and the rule by which they follow what fp16 can hold.

    A scale starts at M · 2^13. With every update that is made it grows by 2^(1/1000), except where the update found the
    block's parameter gradients not finite: then it is divided by √2, though not twice within 125 updates. It stays in
    [M · 2^7, M · 2^24]. M is the number of data-parallel processes. The rule is plain arithmetic on the host, the same on
    every process, since what it is told was agreed on by all.

    The paper divides the loss by the batch of all M processes and multiplies gradients by the scale. DeepSpeed's loss is
    the mean over one process's batch, M times as large, so that a block multiplies by `factors` = scale / M: inside the
    branch, where numbers are 16-bit, the same values. Outside, division by M is one of fp32 numbers and loses nothing.

    Two things the paper leaves open: on an update that is skipped no scale grows; the window is counted in updates,
    skipped ones included.

    Args:
        config: the constants.
        blocks: how many residual blocks there are.
        replicas: M.
        device: where the blocks compute.
    """

    def __init__(self, config: ScalingConfig, blocks: int, replicas: int, device: torch.device | str = "cpu") -> None:
        self.config = config
        self.replicas = replicas
        self.scales = [replicas * 2.0**config.initial_log2] * blocks
        self._updates = 0
        self._last_backoff: list[int | None] = [None] * blocks
        self.factors: Tensor = torch.empty(blocks, dtype=torch.float32, device=device)
        self._publish()

    def precision(self, block: int, dtype: torch.dtype) -> BranchPrecision:
        """What residual block number `block` computes with; follows this object's scales."""
        return BranchPrecision(dtype, self.factors[block : block + 1])

    def update(self, nonfinite: Collection[int], applied: bool) -> None:
        """Take note of one update.

        Args:
            nonfinite: the blocks, any of whose parameter gradients was not finite on any process.
            applied: whether the update was made, at least for the other blocks.
        """
        config = self.config
        for block, scale in enumerate(self.scales):
            if block in nonfinite:
                last = self._last_backoff[block]
                if last is None or self._updates - last >= config.window:
                    scale /= config.backoff
                    self._last_backoff[block] = self._updates
            elif applied:
                scale *= 2.0 ** (1 / config.doubling_updates)
            self.scales[block] = min(max(scale, self._lowest), self.replicas * 2.0**config.max_log2)
        self._updates += 1
        self._publish()

    def at_floor(self, block: int) -> bool:
        """Whether the block's scale cannot be lowered any more: what still overflows then, no scale will help."""
        return self.scales[block] <= self._lowest

    @property
    def _lowest(self) -> float:
        return self.replicas * 2.0**self.config.min_log2

    def metrics(self) -> dict[str, float]:
        """For the metrics: the scale of every block."""
        return {f"gradient_scale/{block}": scale for block, scale in enumerate(self.scales)}

    def state_dict(self) -> dict[str, Any]:
        """What a checkpoint keeps, JSON-able."""
        return {
            "replicas": self.replicas,
            "scales": list(self.scales),
            "updates": self._updates,
            "last_backoff": list(self._last_backoff),
        }

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Go on from `state_dict`, of as many processes or of others: scales are multiples of M."""
        self.scales = [scale * (self.replicas / state["replicas"]) for scale in state["scales"]]
        self._updates = state["updates"]
        self._last_backoff = list(state["last_backoff"])
        self._publish()

    def _publish(self) -> None:
        factors = torch.tensor([scale / self.replicas for scale in self.scales], dtype=torch.float32)
        self.factors.copy_(factors)


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
