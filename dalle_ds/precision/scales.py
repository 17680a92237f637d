"""One gradient scale per residual block, in place of a loss scale (DALL·E §2.4, App. D)."""

from __future__ import annotations

from collections.abc import Collection
from typing import Any

import torch
from torch import Tensor

from dalle_ds.config import ScalingConfig
from dalle_ds.precision.resblock import BranchPrecision


class GradientScales:
    """The scales of a model's residual blocks, and the rule by which they follow what fp16 can hold.

    A scale starts at M · 2^13. With every update that is made it grows by 2^(1/1000), except where the update found the
    block's parameter gradients not finite: then it is divided by √2, though not twice within 125 updates. It stays in
    [M · 2^7, M · 2^24]. M is the number of data-parallel processes. The rule is plain arithmetic on the host, the same on
    every process, since what it is told was agreed on by all.

    The paper divides the loss by the batch of all M processes and multiplies gradients by the scale. DeepSpeed's loss is
    the mean over one process's batch, M times as large, so that a block multiplies by `factors` = scale / M: inside the
    branch, where numbers are 16-bit, the same values. Outside, division by M is one of fp32 numbers and loses nothing.

    Two things the paper leaves open: on an update that is skipped no scale grows; the window is counted in updates,
    skipped ones included.

    Args:
        config: the constants.
        blocks: how many residual blocks there are.
        replicas: M.
        device: where the blocks compute.
    """

    def __init__(self, config: ScalingConfig, blocks: int, replicas: int, device: torch.device | str = "cpu") -> None:
        self.config = config
        self.replicas = replicas
        self.scales = [replicas * 2.0**config.initial_log2] * blocks
        self._updates = 0
        self._last_backoff: list[int | None] = [None] * blocks
        self.factors: Tensor = torch.empty(blocks, dtype=torch.float32, device=device)
        self._publish()

    def precision(self, block: int, dtype: torch.dtype) -> BranchPrecision:
        """What residual block number `block` computes with; follows this object's scales."""
        return BranchPrecision(dtype, self.factors[block : block + 1])

    def update(self, nonfinite: Collection[int], applied: bool) -> None:
        """Take note of one update.

        Args:
            nonfinite: the blocks, any of whose parameter gradients was not finite on any process.
            applied: whether the update was made, at least for the other blocks.
        """
        config = self.config
        for block, scale in enumerate(self.scales):
            if block in nonfinite:
                last = self._last_backoff[block]
                if last is None or self._updates - last >= config.window:
                    scale /= config.backoff
                    self._last_backoff[block] = self._updates
            elif applied:
                scale *= 2.0 ** (1 / config.doubling_updates)
            self.scales[block] = min(max(scale, self._lowest), self.replicas * 2.0**config.max_log2)
        self._updates += 1
        self._publish()

    def at_floor(self, block: int) -> bool:
        """Whether the block's scale cannot be lowered any more: what still overflows then, no scale will help."""
        return self.scales[block] <= self._lowest

    @property
    def _lowest(self) -> float:
        return self.replicas * 2.0**self.config.min_log2

    def figures(self) -> dict[str, float]:
        """For the metrics: the scale of every block."""
        return {f"gradient_scale/{block}": scale for block, scale in enumerate(self.scales)}

    def state_dict(self) -> dict[str, Any]:
        """What a checkpoint keeps, JSON-able."""
        return {
            "replicas": self.replicas,
            "scales": list(self.scales),
            "updates": self._updates,
            "last_backoff": list(self._last_backoff),
        }

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Go on from `state_dict`, of as many processes or of others: scales are multiples of M."""
        self.scales = [scale * (self.replicas / state["replicas"]) for scale in state["scales"]]
        self._updates = state["updates"]
        self._last_backoff = list(state["last_backoff"])
        self._publish()

    def _publish(self) -> None:
        factors = torch.tensor([scale / self.replicas for scale in self.scales], dtype=torch.float32)
        self.factors.copy_(factors)
