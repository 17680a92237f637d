"""One view of an engine's averaged gradients between backward pass and step, whatever the ZeRO stage hides them behind.

Norms, clipping, the search for non-finite values and skips of single blocks need only what this file offers; DeepSpeed's
own clipping stays switched off, since it knows neither parameter groups nor what to leave out.
"""

from __future__ import annotations

from collections.abc import Collection, Sequence
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from dalle_ds.parallel import Mesh


class MasterGradients:
    """The gradients behind a DeepSpeed engine, averaged over processes and micro-batches, by optimizer parameter group.

    Of use only after the last backward pass of an update and before its step. Changes in place are what the step sees.

    Args:
        engine: from `deepspeed.initialize`.
    """

    def __init__(self, engine: Any) -> None:
        self._optimizer = engine.optimizer
        self._device = engine.device
        self.sharded: bool = engine.zero_optimization_stage() > 0
        """Whether each process holds a part of every gradient, instead of all."""
        self._offloaded = bool(getattr(self._optimizer, "offload_optimizer", False)) or bool(
            getattr(self._optimizer, "cpu_offload", False)
        )

    def groups(self) -> list[list[Tensor]]:
        """This process's pieces of every parameter group's gradient, as DeepSpeed keeps them."""
        optimizer = self._optimizer
        if hasattr(optimizer, "fp32_partitioned_groups_flat"):  # stage 3
            groups: list[list[Tensor]] = [[] for _ in optimizer.param_groups]
            for index, flat in enumerate(optimizer.fp32_partitioned_groups_flat):
                pieces = [flat.grad] if self._offloaded else optimizer.averaged_gradients[index]
                groups[optimizer.sub_group_to_group_id[index]].extend(pieces)
            return groups
        if hasattr(optimizer, "single_partition_of_fp32_groups"):  # stages 1 and 2
            if self._offloaded:
                optimizer._wait_for_offload_copies()
                return [[flat.grad] for flat in optimizer.single_partition_of_fp32_groups]
            return [
                [whole] if (whole := getattr(pieces, "flat_partition", None)) is not None else list(pieces)
                for _, pieces in sorted(optimizer.averaged_gradients.items())
            ]
        if hasattr(optimizer, "fp32_groups_gradient_flat_partition"):  # bf16, stage 1
            return [[flat] for flat in optimizer.fp32_groups_gradient_flat_partition]
        parameters = getattr(optimizer, "fp16_groups", None)  # bf16, stage 0
        if parameters is None:
            parameters = [group["params"] for group in optimizer.param_groups]
        return [[p.grad for p in group if p.grad is not None] for group in parameters]

    def squared_norms(self) -> Tensor:
        """(groups,) fp32, squared norm of what this process holds of every group; where gradients are `sharded`, the sum over
        all processes is that of the whole."""
        groups = self.groups()
        total = torch.zeros(len(groups), device=self._device)
        pieces = [piece for group in groups for piece in group]
        if pieces:
            # All at once: on a GPU, one launch for each of some hundred groups would take longer than the arithmetic.
            squares = torch.stack(torch._foreach_norm(pieces, 2, dtype=torch.float32)).square()
            owners = torch.tensor([index for index, group in enumerate(groups) for _ in group])
            total.index_add_(0, owners.to(self._device), squares.to(self._device))
        return total

    @torch.no_grad()
    def scale(self, factor: float) -> None:
        """Multiply all gradients by `factor`."""
        torch._foreach_mul_([piece for pieces in self.groups() for piece in pieces], factor)

    @torch.no_grad()
    def clear(self, groups: Collection[int]) -> None:
        """Set the gradients of these parameter groups to 0."""
        cleared = [piece for index, pieces in enumerate(self.groups()) if index in groups for piece in pieces]
        if cleared:
            torch._foreach_zero_(cleared)
        if cleared and self._offloaded:
            # DeepSpeed took its own notes in the backward pass, by which it would leave out the whole step, or, in bf16, keep
            # what is not finite for the next one.
            noted = self._optimizer.norm_for_param_grads
            self._optimizer.norm_for_param_grads = {name: torch.zeros(()) for name in noted}
            self._optimizer.local_overflow = False


class GroupLayout:
    """Which parameter groups there are on all processes, and what this one holds of them.

    Stages of a pipeline have groups of their own; parts of a tensor group all hold those that are not divided.

    Args:
        groups: the optimizer's parameter groups, as `optim/groups.py` makes them.
        sharded: whether shards hold parts of every gradient, instead of all.
    """

    def __init__(self, groups: Sequence[dict[str, Any]], sharded: bool, mesh: Mesh) -> None:
        own = [(group["name"], group.get("block")) for group in groups]
        everywhere: list[Any] = [own]
        if mesh.size("pipe") > 1:
            everywhere = [None] * mesh.size("pipe")
            dist.all_gather_object(everywhere, own, group=mesh.group("pipe"))
        known = dict(entry for stage in everywhere for entry in stage)
        self.blocks: list[int | None] = list(known.values())
        """Of all groups of the model, the number of the residual block or None."""
        numbers = {name: number for number, name in enumerate(known)}
        self.numbers = [numbers[name] for name, _ in own]
        """Of this process's groups, their numbers among all."""
        self.own_blocks: list[int | None] = [block for _, block in own]
        """Of this process's groups, the number of the residual block or None."""
        holders = [
            mesh.size("replica")
            * (1 if sharded else mesh.size("shard"))
            * (1 if group.get("divided") else mesh.size("tensor"))
            for group in groups
        ]
        self._shares = torch.tensor([1 / count for count in holders], device=mesh.device)
        first = mesh.index("replica") == 0 and (sharded or mesh.index("shard") == 0)
        self.counted = [first and (bool(group.get("divided")) or mesh.index("tensor") == 0) for group in groups]
        """Of this process's groups, whether it is the one to count what it holds where others hold the same."""
        self._device = mesh.device

    def spread(self, squares: Tensor) -> Tensor:
        """(own groups,) squared norms of what this process holds → (all groups,), whose sum over all processes is right."""
        total = torch.zeros(len(self.blocks), device=self._device)
        total[self.numbers] = squares * self._shares
        return total
