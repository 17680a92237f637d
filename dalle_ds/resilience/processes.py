"""What a monitor sees of its training process: progress, stacks, state, launchers. Imports the standard library only."""

from __future__ import annotations

import contextlib
import mmap
import os
import re
import signal
import struct
import time
from pathlib import Path, PurePath

from .messages import Failure, Position

SUSPENSION = 5.0
"""Seconds between two looks at the clock from which on the monitor was suspended, maybe with all others."""
STACKS_SECONDS = 1.5
"""That a process gets to write its stacks."""
SIGNALS = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP, signal.SIGUSR1)
"""That launchers, SLURM and terminals send to all processes of a run."""
SIGNAL_DELAY = 0.1
"""Seconds after a death in which a signal to the monitor is taken for its cause: launchers signal both, one by one."""
SIGNAL_LASTS = 60.0
"""Seconds for which such a signal may explain a death."""


class Clock:
    """Seconds for which this process has run; what it was suspended for does not count."""

    def __init__(self) -> None:
        self.now = 0.0
        self._last = time.monotonic()

    def advance(self) -> None:
        """Look at the time."""
        last, self._last = self._last, time.monotonic()
        if self._last - last < SUSPENSION:
            self.now += self._last - last


class Progress:
    """The last pulse of a training process, in `file` of `SIZE` bytes in memory, which it shares with its monitor.

    A reader may see a pulse that is half written: with fields of the one before, until it looks again.
    """

    _LAYOUT = struct.Struct("=Qqd32s")
    SIZE = mmap.PAGESIZE

    def __init__(self, file: int, clock: Clock | None = None) -> None:
        self._memory = mmap.mmap(file, self.SIZE)
        self._clock = clock or Clock()
        self._count = 0
        self._changed_at = self._clock.now

    def pulse(self, step: int, phase: str, allowed: float = 0.0) -> None:
        """Note what begins now; a phase longer than 32 bytes is cut."""
        self._count += 1
        self._memory[: self._LAYOUT.size] = self._LAYOUT.pack(self._count, step, allowed, phase.encode())

    def read(self) -> Position:
        """Where the process is."""
        count, step, allowed, phase = self._LAYOUT.unpack(self._memory[: self._LAYOUT.size])
        if count != self._count:
            self._count, self._changed_at = count, self._clock.now
        idle = self._clock.now - self._changed_at
        if count == 0:
            return Position(idle=idle)
        return Position(step, phase.rstrip(b"\0").decode(errors="replace"), idle, allowed, begun=True)


class Stacks:
    """Asks a training process for the stacks of its threads.

    It has registered faulthandler for SIGUSR2, which answers inside C calls too, without the interpreter's lock; and into a
    `file` in memory, since a disk may be what the process waits for.
    """

    def __init__(self, pid: int, file: int, clock: Clock) -> None:
        self._pid, self._file, self._clock = pid, file, clock
        self._asked: float | None = None
        self._begin = 0

    def ask(self) -> None:
        """Have them written."""
        self._begin, self._asked = os.fstat(self._file).st_size, self._clock.now
        with contextlib.suppress(OSError):
            os.kill(self._pid, signal.SIGUSR2)

    def answer(self) -> str | None:
        """What was written, or a line that says why nothing was; once, `STACKS_SECONDS` after it was asked for."""
        if self._asked is None or self._clock.now < self._asked + STACKS_SECONDS:
            return None
        self._asked = None
        written = os.pread(self._file, 1 << 24, self._begin).decode(errors="replace")
        return written or f"no answer: the process is {_STATES.get(state(self._pid), 'in an unknown state')}\n"


_STATES = {"T": "stopped by a signal (SIGSTOP)", "D": "waiting for a disk or a device", "R": "running", "Z": "dead"}
_THREAD = re.compile(r"^(?:Current thread|Thread) 0x[^\n]*\(most recent call first\):\n((?:  [^\n]*\n)*)", re.MULTILINE)
_FRAME = re.compile(r'  File "(.*)", line (\d+) in (.*)')
_COMMUNICATION = re.compile(r"/torch/distributed/|/deepspeed/comm/")
_LIBRARIES = re.compile(r"/site-packages/|/lib/python3|^<frozen ")


def main_thread(stacks: str) -> tuple[str, bool]:
    """Where the main thread is, such as "barrier at mesh.py:236 (sum)", and whether it waits for other processes.

    The latter goes by names, and is unknown of waits in a GPU's queue or a thread of autograd's. It tells ranks apart that
    are in the same step and phase. Without stacks, what stands there instead.
    """
    threads = _THREAD.findall(stacks)
    if not threads:
        return stacks.partition("\n")[0], False
    frames = _FRAME.findall(threads[-1])  # the main thread is the oldest, which comes last
    if not frames:
        return "outside Python", False
    file, _, function = frames[0]
    own = next((frame for frame in frames if not _LIBRARIES.search(frame[0])), frames[0])
    place = f"{Path(own[0]).name}:{own[1]} ({own[2]})"
    waits = bool(_COMMUNICATION.search(file)) or function in ("wait", "synchronize", "barrier")
    return place if own == frames[0] else f"{function} at {place}", waits


class TrainingProcess:
    """Whether the training process, the parent of the monitor, lives. `timeout` is how long it may be stopped (SIGSTOP)."""

    def __init__(self, pid: int, timeout: float, clock: Clock) -> None:
        self._pid, self._timeout, self.clock = pid, timeout, clock
        self._signalled_at = float("-inf")
        self._ending_since: float | None = None
        self._stopped_since: float | None = None

    @property
    def gone(self) -> bool:
        """Whether it has ended: orphans get another parent."""
        return os.getppid() != self._pid

    @property
    def ending(self) -> bool:
        """Whether it has ended or is about to."""
        return self._ending_since is not None

    @property
    def signalled(self) -> bool:
        """Whether the monitor lately got a signal to end, as both do from a terminal, a launcher or SLURM."""
        return self.clock.now < self._signalled_at + SIGNAL_LASTS

    def note_signal(self) -> None:
        """Note such a signal."""
        self._signalled_at = self.clock.now

    def note_ending(self) -> None:
        """Note that it has closed its socket; freeing a GPU's memory may keep it for seconds more."""
        if self._ending_since is None:
            self._ending_since = self.clock.now

    def check(self) -> Failure | None:
        """What is wrong with it, if anything. To be polled."""
        now = self.clock.now
        if self.gone:
            self.note_ending()
        if self._ending_since is not None:
            if now < self._ending_since + SIGNAL_DELAY:
                return None
            if self.signalled:
                return Failure("interrupted", "ended by a signal")
            return Failure("crash", "killed or crashed (dmesg on its host shows whether memory ran out)")
        if state(self._pid) != "T":  # a debugger's stop has another letter
            self._stopped_since = None
        elif self._stopped_since is None:
            self._stopped_since = now
        elif now > self._stopped_since + self._timeout:
            return Failure("stopped", f"stopped by a signal (SIGSTOP) for {self._timeout:.0f} s")
        return None

    def kill(self) -> None:
        """SIGKILL."""
        if not self.gone:
            os.kill(self._pid, signal.SIGKILL)


LAUNCH = "deepspeed.launcher.launch"
"""The child of the `deepspeed` command, and the parent of the training processes of one machine."""
_LAUNCHERS = {LAUNCH, "deepspeed", "ds", "deepspeed.launcher.runner", "dalle_ds.launch"}
_LAUNCHERS |= {"torchrun", "torch.distributed.run"}


class Launchers:
    """The launchers above a training process, without which nobody could stop it or learn how it ends.

    Where it was started `by_deepspeed`, some may have died before anyone looked.
    """

    def __init__(self, pid: int, by_deepspeed: bool) -> None:
        self._seen: dict[int, tuple[str, str]] = {}
        """Name and start time by pid; pids are used again."""
        stat, below = _stat(pid), [""]
        self._missing = LAUNCH if by_deepspeed and stat else None
        while stat:
            pid = int(stat[1])
            stat, words = _stat(pid), _read(pid, "cmdline").split("\0")
            name = _program(words)
            if name == LAUNCH:
                self._missing = None
            if stat and name in _LAUNCHERS:
                self._seen[pid] = name, stat[19]
            elif _program(below) == LAUNCH and words != [""] and not _is_python(words):
                # The `deepspeed` command is gone. (A program in Python may have called its functions.) Where `LAUNCH` is told
                # its rank, another machine has started it.
                alone = any(word.startswith("--node_rank") for word in below)
                self._missing = self._missing if alone else "deepspeed"
            below = words

    def lost(self) -> str | None:
        """Name and pid of one that is gone; never one where there is no /proc."""
        for pid, (name, started) in self._seen.items():
            stat = _stat(pid)
            if not stat or stat[0] in "ZX" or stat[19] != started:
                return f"{name}, pid {pid}"
        return self._missing


def state(pid: int) -> str:
    """The letter for a process's state, as in `ps`; empty where there is no /proc or no such process."""
    return (_stat(pid) or [""])[0]


def resident_bytes(pid: int) -> int | None:
    """Main memory of a process; None where that is unknown."""
    words = _read(pid, "statm").split()
    return int(words[1]) * os.sysconf("SC_PAGE_SIZE") if words else None


def _program(words: list[str]) -> str:
    """What a command line runs: of Python's, the script or module."""
    plain = [word for word in words if word and not word.startswith("-")][_is_python(words) :]
    return PurePath(plain[0]).name if plain else ""


def _is_python(words: list[str]) -> bool:
    return PurePath(words[0]).name.startswith("python")


def _stat(pid: int) -> list[str]:
    """/proc/PID/stat from the state on; empty where there is no such process."""
    return _read(pid, "stat").rpartition(")")[2].split()


def _read(pid: int, file: str) -> str:
    try:
        return Path(f"/proc/{pid}/{file}").read_text(errors="replace")
    except OSError:
        return ""
