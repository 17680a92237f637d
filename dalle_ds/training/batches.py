"""A run's batches, on this process's device and ready for the task."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from dalle_ds.config import Run
from dalle_ds.data import BatchLoader, evaluation_batches
from dalle_ds.errors import DataError
from dalle_ds.parallel import Mesh
from dalle_ds.tasks import Batch, Task

PREVIEW_ROWS = 16


class Batches:
    """Training, validation and preview batches of a task.

    Args:
        micro_batch: rows of one batch of one rank.

    Raises:
        DataError: a split is missing or empty.
    """

    def __init__(self, task: Task[Any], run: Run, micro_batch: int, mesh: Mesh) -> None:
        self.train_samples = task.samples("train")
        self.validation_samples = task.samples("validation")
        if len(self.validation_samples) == 0:
            raise DataError(f"{run.data} has no validation rows: prepare it again with a greater --validation")
        self._task = task
        self._run = run
        self._micro_batch = micro_batch
        self._mesh = mesh

    def train(self, start_step: int) -> Iterator[Batch]:
        """This rank's micro-batches from update `start_step` on, endless."""
        loader = BatchLoader(
            self.train_samples,
            seed=self._run.seed,
            batch_size=self._run.train.batch_size,
            micro_batch=self._micro_batch,
            rank=self._mesh.index("data"),
            world_size=self._mesh.size("data"),
            start_step=start_step,
            workers=self._run.loader.workers,
        )
        return map(self._ready, loader)

    def validation(self) -> Iterator[Batch]:
        """This rank's part of the validation rows."""
        rows = evaluation_batches(
            self.validation_samples,
            self._micro_batch,
            rank=self._mesh.index("data"),
            world_size=self._mesh.size("data"),
            rows=self._run.report.validation_rows,
        )
        return map(self._ready, rows)

    def preview(self) -> Batch:
        """A few rows of validation data, the same on any rank."""
        rows = evaluation_batches(self.validation_samples, PREVIEW_ROWS, rank=0, world_size=1, rows=PREVIEW_ROWS)
        return self._ready(next(rows))

    def _ready(self, batch: Batch) -> Batch:
        moved = {name: value.to(self._mesh.device, non_blocking=True) for name, value in batch.items()}
        return self._task.prepare(moved)
