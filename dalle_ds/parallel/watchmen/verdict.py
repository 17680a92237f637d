"""Who is to blame, how to say so, and what status all processes end with."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass

from .progress import Place

NO_CONTACT = "has died, or its host cannot be reached"
RESUME = "the run ends, and the same command goes on from the last complete checkpoint"
FAILED = 1
"""Status of a run that a person must mend."""
REQUEUE = 75
"""`dalle_ds.errors.EXIT_REQUEUE`, which a watchman does not import: only to be started again."""
CLEARLY = 1.0
"""Seconds by which pulses of processes that work side by side do not differ."""
MOST_NAMES = 4


@dataclass(frozen=True)
class Report:
    """Why a process cannot go on."""

    kind: str
    """"silent": its watchman gives no sign of life. "dead": it ended without a word, or is stopped. "failed": it raised an
    error. "told": it was interrupted, or died of a signal that its watchman got too, such as at the end of a SLURM job.
    "hung": it gives no pulse. "timed out": it waited in vain for another process. "cut off": it raised an error about
    communication, which is more likely another process's death."""
    text: str
    """Of "failed", "timed out" and "cut off", the error; otherwise, what continues a sentence that begins with the
    process."""
    detail: str = ""
    """A traceback to print before."""

    @property
    def status(self) -> int:
        """What all processes end with."""
        return FAILED if self.kind == "failed" else REQUEUE


PRECEDENCE = ("silent", "dead", "failed", "told", "hung", "timed out", "cut off")
"""Of several reports, the first of these kinds tells the cause."""


class Judge:
    """Decides whose report tells why the run ends. Times are seconds of a clock that the caller chooses."""

    def __init__(self, world_size: int, patience: float, settle: float) -> None:
        # Who is cut off knows it at once; that another's machine is silent is known after `patience`.
        self._holds = {"silent": 0.0, "dead": 0.0, "failed": settle, "told": settle}
        self._holds |= {"hung": 0.0, "timed out": settle, "cut off": patience + settle}
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
        alike = 1 < len(reports) == self._world_size and all(other.text == report.text for _, other in reports)
        return (None if alike else rank), report


def sentence(who: str | None, report: Report, places: str = "") -> str:
    """What the user is shown.

    Args:
        who: the process to blame; None where all of them report the same.
        places: where processes are, after a hang.
    """
    behind = f"; {places}" if places else ""
    if report.kind == "hung":
        words = f"{report.text}: {places}; {RESUME}"
    elif report.kind == "timed out":
        words = f"{who or 'every process'} waited in vain: {report.text}{behind}; {RESUME}"
    elif report.kind in ("failed", "cut off"):
        words = (report.text if who is None else f"{who} failed: {report.text}") + behind
    else:
        words = f"{who or 'every process'} {report.text}{behind}; {RESUME}"
    return f"{report.detail}error: {words}\n"


def describe(places: Mapping[str, Place]) -> str:
    """Which processes are behind the others, and where; `places` are by what the user knows processes by."""
    if len(places) == 1:
        name, place = next(iter(places.items()))
        return f"{name} is {place}{_inside(place)}"
    late = behind(places)
    others = Counter(f"{place}{_inside(place)}" for name, place in places.items() if name not in late)
    if not others:
        together = Counter(str(place) for place in places.values()).most_common()
        if len(together) == 1:
            return f"every process is {together[0][0]}"
        return "no process is clearly behind: " + ", ".join(
            f"{count} {place}" for place, count in together[:MOST_NAMES]
        )
    named = ", ".join(late[:MOST_NAMES])
    if len(late) > MOST_NAMES:
        named += f" and {len(late) - MOST_NAMES} more"
    first = places[late[0]]
    verb = "is" if len(late) == 1 else "are"
    rest = f"{'the others are' if len(others) == 1 else 'most others are'} {others.most_common(1)[0][0]}"
    return f"{named} {verb} behind, {first} for {duration(first.since)}{_inside(first)}, while {rest}"


def behind(places: Mapping[str, Place]) -> list[str]:
    """Who holds up the others: those with the fewest steps; of these, those that do not wait for other processes; where that
    makes no difference, those with the oldest pulse. All of them where nothing tells them apart."""
    least = min((place.step, place.waits) for place in places.values())
    late = [name for name, place in places.items() if (place.step, place.waits) == least]
    if len(late) < len(places):
        return late
    oldest = max(place.since for place in places.values())
    return [name for name, place in places.items() if place.since > oldest - CLEARLY]


def duration(seconds: float) -> str:
    """In words."""
    return f"{seconds:.0f} s" if seconds < 120 else f"{seconds / 60:.0f} min"


def _inside(place: Place) -> str:
    return f", {place.where}" if place.where else ""
