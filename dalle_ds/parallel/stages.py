"""How a model's layers are assigned to the stages of a pipeline."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from itertools import accumulate
from typing import Any

from torch import nn


@dataclass(frozen=True)
class PipelineLayer:
    """One layer of a model, which a stage has whole."""

    name: str
    """What the names of its parameters begin with in the plain model, such as "blocks.3."; may be empty."""
    cost: float
    """Arithmetic of one sample, in any unit."""
    build: Callable[[], nn.Module]
    """Makes it, with weights drawn from torch's global generator."""
    run: Callable[[nn.Module, Any], Any]
    """(the layer, what the layer before returned) → what the next one takes: a tensor or a tuple of tensors, of which those
    of floating-point numbers have gradients. The last layer may return anything."""
    kind: str = ""
    """Layers of a kind differ in nothing but the values of their weights; what they take of memory is planned once."""


def balanced(costs: Sequence[float], stages: int) -> list[int]:
    """Where stages begin and the last one ends: runs of layers, none of them empty, the costliest as cheap as can be.

    Args:
        costs: of the layers; at least as many as there are stages.
    """
    count = len(costs)
    assert 1 <= stages <= count, f"{count} layers cannot be split into {stages} stages"
    sums = [0.0, *accumulate(costs)]
    # best[end]: the least possible cost of the costliest of so many stages that hold the first `end` layers.
    best = [0.0] + [math.inf] * count
    begins: list[list[int]] = []
    for stage in range(1, stages + 1):
        following = [math.inf] * (count + 1)
        begin = [0] * (count + 1)
        for end in range(stage, count + 1):
            for first in range(stage - 1, end):
                cost = max(best[first], sums[end] - sums[first])
                if cost < following[end]:
                    following[end], begin[end] = cost, first
        best = following
        begins.append(begin)
    bounds = [count]
    for begin in reversed(begins):
        bounds.append(begin[bounds[-1]])
    return bounds[::-1]
