"""What processes exchange along each axis of the mesh during one update, and how long the update takes.

What the model itself exchanges is measured on it (`model.py`); what ZeRO, pipelines and replicas do follows from shapes.
`Transfer.sent` counts what leaves one process, by the usual algorithms: of k processes, an all-gather of n bytes and a
reduce-scatter of n bytes send n · (k − 1) / k each, an all-reduce twice that. `benchmarks/comm.py` counts what is really
exchanged.

The time is an estimate, whose assumptions are `Cluster`'s: matrix products reach a stated share of the peak, collectives a
stated share of the links, and what shards exchange during the passes is hidden behind a stated share of the computation.
Nothing else is hidden: not what replicas exchange between passes and step, nor what a tensor group waits for in every block.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, fields

import torch

from dalle_ds.config import Precision
from dalle_ds.planning.layout import GB, REPLICA_BUCKET, REUSE_STEPS, Cluster, Layout
from dalle_ds.planning.model import Stage

FUSED_BYTES = 40
"""Read and written for each parameter by the norm and a fused optimizer's step: gradient, weight and two moments."""
CHUNKED_BYTES = 200
"""The same with 16-bit moments, which take passes of their own: their step was measured to take seven times as long."""
AVERAGE_BYTES = 12
"""Read and written for each parameter by the average."""
_PRECISIONS: dict[torch.dtype, Precision] = {torch.bfloat16: "bf16", torch.float16: "fp16"}


@dataclass(frozen=True)
class Transfer:
    """One kind of exchange in one update."""

    axis: str  # processes that differ in this place take part: a mesh's `Axis`
    what: str  # is exchanged
    operation: str  # "all-reduce", "all-gather", "reduce-scatter" or "send"
    processes: int  # that take part
    size: int  # bytes of the whole that is reduced, gathered or sent, all times together
    times: int  # how often in one update; each takes some time whatever its size
    in_passes: bool  # whether it happens beside forward and backward passes, which may hide it, and not after them

    @property
    def sent(self) -> int:
        """Bytes that leave one process."""
        if self.processes == 1:
            return 0
        if self.operation == "send":
            return self.size
        rounds = 2 if self.operation == "all-reduce" else 1
        return rounds * self.size * (self.processes - 1) // self.processes


def traffic(stage: Stage, layout: Layout) -> tuple[Transfer, ...]:
    """All that a process of a stage exchanges in one update."""
    found = [*_shards(stage, layout), *_replicas(stage, layout), *_model(stage), *_pipeline(stage, layout)]
    return tuple(transfer for transfer in found if transfer.processes > 1 and transfer.size)


def compression(stage: Stage) -> float:
    """Share of the compressed parameters' gradients that does not cross: 1 − r (m + 2) / (2 d m) for whole matrices
    (DALL·E Table 1, whose 5 r / 8 d is that of m = 8 shards)."""
    numel = sum(shard.numel for shard in stage.compressed)
    return 1 - sum(shard.factor_numel for shard in stage.compressed) / numel if numel else 0.0


def _shards(stage: Stage, layout: Layout) -> Iterator[Transfer]:
    """ZeRO's gathers and reductions.

    DeepSpeed 0.19 reduces gradients of stages 1 and 2 by all-reduce, whatever `reduce_scatter` says; in stages 2 and 3 after
    every micro-batch. Stage 3 gathers weights for the forward and for the backward pass, and of blocks that are computed again
    (CLIP's, the U-Nets') for that, too; except those that it keeps.
    """
    number, parameters, backwards = layout.weight_bytes, stage.parameters, stage.update.backwards
    whole = number * parameters.count
    buckets = -(-parameters.count // max(1, min(layout.buffers.reduce, parameters.count)))

    def transfer(what: str, operation: str, size: int, times: int, in_passes: bool = False) -> Transfer:
        return Transfer("shard", what, operation, layout.shards, size, times, in_passes)

    if layout.zero_stage < 3:
        times = backwards if layout.zero_stage == 2 else 1
        yield transfer("gradients", "all-reduce", whole * times, buckets * times, layout.zero_stage == 2)
        if layout.zero_stage:
            yield transfer("updated weights", "all-gather", whole, len(parameters.groups))
        return
    large = [parameter for parameter in parameters if parameter.numel > layout.buffers.persistent]
    count = sum(parameter.numel for parameter in large)
    gathered = number * count
    if layout.precision == "fp16":  # in which matrices of blocks cross
        gathered -= 2 * sum(p.numel for p in large if p.block is not None and len(p.shape) > 1)
    kept = min(count, max(layout.buffers.live, layout.buffers.reuse // REUSE_STEPS))
    # What stays from the forward to the backward pass is gathered once.
    freed = 1 - kept / count if count else 0
    passes = stage.update.forwards + backwards * freed
    again = [numel for numel in stage.update.gathered_again if numel > layout.buffers.persistent]
    size, calls = gathered * passes + number * sum(again) * freed, len(large) * passes + len(again) * freed
    yield transfer("weights", "all-gather", int(size), int(calls), True)
    yield transfer("small weights, after the step", "all-gather", whole - number * count, 1)
    yield transfer("gradients", "reduce-scatter", whole * backwards, buckets * backwards, True)


def _replicas(stage: Stage, layout: Layout) -> Iterator[Transfer]:
    """The mean of gradients over replicas, in fp32; of what PowerSGD compresses, the two factors (DALL·E Table 2)."""
    factors = sum(shard.factor_numel for shard in stage.compressed)
    plain = sum(stage.updated) - sum(shard.numel for shard in stage.compressed)
    each = 2 if layout.powersgd.transport == "1-6-9" else 4
    blocks = len({shard.bucket for shard in stage.compressed})
    for what, size, times in (
        ("factors of gradients", each * factors, 2 * blocks),
        ("gradients", 4 * plain, -(-plain // REPLICA_BUCKET)),
    ):
        yield Transfer("replica", what, "all-reduce", layout.replicas, size, times, False)


def _model(stage: Stage) -> Iterator[Transfer]:
    """What the model exchanges: activations and gradients of a tensor group, rows that are compared."""
    work = stage.update.work
    for kind, size in work.exchanged.items():
        is_tensor = kind.axis == "tensor"
        what = "activations" if is_tensor else "rows"
        yield Transfer(kind.axis, what, kind.operation, kind.processes, size, work.exchanges[kind], is_tensor)


def _pipeline(stage: Stage, layout: Layout) -> Iterator[Transfer]:
    """Activations to the next stage, with captions and codes; their gradients to the one before."""
    update, passes = stage.update, layout.accumulation
    for what, size in (("activations", update.sent + update.tokens), ("gradients", update.received)):
        yield Transfer("pipe", what, "send", min(layout.pipe, 2), size * passes, passes, True)


# --- time


@dataclass(frozen=True)
class StepTime:
    """Seconds of an update, by what they are spent on."""

    computation: float  # forward and backward passes of the slowest stage, and what is computed again
    tensor: float  # exchanges of the tensor group
    shard: float  # exchanges of ZeRO that computation does not hide
    pipe: float  # exchanges between stages
    bubble: float  # waiting of stages for each other: (p − 1) / m of the passes of p stages and m micro-batches
    replica: float  # exchanges between replicas, and PowerSGD's arithmetic
    data: float  # exchanges of rows that are compared
    update: float  # optimizer and average

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

    def seconds(axis: str, stride: int, in_passes: bool | None = None) -> float:
        """Of transfers between processes whose ranks lie `stride` apart; None takes those in passes and those after them."""
        found = 0.0
        for transfer in of_slowest:
            if transfer.axis == axis and in_passes in (None, transfer.in_passes):
                rate = cluster.link(stride, layout.pipe if axis == "pipe" else transfer.processes)
                found += transfer.sent / rate + transfer.times * cluster.collective_us * 1e-6
        return found

    of_stage, of_replica = layout.shards * layout.tensor, layout.pipe * layout.shards * layout.tensor
    tensor, pipe = seconds("tensor", 1), seconds("pipe", of_stage)
    hidden = cluster.overlap * computation if layout.overlap else 0.0
    return StepTime(
        computation=computation,
        tensor=tensor,
        shard=max(0.0, seconds("shard", layout.tensor, True) - hidden) + seconds("shard", layout.tensor, False),
        pipe=pipe,
        bubble=(computation + tensor + pipe) * (layout.pipe - 1) / layout.accumulation,
        replica=seconds("replica", of_replica) + max(_compression(stage, cluster) for stage in stages),
        data=seconds("data", layout.tensor),
        update=max(_update(stage, layout, cluster) for stage in stages),
    )


def _computation(stage: Stage, cluster: Cluster) -> float:
    flops = stage.update.work.flops.items()
    return sum(count / cluster.flops(_PRECISIONS.get(dtype, "fp32")) for dtype, count in flops) / cluster.utilization


def _compression(stage: Stage, cluster: Cluster) -> float:
    """PowerSGD's three products with every shard, in fp32, and its passes over gradients and errors."""
    operations = sum(3 * 2 * shard.numel * shard.rank for shard in stage.compressed)
    # Householder's reflections, and the columns made from them.
    operations += sum(4 * shard.parts * shard.short * shard.rank**2 for shard in stage.compressed)
    passes = sum(6 * 4 * shard.numel for shard in stage.compressed)
    return operations / (cluster.flops("fp32") * cluster.utilization) + passes / (cluster.memory_gb_s * GB)


def _update(stage: Stage, layout: Layout, cluster: Cluster) -> float:
    count = sum(stage.updated)
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
