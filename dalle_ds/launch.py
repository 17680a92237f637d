"""The `deepspeed` command, with the same arguments and a true exit status: `python -m dalle_ds.launch …`.

The `deepspeed` command ends at once by a signal, and with 0 where its child is killed, while the training processes go on.
Its child, told to stop, kills them after 30 s. On one machine with Linux, that child is a `Launch` here, which

- tells the training processes of SIGTERM, SIGINT and SIGUSR1, waits as long as they take, and ends with their status;
- never ends with 0 where the child was lost, and waits for the processes, whose monitors have them stop.

Elsewhere, and over several machines (`--hostfile`), this is `deepspeed`.
"""

from __future__ import annotations

import contextlib
import ctypes
import os
import signal
import subprocess
import sys
import time
from collections.abc import Mapping
from types import FrameType, SimpleNamespace
from typing import Any

import psutil

from dalle_ds.errors import EXIT_REQUEUE
from dalle_ds.resilience.processes import LAUNCH
from dalle_ds.resilience.signals import SIGNALS

LOOK_SECONDS = 1.0
"""Between two looks at what the child has started."""
LAST_EXIT_SECONDS = 30.0
"""How long processes may go on when one has failed; then they are killed, as by deepspeed."""
_PR_SET_CHILD_SUBREAPER = 36


class Launch(subprocess.Popen[bytes]):
    """deepspeed's child, whose own children become this process's when it dies."""

    def __init__(self, command: list[str], env: Mapping[str, str] | None = None) -> None:
        ctypes.CDLL(None).prctl(_PR_SET_CHILD_SUBREAPER, 1, 0, 0, 0)
        self._told: list[int] = []
        # The child's own children: training processes. What those leave behind becomes this process's, too.
        self._seen: set[psutil.Process] = set()
        # Training processes that have not ended; None while the child has charge of them.
        self._ranks: set[int] | None = None
        for number in SIGNALS:
            signal.signal(number, self._tell)
        # A terminal's Ctrl-C is for this process to pass on.
        super().__init__(command, env=env, start_new_session=True)
        if self._told:
            self.kill()

    def wait(self, timeout: float | None = None) -> int:
        """The status of the training processes, once all have ended; 128 + n for signal n."""
        while True:
            try:
                status = super().wait(LOOK_SECONDS if timeout is None else timeout)
                break
            except subprocess.TimeoutExpired:
                if timeout is not None:
                    raise
                self._look()
        if status < 0:
            if not self._told:
                lost = f"error: deepspeed's child was lost by signal {-status}: training stops"
                print(lost, file=sys.stderr, flush=True)
            status = self._wait_for_ranks(lost_by=-status)
        # Of a process that was killed, the child ends with -n, of which 8 bits are left.
        self.returncode = 128 + 256 - status if status > 192 else status
        return self.returncode

    def _tell(self, number: int, _frame: FrameType | None) -> None:
        self._told.append(number)
        if self._ranks is not None:
            _send(self._ranks, number)
        elif getattr(self, "pid", None):
            # It would end them after 30 s, and not say how they ended. `wait` goes on from here.
            self._look()
            self.kill()

    def _look(self) -> None:
        with contextlib.suppress(psutil.Error):
            self._seen.update(psutil.Process(self.pid).children())

    def _wait_for_ranks(self, lost_by: int) -> int:
        children = psutil.Process().children()
        # Where it died before anyone looked, its processes have no workers yet.
        self._ranks = {child.pid for child in children if (child in self._seen if self._seen else _has_rank(child))}
        _send(self._ranks, *self._told[:1])
        statuses: list[int] = []
        kill_at = float("inf")
        while self._ranks:
            pid, raw = os.waitpid(-1, os.WNOHANG)
            if pid in self._ranks:
                self._ranks.discard(pid)
                status = os.waitstatus_to_exitcode(raw)
                statuses.append(status if status >= 0 else 128 - status)
                if status:
                    kill_at = min(kill_at, time.monotonic() + LAST_EXIT_SECONDS)
            elif pid == 0:
                time.sleep(0.05)
            if time.monotonic() > kill_at:
                _send(self._ranks, signal.SIGKILL)
        failed = [status for status in statuses if status not in (0, EXIT_REQUEUE)]
        if failed or not statuses:
            return failed[0] if failed else 128 + (self._told or [lost_by])[0]
        return EXIT_REQUEUE if EXIT_REQUEUE in statuses or not self._told else 0


def _send(pids: set[int], *numbers: int) -> None:
    for number in numbers:
        for pid in tuple(pids):
            with contextlib.suppress(ProcessLookupError):
                os.kill(pid, number)


def _has_rank(process: psutil.Process) -> bool:
    """Whether it is a training process, or one that has ended and tells no more than its status."""
    try:
        return process.status() == psutil.STATUS_ZOMBIE or "RANK" in process.environ()
    except psutil.Error:
        return False


def _start(command: list[str], **options: Any) -> subprocess.Popen[bytes]:
    if LAUNCH in command[:4]:
        return Launch(command, **options)
    return subprocess.Popen(command, **options)  # over several machines


def main() -> None:
    """Do what `deepspeed` does with the command line."""
    for number in SIGNALS:  # deepspeed takes seconds to import; process 1 of a container ends by no signal of itself
        signal.signal(number, lambda number, _: os._exit(128 + number))
    from deepspeed.launcher import runner

    if sys.platform == "linux":
        runner.subprocess = SimpleNamespace(**{**vars(subprocess), "Popen": _start})
    runner.main()


if __name__ == "__main__":
    main()
