"""Gradients of a loss over the whole batch of an update, in memory for one micro-batch (GradCache, arXiv 2101.06983).

Embeddings of all micro-batches are computed without a graph, then the loss over all of them and its gradient with respect
to them; then each micro-batch once more, with a graph, through which its embeddings' gradients flow back. That is the exact
gradient for one more forward pass.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from dalle_ds.parallel import Mesh
from dalle_ds.parallel.peers import Peers
from dalle_ds.tasks import Batch, Metrics
from dalle_ds.tasks.whole_batch import Outputs, WholeBatchTask
from dalle_ds.training.passes.base import EnginePasses
from dalle_ds.training.randomness import Generators


class CachingPasses(EnginePasses):
    """Passes of a `WholeBatchTask`; an update of one micro-batch is computed without a cache.

    Args:
        task: turns rows into embeddings, and all of them into a loss.
        engine: from `build_engine`.
        mesh: whose data-parallel processes share out the batch.
    """

    _task: WholeBatchTask[Any]

    def __init__(self, task: WholeBatchTask[Any], engine: Any, mesh: Mesh) -> None:
        super().__init__(task, engine)
        self._peers = Peers(mesh.index("data"), mesh.size("data"), mesh.group("data"))

    def backward(self, micro_batches: Sequence[Batch], step: int) -> list[Metrics]:
        if len(micro_batches) == 1:
            loss, metrics = self._task.loss_of(self._task.embed(self._engine, micro_batches[0]), self._peers)
            self._engine.backward(loss)
            return [{"loss": loss.detach(), **metrics}]
        outputs: list[Outputs] = []
        generators: list[Generators] = []
        with torch.no_grad():
            for batch in micro_batches:
                self.pulse()
                generators.append(Generators.now())
                outputs.append(self._task.embed(self._engine, batch))
        whole = {name: _joined([output[name] for output in outputs]).requires_grad_() for name in outputs[0]}
        loss, metrics = self._task.loss_of(whole, self._peers)
        gradients = dict(zip(whole, torch.autograd.grad(loss, list(whole.values())), strict=True))
        for number, batch in enumerate(micro_batches):
            self.pulse()
            generators[number].restore()
            again = self._task.embed(self._engine, batch)
            # Its gradient with respect to the weights is the loss's through these rows.
            through = sum(
                (value * part_of(gradients[name], number, len(micro_batches))).sum() for name, value in again.items()
            )
            self._engine.backward(through, scale_wrt_gas=False)
            if number + 1 < len(micro_batches):
                self._engine.step()  # not yet: DeepSpeed counts micro-batches
        # Of vectors, which are summed, each micro-batch reports a part.
        count = len(micro_batches)
        metrics = {name: value / count if value.ndim else value for name, value in metrics.items()}
        return [{"loss": loss.detach(), **metrics} for _ in micro_batches]


def _joined(values: Sequence[Tensor]) -> Tensor:
    """Of all micro-batches: their rows one after another, or what is the same for all."""
    return torch.cat(list(values)) if values[0].ndim else values[0]


def part_of(gradient: Tensor, number: int, count: int) -> Tensor:
    """Of a gradient of what `_joined` returned, micro-batch `number`'s part; what all share is shared out."""
    return gradient.chunk(count)[number] if gradient.ndim else gradient / count
