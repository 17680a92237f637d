"""Sharpness-aware minimization (SAM, arXiv 2010.01412): the gradient where the loss nearby is highest, to first order.

An update computes the gradient g, moves the weights by ρ · g / ‖g‖, computes the gradient there, moves them back and steps
with that. g is the mean over the processes that share one set of weights: each replica has its own perturbation, as in
unCLIP App. C.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from dalle_ds.optim import WeightAverage
from dalle_ds.parallel import Mesh
from dalle_ds.tasks import Batch, Metrics
from dalle_ds.training.gradients import MasterGradients
from dalle_ds.training.passes.base import Passes
from dalle_ds.training.randomness import Generators
from dalle_ds.training.weights import MasterWeights


class SharpPasses(Passes):
    """Passes that leave the gradient at perturbed weights; the weights themselves are as before, bit for bit.

    Where a gradient is not finite on some process, it is left as it is, and nobody makes a second pass.

    Args:
        passes: the engine's.
        engine: from `build_engine`.
        mesh: divided as the engine is.
        rho: ρ, length of the perturbation.
        average: told before weights change.
    """

    def __init__(
        self, passes: Passes, engine: Any, mesh: Mesh, rho: float, average: WeightAverage | None = None
    ) -> None:
        self._passes, self._engine, self._mesh, self._rho, self._average = passes, engine, mesh, rho, average
        self._weights, self._gradients = MasterWeights(engine), MasterGradients(engine)

    @property
    def model(self) -> Callable[..., Any]:
        return self._passes.model

    def backward(self, micro_batches: Sequence[Batch], step: int) -> list[Metrics]:
        """As `Passes.backward`; losses and metrics are those of the weights as they are, and "sharpness" is what the
        perturbation adds to the loss."""
        generators = Generators.now()
        reported = self._passes.backward(micro_batches, step)
        norm = self._norm()
        if not math.isfinite(norm):
            return reported
        kept = [shard.detach().clone() for shard in self._weights.shards]
        if self._average is not None:
            self._average.before_step()
        self._perturb(self._rho / (norm + 1e-12))
        self._publish()
        generators.restore()
        perturbed = self._passes.backward(micro_batches, step)
        with torch.no_grad():
            torch._foreach_copy_([shard.detach() for shard in self._weights.shards], kept)
        # The step, which follows even where it changes nothing, brings the module's weights in line with these.
        return [
            {**metrics, "sharpness": there["loss"] - metrics["loss"]}
            for metrics, there in zip(reported, perturbed, strict=True)
        ]

    def step(self) -> None:
        self._passes.step()

    def _norm(self) -> float:
        """Of this replica's gradient; NaN if that of any replica is not finite. Collective."""
        square = self._gradients.squared_norms().sum()
        if self._gradients.sharded:
            square = self._mesh.sum(square, "shard")
        # One that is not finite makes all sums so.
        everywhere = self._mesh.sum(square, "world")
        own, total = torch.stack([square.to(everywhere.device), everywhere]).tolist()
        return math.sqrt(own) if math.isfinite(total) else math.nan

    @torch.no_grad()
    def _perturb(self, factor: float) -> None:
        weights, gradients = matched(self._weights, self._gradients)
        moves = [gradient.to(weight.device, weight.dtype) for weight, gradient in zip(weights, gradients, strict=True)]
        torch._foreach_add_(weights, moves, alpha=factor)

    def _publish(self) -> None:
        """Bring the module's weights in line with the perturbed ones, and forget the gradient.

        A step in which the optimizer does nothing is all of that, at every ZeRO stage.
        """
        engine = self._engine
        counted = engine.global_steps, engine.global_samples
        self._gradients.clear(range(len(engine.client_optimizer.param_groups)))
        engine.client_optimizer.skip = True
        self._passes.step()
        engine.global_steps, engine.global_samples = counted  # it was no update


def matched(weights: MasterWeights, gradients: MasterGradients) -> tuple[list[Tensor], list[Tensor]]:
    """This process's fp32 weights in pieces, 1-D views, and the gradient of each.

    Of every parameter group, both lie end to end in the same order, however they are cut; only weights have padding.
    """
    pieces: list[Tensor] = []
    theirs: list[Tensor] = []
    shards = list(zip(weights.shards, weights.group_of, strict=True))
    for number, group in enumerate(gradients.groups()):
        waiting = [piece.reshape(-1) for piece in reversed(group)]
        for shard, owner in shards:
            rest = shard.detach().view(-1)[: shard.numel() if owner == number else 0]
            while len(rest) and waiting:
                length = min(len(rest), len(waiting[-1]))
                pieces.append(rest[:length])
                theirs.append(waiting[-1][:length])
                rest, waiting[-1] = rest[length:], waiting[-1][length:]
                if not len(waiting[-1]):
                    waiting.pop()
        assert not waiting, "gradients without weights"
    return pieces, theirs
