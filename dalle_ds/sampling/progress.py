"""Progress of drawing: a bar on a terminal, a line now and then elsewhere."""

from __future__ import annotations

import time
from types import TracebackType

from rich.console import Console
from rich.progress import BarColumn, TextColumn, TimeRemainingColumn
from rich.progress import Progress as Bar

from dalle_ds.sampling.codes import Progress

SECONDS_BETWEEN_LINES = 10.0
"""How often drawing whose output is no terminal prints a line."""


class DrawingProgress:
    """Counts codes as they are drawn; to be passed as `on_row`.

    Args:
        grid: codes in a row of an image.
        pictures: how many are to be drawn; should there be more, the total grows with them.
        given_rows: rows of each that are given and not drawn.
        enabled: False says nothing, for processes beside the first.
    """

    def __init__(
        self,
        grid: int,
        pictures: int,
        *,
        given_rows: int = 0,
        enabled: bool = True,
        console: Console | None = None,
    ) -> None:
        self.enabled = enabled
        self._grid = grid
        self._codes_each = grid * (grid - given_rows)
        self._total = pictures
        self._console = console or Console(soft_wrap=True)
        self._codes = self._pictures = 0
        self._started = self._printed = time.monotonic()
        self._bar: Bar | None = None
        if enabled and self._console.is_terminal:
            self._bar = Bar(
                TextColumn("{task.description}"), BarColumn(), TextColumn("{task.fields[status]}"), TimeRemainingColumn(),
                console=self._console, transient=True,
            )  # fmt: skip
            self._task = self._bar.add_task("drawing", total=self._expected, status="")
            self._bar.start()

    @property
    def _expected(self) -> int:
        return self._total * self._codes_each

    def __call__(self, progress: Progress) -> None:
        """Take note of one more row of some images."""
        if not self.enabled:
            return
        self._total = max(self._total, self._pictures + len(progress.images))
        self._codes += len(progress.images) * self._grid
        if progress.codes.shape[1] == self._grid**2:
            self._pictures += len(progress.images)
        now = time.monotonic()
        rate = self._codes / max(now - self._started, 1e-9)
        status = f"{self._pictures}/{self._total} images, {rate:,.0f} codes/s"
        if self._bar is not None:
            self._bar.update(self._task, total=self._expected, completed=self._codes, status=status)
        elif now - self._printed >= SECONDS_BETWEEN_LINES:
            self._printed = now
            left = max(0, self._expected - self._codes) / rate
            self._console.print(f"drawing: {status}, {left:.0f} s left", highlight=False)

    def __enter__(self) -> DrawingProgress:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if self._bar is not None:
            self._bar.stop()
