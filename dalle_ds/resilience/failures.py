"""Failure classes of a run, the root cause among several reports, and the log line. Imports the standard library only.

lost           the monitor of a rank is silent or unreachable: its host is gone, or both were killed
crash          the training process ended without an error: SIGKILL (out of memory), SIGSEGV, NCCL's abort
stopped        by SIGSTOP, for longer than a timeout
launcher-lost  the launcher is gone, and the process cannot be asked to stop behind a checkpoint
error          an exception; the only class that needs a person
interrupted    Ctrl-C, or a signal that reached the monitor too
hang           no progress for `watch.hang_minutes`
disconnected   a collective failed or timed out: most likely by another rank's failure, which is then reported as well
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass

KINDS = ("lost", "crash", "stopped", "launcher-lost", "error", "interrupted", "hang", "disconnected")
"""Of several reports, the first in this order is the root cause."""
EXIT_ERROR = 1
EXIT_REQUEUE = 75
"""`dalle_ds.errors.EXIT_REQUEUE`, which the monitor process does not import."""
GRACE_PERIOD = 2.0
"""Seconds to wait, after an error, for the reports of other ranks."""
MAX_NAMED = 8
"""Ranks and hosts that a line names."""
SAME_TIME = 1.0
"""Seconds by which the pulses of processes that work in lockstep may differ."""


@dataclass(frozen=True)
class Position:
    """How far a training process is, by its last pulse. One without any is not held to hang."""

    step: int = 0
    phase: str = "starting"
    idle: float = 0.0
    """Seconds since that pulse."""
    allowed: float = 0.0
    """Seconds that the phase may take, where that is more than `watch.hang_minutes`."""
    begun: bool = False
    """Whether there was a pulse."""
    where: str = ""
    """Where its main thread is; empty where its stacks were not asked for."""
    waits: bool = False
    """Whether that is a call that waits for other processes."""


@dataclass(frozen=True)
class Failure:
    """Why a process cannot go on: one of `KINDS`, and how the line ends."""

    kind: str
    text: str
    traceback: str = ""

    @property
    def status(self) -> int:
        """What all processes of the run then end with."""
        return EXIT_ERROR if self.kind == "error" else EXIT_REQUEUE


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
        known = self._failures.get(rank)
        if known is None or KINDS.index(failure.kind) < KINDS.index(known.kind):
            self._failures[rank] = failure
        everyone = len(self._failures) == self._world_size
        self._due = min(self._due, now + (0.0 if everyone else self._delays.get(failure.kind, 0.0)))

    def is_due(self, now: float) -> bool:
        """Whether no report that is still to come would change the root cause."""
        return now >= self._due

    def root_cause(self) -> tuple[int | None, Failure]:
        """The rank and its failure, the earliest of one class; None for the rank where all report the same."""
        rank, failure = min(self._failures.items(), key=lambda item: KINDS.index(item[1].kind))
        texts = [other.text for other in self._failures.values()]
        alike = 1 < len(texts) == self._world_size and set(texts) == {failure.text}
        return (None if alike else rank), failure


def behind(positions: Mapping[int, Position]) -> list[int]:
    """The ranks that hold up the others: those with the fewest steps; of these, those that wait for no other process; where
    that tells nothing, those with the oldest pulse."""
    least = min((position.step, position.waits) for position in positions.values())
    late = [rank for rank, position in positions.items() if (position.step, position.waits) == least]
    if len(late) < len(positions):
        return late
    oldest = max(position.idle for position in positions.values())
    return [rank for rank, position in positions.items() if position.idle > oldest - SAME_TIME]


def log_line(
    kind: str, ranks: Sequence[int | str], hosts: Sequence[str], position: Position, status: int, text: str
) -> str:
    """What the user is shown, and a log search finds: `dalle_ds monitor: crash rank=3 host=n2 step=120 …`."""
    who = f"rank={_join(ranks)} host={_join(dict.fromkeys(hosts)) or 'unknown'}"
    step = f'step={position.step} phase="{position.phase}"' if position.begun else "step=none"
    resume = "; the same command resumes the run" if status == EXIT_REQUEUE else ""
    return f"dalle_ds monitor: {kind} {who} {step} exit={status}: {text}{resume}\n"


def _join(values: Iterable[object]) -> str:
    words = [str(value) for value in values]
    return ",".join(words[:MAX_NAMED] + ["…"] * (len(words) > MAX_NAMED))
