"""Model FLOPs, counted from shapes without computing anything."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import nn
from torch.utils.flop_counter import FlopCounterMode


def training_flops(build: Callable[[], nn.Module], forward: Callable[[nn.Module], Any]) -> float:
    """FLOPs of `forward` and its backward pass, which takes twice as many.

    Args:
        build: makes the model; called with the meta device as default.
        forward: calls it, on inputs of the meta device.
    """
    with torch.device("meta"):
        model = build()
        with torch.no_grad(), FlopCounterMode(display=False) as counter:
            forward(model)
    return 3.0 * counter.get_total_flops()
