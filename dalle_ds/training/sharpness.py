"""Sharpness-aware minimization (SAM, arXiv 2010.01412): the gradient where the loss nearby is highest, to first order.

The pairs of an update are divided into G groups of consecutive ones, each of which stands for one of the paper's replicas
(unCLIP App. C: 64 pairs). Let L(w_1, …, w_G) be the loss of the whole batch where the pairs of group g are embedded with
weights of their own, w_g. With all of them at w, a group's ascent gradient is a_g = ∂L/∂w_g, and its perturbed weights are
w + ρ · a_g / ‖a_g‖. The update's gradient is the sum of all ∂L/∂w_g at all perturbed weights: negatives come from every group.

All groups pull at the one logit scale alike: its part of every ∂L/∂w_g is the whole batch's, divided by G.

Perturbed weights are in a second, plain module on each process. That makes a perturbation local, so that how the run is
divided changes nothing. Engines see one backward pass, of the finished gradient; their own weights are never moved.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor
from torch.autograd.function import once_differentiable

from dalle_ds.data.order import hash_integers
from dalle_ds.parallel import Mesh
from dalle_ds.tasks import Batch, Metrics
from dalle_ds.tasks.base import ContrastiveTask, Outputs
from dalle_ds.training.randomness import draw_again_from, generator_states
from dalle_ds.training.strategies import CachedStrategy, in_parts, product


class SharpStrategy(CachedStrategy):
    """Leaves the gradient at perturbed weights; what is not finite in one group makes the whole gradient so.

    ConfigError where groups do not fit the micro-batches of these processes.
    """

    def __init__(self, task: ContrastiveTask[Any], engine: Any, mesh: Mesh) -> None:
        super().__init__(task, engine, mesh)
        sharpness, batch = task.sharpness, task.run.train.batch_size
        micro_batch = engine.train_micro_batch_size_per_gpu()
        assert sharpness is not None and sharpness.rho is not None
        self._rho = sharpness.rho
        self._span = sharpness.span(batch, micro_batch, mesh.size("data"))
        pairs = sharpness.pairs or batch
        self._rows = min(pairs, micro_batch)
        self._pairs, self._micro_batch, self._seed = pairs, micro_batch, task.run.seed
        self._pieces = pairs // (self._rows * self._span)
        self._group = _neighbours(mesh, self._span)
        self._moved = task.build_model().to(engine.device, next(engine.module.parameters()).dtype)
        self._weights = list(self._moved.parameters())
        # One backward pass per update, whatever the number of micro-batches.
        engine.set_gradient_accumulation_boundary(True)

    def backward(self, micro_batches: Sequence[Batch], step: int) -> list[Metrics]:
        """As `StepStrategy.backward`; losses and metrics are those of the weights as they are, and "sharpness" is what the
        perturbation adds to the loss."""
        pieces = [piece for batch in micro_batches for piece in _cut(batch, self._rows)]
        groups = [range(first, first + self._pieces) for first in range(0, len(pieces), self._pieces)]
        alone = len(pieces) == 1
        drawn_from: list[tuple[Tensor, Tensor | None]] = []

        def embed(number: int) -> Outputs:
            """A piece, at the weights as they are moved; with the same noise every time."""
            self.pulse()
            if len(drawn_from) == number:
                drawn_from.append(generator_states())
            draw_again_from(drawn_from[number])
            return self.task.embed(self._moved, pieces[number])

        def through(group: range, known: Sequence[Outputs], cotangents: dict[str, Tensor]) -> list[Tensor]:
            """The gradient of a group's weights through its embeddings, whose gradients are given."""
            total = [torch.zeros_like(weight, dtype=torch.float32) for weight in self._weights]
            for number in group:
                inner = product(known[number] if alone else embed(number), cotangents, number, len(pieces))
                gradients = torch.autograd.grad(inner, self._weights, materialize_grads=True)
                torch._foreach_add_(total, [gradient.float() for gradient in gradients])
            return total

        def move(number: int) -> None:
            self._copy_weights()
            seed = hash_integers(self._seed, step, self._group_in_batch(groups[number].start))
            self._perturb(through(groups[number], outputs, here), seed)

        self._copy_weights()
        with torch.set_grad_enabled(alone):  # otherwise there is no room for what the backward pass needs
            outputs = [embed(number) for number in range(len(pieces))]
        loss, metrics, here = self._loss(outputs)
        there: list[Outputs] = []
        for number, group in enumerate(groups):
            move(number)
            with torch.set_grad_enabled(alone):
                there += [embed(piece) for piece in group]
        perturbed, _, cotangents = self._loss(there)
        total: list[Tensor] = []
        for number, group in enumerate(groups):
            if len(groups) > 1:
                move(number)
            gradient = through(group, there, cotangents)
            total = list(torch._foreach_add(total, gradient)) if total else gradient
        self._set_gradient(total)
        return in_parts(loss, {**metrics, "sharpness": perturbed - loss}, len(micro_batches))

    def _loss(self, outputs: Sequence[Outputs]) -> tuple[Tensor, Metrics, dict[str, Tensor]]:
        """Loss of the whole batch, metrics, and its gradient with respect to this process's rows. Collective."""
        common = {name for name, value in outputs[0].items() if value.ndim == 0}
        whole: dict[str, Tensor] = {}
        for name in outputs[0]:
            values = [output[name].detach() for output in outputs]
            # What all rows have in common, perturbed groups do not: a value for each row.
            whole[name] = torch.cat([v.expand(self._rows) if name in common else v for v in values]).requires_grad_()
        loss, metrics = self.task.loss_of(whole, self._peers)
        gradients = dict(zip(whole, torch.autograd.grad(loss, list(whole.values())), strict=True))
        return loss.detach(), metrics, {name: g.sum() if name in common else g for name, g in gradients.items()}

    def _group_in_batch(self, piece: int) -> int:
        """The number among all groups of the batch of the one that this process's piece is in."""
        micro_batch, place = divmod(piece * self._rows, self._micro_batch)
        position = (micro_batch * self._peers.size + self._peers.rank) * self._micro_batch + place
        return position // self._pairs

    def _copy_weights(self) -> None:
        """Put the weights as they are into the module. Collective."""
        with self._whole_weights() as weights, torch.no_grad():
            torch._foreach_copy_([mine.data for mine in self._weights], [weight.data for weight in weights])

    @torch.no_grad()
    def _perturb(self, ascent: list[Tensor], seed: int) -> None:
        """Move the module's weights by ρ along a group's ascent gradient, of which this process has a part; uses it up."""
        if self._span > 1:
            for gradient in ascent:
                dist.all_reduce(gradient, group=self._group)
        norm = torch.stack(torch._foreach_norm(ascent)).norm()
        generator = torch.Generator(ascent[0].device).manual_seed(seed >> 1)
        for weight, gradient in zip(self._weights, ascent, strict=True):
            exact = gradient.mul_(self._rho / (norm + 1e-12)).add_(weight)
            weight.data.copy_(exact if weight.dtype == torch.float32 else _rounded_at_random(exact, generator))

    def _set_gradient(self, gradient: list[Tensor]) -> None:
        """Let the engine take this process's gradient as that of a backward pass. Collective."""
        with self._whole_weights() as weights:
            loss = _KnownGradient.apply(self.engine._backward_prologue, gradient, *weights)
            self.engine.backward(loss, scale_wrt_gas=False)

    @contextmanager
    def _whole_weights(self) -> Iterator[list[torch.nn.Parameter]]:
        """The engine's parameters, with ZeRO-3 gathered from all processes."""
        from deepspeed import zero

        parameters = list(self.engine.module.parameters())
        with zero.GatheredParameters(parameters, enabled=self.engine.zero_optimization_stage() == 3):
            yield parameters


class _KnownGradient(torch.autograd.Function):
    """A loss whose gradient is known."""

    @staticmethod
    def forward(ctx: Any, begin: Any, gradients: list[Tensor], *weights: Tensor) -> Tensor:
        ctx.begin, ctx.gradients, ctx.dtype = begin, gradients, weights[0].dtype
        return gradients[0].new_zeros(())

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *_one: Tensor) -> tuple[Tensor | None, ...]:
        ctx.begin()  # which the engine's forward pass would have seen to
        return None, None, *(gradient.to(ctx.dtype) for gradient in ctx.gradients)


def _cut(batch: Batch, rows: int) -> list[Batch]:
    """Runs of so many rows."""
    count = len(batch["key"]) // rows
    parts = {name: value.chunk(count) if value.ndim else [value] * count for name, value in batch.items()}
    return [{name: values[number] for name, values in parts.items()} for number in range(count)]


def _neighbours(mesh: Mesh, span: int) -> Any:
    """The process group of those `span` data-parallel processes in a row that share a perturbation. Collective."""
    if span == mesh.size("data"):
        return mesh.group("data")
    ranks, found = mesh.ranks("data"), None
    for first in range(0, len(ranks) if span > 1 else 0, span):
        group = dist.new_group(ranks[first : first + span])  # every process must take part in making every group
        found = group if mesh.rank in ranks[first : first + span] else found
    return found


def _rounded_at_random(exact: Tensor, generator: torch.Generator) -> Tensor:
    """bf16, up or down at random and right in the mean: most of a perturbation is far less than half a step of bf16."""
    noise = torch.randint(2**16, exact.shape, generator=generator, device=exact.device, dtype=torch.int32)
    rounded = exact.view(torch.int32).add(noise).bitwise_and_(-(2**16)).view(torch.float32)
    return torch.where(exact.isfinite(), rounded, exact).bfloat16()  # noise would carry a NaN over to -0
