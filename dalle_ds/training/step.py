"""One update: forward and backward passes, one look at the gradients of all processes, a decision, and its application."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from dalle_ds.config import OptimConfig
from dalle_ds.optim import AdamW, WeightAverage
from dalle_ds.parallel import Mesh
from dalle_ds.precision import GradientScales
from dalle_ds.tasks import Batch, Metrics
from dalle_ds.training.exponents import NumericsReport
from dalle_ds.training.replicas import ReplicaReduction
from dalle_ds.training.strategies import StepStrategy
from dalle_ds.training.zero_state import GroupLayout, MasterGradients

COUNTED = ("skipped", "truncated")
"""Parts of a batch that count events: rows that could not be read, captions that were cut."""


@dataclass(frozen=True)
class Decision:
    """What to do with an update's gradients, the same on every process."""

    applied: bool
    """Whether weights are changed, at least those of most blocks."""
    finite: bool
    """Whether loss and gradients are finite, or not so only in residual blocks whose scales can still be lowered."""
    skipped_groups: frozenset[int]
    """Parameter groups, by their numbers in the whole model, that an applied update leaves as they are."""
    overflowed_blocks: frozenset[int]
    """Residual blocks whose gradient scales are to be lowered."""
    compression_overflows: int
    """Parameter groups whose compressed gradients left their format."""
    grad_norm: float
    """Of all groups that are not skipped, before clipping."""
    clip_factor: float
    """What all gradients are multiplied by."""


def decide(
    loss: float,
    squares: Sequence[float],
    blocks: Sequence[int | None],
    *,
    clip: float | None = None,
    at_floor: Callable[[int], bool] | None = None,
    skips_blocks: bool = False,
    compresses: bool = False,
) -> Decision:
    """Decide whether an update is applied, to which parameter groups, and how much its gradients are clipped.

    An update whose loss or gradients are not finite changes nothing. Where gradients are scaled, the residual blocks
    concerned are told apart, so that their scales can be lowered and, with `skips_blocks`, all other blocks updated.

    Args:
        loss: mean over the whole batch.
        squares: squared gradient norm of every parameter group of the model: not finite where the gradient is not; infinite
            where a compressed gradient was finite and its factors are not.
        blocks: the residual block of every parameter group of the model, or None.
        clip: the largest global norm; None does not clip.
        at_floor: whether the gradient scale of a block cannot be lowered; None where gradients are not scaled.
        skips_blocks: whether a block that overflowed is left out instead of the update.
        compresses: whether gradients crossed as factors, whose own overflow no gradient scale is to blame for.
    """
    broken = {group for group, square in enumerate(squares) if not math.isfinite(square)}
    factors_broken = {group for group in broken if compresses and math.isinf(squares[group])}
    concerned = {blocks[group] for group in broken - factors_broken}
    overflowed = frozenset(block for block in concerned if block is not None)
    finite = math.isfinite(loss) and not factors_broken
    if at_floor is None:
        finite = finite and not broken
    else:
        finite = finite and None not in concerned and not any(map(at_floor, overflowed))
    skipped: frozenset[int] = frozenset()
    if broken and finite and skips_blocks:
        skipped = frozenset(group for group, block in enumerate(blocks) if block in overflowed)
    norm = math.sqrt(sum(square for group, square in enumerate(squares) if group not in skipped))
    return Decision(
        applied=finite and broken <= skipped and len(skipped) < len(blocks),
        finite=finite,
        skipped_groups=skipped,
        overflowed_blocks=overflowed if finite else frozenset(),
        compression_overflows=len(factors_broken),
        grad_norm=norm,
        clip_factor=clip / (norm + 1e-6) if clip is not None and norm > clip else 1.0,
    )


@dataclass(frozen=True)
class StepResult:
    """What an update came to, the same on every process."""

    metrics: dict[str, float]
    """To report; of `COUNTED`, the sums over this update."""
    decision: Decision
    flags: tuple[float, ...]
    """Sums over all processes of the numbers that they gave to `TrainStep.run`."""


class TrainStep:
    """Makes updates on an engine.

    `scales` are those of the residual blocks, and None where gradients are not scaled; `average` is told before weights
    change; `replicas` is None where there is one.
    """

    def __init__(
        self,
        strategy: StepStrategy,
        mesh: Mesh,
        optim: OptimConfig,
        *,
        scales: GradientScales | None = None,
        average: WeightAverage | None = None,
        numerics: NumericsReport | None = None,
        replicas: ReplicaReduction | None = None,
    ) -> None:
        self._task, self._engine, self._strategy = strategy.task, strategy.engine, strategy
        self._mesh, self._optim = mesh, optim
        self._scales, self._average, self._numerics, self._replicas = scales, average, numerics, replicas
        self._optimizer: AdamW = self._engine.client_optimizer
        self._gradients = MasterGradients(self._engine)
        self._layout = GroupLayout(self._optimizer.param_groups, self._gradients.sharded, mesh)

    def run(self, micro_batches: Sequence[Batch], step: int, rate: float, flags: Sequence[float] = ()) -> StepResult:
        """Make update `step`, counted from 0, at learning rate `rate`. Collective.

        Args:
            flags: numbers to add up over all processes on the way, as many on each; they change nothing here.
        """
        self._set_loss_scales(micro_batches)
        for group in self._optimizer.param_groups:
            group["lr"] = rate
        reported = self._strategy.backward(micro_batches, step)
        for batch, own in zip(micro_batches, reported, strict=True):
            own |= {name: batch[name].sum().float() for name in COUNTED if name in batch}
        squares_here = self._gradients.squared_norms() if self._replicas is None else self._replicas.reduce()
        found, squares, agreed = self._agree(reported, squares_here, flags)
        if self._numerics is not None:
            self._numerics.note(step, self._gradients, self._layout)
        decision = decide(
            found["loss"],
            squares,
            self._layout.blocks,
            clip=self._optim.clip,
            at_floor=None if self._scales is None else self._scales.at_floor,
            skips_blocks=self._scales is not None and self._scales.config.skip == "block",
            compresses=self._replicas is not None and self._replicas.compresses,
        )
        self._apply(decision)
        metrics = found | {"lr": rate, "grad_norm": decision.grad_norm}
        if decision.applied:
            metrics["grad_norm_clipped"] = decision.grad_norm * decision.clip_factor
        if decision.compression_overflows:
            metrics["powersgd_overflows"] = float(decision.compression_overflows)
        if self._scales is not None:
            metrics |= self._scales.metrics()
        return StepResult(metrics, decision, agreed)

    def _apply(self, decision: Decision) -> None:
        """Change weights, moments, gradient scales and compression's error-feedback buffers as decided. Collective."""
        # Of the groups that this process has, those whose gradients are used and not.
        groups = set(range(len(self._layout.numbers)))
        unused = {own for own in groups if self._layout.numbers[own] in decision.skipped_groups}
        unused = unused if decision.applied else groups
        if self._replicas is not None:
            self._replicas.restore_error_feedback(unused)
        self._gradients.clear(unused)
        if decision.applied and decision.clip_factor != 1:
            self._gradients.scale(decision.clip_factor)
        if self._average is not None:
            self._average.before_step()
        with self._optimizer.updating(groups - unused, gradient_bound=decision.grad_norm * decision.clip_factor):
            self._strategy.step()
        overflow = getattr(self._engine.optimizer, "overflow", False)
        assert not (decision.applied and overflow), "DeepSpeed left out a good update"
        if self._scales is not None:
            self._scales.update(decision.overflowed_blocks, decision.applied)

    def _set_loss_scales(self, micro_batches: Sequence[Batch]) -> None:
        """Give each micro-batch what its loss counts in the mean over the whole batch; see `Task.loss`."""
        own = torch.stack([self._task.num_items(batch).float() for batch in micro_batches])
        total = self._mesh.sum(own.sum()).clamp_min(1)
        count = len(micro_batches) * self._mesh.size("data")
        for batch, num_items in zip(micro_batches, own, strict=True):
            batch["loss_scale"] = num_items * count / total

    def _agree(
        self, reported: list[Metrics], squares_here: Tensor, flags: Sequence[float]
    ) -> tuple[dict[str, float], list[float], tuple[float, ...]]:
        """In one reduction: one number per metric, the squared gradient norm of every parameter group, and the flags.

        Scalars are averaged over micro-batches and ranks, counts summed; vectors are summed and given to the task.
        """
        size = len(reported) * self._mesh.size("data")
        own = [torch.stack([m[name].float() for m in reported]).sum(0).flatten() for name in reported[0]]
        own = [part / self._mesh.size("model") for part in own]  # all processes of a model have the same
        squares = self._layout.spread(squares_here)
        # To the host in one piece: a GPU is waited for once. Flags are filled in on the device: a copy to it would wait for
        # the backward pass.
        flagged = torch.stack([squares.new_full((), flag) for flag in flags]) if flags else squares.new_empty(0)
        sizes = [part.numel() for part in [*own, squares, flagged]]
        *parts, flagged = self._mesh.sum(torch.cat([*own, squares, flagged]), "world").cpu().split(sizes)
        sums: dict[str, Tensor] = dict(zip(reported[0], parts, strict=False))
        metrics: dict[str, float] = {}
        for name, value in reported[0].items():
            if value.ndim == 0:
                metrics[name] = float(sums.pop(name)) / (1 if name in COUNTED else size)
        return metrics | self._task.digest(sums), parts[-1].tolist(), tuple(flagged.tolist())
