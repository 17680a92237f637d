"""The monitor process of a rank: sees its training process crash, be stopped or hang, and tells the coordinator.

Started by `watch.py` without torch and the rest of this project, it is there in 60 ms and holds 10 MB. Being a process, it
outlives the one that it watches, can kill it where it is stopped or hangs, and is not held up by the interpreter's lock.
"""

from __future__ import annotations

import contextlib
import json
import math
import os
import resource
import selectors
import signal
import socket
import sys
import threading
from dataclasses import asdict, replace
from datetime import datetime, timezone
from pathlib import Path
from typing import Any

from .coordinator import EXIT_GRACE, Coordinator
from .messages import EXIT_REQUEUE, Channel, Failure, Message, Position, Settings, log_line, show
from .processes import SIGNALS, Clock, Launchers, Progress, Stacks, TrainingProcess, main_thread, resident_bytes

TICK = 0.5
"""Seconds between two looks at the clock and the training process; messages are read as they come."""
DISK_GRACE = 2.0
"""Seconds that the disk gets to take the last files."""


class MonitorProcess:
    """Watches a training process, and ends it when the coordinator says so. `selector` calls what is registered with a
    socket when there is something to read."""

    def __init__(
        self, settings: Settings, channel: Channel, coordinator: Channel, selector: selectors.BaseSelector, clock: Clock
    ) -> None:
        self._settings, self._channel, self._coordinator = settings, channel, coordinator
        self._selector, self._clock = selector, clock
        # Where no one else waits, a process may be stopped for as long as it may hang.
        self.process = TrainingProcess(settings.pid, settings.timeout if settings.world_size > 1 else math.inf, clock)
        # None once one of them is known to be gone.
        self._launchers: Launchers | None = Launchers(settings.pid, "CROSS_RANK" in os.environ)
        self._progress = Progress(settings.progress, clock)
        self._stacks = Stacks(settings.pid, settings.stacks, clock)
        self._main_thread = ("", False)
        self._writing = threading.Thread()
        self._heard = clock.now
        self._beat = self._heartbeat = -math.inf
        self._failed = self._hangs = False
        self._leaving = False  # the training process has said bye, and the coordinator has still to answer
        self._outcome = ""
        self._outcome_at = 0.0
        selector.register(channel.connection, selectors.EVENT_READ, self._read_process)
        selector.register(coordinator.connection, selectors.EVENT_READ, self._read_coordinator)

    @property
    def done(self) -> bool:
        """Whether there is nothing more to watch."""
        return self._outcome == "end" or (self._outcome == "exit" and self.process.gone)

    def close(self) -> None:
        """Leave the last heartbeat behind."""
        self._write_heartbeat()
        if self._writing.ident is not None:
            self._writing.join(DISK_GRACE)

    def tick(self) -> None:
        """Look at the training process and at the clock."""
        now, settings = self._clock.now, self._settings
        if self._outcome:
            if self._outcome == "exit" and now > self._outcome_at + EXIT_GRACE:
                self.process.kill()
            return
        if now > self._heartbeat + settings.heartbeat:
            self._heartbeat = now
            self._write_heartbeat()
        if not self._failed and not self._leaving:
            self._check()
        stacks = self._stacks.answer()
        if stacks is not None:
            self._main_thread = main_thread(stacks)
            self._write_stacks(stacks)
        if now > self._beat + settings.beat or stacks is not None:
            self._beat = now
            self._send("beat")
        if now > self._heard + settings.timeout:
            self._lose_coordinator(f"no sign of life for {settings.timeout:.0f} s")

    def _check(self) -> None:
        failure = self.process.check()
        lost = None if self._launchers is None or self.process.ending else self._launchers.lost()
        if lost is not None:
            self._launchers = None
            if self._settings.can_stop:
                self._channel.send(kind="stop", why=f"loss of the launcher ({lost})")
            else:
                failure = failure or Failure("launcher-lost", lost)
        if failure is not None:
            self._report(failure)
        limit, position = self._settings.hang, self._position()
        if limit is not None and not self._hangs and position.begun and position.idle > max(limit, position.allowed):
            self._hangs = True
            self._send("hang", text="")

    def _report(self, failure: Failure) -> None:
        self._failed = True
        self._send(**asdict(failure))

    def _send(self, kind: str, **message: Any) -> None:
        self._coordinator.send(kind=kind, **message, position=asdict(self._position()))

    def _position(self) -> Position:
        where, waits = self._main_thread
        return replace(self._progress.read(), where=where, waits=waits)

    def _write_heartbeat(self) -> None:
        """RUN_DIR/logs/heartbeats/rank-N.json; left out while the disk has not taken the last one."""
        position, settings = self._position(), self._settings
        if settings.logs is None or not position.begun or self._writing.is_alive():
            return
        content = {
            "rank": settings.rank,
            "host": socket.gethostname(),
            "pid": settings.pid,
            "step": position.step,
            "phase": position.phase,
            "seconds_since_pulse": round(position.idle, 1),
            "resident_bytes": resident_bytes(settings.pid),
            "time": _utc(),
        }
        path = Path(settings.logs, "heartbeats", f"rank-{settings.rank}.json")
        self._write(path, json.dumps(content) + "\n")

    def _write_stacks(self, stacks: str) -> None:
        """RUN_DIR/logs/stacks/rank-N.txt, behind those of earlier hangs."""
        position, settings = self._position(), self._settings
        if settings.logs is not None and position.begun:
            head = f'=== {_utc()} rank={settings.rank} pid={settings.pid} step={position.step} phase="{position.phase}"'
            path = Path(settings.logs, "stacks", f"rank-{settings.rank}.txt")
            self._write(path, f"{head}: no progress for {position.idle:.0f} s\n{stacks}\n", append=True)

    def _write(self, path: Path, text: str, append: bool = False) -> None:
        """In a thread: a disk that hangs holds up no sign of life, and one that is full is no reason to end a run."""

        def work() -> None:
            with contextlib.suppress(OSError):
                path.parent.mkdir(parents=True, exist_ok=True)
                target = path if append else path.with_name(f".{path.name}.partial")
                with target.open("a" if append else "w") as file:
                    file.write(text)
                target.replace(path)

        self._writing = threading.Thread(target=work, daemon=True)
        self._writing.start()

    def _read_process(self) -> None:
        messages = self._channel.receive()
        if messages is None:
            self._selector.unregister(self._channel.connection)
            self.process.note_ending()
        for message in messages or ():
            if self._outcome:
                pass  # it is on its way to the training process
            elif message["kind"] == "bye":
                self._leaving = True
                self._send("bye")
            else:
                self._report(Failure(**message))

    def _read_coordinator(self) -> None:
        self._heard = self._clock.now
        messages = self._coordinator.receive()
        for message in messages or ():
            if message["kind"] in ("exit", "end"):
                self._end(message)
                return
            if message["kind"] == "dump" and not self._leaving and not self.process.ending:
                self._stacks.ask()
        if messages is None:
            self._lose_coordinator("the connection to its monitor broke")

    def _lose_coordinator(self, text: str) -> None:
        """Rank 0's monitor is gone, with its host or all processes there."""
        if self._leaving:
            self._end({"kind": "end"})
            return
        if os.environ.get("LOCAL_RANK", "0") == "0" and not self.process.signalled:  # one of each host
            show(log_line("lost", [0], [os.environ.get("MASTER_ADDR", "")], Position(), EXIT_REQUEUE, text))
        self._end({"kind": "exit", "status": EXIT_REQUEUE})

    def _end(self, outcome: Message) -> None:
        self._outcome, self._outcome_at = outcome["kind"], self._clock.now
        self._channel.send(**outcome)
        self._selector.unregister(self._coordinator.connection)
        self._coordinator.connection.close()


def main() -> None:
    """Read the settings from standard input and watch until there is nothing more to watch."""
    settings = Settings(**json.load(sys.stdin))
    selector, clock = selectors.DefaultSelector(), Clock()
    training, to_coordinator = (socket.socket(fileno=file) for file in (settings.channel, settings.coordinator))
    to_coordinator.settimeout(1.0)
    monitor = MonitorProcess(settings, Channel(training), Channel(to_coordinator), selector, clock)
    roles: list[MonitorProcess | Coordinator] = [monitor]
    if settings.listener is not None:
        raise_file_limit()
        listener = socket.socket(fileno=settings.listener)
        roles.append(Coordinator(settings, listener, selector, monitor.process))
    # Launchers and SLURM signal all processes of a run. The training process decides what follows, and may have a checkpoint
    # to write; the monitor ends soon after it, whatever it is told.
    for number in SIGNALS:
        signal.signal(number, lambda *_: monitor.process.note_signal())
    signal.pthread_sigmask(signal.SIG_UNBLOCK, SIGNALS)
    while not all(role.done for role in roles):
        ready = selector.select(TICK)
        clock.advance()
        for key, _ in ready:
            key.data()
        for role in roles:
            role.tick()
    monitor.close()
    os._exit(0)  # not held up by a disk that hangs


def raise_file_limit() -> None:
    """Allow as many open files as the system does: the coordinator has one for each rank."""
    most = resource.getrlimit(resource.RLIMIT_NOFILE)[1]
    with contextlib.suppress(OSError, ValueError):  # not allowed everywhere, and needed for 1,000 ranks only
        resource.setrlimit(resource.RLIMIT_NOFILE, (most, most))


def _utc() -> str:
    return datetime.now(timezone.utc).isoformat(timespec="seconds")
