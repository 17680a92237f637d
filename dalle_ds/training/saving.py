"""When a run's checkpoints are written, and what becomes of one that cannot be."""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager
from typing import Any, Protocol

from dalle_ds.config import Run
from dalle_ds.errors import CheckpointError
from dalle_ds.parallel import Mesh
from dalle_ds.training.checkpoints.saver import Saved, Saver

SECONDS_BETWEEN_TRIES = 60.0
"""Until a checkpoint that could not be written is tried again."""


class Say(Protocol):
    """`Tracker.say`."""

    def __call__(self, line: str, style: str | None = None) -> None:
        """Show a line to the user."""
        ...


class Saving:
    """Decides, on all processes alike, when a run's checkpoints are written.

    Args:
        saver: writes them.
        run: how often.
        mesh: the processes; the clock is the main one's.
        exactly: write each in the update in which it falls due, and wait for the one before if need be, since one more or one
            less changes the rounding of what follows (PowerSGD).
        say: tells the user of failures.
        long: a context around waits that may be long.
    """

    def __init__(
        self, saver: Saver, run: Run, mesh: Mesh, *, exactly: bool, say: Say, long: Callable[[], AbstractContextManager]
    ) -> None:
        self._saver, self._run, self._mesh = saver, run, mesh
        self._exactly, self._say, self._long = exactly, say, long
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
            ended = self._begin(step, state())
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

    def _begin(self, step: int, state: dict[str, Any]) -> Saved | None:
        self._saved_at, self._try_again_at, self._saved_step = time.monotonic(), math.inf, step
        try:
            with self._long():
                self._saver.begin(step, state)
        except CheckpointError as error:
            return Saved(step, str(error))
        return None

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
        self._say(
            f"ALARM: {saved.failure}; the run goes on, earlier checkpoints stay as they are, and the next try is in "
            f"{SECONDS_BETWEEN_TRIES:.0f} s or with the next checkpoint",
            style="bold red",
        )
