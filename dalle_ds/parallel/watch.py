"""A process that dies ends all processes of its run within a minute, with a line that names it.

A collective does not end by itself where one process is missing: NCCL waits, and so does gloo where a machine has gone, up
to the timeout of `Mesh.start`, while the GPUs are paid for. Launchers end what they started themselves, on one machine, and
name no rank. So every training process gets a watchman (`watchman.py`), a process that sees

    the training process end without a word        at once: their connection breaks
    an error that it raises                        told by the training process itself
    it being stopped (SIGSTOP)                     after `PATIENCE` seconds; not by a debugger, nor together with its watchman
    the machine of another one vanish              after `PATIENCE` seconds: its watchman sends no sign of life

The watchman of rank 0 decides on the cause and prints it; all processes end with a status that is not 0.

What a training process does is no concern of a watchman: it may compute, save or wait for as long as it likes.
"""

from __future__ import annotations

import contextlib
import itertools
import json
import os
import socket
import subprocess
import sys
import threading
import traceback
from collections.abc import Callable
from dataclasses import asdict
from pathlib import Path
from types import TracebackType
from typing import Any

import torch.distributed as dist
from torch.distributed import distributed_c10d

from dalle_ds.errors import TrainingError
from dalle_ds.parallel.mesh import Mesh
from dalle_ds.parallel.watchman import Channel, Report, Settings

BEAT = 5.0
"""Seconds between two signs of life of a watchman."""
PATIENCE = 30.0
"""Seconds without one after which a process is held to be dead, and which one may be stopped."""
SETTLE = 2.0
"""Seconds to wait, after a process has failed, for what others have to say."""
LONGEST_TRACEBACK = 20_000  # characters

_numbers = itertools.count()


class Watch:
    """Ends this process when another one of the run dies, and the others when this one does; a context around all that the
    processes do together.

    An error that leaves the context ends all processes from here, and is printed once. For a run of one process this does
    nothing, and errors pass through.

    Args:
        mesh: the processes.
        explain: an error in the user's words, or None where a traceback is due.

    Raises:
        TrainingError: no process can be started.
    """

    def __init__(self, mesh: Mesh, explain: Callable[[BaseException], str | None]) -> None:
        self._mesh = mesh
        self._explain = explain
        self._over = threading.Event()
        """Set once no one watches this process any longer."""
        self._joined = threading.Event()

    def __enter__(self) -> Watch:
        if self._mesh.world_size == 1:
            self._over.set()
            return self
        self._who = f"rank {self._mesh.rank} (host {socket.gethostname()}, pid {os.getpid()})"
        self._start()
        # Not by a collective: NCCL's first one connects all GPUs, which takes time and should be watched already.
        store = distributed_c10d._get_default_store()
        key = f"dalle_ds/watch/{next(_numbers)}"
        if self._mesh.is_main:
            store.set(key, json.dumps({**self._chief(), "who": self._who}))
        # That store is at the same address, so rank 0 can be reached there.
        self._channel.send(kind="begin", host=os.environ["MASTER_ADDR"], **json.loads(store.get(key)))
        threading.Thread(target=self._listen, name="watch", daemon=True).start()
        self._joined.wait()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if self._over.is_set():
            return
        if error is None:
            self._channel.send(kind="bye")
            with contextlib.suppress(subprocess.TimeoutExpired):
                self._watchman.wait(PATIENCE)
            return
        self._channel.send(**asdict(_report(error, self._explain)))
        # The verdict ends this process meanwhile, unless rank 0 was done before this error.
        with contextlib.suppress(KeyboardInterrupt):
            self._over.wait(3 * PATIENCE)

    @property
    def watchman_pid(self) -> int:
        """Process id of what watches this process; a run of several processes has one each."""
        return self._watchman.pid

    def _chief(self) -> dict[str, Any]:
        """Where the chief listens."""
        message = self._channel.wait()
        if message is None:
            raise TrainingError(f"the process that watches {self._who} has died at its start")
        return {"port": message["port"], "token": message["token"]}

    def _start(self) -> None:
        ours, theirs = socket.socketpair()
        settings = Settings(
            rank=self._mesh.rank,
            world_size=self._mesh.world_size,
            pid=os.getpid(),
            who=self._who,
            prints=os.environ.get("LOCAL_RANK", "0") == "0",
            beat=BEAT,
            patience=PATIENCE,
            settle=SETTLE,
        )
        script = str(Path(__file__).with_name("watchman.py"))
        try:
            with theirs:
                self._watchman = subprocess.Popen(
                    # Neither the user's settings of Python nor site-packages: it starts at once and is small.
                    [sys.executable, "-I", "-S", script, str(theirs.fileno())],
                    stdin=subprocess.PIPE,
                    stdout=subprocess.DEVNULL,
                    pass_fds=(theirs.fileno(),),
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
                elif message["kind"] == "end":
                    self._over.set()
                    return
                else:
                    _exit()
        print(f"error: the process that watches {self._who} has died, and so this one ends", file=sys.stderr)
        _exit()


def _exit() -> None:
    """End the process from any thread; the main one does not get to say anything more."""
    for stream in (sys.stdout, sys.stderr):
        with contextlib.suppress(OSError, ValueError):
            stream.flush()
    os._exit(1)


def _report(error: BaseException, explain: Callable[[BaseException], str | None]) -> Report:
    if isinstance(error, KeyboardInterrupt):
        return Report("told", "was interrupted")
    kind = "cut off" if _is_about_communication(error) else "failed"
    words = explain(error)
    if words is not None:
        return Report(kind, words)
    detail = "".join(traceback.format_exception(error))[-LONGEST_TRACEBACK:]
    return Report(kind, traceback.format_exception_only(error)[-1].strip(), detail)


def _is_about_communication(error: BaseException | None) -> bool:
    """Whether an error, or what it came from, is a collective's, such as that a connection was closed by the other side."""
    while error is not None:
        # gloo raises errors of no type of their own, which begin with the place in its source.
        if isinstance(error, dist.DistError) or (isinstance(error, RuntimeError) and "/gloo/" in str(error)):
            return True
        error = error.__cause__ or error.__context__
    return False
