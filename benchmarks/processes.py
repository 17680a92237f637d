"""Starting the processes of a run, as a scheduler does, so that each of them can be killed, stopped or signalled."""

from __future__ import annotations

import os
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Mapping, Sequence
from contextlib import suppress
from pathlib import Path


class Ranks:
    """The processes of one start of a run, on this machine's CPU.

    Args:
        arguments: script and options, the same for all.
        count: processes.
        log: gets what all of them print.
        environment: variables besides this process's own.
    """

    def __init__(
        self, arguments: Sequence[str], count: int, log: Path, environment: Mapping[str, str] | None = None
    ) -> None:
        with socket.socket() as probe:
            probe.bind(("127.0.0.1", 0))
            port = probe.getsockname()[1]
        common = {"OMP_NUM_THREADS": "1", "DS_ACCELERATOR": "cpu", "PYTHONUNBUFFERED": "1", **(environment or {})}
        common |= {"WORLD_SIZE": str(count), "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)}
        self.log = log
        self.started = time.monotonic()
        self.processes = []
        with log.open("ab") as output:
            self._begin = output.tell()
            for rank in range(count):
                self.processes.append(
                    subprocess.Popen(
                        [sys.executable, *arguments],
                        env={**os.environ, **common, "RANK": str(rank), "LOCAL_RANK": str(rank)},
                        stdout=output,
                        stderr=subprocess.STDOUT,
                        start_new_session=True,
                    )
                )

    @property
    def output(self) -> str:
        """What they have printed so far."""
        with self.log.open("rb") as file:
            file.seek(self._begin)
            return file.read().decode(errors="replace")

    @property
    def running(self) -> bool:
        """Whether all of them still are."""
        return all(process.poll() is None for process in self.processes)

    def send(self, number: signal.Signals, rank: int | None = None) -> None:
        """Send a signal to one of them, or to all."""
        for process in self.processes if rank is None else [self.processes[rank]]:
            with suppress(ProcessLookupError):
                process.send_signal(number)

    def kill(self) -> None:
        """SIGKILL to all, and to whatever they started."""
        for process in self.processes:
            with suppress(ProcessLookupError):
                os.killpg(process.pid, signal.SIGKILL)
        self.wait(30)

    def wait(self, seconds: float) -> list[int]:
        """Their statuses, negative where a signal ended one; TimeoutError, and they are killed, where they take longer."""
        until = time.monotonic() + seconds
        try:
            return [process.wait(max(0.0, until - time.monotonic())) for process in self.processes]
        except subprocess.TimeoutExpired:
            output = self.output[-3000:]
            for process in self.processes:
                with suppress(ProcessLookupError):
                    os.killpg(process.pid, signal.SIGKILL)
            raise TimeoutError(f"still running after {seconds:.0f} s; they printed: {output}") from None

    def wait_for(self, text: str, seconds: float = 120.0) -> float:
        """Wait until they have printed `text`; returns the seconds that this took."""
        began = time.monotonic()
        while text not in self.output:
            if not self.running or time.monotonic() - began > seconds:
                raise AssertionError(f"no {text!r} within {seconds:.0f} s; they printed: {self.output[-3000:]}")
            time.sleep(0.02)
        return time.monotonic() - began
