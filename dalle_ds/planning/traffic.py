"""What processes exchange along each axis of the mesh during one update.

What the model itself exchanges is measured on it (`model.py`); what ZeRO, pipelines and replicas do follows from shapes.
`Transfer.sent` counts what leaves one process, by the usual algorithms: of k processes, an all-gather of n bytes and a
reduce-scatter of n bytes send n · (k − 1) / k each, an all-reduce twice that. `benchmarks/comm.py` counts what is really
exchanged.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

from dalle_ds.planning.layout import REPLICA_BUCKET, REUSE_STEPS, Layout
from dalle_ds.planning.model import Stage, compressed_shards, updated_by_group


@dataclass(frozen=True)
class Transfer:
    """One kind of exchange in one update."""

    axis: str
    """Processes that differ in this place take part: "tensor", "pipe", "shard", "replica"; "data" is shard and replica."""
    what: str
    """What is exchanged."""
    operation: str
    """ "all-reduce", "all-gather", "reduce-scatter" or "send"."""
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


def traffic(stage: Stage, layout: Layout) -> tuple[Transfer, ...]:
    """All that a process of a stage exchanges in one update."""
    found = [*_shards(stage, layout), *_replicas(stage, layout), *_model(stage), *_pipeline(stage, layout)]
    return tuple(transfer for transfer in found if transfer.processes > 1 and transfer.size)


def sent_along(transfers: Sequence[Transfer], axis: str) -> int:
    """Bytes that leave one process along an axis."""
    return sum(transfer.sent for transfer in transfers if transfer.axis == axis)


def compression(stage: Stage, layout: Layout) -> float:
    """Share of the compressed parameters' gradients that does not cross: 1 − r (m + 2) / (2 d m) for whole matrices
    (DALL·E Table 1, whose 5 r / 8 d is that of m = 8 shards)."""
    shards = compressed_shards(stage.parameters, layout)
    numel = sum(shard.numel for shard in shards)
    return 1 - sum(shard.factor_numel for shard in shards) / numel if numel else 0.0


def owned(stage: Stage, layout: Layout) -> int:
    """Elements of the gradients that one process of a replica has."""
    return sum(updated_by_group(stage.parameters, layout.zero_stage, layout.shards))


def _shards(stage: Stage, layout: Layout) -> Iterator[Transfer]:
    """ZeRO's gathers and reductions.

    DeepSpeed 0.19 reduces gradients of stages 1 and 2 by all-reduce, whatever `reduce_scatter` says; in stages 2 and 3 after
    every micro-batch. Stage 3 gathers weights for the forward and for the backward pass, except those that it keeps.
    """
    number, parameters, update = layout.weight_bytes, stage.parameters, stage.update
    whole, backwards = number * parameters.count, update.backwards
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
    passes = update.forwards + backwards * (1 - kept / count if count else 0)
    yield transfer("weights", "all-gather", int(gathered * passes), int(len(large) * passes), True)
    yield transfer("small weights, after the step", "all-gather", whole - number * count, 1)
    yield transfer("gradients", "reduce-scatter", whole * backwards, buckets * backwards, True)


def _replicas(stage: Stage, layout: Layout) -> Iterator[Transfer]:
    """The mean of gradients over replicas, in fp32; of what PowerSGD compresses, the two factors (DALL·E Table 2)."""
    shards = compressed_shards(stage.parameters, layout)
    factors = sum(shard.factor_numel for shard in shards)
    plain = owned(stage, layout) - sum(shard.numel for shard in shards)
    each = 2 if layout.powersgd.transport == "1-6-9" else 4
    blocks = len({shard.bucket for shard in shards})
    yield Transfer("replica", "factors of gradients", "all-reduce", layout.replicas, each * factors, 2 * blocks, False)
    yield Transfer("replica", "gradients", "all-reduce", layout.replicas, 4 * plain, -(-plain // REPLICA_BUCKET), False)


def _model(stage: Stage) -> Iterator[Transfer]:
    """What the model exchanges: activations and gradients of a tensor group, rows that are compared."""
    for kind, size in stage.update.work.exchanged.items():
        what = "activations" if kind.axis == "tensor" else "rows"
        yield Transfer(
            kind.axis,
            what,
            kind.operation,
            kind.processes,
            size,
            stage.update.work.exchanges[kind],
            kind.axis == "tensor",
        )


def _pipeline(stage: Stage, layout: Layout) -> Iterator[Transfer]:
    """Activations to the next stage, with captions and codes; their gradients to the one before."""
    update, passes = stage.update, layout.accumulation
    yield Transfer(
        "pipe", "activations", "send", min(layout.pipe, 2), (update.sent + update.tokens) * passes, passes, True
    )
    yield Transfer("pipe", "gradients", "send", min(layout.pipe, 2), update.received * passes, passes, True)
