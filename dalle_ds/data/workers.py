"""Loader processes: which signals they live through, and what is said when one of them is gone."""

from __future__ import annotations

import multiprocessing
import os
import signal
import sys
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from multiprocessing.context import BaseContext
from multiprocessing.process import BaseProcess
from multiprocessing.sharedctypes import RawValue
from typing import Any, TypeVar

from dalle_ds.data.faults import WorkerError

_SECONDS_BETWEEN_LOOKS = 1.0
_SECONDS_TO_DIE = 5.0
_SECONDS_BETWEEN_POLLS = 0.1

Item = TypeVar("Item")


def start_worker(_worker: int) -> None:
    """Make this worker live through the warnings of a job's end, so that the trainer can finish its step with it.

    SLURM and launchers signal all processes of a job, some of them more than once. SIGINT, SIGUSR1, SIGUSR2 and SIGTERM are
    ignored; only a SIGTERM from the trainer itself ends the worker, and so does the death of the trainer.
    """
    for number in (signal.SIGINT, signal.SIGUSR1, signal.SIGUSR2):
        signal.signal(number, signal.SIG_IGN)
    if not hasattr(signal, "sigtimedwait"):  # macOS: SIGTERM ends workers there
        return
    # Waited for by a thread, which unlike a handler is told who sent it, and is not kept waiting by a slow disk.
    signal.pthread_sigmask(signal.SIG_BLOCK, [signal.SIGTERM])
    threading.Thread(target=_wait_for_the_end, args=(os.getppid(),), daemon=True, name="signals").start()


def _wait_for_the_end(parent: int) -> None:
    while os.getppid() == parent:
        received = signal.sigtimedwait([signal.SIGTERM], _SECONDS_BETWEEN_LOOKS)
        if received is not None and received.si_pid == parent:
            break
    os._exit(128 + signal.SIGTERM)


class Flag:
    """What a DataLoader asks of its `multiprocessing.Event`, in one byte of shared memory, without a lock.

    Workers look at the event before every batch, with a lock that one killed just then keeps for ever: the trainer, which
    looks too when it finds the worker dead, would wait for it without end.
    """

    def __init__(self) -> None:
        self._byte = RawValue("b", 0)

    def set(self) -> None:
        self._byte.value = 1

    def is_set(self) -> bool:
        return bool(self._byte.value)


def worker_context() -> BaseContext:
    """How a DataLoader starts its workers.

    Forking a training process is what torch does by default on Linux: it starts at once and shares memory. It is safe
    because workers touch neither CUDA nor any process group. Elsewhere only spawn is dependable.
    """
    kind = type(multiprocessing.get_context("fork" if sys.platform == "linux" else "spawn"))
    return type("WorkerContext", (kind,), {"Event": lambda _context: Flag()})()


def keep_sigchld_handler(start: Callable[[], Any]) -> Any:
    """Call what starts loader processes, but leave SIGCHLD as it is.

    torch would handle it by raising an error wherever the trainer happens to be; without, the loader notices a dead worker
    when a batch of it is asked for, within five seconds.
    """
    if threading.current_thread() is not threading.main_thread():
        return start()
    before = signal.getsignal(signal.SIGCHLD)
    try:
        return start()
    finally:
        signal.signal(signal.SIGCHLD, signal.SIG_DFL if before is None else before)


def next_batch(batches: Iterator[Item]) -> Item:
    """The next batch of a DataLoader's iterator; `WorkerError` where one of its workers is gone."""
    try:
        return next(batches)
    except (RuntimeError, OSError, EOFError):
        dead = _dead(getattr(batches, "_workers", ()))
        if not dead:
            raise
    # Out here, so that it does not keep torch's error and with it the other workers.
    pid, status = dead[0]
    if status == -signal.SIGKILL:
        how = (
            "was killed (SIGKILL), most likely for lack of memory: lower --loader.workers, or give the job more memory"
        )
    elif status < 0:
        names = {number.value: number.name for number in signal.Signals}
        how = f"was ended by {names.get(-status, f'signal {-status}')}"
    elif status == 128 + signal.SIGTERM:
        how = "was told to end (SIGTERM)"
    else:
        how = f"ended with status {status}"
    others = f" (and {len(dead) - 1} more)" if len(dead) > 1 else ""
    raise WorkerError(f"loader process {pid}{others} {how}")


def _dead(workers: Sequence[BaseProcess]) -> list[tuple[int | None, int]]:
    """(process, exit status) of workers that are gone: what a dying one breaks may be noticed seconds before its death."""
    for _ in range(round(_SECONDS_TO_DIE / _SECONDS_BETWEEN_POLLS) if workers else 0):
        time.sleep(_SECONDS_BETWEEN_POLLS)
        dead = [(worker.pid, worker.exitcode) for worker in workers if worker.exitcode is not None]
        if dead:
            return dead
    return []
