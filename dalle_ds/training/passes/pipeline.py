"""Passes through the stages of a pipeline."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from typing import Any

import torch
import torch.distributed as dist
from deepspeed.runtime.pipe.schedule import ForwardPass, OptimizerStep
from torch import Tensor, nn

from dalle_ds.parallel import Mesh
from dalle_ds.tasks import Batch, Metrics
from dalle_ds.tasks.layered import LayeredTask
from dalle_ds.training.passes.base import Passes


class PipelinePasses(Passes):
    """Micro-batches that stages work on at the same time, by DeepSpeed's schedule (one forward, one backward)."""

    def __init__(self, task: LayeredTask[Any], engine: Any, mesh: Mesh) -> None:
        super().__init__(task, engine)
        self._mesh, self._layered = mesh, task
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
        return self._infer

    def backward(self, micro_batches: Sequence[Batch], step: int) -> list[Metrics]:
        engine = self._engine
        self._reported, self._number = [], step
        engine.set_dataiterator(self._inputs_and_batches(micro_batches))
        engine.module.train()
        engine.total_loss, engine._compute_loss = None, True
        engine._exec_schedule(engine._train_schedule())
        return self._shared(len(micro_batches))

    def step(self) -> None:
        self._engine._exec_optimizer_step()

    def _inputs_and_batches(self, micro_batches: Sequence[Batch]) -> Iterator[tuple[tuple[Tensor, ...], Batch]]:
        for batch in micro_batches:
            yield self._layered.inputs(batch), batch

    def _loss(self, output: Any, batch: Batch) -> Tensor:
        """The last stage's loss, once the last layer has returned `output`."""
        loss, metrics = self._task.loss(_Known(output), batch, self._number)
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
        pieces = iter(flat.split(sizes * count))
        return [{name: next(pieces).view(shape) for name, shape in self._names} for _ in range(count)]

    def _infer(self, *inputs: Tensor) -> Any:
        return self._engine.module.infer(inputs)


class _Known(nn.Module):
    """Stands for a model whose output is known already."""

    def __init__(self, output: Any) -> None:
        super().__init__()
        self._output = output

    def forward(self, *_inputs: Any, **_options: Any) -> Any:
        return self._output
