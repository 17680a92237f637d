"""Whether a training process lives, as its watchman sees it."""

from __future__ import annotations

import os
import signal
import time

from .stacks import state
from .verdict import Report

SIGNAL_DELAY = 0.1
"""Seconds after a death in which a signal to end that the watchman gets too is held to be its cause."""
SIGNAL_LASTS = 60.0
"""Seconds in which such a signal may have its effect."""


class Parent:
    """The training process that this one watches.

    Args:
        patience: seconds for which it may be stopped.
    """

    def __init__(self, pid: int, patience: float) -> None:
        self._told_at = float("-inf")
        self._pid = pid
        self._patience = patience
        self._ending_since: float | None = None
        self._stopped_since: float | None = None

    @property
    def gone(self) -> bool:
        """Whether it has ended: orphans get another parent."""
        return os.getppid() != self._pid

    @property
    def told(self) -> bool:
        """Whether this process got a signal to end lately, as both do from a terminal, launchers and SLURM."""
        return time.monotonic() < self._told_at + SIGNAL_LASTS

    def is_told(self) -> None:
        """Note such a signal."""
        self._told_at = time.monotonic()

    @property
    def ending(self) -> bool:
        """Whether it is known to be about to end."""
        return self._ending_since is not None

    def hangs_up(self, now: float) -> None:
        """Note that its side of the channel is closed: it is ending, which takes seconds where it holds a GPU's memory."""
        if self._ending_since is None:
            self._ending_since = now

    def check(self, now: float) -> Report | None:
        """What is wrong with it, if anything."""
        if self.gone:
            self.hangs_up(now)
        if self._ending_since is not None:
            if now < self._ending_since + SIGNAL_DELAY:
                return None
            if self.told:
                return Report("told", "was told to end by a signal")
            return Report("dead", "has died: killed or crashed (dmesg on its host tells whether memory ran out)")
        if state(self._pid) != "T":  # a debugger's stop has another letter
            self._stopped_since = None
        elif self._stopped_since is None:
            self._stopped_since = now
        elif now > self._stopped_since + self._patience:
            return Report("dead", f"has been stopped by a signal (SIGSTOP) for {self._patience:.0f} s")
        return None

    def forgive(self) -> None:
        """Count the time of being stopped afresh."""
        self._stopped_since = None

    def kill(self) -> None:
        """End it, whatever it does."""
        if not self.gone:
            os.kill(self._pid, signal.SIGKILL)
