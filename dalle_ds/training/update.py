"""One update: forward and backward passes, one look at the gradients of all processes, then the step or none."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from dalle_ds.config import OptimConfig, ScalingConfig
from dalle_ds.optim import AdamW, WeightAverage
from dalle_ds.parallel import Mesh
from dalle_ds.precision import GradientScales
from dalle_ds.tasks import Batch, Metrics, Task
from dalle_ds.training.gradients import GroupLayout, MasterGradients
from dalle_ds.training.numerics import NumericsReport
from dalle_ds.training.passes import Passes
from dalle_ds.training.replicas import ReplicaReduction

COUNTED = ("skipped", "truncated")
"""Parts of a batch that count events: rows that could not be read, captions that were cut."""


@dataclass(frozen=True)
class Outcome:
    """What an update came to, the same on every process."""

    figures: dict[str, float]
    """To report; of `COUNTED`, the sums over this update."""
    applied: bool
    """Whether weights were changed, at least those of most blocks."""
    finite: bool
    """Whether loss and gradients were finite, or not so only in residual blocks whose scales can still be lowered."""
    flags: tuple[float, ...]
    """Sums over all processes of the numbers that they gave to `update`."""


class Updater:
    """Makes updates on an engine.

    Nothing is changed by an update whose loss or gradients are not finite on some process: neither weights nor moments.
    Where gradients are scaled, the blocks concerned are told apart, and their scales lowered (`GradientScales`).

    Args:
        task: turns batches into losses.
        engine: from `build_engine`.
        passes: the engine's.
        mesh: the processes of the run.
        optim: clipping.
        scales: of the residual blocks, or None where gradients are not scaled.
        scaling: what to skip.
        average: told before weights change.
        numerics: asked for histograms of gradients.
        replicas: averages gradients over replicas; None where there is one.
    """

    def __init__(
        self,
        task: Task[Any],
        engine: Any,
        passes: Passes,
        mesh: Mesh,
        optim: OptimConfig,
        *,
        scales: GradientScales | None,
        scaling: ScalingConfig | None,
        average: WeightAverage | None,
        numerics: NumericsReport | None,
        replicas: ReplicaReduction | None,
    ) -> None:
        self._task, self._engine, self._passes, self._mesh, self._optim = task, engine, passes, mesh, optim
        self._scales, self._scaling, self._average, self._numerics = scales, scaling, average, numerics
        self._optimizer: AdamW = engine.client_optimizer
        self._gradients = MasterGradients(engine)
        self._replicas = replicas
        self._layout = GroupLayout(self._optimizer.param_groups, self._gradients.sharded, mesh)

    def update(self, micro_batches: Sequence[Batch], step: int, rate: float, flags: Sequence[float] = ()) -> Outcome:
        """Make update `step`, counted from 0, at learning rate `rate`. Collective.

        Args:
            flags: numbers to add up over all processes on the way, as many on each; they change nothing here.
        """
        self._set_shares(micro_batches)
        for group in self._optimizer.param_groups:
            group["lr"] = rate
        reported = self._passes.backward(micro_batches, step)
        for batch, metrics in zip(micro_batches, reported, strict=True):
            metrics |= {name: batch[name].sum().float() for name in COUNTED if name in batch}
        squares_here = self._gradients.squared_norms() if self._replicas is None else self._replicas.reduce()
        figures, squares, agreed = self._agree(reported, squares_here, flags)
        figures["lr"] = rate
        if self._numerics is not None:
            self._numerics.note(step, self._gradients, self._layout)
        return self._step(figures, squares, agreed)

    def _step(self, figures: dict[str, float], squares: list[float], flags: tuple[float, ...]) -> Outcome:
        """Decide from the squared norms of all parameter groups, and clip, step or leave it."""
        broken = {index for index, square in enumerate(squares) if not math.isfinite(square)}
        block_of = self._layout.blocks
        compressed = self._replicas is not None and self._replicas.compresses
        # Finite gradients that their compressed form cannot hold: no gradient scale is to blame.
        unheld = {index for index in broken if compressed and math.isinf(squares[index])}
        blocks = {block_of[index] for index in broken - unheld}
        overflowed = frozenset(block for block in blocks if block is not None)
        finite = math.isfinite(figures["loss"]) and not unheld
        if self._scales is None:
            finite = finite and not broken
        else:
            finite = finite and None not in blocks and not any(map(self._scales.at_floor, overflowed))
        left_out: set[int] = set()
        if broken and finite and self._scaling is not None and self._scaling.skip == "block":
            left_out = {index for index, block in enumerate(block_of) if block in overflowed}
        applied = finite and broken <= left_out and len(left_out) < len(squares)
        norm = math.sqrt(sum(square for index, square in enumerate(squares) if index not in left_out))
        figures["grad_norm"] = norm
        if unheld:
            figures["powersgd_overflows"] = float(len(unheld))
        numbers = self._layout.numbers  # of the groups that this process has
        unused = {own for own, number in enumerate(numbers) if not applied or number in left_out}
        if self._replicas is not None:
            self._replicas.give_back(unused)
        self._gradients.clear(unused)
        if applied:
            figures["grad_norm_clipped"] = self._clip(norm)
        if self._average is not None:
            self._average.before_step()
        self._optimizer.skip = not applied
        for number, group in zip(numbers, self._optimizer.param_groups, strict=True):
            group["skip"] = number in left_out
        self._passes.step()
        assert not (applied and getattr(self._engine.optimizer, "overflow", False)), "DeepSpeed left out a good update"
        if self._scales is not None:
            self._scales.update(overflowed if finite else (), applied)
            figures |= self._scales.figures()
        return Outcome(figures, applied, finite, flags)

    def _clip(self, norm: float) -> float:
        """Clip all gradients by their global norm; returns what the norm is then."""
        clip = self._optim.clip
        clipped = norm
        if clip is not None and norm > clip:
            factor = clip / (norm + 1e-6)
            self._gradients.scale(factor)
            clipped = norm * factor
        self._optimizer.gradient_bound = clipped
        return clipped

    def _set_shares(self, micro_batches: Sequence[Batch]) -> None:
        """Give each micro-batch its share in the mean over the whole batch; see `Task.loss`."""
        own = torch.stack([self._task.weight_of(batch).float() for batch in micro_batches])
        total = self._mesh.sum(own.sum()).clamp_min(1)
        count = len(micro_batches) * self._mesh.size("data")
        for batch, weight in zip(micro_batches, own, strict=True):
            batch["share"] = weight * count / total

    def _agree(
        self, reported: list[Metrics], squares_here: Tensor, flags: Sequence[float]
    ) -> tuple[dict[str, float], list[float], tuple[float, ...]]:
        """In one reduction: one number per figure, the squared gradient norm of every parameter group, and the flags.

        Scalars are averaged over micro-batches and ranks, counts summed; vectors are summed and given to the task.
        """
        size = len(reported) * self._mesh.size("data")
        own = [torch.stack([m[name].float() for m in reported]).sum(0).flatten() for name in reported[0]]
        own = [part / self._mesh.size("model") for part in own]  # all processes of a model have the same
        squares = self._layout.spread(squares_here)
        # To the host in one piece: a GPU is waited for once.
        # Filled in on the device: a copy to it would wait for the backward pass.
        flagged = torch.stack([squares.new_full((), flag) for flag in flags]) if flags else squares.new_empty(0)
        sizes = [part.numel() for part in [*own, squares, flagged]]
        *parts, flagged = self._mesh.sum(torch.cat([*own, squares, flagged]), "world").cpu().split(sizes)
        sums: dict[str, Tensor] = dict(zip(reported[0], parts, strict=False))
        figures: dict[str, float] = {}
        for name, value in reported[0].items():
            if value.ndim == 0:
                figures[name] = float(sums.pop(name)) / (1 if name in COUNTED else size)
        return figures | self._task.digest(sums), parts[-1].tolist(), tuple(flagged.tolist())
