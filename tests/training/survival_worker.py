"""Trains tiny transformers whose disks and data fail on purpose; started by test_survival.py with the deepspeed launcher.

Arguments: a JSON file with a list of {"name", "run": fields, "deepspeed": JSON, "fault": [kind, update, …]}. An update, from
1, is that after which, or from which on, the fault is there. A run that ends with an error prints its name, rank and error.
"""

from __future__ import annotations

import gc
import json
import multiprocessing
import os
import random
import signal
import sys
from collections.abc import Callable
from contextlib import ExitStack
from pathlib import Path
from typing import Any
from unittest import mock

import numpy as np
import torch
from torch import Tensor, nn

from dalle_ds.cli import run_launcher
from dalle_ds.config import TransformerRun, from_dict
from dalle_ds.data.faults import RowError
from dalle_ds.errors import DalleError
from dalle_ds.parallel import Mesh
from dalle_ds.resilience.signals import StopSignals
from dalle_ds.tasks import Batch, Metrics
from dalle_ds.tasks.transformer import TransformerTask
from dalle_ds.training.checkpoints import saver as saving
from dalle_ds.training.checkpoints.manifest import CheckpointFolder
from dalle_ds.training.checkpoints.writing import Plan
from dalle_ds.training.trainer import Trainer


class NoisyTask(TransformerTask):
    """The transformer, with a loss that depends on every generator there is."""

    begun = 0
    """Updates of which the loss was computed."""

    def loss(self, model: nn.Module, batch: Batch, step: int) -> tuple[Tensor, Metrics]:
        NoisyTask.begun = step + 1
        loss, metrics = super().loss(model, batch, step)
        noise = random.random() + np.random.random() + float(torch.rand(())) + float(np.random.normal())  # noqa: NPY002
        return loss * (1 + 0.1 * noise), metrics


def no_space() -> OSError:
    return OSError(28, "No space left on device")


def failing(original: Callable[..., Any], update: int, times: int, rank: int | None = None) -> Callable[..., Any]:
    """What fails the first `times` times from update `update` on, on one rank or on all."""
    failed = 0

    def call(*arguments: Any) -> Any:
        nonlocal failed
        if NoisyTask.begun >= update and failed < times and (rank is None or os.environ["RANK"] == str(rank)):
            failed += 1
            raise no_space()
        return original(*arguments)

    return call


class Signals(StopSignals):
    """A process that is told to stop before an update is done."""

    def __init__(self, update: int, rank: int) -> None:
        super().__init__(quiet=True)
        self.update, self.rank = update, rank

    @property
    def requested(self) -> str | None:
        return "SIGUSR1" if NoisyTask.begun >= self.update - 1 and os.environ["RANK"] == str(self.rank) else None


def break_(stack: ExitStack, kind: str, update: int, run: TransformerRun) -> None:
    """Let something fail from update `update` on, as long as the stack is open."""

    def patch(owner: Any, name: str, value: Any) -> None:
        stack.enter_context(mock.patch.object(owner, name, value))

    if kind == "tensors":  # of the other process
        patch(Plan, "write", failing(Plan.write, update, 2, rank=1))
    elif kind == "rest":
        patch(CheckpointFolder, "complete", failing(CheckpointFolder.complete, update, 2))
    elif kind == "folder":
        patch(CheckpointFolder, "begin", failing(CheckpointFolder.begin, update, 2))
    elif kind in ("for ever", "told and in vain"):
        patch(Plan, "write", failing(Plan.write, update - 1, 10**9, rank=1))
    elif kind == "metrics":
        patch(os, "write", failing(os.write, update, 3))
    elif kind == "rows":
        from dalle_ds.data.samples import TextImageSamples

        sample = TextImageSamples.sample

        def broken(self: Any, row: int, rng: np.random.Generator) -> Any:
            if row % 5 < 3:
                raise RowError(f"row {row} is broken", "broken row", f"row {row}")
            return sample(self, row, rng)

        patch(TextImageSamples, "sample", broken)
    elif kind == "workers":
        inner = NoisyTask.loss

        def kill(self: Any, model: Any, batch: Any, step: int) -> Any:
            if step + 1 in (update, update + 3) and os.environ["RANK"] == "1":
                for worker in multiprocessing.active_children():
                    os.kill(worker.pid or 0, signal.SIGKILL)
            return inner(self, model, batch, step)

        patch(NoisyTask, "loss", kill)
    elif kind == "changed":
        before = TransformerTask.digest

        def touch(self: Any, sums: Any) -> Any:
            if NoisyTask.begun == update and os.environ["RANK"] == "0":
                info = next(Path(run.data).glob("**/info.json"))
                info.write_text(info.read_text().replace('"fingerprint": "', '"fingerprint": "f'))
            return before(self, sums)

        patch(TransformerTask, "digest", touch)


def main() -> None:
    saving.SECONDS_BETWEEN_TRIES = 0.0
    mesh = Mesh.start("cpu")
    for job in json.loads(Path(sys.argv[-1]).read_text()):
        run = from_dict(TransformerRun, job["run"], job["name"])
        kind, update, *more = job["fault"] or ("none", 0)
        trainer = None
        with ExitStack() as stack:
            break_(stack, kind, update, run)
            try:
                signals = Signals(update, *more) if kind.startswith("told") else None
                trainer = Trainer(NoisyTask, run, job["deepspeed"], mesh, signals=signals)
                trainer.fit()
            except DalleError as error:
                print(f"{job['name']} rank {mesh.rank} {type(error).__name__}: {error}", flush=True)
        if trainer is not None:
            trainer.directory.release()
        trainer = None
        gc.collect()  # a process with the buffers of many engines cannot be forked
        NoisyTask.begun = 0
        mesh.barrier()
    mesh.stop()


if __name__ == "__main__":
    torch.set_num_threads(1)
    run_launcher(main)
