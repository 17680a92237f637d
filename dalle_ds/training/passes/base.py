"""What passes have in common, and those of a model that is all here."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Sequence
from typing import Any

from dalle_ds.tasks import Batch, Metrics, Task


class Passes(ABC):
    """How an engine computes gradients.

    Args:
        task: turns batches into losses.
        engine: from `build_engine`.
    """

    def __init__(self, task: Task[Any], engine: Any) -> None:
        self._task, self._engine = task, engine
        self.pulse: Callable[[], None] = lambda: None
        """Called before each micro-batch's part of the work: a long update is no hang."""

    @property
    @abstractmethod
    def model(self) -> Callable[..., Any]:
        """Called as the plain model is, without gradients, by all processes of a model at a time."""

    @abstractmethod
    def backward(self, micro_batches: Sequence[Batch], step: int) -> list[Metrics]:
        """Leave the averaged gradients of update `step` in the engine; returns each micro-batch's loss and metrics."""

    @abstractmethod
    def step(self) -> None:
        """Let the engine take its step."""


class EnginePasses(Passes):
    """Micro-batch after micro-batch through a model that is all here."""

    @property
    def model(self) -> Callable[..., Any]:
        return self._engine

    def backward(self, micro_batches: Sequence[Batch], step: int) -> list[Metrics]:
        reported: list[Metrics] = []
        for batch in micro_batches:
            self.pulse()
            loss, metrics = self._task.loss(self._engine, batch, step)
            self._engine.backward(loss)
            reported.append({"loss": loss.detach(), **metrics})
            if len(reported) < len(micro_batches):
                self._engine.step()  # not yet: DeepSpeed counts micro-batches
        return reported

    def step(self) -> None:
        self._engine.step()
