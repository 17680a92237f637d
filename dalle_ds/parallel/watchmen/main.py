"""The watchman's process."""

from __future__ import annotations

import json
import os
import selectors
import signal
import socket
import sys
import time

from .channel import Channel, Settings
from .chief import Chief
from .watchman import Watchman

TICK = 0.5
"""Seconds between two looks at clocks and at the training process; messages are read as they come."""
HURRY = 0.1
"""The same, where the training process is about to end or to write its stacks."""
PAUSE = 5.0
"""A watchman that has not run for so many seconds was suspended, maybe with all others, and counts silences afresh."""


def main(connection: int) -> None:
    """Read the settings from standard input and watch until there is nothing more to watch.

    Args:
        connection: number of a socket to the training process.
    """
    settings = Settings(**json.load(sys.stdin))
    channel = Channel(socket.socket(fileno=connection))
    selector = selectors.DefaultSelector()
    watchman = Watchman(settings, channel, selector)
    parent = watchman.parent
    # Launchers and SLURM signal all processes of a run. The training process decides what follows, and may have a step to
    # finish and a checkpoint to write; a watchman ends soon after it, whatever it is told.
    signal.signal(signal.SIGUSR2, signal.SIG_IGN)
    for told in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP, signal.SIGUSR1):
        signal.signal(told, lambda *_: parent.is_told())
    chief = Chief(settings, channel, selector, parent) if settings.rank == 0 else None
    last = time.monotonic()
    while not (watchman.done and (chief is None or chief.done)):
        for key, _ in selector.select(HURRY if watchman.hurries else TICK):
            key.data()
        now = time.monotonic()
        for post in (watchman, chief):
            if post is not None:
                if now > last + PAUSE:
                    post.forgive(now)
                post.tick(now)
        last = now
    watchman.close()
    os._exit(0)  # not held up by a disk that hangs
