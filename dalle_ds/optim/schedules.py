"""Values that change over a run, as functions of the update."""

from __future__ import annotations

import math
from typing import Any

from dalle_ds.config import DvaeObjective, OptimConfig


def half_cosine(step: int, steps: int, start: float, end: float) -> float:
    """From `start` at update 0 to `end` at update `steps` on half a cosine, and `end` from there on (DALL·E App. A.2)."""
    if step >= steps:
        return end
    return end + 0.5 * (start - end) * (1 + math.cos(math.pi * step / steps))


def gumbel_temperature(objective: DvaeObjective, step: int) -> float:
    """Temperature τ of the dVAE's Gumbel-softmax in update `step`, counted from 0 (DALL·E App. A.2)."""
    return half_cosine(step, objective.temperature_steps, objective.temperature_start, objective.temperature_end)


def kl_weight(objective: DvaeObjective, step: int) -> float:
    """Weight β of the dVAE's KL term in update `step`, counted from 0 (DALL·E App. A.2)."""
    return half_cosine(step, objective.kl_warmup_steps, 0.0, objective.kl_weight)


class LearningRate:
    """Linear warm-up, then constant, cosine or plateau halving (DALL·E App. A.2, B.2).

    `at(step)` is the rate of update `step` (0-based); after each update `observe` gets its training loss. Both are pure
    functions of the losses seen, so a run that saves `state_dict` and resumes follows the same rates.

    The plateau rule keeps an exponential average of the loss, without the bias towards its start; whenever the average has
    not fallen by `plateau_threshold` (relative) for `plateau_patience` updates, the rate is halved and the count restarts.
    Where `halve_at` takes that over, halvings made so far stay.
    """

    def __init__(self, config: OptimConfig) -> None:
        self.config = config
        self.halvings = 0
        self._average = 0.0
        self._observed = 0
        self._best = math.inf
        self._since_best = 0

    def at(self, step: int) -> float:
        """Learning rate of update `step`, counted from 0."""
        config = self.config
        if step < config.warmup_steps:
            return config.lr * (step + 1) / config.warmup_steps
        if config.schedule == "cosine":
            assert config.decay_steps is not None
            rate = half_cosine(
                step - config.warmup_steps, config.decay_steps - config.warmup_steps, config.lr, config.final_lr
            )
        else:
            rate = config.lr * 0.5**self.halvings
        by_hand = sum(update <= step for update in config.halve_at or ())
        return rate * 0.5**by_hand

    def observe(self, step: int, loss: float) -> None:
        """Take note of the training loss of update `step`, the same number on every rank."""
        config = self.config
        if config.schedule != "plateau" or step < config.warmup_steps or config.halve_at is not None:
            return
        self._average = config.plateau_smoothing * self._average + (1 - config.plateau_smoothing) * loss
        self._observed += 1
        smoothed = self._average / (1 - config.plateau_smoothing**self._observed)
        if self._observed * (1 - config.plateau_smoothing) < 1:
            return  # so far an average of few losses, of which one lucky one would stay the record
        if smoothed < self._best - config.plateau_threshold * abs(self._best) or self._best == math.inf:
            self._best, self._since_best = smoothed, 0
            return
        self._since_best += 1
        if self._since_best >= config.plateau_patience and self.halvings < config.plateau_halvings:
            self.halvings += 1
            self._best, self._since_best = smoothed, 0

    def state_dict(self) -> dict[str, Any]:
        """What a checkpoint keeps."""
        return {
            "halvings": self.halvings,
            "average": self._average,
            "observed": self._observed,
            "best": self._best if self._best != math.inf else None,
            "since_best": self._since_best,
        }

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Go on from `state_dict`."""
        self.halvings = state["halvings"]
        self._average = state["average"]
        self._observed = state["observed"]
        self._best = math.inf if state["best"] is None else state["best"]
        self._since_best = state["since_best"]
