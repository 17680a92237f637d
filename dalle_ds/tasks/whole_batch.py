"""Tasks whose loss compares all rows of an update with each other, on all processes and in all micro-batches."""

from __future__ import annotations

from abc import abstractmethod
from functools import cached_property

from torch import Tensor, nn

from dalle_ds.config import SharpnessConfig
from dalle_ds.parallel.peers import ALONE, Peers
from dalle_ds.tasks.base import Batch, Metrics, RunConfig, Task

Outputs = dict[str, Tensor]
"""What a model gives by name: (n, …) one entry per row, or () the same for all rows."""


class WholeBatchTask(Task[RunConfig]):
    """A task in two parts: what the model makes of each row by itself, and the loss of all rows together.

    How many processes and micro-batches make up an update changes neither loss nor gradients (`training/passes/caching.py`).
    """

    @cached_property
    def validation_rows(self) -> int:
        """Rows of one validation, which are compared with each other."""
        return min(self.run.report.validation_rows, len(self.samples("validation")))

    @property
    def sharpness(self) -> SharpnessConfig | None:
        """Sharpness-aware minimization; None for a task, or a run, without."""
        return None

    @abstractmethod
    def embed(self, model: nn.Module, batch: Batch) -> Outputs:
        """What the loss takes of the rows of a micro-batch, each of which depends on that row alone."""

    @abstractmethod
    def loss_of(self, outputs: Outputs, peers: Peers = ALONE) -> tuple[Tensor, Metrics]:
        """Loss of an update, of which `outputs` are this process's rows, and figures to report. Collective.

        Returns:
            () loss and detached metrics. Those that are () are averaged over processes, as are the loss and gradients; vectors
            are summed and given to `digest`.
        """

    def loss(self, model: nn.Module, batch: Batch, step: int) -> tuple[Tensor, Metrics]:
        """Of a micro-batch that is all of its update, on the only process."""
        return self.loss_of(self.embed(model, batch))
