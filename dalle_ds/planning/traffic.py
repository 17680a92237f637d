"""What processes exchange along each axis of the mesh during one update, predicted from shapes alone.

`Traffic.sent` counts what leaves one process, by the usual algorithms: of k processes, an all-gather of n bytes and a
reduce-scatter of n bytes send n · (k − 1) / k each, an all-reduce twice that. `benchmarks/comm.py` counts what is really
exchanged.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

from dalle_ds.config import DalleConfig
from dalle_ds.planning.activations import STREAM
from dalle_ds.planning.layout import REPLICA_BUCKET, Layout
from dalle_ds.planning.memory import REUSE_STEPS
from dalle_ds.planning.parameters import ParameterSet, updated_by_group
from dalle_ds.planning.shards import compressed_shards
from dalle_ds.planning.stages import Stage

Axis = Literal["tensor", "pipe", "shard", "replica"]
Operation = Literal["all-reduce", "all-gather", "reduce-scatter", "send"]


@dataclass(frozen=True)
class Transfer:
    """One kind of exchange in one update."""

    axis: Axis
    """Processes that differ in this place take part."""
    what: str
    """What is exchanged."""
    operation: Operation
    """How."""
    processes: int
    """That take part."""
    size: int
    """Bytes of the whole that is reduced, gathered or sent, all times together."""
    times: int
    """How often in one update; each takes some time whatever its size."""
    in_passes: bool
    """Whether it happens beside forward and backward passes, which may hide it, and not between them and the step."""

    @property
    def sent(self) -> int:
        """Bytes that leave one process."""
        if self.processes == 1:
            return 0
        if self.operation == "send":
            return self.size
        rounds = 2 if self.operation == "all-reduce" else 1
        return rounds * self.size * (self.processes - 1) // self.processes


def traffic(stage: Stage, config: DalleConfig | None, layout: Layout) -> tuple[Transfer, ...]:
    """All that a process of a stage exchanges in one update.

    Args:
        config: of a transformer; None for a model that is not divided by tensor or pipe.
    """
    found = [*shard_traffic(stage.parameters, layout), *replica_traffic(stage, layout)]
    if config is not None:
        found += [*tensor_traffic(stage, config, layout), *pipe_traffic(stage, config, layout)]
    return tuple(transfer for transfer in found if transfer.processes > 1 and transfer.size)


def sent_along(transfers: Sequence[Transfer], axis: Axis) -> int:
    """Bytes that leave one process along an axis."""
    return sum(transfer.sent for transfer in transfers if transfer.axis == axis)


def shard_traffic(parameters: ParameterSet, layout: Layout) -> list[Transfer]:
    """ZeRO's gathers and reductions.

    DeepSpeed 0.19 reduces gradients of stages 1 and 2 by all-reduce, whatever `reduce_scatter` says; in stages 2 and 3 after
    every micro-batch. Stage 3 gathers weights for the forward and for the backward pass, except those that it keeps.
    """
    number, count, passes = layout.weight_bytes, parameters.count, layout.accumulation
    shards, groups = layout.shards, len(parameters.groups)

    def transfer(what: str, operation: Operation, size: int, times: int, in_passes: bool) -> Transfer:
        return Transfer("shard", what, operation, shards, size, times, in_passes)

    buckets = -(-count // max(1, min(layout.buffers.reduce, count)))
    if layout.zero_stage < 2:
        reduced = transfer("gradients", "all-reduce", number * count, buckets, False)
        if layout.zero_stage == 0:
            return [reduced]
        return [reduced, transfer("updated weights", "all-gather", number * count, groups, False)]
    if layout.zero_stage == 2:
        return [
            transfer("gradients", "all-reduce", number * count * passes, buckets * passes, True),
            transfer("updated weights", "all-gather", number * count, groups, False),
        ]
    persistent, gathered = _gathered(parameters, layout)
    modules = parameters.larger_than(layout.buffers.persistent)
    large = sum(parameter.numel for parameter in modules)
    kept = min(large, max(layout.buffers.live, layout.buffers.reuse // REUSE_STEPS))
    # What stays from the forward to the backward pass is gathered once.
    share = 2 - kept / large if large else 0.0
    return [
        transfer("weights", "all-gather", int(gathered * share) * passes, int(len(modules) * share) * passes, True),
        transfer("small weights, after the step", "all-gather", persistent, 1, False),
        transfer("gradients", "reduce-scatter", number * count * passes, buckets * passes, True),
    ]


def _gathered(parameters: ParameterSet, layout: Layout) -> tuple[int, int]:
    """Bytes of the weights that are always gathered, and of those that are gathered when they are used.

    Matrices of blocks that compute in fp16 cross in fp16.
    """
    large = parameters.larger_than(layout.buffers.persistent)
    gathered = layout.weight_bytes * sum(parameter.numel for parameter in large)
    if layout.precision == "fp16":
        gathered -= 2 * sum(p.numel for p in large if p.block is not None and len(p.shape) > 1)
    return layout.weight_bytes * (parameters.count - sum(parameter.numel for parameter in large)), gathered


def replica_traffic(stage: Stage, layout: Layout) -> list[Transfer]:
    """The mean of gradients over replicas, in fp32; of what PowerSGD compresses, the two factors (DALL·E Table 2)."""
    shards = compressed_shards(stage.parameters, layout, stage.width)
    factors = sum(shard.factor_numel for shard in shards)
    plain = owned(stage.parameters, layout) - sum(shard.numel for shard in shards)
    each = 2 if layout.powersgd.transport == "1-6-9" else 4
    blocks = len({shard.bucket for shard in shards})
    return [
        Transfer("replica", "factors of gradients", "all-reduce", layout.replicas, each * factors, 2 * blocks, False),
        Transfer("replica", "gradients", "all-reduce", layout.replicas, 4 * plain, -(-plain // REPLICA_BUCKET), False),
    ]


def owned(parameters: ParameterSet, layout: Layout) -> int:
    """Elements of the gradients that one process of a replica has."""
    return sum(updated_by_group(parameters, layout.zero_stage, layout.shards))


def compression(stage: Stage, layout: Layout) -> float:
    """Share of the compressed parameters' gradients that does not cross: 1 − r (m + 2) / (2 d m) for whole matrices
    (DALL·E Table 1, whose 5 r / 8 d is that of m = 8 shards)."""
    shards = compressed_shards(stage.parameters, layout, stage.width)
    numel = sum(shard.numel for shard in shards)
    return 1 - sum(shard.factor_numel for shard in shards) / numel if numel else 0.0


def tensor_traffic(stage: Stage, config: DalleConfig, layout: Layout) -> list[Transfer]:
    """What a tensor group exchanges at the entry and the exit of each residual block, embedding and head.

    The table is that of `dalle_ds/parallel/tensor.py`. Inside branches numbers are those of the branch, outside fp32.
    """
    parts, passes = layout.tensor, layout.accumulation
    positions = layout.micro_batch * config.total_len
    inside = layout.branch_bytes * config.width * positions
    outside = STREAM * config.width * positions
    blocks = len(stage.blocks)

    def transfer(what: str, operation: Operation, size: int, times: int) -> Transfer:
        return Transfer("tensor", what, operation, parts, size * times * passes, times * passes, True)

    found = []
    if layout.sequence:
        again = 0 if layout.checkpointing == "none" else 1
        found += [
            transfer("entries of blocks", "all-gather", inside, (1 + again) * blocks),
            transfer("entries' gradients", "reduce-scatter", inside, blocks),
            transfer("exits of blocks", "reduce-scatter", inside, blocks),
            transfer("exits' gradients", "all-gather", inside, blocks),
            # Gains and biases of normalizations, and the bias after the exit.
            transfer("gradients of vectors", "all-reduce", layout.weight_bytes * config.width, 3 * blocks),
        ]
    else:
        found += [
            transfer("exits of blocks", "all-reduce", inside, blocks),
            transfer("entries' gradients", "all-reduce", inside, blocks),
        ]
    if stage.has_embeddings:
        looked_up = layout.weight_bytes * config.width * (positions - layout.micro_batch)
        found.append(transfer("embedded tokens", "all-reduce", looked_up // 2, 2))  # of text, of codes
        if layout.sequence:
            found.append(transfer("gradients of embeddings", "all-gather", outside, 1))
    if stage.has_heads:
        if layout.sequence:
            found.append(transfer("hidden states", "all-gather", outside, 1))
            found.append(transfer("hidden states' gradients", "reduce-scatter", outside, 1))
            found.append(transfer("gradients of vectors", "all-reduce", layout.weight_bytes * config.width, 2))
        else:
            found.append(transfer("hidden states' gradients", "all-reduce", outside, 1))
        # The greatest logit of each position; the sum of exponentials and the target's logit.
        found.append(transfer("sums over the vocabulary", "all-reduce", 4 * positions * 3 // 2, 2))
    return found


def pipe_traffic(stage: Stage, config: DalleConfig, layout: Layout) -> list[Transfer]:
    """The residual stream to the next stage, with captions and codes; its gradient to the one before."""
    boundary, passes = stage.activations.boundary, layout.accumulation
    found = []
    if stage.number + 1 < layout.pipe:
        tokens = 8 * layout.micro_batch * config.total_len
        found.append(Transfer("pipe", "residual stream", "send", 2, (boundary + tokens) * passes, passes, True))
    if stage.number > 0:
        found.append(Transfer("pipe", "gradients of the stream", "send", 2, boundary * passes, passes, True))
    return found
