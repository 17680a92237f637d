"""Being told to stop: by a user (Ctrl-C), a scheduler that needs the machine (SIGUSR1, SIGTERM), a launcher (SIGTERM).

The first signal is a request: the update is finished, a checkpoint written, and the process ends with `EXIT_REQUEUE`. The
second is an order.
"""

from __future__ import annotations

import os
import signal
import threading
import time
from contextlib import suppress
from types import FrameType, TracebackType

SIGNALS = (signal.SIGTERM, signal.SIGUSR1, signal.SIGINT)
ECHO_SECONDS = 1.0
"""Within so many seconds the same signal again is the same request, which came by two ways."""


class StopSignals:
    """While entered, `requested` says whether this process has been told to stop. To be entered in the main thread.

    The same signal once more, or Ctrl-C, ends the process at once, with status 128 + its number, even in the midst of a
    collective that never ends. Another one only follows from the first: launchers answer Ctrl-C with SIGTERM to all their
    processes, and schedulers follow up SIGUSR1 with SIGTERM, which leaves some seconds for a checkpoint that is being written.

    Args:
        quiet: say nothing, on processes whose output a user would see many times.
    """

    def __init__(self, quiet: bool = False) -> None:
        self._quiet = quiet
        self._reason: str | None = None
        self._first: signal.Signals | None = None
        self._at = 0.0

    @property
    def requested(self) -> str | None:
        """The name of the signal that came first, such as "SIGTERM", or the reason of `request`; None without either."""
        return self._reason

    def request(self, reason: str) -> None:
        """Ask as a signal would, from any thread. A signal that follows is no second one: it may have the same cause."""
        if self._reason is None:
            self._reason = reason
            if not self._quiet:
                _say(f"{reason}: stopping after this update, with a checkpoint")

    def __enter__(self) -> StopSignals:
        # Python runs its handlers between two instructions of the main thread, which a collective may keep from ever coming;
        # but the number of every signal goes into this pipe at once, and a thread can wait for it.
        reader, self._write = os.pipe()
        os.set_blocking(self._write, False)
        self._pid, self._first, self._reason = os.getpid(), None, None
        self._old = {number: signal.signal(number, _handled_by_thread) for number in SIGNALS}
        self._old_wakeup = signal.set_wakeup_fd(self._write, warn_on_full_buffer=False)
        # A forked process (a worker that loads data) would write its own signals into the same pipe.
        os.register_at_fork(after_in_child=self._forget_pipe)
        threading.Thread(target=self._listen, args=(reader,), name="signals", daemon=True).start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        signal.set_wakeup_fd(self._old_wakeup)
        for number, handler in self._old.items():
            signal.signal(number, signal.SIG_DFL if handler is None else handler)
        os.close(self._write)

    def _listen(self, reader: int) -> None:
        while number := os.read(reader, 1):
            if number[0] in SIGNALS:
                self._note(signal.Signals(number[0]))
        os.close(reader)

    def _note(self, number: signal.Signals) -> None:
        first, now = self._first, time.monotonic()
        if first is None:
            self._first, self._at = number, now
            already, self._reason = self._reason is not None, self._reason or number.name
            if not self._quiet and not already:
                _say(f"{number.name}: stopping after this update, with a checkpoint; again to stop at once")
            return
        is_order = number in (first, signal.SIGINT)
        if is_order and now - self._at > ECHO_SECONDS:
            _say(f"{number.name}: stopped at once")
            os._exit(128 + number)

    def _forget_pipe(self) -> None:
        if os.getpid() != self._pid:
            signal.set_wakeup_fd(-1)


def _say(line: str) -> None:
    with suppress(OSError, ValueError):  # whoever read it may be gone
        print(line, flush=True)


def _handled_by_thread(number: int, frame: FrameType | None) -> None:
    """Nothing: it is there so that Python takes note of the signal."""
