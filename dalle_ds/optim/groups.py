"""Optimizer parameter groups: which parameters are decayed, and which belong to one residual block."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Any

from torch import nn

from dalle_ds.config import OptimConfig

Groups = list[dict[str, Any]]


def decay_groups(model: nn.Module, weight_decay: float) -> Groups:
    """Weight matrices and kernels with `weight_decay`; gains, biases and embeddings with none.

    Works on modules that ZeRO-3 has partitioned, whose tensors are empty, by their recorded shapes.
    """
    matrices, others = _split(model.modules())
    return _present({"params": matrices, "weight_decay": weight_decay}, {"params": others, "weight_decay": 0.0})


def resblock_groups(model: nn.Module, blocks: Sequence[nn.Module], optim: OptimConfig) -> Groups:
    """Two groups for each residual block, its matrices and its vectors; after them, those of all other parameters.

    ZeRO never mixes groups in a shard: so each shard's gradients belong to one block, whose update can be left out
    (DALL·E App. D). A group's "block" is the number of its block, None outside of them. Its "moments" are
    `optim.moments` for the blocks' matrices and fp32 for all else, as in the paper.
    """
    groups: Groups = []
    for number, block in enumerate(blocks):
        matrices, others = _split(block.modules())
        groups += _present(
            {"params": matrices, "weight_decay": optim.weight_decay, "block": number, "moments": optim.moments},
            {"params": others, "weight_decay": 0.0, "block": number, "moments": "fp32"},
        )
    inside = {module for block in blocks for module in block.modules()}
    matrices, others = _split(module for module in model.modules() if module not in inside)
    return groups + _present(
        {"params": matrices, "weight_decay": optim.weight_decay, "block": None, "moments": "fp32"},
        {"params": others, "weight_decay": 0.0, "block": None, "moments": "fp32"},
    )


def _split(modules: Iterable[nn.Module]) -> tuple[list[nn.Parameter], list[nn.Parameter]]:
    """Parameters that are decayed, and the others."""
    matrices: list[nn.Parameter] = []
    others: list[nn.Parameter] = []
    for module in modules:
        for parameter in module.parameters(recurse=False):
            dimensions = len(getattr(parameter, "ds_shape", parameter.shape))
            is_matrix = dimensions >= 2 and not isinstance(module, nn.Embedding)
            (matrices if is_matrix else others).append(parameter)
    return matrices, others


def _present(*groups: dict[str, Any]) -> Groups:
    return [group for group in groups if group["params"]]
