"""The machines that a run is planned for."""

from __future__ import annotations

from dataclasses import dataclass, replace

from dalle_ds.config import Precision
from dalle_ds.config.plain import positive
from dalle_ds.errors import ConfigError

GB = 10**9


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
        positive("cluster", self, "gpus", "gpus_per_node", "memory_gb", "host_memory_gb")
        positive("cluster", self, "fp32_tflops", "fp16_tflops", "bf16_tflops")
        positive("cluster", self, "memory_gb_s", "node_gb_s", "network_gb_s", "host_gb_s", "host_memory_gb_s")
        positive("cluster", self, "utilization", "link_utilization")
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
    """The cluster of a name, of another size where `gpus` is given; fewer than a machine has are one machine's.

    Raises:
        ConfigError: an unknown name.
    """
    if name not in CLUSTERS:
        raise ConfigError(f"--cluster {name} is unknown: give one of {', '.join(CLUSTERS)}")
    cluster = CLUSTERS[name]
    return cluster if gpus is None else replace(cluster, gpus=gpus)
