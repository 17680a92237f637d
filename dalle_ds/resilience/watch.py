"""A training process's side of its monitor: `Watch`, a context around all that the processes of a run do together.

A collective does not end by itself where one process is missing: it waits, up to its timeout, while the GPUs are paid for.
Launchers end what they started themselves, on one machine, and name no rank. The monitors (`monitor.py`) see more: one line
tells failure class (`messages.py`), rank, host and last step, and all processes end, with status 1 if one of them raised an
error, with `EXIT_REQUEUE` if they only need to be started again. One that does not end by itself is killed.
"""

from __future__ import annotations

import contextlib
import faulthandler
import itertools
import json
import os
import secrets
import signal
import socket
import subprocess
import sys
import tempfile
import threading
import traceback
from collections.abc import Callable, Iterator
from dataclasses import asdict
from pathlib import Path
from types import TracebackType
from typing import IO, Any

import torch.distributed as dist
from torch.distributed import distributed_c10d

from dalle_ds.cli import explain
from dalle_ds.config.parallel import WatchConfig
from dalle_ds.errors import Interrupted, TrainingError
from dalle_ds.parallel.mesh import Mesh
from dalle_ds.resilience.messages import EXIT_REQUEUE, Channel, Failure, Position, Settings, log_line, show
from dalle_ds.resilience.processes import SIGNALS, Progress

TIMEOUT = 30.0
"""Seconds without a sign of life from a monitor after which its process is lost, and for which a process may be stopped
(SIGSTOP, not by a debugger)."""
STALLED = 0.75
"""Share of `watch.collective_minutes` without a pulse after which another process's crash may be the consequence."""
MAX_TRACEBACK = 20_000  # characters

_MONITOR = "import sys; sys.path.append(sys.argv[1]); from resilience.monitor import main; main()"
_numbers = itertools.count()


@contextlib.contextmanager
def joined(device: str = "auto") -> Iterator[Mesh]:
    """The processes that a command was started as, watched; nothing is, where it is one alone."""
    mesh = Mesh.join(device)
    with contextlib.nullcontext() if mesh.world_size == 1 else Watch(mesh, explain):
        yield mesh
        mesh.barrier()
    mesh.stop()


class Watch:
    """Ends this process when another one of the run fails, and the others when this one does.

    An error that leaves the context ends all processes from here, and is printed once; that the run was told to stop
    (`Interrupted`, or `SystemExit` with `EXIT_REQUEUE`) is none. In a run of one process, errors pass through.

    Args:
        mesh: the processes.
        explain: an error in the user's words, or None where a traceback is due.
        config: what a hang is.
        logs: RUN_DIR/logs, to be made with the first pulse; None writes no files.
        stop: asks this process to end soon, for a reason in words; called from another thread. None: a lost launcher ends it.

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
        self._mesh, self._explain, self._logs, self._stop = mesh, explain, logs, stop
        self._config = config or WatchConfig()
        self._over = threading.Event()  # no one watches this process any longer
        self._shared, self._stacks = _memory_file("progress"), _memory_file("stacks")
        self._shared.truncate(Progress.SIZE)
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
        # What faulthandler needs at a signal must stay open, and does: it holds the file.
        faulthandler.register(signal.SIGUSR2, file=self._stacks, all_threads=True)
        mesh, host = self._mesh, "127.0.0.1"
        meeting: dict[str, Any] = {}
        with _listen(mesh.world_size) if mesh.is_main else contextlib.nullcontext() as listener:
            if listener is not None:
                meeting = {"port": listener.getsockname()[1], "token": secrets.token_hex(16)}
            if mesh.world_size > 1:
                # Not by a collective: NCCL's first one connects all GPUs, which takes time and is to be watched already.
                store, key = distributed_c10d._get_default_store(), f"dalle_ds/watch/{next(_numbers)}"
                if listener is not None:
                    store.set(key, json.dumps(meeting))
                meeting = json.loads(store.get(key))
                host = os.environ["MASTER_ADDR"]  # that store is at the same address, so rank 0 can be reached there
            with self._connect(host, **meeting) as coordinator:
                self._start(coordinator, listener, meeting["token"])
        threading.Thread(target=self._wait_for_outcome, name="watch", daemon=True).start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if self._over.is_set():
            return
        if error is None or self._mesh.world_size == 1 or _is_told_to_stop(error):
            self._channel.send(kind="bye")
            with contextlib.suppress(subprocess.TimeoutExpired):
                self._monitor.wait(TIMEOUT)
            return
        self._channel.send(**asdict(classify(error, self._explain)))
        # The outcome ends this process meanwhile, unless rank 0 was done before this error.
        with contextlib.suppress(KeyboardInterrupt):
            self._over.wait(3 * TIMEOUT)

    @property
    def monitor_pid(self) -> int:
        """Process id of the monitor."""
        return self._monitor.pid

    def _connect(self, host: str, port: int, token: str) -> socket.socket:
        """Join the coordinator."""
        try:
            connection = socket.create_connection((host, port), timeout=TIMEOUT)
        except OSError as error:
            text = f"rank {self._mesh.rank} (host {socket.gethostname()}) cannot connect to its monitor: {error}"
            show(log_line("lost", [0], [host], Position(), EXIT_REQUEUE, text))
            raise SystemExit(EXIT_REQUEUE) from error
        Channel(connection).send(kind="join", token=token, rank=self._mesh.rank, host=socket.gethostname())
        return connection

    def _start(self, coordinator: socket.socket, listener: socket.socket | None, token: str) -> None:
        ours, theirs = socket.socketpair()
        config = self._config
        settings = Settings(
            rank=self._mesh.rank,
            world_size=self._mesh.world_size,
            pid=os.getpid(),
            can_stop=self._stop is not None,
            progress=self._shared.fileno(),
            stacks=self._stacks.fileno(),
            channel=theirs.fileno(),
            coordinator=coordinator.fileno(),
            listener=None if listener is None else listener.fileno(),
            token=token,
            timeout=TIMEOUT,
            hang=None if config.hang_minutes is None else 60 * config.hang_minutes,
            stalled=STALLED * 60 * config.collective_minutes,
            heartbeat=config.heartbeat_seconds,
            logs=None if self._logs is None else str(self._logs),
        )
        # Neither the user's settings of Python nor site-packages: it starts at once and is small.
        command = [sys.executable, "-I", "-S", "-c", _MONITOR, str(Path(__file__).parents[1])]
        keep = [settings.progress, settings.stacks, settings.channel, settings.coordinator]
        keep += [] if settings.listener is None else [settings.listener]
        # Until the monitor can take them, signals wait.
        blocked = signal.pthread_sigmask(signal.SIG_BLOCK, (*SIGNALS, signal.SIGUSR2))
        try:
            with theirs:
                self._monitor = subprocess.Popen(
                    command, stdin=subprocess.PIPE, stdout=subprocess.DEVNULL, pass_fds=keep
                )
            assert self._monitor.stdin is not None
            with self._monitor.stdin as pipe:
                pipe.write(json.dumps(asdict(settings)).encode())
        except OSError as error:
            raise TrainingError(f"rank {self._mesh.rank} cannot start its monitor process: {error}") from error
        finally:
            signal.pthread_sigmask(signal.SIG_SETMASK, blocked)
        self._channel = Channel(ours)
        # A worker process of a data loader that held this end would hide the death of this process.
        os.register_at_fork(after_in_child=ours.close)

    def _wait_for_outcome(self) -> None:
        """Runs in a thread, for the main one may wait in a collective for ever."""
        while (messages := self._channel.receive()) is not None:
            for message in messages:
                if message["kind"] == "stop":
                    assert self._stop is not None
                    self._stop(message["why"])
                elif message["kind"] == "end":
                    self._over.set()
                    return
                else:
                    _exit(message["status"])
        who = f"the monitor of rank {self._mesh.rank} (host {socket.gethostname()}, pid {self._monitor.pid}) has died"
        if self._mesh.world_size > 1:
            print(f"error: {who}, so this process ends with status {EXIT_REQUEUE}", file=sys.stderr)
            _exit(EXIT_REQUEUE)
        print(f"warning: {who}", file=sys.stderr)
        self._over.set()


def classify(error: BaseException, explain: Callable[[BaseException], str | None]) -> Failure:
    """What an exception that ends a training process is reported as; `explain` as of a `Watch`."""
    if isinstance(error, KeyboardInterrupt):
        return Failure("interrupted", "KeyboardInterrupt")
    if isinstance(error, SystemExit):
        return Failure("error", f"the process ended itself with status {error.code}")
    kind = "disconnected" if is_about_communication(error) else "error"
    words = explain(error)
    if words is not None:
        return Failure(kind, words)
    detail = "".join(traceback.format_exception(error))[-MAX_TRACEBACK:]
    return Failure(kind, traceback.format_exception_only(error)[-1].strip(), detail)


def is_about_communication(error: BaseException | None) -> bool:
    """Whether an error, or what it came from, is a collective's, such as that the other side closed a connection."""
    while error is not None:
        # gloo raises errors of no type of their own, most of which begin with the place in its source.
        by_gloo = isinstance(error, RuntimeError) and ("/gloo/" in str(error) or "pair closure" in str(error))
        if by_gloo or isinstance(error, dist.DistError):
            return True
        error = error.__cause__ or error.__context__
    return False


def _listen(world_size: int) -> socket.socket:
    if world_size == 1:
        return socket.create_server(("127.0.0.1", 0))
    both = socket.has_dualstack_ipv6()
    family = socket.AF_INET6 if both else socket.AF_INET
    return socket.create_server(("", 0), family=family, backlog=world_size, dualstack_ipv6=both)


def _memory_file(name: str) -> IO[bytes]:
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
