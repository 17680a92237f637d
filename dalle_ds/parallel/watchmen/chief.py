"""Hears all watchmen and gives the verdict."""

from __future__ import annotations

import contextlib
import resource
import secrets
import selectors
import socket
import time
from dataclasses import dataclass, replace

from .channel import Channel, Message, Settings, show
from .parent import Parent
from .progress import Place
from .stacks import LIMIT
from .verdict import NO_CONTACT, PRECEDENCE, Judge, Report, describe, duration, sentence
from .watchman import GRACE

WAIT_FOR_STACKS = LIMIT + 1.5
"""Seconds that a verdict waits for what processes do."""


@dataclass(eq=False)
class Member:
    """A watchman, as the chief sees it."""

    channel: Channel
    heard: float
    """When it gave its last sign of life."""
    rank: int | None = None
    """None until it has joined."""


class Chief:
    """The watchman of rank 0, as the one that decides.

    Args:
        channel: to the training process of rank 0.
        selector: as of a `Watchman`.
        parent: the training process of rank 0.
    """

    def __init__(self, settings: Settings, channel: Channel, selector: selectors.BaseSelector, parent: Parent) -> None:
        self._settings = settings
        self._selector = selector
        self._parent = parent
        self._judge = Judge(settings.world_size, settings.patience, settings.settle)
        self._members: list[Member] = []
        self._names: dict[int, str] = {}
        self._places: dict[int, Place] = {}
        self._missing = set(range(settings.world_size))
        """Ranks that have not joined yet."""
        self._left: set[int] = set()
        self._unanswered: set[int] | None = None
        """Ranks whose stacks are not written yet; None before anyone is asked."""
        self._stacks_due = 0.0
        self._begun: float | None = None
        self._beat = 0.0
        self._outcome: Message | None = None
        self._outcome_at = 0.0
        self._token = secrets.token_hex(16)
        most_files = resource.getrlimit(resource.RLIMIT_NOFILE)[1]
        with contextlib.suppress(OSError, ValueError):  # not allowed everywhere, and needed for 1,000 ranks only
            resource.setrlimit(resource.RLIMIT_NOFILE, (most_files, most_files))
        self._listener = _listen(settings.world_size)
        selector.register(self._listener, selectors.EVENT_READ, self._accept)
        channel.send(kind="port", port=self._listener.getsockname()[1], token=self._token)

    @property
    def done(self) -> bool:
        """Whether all others know the outcome, those too that are slow to join.

        They close their connections first: a socket that closes on unread bytes drops its own.
        """
        if self._outcome is None:
            return self._begun is None and self._parent.gone
        if not self._missing and all(member.rank is None for member in self._members):
            return True
        late = self._missing and self._outcome["kind"] == "end"
        return time.monotonic() > self._outcome_at + (self._settings.patience if late else GRACE)

    def forgive(self, now: float) -> None:
        """Count all silences from now on."""
        if self._begun is not None:
            self._begun = now
        for member in self._members:
            member.heard = now

    def tick(self, now: float) -> None:
        """Look at the clock."""
        if self._outcome is not None:
            return
        if now > self._beat + self._settings.beat:
            self._beat = now
            self._tell(kind="beat")
        self._look_for_silence(now)
        if self._judge.is_due(now):
            rank, report = self._judge.verdict()
            if not self._awaits_stacks(report, now):
                self._give_verdict(rank, report, now)

    def _awaits_stacks(self, report: Report, now: float) -> bool:
        """After a hang, have all processes say where they are, and wait for it.

        A hang may look like a death: NCCL ends the processes that wait too long.
        """
        if self._unanswered is None:
            hang = report.kind in ("hung", "timed out")
            stalls = any(place.begun and place.since > self._settings.stalled for place in self._places.values())
            if not hang and not stalls:
                return False
            self._unanswered = {m.rank for m in self._members if m.rank is not None} - self._left
            self._stacks_due = now + WAIT_FOR_STACKS
            self._tell(kind="dump")
        return bool(self._unanswered) and now < self._stacks_due

    def _give_verdict(self, rank: int | None, report: Report, now: float) -> None:
        lost = self._left | ({rank} if report.kind in ("silent", "dead") else set())
        places = {self._name(other): place for other, place in self._places.items() if other not in lost}
        where = ""
        if self._unanswered is not None and places:
            where = describe(places)
            if self._settings.logs is not None and any(place.begun for place in places.values()):
                where += f"; all stacks are in {self._settings.logs}/stacks"
        if report.kind == "hung":
            longest = max(place.since for place in places.values())
            report = replace(report, text=f"no progress for {duration(longest)}")
        # Where all of the run is told to end, whoever did so says so.
        if not (report.kind == "told" and (rank is None or self._parent.told)):
            show(sentence(None if rank is None else self._name(rank), report, where))
        self._decide({"kind": "verdict", "status": report.status}, now)

    def _name(self, rank: int) -> str:
        return self._names.get(rank, f"rank {rank}")

    def _decide(self, outcome: Message, now: float) -> None:
        self._outcome, self._outcome_at = outcome, now
        self._tell(**outcome)

    def _look_for_silence(self, now: float) -> None:
        patience = self._settings.patience
        if self._judge.is_due(now):
            # A process may have died of another one's silence: NCCL does, once its retries are used up.
            patience = min(patience, 2.5 * self._settings.beat)
        for member in self._members:
            silence = now - member.heard
            if member.rank is not None and silence > patience:
                text = f"{NO_CONTACT}: no sign of life for {silence:.0f} s"
                self._judge.hear(member.rank, Report("silent", text), now)
        if self._missing and self._begun is not None and now > self._begun + self._settings.patience:
            text = f"has died at the start, or cannot connect: no sign of life for {now - self._begun:.0f} s"
            self._judge.hear(min(self._missing), Report("silent", text), now)

    def _tell(self, **message: object) -> None:
        for member in self._members:
            member.channel.send(**message)

    def _accept(self) -> None:
        try:
            connection, _ = self._listener.accept()
        except OSError:
            return  # whoever it was will be missed
        connection.settimeout(1.0)
        member = Member(Channel(connection), time.monotonic())
        self._members.append(member)
        self._selector.register(connection, selectors.EVENT_READ, lambda: self._read(member))

    def _read(self, member: Member) -> None:
        now = time.monotonic()
        member.heard = now
        messages = member.channel.receive()
        for message in messages or ():
            if member.rank is None and not self._join(member, message, now):
                messages = None
                break
            self._heed(member, message, now)
        if messages is not None:
            return
        self._selector.unregister(member.channel.connection)
        member.channel.connection.close()
        self._members.remove(member)
        if member.rank is not None and member.rank not in self._left:
            self._judge.hear(member.rank, Report("dead", f"{NO_CONTACT}: the connection to it broke"), now)

    def _heed(self, member: Member, message: Message, now: float) -> None:
        rank, kind = member.rank, message["kind"]
        assert rank is not None
        if "place" in message:
            self._places[rank] = Place(**message["place"])
        if kind in PRECEDENCE:
            self._judge.hear(rank, Report(**message), now)
            if self._unanswered is not None and kind == "dead":
                self._unanswered.discard(rank)
        elif kind == "stacks" and self._unanswered is not None:
            self._unanswered.discard(rank)
        elif kind == "bye":
            self._left.add(rank)
            if rank == 0 and self._outcome is None:
                self._decide({"kind": "end"}, now)
            elif self._outcome is None:
                member.channel.send(kind="end")

    def _join(self, member: Member, message: Message, now: float) -> bool:
        """Whether whoever connected is the watchman of a rank that has none yet."""
        known = message["kind"] == "join" and message.get("token") == self._token
        if not known or message["rank"] not in self._missing:
            return False
        member.rank = message["rank"]
        self._names[message["rank"]] = message["who"]
        self._missing.discard(message["rank"])
        if self._begun is None:
            self._begun = now
        if self._outcome is not None:
            member.channel.send(**self._outcome)
        return True


def _listen(world_size: int) -> socket.socket:
    if world_size == 1:
        return socket.create_server(("127.0.0.1", 0))
    if socket.has_dualstack_ipv6():
        return socket.create_server(("", 0), family=socket.AF_INET6, backlog=world_size, dualstack_ipv6=True)
    return socket.create_server(("", 0), backlog=world_size)
