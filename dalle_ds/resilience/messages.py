"""What monitors tell each other and the user: failures, positions, the log line, and JSON objects over sockets.

Messages are one on a line, each with its `kind`:

training process → coordinator    "join": `token`, `rank`, `host`; its monitor inherits the connection
training process → monitor        a `Failure`; "bye": no longer to be watched
monitor → coordinator             "beat": a sign of life; "bye"; a `Failure`; with the `position` of the training process
coordinator → monitor             "beat"; "dump": have the stacks written; "exit": end the training process with this
                                  `status`; "end": watch no longer, since rank 0 or this rank is done
monitor → training process        "exit"; "end"; "stop": after writing a checkpoint, and `why`
"""

from __future__ import annotations

import contextlib
import json
import os
import socket
import sys
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any

KINDS = ("lost", "crash", "stopped", "launcher-lost", "error", "interrupted", "hang", "disconnected")
"""Failure classes, which docs/reliability.md explains. Of several reports, the first in this order is the root cause."""
EXIT_ERROR = 1
EXIT_REQUEUE = 75
"""`dalle_ds.errors.EXIT_REQUEUE`, which the monitor process does not import."""
MAX_NAMED = 8  # ranks and hosts that a line names
MAX_MESSAGE = 1 << 20  # bytes

Message = dict[str, Any]


@dataclass(frozen=True)
class Position:
    """How far a training process is, by its last pulse. One without any is not held to hang."""

    step: int = 0
    phase: str = "starting"
    idle: float = 0.0  # seconds since that pulse
    allowed: float = 0.0  # seconds that the phase may take, where that is more than `watch.hang_minutes`
    begun: bool = False  # whether there was a pulse
    where: str = ""  # where its main thread is; empty where its stacks were not asked for
    waits: bool = False  # whether that is a call that waits for other processes


@dataclass(frozen=True)
class Failure:
    """Why a process cannot go on: one of `KINDS`, and how the line ends."""

    kind: str
    text: str
    traceback: str = ""

    @property
    def status(self) -> int:
        """What all processes of the run then end with."""
        return EXIT_ERROR if self.kind == "error" else EXIT_REQUEUE


def log_line(
    kind: str, ranks: Sequence[int | str], hosts: Sequence[str], position: Position, status: int, text: str
) -> str:
    """What the user is shown, and a log search finds: `dalle_ds monitor: crash rank=3 host=n2 step=120 …`."""
    who = f"rank={_join(ranks)} host={_join(dict.fromkeys(hosts)) or 'unknown'}"
    step = f'step={position.step} phase="{position.phase}"' if position.begun else "step=none"
    resume = "; the same command resumes the run" if status == EXIT_REQUEUE else ""
    return f"dalle_ds monitor: {kind} {who} {step} exit={status}: {text}{resume}\n"


def _join(values: Iterable[object]) -> str:
    words = [str(value) for value in values]
    return ",".join(words[:MAX_NAMED] + ["…"] * (len(words) > MAX_NAMED))


def show(text: str) -> None:
    """Print for the user."""
    if sys.stderr.isatty():
        # A progress bar may have ended in the midst of a line, its cursor hidden.
        text = f"\r\x1b[K{text}\x1b[?25h"
    with contextlib.suppress(OSError):
        os.write(2, text.encode())


@dataclass(frozen=True)
class Settings:
    """What a monitor is told at its start; times are in seconds."""

    rank: int
    world_size: int
    pid: int  # of the training process
    can_stop: bool  # whether that can be asked to stop after writing a checkpoint
    progress: int  # file descriptors: the memory for pulses
    stacks: int  # the memory for stacks
    channel: int  # the connection to the training process
    coordinator: int  # the connection to the coordinator
    listener: int | None  # where others connect to that, on rank 0
    token: str  # what the processes of this run know
    timeout: float  # without a sign of life, or stopped, after which a process is lost
    hang: float | None  # without a pulse after which a process hangs; None: never
    stalled: float  # without a pulse after which another process's crash may be the consequence
    heartbeat: float  # between two writings of the heartbeat file
    logs: str | None  # RUN_DIR/logs; None writes no files

    @property
    def beat(self) -> float:
        """Between two signs of life."""
        return self.timeout / 6


class Channel:
    """JSON objects over a connected socket."""

    def __init__(self, connection: socket.socket) -> None:
        self.connection = connection
        self._pending = b""

    def send(self, **message: Any) -> None:
        """Send; where the other side is gone, `receive` tells."""
        with contextlib.suppress(OSError):
            self.connection.sendall(json.dumps(message).encode() + b"\n")

    def receive(self) -> list[Message] | None:
        """Wait for bytes; the messages that they complete, or None where the other side is gone or sends something else."""
        try:
            received = self.connection.recv(1 << 16)
            *lines, self._pending = (self._pending + received).split(b"\n")
            messages = [json.loads(line) for line in lines]
        except (OSError, ValueError):
            return None
        valid = all(isinstance(message, dict) and "kind" in message for message in messages)
        return messages if received and valid and len(self._pending) < MAX_MESSAGE else None
