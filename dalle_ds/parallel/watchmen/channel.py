"""What watchmen are told at their start, and how they talk."""

from __future__ import annotations

import contextlib
import json
import os
import socket
import sys
from dataclasses import dataclass
from typing import Any

LONGEST_MESSAGE = 1 << 20

Message = dict[str, Any]


@dataclass(frozen=True)
class Settings:
    """What a watchman is told at its start. Times are in seconds."""

    rank: int
    world_size: int
    pid: int
    """Of the training process."""
    host: str
    who: str
    """How the user knows it: "rank 3 (host n2, pid 123)"."""
    stops: bool
    """Whether it can be asked to stop behind a checkpoint."""
    prints: bool
    """Whether to print where the chief cannot: one watchman per machine."""
    progress: int
    """Number of the open file that holds the training process's `Progress`."""
    stacks: int
    """Number of the open file to which it writes its stacks."""
    beat: float
    """Between two signs of life."""
    patience: float
    """How long a process may give no sign of life, or be stopped, before it is held to be dead."""
    settle: float
    """To wait, after a process has failed, for what others have to say."""
    hang: float | None
    """Without a pulse after which a process is held to hang; None: never."""
    stalled: float
    """Without a pulse after which the death of another process may be the consequence."""
    heartbeat: float
    """Between two writings of the heartbeat file."""
    logs: str | None
    """RUN_DIR/logs; None writes no files."""


class Channel:
    """JSON objects, one on a line, over a connected socket."""

    def __init__(self, connection: socket.socket) -> None:
        self.connection = connection
        self._pending = b""

    def send(self, **message: Any) -> None:
        """Send; where the other side is gone, `receive` will tell."""
        with contextlib.suppress(OSError):
            self.connection.sendall(json.dumps(message).encode() + b"\n")

    def receive(self) -> list[Message] | None:
        """Wait for bytes; the messages that they complete, or None where the other side is gone or talks nonsense."""
        try:
            received = self.connection.recv(1 << 16)
            *lines, self._pending = (self._pending + received).split(b"\n")
            messages = [json.loads(line) for line in lines]
        except (OSError, ValueError):
            return None
        sensible = all(isinstance(message, dict) and "kind" in message for message in messages)
        return messages if received and sensible and len(self._pending) < LONGEST_MESSAGE else None

    def wait(self) -> Message | None:
        """Wait for a message, where the other side sends one at a time; None as of `receive`."""
        messages: list[Message] | None = []
        while messages == []:
            messages = self.receive()
        return None if messages is None else messages[0]


def show(text: str) -> None:
    """Print for the user."""
    if sys.stderr.isatty():
        # A progress bar may have ended in the midst of a line, its cursor hidden.
        text = f"\r\x1b[K{text}\x1b[?25h"
    with contextlib.suppress(OSError):
        os.write(2, text.encode())
