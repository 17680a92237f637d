"""Batches as a pure function of (seed, step): whatever the number of processes, workers or the size of micro-batches.

Position p of the endless sequence of shuffled epochs (`order.rows_of`, or of several corpora in turn, `order.turns_of`) is
sample p of training. Step s takes positions [s·B, (s+1)·B), and all randomness of a sample comes from (seed, position). A run
resumes by starting at its next step.
"""

from __future__ import annotations

import itertools
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any, Protocol

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor
from torch.utils.data import DataLoader, Dataset

from dalle_ds.data.dataset import FOR_TRAINING
from dalle_ds.data.faults import Fault, FaultLog
from dalle_ds.data.order import Mixture, hash_integers
from dalle_ds.data.workers import keep_sigchld_handler, next_batch, start_worker, worker_context
from dalle_ds.errors import ConfigError, DataError

MAX_TRIES = 256
"""Rows tried for one sample before the data is held to be unreadable as a whole: with nine of ten rows unreadable, which a
run may allow (`loader.max_unreadable`), this many fail in turn once in 10^12 samples."""

_KEY_STREAM = 1
_EVALUATION_SEED = 2**63  # no run has it

Arrays = dict[str, npt.NDArray | int]
Batch = dict[str, Tensor]


class Samples(Protocol):
    """What a loader draws from: small enough to be sent to worker processes."""

    def __len__(self) -> int:
        """Rows."""

    def sample(self, row: int, rng: np.random.Generator) -> Arrays:
        """The arrays of one row; all randomness is from `rng`. Raises `DataError` for a row that cannot be read."""

    @property
    def faults(self) -> tuple[Fault, ...]:
        """What was known to be unreadable when the data was opened."""

    def check_unchanged(self) -> None:
        """Quick, for every checkpoint. Raises `DataChangedError` where the data is not what was opened."""


class BatchLoader:
    """An endless iterable of micro-batches; each iteration begins at `start_step`.

    Args:
        samples: where samples come from.
        seed: chooses the order of rows and every random choice, in [0, 2^63).
        batch_size: samples of one step over all ranks and micro-batches.
        micro_batch: samples of one micro-batch of one rank.
        rank, world_size: which of how many processes this is.
        start_step: the first step, at no cost.
        workers: processes that read and augment; 0 does it here. They live through a job's warning of its end
            (`workers.start_worker`), so that the trainer can finish its step and save.

    Yields:
        Each array of the samples stacked to (micro_batch, …), and
        `key`: (micro_batch,) int64, not negative, a seed per sample for noise drawn inside a model;
        `skipped`: (micro_batch,) int64, how many unreadable rows other rows had to stand in for (almost always 0 or 1).
        Step s is micro-batches s·m to (s+1)·m - 1 of each rank, with m = `micro_batches_per_step`.

    Raises:
        ConfigError: the batch cannot be divided so.
        DataError: no rows; or, while iterating, 256 rows in turn that cannot be read.
        WorkerError: a worker was killed. The trainer iterates anew then, up to 3 starts for one update; where processes
            share a model, the run ends.
    """

    def __init__(
        self,
        samples: Samples,
        *,
        seed: int,
        batch_size: int,
        micro_batch: int,
        rank: int,
        world_size: int,
        start_step: int = 0,
        workers: int = 0,
    ) -> None:
        assert 0 <= rank < world_size
        if batch_size % (micro_batch * world_size):
            raise ConfigError(
                f"train.batch_size={batch_size} is not a multiple of train.micro_batch={micro_batch} times "
                f"{world_size} processes"
            )
        if len(samples) == 0:
            raise DataError(f"the training split has no rows: {FOR_TRAINING}")
        self.micro_batches_per_step = batch_size // (micro_batch * world_size)
        """Micro-batches of one rank that make up one step."""
        self._micro_batch = micro_batch
        self._first = start_step * batch_size + rank * micro_batch
        self._stride = micro_batch * world_size
        self._dataset = _TrainingBatches(samples, seed)
        self._workers = workers
        self.faults = FaultLog()
        """What could not be read of the batches so far, on this rank."""

    def __iter__(self) -> Iterator[Batch]:
        batches: Iterator[_Loaded] | None = self._started()
        while batches is not None:
            try:
                loaded = next_batch(batches)
            except DataError as error:  # a worker that is gone is a failure like others
                loaded = _Loaded(failure=error.with_traceback(None))
            for fault in loaded.faults:
                self.faults.add(fault)
            if loaded.failure is not None:
                batches = None  # the other workers end here, not when the last reference to the error is gone
                raise loaded.failure
            yield loaded.batch

    def _positions(self) -> Iterator[list[int]]:
        """Of this rank's micro-batches. Micro-batch n of all ranks covers a run of positions; these runs tile the steps, since
        the batch is a multiple of micro_batch · world_size."""
        return (list(range(first, first + self._micro_batch)) for first in itertools.count(self._first, self._stride))

    def _started(self) -> Iterator[_Loaded]:
        loader = DataLoader(
            self._dataset,
            batch_sampler=self._positions(),
            num_workers=self._workers,
            collate_fn=_as_it_is,
            worker_init_fn=start_worker if self._workers else None,
            multiprocessing_context=worker_context() if self._workers else None,
            generator=torch.Generator(),  # torch draws a seed for workers, by default from the global generator
        )
        return keep_sigchld_handler(lambda: iter(loader))


def evaluation_batches(
    samples: Samples, micro_batch: int, *, rank: int, world_size: int, rows: int | None = None
) -> Iterator[Batch]:
    """Batches of `rows` rows spread evenly over the samples, the same rows in every evaluation and under every layout.

    Args:
        samples: where samples come from.
        micro_batch: the most samples of one batch of one rank.
        rows: how many rows; None, or more than there are, takes all.

    Yields:
        This rank's share, as `BatchLoader` yields micro-batches; every rank gets equally many of equal size. Besides,
        `valid`: (micro_batch,) float32, 1, or 0 where a row only fills up the last batch and must not be counted; and
        `place`: (micro_batch,) int64, which of the `rows` rows it is.

    Raises:
        DataError: no rows, or 256 rows in turn that cannot be read.
    """
    samples = _mixture(samples)
    if len(samples) == 0:
        raise DataError("the evaluation split has no rows: prepare more data, or raise the share of validation")
    count = len(samples) if rows is None else min(rows, len(samples))
    micro_batch = min(micro_batch, -(-count // world_size))
    for start in range(0, count, micro_batch * world_size):
        first = start + rank * micro_batch
        numbers = range(first, first + micro_batch)
        chosen = [min(number, count - 1) * len(samples) // count for number in numbers]
        batch = _stack([_readable_sample(samples, row, (_EVALUATION_SEED, row), []) for row in chosen])
        batch["valid"] = torch.tensor([float(number < count) for number in numbers])
        batch["place"] = torch.tensor([min(number, count - 1) for number in numbers])
        yield batch


@dataclass
class _Loaded:
    """A micro-batch, and what could not be read on the way."""

    batch: Batch = field(default_factory=dict)
    faults: list[DataError] = field(default_factory=list)
    failure: DataError | None = None
    """Why there is no batch. Returned, since torch would put a traceback into the message of an error that is raised."""


class _TrainingBatches(Dataset[_Loaded]):
    """The micro-batch at a list of positions."""

    def __init__(self, samples: Samples, seed: int) -> None:
        self._samples = _mixture(samples)
        self._seed = seed

    def __getitems__(self, positions: list[int]) -> _Loaded:
        loaded = _Loaded()
        rows = self._samples.rows_at(np.array(positions, dtype=np.int64), self._seed).tolist()
        try:
            loaded.batch = _stack(
                [
                    _readable_sample(self._samples, row, (self._seed, position), loaded.faults)
                    for row, position in zip(rows, positions, strict=True)
                ]
            )
        except DataError as error:
            loaded.failure = error
        return loaded


def _mixture(samples: Samples) -> Mixture:
    return samples if isinstance(samples, Mixture) else Mixture([samples])


def _readable_sample(samples: Mixture, row: int, seed: tuple[int, int], faults: list[DataError]) -> Arrays:
    """The sample of a row, or of the first row of a pseudorandom sequence from the same corpus that can be read; `faults` gets
    the errors of others."""
    others = samples.rows_like(row)
    for attempt in range(MAX_TRIES):
        candidate = row if attempt == 0 else others[hash_integers(*seed, 0, attempt) % len(others)]
        try:
            arrays = samples.sample(candidate, np.random.default_rng(hash_integers(*seed, 0, attempt)))
        except DataError as error:
            faults.append(error.with_traceback(None))
            continue
        return {**arrays, "key": hash_integers(*seed, _KEY_STREAM) >> 1, "skipped": attempt}
    raise DataError(f"of the last {MAX_TRIES} rows tried none could be read; the last one: {faults[-1]}")


def _stack(samples: list[Arrays]) -> Batch:
    return {name: torch.from_numpy(np.stack([np.asarray(sample[name]) for sample in samples])) for name in samples[0]}


def _as_it_is(batch: Any) -> Any:
    return batch
