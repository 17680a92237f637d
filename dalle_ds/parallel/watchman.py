"""The watchman: a small process beside each training process that sees it die and tells the others (`watch.py`).

It is a script of the standard library alone, which starts in 60 ms and holds 10 MB. Being a process, it outlives the one
that it watches, can kill it where it is stopped or hangs, and is not held up by its locks and long calls.

All watchmen, that of rank 0 included, connect to the chief, which rank 0's watchman is besides. It hears what each has to
report and gives the verdict that ends the run. Messages are JSON objects, one on a line:

    chief to its training process   port: where it listens, and `token`, the secret of this run's watchmen
    training process to watchman    begin: connect to the chief at `host`, `port`; `who` is rank 0
                                    failed, cut off: a `Report`
                                    bye: done, and not to be watched any longer
    watchman to chief               join, beat, bye; all kinds of `Report`
    chief to watchman               beat; verdict: end now, with a status that is not 0; end: to all when rank 0 is done, no
                                    one watches from here on; to another one when it is
    watchman to training process    joined: it is connected to the chief; verdict, end
"""

from __future__ import annotations

import contextlib
import json
import os
import resource
import secrets
import selectors
import signal
import socket
import sys
import time
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

TICK = 0.5
"""Seconds between two looks at clocks and at the training process; messages are read as they come."""
GRACE = 5.0
"""Seconds that a training process gets to end by itself after a verdict, before it is killed."""
SIGNAL_DELAY = 0.1
"""Seconds after a death in which a signal to end that the watchman gets too is held to be its cause."""
SIGNAL_LASTS = 60.0
"""Seconds in which such a signal may have its effect."""
PAUSE = 5.0
"""A watchman that has not run for so many seconds was suspended, maybe with all others, and counts silences afresh."""
LONGEST_MESSAGE = 1 << 20

NO_CONTACT = "has died, or its host cannot be reached"

Message = dict[str, Any]


@dataclass(frozen=True)
class Settings:
    """What a watchman is told at its start. Times are in seconds."""

    rank: int
    world_size: int
    pid: int
    """Of the training process."""
    who: str
    """How the user knows it: "rank 3 (host n2, pid 123)"."""
    prints: bool
    """Whether to print where the chief cannot: one watchman per machine."""
    beat: float
    """Between two signs of life."""
    patience: float
    """How long a process may give no sign of life, or be stopped, before it is held to be dead."""
    settle: float
    """To wait, after a process has failed, for what others have to say."""


@dataclass(frozen=True)
class Report:
    """Why a process cannot go on."""

    kind: str
    """"silent": its watchman gives no sign of life. "dead": it ended without a word, or is stopped. "failed": it raised an
    error. "told": it was interrupted, or died of a signal that its watchman got too, such as at the end of a SLURM job.
    "cut off": it raised an error about communication, which is more likely another process's death."""
    text: str
    """Of "failed" and "cut off", the error; otherwise, what continues a sentence that begins with the process."""
    detail: str = ""
    """A traceback to print before."""


PRECEDENCE = ("silent", "dead", "failed", "told", "cut off")
"""Of several reports, the first of these kinds tells the cause."""


class Judge:
    """Decides whose report tells why the run ends. Times are seconds of a clock that the caller chooses."""

    def __init__(self, world_size: int, patience: float, settle: float) -> None:
        # Who is cut off knows it at once; that another's machine is silent is known after `patience`.
        self._holds = {"silent": 0.0, "dead": 0.0, "failed": settle, "told": settle, "cut off": patience + settle}
        self._world_size = world_size
        self._reports: dict[int, Report] = {}
        self._due = float("inf")

    def hear(self, rank: int, report: Report, now: float) -> None:
        """Take a report; of one process, the one of the highest precedence counts."""
        known = self._reports.get(rank)
        if known is None or PRECEDENCE.index(report.kind) < PRECEDENCE.index(known.kind):
            self._reports[rank] = report
        self._due = min(self._due, now + self._holds[report.kind])
        if len(self._reports) == self._world_size:
            self._due = min(self._due, now)

    def is_due(self, now: float) -> bool:
        """Whether it is time for the verdict."""
        return now >= self._due

    def verdict(self) -> tuple[int | None, Report]:
        """The rank to blame and its report; None for the rank where all failed in the same way."""
        reports = list(self._reports.items())
        rank, report = min(reports, key=lambda item: PRECEDENCE.index(item[1].kind))  # the earliest among equals
        alike = len(reports) == self._world_size and all(other.text == report.text for _, other in reports)
        return (None if alike else rank), report


def sentence(who: str | None, report: Report) -> str:
    """What the user is shown; `who` is None where all processes report the same."""
    if report.kind in ("failed", "cut off"):
        words = report.text if who is None else f"{who} failed: {report.text}"
    else:
        resume = "the same command goes on from the last complete checkpoint"
        words = f"{who or 'every process'} {report.text}; all processes end, and {resume}"
    return f"{report.detail}error: {words}\n"


def show(text: str) -> None:
    """Print for the user."""
    if sys.stderr.isatty():
        # A progress bar may have ended in the midst of a line, its cursor hidden.
        text = f"\r\x1b[K{text}\x1b[?25h"
    with contextlib.suppress(OSError):
        os.write(2, text.encode())


class Channel:
    """JSON objects, one on a line, over a connected socket."""

    def __init__(self, connection: socket.socket) -> None:
        self.connection = connection
        self._pending = b""

    def send(self, **message: Any) -> None:
        """Send; where the other side is gone, `receive` will tell."""
        with contextlib.suppress(OSError):
            self.connection.sendall(json.dumps(message).encode() + b"\n")

    def receive(self) -> list[Message] | None:
        """Wait for bytes; the messages that they complete, or None where the other side is gone or talks nonsense."""
        try:
            received = self.connection.recv(1 << 16)
            *lines, self._pending = (self._pending + received).split(b"\n")
            messages = [json.loads(line) for line in lines]
        except (OSError, ValueError):
            return None
        sensible = all(isinstance(message, dict) and "kind" in message for message in messages)
        return messages if received and sensible and len(self._pending) < LONGEST_MESSAGE else None

    def wait(self) -> Message | None:
        """Wait for a message, where the other side sends one at a time; None as of `receive`."""
        messages: list[Message] | None = []
        while messages == []:
            messages = self.receive()
        return None if messages is None else messages[0]


class Parent:
    """The training process that this one watches."""

    def __init__(self, pid: int, patience: float) -> None:
        self._told_at = float("-inf")
        self._pid = pid
        self._patience = patience
        self._ending_since: float | None = None
        self._stopped_since: float | None = None

    @property
    def gone(self) -> bool:
        """Whether it has ended: orphans get another parent."""
        return os.getppid() != self._pid

    @property
    def told(self) -> bool:
        """Whether this process got a signal to end lately, as both do from a terminal, launchers and SLURM."""
        return time.monotonic() < self._told_at + SIGNAL_LASTS

    def is_told(self) -> None:
        """Note such a signal."""
        self._told_at = time.monotonic()

    @property
    def ending(self) -> bool:
        """Whether it is known to be about to end."""
        return self._ending_since is not None

    def hangs_up(self, now: float) -> None:
        """Note that its side of the channel is closed: it is ending, which takes seconds where it holds a GPU's memory."""
        if self._ending_since is None:
            self._ending_since = now

    def check(self, now: float) -> Report | None:
        """What is wrong with it, if anything."""
        if self.gone:
            self.hangs_up(now)
        if self._ending_since is not None:
            if now < self._ending_since + SIGNAL_DELAY:
                return None
            if self.told:
                return Report("told", "was told to end by a signal")
            return Report("dead", "has died: killed or crashed (dmesg on its host tells whether memory ran out)")
        if not self._is_stopped():
            self._stopped_since = None
        elif self._stopped_since is None:
            self._stopped_since = now
        elif now > self._stopped_since + self._patience:
            return Report("dead", f"has been stopped by a signal (SIGSTOP) for {self._patience:.0f} s")
        return None

    def forgive(self) -> None:
        """Count the time of being stopped afresh."""
        self._stopped_since = None

    def _is_stopped(self) -> bool:
        """By a signal; a debugger's stop has another letter. Never where there is no /proc."""
        try:
            return Path(f"/proc/{self._pid}/stat").read_text().rpartition(")")[2].split()[0] == "T"
        except (OSError, IndexError):
            return False

    def kill(self) -> None:
        """End it, whatever it does."""
        if not self.gone:
            os.kill(self._pid, signal.SIGKILL)


class Watchman:
    """Watches the training process of one rank, and connects it with the chief.

    Args:
        channel: to the training process.
        selector: calls what is registered with a socket when there is something to read.
    """

    def __init__(self, settings: Settings, channel: Channel, selector: selectors.BaseSelector) -> None:
        self.parent = Parent(settings.pid, settings.patience)
        self._settings = settings
        self._channel = channel
        self._selector = selector
        self._chief: Channel | None = None
        self._chief_is = ""
        self._heard = 0.0
        self._beat = 0.0
        self._reported = False
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

    def forgive(self, now: float) -> None:
        """Count all silences from now on."""
        self.parent.forgive()
        self._heard = now

    def tick(self, now: float) -> None:
        """Look at the training process and at the clock."""
        if self._outcome == "verdict" and now > self._outcome_at + GRACE:
            self.parent.kill()
        if self._chief is None or self._outcome is not None:
            return
        trouble = None if self._reported or self._leaving else self.parent.check(now)
        if trouble is not None:
            self._report(trouble)
        if now > self._beat + self._settings.beat:
            self._beat = now
            self._chief.send(kind="beat")
        if now > self._heard + self._settings.patience:
            self._lose_chief(f"no sign of life for {self._settings.patience:.0f} s")

    def _report(self, report: Report) -> None:
        assert self._chief is not None
        self._reported = True
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
            self._end("verdict")
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
        outcomes = [message["kind"] for message in messages or () if message["kind"] != "beat"]
        if outcomes:
            self._end(outcomes[0])
        elif messages is None:
            self._lose_chief("the connection to it broke")

    def _lose_chief(self, how: str) -> None:
        """Rank 0's watchman is no more, and with it its machine or all its processes there."""
        if self._leaving:
            self._end("end")
            return
        if self._settings.prints and not self.parent.told:
            show(sentence(self._chief_is, Report("dead", f"{NO_CONTACT}: {how}")))
        self._end("verdict")

    def _end(self, outcome: str) -> None:
        self._outcome, self._outcome_at = outcome, time.monotonic()
        self._channel.send(kind=outcome)
        if self._chief is not None:
            self._selector.unregister(self._chief.connection)
            self._chief.connection.close()
            self._chief = None


@dataclass(eq=False)
class Member:
    """A watchman, as the chief sees it."""

    channel: Channel
    heard: float
    """When it gave its last sign of life."""
    rank: int | None = None
    """None until it has joined."""


class Chief:
    """Hears all watchmen and gives the verdict.

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
        self._missing = set(range(settings.world_size))
        """Ranks that have not joined yet."""
        self._left: set[int] = set()
        self._begun: float | None = None
        self._beat = 0.0
        self._outcome: str | None = None
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
        late = self._missing and self._outcome == "end"
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
            self._tell("beat")
        self._look_for_silence(now)
        if self._judge.is_due(now):
            rank, report = self._judge.verdict()
            # Where all of the run is told to end, whoever did so says so.
            if not (report.kind == "told" and (rank is None or self._parent.told)):
                show(sentence(None if rank is None else self._names.get(rank, f"rank {rank}"), report))
            self._decide("verdict", now)

    def _decide(self, outcome: str, now: float) -> None:
        self._outcome, self._outcome_at = outcome, now
        self._tell(outcome)

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

    def _tell(self, kind: str) -> None:
        for member in self._members:
            member.channel.send(kind=kind)

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
        rank = member.rank
        assert rank is not None
        if message["kind"] in PRECEDENCE:
            self._judge.hear(rank, Report(**message), now)
        elif message["kind"] == "bye":
            self._left.add(rank)
            if rank == 0 and self._outcome is None:
                self._decide("end", now)
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
            member.channel.send(kind=self._outcome)
        return True


def _listen(backlog: int) -> socket.socket:
    if socket.has_dualstack_ipv6():
        return socket.create_server(("", 0), family=socket.AF_INET6, backlog=backlog, dualstack_ipv6=True)
    return socket.create_server(("", 0), backlog=backlog)


def main() -> None:
    """Read the settings from standard input and watch; the argument is the number of a socket to the training process."""
    settings = Settings(**json.load(sys.stdin))
    channel = Channel(socket.socket(fileno=int(sys.argv[1])))
    selector = selectors.DefaultSelector()
    watchman = Watchman(settings, channel, selector)
    parent = watchman.parent
    for ending in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP):
        signal.signal(ending, lambda *_: parent.is_told())
    chief = Chief(settings, channel, selector, parent) if settings.rank == 0 else None
    last = time.monotonic()
    while not (watchman.done and (chief is None or chief.done)):
        for key, _ in selector.select(SIGNAL_DELAY if parent.ending else TICK):
            key.data()
        now = time.monotonic()
        for post in (watchman, chief):
            if post is not None:
                if now > last + PAUSE:
                    post.forgive(now)
                post.tick(now)
        last = now


if __name__ == "__main__":
    main()
