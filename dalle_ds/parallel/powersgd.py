"""PowerSGD as DALL·E has it: gradients cross between replicas as two factors of low rank (§2.5, App. E; arXiv 1905.13727).

Each of the K replicas holds the same shards of weight matrices. For a shard with gradient g on replica k, E being the
error buffer, which holds what earlier updates left out, and Q₀ a random matrix that stays the same for the whole run:

    E_k ← E_k + g_k / K
    P   = Σ_k E_k · Q₀, columns then made orthonormal          all-reduce, one for all matrices of a residual block
    Q   = Σ_k E_kᵀ · P                                         all-reduce, one for all matrices of a residual block
    Ĝ   = P · Qᵀ, in place of the mean gradient
    E_k ← E_k − Ĝ / K

Everything but the orthonormal columns is linear: what counts is the sum of the error buffers over replicas, and Ĝ plus the
change of that sum is the mean gradient exactly, however coarse Q₀, the rank or the format in which the factors cross.

E · Q₀ = 0 after every update, since P spans it: so P follows the new gradient, and what was left out comes through as P turns
from one mini-batch to the next. (Gradients without noise would leave it behind for good. The paper found the fixed Q₀ to
lose nothing in training against one that follows the gradients.)

Matrices are turned so that P has their smaller side, by strides alone: this is what Householder's method works on.
"""

from __future__ import annotations

import hashlib
import math
from collections.abc import Generator, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from dalle_ds.config import PowerSGDConfig
from dalle_ds.precision.codecs import FLOAT_1_6_9

PAPER_RANKS = {1920: 512, 2688: 640, 3968: 896}
"""Width of the model → least rank without a loss in training (DALL·E Table 1)."""
PAPER_UNIT = 128
"""The paper's ranks are multiples of this."""
NARROW = 1024
"""Width from which on ranks are multiples of `PAPER_UNIT` here too."""


def paper_rank(width: int, shards: int = 1) -> int:
    """The rank of a whole matrix that the paper's Table 1 gives for a model of this width.

    The table's ratio of rank to width is interpolated linearly in the width, and is that of the nearest entry outside of the
    table. The rank is rounded to a multiple of 128, as in the table; or to one of `shards`, where 128 is too coarse (widths
    below 1024) or not a multiple of it.

    Args:
        width: d_model.
        shards: processes that divide each matrix.
    """
    widths = sorted(PAPER_RANKS)
    ratios = [PAPER_RANKS[entry] / entry for entry in widths]
    inside = min(max(width, widths[0]), widths[-1])
    upper = next(number for number in range(1, len(widths)) if inside <= widths[number])
    share = (inside - widths[upper - 1]) / (widths[upper] - widths[upper - 1])
    ratio = ratios[upper - 1] + share * (ratios[upper] - ratios[upper - 1])
    unit = PAPER_UNIT if width >= NARROW and PAPER_UNIT % shards == 0 else shards
    return max(unit, round(ratio * width / unit) * unit)


@dataclass(frozen=True)
class MatrixShard:
    """One process's shard of one parameter: `parts` matrices of the same shape, one above the other."""

    name: str
    """Of the parameter."""
    piece: int
    """Index of its gradient in what `PowerSGD.reduce` is given."""
    parts: int
    """Matrices: 3 in a shard of fused queries, keys and values, each approximated by itself."""
    rows: int
    """Of each matrix."""
    columns: int
    """Of each matrix."""
    max_rank: int
    """Rank of each matrix's approximation, if its sides are not smaller."""
    bucket: int
    """Residual block; what belongs to one crosses together."""
    place: str = ""
    """Which shard of the parameter this is. Shards have random matrices of their own."""

    @property
    def short(self) -> int:
        """The smaller side."""
        return min(self.rows, self.columns)

    @property
    def long(self) -> int:
        """The greater side."""
        return max(self.rows, self.columns)

    @property
    def rank(self) -> int:
        """Rank of each matrix's approximation."""
        return min(self.max_rank, self.short)

    @property
    def numel(self) -> int:
        """Elements of the shard."""
        return self.parts * self.rows * self.columns

    @property
    def factor_numel(self) -> int:
        """Elements of both factors, which cross in place of `numel`."""
        return self.parts * self.rank * (self.rows + self.columns)

    def matrices(self, flat: Tensor) -> Tensor:
        """(numel,) → (parts, short, long), the matrices, transposed where they are higher than wide; a view."""
        stack = flat.view(self.parts, self.rows, self.columns)
        return stack if self.rows <= self.columns else stack.transpose(1, 2)


@dataclass(frozen=True)
class Reduced:
    """What one reduction came to, by shard; on the device, so that nothing waits for a GPU."""

    squares: Tensor
    """(shards,) fp32, ‖Ĝ‖², that of Q, since P is orthonormal. Where the gradient is not to be used: NaN if that of this
    replica was not finite itself, else Inf."""
    overflowed: Tensor
    """(shards,) bool, whether P or Q was not finite on some replica; the same on all."""
    zeroed: Tensor
    """(shards,) bool, whether the error buffer itself was not finite on this process, and is 0 now."""


class PowerSGD:
    """The compressed gradients of one process and their error buffers.

    All replicas must make theirs from the same arguments, and compute alike: from the same sums each makes its own Ĝ.

    Numbers that are not finite, in a gradient or an error buffer of any replica, or too great for the factors' format, are
    found in P or Q, where sums carry them to all replicas. Such a shard's Ĝ is NaN and its square NaN or Inf, so that the
    update is left out, and error buffers stay what they were before, as if that update had not been; only one that is itself
    not finite becomes 0. What other shards' Ĝ took out of their buffers and is not used, `restore_error_feedback` returns.
    (The paper's keep the new gradient where P or Q overflowed. They have nothing to go back to, and would overflow again.) No
    number that is not finite is made orthonormal.

    Args:
        shards: what is compressed; no two of the same name.
        group: the replicas' process group; None stands for all processes.
        replicas: K; 1 communicates nothing.
        config: formats, scales and ε. With `storage` 1-6-9, error buffers are unscaled: the format has room from 2^-58 to
            16, and what is greater becomes 16.
        seed: of Q₀, which is a function of this and of the shard's name, place and shape, and thus in no checkpoint.
        device: where to compute.
        storage_device: where error buffers lie; None for `device`.
    """

    def __init__(
        self,
        shards: Sequence[MatrixShard],
        group: Any,
        replicas: int,
        config: PowerSGDConfig,
        seed: int,
        device: torch.device | str = "cpu",
        storage_device: torch.device | str | None = None,
    ) -> None:
        self.shards = list(shards)
        self._group, self._replicas, self._config = group, replicas, config
        self._device = torch.device(device)
        self._fixed = [_gaussian(shard, seed).to(self._device) for shard in self.shards]
        dtype = torch.float32 if config.storage == "fp32" else torch.int16
        place = device if storage_device is None else storage_device
        self._errors = [torch.zeros(shard.numel, dtype=dtype, device=place) for shard in self.shards]
        self._buckets: dict[int, list[int]] = {}
        for number, shard in enumerate(self.shards):
            self._buckets.setdefault(shard.bucket, []).append(number)

    @torch.no_grad()
    def reduce(self, pieces: Sequence[Tensor]) -> Reduced:
        """Put Ĝ in place of every shard's gradient. Collective.

        Residual blocks follow each other as in an assembly line: while the factors of some cross, others are computed.

        Args:
            pieces: flat gradients, in any floating-point format and on any device; `MatrixShard.piece` counts them.
        """
        count = len(self.shards)
        outcome = Reduced(
            squares=torch.zeros(count, device=self._device),
            overflowed=torch.zeros(count, dtype=torch.bool, device=self._device),
            zeroed=torch.zeros(count, dtype=torch.bool, device=self._device),
        )
        in_turns(self._reduce_bucket(numbers, pieces, outcome) for numbers in self._buckets.values())
        return outcome

    @torch.no_grad()
    def restore_error_feedback(self, shards: Iterable[int], pieces: Sequence[Tensor]) -> None:
        """Take Ĝ, which `reduce` left in `pieces`, back into the error buffers: it is not used in this update.

        Nothing of these gradients is lost then: it comes with those of later updates.

        Args:
            shards: their numbers; what is not finite is left out.
        """
        for number in shards:
            stored = self._errors[number]
            mean = pieces[self.shards[number].piece].to(stored.device, torch.float32).view(-1)[: stored.numel()]
            share = torch.where(_is_finite(mean), mean / self._replicas, 0.0)
            stored.copy_(self._encoded(self._decoded(stored) + share))

    @torch.no_grad()
    def errors(self) -> dict[str, Tensor]:
        """The sum of every shard's error buffer over the replicas, by name: (numel,) fp32, on the CPU. Collective.

        That is all of them that matters; its elements lie as those of the shard.
        """
        sums = {}
        for shard, stored in zip(self.shards, self._errors, strict=True):
            total = self._decoded(stored).to(self._device, copy=True)
            if self._replicas > 1:
                dist.all_reduce(total, group=self._group)
            sums[shard.name] = total.cpu()
        return sums

    @torch.no_grad()
    def load_error_feedback(self, sums: Mapping[str, Tensor]) -> None:
        """Go on from `errors`, of this or any other number of replicas: each takes an equal part.

        Args:
            sums: by name, (numel,) fp32. Shards that it lacks begin with 0; what is not compressed here is not used.
        """
        for shard, stored in zip(self.shards, self._errors, strict=True):
            if shard.name in sums:
                share = sums[shard.name].to(stored.device, torch.float32) / self._replicas
                stored.copy_(self._encoded(share))
            else:
                stored.zero_()

    # --- one residual block, step by step; each `yield` is a wait for the network

    def _reduce_bucket(self, numbers: list[int], pieces: Sequence[Tensor], outcome: Reduced) -> Generator[None]:
        shards = [self.shards[number] for number in numbers]
        own = [_is_finite(pieces[shard.piece]).to(self._device) for shard in shards]
        works = [self._add_errors(number, pieces) for number in numbers]
        columns, flat = self._factors([(shard.parts, shard.short, shard.rank) for shard in shards])
        for number, work, factor in zip(numbers, works, columns, strict=True):
            torch.bmm(work, self._fixed[number], out=factor)
        yield from self._sum(flat, self._config.p_scale_log2)
        bases, broken = [], []
        for factor in columns:
            basis, is_broken = orthonormal(factor, self._config.epsilon)
            bases.append(basis)
            broken.append(is_broken)
        rows, flat = self._factors([(shard.parts, shard.long, shard.rank) for shard in shards])
        for work, basis, factor in zip(works, bases, rows, strict=True):
            torch.bmm(work.transpose(1, 2), basis, out=factor)
        yield from self._sum(flat, self._config.q_scale_log2)
        for number, work, basis, is_broken, factor, is_own in zip(
            numbers, works, bases, broken, rows, own, strict=True
        ):
            square = factor.square().sum()
            is_broken = is_broken | ~square.isfinite()
            outcome.squares[number] = torch.where(is_broken, torch.where(is_own, math.inf, math.nan), square)
            outcome.overflowed[number] = is_broken
            mean = torch.bmm(basis, torch.where(is_broken, math.nan, factor).transpose(1, 2))
            outcome.zeroed[number] = self._keep_errors(number, work.sub_(mean, alpha=1 / self._replicas), is_broken)
            shard = self.shards[number]
            shard.matrices(pieces[shard.piece]).copy_(mean)

    def _add_errors(self, number: int, pieces: Sequence[Tensor]) -> Tensor:
        """E + g / K as fp32 matrices; in the gradient's own memory, where that has the format and place."""
        piece = pieces[self.shards[number].piece].to(self._device, torch.float32)
        sum_ = piece.div_(self._replicas).add_(self._decoded(self._errors[number]).to(self._device))
        return self.shards[number].matrices(sum_)

    def _keep_errors(self, number: int, left: Tensor, is_broken: Tensor) -> Tensor:
        """Store what is left over, unless the shard is broken; returns whether the error buffer was not finite."""
        shard, stored = self.shards[number], self._errors[number]
        kept = shard.matrices(self._decoded(stored).to(self._device))
        torch.where(is_broken, kept, left, out=kept)
        was_finite = _is_finite(kept)
        kept.masked_fill_(~was_finite, 0.0)
        shard.matrices(stored).copy_(self._encoded(kept))
        return ~was_finite

    def _factors(self, shapes: list[tuple[int, int, int]]) -> tuple[list[Tensor], Tensor]:
        """Matrices of these shapes in one piece of memory, and that."""
        flat = torch.empty(sum(math.prod(shape) for shape in shapes), device=self._device)
        pieces = flat.split([math.prod(shape) for shape in shapes])
        return [piece.view(shape) for piece, shape in zip(pieces, shapes, strict=True)], flat

    def _sum(self, flat: Tensor, scale_log2: int) -> Generator[None]:
        """Put sums over replicas in place of one replica's factors, with the same bits on all."""
        if self._replicas == 1:
            return
        if self._config.transport == "fp32":
            handle = dist.all_reduce(flat, group=self._group, async_op=True)
            yield
            handle.wait()
            return
        # No collective adds up codes: each replica gets one part of all replicas' factors, and all get all parts' sums. Views
        # as bytes, since process groups do not know int16.
        codes = torch.zeros(-(-flat.numel() // self._replicas) * self._replicas, dtype=torch.int16, device=flat.device)
        FLOAT_1_6_9.encode(flat.mul_(2.0**scale_log2), saturate=False, out=codes[: flat.numel()])
        received = torch.empty_like(codes)
        handle = dist.all_to_all_single(
            received.view(torch.uint8), codes.view(torch.uint8), group=self._group, async_op=True
        )
        yield
        handle.wait()
        own = FLOAT_1_6_9.encode(FLOAT_1_6_9.decode(received).view(self._replicas, -1).sum(0), saturate=False)
        handle = dist.all_gather_into_tensor(
            received.view(torch.uint8), own.view(torch.uint8), group=self._group, async_op=True
        )
        yield
        handle.wait()
        FLOAT_1_6_9.decode(received[: flat.numel()], out=flat).mul_(2.0**-scale_log2)

    def _decoded(self, stored: Tensor) -> Tensor:
        return stored if self._config.storage == "fp32" else FLOAT_1_6_9.decode(stored)

    def _encoded(self, values: Tensor) -> Tensor:
        return values if self._config.storage == "fp32" else FLOAT_1_6_9.encode(values)


def orthonormal(factor: Tensor, epsilon: float) -> tuple[Tensor, Tensor]:
    """Orthonormal columns that span those of P + εI (DALL·E App. E.2).

    By Householder's reflections, which is what `torch.linalg.qr` is on CPUs (LAPACK) and GPUs (cuSOLVER): its columns are
    orthonormal to rounding, however nearly those of P depend on each other. (Gram-Schmidt's were not stable in the paper.)
    P is first divided by its greatest element: ε then means the same to gradients of any size.

    Args:
        factor: P, (parts, n, rank) fp32, with rank ≤ n.
        epsilon: on the diagonal.

    Returns:
        (parts, n, rank); and () bool, whether P is not finite, in which case it is taken to be 0.
    """
    is_broken = ~_is_finite(factor)
    greatest = factor.abs().amax()
    smallest = torch.finfo(torch.float32).tiny
    unit = torch.where(is_broken, 0.0, factor / greatest.clamp_min(smallest))
    unit.diagonal(dim1=-2, dim2=-1).add_(epsilon)
    return torch.linalg.qr(unit).Q, is_broken


def in_turns(jobs: Iterable[Generator[None]]) -> None:
    """Run jobs that stop where they wait for the network, so that they overlap.

    In every turn one more job begins and all those under way go on to their next stop, the latest first: what was begun
    earlier has crossed meanwhile. The order is a matter of the jobs alone, and so the same on all processes.
    """
    waiting = iter(jobs)
    running: list[Generator[None]] = []
    while True:
        begun = next(waiting, None)
        if begun is not None:
            running.insert(0, begun)
        elif not running:
            return
        running = [job for job in running if next(job, _END) is not _END]


_END = object()


def _is_finite(values: Tensor) -> Tensor:
    """() bool, whether all values are; in one pass, since the extremes are NaN where any value is."""
    lowest, highest = values.aminmax()
    return lowest.isfinite() & highest.isfinite()


def _gaussian(shard: MatrixShard, seed: int) -> Tensor:
    """Q₀: (parts, long, rank) fp32, drawn on the CPU, whatever the run's device."""
    shape = (shard.parts, shard.long, shard.rank)
    digest = hashlib.sha256(f"{seed} {shard.name} {shard.place} {shape}".encode()).digest()
    generator = torch.Generator().manual_seed(int.from_bytes(digest[:8], "little") // 2)
    return torch.randn(shape, generator=generator)
