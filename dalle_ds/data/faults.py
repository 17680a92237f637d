"""What cannot be read of prepared data: where, why, how much of it, and when that is too much.

A row that cannot be read raises a `RowError`; the loader puts another row in its place and keeps it in its `FaultLog`. The
trainer adds up the counts of all processes and gives them to a `BadSampleBudget`, which ends a run of which too much is
unreadable.
"""

from __future__ import annotations

from collections import Counter, deque
from collections.abc import Iterable
from dataclasses import dataclass

from dalle_ds.errors import DataError

MISSING_FILE = "missing file"
TRUNCATED_FILE = "file of the wrong size"
DAMAGED_FILE = "damaged file"
READ_ERROR = "disk error"
BAD_IMAGE = "undecodable image"
NO_FEATURES = "image without features"
OTHER = "unreadable row"

_WINDOW = 10_000  # rows tried last, of which the share is
_AT_LEAST = 100  # rows, from fewer of which nothing is concluded, unless the limit is 0
# The share is tested at every update, over months: with three, chance alone would end many a run that is at its limit.
_DEVIATIONS = 5.0
_TOLD = 20


class RowError(DataError):
    """A row that cannot be read; another one may stand in for it. `reason` has the same few words for all faults of a kind,
    `where` names the file, or the row where the fault is its own."""

    def __init__(self, message: str, reason: str = OTHER, where: str = "") -> None:
        super().__init__(message)
        self.reason = reason
        self.where = where


class WorkerError(DataError):
    """A process that loads data is gone. Its data are not, and others can be started."""


@dataclass(frozen=True)
class Fault:
    """Rows that cannot be read."""

    reason: str
    """The same few words for all faults of a kind."""
    where: str
    """The file, or the row where the fault is its own."""
    rows: int
    """How many rows are concerned."""

    def __str__(self) -> str:
        return f"{self.where}: {self.reason}, {self.rows:,} row{'s' * (self.rows != 1)} unreadable"


class FaultLog:
    """The faults that one process has met: how many of each kind, where, and which of them nobody was told of yet."""

    def __init__(self) -> None:
        self._rows: Counter[str] = Counter()
        self._places: dict[str, set[str]] = {}
        self._examples: dict[str, str] = {}
        self._news: list[str] = []

    def add(self, error: DataError) -> None:
        """Take note of a row that could not be read."""
        reason, where = getattr(error, "reason", OTHER), getattr(error, "where", "") or str(error)
        self._rows[reason] += 1
        self._examples.setdefault(reason, where)
        places = self._places.setdefault(reason, set())
        if len(places) < _TOLD and where not in places:
            places.add(where)
            self._news.append(f"unreadable: {error}")

    def told(self, fault: Fault) -> None:
        """Someone was told of this place: it is no news."""
        self._places.setdefault(fault.reason, set()).add(fault.where)

    def news(self) -> list[str]:
        """A sentence for each place that was not reported before, up to 20 of a kind; from now on they are reported."""
        news, self._news = self._news, []
        return news

    def left_out(self) -> str | None:
        """How many rows could not be read, and why, for who goes on without them; None where all could."""
        count = self._rows.total()
        if not count:
            return None
        rows = f"{count:,} rows could not be read and were" if count > 1 else "1 row could not be read and was"
        return f"{rows} left out; {self.commonest()}"

    def commonest(self) -> str:
        """The commonest kind with an example, "" where nothing was unreadable."""
        for reason, rows in self._rows.most_common(1):
            return _commonest(reason, rows, self._examples[reason])
        return ""


class BadSampleBudget:
    """Ends a run when the share of rows that cannot be read is above a limit. Pure: it is told all counts.

    Args:
        limit: largest share, in [0, 1].
        log: faults met by this process, for the message.
        data: the data folder or folders, for the message.
    """

    def __init__(self, limit: float, log: FaultLog, data: str | tuple[str, ...]) -> None:
        self._limit = limit
        self._log = log
        self._data = (data,) if isinstance(data, str) else data
        self._updates: deque[tuple[int, int]] = deque()
        self.tried = 0
        """Rows tried in the window."""
        self.failed = 0
        """Those of them that could not be read."""

    def check_known(self, faults: Iterable[Fault], rows: int) -> None:
        """Count what is known, and was told, to be unreadable of the `rows` of the training split before anything was read;
        `DataError` where it is more than the limit allows."""
        reasons: Counter[str] = Counter()
        examples: dict[str, str] = {}
        for fault in faults:
            self._log.told(fault)
            reasons[fault.reason] += fault.rows
            examples.setdefault(fault.reason, fault.where)
        lost = reasons.total()
        if lost > self._limit * rows:
            reason, count = reasons.most_common(1)[0]
            commonest = _commonest(reason, count, examples[reason])
            raise self._error(f"{lost:,} of {rows:,} rows cannot be read", lost / rows, commonest)

    def observe(self, tried: int, failed: int) -> None:
        """Count the rows of an update, over all processes.

        Args:
            tried: rows that were tried, those that failed included.
            failed: rows that could not be read.

        Raises:
            DataError: more of the window cannot be read than the limit allows and chance explains (five standard
                deviations), on every process that was told the same counts.
        """
        self._updates.append((tried, failed))
        self.tried += tried
        self.failed += failed
        while self.tried - self._updates[0][0] >= _WINDOW:
            old_tried, old_failed = self._updates.popleft()
            self.tried -= old_tried
            self.failed -= old_failed
        if self.tried < _AT_LEAST and self._limit > 0:
            return
        chance = _DEVIATIONS * (self._limit * (1 - self._limit) * self.tried) ** 0.5
        if self.failed > self._limit * self.tried + chance:
            found = f"{self.failed:,} of the last {self.tried:,} rows tried could not be read"
            raise self._error(found, self.failed / self.tried, self._log.commonest())

    def _error(self, found: str, share: float, commonest: str) -> DataError:
        why = f"; {commonest}" if commonest else ""
        looks = " and ".join(f"python launchers/doctor.py data {folder}" for folder in self._data)
        return DataError(
            f"{found}, {share:.1%}, which is more than loader.max_unreadable={self._limit:g} allows{why}. Look at all of "
            f"the data with {looks}, and put back what is missing, or raise the limit"
        )


def _commonest(reason: str, rows: int, example: str) -> str:
    return f"most often: {reason} ({rows:,} times), such as {example}"
