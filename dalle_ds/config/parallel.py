"""How the processes of a run divide its work, and what crosses between machines."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from dalle_ds.config.plain import at_least, positive
from dalle_ds.errors import ConfigError


@dataclass(frozen=True)
class ParallelConfig:
    """Degrees of parallelism. What they leave over divides the data, and under ZeRO the optimizer's state, gradients and
    weights: processes / (replicas · pipe · tensor)."""

    replicas: int = 1
    """Groups of processes that each hold everything, such as machines; within one, ZeRO divides it. Gradients cross between
    them once per update (DALL·E §2.5)."""
    tensor: int = 1
    """Processes that divide every layer's matrices and vocabulary (tensor parallelism): best those of one machine."""
    pipe: int = 1
    """Pipeline stages, each a run of consecutive layers of equal cost (pipeline parallelism); more than 1 needs ZeRO-1."""
    sequence: bool = False
    """Whether `tensor` processes also divide the positions of the residual stream, to save activations."""

    def __post_init__(self) -> None:
        positive("parallel", self, "replicas", "tensor", "pipe")
        if self.pipe > 1 and self.replicas > 1:
            raise ConfigError(
                f"parallel.pipe={self.pipe} and parallel.replicas={self.replicas}: a pipeline's processes divide data in one "
                "way only; set one of them to 1"
            )
        if self.sequence and self.tensor == 1:
            raise ConfigError(
                "parallel.sequence divides positions among parallel.tensor processes, which is 1: raise it"
            )


@dataclass(frozen=True)
class PowerSGDConfig:
    """Compression of the gradients that cross between replicas (DALL·E §2.5, App. E)."""

    enabled: bool = False
    """Whether weight matrices of residual blocks cross as two factors of low rank instead of as they are."""
    rank: int | None = None
    """Rank r of a whole matrix; of m processes that divide a replica, each compresses its shard to rank r / m. None takes
    that of the paper's Table 1 for the model's width."""
    storage: Literal["fp32", "1-6-9"] = "fp32"
    """Format of the error buffers: 4 or 2 bytes per compressed parameter."""
    transport: Literal["fp32", "1-6-9"] = "fp32"
    """Format in which the factors cross: 1-6-9 takes half the bytes."""
    epsilon: float = 1e-6
    """Added to the diagonal of a factor, once its greatest element is 1, before its columns are made orthonormal."""
    p_scale_log2: int = -8
    """The first factor crosses as 1-6-9 multiplied by 2^this. At -8 that format holds from 2^-50 to 2^12, where factors were
    2^3 at most in training of small models, and larger ones have smaller gradients."""
    q_scale_log2: int = -8
    """The same of the second factor."""

    def __post_init__(self) -> None:
        positive("powersgd", self, "epsilon")
        if self.rank is not None and self.rank < 1:
            raise ConfigError(f"powersgd.rank must be at least 1, found {self.rank}; None takes the paper's rule")
        for name in ("p_scale_log2", "q_scale_log2"):
            if not -60 <= getattr(self, name) <= 60:
                raise ConfigError(f"powersgd.{name} must lie in [-60, 60], found {getattr(self, name)}")


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
    """Ratio of the slowest process's step time to the median's from which it is named."""

    def __post_init__(self) -> None:
        positive("watch", self, "hang_minutes", "collective_minutes", "heartbeat_seconds")
        at_least(0, "watch", self, "straggler_every")
        if self.straggler_ratio <= 1:
            raise ConfigError(f"watch.straggler_ratio must be greater than 1, found {self.straggler_ratio}")
