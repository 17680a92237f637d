"""Exponential average of the weights, kept where the weights are: each process averages the shards that it owns."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor


class WeightAverage:
    """Exponential average of fp32 weight shards (DALL·E App. A.2: decay 0.999).

    The paper's decay is constant. Here that of update n is min(decay, (1 + n) / (10 + n)), so that short runs do not average
    in their first random weights; from update 9 / (1 − decay) on, the two are the same.
    """

    def __init__(self, shards: Sequence[Tensor], decay: float) -> None:
        self.shards = list(shards)
        self.decay = decay
        self.averages = [shard.detach().clone() for shard in shards]

    @torch.no_grad()
    def update(self, step: int) -> None:
        """Take in the weights after update `step`, counted from 0."""
        decay = min(self.decay, (1 + step) / (10 + step))
        torch._foreach_lerp_(self.averages, [shard.detach() for shard in self.shards], 1 - decay)

    @torch.no_grad()
    def swap(self) -> None:
        """Exchange the weights and their average in place; a second call undoes the first, bit for bit."""
        for shard, average in zip(self.shards, self.averages, strict=True):
            kept = shard.detach().clone()
            shard.copy_(average)
            average.copy_(kept)

    def state_dict(self) -> dict[str, Tensor]:
        """What a checkpoint keeps of this process's share."""
        return {str(index): average for index, average in enumerate(self.averages)}

    @torch.no_grad()
    def load_state_dict(self, state: dict[str, Tensor]) -> None:
        """Go on from `state_dict` of the same layout."""
        for index, average in enumerate(self.averages):
            average.copy_(state[str(index)])
