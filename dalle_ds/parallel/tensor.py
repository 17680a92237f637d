"""Tensor parallelism: every layer's matrices are divided among a group of processes (Megatron-LM, arXiv 1909.08053).

A layer whose outputs are divided (column-parallel) is followed by one whose inputs are (row-parallel): between the two,
each process works on its own attention heads or hidden units, and nothing is communicated. The group meets twice per
residual block, at its entry and at its exit:

                    entry                          exit
    plain           forward  —                     forward  all-reduce
                    backward all-reduce            backward —
    `sequence`      forward  all-gather            forward  reduce-scatter      along positions
                    backward reduce-scatter        backward all-gather

With `sequence`, each process holds a run of the residual stream's positions only (arXiv 2205.05198). As many bytes cross,
and what lies outside of the branches is kept once in place of once per process. Gradients of the parameters that are used
there come from a part of the positions: such parameters are read through `shared`.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.autograd.function import once_differentiable

from dalle_ds.config import DalleConfig, LatentPriorConfig, PriorConfig
from dalle_ds.errors import ConfigError
from dalle_ds.meta_device import skipped


@dataclass(frozen=True)
class Split:
    """How one parameter is divided among the processes of a tensor group.

    `split_of` tells that of a parameter.
    """

    axis: int
    """The axis that is divided."""
    parts: int = 1
    """Equal parts that the axis consists of, each of which is divided by itself: 3 for fused queries, keys and values."""

    def cut(self, whole: Tensor, rank: int, size: int) -> Tensor:
        """What process `rank` of `size` holds of a whole parameter; a new tensor."""
        pieces = [part.chunk(size, self.axis)[rank] for part in whole.chunk(self.parts, self.axis)]
        return torch.cat(pieces, self.axis)

    def join(self, pieces: Sequence[Tensor]) -> Tensor:
        """The whole parameter from all processes' pieces, in the order of their ranks; a new tensor."""
        parts = [piece.chunk(self.parts, self.axis) for piece in pieces]
        return torch.cat([part[number] for number in range(self.parts) for part in parts], self.axis)


@dataclass(frozen=True)
class TensorGroup:
    """The processes that divide a model's layers, seen from one of them; of one process, it does nothing."""

    rank: int = 0
    """This process's number in the group."""
    size: int = 1
    """Processes in the group."""
    group: Any = None
    """Their process group; None stands for all processes."""
    sequence: bool = False
    """Whether the residual stream is divided by positions outside of the branches."""

    def divide(self, parameter: Tensor, split: Split) -> nn.Parameter:
        """This process's piece of a parameter, marked as such."""
        if self.size == 1:
            assert isinstance(parameter, nn.Parameter)
            return parameter
        piece = nn.Parameter(split.cut(parameter.detach(), self.rank, self.size), parameter.requires_grad)
        piece.tp_split = split  # type: ignore[attr-defined]
        # DeepSpeed counts the norms of parameters without these once for the whole group.
        piece.tensor_model_parallel = True  # type: ignore[attr-defined]
        piece.model_parallel = True  # type: ignore[attr-defined]
        return piece

    def check(self, model: DalleConfig | PriorConfig | LatentPriorConfig) -> None:
        """Raise a `ConfigError` where the group cannot divide a transformer."""
        for name in model.divided:
            count = getattr(model, name)
            if count % self.size:
                raise ConfigError(
                    f"model.{name}={count} cannot be divided among parallel.tensor={self.size} processes: set it to a "
                    f"multiple of {self.size}, or parallel.tensor to a divisor of {count}"
                )
        if not self.sequence:
            return
        if not isinstance(model, DalleConfig):
            raise ConfigError(
                "parallel.sequence divides the positions of the text-image transformer only: leave it out"
            )
        if model.total_len % self.size:
            raise ConfigError(
                f"parallel.sequence divides the model's {model.total_len} positions (model.text_len={model.text_len} + "
                f"model.grid={model.grid}²) among parallel.tensor={self.size} processes, which does not come out even: leave "
                "it out, or change parallel.tensor"
            )

    # --- between the residual stream and the divided layers; each (B, n, width)

    def copy_to_tensor_region(self, x: Tensor) -> Tensor:
        """Into divided layers: with `sequence`, (B, n / size, width) → (B, n, width)."""
        if self.size == 1:
            return x
        return _Gather.apply(x, self, 1, True) if self.sequence else _Copy.apply(x, self)

    def reduce_from_tensor_region(self, x: Tensor) -> Tensor:
        """Out of divided layers, each process's share of a sum: with `sequence`, (B, n, width) → (B, n / size, width)."""
        if self.size == 1:
            return x
        return _Scatter.apply(x, self) if self.sequence else _Reduce.apply(x, self)

    def shared(self, parameter: Tensor) -> Tensor:
        """A parameter that is not divided, where it meets the residual stream."""
        return _Copy.apply(parameter, self) if self.size > 1 and self.sequence else parameter

    def positions(self, x: Tensor) -> Tensor:
        """What this process holds of a residual stream that all processes have."""
        return _Slice.apply(x, self, 1) if self.size > 1 and self.sequence else x

    # --- sums and parts that every process gets whole

    def reduce(self, x: Tensor) -> Tensor:
        """The sum over the group, on every process; its gradient is the same everywhere."""
        return x if self.size == 1 else _Reduce.apply(x, self)

    def gather(self, x: Tensor) -> Tensor:
        """All processes' parts of the last axis, on every process; each goes on to do the same with them."""
        return x if self.size == 1 else _Gather.apply(x, self, x.dim() - 1, False)

    def sum_(self, x: Tensor) -> Tensor:
        """The sum over the group, in place and outside of autograd; for memory of the caller's own."""
        if self.size > 1 and not skipped(x, "all-reduce", "tensor", self.size):
            dist.all_reduce(x, group=self.group)
        return x

    def max_(self, x: Tensor) -> Tensor:
        """The greatest over the group, elementwise, as `sum_`."""
        if self.size > 1 and not skipped(x, "all-reduce", "tensor", self.size):
            dist.all_reduce(x, op=dist.ReduceOp.MAX, group=self.group)
        return x


def split_of(parameter: Tensor) -> Split | None:
    """How a parameter is divided; None where every process of its tensor group has all of it."""
    return getattr(parameter, "tp_split", None)


WHOLE = TensorGroup()
"""A group of one process: nothing is divided."""


def _reduced(x: Tensor, group: TensorGroup) -> Tensor:
    return group.sum_(x.clone(memory_format=torch.contiguous_format))


def _gathered(x: Tensor, group: TensorGroup, axis: int) -> Tensor:
    pieces = [torch.empty_like(x, memory_format=torch.contiguous_format) for _ in range(group.size)]
    x = x.contiguous()
    if not x.is_meta:
        dist.all_gather(pieces, x, group=group.group)
    whole = torch.cat(pieces, axis)
    skipped(whole, "all-gather", "tensor", group.size)
    return whole


def _scattered(x: Tensor, group: TensorGroup, axis: int) -> Tensor:
    """This process's part of the sum along `axis`."""
    pieces = [piece.contiguous() for piece in x.chunk(group.size, axis)]
    own = torch.empty_like(pieces[0])
    if not skipped(x, "reduce-scatter", "tensor", group.size):
        dist.reduce_scatter(own, pieces, group=group.group)
    return own


class _Copy(torch.autograd.Function):
    """Identity, whose gradient is summed over the group."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, group: TensorGroup) -> Tensor:
        ctx.group = group
        return x.view_as(x)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, None]:
        return _reduced(gradient, ctx.group), None


class _Reduce(torch.autograd.Function):
    """Sum over the group, whose gradient is passed on."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, group: TensorGroup) -> Tensor:
        return _reduced(x, group)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, None]:
        return gradient, None


class _Gather(torch.autograd.Function):
    """All parts along an axis. Their gradients are summed over the group, or, where all have the same, not."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, group: TensorGroup, axis: int, summed: bool) -> Tensor:
        ctx.group, ctx.axis, ctx.summed = group, axis, summed
        return _gathered(x, group, axis)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, None, None, None]:
        group: TensorGroup = ctx.group
        if ctx.summed:
            return _scattered(gradient, group, ctx.axis), None, None, None
        return gradient.chunk(group.size, ctx.axis)[group.rank].contiguous(), None, None, None


class _Scatter(torch.autograd.Function):
    """This process's positions of the sum over the group."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, group: TensorGroup) -> Tensor:
        ctx.group = group
        return _scattered(x, group, 1)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, None]:
        return _gathered(gradient, ctx.group, 1), None


class _Slice(torch.autograd.Function):
    """This process's part of what all have, along an axis."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, group: TensorGroup, axis: int) -> Tensor:
        ctx.group, ctx.axis = group, axis
        return x.chunk(group.size, axis)[group.rank].contiguous()

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, None, None]:
        return _gathered(gradient, ctx.group, ctx.axis), None, None
