"""Pipeline parallelism on DeepSpeed's PipelineModule: each process holds a run of a model's layers."""

from __future__ import annotations

import io
from collections.abc import Sequence
from contextlib import redirect_stdout
from typing import Any

import torch
import torch.distributed as dist
from deepspeed.pipe import PipelineModule
from deepspeed.runtime.pipe.topology import PipeModelDataParallelTopology
from torch import Tensor, nn

from dalle_ds.parallel.mesh import Mesh
from dalle_ds.parallel.stages import PipelineLayer, balanced


class Pipeline(PipelineModule):
    """The layers of this process's stage.

    Every process draws the weights of all layers, one after the other, and keeps its own: a model starts from the same
    weights whatever the number of stages.

    Args:
        layers: of the whole model.
        mesh: with no more stages than layers.
    """

    def __init__(self, layers: Sequence[PipelineLayer], mesh: Mesh) -> None:
        self._bounds = balanced([layer.cost for layer in layers], mesh.size("pipe"))
        self._mesh = mesh
        stage = mesh.index("pipe")
        own = range(self._bounds[stage], self._bounds[stage + 1])
        built: list[nn.Module] = []
        for number, layer in enumerate(layers):
            module = _Layer(layer)
            built.append(module if number in own else nn.Identity())
        topology = PipeModelDataParallelTopology(
            num_pp=mesh.size("pipe"), num_mp=mesh.size("tensor"), num_dp=mesh.size("shard")
        )
        with redirect_stdout(io.StringIO()):  # tells of every layer
            super().__init__(layers=built, topology=topology)
        self._prefixes = [layer.name for layer in layers]

    def _partition_layers(self, method: str = "") -> None:
        """Called by DeepSpeed, whose own way would count parameters."""
        stage = self._mesh.index("pipe")
        self.parts = self._bounds
        self._set_bounds(start=self._bounds[stage], stop=self._bounds[stage + 1])

    @property
    def layers(self) -> list[nn.Module]:
        """The layers of this stage, in their order."""
        return [module.layer for module in self.forward_funcs]

    def plain_name(self, name: str) -> str:
        """The name in the plain model of a parameter that is called `name` here."""
        number, _, rest = name.split(".", 2)
        return self._prefixes[int(number)] + rest

    @torch.no_grad()
    def infer(self, inputs: Any) -> Any:
        """A forward pass through all stages, one after the other. Collective among the stages.

        Args:
            inputs: what the first layer takes, on every stage.

        Returns:
            What the last layer returns, a named tuple of tensors and None, on every stage.
        """
        stage, ranks = self._mesh.index("pipe"), self._mesh.ranks("pipe")
        values = inputs
        if stage > 0:
            values = tuple(_receive(self._described(None, ranks[stage - 1]), ranks[stage - 1], self._mesh.device))
        for layer in self.forward_funcs:
            values = layer(values)
        if stage + 1 < len(ranks):
            self._described(values, ranks[stage + 1])
            for tensor in values:
                dist.send(tensor.contiguous(), ranks[stage + 1])
        return self._from_last(values)

    def _described(self, values: Any, peer: int) -> Any:
        """Tell a neighbour the shapes and types of the tensors that follow, or be told."""
        if values is None:
            told: list[Any] = [None]
            dist.recv_object_list(told, src=peer, device=self._mesh.device)
            return told[0]
        dist.send_object_list([[(tensor.shape, tensor.dtype) for tensor in values]], dst=peer, device=self._mesh.device)
        return None

    def _from_last(self, output: Any) -> Any:
        """The last stage's output, on every stage."""
        ranks = self._mesh.ranks("pipe")
        is_last = self._mesh.rank == ranks[-1]
        told: list[Any] = [None]
        if is_last:
            told = [(type(output), [None if value is None else (value.shape, value.dtype) for value in output])]
        group = self._mesh.group("pipe")
        dist.broadcast_object_list(told, src=ranks[-1], group=group, device=self._mesh.device)
        kind, shapes = told[0]
        values = list(output) if is_last else [entry and _empty(entry, self._mesh.device) for entry in shapes]
        for value in values:
            if value is not None:
                dist.broadcast(value, src=ranks[-1], group=group)
        return kind(*values)


class _Layer(nn.Module):
    """A layer as DeepSpeed calls it, with one argument."""

    def __init__(self, description: PipelineLayer) -> None:
        super().__init__()
        self.layer = description.build()
        self._run = description.run

    def forward(self, values: Any) -> Any:
        return self._run(self.layer, values)


def _empty(entry: tuple[torch.Size, torch.dtype], device: torch.device) -> Tensor:
    return torch.empty(entry[0], dtype=entry[1], device=device)


def _receive(entries: Sequence[tuple[torch.Size, torch.dtype]], source: int, device: torch.device) -> list[Tensor]:
    tensors = [_empty(entry, device) for entry in entries]
    for tensor in tensors:
        dist.recv(tensor, source)
    return tensors
