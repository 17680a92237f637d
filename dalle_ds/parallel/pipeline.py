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

from dalle_ds.parallel.mesh import Mesh, share_tensors
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
            values = self._receive(ranks[stage - 1])
        for layer in self.forward_funcs:
            values = layer(values)
        if stage + 1 < len(ranks):
            self._send(values, ranks[stage + 1])
        is_last = stage + 1 == len(ranks)
        kind = [type(values) if is_last else None]
        dist.broadcast_object_list(kind, src=ranks[-1], group=self._mesh.group("pipe"), device=self._mesh.device)
        given = {name: value for name, value in values._asdict().items() if value is not None} if is_last else None
        shared = share_tensors(given, self._mesh, "pipe", place=-1)
        assert kind[0] is not None and shared is not None
        return kind[0](*map(shared.get, kind[0]._fields))

    def _send(self, tensors: Sequence[Tensor], rank: int) -> None:
        told = [(tensor.shape, tensor.dtype) for tensor in tensors]
        dist.send_object_list([told], dst=rank, device=self._mesh.device)
        for tensor in tensors:
            dist.send(tensor.contiguous(), rank)

    def _receive(self, rank: int) -> tuple[Tensor, ...]:
        told: list[Any] = [None]
        dist.recv_object_list(told, src=rank, device=self._mesh.device)
        tensors = tuple(torch.empty(shape, dtype=dtype, device=self._mesh.device) for shape, dtype in told[0])
        for tensor in tensors:
            dist.recv(tensor, rank)
        return tensors


class _Layer(nn.Module):
    """A layer as DeepSpeed calls it, with one argument."""

    def __init__(self, description: PipelineLayer) -> None:
        super().__init__()
        self.layer = description.build()
        self._run = description.run

    def forward(self, values: Any) -> Any:
        return self._run(self.layer, values)
