"""Where the threads of a training process are.

It has registered faulthandler for SIGUSR2 (`watch.py`), which answers inside C calls too, from a signal handler and without
the interpreter's lock. The answer goes to memory that the watchman reads, since a disk may be what the process waits for.
"""

from __future__ import annotations

import contextlib
import os
import re
import signal
from pathlib import Path

LIMIT = 1.5
"""Seconds that the process gets to answer."""

_THREAD = re.compile(r"^(?:Current thread|Thread) 0x[^\n]*\(most recent call first\):\n((?:  [^\n]*\n)*)", re.MULTILINE)
_FRAME = re.compile(r'  File "(.*)", line (\d+) in (.*)')
_STATES = {"T": "stopped by a signal (SIGSTOP)", "D": "waiting for a disk or a device", "Z": "dead"}
_COMMUNICATION = ("/torch/distributed/", "/deepspeed/comm/")
_LIBRARIES = re.compile(r"/site-packages/|/lib/python3|^<frozen ")
_WAITING = ("wait", "synchronize", "barrier")


class Stacks:
    """Asks a training process for its stacks.

    Args:
        pid: the process.
        file: number of the open file to which it writes them.
    """

    def __init__(self, pid: int, file: int) -> None:
        self._pid = pid
        self._file = file
        self._asked: float | None = None
        self._begin = 0
        self._size = 0

    @property
    def asked(self) -> bool:
        """Whether an answer is due."""
        return self._asked is not None

    def ask(self, now: float) -> None:
        """Have them written."""
        self._begin = self._size = os.fstat(self._file).st_size
        self._asked = now
        with contextlib.suppress(OSError):
            os.kill(self._pid, signal.SIGUSR2)

    def answer(self, now: float) -> str | None:
        """What has been written, or one line that says why nothing was; None while there may be more. Looked at again and
        again, with time between."""
        if self._asked is None:
            return None
        size = os.fstat(self._file).st_size
        grows, self._size = size > self._size, size
        late = now > self._asked + LIMIT
        if (grows or size == self._begin) and not late:
            return None
        self._asked = None
        if size > self._begin:
            return os.pread(self._file, size - self._begin, self._begin).decode(errors="replace")
        return f"no answer: the process is {state_of(self._pid)}\n"


def state_of(pid: int) -> str:
    """What the system says that a process does."""
    letter = state(pid)
    return _STATES.get(letter, f"in state {letter or 'unknown'}")


def state(pid: int) -> str:
    """The letter that stands for what a process does; empty where there is no /proc, or no process."""
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0]
    except (OSError, IndexError):
        return ""


def innermost(stacks: str) -> tuple[str, bool]:
    """Where the main thread is, such as "in barrier, called at mesh.py:236 (sum)", and whether it waits for other processes.

    Whether it does is told by names, and unknown of what waits in a GPU's queue or in a thread of autograd's; it serves to
    tell processes apart that are in the same step and phase. Where there are no stacks, what stands there instead.
    """
    threads = _THREAD.findall(stacks)
    if not threads:
        return stacks.partition("\n")[0], False
    frames = _FRAME.findall(threads[-1])  # the main thread is the oldest, which comes last
    if not frames:
        return "outside Python", False
    file, _, function = frames[0]
    ours = [frame for frame in frames if not _LIBRARIES.search(frame[0])] or frames[:1]
    place = f"{Path(ours[0][0]).name}:{ours[0][1]} ({ours[0][2]})"
    waits = any(part in file for part in _COMMUNICATION) or function in _WAITING
    return f"in {place}" if ours[0] == frames[0] else f"in {function}, called at {place}", waits
