"""Bytes that one process holds, by kind and by moment of an update.

What the passes take is measured on the model (`model.py`). What DeepSpeed 0.19 allocates beside follows from formulas, from
its source and from counting in real engines (`benchmarks/plan_check.py`). Between ZeRO stages it differs more than the
textbook says:

- stage 0 with bf16: at the step, gradients are copied to fp32;
- stage 1 with bf16: every process keeps whole fp32 gradients between updates;
- stages 1 and 2 with fp32 (and fp16, which is an fp32 engine): gradients of every parameter that a process's partition
  touches are kept whole, so that with a parameter group for each residual block they hardly shrink with more processes;
- stage 3: the fp32 gradients of a process's shards, and a bucket for reductions, are there all the time.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

from dalle_ds.optim.adamw import CHUNK, CHUNK_ON_GPU
from dalle_ds.planning.layout import REPLICA_BUCKET, REUSE_STEPS, STAGE_0_BUCKET, Layout
from dalle_ds.planning.model import Stage

MOMENTS = ("between", "loss", "backward", "reduce", "step")
"""Between updates; in the forward pass of the last micro-batch; in its backward pass; once all gradients are there; in the
optimizer's step."""
CHUNKED_TENSORS = 5
"""fp32 tensors of a chunk's size that `AdamW` works with where weights are 16-bit; where moments are, one less."""


@dataclass(frozen=True)
class Use:
    """Bytes of one kind on one process: on the device at each of `MOMENTS`, and in main memory, where that is another, at all
    times."""

    kind: str
    between: int = 0
    loss: int = 0
    backward: int = 0
    reduce: int = 0
    step: int = 0
    host: int = 0

    def at(self, moment: str) -> int:
        """On the device at one of `MOMENTS`."""
        return int(getattr(self, moment))


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


def stage_memory(stage: Stage, layout: Layout, device: str) -> Memory:
    """What a process of a stage holds.

    Args:
        device: "cuda", or "cpu" where the device's memory is main memory.
    """
    uses = []
    for use in _Held(stage, layout, device).uses():
        if device == "cpu":
            use = Use(use.kind, *(use.at(moment) + use.host for moment in MOMENTS))
        if use.host or any(use.at(moment) for moment in MOMENTS):
            uses.append(use)
    return Memory(tuple(uses))


def _always(kind: str, size: int, *, host: int = 0) -> Use:
    return Use(kind, size, size, size, size, size, host)


class _Held:
    """The kinds of uses."""

    def __init__(self, stage: Stage, layout: Layout, device: str) -> None:
        self.stage, self.update, self.parameters = stage, stage.update, stage.parameters
        self.layout, self.device = layout, device
        self.count, self.largest = self.parameters.count, max(self.parameters.sizes)
        self.owned = sum(stage.updated)  # elements that this process updates
        self.compressed = sum(shard.numel for shard in stage.compressed)
        self.sums_in_fp32 = layout.precision == "bf16" and layout.accumulate_bytes == 4
        self.is_bf16_stage_1 = layout.zero_stage == 1 and self.sums_in_fp32 and not layout.offload_optimizer
        # Elements of the weights that ZeRO-3 does not always have gathered, and bytes of those that it has.
        self.large = sum(size for size in self.parameters.sizes if size > layout.buffers.persistent)
        self.gathers = layout.zero_stage == 3 and layout.shards > 1
        self.persistent = layout.weight_bytes * (self.count - self.large) if self.gathers else 0

    def uses(self) -> Iterator[Use]:
        layout, update, number, stage = self.layout, self.update, self.layout.weight_bytes, self.layout.zero_stage
        off = layout.offload_optimizer

        def of_optimizer(kind: str, size: int, more_on_host: int = 0) -> Use:
            return _always(kind, 0, host=size + more_on_host) if off else _always(kind, size)

        # Those that are computed with; ZeRO-1 and 2 hold them with the padding of groups.
        weights = number * (self.count if stage == 0 else self.owned * (layout.shards if stage < 3 else 1))
        if layout.offload_weights:
            yield _always("weights", self.persistent, host=weights)
        else:
            yield _always("weights", weights + self.persistent)
        # Those that are updated, where they are not the same. Offloaded, they are there in the model's type too, on their
        # way back.
        is_same = layout.precision != "bf16" if stage == 0 else stage == 3 and not off and number == layout.master_bytes
        master = layout.master_bytes * self.owned
        yield of_optimizer("fp32 weights", 0 if is_same else master, number * self.owned if stage < 3 else 0)
        groups = zip(self.parameters.groups, self.stage.updated, strict=True)
        moments = sum(n * (4 if group[0].has_small_moments else 2 * layout.master_bytes) for group, n in groups)
        yield of_optimizer("Adam's moments", moments)
        average = 0 if layout.average == "none" else master
        if layout.average == "cpu":  # with a landing place of the same size
            yield _always("average", 0, host=2 * average)
        else:
            yield of_optimizer("average", average)
        if layout.saves_beside:
            size = moments + master + average
            if stage == 0:  # of those that have the same, each writes some
                size //= layout.shards
            yield _always("copy for a checkpoint", 0, host=size + 4 * self.compressed)
        yield self.gradients()
        # PowerSGD's errors, and the fixed random matrices that its first factors are made with.
        errors = (2 if layout.powersgd.storage == "1-6-9" else 4) * self.compressed
        fixed = 4 * sum(shard.parts * shard.long * shard.rank for shard in self.stage.compressed)
        yield _always("PowerSGD", fixed + (0 if off else errors), host=errors if off else 0)
        yield self.reduction()
        yield self.gathered()
        yield self.activations()
        yield Use("working set", loss=update.forward - update.kept, backward=update.backward - update.kept)
        yield _always("batches and copies of weights", update.always)
        yield Use("gradients that were not the engine's", reduce=update.afterwards)
        yield self.step()

    def gradients(self) -> Use:
        """Of parameters, and their sums over micro-batches and processes; the backward pass has one more at a time."""
        layout, name = self.layout, "gradients"
        whole = layout.weight_bytes * self.count
        before = whole if self.update.backwards > 1 else 0
        # In fp16 blocks a gradient comes from a 16-bit product.
        one = self.largest * (layout.weight_bytes + (2 if layout.precision == "fp16" else 0))
        if layout.zero_stage == 0:
            return Use(name, loss=before, backward=before, reduce=whole, step=whole)
        if self.is_bf16_stage_1:
            sums = 4 * self.owned * layout.shards
            before += sums
            return Use(name, sums, before, before, sums + whole, sums + whole)
        host = 4 * self.owned if layout.offload_optimizer else 0
        if layout.zero_stage == 3:
            sums = layout.accumulate_bytes * self.owned
            if layout.offload_optimizer:
                return Use(name, reduce=one, host=sums + host)
            return Use(name, sums, sums, sums, sums + one, sums)
        if self.sums_in_fp32:
            sums = 4 * self.owned
            before = sums if self.update.backwards > 1 else 0
            return Use(name, 0, before, before, sums + one, sums, host)
        pieces = 0 if layout.offload_optimizer else layout.weight_bytes * self.parameters.touched(layout.shards)
        if layout.zero_stage == 1:
            return Use(name, 0, before, before, whole + pieces, pieces, host)
        before = pieces if self.update.backwards > 1 else 0
        return Use(name, 0, before, before, before + pieces + one, pieces, host)

    def reduction(self) -> Use:
        """Buckets in which gradients are reduced, and copies of them; what crosses between replicas afterwards."""
        layout, name, number = self.layout, "reduction buckets", self.layout.weight_bytes
        crossing = 0
        if layout.replicas > 1:  # as it is: of two buckets, one behind the other
            plain = self.owned - self.compressed
            piece = self.largest if layout.zero_stage < 3 else -(-self.largest // layout.shards)
            crossing = 4 * min(plain, 2 * max(REPLICA_BUCKET, piece))
        if layout.zero_stage == 0 or self.is_bf16_stage_1:
            each = 4 + 2 if self.is_bf16_stage_1 else number
            return Use(name, reduce=max(crossing, each * min(self.count, STAGE_0_BUCKET + self.largest)))
        filled = min(layout.buffers.reduce, self.count)
        if layout.zero_stage == 3:
            # On a GPU a bucket takes its memory at once, on a CPU as it is filled.
            held = number * (filled if self.device == "cpu" else layout.buffers.reduce)
            copies = 2 * number * max(filled, self.largest)
            return Use(name, held, held, held + copies, held + max(copies, crossing), held)
        # For the time of the backward pass; two of them where one is filled while the other is reduced.
        bucket = filled if self.device == "cpu" else layout.buffers.reduce
        held = number * bucket * (2 if layout.overlap else 1) + number * filled
        temporary = 2 * number * self.largest if layout.offload_optimizer else 0
        return Use(name, temporary, temporary, temporary + held, temporary + max(held, crossing), temporary)

    def gathered(self) -> Use:
        """Weights of other shards, under ZeRO-3: those in use, those that are gathered ahead, those that wait for reuse."""
        if not self.gathers:
            return Use("gathered weights")
        buffers = self.layout.buffers
        ahead = self.largest + min(buffers.prefetch, max(0, buffers.live - self.largest))
        size = self.layout.weight_bytes * min(self.large, max(buffers.live, buffers.reuse // REUSE_STEPS, ahead))
        if self.layout.precision == "fp16":
            size += 2 * min(self.large, ahead)  # gathered in 16 bits, then converted
        return Use("gathered weights", loss=size, backward=size)

    def activations(self) -> Use:
        """Of all micro-batches between their forward and their backward pass: one, or those that are in the pipeline."""
        layout, update = self.layout, self.update
        if layout.pipe == 1:
            return Use("activations", loss=update.kept, backward=update.kept)
        waiting = min(layout.pipe - self.stage.number, layout.accumulation)
        # DeepSpeed has two buffers at least; each holds what was received and what is to be sent, of which the last stays.
        ends = update.received + update.sent
        kept = waiting * update.kept + max(2, waiting) * ends
        largest = max(update.received, update.sent)
        return Use("activations", largest, kept, kept, 2 * largest, 2 * largest)

    def step(self) -> Use:
        """What the step works with: gradients in fp32, `AdamW`'s chunks, and then small weights that are gathered again."""
        layout, flat = self.layout, 0
        if layout.zero_stage == 0:
            flat = 4 * self.count if layout.precision == "bf16" else 0
        elif not self.is_bf16_stage_1 and not layout.offload_optimizer:
            flat = 4 * max(self.stage.updated)  # one group's
        has_small_weights = layout.master_bytes < 4
        groups = zip(self.parameters.groups, self.stage.updated, strict=True)
        converted = [owned for group, owned in groups if has_small_weights or group[0].has_small_moments]
        tensors = CHUNKED_TENSORS if has_small_weights else CHUNKED_TENSORS - 1
        on_host = layout.offload_optimizer or self.device == "cpu"
        working = tensors * 4 * min(CHUNK if on_host else CHUNK_ON_GPU, max(converted, default=0))
        if layout.offload_optimizer and self.device != "cpu":
            return Use("optimizer's step", step=self.persistent, host=working)
        # Stages 1 and 2 make one group's gradients flat, and then let go of what they were.
        needed = max(flat, working) if layout.zero_stage in (1, 2) else flat + working
        return Use("optimizer's step", step=max(needed, self.persistent))
