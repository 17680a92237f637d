"""One view of an engine's fp32 weights, whatever the ZeRO stage and precision hide them behind.

DeepSpeed keeps them in five places: the module itself (fp32, stage 0), lists of copies (bf16, stage 0), flat partitions
(bf16 stage 1), other flat partitions (stages 1 and 2) and flat sub-groups (stage 3). Averaging, export and validation on
averaged weights need only what this file offers.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
from deepspeed.utils import safe_get_full_fp32_param
from torch import Tensor, nn


class MasterWeights:
    """The fp32 weights behind a DeepSpeed engine.

    Args:
        engine: from `deepspeed.initialize`.
    """

    def __init__(self, engine: Any) -> None:
        self._module: nn.Module = engine.module
        self._optimizer = engine.optimizer
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

    def named_full(self) -> Iterator[tuple[str, Tensor]]:
        """Every parameter's name and whole fp32 value, one at a time. Collective: all ranks must exhaust it."""
        for name, parameter in self._module.named_parameters():
            if self._stage > 0 or hasattr(parameter, "_hp_mapping"):
                value = safe_get_full_fp32_param(parameter)
                assert value is not None, f"DeepSpeed tracks no fp32 weight for {name}"
                shape = getattr(parameter, "ds_shape", parameter.shape)
                yield name, value.detach().view(shape)
            else:
                yield name, self._copies.get(id(parameter), parameter).detach().float()

    def consolidate(self, keep: bool) -> dict[str, Tensor] | None:
        """The whole fp32 state dict on the CPU where `keep`, else None. Collective; one parameter at a time is whole."""
        weights: dict[str, Tensor] = {}
        for name, value in self.named_full():
            if keep:
                weights[name] = value.to("cpu", copy=True)
        return weights if keep else None
