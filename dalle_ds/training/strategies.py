"""Step strategies: how an engine computes the gradients of an update.

PlainStrategy     micro-batch after micro-batch through a model that is all here
CachedStrategy    a loss over the whole batch, in memory for one micro-batch (GradCache, arXiv 2101.06983)
SharpStrategy     the same, sharpness-aware (`sharpness.py`)
PipelineStrategy  micro-batches in several stages of the model at the same time
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from dalle_ds.parallel import Mesh
from dalle_ds.parallel.peers import Peers
from dalle_ds.tasks import Batch, Metrics, Task
from dalle_ds.tasks.base import ContrastiveTask, Outputs, PipelineTask
from dalle_ds.training.randomness import draw_again_from, generator_states


class StepStrategy(ABC):
    """How an engine from `build_engine` computes gradients of its task."""

    def __init__(self, task: Task[Any], engine: Any) -> None:
        self.task, self.engine = task, engine
        self.pulse: Callable[[], None] = lambda: None
        """Called before each micro-batch's part of the work: a long update is no hang."""

    @property
    def model(self) -> Callable[..., Any]:
        """Called as the plain model is, without gradients, by all processes of a model at a time."""
        return self.engine

    @abstractmethod
    def backward(self, micro_batches: Sequence[Batch], step: int) -> list[Metrics]:
        """Leave the averaged gradients of update `step` in the engine; returns each micro-batch's loss and metrics."""

    def step(self) -> None:
        """Let the engine take its step."""
        self.engine.step()


def strategy_for(task: Task[Any], engine: Any, mesh: Mesh) -> StepStrategy:
    """The strategy that fits an engine and its task."""
    if mesh.size("pipe") > 1:
        assert isinstance(task, PipelineTask)
        return PipelineStrategy(task, engine, mesh)
    if not isinstance(task, ContrastiveTask):
        return PlainStrategy(task, engine)
    if task.sharpness is None:
        return CachedStrategy(task, engine, mesh)
    from dalle_ds.training.sharpness import SharpStrategy

    return SharpStrategy(task, engine, mesh)


class PlainStrategy(StepStrategy):
    """Micro-batch after micro-batch through a model that is all here."""

    def backward(self, micro_batches: Sequence[Batch], step: int) -> list[Metrics]:
        reported: list[Metrics] = []
        for batch in micro_batches:
            self.pulse()
            loss, metrics = self.task.loss(self.engine, batch, step)
            self.engine.backward(loss)
            reported.append({"loss": loss.detach(), **metrics})
            if len(reported) < len(micro_batches):
                self.engine.step()  # not yet: DeepSpeed counts micro-batches
        return reported


class CachedStrategy(StepStrategy):
    """The gradient of a loss over all rows of an update, with the activations of one micro-batch in memory.

    Embeddings of all micro-batches are computed without a graph, then the loss over all of them and its gradient with respect
    to them; then each micro-batch once more, with a graph, through which its embeddings' gradients flow back. That is the
    exact gradient for one more forward pass. An update of one micro-batch is computed without a cache.
    """

    task: ContrastiveTask[Any]

    def __init__(self, task: ContrastiveTask[Any], engine: Any, mesh: Mesh) -> None:
        super().__init__(task, engine)
        self._peers = Peers(mesh.index("data"), mesh.size("data"), mesh.group("data"))

    def backward(self, micro_batches: Sequence[Batch], step: int) -> list[Metrics]:
        count = len(micro_batches)
        if count == 1:
            loss, metrics = self.task.loss_of(self.task.embed(self.engine, micro_batches[0]), self._peers)
            self.engine.backward(loss)
            return [{"loss": loss.detach(), **metrics}]
        outputs: list[Outputs] = []
        drawn_from = []
        with torch.no_grad():
            for batch in micro_batches:
                self.pulse()
                drawn_from.append(generator_states())
                outputs.append(self.task.embed(self.engine, batch))
        whole = {}
        for name, value in outputs[0].items():  # rows of all micro-batches, or what is the same for all
            joined = torch.cat([output[name] for output in outputs]) if value.ndim else value
            whole[name] = joined.requires_grad_()
        loss, metrics = self.task.loss_of(whole, self._peers)
        gradients = dict(zip(whole, torch.autograd.grad(loss, list(whole.values())), strict=True))
        for number, batch in enumerate(micro_batches):
            self.pulse()
            draw_again_from(drawn_from[number])
            # Its gradient with respect to the weights is the loss's through these rows.
            through = product(self.task.embed(self.engine, batch), gradients, number, count)
            self.engine.backward(through, scale_wrt_gas=False)
            if number + 1 < count:
                self.engine.step()  # not yet: DeepSpeed counts micro-batches
        return in_parts(loss.detach(), metrics, count)


def product(outputs: Outputs, gradients: Outputs, number: int, count: int) -> Any:
    """The sum over elements of piece `number`'s outputs times their gradients, which are given for all `count` pieces: of
    what all have in common, each has an equal part."""
    total: Any = 0
    for name, value in outputs.items():
        gradient = gradients[name]
        total = total + (value * (gradient.chunk(count)[number] if gradient.ndim else gradient / count)).sum()
    return total


def in_parts(loss: Tensor, metrics: Metrics, count: int) -> list[Metrics]:
    """What each of `count` micro-batches reports of the whole batch: of vectors, which are summed, a part."""
    shared = {name: value / count if value.ndim else value for name, value in metrics.items()}
    return [{"loss": loss, **shared} for _ in range(count)]


class PipelineStrategy(StepStrategy):
    """Micro-batches that stages work on at the same time, by DeepSpeed's schedule (one forward, one backward)."""

    def __init__(self, task: PipelineTask[Any], engine: Any, mesh: Mesh) -> None:
        from deepspeed.runtime.pipe.schedule import ForwardPass, OptimizerStep

        super().__init__(task, engine)
        self._mesh, self._inputs = mesh, task.inputs
        self._reported: list[Metrics] = []
        self._names: list[tuple[str, torch.Size]] | None = None
        self._number = 0
        engine.module.loss_fn = self._loss
        # The schedule ends with a step; ours comes once we have looked at the gradients.
        forward = engine._INSTRUCTION_MAP[ForwardPass]

        def forward_alive(engine: Any, *arguments: Any, **options: Any) -> None:
            self.pulse()
            forward(engine, *arguments, **options)

        engine._INSTRUCTION_MAP = {
            **engine._INSTRUCTION_MAP,
            OptimizerStep: lambda _engine: None,
            ForwardPass: forward_alive,
        }

    @property
    def model(self) -> Callable[..., Any]:
        return lambda *inputs: self.engine.module.infer(inputs)

    def backward(self, micro_batches: Sequence[Batch], step: int) -> list[Metrics]:
        engine = self.engine
        self._reported, self._number = [], step
        engine.set_dataiterator(iter([(self._inputs(batch), batch) for batch in micro_batches]))
        engine.module.train()
        engine.total_loss, engine._compute_loss = None, True
        engine._exec_schedule(engine._train_schedule())
        return self._shared(len(micro_batches))

    def step(self) -> None:
        self.engine._exec_optimizer_step()

    def _loss(self, output: Any, batch: Batch) -> Tensor:
        """The last stage's loss, once the last layer has returned `output`, as the model would."""
        loss, metrics = self.task.loss(lambda *_, **__: output, batch, self._number)  # type: ignore[arg-type]
        self._reported.append({"loss": loss.detach(), **metrics})
        return loss

    def _shared(self, count: int) -> list[Metrics]:
        """The metrics that the last stage has, on every stage."""
        last, group = self._mesh.ranks("pipe")[-1], self._mesh.group("pipe")
        if self._names is None:
            names = [[(name, value.shape) for name, value in self._reported[0].items()] if self._reported else None]
            dist.broadcast_object_list(names, src=last, group=group, device=self._mesh.device)
            self._names = names[0]
        assert self._names is not None
        sizes = [shape.numel() for _, shape in self._names]
        if self._reported:
            flat = torch.cat([m[name].float().flatten() for m in self._reported for name, _ in self._names])
        else:
            flat = torch.empty(count * sum(sizes), device=self._mesh.device)
        dist.broadcast(flat, src=last, group=group)
        values: Iterator[Tensor] = iter(flat.split(sizes * count))
        return [{name: next(values).view(shape) for name, shape in self._names} for _ in range(count)]
