"""How far a training process is: told without waiting for anyone, read by its watchman."""

from __future__ import annotations

import mmap
import struct
import time
import zlib
from dataclasses import dataclass


@dataclass(frozen=True)
class Place:
    """Where a training process is."""

    step: int = 0
    """Of its last pulse: updates done."""
    phase: str = "starting"
    """Of its last pulse."""
    since: float = 0.0
    """Seconds since that pulse."""
    allowed: float = 0.0
    """Seconds that the phase may take, where that is longer than others may."""
    begun: bool = False
    """Whether there was a pulse. A process that gives none is not held to hang."""
    where: str = ""
    """Where its main thread is, or why that is unknown; empty where no one has asked."""
    waits: bool = False
    """Whether that call waits for other processes."""

    def __str__(self) -> str:
        return f"at step {self.step} ({self.phase})" if self.begun else "before its first pulse"


class Progress:
    """The last pulse of a training process, in memory that it shares with its watchman.

    Both see one clock: that of the machine since its start.

    Args:
        file: number of an open file of `SIZE` bytes.
    """

    _LAYOUT = struct.Struct("=qdd32s?")
    SIZE = mmap.PAGESIZE

    def __init__(self, file: int) -> None:
        self._memory = mmap.mmap(file, self.SIZE)
        self._last = (0, time.monotonic(), 0.0, b"starting", False)

    def pulse(self, step: int, phase: str, allowed: float = 0.0) -> None:
        """Note where the process is now; a phase longer than 32 bytes is cut."""
        record = self._LAYOUT.pack(step, time.monotonic(), allowed, phase.encode(), True)
        self._memory[: self._LAYOUT.size + 4] = record + zlib.crc32(record).to_bytes(4, "little")

    def read(self, now: float) -> Place:
        """Where the process is."""
        record, checksum = self._memory[: self._LAYOUT.size], self._memory[self._LAYOUT.size : self._LAYOUT.size + 4]
        # Reading twice would not do for what is read while a pulse is being written: a core may see half of it for a while.
        if checksum == zlib.crc32(record).to_bytes(4, "little"):
            self._last = self._LAYOUT.unpack(record)
        step, at, allowed, phase, begun = self._last
        words = phase.rstrip(b"\0").decode(errors="replace")
        return Place(step, words, max(0.0, now - at), allowed, begun)
