"""Checkpoints written asynchronously: an update waits for the copy to the host's memory, not for the disk.

`begin` plans and copies; from there on a thread of each process writes its file, and talks to nobody. Between updates the
processes add up who is done (`progress`), in a reduction that they make anyway, and go from one phase to the next together
(`advance`):

    writing      every process writes its own tensors
    completing   the main process writes index, state and manifest, renames the checkpoint and removes old ones
"""

from __future__ import annotations

import errno
import json
import math
import os
import shutil
import threading
import time
from collections.abc import Callable, Sequence
from concurrent.futures import Future
from contextlib import AbstractContextManager, suppress
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any, NamedTuple

import torch
import torch.distributed as dist

from dalle_ds.config import Run
from dalle_ds.errors import CheckpointError
from dalle_ds.parallel import Mesh
from dalle_ds.training.checkpoints.content import FORMAT, STATE_NAME, TENSORS_NAME, TrainedTensors
from dalle_ds.training.checkpoints.manifest import CheckpointFolder, FileRecord, Manifest, record_of
from dalle_ds.training.checkpoints.storage import INDEX_NAME
from dalle_ds.training.checkpoints.writing import Plan, file_name, gather_to_first, plan_for
from dalle_ds.training.tracking import Tracker

SECONDS_BETWEEN_TRIES = 60.0
"""Until a checkpoint that could not be written is tried again."""


class Saved(NamedTuple):
    """How the writing of the checkpoint of a step ended: why it could not be written; None if it was."""

    step: int
    failure: str | None


@dataclass
class _Save:
    """A checkpoint that is being written."""

    step: int
    partial: Path
    state: str
    plan: Plan | None
    parameters: dict[str, dict[str, Any]]
    job: Future[Any]
    completing: bool = False


class AsyncCheckpointer:
    """Writes a run's checkpoints. Every process has one, and calls the same methods in the same order.

    The processes of the first replica write, each what it has; what several of them have is written once.

    Args:
        folder: where they go.
        keep, keep_every: which of them stay (`CheckpointFolder.prune`).
        background: whether `begin` returns once all is copied, or once all is written, for which nothing is copied.
        before_completing: called on the main process, perhaps in another thread, before a checkpoint is made complete;
            an OSError says that it must not be.
    """

    def __init__(
        self,
        folder: CheckpointFolder,
        trained: TrainedTensors,
        mesh: Mesh,
        *,
        keep: int,
        keep_every: int | None = None,
        background: bool = True,
        before_completing: Callable[[], None] = lambda: None,
    ) -> None:
        self._folder, self._trained, self._mesh = folder, trained, mesh
        self._keep, self._keep_every = keep, keep_every
        self._background, self._before_completing = background, before_completing
        count = mesh.world_size // mesh.size("replica")
        # On CPUs all processes' own group will do.
        whole = count == mesh.world_size and mesh.device.type == "cpu"
        self._group = None if whole else _writers(count, dist.group.WORLD)
        self._plan: Plan | None = None
        self._save: _Save | None = None

    @property
    def busy(self) -> bool:
        """Whether a checkpoint is being written."""
        return self._save is not None

    def begin(self, step: int, state: dict[str, Any]) -> None:
        """Begin to write the checkpoint of update `step`; there must be no other. Collective.

        `state` is JSON-able, and comes back from `load_state`. CheckpointError where there is no room.
        """
        assert self._save is None
        replicas = self._trained.replicas
        errors = {} if replicas is None else replicas.errors()
        if replicas is not None:
            # What is resumed from the sums shares them out anew, and so does this run, to go on exactly alike.
            replicas.load_error_feedback(errors)
        plan, parameters = None, {}
        if self._mesh.index("replica") == 0:
            shards = self._trained.local_shards(errors)
            plan = self._plan = plan_for(shards, self._group, self._plan)
            tables = gather_to_first(self._trained.parameters(), self._group)
            parameters = {name: row for table in tables for name, row in table.items()}
        partial = self._mesh.decide(lambda: self._make_room(step, plan))
        if plan is None:
            job = _start(lambda: None, background=False)
        else:
            source = plan.snapshot(shards) if self._background else shards
            job = _start(lambda: plan.write(partial / TENSORS_NAME, source), self._background)
        text = json.dumps({"format": FORMAT, **state, "step": step}, indent=2) + "\n"
        self._save = _Save(step, partial, text, plan, parameters, job)

    def progress(self) -> tuple[int, int]:
        """This process's part of what `advance` takes: 1 where its work of this phase is done, 1 where it failed."""
        save = self._save
        if save is None or not save.job.done() or (save.completing and not self._mesh.is_main):
            return 0, 0
        has_failed = _failure(save.job) is not None
        return int(not has_failed), int(has_failed)

    def advance(self, done: int, failed: int) -> Saved | None:
        """Go on to the next phase if all have ended this one, by the sums of `progress` over all processes. Collective if so.

        Returns how the checkpoint ended, if it did.
        """
        save = self._save
        if save is None or done + failed < (1 if save.completing else self._mesh.world_size):
            return None
        reasons: list[Any] = [_failure(save.job)]
        if not save.completing:
            # What the writers came to, in their order: on the main process, of all.
            outcome: Any = _failure(save.job) or save.job.result()
            written = gather_to_first(outcome, self._group) if save.plan is not None else []
            if not failed:
                save.completing = True
                complete = (lambda: self._complete(save, written)) if self._mesh.is_main else (lambda: None)
                save.job = _start(complete, self._background and self._mesh.is_main)
                return None
            reasons += written
        self._save = None
        if not failed:
            return Saved(save.step, None)
        reason = next((each for each in reasons if isinstance(each, OSError)), None)
        if not self._mesh.is_main:
            why = reason or "another process says why"
            return Saved(save.step, f"the checkpoint of step {save.step} could not be written ({why})")
        shutil.rmtree(save.partial, ignore_errors=True)
        return Saved(save.step, _why(save.step, self._folder.path, reason))

    def finish(self) -> Saved | None:
        """Wait until nothing is being written any more; how the last checkpoint ended, if one was. Collective."""
        ended = None
        while self._save is not None:
            _failure(self._save.job)
            done, failed = self._mesh.sum(torch.tensor(self.progress()), "world").tolist()
            ended = self.advance(done, failed)
        return ended

    def _make_room(self, step: int, plan: Plan | None) -> Path:
        """The folder to write in."""
        assert plan is not None  # the main process writes
        try:
            partial = self._folder.begin(step)
            (partial / TENSORS_NAME).mkdir()
            if plan.total_size > shutil.disk_usage(partial).free:
                # Known beforehand, and better not found out by filling the disk to the last byte.
                shutil.rmtree(partial, ignore_errors=True)
                raise OSError(errno.ENOSPC, f"{os.strerror(errno.ENOSPC)}: {plan.total_size / 2**20:,.0f} MiB needed")
            return partial
        except OSError as error:
            raise CheckpointError(_why(step, self._folder.path, error)) from error

    def _complete(self, save: _Save, written: Sequence[FileRecord | None]) -> None:
        """Write all but tensors, and give the checkpoint its name. On the main process only."""
        assert save.plan is not None
        self._before_completing()
        save.plan.write_index(save.partial / TENSORS_NAME, save.parameters)
        (save.partial / STATE_NAME).write_text(save.state)
        files = {
            f"{TENSORS_NAME}/{file_name(rank)}": record for rank, record in enumerate(written) if record is not None
        }
        for name in (f"{TENSORS_NAME}/{INDEX_NAME}", STATE_NAME):
            files[name] = record_of(save.partial / name)
        self._folder.complete(save.partial, Manifest(save.step, files))
        with suppress(OSError):  # the checkpoint is there
            self._folder.prune(self._keep, self._keep_every)


def _start(work: Callable[[], Any], background: bool) -> Future[Any]:
    """Work for a thread, for which a run that ends with an error does not wait; or work that is done at once."""
    job: Future[Any] = Future()

    def run() -> None:
        try:
            job.set_result(work())
        except BaseException as error:
            job.set_exception(error)

    if background:
        threading.Thread(target=run, name="checkpoint", daemon=True).start()
    else:
        run()
    return job


def _failure(job: Future[Any]) -> OSError | None:
    """Once a job is done, why it failed; any other error than an OSError is raised."""
    error = job.exception()
    if error is None or isinstance(error, OSError):
        return error
    raise error


def _why(step: int, folder: Path, error: OSError | None) -> str:
    try:
        room = f"{shutil.disk_usage(folder).free / 2**20:,.0f} MiB free there"
    except OSError:
        room = "which cannot be looked at"
    return f"the checkpoint of step {step} could not be written to {folder}, {room}: {error}"


@cache
def _writers(count: int, world: Any) -> Any:
    """The first processes of the world, for plans of who writes what, which are on the CPU. Collective."""
    return None if world is None else dist.new_group(list(range(count)), backend="gloo")


class CheckpointScheduler:
    """Decides, on all processes alike, when a run's checkpoints are written; the clock is the main process's.

    Args:
        tracker: what it has recorded up to a checkpoint is there when that is; it tells the user of failures.
        long: a context around waits that may be long.
    """

    def __init__(
        self,
        folder: CheckpointFolder,
        trained: TrainedTensors,
        run: Run,
        mesh: Mesh,
        tracker: Tracker,
        long: Callable[[], AbstractContextManager],
    ) -> None:
        self._run, self._mesh, self._tracker, self._long = run, mesh, tracker, long
        self._saver = AsyncCheckpointer(
            folder,
            trained,
            mesh,
            keep=run.report.keep_checkpoints,
            keep_every=run.report.keep_every,
            background=run.report.background_saves,
            before_completing=tracker.sync,
        )
        # With PowerSGD, a checkpoint changes the rounding of what follows: each is written in the update in which it is due.
        self._exactly = trained.replicas is not None and trained.replicas.compresses
        self._is_due = False
        self._saved_step = -1
        self._saved_at = time.monotonic()
        self._try_again_at = math.inf
        self.failures = 0
        """Checkpoints that could not be written."""

    def flags(self) -> list[int]:
        """What this process adds to the sums that `note` takes."""
        now, minutes = time.monotonic(), self._run.save_minutes
        by_clock = now >= self._try_again_at or (minutes is not None and now - self._saved_at >= 60 * minutes)
        return [int(self._mesh.is_main and by_clock and not self._saver.busy), *self._saver.progress()]

    def note(self, sums: Sequence[int]) -> None:
        """Take note of the sums of `flags` over all processes, once an update. Collective."""
        due, done, failed = sums
        self._is_due |= due > 0
        self._tell(self._saver.advance(done, failed))

    def save_if_due(self, step: int, state: Callable[[], dict[str, Any]], *, ends: bool, hold: bool) -> Saved | None:
        """Begin to write a checkpoint when it is time. Collective.

        Args:
            step: updates done.
            state: makes what the checkpoint keeps besides tensors.
            ends: write it in any case, and wait for it: the process ends after this update.
            hold: write none now unless the process ends.

        Returns:
            If it ends, how that went; None where this very update has been saved already.
        """
        self._is_due |= step % self._run.save_every == 0 or ends
        if not self._is_due or (hold and not ends):
            return None
        if self._saver.busy and not ends and not self._exactly:
            return None  # the disk is slower than checkpoints fall due: this one is written once the last is there
        self.wait()
        self._is_due = False
        ended: Saved | None = None
        if self._saved_step != step:
            kept = state()
            self._saved_at, self._try_again_at, self._saved_step = time.monotonic(), math.inf, step
            try:
                with self._long():
                    self._saver.begin(step, kept)
            except CheckpointError as error:
                ended = Saved(step, str(error))
        if not ends:
            self._tell(ended)
            return None
        return ended or self._finish()

    def begin_at(self, step: int) -> None:
        """Forget what was due: the run is at a checkpoint again, that of `step`. Nothing must be being written."""
        self._is_due, self._saved_step = False, step

    def wait(self) -> None:
        """Until nothing is being written. Collective."""
        self._tell(self._finish())

    def _finish(self) -> Saved | None:
        if not self._saver.busy:
            return None
        with self._long():
            return self._saver.finish()

    def _tell(self, saved: Saved | None) -> None:
        """Count and tell a checkpoint that could not be written: the run goes on."""
        if saved is None or saved.failure is None:
            return
        self.failures += 1
        self._saved_step = -1
        self._try_again_at = time.monotonic() + SECONDS_BETWEEN_TRIES
        self._tracker.alarm(
            f"{saved.failure}; the run goes on, earlier checkpoints stay as they are, and the next try is in "
            f"{SECONDS_BETWEEN_TRIES:.0f} s or with the next checkpoint"
        )
