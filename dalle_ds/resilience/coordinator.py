"""Hears the monitors of all ranks, finds the root cause of a failure, and ends the run. Part of rank 0's monitor process."""

from __future__ import annotations

import selectors
import socket
from collections.abc import Mapping
from dataclasses import dataclass, field

from .messages import KINDS, Channel, Failure, Message, Position, Settings, log_line, show
from .processes import STACKS_SECONDS, TrainingProcess

EXIT_GRACE = 5.0
"""Seconds that a training process gets to end by itself before it is killed."""
GRACE_PERIOD = 2.0
"""Seconds to wait, after an error, for the reports of other ranks."""
SAME_TIME = 1.0
"""Seconds by which the pulses of processes that work in lockstep may differ."""


class FailureClassifier:
    """Finds the root cause among the failures of several ranks. Times are in seconds of the caller's clock.

    Args:
        timeout: after which a silent host is known to be lost; a rank is disconnected from it before.
    """

    def __init__(self, world_size: int, timeout: float) -> None:
        self._delays = {"error": GRACE_PERIOD, "interrupted": GRACE_PERIOD, "disconnected": timeout + GRACE_PERIOD}
        self._world_size = world_size
        self._failures: dict[int, Failure] = {}
        self._due = float("inf")

    def add(self, rank: int, failure: Failure, now: float) -> None:
        """Take a report; of one rank, the first in the order of `KINDS` counts."""
        known = self._failures.get(rank, failure)
        self._failures[rank] = min(known, failure, key=_order)
        everyone = len(self._failures) == self._world_size
        self._due = min(self._due, now + (0.0 if everyone else self._delays.get(failure.kind, 0.0)))

    def is_due(self, now: float) -> bool:
        """Whether no report that is still to come would change the root cause."""
        return now >= self._due

    def root_cause(self) -> tuple[int | None, Failure]:
        """The rank and its failure, the earliest of one class; None for the rank where all report the same."""
        rank, failure = min(self._failures.items(), key=lambda item: _order(item[1]))
        texts = [other.text for other in self._failures.values()]
        alike = 1 < len(texts) == self._world_size and set(texts) == {failure.text}
        return (None if alike else rank), failure


def _order(failure: Failure) -> int:
    return KINDS.index(failure.kind)


def behind(positions: Mapping[int, Position]) -> list[int]:
    """The ranks that hold up the others: those with the fewest steps; of these, those that wait for no other process; where
    that tells nothing, those with the oldest pulse."""
    least = min((position.step, position.waits) for position in positions.values())
    late = [rank for rank, position in positions.items() if (position.step, position.waits) == least]
    if len(late) < len(positions):
        return late
    oldest = max(position.idle for position in positions.values())
    return [rank for rank, position in positions.items() if position.idle > oldest - SAME_TIME]


@dataclass(eq=False)
class Member:
    """A monitor, as the coordinator sees it."""

    channel: Channel
    heard: float  # when it gave its last sign of life
    rank: int | None = None  # None until it has joined
    host: str = ""
    position: Position = field(default_factory=Position)
    left: bool = False  # whether it has said bye


class Coordinator:
    """Hears the monitors that connect to `listener`; `process` is the training process of rank 0."""

    def __init__(
        self, settings: Settings, listener: socket.socket, selector: selectors.BaseSelector, process: TrainingProcess
    ) -> None:
        self._settings, self._listener, self._selector, self._process = settings, listener, selector, process
        self._clock = process.clock
        self._classifier = FailureClassifier(settings.world_size, settings.timeout)
        self._connected: list[Member] = []
        self._ranks: dict[int, Member] = {}  # that have joined, connected or not
        self._missing = set(range(settings.world_size))
        self._begun: float | None = None  # when the first of them joined
        self._beat = 0.0
        self._asked_for_stacks: float | None = None
        self._outcome: Message | None = None
        self._outcome_at = 0.0
        selector.register(listener, selectors.EVENT_READ, self._accept)

    @property
    def done(self) -> bool:
        """Whether all others know the outcome, those too that are slow to join.

        They close their connections first: a socket that closes on unread bytes drops its own.
        """
        if self._outcome is None:
            return False
        told = not self._missing and all(member.rank is None for member in self._connected)
        return told or self._clock.now > self._outcome_at + EXIT_GRACE

    def tick(self) -> None:
        """Look at the clock."""
        now = self._clock.now
        if self._outcome is not None:
            return
        if now > self._beat + self._settings.beat:
            self._beat = now
            self._broadcast(kind="beat")
        self._look_for_silence(now)
        if self._classifier.is_due(now):
            rank, failure = self._classifier.root_cause()
            if not self._awaits_stacks(failure, now):
                self._report(rank, failure)
                self._decide({"kind": "exit", "status": failure.status})

    def _look_for_silence(self, now: float) -> None:
        timeout = self._settings.timeout
        if self._missing and self._begun is not None and now > self._begun + timeout:
            text = f"its monitor has not connected for {now - self._begun:.0f} s: crashed at the start, or unreachable"
            self._classifier.add(min(self._missing), Failure("lost", text), now)
        if self._classifier.is_due(now):
            # A process may have crashed of another one's silence: NCCL's do, once its retries are used up.
            timeout = 2.5 * self._settings.beat
        for member in self._connected:
            silence = now - member.heard
            if member.rank is not None and silence > timeout:
                self._classifier.add(member.rank, Failure("lost", f"no sign of life for {silence:.0f} s"), now)

    def _awaits_stacks(self, failure: Failure, now: float) -> bool:
        """After a hang, have all processes write their stacks, and wait. A crash may come from one, by NCCL's timeout."""
        if self._asked_for_stacks is None:
            positions = [member.position for member in self._ranks.values()]
            stalled = any(position.begun and position.idle > self._settings.stalled for position in positions)
            if failure.kind != "hang" and not stalled:
                return False
            self._asked_for_stacks = now
            self._broadcast(kind="dump")
        return now < self._asked_for_stacks + 2 * STACKS_SECONDS

    def _report(self, rank: int | None, failure: Failure) -> None:
        """Print the root cause; where that is, or may come from, a hang, also the ranks that hang."""
        # Where all of the run is told to end, whoever did so says so.
        ended_as_a_whole = failure.kind == "interrupted" and (rank is None or self._process.signalled)
        if failure.kind != "hang" and not ended_as_a_whole:
            ranks = list(range(self._settings.world_size)) if rank is None else [rank]
            self._show(failure.kind, ranks, failure.status, failure.text, failure.traceback)
        gone = {rank} if failure.kind in ("lost", "crash", "stopped") else set()
        positions = {r: member.position for r, member in self._ranks.items() if not member.left and r not in gone}
        if self._asked_for_stacks is None or not positions:
            return
        late = behind(positions)
        text = f"no progress for {max(position.idle for position in positions.values()):.0f} s"
        text += f", in {positions[late[0]].where or 'an unknown place'}"
        if self._settings.logs is not None and any(position.begun for position in positions.values()):
            text += f"; stacks of all ranks: {self._settings.logs}/stacks"
        self._show("hang", late, failure.status, text)

    def _show(self, kind: str, ranks: list[int], status: int, text: str, traceback: str = "") -> None:
        known = [self._ranks[rank] for rank in ranks if rank in self._ranks]
        position = known[0].position if known else Position()
        everyone = 1 < len(ranks) == self._settings.world_size
        hosts = [member.host for member in known]
        show(traceback + log_line(kind, ["all"] if everyone else ranks, hosts, position, status, text))

    def _decide(self, outcome: Message) -> None:
        self._outcome, self._outcome_at = outcome, self._clock.now
        self._broadcast(**outcome)

    def _broadcast(self, **message: object) -> None:
        for member in self._connected:
            member.channel.send(**message)

    def _accept(self) -> None:
        try:
            connection, _ = self._listener.accept()
        except OSError:
            return  # whoever it was will be missed
        connection.settimeout(1.0)
        member = Member(Channel(connection), self._clock.now)
        self._connected.append(member)
        self._selector.register(connection, selectors.EVENT_READ, lambda: self._read(member))

    def _read(self, member: Member) -> None:
        member.heard = now = self._clock.now
        messages = member.channel.receive()
        if messages and member.rank is None:
            messages = messages[1:] if self._join(member, messages[0]) else None
        for message in messages or ():
            self._take(member, message)
        if messages is None:
            self._selector.unregister(member.channel.connection)
            member.channel.connection.close()
            self._connected.remove(member)
            if member.rank is not None and not member.left:
                self._classifier.add(member.rank, Failure("lost", "the connection to its monitor broke"), now)

    def _join(self, member: Member, message: Message) -> bool:
        """Whether whoever connected is the monitor of a rank that has none yet."""
        known = message["kind"] == "join" and message.get("token") == self._settings.token
        if not known or message["rank"] not in self._missing:
            return False
        member.rank, member.host = message["rank"], message["host"]
        self._ranks[message["rank"]] = member
        self._missing.discard(message["rank"])
        if self._begun is None:
            self._begun = self._clock.now
        if self._outcome is not None:
            member.channel.send(**self._outcome)
        return True

    def _take(self, member: Member, message: Message) -> None:
        assert member.rank is not None
        member.position = Position(**message.pop("position"))
        if message["kind"] in KINDS:
            self._classifier.add(member.rank, Failure(**message), self._clock.now)
        elif message["kind"] == "bye":
            member.left = True
            if self._outcome is None and member.rank == 0:
                self._decide({"kind": "end"})
            elif self._outcome is None:
                member.channel.send(kind="end")
