"""Watches the training process of one rank, and connects it with the chief."""

from __future__ import annotations

import math
import os
import selectors
import socket
import time
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

from .channel import Channel, Message, Settings, show
from .launchers import Launchers
from .logs import Logs
from .parent import Parent
from .progress import Place, Progress
from .stacks import Stacks, innermost
from .verdict import NO_CONTACT, REQUEUE, Report, sentence

GRACE = 5.0
"""Seconds that a training process gets to end by itself after a verdict, before it is killed."""
DISK_GRACE = 2.0
"""Seconds that the disk gets to take the last files."""


class Watchman:
    """Sees its training process die, be stopped or hang, and tells the chief; ends it after a verdict.

    Args:
        channel: to the training process.
        selector: calls what is registered with a socket when there is something to read.
    """

    def __init__(self, settings: Settings, channel: Channel, selector: selectors.BaseSelector) -> None:
        # Where no one else waits, a process may be stopped for as long as it may hang.
        self.parent = Parent(settings.pid, settings.patience if settings.world_size > 1 else math.inf)
        self._launchers: Launchers | None = Launchers(settings.pid, "CROSS_RANK" in os.environ)
        """None once one of them is known to be gone."""
        self._progress = Progress(settings.progress)
        self._stacks = Stacks(settings.pid, settings.stacks)
        self._logs = Logs(settings, Path(settings.logs)) if settings.logs is not None else None
        self._settings = settings
        self._channel = channel
        self._selector = selector
        self._chief: Channel | None = None
        self._chief_is = ""
        self._heard = 0.0
        self._beat = 0.0
        self._heartbeat = 0.0
        self._inside: dict[str, Any] = {"where": "", "waits": False}
        """What its stacks have told of the training process's place."""
        self._counts_from = 0.0
        """When silences were forgiven last."""
        self._reported = False
        self._hangs = False
        self._leaving = False
        """Whether the training process has said goodbye, and the chief has still to answer."""
        self._outcome: str | None = None
        self._outcome_at = 0.0
        selector.register(channel.connection, selectors.EVENT_READ, self._read_parent)

    @property
    def done(self) -> bool:
        """Whether there is nothing more to watch."""
        if self._outcome is None:
            return self._chief is None and self.parent.gone
        return self._outcome == "end" or self.parent.gone

    @property
    def hurries(self) -> bool:
        """Whether to look more often than usual."""
        return self.parent.ending or self._stacks.asked

    def close(self) -> None:
        """Leave the last heartbeat behind."""
        if self._logs is not None:
            place = self._place(time.monotonic())
            if place.begun:
                self._logs.heartbeat(place)
            self._logs.finish(DISK_GRACE)

    def forgive(self, now: float) -> None:
        """Count all silences from now on."""
        self.parent.forgive()
        self._heard = self._counts_from = now

    def tick(self, now: float) -> None:
        """Look at the training process and at the clock."""
        if self._outcome == "verdict" and now > self._outcome_at + GRACE:
            self.parent.kill()
        place = self._place(now)
        if self._logs is not None and place.begun and now > self._heartbeat + self._settings.heartbeat:
            self._heartbeat = now
            self._logs.heartbeat(place)
        if self._chief is None or self._outcome is not None:
            return
        self._look_for_trouble(now, place)
        stacks = self._stacks.answer(now)
        if stacks is not None:
            self._keep_stacks(stacks, now)
        if now > self._beat + self._settings.beat:
            self._beat = now
            self._chief.send(kind="beat", place=asdict(self._place(now)))
        if now > self._heard + self._settings.patience:
            self._lose_chief(f"no sign of life for {self._settings.patience:.0f} s")

    def _place(self, now: float) -> Place:
        place = self._progress.read(now)
        return replace(place, since=min(place.since, now - self._counts_from), **self._inside)

    def _look_for_trouble(self, now: float, place: Place) -> None:
        if self._reported or self._leaving:
            return
        trouble = self.parent.check(now)
        if trouble is not None:
            self._report(trouble)
            return
        lost = None if self._launchers is None or self.parent.ending else self._launchers.lost()
        if lost is not None:
            self._launchers = None
            if self._settings.stops:
                self._channel.send(kind="stop", why=f"loss of the launcher ({lost})")
            else:
                self._report(Report("dead", f"has lost its launcher ({lost})"))
        hang = self._settings.hang
        if hang is not None and not self._hangs and place.begun and place.since > max(hang, place.allowed):
            self._hangs = True
            self._send_report(Report("hung", f"no progress for {place.since:.0f} s"), place)

    def _keep_stacks(self, stacks: str, now: float) -> None:
        self._inside["where"], self._inside["waits"] = innermost(stacks)
        place = self._place(now)
        if self._logs is not None and place.begun:
            self._logs.stacks(stacks, place)
        assert self._chief is not None
        self._chief.send(kind="stacks", place=asdict(place))

    def _report(self, report: Report) -> None:
        self._reported = True
        self._send_report(report, self._place(time.monotonic()))

    def _send_report(self, report: Report, place: Place) -> None:
        assert self._chief is not None
        self._chief.send(kind="beat", place=asdict(place))  # what the chief knows of a place is seconds old
        self._chief.send(**asdict(report))

    def _read_parent(self) -> None:
        messages = self._channel.receive()
        if messages is None:
            self._selector.unregister(self._channel.connection)
            self.parent.hangs_up(time.monotonic())
        for message in messages or ():
            if message["kind"] == "begin":
                self._join(message)
            elif self._chief is None:
                pass  # too late: the outcome is on its way
            elif message["kind"] == "bye":
                self._leaving = True
                self._chief.send(kind="bye")
            else:
                self._report(Report(**message))

    def _join(self, begin: Message) -> None:
        host, port = begin["host"], begin["port"]
        try:
            connection = socket.create_connection((host, port), timeout=self._settings.patience)
        except OSError as error:
            show(f"error: {self._settings.who} cannot connect to {begin['who']} at {host}:{port}: {error}\n")
            self._end({"kind": "verdict", "status": REQUEUE})
            return
        connection.settimeout(1.0)
        self._chief, self._chief_is = Channel(connection), begin["who"]
        self._heard = time.monotonic()
        self._chief.send(kind="join", token=begin["token"], rank=self._settings.rank, who=self._settings.who)
        self._selector.register(connection, selectors.EVENT_READ, self._read_chief)
        self._channel.send(kind="joined")

    def _read_chief(self) -> None:
        assert self._chief is not None
        self._heard = time.monotonic()
        messages = self._chief.receive()
        for message in messages or ():
            if message["kind"] == "dump":
                if not self._leaving and not self.parent.ending:
                    self._stacks.ask(time.monotonic())
            elif message["kind"] != "beat":
                self._end(message)
                return
        if messages is None:
            self._lose_chief("the connection to it broke")

    def _lose_chief(self, how: str) -> None:
        """Rank 0's watchman is no more, and with it its machine or all its processes there."""
        if self._leaving:
            self._end({"kind": "end"})
            return
        if self._settings.prints and not self.parent.told:
            show(sentence(self._chief_is, Report("dead", f"{NO_CONTACT}: {how}")))
        self._end({"kind": "verdict", "status": REQUEUE})

    def _end(self, outcome: Message) -> None:
        self._outcome, self._outcome_at = outcome["kind"], time.monotonic()
        self._channel.send(**outcome)
        if self._chief is not None:
            self._selector.unregister(self._chief.connection)
            self._chief.connection.close()
            self._chief = None
