"""Exponential average of the weights: each process averages the shards that it owns, and nobody gathers the model."""

from __future__ import annotations

import threading
from collections.abc import Sequence
from typing import Literal

import torch
from torch import Tensor


class WeightAverage:
    """Exponential average of fp32 weight shards (DALL·E App. A.2: decay 0.999; App. B.2: 0.99 every 25 updates).

    The paper's decay is constant. Here that of the weights taken in as number n, from 0, is min(decay, (1 + n) / (10 + n)),
    so that short runs do not average in their first random weights; from n = 9 / (1 − decay) on, the two are the same.

    On the host, taking weights in means a copy that goes on beside the next forward and backward pass, and a thread that
    adds what has arrived. Whatever reads the average waits for that.

    Args:
        shards: this process's weights, which training changes in place.
        decay: in [0, 1).
        every: updates between weights that are taken in.
        device: where the average is kept: "same" as the shards', or "cpu" for the host.
    """

    def __init__(
        self, shards: Sequence[Tensor], decay: float, *, every: int = 1, device: Literal["same", "cpu"] = "same"
    ) -> None:
        self.shards = list(shards)
        self.decay = decay
        self.every = every
        self._landing: list[Tensor] = []
        self._stream: torch.cuda.Stream | None = None
        self._copied: torch.cuda.Event | None = None
        self._adding: threading.Thread | None = None
        on_gpu = any(shard.is_cuda for shard in self.shards)
        if device == "cpu":
            self._landing = [torch.empty_like(shard, device="cpu", pin_memory=on_gpu) for shard in self.shards]
            self._stream = torch.cuda.Stream() if on_gpu else None
        self._averages = [
            shard.detach().to("cpu" if device == "cpu" else shard.device, copy=True) for shard in self.shards
        ]

    @property
    def averages(self) -> list[Tensor]:
        """The average, shard by shard."""
        self._finish_adding()
        return self._averages

    def begun(self, steps: int) -> bool:
        """Whether any weights have been taken in after `steps` updates; until then there is no average to speak of."""
        return steps >= self.every

    @torch.no_grad()
    def update(self, step: int) -> None:
        """Take note of the weights after update `step`, counted from 0; every `every`-th are taken in."""
        if (step + 1) % self.every:
            return
        number = (step + 1) // self.every - 1
        share = 1 - min(self.decay, (1 + number) / (10 + number))
        if not self._landing:
            torch._foreach_lerp_(self._averages, [shard.detach() for shard in self.shards], share)
            return
        self._finish_adding()
        self._copy()
        self._adding = threading.Thread(target=self._add, args=(share,), daemon=True)
        self._adding.start()

    def before_step(self) -> None:
        """To be called before weights are changed: they may still be being copied."""
        if self._copied is not None:
            torch.cuda.current_stream().wait_event(self._copied)

    @torch.no_grad()
    def swap(self) -> None:
        """Exchange the weights and their average in place; a second call undoes the first, bit for bit."""
        self.before_step()
        for shard, average in zip(self.shards, self.averages, strict=True):
            kept = shard.detach().clone()
            shard.copy_(average)
            average.copy_(kept)

    def _copy(self) -> None:
        if self._stream is None:
            for landing, shard in zip(self._landing, self.shards, strict=True):
                landing.copy_(shard.detach())
            return
        self._stream.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(self._stream):
            for landing, shard in zip(self._landing, self.shards, strict=True):
                landing.copy_(shard.detach(), non_blocking=True)
            self._copied = torch.cuda.Event()
            self._copied.record()

    @torch.no_grad()
    def _add(self, share: float) -> None:
        if self._copied is not None:
            self._copied.synchronize()
        torch._foreach_lerp_(self._averages, self._landing, share)

    def _finish_adding(self) -> None:
        if self._adding is not None:
            self._adding.join()
            self._adding = None
