"""How a run is laid out: all that its memory, its traffic and its time depend on, besides the model and the machines."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Literal

from dalle_ds.config import Checkpointing, ParallelConfig, PowerSGDConfig, Precision, Run
from dalle_ds.config.deepspeed import EngineConfig
from dalle_ds.errors import ConfigError

STAGE_0_BUCKET = 500_000_000
"""Elements of gradients that DeepSpeed reduces at a time where ZeRO does not (a constant of its engine)."""
REUSE_STEPS = 4
"""How often DeepSpeed counts a weight on the way to its next use, as measured, where it compares that with
`stage3_max_reuse_distance`."""
REPLICA_BUCKET = 2**24
"""Elements of uncompressed gradients that cross between replicas at a time (`BUCKET` of `training/replicas.py`)."""


@dataclass(frozen=True)
class Buffers:
    """DeepSpeed's settings of what it holds for a time, in elements; the defaults are its own."""

    reduce: int = 500_000_000
    """`reduce_bucket_size`: gradients that are reduced together."""
    prefetch: int = 50_000_000
    """`stage3_prefetch_bucket_size`: weights that are gathered ahead."""
    live: int = 1_000_000_000
    """`stage3_max_live_parameters`: gathered weights up to which more are gathered ahead."""
    reuse: int = 1_000_000_000
    """`stage3_max_reuse_distance`: weights that are used again within as many others stay gathered."""
    persistent: int = 100_000
    """`stage3_param_persistence_threshold`: parameters up to this size are always gathered."""


@dataclass(frozen=True)
class Layout:
    """Degrees and settings of one run."""

    replicas: int = 1
    pipe: int = 1
    shards: int = 1
    tensor: int = 1
    sequence: bool = False
    precision: Precision = "fp32"
    zero_stage: int = 0
    micro_batch: int = 1
    accumulation: int = 1
    checkpointing: Checkpointing = "none"
    moments: Literal["fp32", "16-bit"] = "fp32"
    average: Literal["none", "same", "cpu"] = "none"
    average_every: int = 1
    powersgd: PowerSGDConfig = PowerSGDConfig()  # noqa: RUF009
    offload_optimizer: bool = False
    """Whether optimizer state and the weights that it updates are kept in main memory."""
    offload_weights: bool = False
    """Whether the shards of the 16-bit weights are, too."""
    saves_beside: bool = False
    """Whether training goes on while a checkpoint is written, from a copy in main memory."""
    overlap: bool = False
    """Whether shards exchange data while they compute."""
    accumulate_bytes: int = 4
    """Of a gradient that is summed over micro-batches."""
    master_bytes: int = 4
    """Of a weight that is updated."""
    buffers: Buffers = Buffers()

    @property
    def processes(self) -> int:
        """All together."""
        return self.replicas * self.pipe * self.shards * self.tensor

    @property
    def readers(self) -> int:
        """Processes that see data of their own."""
        return self.replicas * self.shards

    @property
    def batch_size(self) -> int:
        """Samples of one update."""
        return self.readers * self.micro_batch * self.accumulation

    @property
    def weight_bytes(self) -> int:
        """Of a weight as the model has it: fp16 casts fp32 weights block by block (docs/precision.md)."""
        return 2 if self.precision == "bf16" else 4

    @classmethod
    def of(cls, run: Run, engine: EngineConfig, processes: int) -> Layout:
        """The layout of a run on so many processes.

        Args:
            engine: from `resolve`.

        Raises:
            ConfigError: the degrees do not divide the processes, or a setting of the JSON cannot be planned with.
        """
        degrees = run.parallel
        zero = engine.deepspeed["zero_optimization"]
        bf16 = engine.deepspeed.get("bf16", {})
        own_dtype = engine.deepspeed.get("data_types", {}).get("grad_accum_dtype")
        return cls(
            replicas=degrees.replicas,
            pipe=degrees.pipe,
            shards=shards_of(degrees, processes),
            tensor=degrees.tensor,
            sequence=degrees.sequence,
            precision=engine.precision,
            zero_stage=engine.zero_stage,
            micro_batch=engine.micro_batch,
            accumulation=engine.accumulation,
            checkpointing=getattr(run.train, "activation_checkpointing", "none"),
            moments=run.optim.moments,
            average="none" if run.train.average_decay is None else run.train.average_device,
            average_every=run.train.average_every,
            powersgd=run.powersgd,
            offload_optimizer=_is_offloaded(zero, "offload_optimizer"),
            offload_weights=engine.zero_stage == 3 and _is_offloaded(zero, "offload_param"),
            saves_beside=run.report.background_saves,
            overlap=bool(zero.get("overlap_comm", engine.zero_stage == 3)) and degrees.pipe == 1,
            accumulate_bytes=2 if own_dtype in ("bf16", "fp16") else 4,
            master_bytes=2 if bf16.get("bf16_master_weights_and_grads") else 4,
            buffers=_buffers(zero),
        )


def shards_of(degrees: ParallelConfig, processes: int) -> int:
    """Processes that the degrees leave over.

    Raises:
        ConfigError: they do not divide the processes.
    """
    taken = degrees.replicas * degrees.pipe * degrees.tensor
    if processes % taken:
        raise ConfigError(
            f"parallel.replicas={degrees.replicas} × parallel.pipe={degrees.pipe} × parallel.tensor={degrees.tensor} = "
            f"{taken} does not divide {processes} processes: plan for a multiple of {taken}, or lower a degree"
        )
    return processes // taken


def _is_offloaded(zero: dict[str, Any], name: str) -> bool:
    return (zero.get(name) or {}).get("device", "none") != "none"


def _buffers(zero: dict[str, Any]) -> Buffers:
    """DeepSpeed takes each of the stage 3 settings by two names, and numbers as 5e8."""
    names = {
        "reduce_bucket_size": "reduce",
        "prefetch_bucket_size": "prefetch",
        "max_live_parameters": "live",
        "max_reuse_distance": "reuse",
        "param_persistence_threshold": "persistent",
    }
    found: dict[str, int] = {}
    for name, value in zero.items():
        field = names.get(name.removeprefix("stage3_"))
        if field is None:
            continue
        if isinstance(value, bool) or not isinstance(value, (int, float)) or value < 0:
            raise ConfigError(f'"zero_optimization.{name}" in the DeepSpeed JSON must be a number, found {value!r}')
        found[field] = int(value)
    return Buffers(**found)
