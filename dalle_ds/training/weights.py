"""One view of an engine's fp32 weights, whatever the ZeRO stage and precision hide them behind.

DeepSpeed keeps them in five places: the module itself (fp32, stage 0), lists of copies (bf16, stage 0), flat partitions
(bf16 stage 1), other flat partitions (stages 1 and 2) and flat sub-groups (stage 3). Averaging, checkpoints, export and
validation on averaged weights need only what this file offers.
"""

from __future__ import annotations

import hashlib
from collections.abc import Mapping
from functools import cached_property
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn

from dalle_ds.training.checkpoints.fragments import Fragment, Rectangle, fragments_of, matrix_size


class MasterWeights:
    """The fp32 weights behind a DeepSpeed engine.

    Args:
        engine: from `build_engine`.
    """

    def __init__(self, engine: Any) -> None:
        self._module: nn.Module = engine.module
        self._optimizer = engine.optimizer
        self._device: torch.device = engine.device
        self._stage: int = engine.zero_optimization_stage()
        self._copies: dict[int, Tensor] = {}
        optimizer = self._optimizer
        if hasattr(optimizer, "fp32_partitioned_groups_flat"):
            self.shards: list[Tensor] = list(optimizer.fp32_partitioned_groups_flat)
        elif hasattr(optimizer, "single_partition_of_fp32_groups"):
            self.shards = list(optimizer.single_partition_of_fp32_groups)
        elif hasattr(optimizer, "fp32_groups_flat_partition"):
            self.shards = list(optimizer.fp32_groups_flat_partition)
        elif hasattr(optimizer, "fp32_groups"):
            self.shards = [copy for group in optimizer.fp32_groups for copy in group]
            originals = [parameter for group in optimizer.fp16_groups for parameter in group]
            self._copies = {id(parameter): copy for parameter, copy in zip(originals, self.shards, strict=True)}
        else:
            self.shards = list(self._module.parameters())
        self.fragments: list[Fragment] = fragments_of(engine)
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
            for parameter in self._module.parameters():
                parameter.copy_(self._copies[id(parameter)])

    @torch.no_grad()
    def consolidate(self) -> dict[str, Tensor] | None:
        """The plain model's fp32 state dict on the CPU of rank 0; None elsewhere. Collective.

        Fragments go to rank 0 one by one; of processes that have the same one, the first sends it.
        """
        received, sent = self._transfers
        for number in sent:
            dist.send(self._run(self.fragments[number]), dst=0)
        if dist.get_rank() > 0:
            return None
        weights: dict[str, Tensor] = {}
        for source, fragment in received:
            if source == 0:
                run = self._run(fragment)
            else:
                run = torch.empty(fragment.length, device=self._device)
                dist.recv(run, src=source)
            if fragment.name not in weights:
                weights[fragment.name] = torch.empty(fragment.whole)
            whole = weights[fragment.name].view(matrix_size(fragment.whole))
            run = run.cpu()
            for part in fragment.rectangles():
                part.in_matrix(whole).copy_(part.of(run))
        return weights

    @torch.no_grad()
    def load(self, state_dict: Mapping[str, Tensor]) -> None:
        """Take the weights from the plain model's state dict, which every process has. Collective."""
        for fragment in self.fragments:
            whole = state_dict[fragment.name].float().view(matrix_size(fragment.whole))
            run = fragment.of(self.shards[fragment.shard].detach())
            for part in fragment.rectangles():
                part.of(run).copy_(part.in_matrix(whole))
        self.publish()

    def _run(self, fragment: Fragment) -> Tensor:
        return fragment.of(self.shards[fragment.shard]).to(self._device, torch.float32)

    @cached_property
    def _transfers(self) -> tuple[list[tuple[int, Fragment]], list[int]]:
        """What crosses to rank 0, in this order: there, ranks and their fragments; elsewhere, numbers of own fragments.

        Collective at its first use; cuts do not change.
        """
        rank, size = dist.get_rank(), dist.get_world_size()
        # Only one of those processes that are cut alike, such as replicas, tells rank 0 of its fragments.
        digests: list[Any] = [None] * size
        dist.all_gather_object(digests, hashlib.sha256(repr(self.fragments).encode()).hexdigest())
        is_first = digests.index(digests[rank]) == rank
        if rank > 0:
            wanted: list[Any] = [[]]
            if is_first:
                dist.send_object_list([self.fragments], dst=0, device=self._device)
                dist.recv_object_list(wanted, src=0, device=self._device)
            return [], wanted[0]
        received: list[tuple[int, Fragment]] = []
        seen: set[tuple[str, Rectangle]] = set()
        for source in range(size):
            if digests.index(digests[source]) < source:
                continue
            offered: list[Any] = [self.fragments]
            if source > 0:
                dist.recv_object_list(offered, src=source, device=self._device)
            new = [number for number, each in enumerate(offered[0]) if (each.name, each.rectangles()[0]) not in seen]
            seen.update((offered[0][number].name, offered[0][number].rectangles()[0]) for number in new)
            received += [(source, offered[0][number]) for number in new]
            if source > 0:
                dist.send_object_list([new], dst=source, device=self._device)
        return received, []
