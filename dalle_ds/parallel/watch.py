"""A process that dies ends all processes of its run within a minute, one that hangs after minutes, with a line that names it.

A collective does not end by itself where one process is missing: NCCL waits, and so does gloo where a machine has gone, up
to its time-out, while the GPUs are paid for. Launchers end what they started themselves, on one machine, and name no rank.
So every training process gets a watchman (`watchmen`), a process that sees

    the training process end without a word        at once: their connection breaks
    an error that it raises                        told by the training process itself
    it being stopped (SIGSTOP)                     after `PATIENCE` seconds; not by a debugger, nor together with its watchman
    the machine of another one vanish              after `PATIENCE` seconds: its watchman sends no sign of life
    it hanging                                     after `WatchConfig.hang_minutes` without a pulse; where it waits for other
                                                   processes in one operation, the time-out of that may come before
    its launcher go                                at once, and asks it to `stop`: it would go on, unseen, and never be told

The watchman of rank 0 decides on the cause and prints it; all processes end, with status 1 if one of them raised an error,
and with `EXIT_REQUEUE` if they only need to be started again. One that does not end by itself is killed. After a hang, the
stacks of all threads of all processes are in RUN_DIR/logs/stacks; where each process is, RUN_DIR/logs/heartbeats says all
the time (`watchmen/logs.py`).

Besides its pulses, what a training process does is no concern of a watchman. It may compute, save or wait for as long as it
likes before the first one.
"""

from __future__ import annotations

import contextlib
import faulthandler
import itertools
import json
import os
import signal
import socket
import subprocess
import sys
import tempfile
import threading
import traceback
from collections.abc import Callable
from dataclasses import asdict
from pathlib import Path
from types import TracebackType
from typing import IO, Any

from torch.distributed import distributed_c10d

from dalle_ds.config.watch import WatchConfig
from dalle_ds.errors import EXIT_REQUEUE, Interrupted, TrainingError
from dalle_ds.parallel import timeouts
from dalle_ds.parallel.mesh import Mesh
from dalle_ds.parallel.watchmen.channel import Channel, Settings
from dalle_ds.parallel.watchmen.progress import Progress
from dalle_ds.parallel.watchmen.verdict import Report

BEAT = 5.0
"""Seconds between two signs of life of a watchman."""
PATIENCE = 30.0
"""Seconds without one after which a process is held to be dead, and which one may be stopped."""
SETTLE = 2.0
"""Seconds to wait, after a process has failed, for what others have to say."""
STALLED = 0.75
"""Share of a time-out without a pulse after which another process's death may be the consequence."""
LONGEST_TRACEBACK = 20_000  # characters

_WATCHMAN = "import sys; sys.path.append(sys.argv[1]); from watchmen.main import main; main(int(sys.argv[2]))"
_numbers = itertools.count()


class Watch:
    """Ends this process when another one of the run dies or hangs, and the others when this one does; a context around all
    that the processes do together.

    An error that leaves the context ends all processes from here, and is printed once; that the run was told to stop
    (`Interrupted`, or `SystemExit` with `EXIT_REQUEUE`) is none. In a run of one process, errors pass through.

    Args:
        mesh: the processes.
        explain: an error in the user's words, or None where a traceback is due.
        config: what a hang is.
        logs: RUN_DIR/logs, to be made with the first pulse; None writes no files.
        stop: asks this process to end soon, for a reason in words; called from another thread. None ends it as a death would.

    Raises:
        TrainingError: no process can be started.
    """

    def __init__(
        self,
        mesh: Mesh,
        explain: Callable[[BaseException], str | None],
        config: WatchConfig | None = None,
        logs: Path | None = None,
        stop: Callable[[str], None] | None = None,
    ) -> None:
        self._mesh = mesh
        self._explain = explain
        self._config = config or WatchConfig()
        self._logs = logs
        self._stop = stop
        self._over = threading.Event()
        """Set once no one watches this process any longer."""
        self._joined = threading.Event()
        self._shared = _memory("progress")
        self._shared.truncate(Progress.SIZE)
        self._stacks = _memory("stacks")
        self._progress = Progress(self._shared.fileno())

    def pulse(self, step: int, phase: str, minutes: float = 0.0) -> None:
        """Say that this process goes on. The first pulse begins the count of what a hang is, and the files in `logs`.

        Takes about a microsecond, and waits for no one.

        Args:
            step: updates done.
            phase: what comes now, in a short word or two: "step", "waiting for data", "saving".
            minutes: how long that may take, where it is more than `WatchConfig.hang_minutes`.
        """
        self._progress.pulse(step, phase, 60 * minutes)

    def __enter__(self) -> Watch:
        place = f"(host {socket.gethostname()}, pid {os.getpid()})"
        alone = self._mesh.world_size == 1
        self._who = f"the training process {place}" if alone else f"rank {self._mesh.rank} {place}"
        # What faulthandler needs at a signal must stay open, and does: it holds the file.
        faulthandler.register(signal.SIGUSR2, file=self._stacks, all_threads=True)
        self._start()
        begin = {**self._chief(), "who": self._who} if self._mesh.is_main else {}
        host = "127.0.0.1"
        if not alone:
            # Not by a collective: NCCL's first one connects all GPUs, which takes time and should be watched already.
            store = distributed_c10d._get_default_store()
            key = f"dalle_ds/watch/{next(_numbers)}"
            if self._mesh.is_main:
                store.set(key, json.dumps(begin))
            begin = json.loads(store.get(key))
            host = os.environ["MASTER_ADDR"]  # that store is at the same address, so rank 0 can be reached there
        self._channel.send(kind="begin", host=host, **begin)
        threading.Thread(target=self._listen, name="watch", daemon=True).start()
        self._joined.wait()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if self._over.is_set():
            return
        if error is None or self._mesh.world_size == 1 or _is_told_to_stop(error):
            self._channel.send(kind="bye")
            with contextlib.suppress(subprocess.TimeoutExpired):
                self._watchman.wait(PATIENCE)
            return
        self._channel.send(**asdict(_report(error, self._explain)))
        # The verdict ends this process meanwhile, unless rank 0 was done before this error.
        with contextlib.suppress(KeyboardInterrupt):
            self._over.wait(3 * PATIENCE)
        late = timeouts.timed_out(error)
        if late is not None:
            raise late from error

    @property
    def watchman_pid(self) -> int:
        """Process id of what watches this process."""
        return self._watchman.pid

    def _chief(self) -> dict[str, Any]:
        """Where the chief listens."""
        message = self._channel.wait()
        if message is None:
            raise TrainingError(f"the process that watches {self._who} has died at its start")
        return {"port": message["port"], "token": message["token"]}

    def _start(self) -> None:
        ours, theirs = socket.socketpair()
        files = (theirs.fileno(), self._shared.fileno(), self._stacks.fileno())
        config = self._config
        settings = Settings(
            rank=self._mesh.rank,
            world_size=self._mesh.world_size,
            pid=os.getpid(),
            host=socket.gethostname(),
            who=self._who,
            stops=self._stop is not None,
            prints=os.environ.get("LOCAL_RANK", "0") == "0",
            progress=files[1],
            stacks=files[2],
            beat=BEAT,
            patience=PATIENCE,
            settle=SETTLE,
            hang=None if config.hang_minutes is None else 60 * config.hang_minutes,
            stalled=STALLED * 60 * config.collective_minutes,
            heartbeat=config.heartbeat_seconds,
            logs=None if self._logs is None else str(self._logs),
        )
        try:
            with theirs:
                self._watchman = subprocess.Popen(
                    # Neither the user's settings of Python nor site-packages: it starts at once and is small.
                    [sys.executable, "-I", "-S", "-c", _WATCHMAN, str(Path(__file__).parent), str(files[0])],
                    stdin=subprocess.PIPE,
                    stdout=subprocess.DEVNULL,
                    pass_fds=files,
                )
            assert self._watchman.stdin is not None
            with self._watchman.stdin as pipe:
                pipe.write(json.dumps(asdict(settings)).encode())
        except OSError as error:
            raise TrainingError(f"{self._who} cannot start a process that watches it: {error}") from error
        self._channel = Channel(ours)
        # A worker process of a data loader that held this end would hide the death of this process.
        os.register_at_fork(after_in_child=ours.close)

    def _listen(self) -> None:
        """Wait for the outcome. Runs in a thread, for the main one may wait in a collective for ever."""
        while (messages := self._channel.receive()) is not None:
            for message in messages:
                if message["kind"] == "joined":
                    self._joined.set()
                elif message["kind"] == "stop":
                    assert self._stop is not None
                    self._stop(message["why"])
                elif message["kind"] == "end":
                    self._over.set()
                    return
                else:
                    _exit(message["status"])
        if self._mesh.world_size == 1:
            print(f"warning: the process that watches {self._who} has died", file=sys.stderr)
            self._over.set()
            self._joined.set()
            return
        print(f"error: the process that watches {self._who} has died, and so this one ends", file=sys.stderr)
        _exit(EXIT_REQUEUE)


def _memory(name: str) -> IO[bytes]:
    """A file that is on no disk, where the system has such."""
    if hasattr(os, "memfd_create"):
        return os.fdopen(os.memfd_create(name), "r+b", buffering=0)
    return tempfile.TemporaryFile(buffering=0)


def _exit(status: int) -> None:
    """End the process from any thread; the main one does not get to say anything more."""
    for stream in (sys.stdout, sys.stderr):
        with contextlib.suppress(OSError, ValueError):
            stream.flush()
    os._exit(status)


def _is_told_to_stop(error: BaseException) -> bool:
    """Whether the run ends before its end as it should."""
    return isinstance(error, Interrupted) or (isinstance(error, SystemExit) and error.code in (None, 0, EXIT_REQUEUE))


def _report(error: BaseException, explain: Callable[[BaseException], str | None]) -> Report:
    if isinstance(error, KeyboardInterrupt):
        return Report("told", "was interrupted")
    if isinstance(error, SystemExit):
        return Report("failed", f"it ended itself with status {error.code}")
    late = timeouts.timed_out(error)
    if late is not None:
        return Report("timed out", str(late))
    kind = "cut off" if timeouts.is_about_communication(error) else "failed"
    words = explain(error)
    if words is not None:
        return Report(kind, words)
    detail = "".join(traceback.format_exception(error))[-LONGEST_TRACEBACK:]
    return Report(kind, traceback.format_exception_only(error)[-1].strip(), detail)
