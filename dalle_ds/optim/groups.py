"""Optimizer parameter groups: which parameters are decayed, and which belong to one residual block."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Any

from torch import nn

from dalle_ds.config import OptimConfig
from dalle_ds.parallel import split_of

Groups = list[dict[str, Any]]


def decay_groups(model: nn.Module, weight_decay: float, compact: Sequence[nn.Module] = ()) -> Groups:
    """Weight matrices and kernels with `weight_decay`; gains, biases and embeddings with none.

    Works on modules that ZeRO-3 has partitioned, whose tensors are empty, by their recorded shapes. Each group has a "name".

    Args:
        compact: residual blocks of `model` whose matrices and kernels have 16-bit moments.
    """
    inside = {module for block in compact for module in block.modules()}
    matrices, others = _split(model.modules())
    small = {id(parameter) for parameter in _split(inside)[0]}
    within = [parameter for parameter in matrices if id(parameter) in small]
    outside = [parameter for parameter in matrices if id(parameter) not in small]
    return [
        *_groups("block matrices", within, weight_decay, moments="16-bit"),
        *_groups("matrices", outside, weight_decay),
        *_groups("others", others, 0.0),
    ]


def adapter_groups(model: nn.Module, weight_decay: float) -> Groups:
    """All that is not frozen, in one group."""
    trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
    return _groups("adapters", trained, weight_decay)


def resblock_groups(model: nn.Module, blocks: Sequence[Any], optim: OptimConfig) -> Groups:
    """Two groups for each residual block, its matrices and its vectors; after them, those of all other parameters.

    ZeRO never mixes groups in a shard: so each shard's gradients belong to one block, whose update can be left out
    (DALL·E App. D). A group's "block" is the number of its block, None outside of them. Its "moments" are
    `optim.moments` for the blocks' matrices and fp32 for all else, as in the paper. Its "name" is the same in every layout.

    Parameters that a tensor group divides and those that it does not are in groups apart, since the whole of a norm is
    added up from them in different ways; the former's "divided" is True.

    Args:
        blocks: those of `model`, each with its `number`.
    """
    found: Groups = []
    for block in blocks:
        matrices, others = _split(block.modules())
        name = f"block {block.number}"
        found += _groups(f"{name} matrices", matrices, optim.weight_decay, block.number, optim.moments)
        found += _groups(f"{name} others", others, 0.0, block.number)
    inside = {module for block in blocks for module in block.modules()}
    matrices, others = _split(module for module in model.modules() if module not in inside)
    return [*found, *_groups("matrices", matrices, optim.weight_decay), *_groups("others", others, 0.0)]


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


def _groups(
    name: str, parameters: list[nn.Parameter], weight_decay: float, block: int | None = None, moments: str = "fp32"
) -> Groups:
    """The group of these parameters, if there are any, those that a tensor group divides apart from the rest."""
    settings = {"weight_decay": weight_decay, "block": block, "moments": moments}
    divided = [parameter for parameter in parameters if split_of(parameter) is not None]
    whole = [parameter for parameter in parameters if split_of(parameter) is None]
    found = [
        {"name": f"{name}, divided", "params": divided, **settings, "divided": True},
        {"name": name, "params": whole, **settings, "divided": False},
    ]
    return [group for group in found if group["params"]]
