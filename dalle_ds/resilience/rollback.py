"""When updates go wrong (NaN, loss spikes), and which data a run leaves out after it was rolled back."""

from __future__ import annotations

import dataclasses
import statistics
from collections import deque
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from dalle_ds.config import GuardConfig
from dalle_ds.errors import CheckpointError
from dalle_ds.files import write_json
from dalle_ds.parsing import parse_json

SMALLEST_SPIKE = 0.05
"""How far above the mean a spike lies at least, relative to it: losses that hardly vary have no spikes within it."""


class Guard:
    """Counts bad updates in a row. Given the same losses, every process decides alike."""

    def __init__(self, config: GuardConfig) -> None:
        self.config = config
        self.bad_in_a_row = 0
        self._losses: deque[float] = deque(maxlen=config.window)

    def observe(self, loss: float, finite: bool, applied: bool = True) -> bool:
        """Take note of an update.

        Args:
            loss: of the update, averaged over all processes.
            finite: whether this loss and all gradients were finite, overflows that gradient scales deal with left out.
            applied: whether the update was made. One that only such overflows prevented is neither good nor bad.

        Returns:
            Whether the run should go back to its last good checkpoint.
        """
        if finite and not applied:
            return False
        if finite and not self.is_spike(loss):
            self.bad_in_a_row = 0
            self._losses.append(loss)
        else:
            self.bad_in_a_row += 1
        return self.bad_in_a_row >= self.config.patience

    def is_spike(self, loss: float) -> bool:
        """Whether a finite loss is far above those before."""
        limit = self.config.spike_deviations
        if limit is None or len(self._losses) < self.config.window:
            return False
        mean = statistics.fmean(self._losses)
        distance = max(limit * statistics.pstdev(self._losses, mean), SMALLEST_SPIKE * abs(mean))
        return loss > mean + distance

    def state_dict(self) -> dict[str, Any]:
        """What a checkpoint keeps, JSON-able."""
        return {"bad_in_a_row": self.bad_in_a_row, "losses": list(self._losses)}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Go on from `state_dict`."""
        self.bad_in_a_row = state["bad_in_a_row"]
        self._losses = deque(state["losses"], maxlen=self.config.window)


@dataclass(frozen=True)
class Rollback:
    """One time that a run went back to a checkpoint. Places in the order of the data are left out from then on."""

    from_update: int  # updates that had been made
    to_update: int  # updates that the checkpoint had seen
    skip_from: int  # the first place that is left out
    skip_to: int  # the first place behind


@dataclass(frozen=True)
class Rollbacks:
    """All times that a run went back, kept in `RUN_DIR/rollbacks.json`.

    The data of update n, from 0, are those at a place in the order of the data: place n, as long as nothing was left out.
    """

    events: tuple[Rollback, ...] = ()  # first to last

    @classmethod
    def read(cls, file: Path) -> Rollbacks:
        """Those in `file`, which is only there once the run went back.

        Raises:
            CheckpointError: the file cannot be read.
        """
        if not file.exists():
            return cls()
        try:
            events = tuple(Rollback(**event) for event in parse_json(file.read_bytes()))
            if not all(type(number) is int for event in events for number in dataclasses.astuple(event)):
                raise ValueError("it has something else than whole numbers")
            return cls(events)
        except (OSError, ValueError, TypeError) as error:
            raise CheckpointError(
                f"{file} cannot be read ({error}): it says which data the run left out; restore it, or name a new --run_dir"
            ) from error

    def write(self, file: Path) -> None:
        """Keep them in `file`.

        Raises:
            CheckpointError: it cannot be written.
        """
        try:
            write_json(file, [dataclasses.asdict(event) for event in self.events])
        except OSError as error:
            raise CheckpointError(f"{file} cannot be written: {error}") from error

    def data_step(self, update: int) -> int:
        """Where the data of an update lie in the order of the data, both counted from 0."""
        place, done = update, 0
        for start, end in sorted((event.skip_from, event.skip_to) for event in self.events):
            start = max(start, done)  # what is left out twice counts once
            if place >= start and end > start:
                place += end - start
            done = max(done, end)
        return place

    def after(self, from_update: int, to_update: int) -> Rollbacks:
        """These and one more, from `from_update` updates to `to_update`: the data between are left out from now on."""
        event = Rollback(from_update, to_update, self.data_step(to_update), self.data_step(from_update - 1) + 1)
        return Rollbacks((*self.events, event))

    def in_a_row(self, to_update: int) -> int:
        """How often the run went back without getting beyond where it had gone wrong, if it now goes to `to_update`."""
        count, reached = 0, to_update
        for event in reversed(self.events):
            if reached >= event.from_update:
                break
            count, reached = count + 1, event.to_update
        return count
