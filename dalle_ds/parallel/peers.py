"""Processes that see different rows of one batch, and what they gather of each other's rows."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor
from torch.autograd.function import once_differentiable

from dalle_ds.meta_device import skipped


@dataclass(frozen=True)
class Peers:
    """The processes that share out a batch's rows, equally many to each, seen from one of them."""

    rank: int = 0
    """This process's number in the group."""
    size: int = 1
    """Processes in the group."""
    group: Any = None
    """Their process group; None stands for all processes."""

    def gather(self, rows: Tensor, *, alike: bool = False) -> Tensor:
        """(n, …) own rows → (size · n, …) all rows, in the order of the processes. Collective, as is its gradient.

        The gradient of a process's rows is the sum of what all processes have for them.

        Args:
            alike: all processes go on to do the same with the result, so that each knows the others' gradients, and
                nothing need cross.
        """
        return rows if self.size == 1 else _GatherRows.apply(rows, self, alike)

    def shared(self, value: Tensor) -> Tensor:
        """What all processes have alike; its gradient on each is the mean of what all have for it. Collective in that.

        For what gradients are not to be averaged after only, because they go through something that is not linear.
        """
        return value if self.size == 1 else _Shared.apply(value, self)


ALONE = Peers()
"""One process, which has all rows."""


class _GatherRows(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, rows: Tensor, peers: Peers, alike: bool) -> Tensor:
        ctx.peers, ctx.alike = peers, alike
        everyone = rows.new_empty(peers.size * len(rows), *rows.shape[1:])
        if not skipped(everyone, "all-gather", "data", peers.size):
            dist.all_gather_into_tensor(everyone, rows.contiguous(), group=peers.group)
        return everyone

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, None, None]:
        peers: Peers = ctx.peers
        own = gradient.chunk(peers.size)[peers.rank]
        if ctx.alike:
            return own * peers.size, None, None
        total = torch.empty_like(own, memory_format=torch.contiguous_format)
        if not skipped(gradient, "reduce-scatter", "data", peers.size):
            dist.reduce_scatter_tensor(total, gradient.contiguous(), group=peers.group)
        return total, None, None


class _Shared(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, value: Tensor, peers: Peers) -> Tensor:
        ctx.peers = peers
        return value.view_as(value)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, None]:
        peers: Peers = ctx.peers
        mean = gradient / peers.size
        if not skipped(mean, "all-reduce", "data", peers.size):
            dist.all_reduce(mean, group=peers.group)
        return mean, None
