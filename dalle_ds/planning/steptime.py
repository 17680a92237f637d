"""How long an update takes, projected from counted operations and bytes and from the rates of a cluster.

An estimate, whose assumptions are `Cluster`'s: matrix products reach a stated share of the peak, collectives a stated share of
the links, and what shards exchange during the passes is hidden behind a stated share of the computation. Nothing else is
hidden: not what replicas exchange between passes and step, nor what a tensor group waits for in every block.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, fields

import torch

from dalle_ds.config import Precision
from dalle_ds.planning.cluster import GB, Cluster
from dalle_ds.planning.layout import Layout
from dalle_ds.planning.model import Stage, compressed_shards
from dalle_ds.planning.traffic import Transfer, owned

FUSED_BYTES = 40
"""Read and written for each parameter by the norm and a fused optimizer's step: gradient, weight and two moments."""
CHUNKED_BYTES = 200
"""The same with 16-bit moments, which take passes of their own: their step was measured to take seven times as long."""
AVERAGE_BYTES = 12
"""Read and written for each parameter by the average."""
_PRECISIONS: dict[torch.dtype, Precision] = {torch.bfloat16: "bf16", torch.float16: "fp16"}


@dataclass(frozen=True)
class StepTime:
    """Seconds of an update, by what they are spent on."""

    computation: float
    """Forward and backward passes of the slowest stage, and what is computed again."""
    tensor: float
    """Exchanges of the tensor group."""
    shard: float
    """Exchanges of ZeRO that computation does not hide."""
    pipe: float
    """Exchanges between stages."""
    bubble: float
    """Waiting of stages for each other: (p − 1) / m of the passes of p stages and m micro-batches."""
    replica: float
    """Exchanges between replicas, and PowerSGD's arithmetic."""
    data: float
    """Exchanges of rows that are compared."""
    update: float
    """Optimizer and average."""

    @property
    def total(self) -> float:
        """All together."""
        return sum(getattr(self, entry.name) for entry in fields(self))


def step_time(
    stages: Sequence[Stage], transfers: Sequence[Sequence[Transfer]], layout: Layout, cluster: Cluster
) -> StepTime:
    """The time of an update, whose pace the slowest stage sets.

    Args:
        transfers: `traffic` of each stage.
    """
    computations = [_computation(stage, cluster) for stage in stages]
    computation = max(computations)
    of_slowest = transfers[computations.index(computation)]
    times = {
        axis: _exchange(of_slowest, axis, layout, cluster) for axis in ("tensor", "pipe", "shard", "replica", "data")
    }
    in_passes, afterwards = times["shard"]
    hidden = cluster.overlap * computation if layout.overlap else 0.0
    tensor, pipe = sum(times["tensor"]), sum(times["pipe"])
    return StepTime(
        computation=computation,
        tensor=tensor,
        shard=max(0.0, in_passes - hidden) + afterwards,
        pipe=pipe,
        bubble=(computation + tensor + pipe) * (layout.pipe - 1) / layout.accumulation,
        replica=sum(times["replica"]) + max(_compression(stage, layout, cluster) for stage in stages),
        data=sum(times["data"]),
        update=max(_update(stage, layout, cluster) for stage in stages),
    )


def _computation(stage: Stage, cluster: Cluster) -> float:
    flops = stage.update.work.flops.items()
    return sum(count / cluster.flops(_PRECISIONS.get(dtype, "fp32")) for dtype, count in flops) / cluster.utilization


def _exchange(transfers: Sequence[Transfer], axis: str, layout: Layout, cluster: Cluster) -> tuple[float, float]:
    """Seconds of what can be hidden behind the passes, and of what comes after them."""
    strides = {"tensor": 1, "shard": layout.tensor, "data": layout.tensor, "pipe": layout.shards * layout.tensor}
    stride = strides.get(axis, layout.pipe * layout.shards * layout.tensor)
    seconds = {True: 0.0, False: 0.0}
    for transfer in transfers:
        if transfer.axis == axis:
            size = layout.pipe if axis == "pipe" else transfer.processes
            rate = cluster.link(stride, size)
            seconds[transfer.in_passes] += transfer.sent / rate + transfer.times * cluster.collective_us * 1e-6
    return seconds[True], seconds[False]


def _compression(stage: Stage, layout: Layout, cluster: Cluster) -> float:
    """PowerSGD's three products with every shard, in fp32, and its passes over gradients and errors."""
    shards = compressed_shards(stage.parameters, layout)
    operations = sum(3 * 2 * shard.numel * shard.rank for shard in shards)
    # Householder's reflections, and the columns made from them.
    operations += sum(4 * shard.parts * shard.short * shard.rank**2 for shard in shards)
    passes = sum(6 * 4 * shard.numel for shard in shards)
    return operations / (cluster.flops("fp32") * cluster.utilization) + passes / (cluster.memory_gb_s * GB)


def _update(stage: Stage, layout: Layout, cluster: Cluster) -> float:
    count = owned(stage, layout)
    each = CHUNKED_BYTES if layout.moments == "16-bit" else FUSED_BYTES
    rate = (cluster.host_memory_gb_s if layout.offload_optimizer else cluster.memory_gb_s) * GB
    seconds = count * each / rate
    if layout.offload_optimizer:
        # Gradients go to main memory in fp32, weights come back.
        seconds += count * (4 + layout.weight_bytes) / (cluster.host_gb_s * GB)
    if layout.average == "same":
        seconds += count * AVERAGE_BYTES / layout.average_every / rate
    elif layout.average == "cpu" and not layout.offload_optimizer:
        seconds += count * 4 / layout.average_every / (cluster.host_gb_s * GB)
    return seconds
