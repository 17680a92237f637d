"""The files of RUN_DIR/logs that a watchman writes.

heartbeats/rank-N.json   where the process is, for whoever looks: {"rank", "host", "pid", "step", "phase",
                         "seconds_since_pulse", "resident_bytes", "time": UTC}; one whose `time` stands still belongs to a
                         process that has ended, or to a machine that hangs
stacks/rank-N.txt        after a hang: where each thread of the process was
"""

from __future__ import annotations

import contextlib
import json
import os
import queue
import threading
from collections.abc import Callable
from datetime import datetime, timezone
from pathlib import Path

from .channel import Settings
from .progress import Place


class Logs:
    """Writes in a thread: a disk that hangs holds up no sign of life, and one that is full is no reason to end a run."""

    def __init__(self, settings: Settings, folder: Path) -> None:
        self._settings = settings
        self._heartbeats = folder / "heartbeats" / f"rank-{settings.rank}.json"
        self._stacks = folder / "stacks" / f"rank-{settings.rank}.txt"
        self._waiting: queue.SimpleQueue[Callable[[], object]] = queue.SimpleQueue()
        threading.Thread(target=self._write, daemon=True).start()

    def heartbeat(self, place: Place) -> None:
        """Say where the process is; left out while the disk has not taken the last one."""
        settings = self._settings
        content = {
            "rank": settings.rank,
            "host": settings.host,
            "pid": settings.pid,
            "step": place.step,
            "phase": place.phase,
            "seconds_since_pulse": round(place.since, 1),
            "resident_bytes": _resident_bytes(settings.pid),
            "time": _now(),
        }
        if self._waiting.empty():
            self._waiting.put(lambda: _replace(self._heartbeats, json.dumps(content) + "\n"))

    def stacks(self, stacks: str, place: Place) -> None:
        """Keep the stacks of a process, after those of earlier hangs."""
        words = f"{place}, {place.since:.0f} s after its last pulse"
        head = f"=== {_now()}: {self._settings.who}, {words}\n"
        self._waiting.put(lambda: _append(self._stacks, f"{head}{stacks}\n"))

    def finish(self, seconds: float) -> None:
        """Wait so long for the disk."""
        done = threading.Event()
        self._waiting.put(done.set)
        done.wait(seconds)

    def _write(self) -> None:
        while True:
            with contextlib.suppress(OSError):
                self._waiting.get()()


def _replace(path: Path, text: str) -> None:
    # Not forced to the disk: what is lost with the machine was true of the machine only.
    path.parent.mkdir(parents=True, exist_ok=True)
    beside = path.with_name(f".{path.name}.partial")
    beside.write_text(text)
    beside.replace(path)


def _append(path: Path, text: str) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    with path.open("a") as file:
        file.write(text)
        file.flush()
        os.fsync(file.fileno())


def _now() -> str:
    return datetime.now(timezone.utc).isoformat(timespec="seconds")


def _resident_bytes(pid: int) -> int | None:
    try:
        return int(Path(f"/proc/{pid}/statm").read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE")
    except (OSError, IndexError):
        return None
