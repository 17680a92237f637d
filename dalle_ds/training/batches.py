"""A run's batches, on this process's device and ready for the task."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from typing import Any

from dalle_ds.config import Run
from dalle_ds.data import BatchLoader, Mixture, evaluation_batches
from dalle_ds.data.faults import FaultLog, WorkerError
from dalle_ds.parallel import Mesh
from dalle_ds.parallel.mesh import share_tensors
from dalle_ds.tasks import Batch, Task

PREVIEW_ROWS = 16
LOADER_TRIES = 3
"""Starts of loader processes for one update, before it is given up."""


class Batches:
    """Training, validation and preview batches of a task, of `micro_batch` rows for each rank.

    DataError where a split is missing. That of validation may be empty: data of one image, or of --validation 0.
    """

    def __init__(self, task: Task[Any], run: Run, micro_batch: int, mesh: Mesh) -> None:
        self.train_samples = task.samples("train")
        self.validation_samples = task.samples("validation")
        self.faults = FaultLog()
        """What could not be read of training batches, on this process."""
        self._task, self._run, self._micro_batch, self._mesh = task, run, micro_batch, mesh
        self._next_step: int | None = None
        self._stream: Iterator[Batch] = iter(())

    def next_update(self, data_step: int, count: int, pulse: Callable[[], None]) -> list[Batch]:
        """This rank's micro-batches, `count` of them, of the update whose data lie at `data_step`; collective as `train`.

        `pulse` is called before each is waited for.
        """
        if data_step != self._next_step:
            self._stream = self.train(data_step)
        self._next_step = data_step + 1
        for tries_left in reversed(range(LOADER_TRIES)):
            try:
                found = []
                for _ in range(count):
                    pulse()
                    found.append(next(self._stream))
                return found
            except WorkerError as error:
                # Processes that share a model's batches may have had some of these already.
                if tries_left == 0 or self._mesh.size("model") > 1:
                    raise
                print(f"rank {self._mesh.rank}: {error}; others take their place", flush=True)
                self._stream = self.train(data_step)
        raise AssertionError

    def train(self, start_step: int) -> Iterator[Batch]:
        """This rank's micro-batches from update `start_step` on, endless; collective among the processes of a model."""

        def load() -> Iterable[Batch]:
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
            loader.faults = self.faults
            return loader

        return self._shared(load)

    def validation(self) -> Iterator[Batch]:
        """This rank's part of the validation rows; collective as `train`."""
        rank, world_size = self._mesh.index("data"), self._mesh.size("data")
        rows = self._run.report.validation_rows
        samples, micro_batch = self.validation_samples, self._micro_batch
        return self._shared(
            lambda: evaluation_batches(samples, micro_batch, rank=rank, world_size=world_size, rows=rows)
        )

    def check_unchanged(self) -> None:
        """Raise a `DataChangedError` where the data is not what the run began with."""
        for samples in (self.train_samples, self.validation_samples):
            samples.check_unchanged()

    def describe(self) -> list[str]:
        """Lines for the user on each of several corpora."""
        train, validation = self.train_samples, self.validation_samples
        if not (isinstance(train, Mixture) and isinstance(validation, Mixture)):
            return []
        batch = self._run.train.batch_size
        return [
            f"data: {share:.1%} of the samples from {folder} ({len(rows):,} training rows, an epoch of them every "
            f"{len(rows) / (share * batch):,.1f} updates; {len(held_out):,} validation rows)"
            for folder, share, rows, held_out in zip(
                self._run.corpora, train.shares, train.corpora, validation.corpora, strict=True
            )
        ]

    def _shared(self, read: Callable[[], Iterable[Batch]]) -> Iterator[Batch]:
        """Batches made ready by the first of the processes that hold parts of one model, on all of them.

        Each reading for itself would be as much work once more, and where one of them could not read an image, or rounded a
        code in another way, they would go on with different data.
        """
        if self._mesh.size("model") == 1:
            yield from map(self._ready, read())
            return
        if self._mesh.index("model") > 0:
            while (batch := share_tensors(None, self._mesh, "model")) is not None:
                yield batch
            return
        for batch in map(self._ready, read()):
            yield share_tensors(batch, self._mesh, "model") or {}
        share_tensors(None, self._mesh, "model")

    def preview(self) -> Batch:
        """A few rows of validation data, the same on any rank."""
        rows = evaluation_batches(self.validation_samples, PREVIEW_ROWS, rank=0, world_size=1, rows=PREVIEW_ROWS)
        return self._ready(next(rows))

    def _ready(self, batch: Batch) -> Batch:
        moved = {name: value.to(self._mesh.device, non_blocking=True) for name, value in batch.items()}
        return self._task.prepare(moved)
