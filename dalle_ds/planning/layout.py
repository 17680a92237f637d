"""What a run is planned for: how it is laid out, and the machines; beside its model, all that figures depend on."""

from __future__ import annotations

from dataclasses import dataclass, fields, replace
from typing import Any, Literal

from dalle_ds.config import Checkpointing, PowerSGDConfig, Precision, Run
from dalle_ds.config.deepspeed import EngineConfig
from dalle_ds.config.plain import positive
from dalle_ds.errors import ConfigError

STAGE_0_BUCKET = 500_000_000
"""Elements of gradients that DeepSpeed reduces at a time where ZeRO does not (a constant of its engine)."""
REUSE_STEPS = 4
"""How often DeepSpeed counts a weight on the way to its next use, as measured, where it compares that with
`stage3_max_reuse_distance`."""
REPLICA_BUCKET = 2**24
"""Elements of uncompressed gradients that cross between replicas at a time (`BUCKET` of `training/replicas.py`)."""
GB = 10**9


@dataclass(frozen=True)
class Buffers:
    """DeepSpeed's settings of what it holds for a time, in elements; the defaults are its own."""

    reduce: int = 500_000_000  # `reduce_bucket_size`: gradients that are reduced together
    prefetch: int = 50_000_000  # `stage3_prefetch_bucket_size`: weights that are gathered ahead
    live: int = 1_000_000_000  # `stage3_max_live_parameters`: gathered weights up to which more are gathered ahead
    reuse: int = 1_000_000_000  # `stage3_max_reuse_distance`: weights used again within as many others stay gathered
    persistent: int = 100_000  # `stage3_param_persistence_threshold`: up to this size, always gathered


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
    offload_optimizer: bool = False  # whether optimizer state and the weights that it updates are in main memory
    offload_weights: bool = False  # whether the shards of the 16-bit weights are, too
    saves_beside: bool = False  # whether training goes on while a checkpoint is written, from a copy in main memory
    overlap: bool = False  # whether shards exchange data while they compute
    accumulate_bytes: int = 4  # of a gradient that is summed over micro-batches
    master_bytes: int = 4  # of a weight that is updated
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
        """The layout of a run on so many processes, which its degrees divide.

        Args:
            engine: from `resolve`.

        Raises:
            ConfigError: a setting of the JSON cannot be planned with.
        """
        degrees = run.parallel
        zero = engine.deepspeed["zero_optimization"]
        offloaded = {
            name
            for name in ("offload_optimizer", "offload_param")
            if (zero.get(name) or {}).get("device", "none") != "none"
        }
        own_dtype = engine.deepspeed.get("data_types", {}).get("grad_accum_dtype")
        return cls(
            replicas=degrees.replicas,
            pipe=degrees.pipe,
            shards=processes // (degrees.replicas * degrees.pipe * degrees.tensor),
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
            offload_optimizer="offload_optimizer" in offloaded,
            offload_weights=engine.zero_stage == 3 and "offload_param" in offloaded,
            saves_beside=run.report.background_saves,
            overlap=bool(zero.get("overlap_comm", engine.zero_stage == 3)) and degrees.pipe == 1,
            accumulate_bytes=2 if own_dtype in ("bf16", "fp16") else 4,
            master_bytes=2 if engine.deepspeed["bf16"].get("bf16_master_weights_and_grads") else 4,
            buffers=_buffers(zero),
        )


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
        if field is not None:
            if isinstance(value, bool) or not isinstance(value, (int, float)) or value < 0:
                raise ConfigError(f'"zero_optimization.{name}" in the DeepSpeed JSON must be a number, found {value!r}')
            found[field] = int(value)
    return Buffers(**found)


@dataclass(frozen=True)
class Cluster:
    """GPUs, or processes on CPUs, and what lies between them. 1 GB is 10⁹ bytes; rates are per GPU and direction."""

    gpus: int = 8
    """GPUs, or processes on CPUs."""
    gpus_per_node: int = 8
    """Of one machine."""
    memory_gb: float = 85.0
    """Memory of one GPU."""
    reserved_gb: float = 2.0
    """Of it, what holds no tensors: the CUDA context, communicators, what the allocator cannot use."""
    host_memory_gb: float = 1000.0
    """Main memory of one machine."""
    fp32_tflops: float = 67.0
    """Peak of matrix products in fp32."""
    fp16_tflops: float = 989.0
    """Peak of matrix products in fp16."""
    bf16_tflops: float | None = 989.0
    """Peak of matrix products in bf16; None where there are no units for it."""
    memory_gb_s: float = 3350.0
    """Rate at which a GPU reads its memory."""
    node_gb_s: float = 450.0
    """Rate between the GPUs of a machine."""
    network_gb_s: float = 50.0
    """One GPU's share of its machine's network."""
    host_gb_s: float = 50.0
    """Rate between a GPU and main memory."""
    host_memory_gb_s: float = 25.0
    """Rate at which one GPU's share of the processors reads main memory."""
    collective_us: float = 30.0
    """Time that a collective takes whatever its size."""
    utilization: float = 0.5
    """Assumed: share of the peak that matrix products reach, all else that a block computes included."""
    link_utilization: float = 0.8
    """Assumed: share of the rates above that collectives reach."""
    overlap: float = 0.8
    """Assumed: share of the computation behind which DeepSpeed hides what shards exchange, where it can."""

    def __post_init__(self) -> None:
        may_be_zero = ("reserved_gb", "collective_us", "overlap")
        positive("cluster", self, *(entry.name for entry in fields(self) if entry.name not in may_be_zero))
        if not 0 <= self.reserved_gb < self.memory_gb:
            raise ConfigError(
                f"cluster.reserved_gb={self.reserved_gb} must lie in [0, memory_gb={self.memory_gb}): lower it"
            )
        for name in ("utilization", "link_utilization", "overlap"):
            if not 0 <= getattr(self, name) <= 1:
                raise ConfigError(f"cluster.{name} must lie in [0, 1], found {getattr(self, name)}")
        if self.collective_us < 0:
            raise ConfigError(f"cluster.collective_us must not be negative, found {self.collective_us}")

    @property
    def memory(self) -> int:
        """Bytes of one GPU that tensors may take."""
        return int((self.memory_gb - self.reserved_gb) * GB)

    @property
    def host_memory(self) -> int:
        """Bytes of main memory that one process may take."""
        return int(self.host_memory_gb * GB / min(self.gpus, self.gpus_per_node))

    def flops(self, precision: Precision) -> float:
        """Peak FLOP/s of one GPU's matrix products.

        Raises:
            ConfigError: it has no units for this precision.
        """
        peak = {"fp32": self.fp32_tflops, "fp16": self.fp16_tflops, "bf16": self.bf16_tflops}[precision]
        if peak is None:
            raise ConfigError(
                "the cluster's GPUs have no units for bf16: give a DeepSpeed JSON for fp16, such as "
                "ds_configs/zero3_fp16.json, or state their rate (cluster.bf16_tflops)"
            )
        return peak * 1e12

    def link(self, stride: int, size: int) -> float:
        """Bytes per second that each of `size` processes, whose ranks lie `stride` apart, exchanges with the others.

        Those of one machine share its network, and as many pieces cross it side by side.
        """
        if stride * size <= self.gpus_per_node:
            rate = self.node_gb_s
        else:
            here = max(1, self.gpus_per_node // stride)
            rate = min(self.node_gb_s, self.network_gb_s * min(here, size))
        return rate * self.link_utilization * GB


# Memory is what the driver reports. Links are per direction. The network of the V100 machines, 100 Gb/s for 8 GPUs, is
# assumed: the paper does not give its own.
CLUSTERS: dict[str, Cluster] = {
    "v100-16gb": Cluster(
        memory_gb=16.9, reserved_gb=1.0, host_memory_gb=500.0, fp32_tflops=15.7, fp16_tflops=125.0, bf16_tflops=None,
        memory_gb_s=900.0, node_gb_s=150.0, network_gb_s=1.56, host_gb_s=12.0, host_memory_gb_s=15.0,
    ),
    "a100-80gb": Cluster(
        memory_gb=85.0, fp32_tflops=19.5, fp16_tflops=312.0, bf16_tflops=312.0, memory_gb_s=2039.0, node_gb_s=300.0,
        network_gb_s=25.0, host_gb_s=25.0,
    ),
    "h100-80gb": Cluster(host_memory_gb=2000.0),
    "h200-141gb": Cluster(memory_gb=150.0, host_memory_gb=2000.0, memory_gb_s=4800.0),
    # Two processes of one core each, as the demo runs; the rates are those of docs/performance.md.
    "cpu": Cluster(
        gpus=2, gpus_per_node=2, memory_gb=4.0, reserved_gb=0.5, host_memory_gb=8.0, fp32_tflops=0.08,
        fp16_tflops=0.00015, bf16_tflops=0.2, memory_gb_s=15.0, node_gb_s=2.0, network_gb_s=0.1, host_gb_s=15.0,
        host_memory_gb_s=15.0, collective_us=200.0, overlap=0.0,
    ),
}  # fmt: skip


def named_cluster(name: str, gpus: int | None = None) -> Cluster:
    """The cluster of a name, of another size where `gpus` is given; fewer than a machine has are one machine's."""
    cluster = CLUSTERS[name]
    return cluster if gpus is None else replace(cluster, gpus=gpus)
