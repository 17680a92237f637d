"""One view of a DeepSpeed engine's fp32 weights and averaged gradients, whatever ZeRO stage and precision do with them.

DeepSpeed keeps weights in five places: the module itself (fp32, stage 0), lists of copies (bf16, stage 0), flat partitions
(bf16 stage 1), other flat partitions (stages 1 and 2) and flat sub-groups (stage 3); and gradients in as many. Averaging,
checkpoints, export, norms, clipping and skips of single blocks need only what this file offers. DeepSpeed's own clipping
stays switched off, since it knows neither parameter groups nor what to leave out.
"""

from __future__ import annotations

import hashlib
from collections.abc import Collection, Mapping, Sequence
from functools import cached_property
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn

from dalle_ds.parallel import WHOLE, Mesh, TensorGroup, split_of
from dalle_ds.training.checkpoints.storage import ParamShard, matrix_size


class MasterWeights:
    """The fp32 weights behind a DeepSpeed engine."""

    def __init__(self, engine: Any) -> None:
        self._module: nn.Module = engine.module
        self._optimizer = engine.optimizer
        self._device: torch.device = engine.device
        self._stage: int = engine.zero_optimization_stage()
        self._copies: dict[int, Tensor] = {}
        optimizer = self._optimizer
        flat = ("fp32_partitioned_groups_flat", "single_partition_of_fp32_groups", "fp32_groups_flat_partition")
        kept = next((name for name in flat if hasattr(optimizer, name)), None)
        if kept is not None:
            self.shards: list[Tensor] = list(getattr(optimizer, kept))
        elif hasattr(optimizer, "fp32_groups"):
            self.shards = [copy for group in optimizer.fp32_groups for copy in group]
            originals = [parameter for group in optimizer.fp16_groups for parameter in group]
            self._copies = {id(parameter): copy for parameter, copy in zip(originals, self.shards, strict=True)}
        else:
            self.shards = list(_trained(self._module))
        self.param_shards: list[ParamShard] = param_shards_of(engine)
        """What the shards hold of which parameter; together with those of the other processes, all of the model."""

    @cached_property
    def group_of(self) -> list[int]:
        """The number of each shard's optimizer parameter group."""
        optimizer = self._optimizer
        if self._stage == 3:
            return [optimizer.sub_group_to_group_id[number] for number in range(len(self.shards))]
        if self._stage > 0:
            return list(range(len(self.shards)))
        numbers = {id(p): number for number, group in enumerate(optimizer.param_groups) for p in group["params"]}
        return [numbers[id(shard)] for shard in self.shards]

    @torch.no_grad()
    def publish(self) -> None:
        """Bring the module's weights in line with the shards, after these were changed. Collective."""
        optimizer = self._optimizer
        if self._stage == 3:
            # Weights gathered by the last forward pass may still be whole in the module; they must not be used again.
            optimizer.checkpoint_event_prologue()
            for index in range(len(self.shards)):
                optimizer._reassign_or_swap_out_partitioned_parameters(index)
            optimizer.checkpoint_event_epilogue()
        elif hasattr(optimizer, "update_lp_params"):
            optimizer.update_lp_params()
        elif self._copies:
            for parameter in _trained(self._module):
                parameter.copy_(self._copies[id(parameter)])

    @torch.no_grad()
    def consolidate(self) -> dict[str, Tensor] | None:
        """The plain model's fp32 state dict on the CPU of rank 0; None elsewhere. Collective.

        Shards of parameters go to rank 0 one by one; of processes that have the same one, the first sends it.
        """
        rank = dist.get_rank()
        weights: dict[str, Tensor] = {}
        for source, shard in self._transfers:
            if source == rank:
                run = shard.of(self.shards[shard.shard]).to(self._device, torch.float32)
                if rank > 0:
                    dist.send(run, dst=0)
                    continue
            else:
                run = torch.empty(shard.length, device=self._device)
                dist.recv(run, src=source)
            if shard.name not in weights:
                weights[shard.name] = torch.empty(shard.whole)
            whole = weights[shard.name].view(matrix_size(shard.whole))
            for at, values in shard.slices(run.cpu()):
                at.of(whole).copy_(values)
        return weights if rank == 0 else None

    @torch.no_grad()
    def load(self, state_dict: Mapping[str, Tensor]) -> None:
        """Take the weights from the plain model's state dict, which every process has. Collective."""
        for shard in self.param_shards:
            whole = state_dict[shard.name].float().view(matrix_size(shard.whole))
            for at, values in shard.slices(shard.of(self.shards[shard.shard])):
                values.copy_(at.of(whole))
        self.publish()

    @cached_property
    def _transfers(self) -> list[tuple[int, ParamShard]]:
        """What crosses to rank 0, in this order, by the ranks that send it: there, of all; elsewhere, of this one.

        Collective at its first use; cuts do not change.
        """
        rank = dist.get_rank()
        # Only one of those processes that are cut alike, such as replicas, tells rank 0 of its shards.
        digests: list[Any] = [None] * dist.get_world_size()
        dist.all_gather_object(digests, hashlib.sha256(repr(self.param_shards).encode()).hexdigest())
        found: dict[tuple[str, int, int, int], tuple[int, ParamShard]] = {}
        for source in sorted({digests.index(digest) for digest in digests}):
            offered: list[Any] = [self.param_shards]
            if rank == 0 and source > 0:
                dist.recv_object_list(offered, src=source, device=self._device)
            elif rank == source > 0:
                dist.send_object_list(offered, dst=0, device=self._device)
                dist.recv_object_list(offered, src=0, device=self._device)
                return [(source, shard) for shard in offered[0]]
            if rank == 0:
                cuts = {(each.name, each.part, each.start, each.length): each for each in offered[0]}
                fresh = {cut: each for cut, each in cuts.items() if cut not in found}
                # Behind the others, in the order in which they cross.
                found |= {cut: (source, each) for cut, each in fresh.items()}
                if source > 0:
                    dist.send_object_list([list(fresh.values())], dst=source, device=self._device)
        return list(found.values())


def param_shards_of(engine: Any) -> list[ParamShard]:
    """What this process keeps in fp32 of every parameter that a DeepSpeed engine trains, in the order of `engine.module`'s.

    Shards are numbered as in `MasterWeights.shards`.
    """
    module: nn.Module = engine.module
    optimizer = engine.optimizer
    rename = getattr(module, "plain_name", None)  # a pipeline's stages name their layers in their own way
    groups = (getattr(layer, "tensor", None) for layer in module.modules())
    group = next((group for group in groups if isinstance(group, TensorGroup)), WHOLE)  # which layers know
    numbered: list[Any] = _trained(module)
    if hasattr(optimizer, "fp16_groups"):  # bf16, stage 0: copies, group by group
        numbered = [parameter for group in optimizer.fp16_groups for parameter in group]
    numbers = {id(parameter): number for number, parameter in enumerate(numbered)}

    def placed(parameter: Any) -> tuple[int, int, int, int]:
        """Where DeepSpeed put elements: start in the flattened parameter, length, number of the shard, offset in it."""
        if hasattr(parameter, "ds_id"):  # stage 3: equal lengths of every parameter, the last of them padded
            shard, offset, length = optimizer.grad_position[optimizer.get_param_id(parameter)]
            start = parameter.ds_zero_partition_rank * length
            return start, min(length, parameter.ds_numel - start), shard, offset
        if hasattr(parameter, "_hp_mapping"):  # stages 1 and 2, in all precisions: equal lengths of every group
            mapping = parameter._hp_mapping
            if mapping is None:
                return 0, 0, 0, 0
            own, flat = mapping.lp_fragment_address, mapping.hp_fragment_address
            return own.start, flat.numel, mapping.param_group_index, flat.start
        return 0, parameter.numel(), numbers[id(parameter)], 0

    found: list[ParamShard] = []
    for name, parameter in module.named_parameters():
        if not parameter.requires_grad:
            continue
        shape = tuple(getattr(parameter, "ds_shape", parameter.shape))
        start, length, shard, offset = placed(parameter)
        if length > 0:
            split = split_of(parameter)
            place = (None, 0, 1) if split is None else (split, group.rank, group.size)
            plain = name if rename is None else rename(name)
            found.append(ParamShard(plain, shape, start, length, shard, offset, *place))
    return found


def _trained(module: nn.Module) -> list[nn.Parameter]:
    return [parameter for parameter in module.parameters() if parameter.requires_grad]


class MasterGradients:
    """The gradients behind a DeepSpeed engine, averaged over processes and micro-batches, by optimizer parameter group.

    Of use only after the last backward pass of an update and before its step. Changes in place are what the step sees.
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
    """Which parameter groups (`optim/groups.py`) there are on all processes, and what this one holds of them.

    Stages of a pipeline have groups of their own; parts of a tensor group all hold those that are not divided. `sharded` says
    whether shards hold parts of every gradient, instead of all.
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
