"""What a run does about processes that die, hang or are slow."""

from __future__ import annotations

from dataclasses import dataclass

from dalle_ds.config.checks import positive
from dalle_ds.errors import ConfigError


@dataclass(frozen=True)
class WatchConfig:
    """What a run does about processes that hang or are slow; one that dies ends the run in any case. Changes no weight."""

    hang_minutes: float | None = 10.0
    """Minutes without a sign of progress from a process after which all write their stacks to RUN_DIR/logs/stacks and the run
    ends, with the status that has it started again; None waits for ever."""
    collective_minutes: float = 15.0
    """Minutes that processes wait for each other in one operation, from the first update on, before the run ends so: more than
    `hang_minutes`, which tells more of what hangs."""
    heartbeat_seconds: float = 10.0
    """Seconds between two writings of where each process is, to RUN_DIR/logs/heartbeats."""
    straggler_every: int = 100
    """Updates between comparisons of how fast the processes are; 0 makes none."""
    straggler_ratio: float = 1.5
    """How many times the step of a process at the median the slowest one's takes before it is named."""

    def __post_init__(self) -> None:
        positive("watch", self, "hang_minutes", "collective_minutes", "heartbeat_seconds")
        if self.straggler_every < 0:
            raise ConfigError(f"watch.straggler_every must not be negative, found {self.straggler_every}")
        if self.straggler_ratio <= 1:
            raise ConfigError(f"watch.straggler_ratio must be greater than 1, found {self.straggler_ratio}")
