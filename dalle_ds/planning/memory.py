"""Bytes that one process holds, by kind and by moment of an update.

What DeepSpeed 0.19 allocates is counted in real engines by `benchmarks/plan_check.py`; the formulas here follow from that
and from its source. Between ZeRO stages they differ more than the textbook says:

- stage 0 with bf16: at the step, gradients are copied to fp32;
- stage 1 with bf16: every process keeps whole fp32 gradients between updates;
- stages 1 and 2 with fp32 (and fp16, which is an fp32 engine): gradients of every parameter that a process's partition
  touches are kept whole, so that with a parameter group for each residual block they hardly shrink with more processes;
- stage 3: the fp32 gradients of a process's shards, and a bucket for reductions, are there all the time.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, replace

from dalle_ds.optim.adamw import CHUNK, CHUNK_ON_GPU
from dalle_ds.planning.layout import REPLICA_BUCKET, STAGE_0_BUCKET, Layout
from dalle_ds.planning.parameters import ParameterSet, touched, updated_by_group
from dalle_ds.planning.shards import compressed_shards
from dalle_ds.planning.stages import Stage

MOMENTS = ("between", "loss", "backward", "reduce", "step")
"""Between updates; at the end of a forward pass; in the backward pass of the last residual block; once all gradients are
there; in the optimizer's step."""
REUSE_STEPS = 4
"""How often DeepSpeed counts a weight on the way to its next use, as measured, where it compares that with
`stage3_max_reuse_distance`."""
CHUNKED_TENSORS = 5
"""fp32 tensors of a chunk's size that `AdamW` works with where moments or weights are 16-bit."""


@dataclass(frozen=True)
class Use:
    """Bytes of one kind on one process."""

    kind: str
    """What they hold."""
    between: int = 0
    loss: int = 0
    backward: int = 0
    reduce: int = 0
    step: int = 0
    host: int = 0
    """In main memory, where that is another; at all times."""

    def at(self, moment: str) -> int:
        """On the device at one of `MOMENTS`."""
        return int(getattr(self, moment))

    @classmethod
    def always(cls, kind: str, size: int, *, host: bool = False) -> Use:
        """Bytes that stay where they are."""
        return cls(kind, host=size) if host else cls(kind, size, size, size, size, size)

    def on_one_device(self) -> Use:
        """The same where main memory is the device's."""
        return Use(self.kind, *(self.at(moment) + self.host for moment in MOMENTS))


@dataclass(frozen=True)
class Memory:
    """All that one process holds."""

    uses: tuple[Use, ...]

    def at(self, moment: str) -> int:
        """Bytes on the device at one of `MOMENTS`."""
        return sum(use.at(moment) for use in self.uses)

    @property
    def peak_moment(self) -> str:
        """When the most is held."""
        return max(MOMENTS, key=self.at)

    @property
    def peak(self) -> int:
        """The most bytes on the device."""
        return self.at(self.peak_moment)

    @property
    def host(self) -> int:
        """Bytes in main memory."""
        return sum(use.host for use in self.uses)


def heaviest(memories: Iterable[Memory]) -> Memory:
    """The one with the greatest peak."""
    return max(memories, key=lambda memory: memory.peak)


def stage_memory(stage: Stage, layout: Layout, device: str) -> Memory:
    """What a process of a stage holds.

    Args:
        device: "cuda", or "cpu" where the device's memory is main memory.
    """
    held = _Held(stage.parameters, layout, stage.width)
    uses = [
        held.weights(),
        held.master(),
        held.moments(),
        held.average(),
        held.saved(),
        held.gradients(),
        held.error_buffers(),
        held.reduction(device),
        held.gathered(),
        _activations(stage, layout),
        _loss(stage),
        Use("working set of a block", backward=stage.activations.working),
        held.update(device),
    ]
    if device == "cpu":
        uses = [use.on_one_device() for use in uses]
    return Memory(tuple(use for use in uses if any(use.at(moment) for moment in MOMENTS) or use.host))


def _activations(stage: Stage, layout: Layout) -> Use:
    """Of all micro-batches between their forward and their backward pass: one, or those that are in the pipeline."""
    kept = stage.activations.kept
    if layout.pipe > 1:
        waiting = min(layout.pipe - stage.number, layout.accumulation)
        # DeepSpeed has two buffers at least; each holds what was received and what is to be sent.
        ends = (stage.number > 0) + (stage.number + 1 < layout.pipe)
        boundary = stage.activations.boundary
        kept = waiting * kept + max(2, waiting) * ends * boundary
        # What was last received and sent stays.
        return Use("activations", boundary, kept, kept, 2 * boundary, 2 * boundary)
    return Use("activations", loss=kept, backward=kept)


def _loss(stage: Stage) -> Use:
    parts = stage.activations
    return Use("loss and logits", loss=parts.loss_kept + parts.loss_working)


class _Held:
    """The kinds that follow from parameters."""

    def __init__(self, parameters: ParameterSet, layout: Layout, width: int) -> None:
        self.parameters, self.layout, self.width = parameters, layout, width
        self.count, self.largest = parameters.count, max(parameters.sizes)
        self.owned_of = updated_by_group(parameters, layout.zero_stage, layout.shards)
        self.owned = sum(self.owned_of)
        """Elements that this process updates."""
        self.compressed = compressed_shards(parameters, layout, width)
        self.is_bf16_stage_1 = (
            layout.zero_stage == 1
            and layout.precision == "bf16"
            and layout.accumulate_bytes == 4
            and not layout.offload_optimizer
        )
        self.is_compact = layout.precision == "bf16" and layout.accumulate_bytes == 4

    @property
    def shares_master(self) -> bool:
        """Whether the weights that are updated are those that are computed with."""
        layout = self.layout
        if layout.zero_stage == 0:
            return layout.precision != "bf16"
        return layout.zero_stage == 3 and not layout.offload_optimizer and layout.weight_bytes == layout.master_bytes

    @property
    def large(self) -> int:
        """Elements of the weights that ZeRO-3 does not always have gathered."""
        return sum(size for size in self.parameters.sizes if size > self.layout.buffers.persistent)

    @property
    def persistent(self) -> int:
        """Bytes of the small weights that ZeRO-3 always has gathered."""
        layout = self.layout
        if layout.zero_stage < 3 or layout.shards == 1:
            return 0
        return layout.weight_bytes * (self.count - self.large)

    def weights(self) -> Use:
        """Those that are computed with."""
        layout = self.layout
        if layout.zero_stage < 3:
            whole = self.owned * layout.shards if layout.zero_stage else self.count
            return Use.always("weights", layout.weight_bytes * whole)
        shards = Use.always("weights", layout.weight_bytes * self.owned, host=layout.offload_weights)
        return _plus(shards, Use.always("", self.persistent))

    def master(self) -> Use:
        """Those that are updated."""
        size = 0 if self.shares_master else self.layout.master_bytes * self.owned
        use = Use.always("fp32 weights", size, host=self.layout.offload_optimizer)
        if self.layout.offload_optimizer and self.layout.zero_stage < 3:
            # The updated weights in the model's type, on their way back.
            use = replace(use, host=use.host + self.layout.weight_bytes * self.owned)
        return use

    def moments(self) -> Use:
        """Adam's; those in 16 bits take two bytes each."""
        layout = self.layout
        size = 0
        for group, owned in zip(self.parameters.groups, self.owned_of, strict=True):
            small = group[0].has_small_moments and layout.moments == "16-bit"
            size += owned * (4 if small else 2 * layout.master_bytes)
        return Use.always("Adam's moments", size, host=layout.offload_optimizer)

    def average(self) -> Use:
        """Of the weights; on the host with a landing place of the same size."""
        layout = self.layout
        if layout.average == "none":
            return Use("average")
        size = layout.master_bytes * self.owned
        if layout.average == "cpu":
            return Use.always("average", 2 * size, host=True)
        return Use.always("average", size, host=layout.offload_optimizer)

    def saved(self) -> Use:
        """A copy of what this process writes of a checkpoint, in main memory: weights, moments, average and error sums."""
        layout = self.layout
        if not layout.saves_beside:
            return Use("copy for a checkpoint")
        moments = self.moments()
        size = moments.at("between") + moments.host
        size += layout.master_bytes * self.owned * (1 if layout.average == "none" else 2)
        if layout.zero_stage == 0:  # of those that have the same, each writes some
            size //= layout.shards
        size += 4 * sum(shard.numel for shard in self.compressed)
        return Use.always("copy for a checkpoint", size, host=True)

    def error_buffers(self) -> Use:
        """PowerSGD's, and the fixed random matrices that its first factors are made with."""
        each = 2 if self.layout.powersgd.storage == "1-6-9" else 4
        errors = each * sum(shard.numel for shard in self.compressed)
        fixed = 4 * sum(shard.parts * shard.long * shard.rank for shard in self.compressed)
        use = Use.always("PowerSGD", errors, host=self.layout.offload_optimizer)
        return _plus(use, Use.always("", fixed))

    def gradients(self) -> Use:
        """Of parameters, and their sums over micro-batches and processes."""
        layout = self.layout
        whole = layout.weight_bytes * self.count
        again = layout.accumulation > 1
        # Autograd makes the gradient of one parameter at a time; in fp16 blocks from a 16-bit product.
        one = self.largest * (layout.weight_bytes + (2 if layout.precision == "fp16" else 0))
        name = "gradients"
        if layout.zero_stage == 0:
            before = whole if again else 0
            return Use(name, loss=before, backward=before or one, reduce=whole, step=whole)
        if self.is_bf16_stage_1:
            sums = 4 * self.owned * layout.shards
            before = sums + (whole if again else 0)
            return Use(name, sums, before, max(before, sums + one), sums + whole, sums + whole)
        host = 4 * self.owned if layout.offload_optimizer else 0
        if layout.zero_stage == 3:
            sums = layout.accumulate_bytes * self.owned
            if layout.offload_optimizer:
                return Use(name, backward=one, reduce=one, host=sums + host)
            return Use(name, sums, sums, sums + one, sums + one, sums)
        if self.is_compact:
            sums = 4 * self.owned
            before = sums if again else 0
            return Use(name, loss=before, backward=before + one, reduce=sums + one, step=sums, host=host)
        pieces = 0 if layout.offload_optimizer else layout.weight_bytes * touched(self.parameters, layout.shards)
        if layout.zero_stage == 1:
            before = whole if again else 0
            return Use(name, loss=before, backward=before or one, reduce=whole + pieces, step=pieces, host=host)
        before = pieces if again else 0
        return Use(name, loss=before, backward=before + one, reduce=before + pieces + one, step=pieces, host=host)

    def reduction(self, device: str) -> Use:
        """Buckets in which gradients are reduced, and copies of them; what crosses between replicas afterwards."""
        layout, name = self.layout, "reduction buckets"
        number, crossing = layout.weight_bytes, self._crossing()
        filled = min(layout.buffers.reduce, self.count)
        # On a GPU a bucket takes its memory at once, on a CPU as it is filled.
        bucket = filled if device == "cpu" else layout.buffers.reduce
        if layout.zero_stage == 0 or self.is_bf16_stage_1:
            each = 4 + 2 if self.is_bf16_stage_1 else number
            return Use(name, reduce=max(crossing, each * min(self.count, STAGE_0_BUCKET + self.largest)))
        if layout.zero_stage == 3:
            held = number * bucket
            copies = 2 * number * max(filled, self.largest)
            return Use(name, held, held, held + copies, held + max(copies, crossing), held)
        # For the time of the backward pass; two of them where one is filled while the other is reduced.
        held = number * bucket * (2 if layout.overlap else 1) + number * filled
        temporary = 2 * number * self.largest if layout.offload_optimizer else 0
        return Use(name, temporary, temporary, temporary + held, temporary + max(held, crossing), temporary)

    def _crossing(self) -> int:
        """Bytes of the copies that cross between replicas as they are: of two buckets, one behind the other."""
        layout = self.layout
        if layout.replicas == 1:
            return 0
        plain = self.owned - sum(shard.numel for shard in self.compressed)
        piece = self.largest if layout.zero_stage < 3 else -(-self.largest // layout.shards)
        return 4 * min(plain, 2 * max(REPLICA_BUCKET, piece))

    def gathered(self) -> Use:
        """Weights of other shards, under ZeRO-3: those in use, those that are gathered ahead, those that wait for reuse."""
        layout, buffers = self.layout, self.layout.buffers
        if layout.zero_stage < 3 or layout.shards == 1:
            return Use("gathered weights")
        large = self.large
        kept = min(large, max(buffers.live, buffers.reuse // REUSE_STEPS))
        ahead = min(buffers.prefetch, max(0, buffers.live - self.largest))
        elements = min(large, max(kept, self.largest + ahead))
        size = layout.weight_bytes * elements
        if layout.precision == "fp16":
            size += 2 * min(large, self.largest + ahead)  # gathered in 16 bits, then converted
        return Use("gathered weights", loss=size, backward=size)

    def update(self, device: str) -> Use:
        """What the step works with: gradients in fp32, `AdamW`'s chunks, and then small weights that are gathered again."""
        layout = self.layout
        if layout.zero_stage == 0:
            flat = 4 * self.count if layout.precision == "bf16" else 0
        else:
            flat = 0 if self.is_bf16_stage_1 or layout.offload_optimizer else 4 * max(self.owned_of)  # one group's
        converted = [
            owned
            for group, owned in zip(self.parameters.groups, self.owned_of, strict=True)
            if layout.master_bytes < 4 or (group[0].has_small_moments and layout.moments == "16-bit")
        ]
        on_host = layout.offload_optimizer or device == "cpu"
        chunk = min(CHUNK if on_host else CHUNK_ON_GPU, max(converted, default=0))
        working = CHUNKED_TENSORS * 4 * chunk
        if layout.offload_optimizer and device != "cpu":
            return Use("optimizer's step", step=self.persistent, host=working)
        return Use("optimizer's step", step=max(flat + working, self.persistent))


def _plus(one: Use, other: Use) -> Use:
    sums = Use(one.kind, *(one.at(moment) + other.at(moment) for moment in MOMENTS))
    return replace(sums, host=one.host + other.host)
