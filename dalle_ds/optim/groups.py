"""Which parameters are decayed."""

from __future__ import annotations

from typing import Any

from torch import nn


def decay_groups(model: nn.Module, weight_decay: float) -> list[dict[str, Any]]:
    """Optimizer parameter groups: weight matrices and kernels with `weight_decay`; gains, biases and embeddings with none.

    Works on modules that ZeRO-3 has partitioned, whose tensors are empty, by their recorded shapes.
    """
    decayed: list[nn.Parameter] = []
    plain: list[nn.Parameter] = []
    for module in model.modules():
        for parameter in module.parameters(recurse=False):
            dimensions = len(getattr(parameter, "ds_shape", parameter.shape))
            is_matrix = dimensions >= 2 and not isinstance(module, nn.Embedding)
            (decayed if is_matrix else plain).append(parameter)
    groups: list[dict[str, Any]] = [
        {"params": decayed, "weight_decay": weight_decay},
        {"params": plain, "weight_decay": 0.0},
    ]
    return [group for group in groups if group["params"]]
