"""Torch's "meta" device, whose tensors have shapes and no memory, in place of the device that a run is planned for.

Models choose kernels and sizes of chunks by `device_type`. Collectives call `skipped` first.
"""

from __future__ import annotations

from contextvars import ContextVar

import torch
from torch import Tensor

PLANNED_DEVICE: ContextVar[str] = ContextVar("device", default="cuda")
"""Type of the device that "meta" tensors stand for: "cuda" or "cpu"."""
_OPERATORS = torch.library.Library("dalle_ds", "FRAGMENT")
_OPERATORS.define("exchange(Tensor whole, str operation, str axis, int processes) -> ()")
_OPERATORS.impl("exchange", lambda *_: None, "Meta")


def device_type(tensor: Tensor) -> str:
    """Type of the device that a tensor lies on, or, of a "meta" tensor, that which it is planned for."""
    return PLANNED_DEVICE.get() if tensor.is_meta else tensor.device.type


def skipped(whole: Tensor, operation: str, axis: str, processes: int) -> bool:
    """Whether a collective has nothing to exchange, since its tensor is a "meta" one; dispatch modes see it nevertheless.

    Args:
        whole: of the size of what is reduced or gathered.
        operation: "all-reduce", "all-gather" or "reduce-scatter".
        axis: of the mesh, along which the processes lie.
    """
    if whole.is_meta:
        torch.ops.dalle_ds.exchange(whole, operation, axis, processes)
    return whole.is_meta
