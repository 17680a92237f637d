"""The launchers above a training process, which are to outlive it: without them, nobody could stop it or learn how it ends."""

from __future__ import annotations

from pathlib import Path, PurePath

LAUNCH = "deepspeed.launcher.launch"
"""The child of the `deepspeed` command, and the parent of the training processes of one machine."""
_NAMES = {
    LAUNCH,
    "deepspeed",
    "ds",
    "deepspeed.launcher.runner",
    "dalle_ds.launch",
    "torchrun",
    "torch.distributed.run",
}


class Launchers:
    """Those that are above a process now. Where there is no /proc, none are known, and none is missed.

    Args:
        pid: the training process.
        by_deepspeed: whether `LAUNCH` has started it, which may have died before anyone looked.
    """

    def __init__(self, pid: int, by_deepspeed: bool) -> None:
        self._seen: dict[int, tuple[str, str]] = {}
        """Name and time of birth by pid; pids are used again."""
        self._missing: str | None = None
        below, status = [""], _status(pid)
        if by_deepspeed and status:
            self._missing = LAUNCH
        while status:
            pid = int(status[1])
            status, words = _status(pid), _read(pid, "cmdline").split("\0")
            name = _program(words)
            if name == LAUNCH:
                self._missing = None
            if status and name in _NAMES:
                self._seen[pid] = name, status[19]
            elif _is_orphan(below, words):
                self._missing = "deepspeed"
            below = words

    def lost(self) -> str | None:
        """One that is gone, in words."""
        for pid, (name, begun) in self._seen.items():
            status = _status(pid)
            if not status or status[0] in "ZX" or status[19] != begun:
                return f"{name}, pid {pid}"
        return self._missing


def _is_orphan(launch: list[str], parent: list[str]) -> bool:
    """Whether these are the command lines of a `LAUNCH` that the `deepspeed` command has started, and of someone else.

    It is told its rank of a machine only where others start it. A program in Python may have called deepspeed's functions.
    """
    by_command = _program(launch) == LAUNCH and not any(word.startswith("--node_rank") for word in launch)
    return by_command and parent != [""] and not _is_python(parent)


def _program(words: list[str]) -> str:
    """What a command line runs: of Python's, the script or module."""
    plain = [word for word in words if word and not word.startswith("-")][_is_python(words) :]
    return PurePath(plain[0]).name if plain else ""


def _is_python(words: list[str]) -> bool:
    return PurePath(words[0]).name.startswith("python")


def _status(pid: int) -> list[str]:
    """State, parent and so on, as in /proc/PID/stat behind the name; empty where there is no such process."""
    return _read(pid, "stat").rpartition(")")[2].split()


def _read(pid: int, file: str) -> str:
    try:
        return Path(f"/proc/{pid}/{file}").read_text(errors="replace")
    except OSError:
        return ""
