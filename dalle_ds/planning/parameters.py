"""A model's parameters, counted on models that are built without memory (torch's "meta" device)."""

from __future__ import annotations

import functools
import itertools
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from math import prod
from typing import Any, Literal

import torch
from torch import nn
from torch.overrides import TorchFunctionMode

from dalle_ds.config import DalleConfig, DiscreteVAEConfig, OptimConfig
from dalle_ds.models import Dalle, DiscreteVAE
from dalle_ds.optim import decay_groups, resblock_groups
from dalle_ds.parallel import TensorGroup
from dalle_ds.parallel.tensor import split_of

Role = Literal["blocks", "embeddings", "heads", "encoder", "decoder"]


@dataclass(frozen=True)
class Parameter:
    """One parameter as one process of a tensor group has it, before ZeRO divides it."""

    name: str
    """In the plain model."""
    shape: tuple[int, ...]
    """Of this process's piece."""
    role: Role
    """Part of the model."""
    group: str
    """Name of its optimizer parameter group."""
    block: int | None
    """Number of its residual block, if it is in one."""
    has_small_moments: bool
    """Whether its moments follow `optim.moments`; those of all others are fp32."""
    is_divided: bool
    """Whether the tensor group divides it."""
    fused: int
    """Matrices that it consists of, one above the other."""

    @functools.cached_property
    def numel(self) -> int:
        """Elements of this process's piece."""
        return prod(self.shape)


@dataclass(frozen=True, eq=False)
class ParameterSet:
    """The parameters of one process, in the order of their optimizer groups; two sets are the same only if they are one."""

    parameters: tuple[Parameter, ...]

    def __iter__(self) -> Iterator[Parameter]:
        return iter(self.parameters)

    @functools.cached_property
    def sizes(self) -> list[int]:
        """Elements of each."""
        return [parameter.numel for parameter in self.parameters]

    @functools.cached_property
    def count(self) -> int:
        """Elements of all."""
        return sum(self.sizes)

    @functools.cached_property
    def groups(self) -> list[list[Parameter]]:
        """By optimizer group."""
        return [list(group) for _, group in itertools.groupby(self.parameters, key=lambda parameter: parameter.group)]

    def larger_than(self, size: int) -> list[Parameter]:
        """Those with more elements."""
        return [parameter for parameter in self.parameters if parameter.numel > size]


@functools.lru_cache(maxsize=64)
def transformer_parameters(config: DalleConfig, tensor: int = 1) -> ParameterSet:
    """The parameters of a transformer on the first of `tensor` processes, in the order of their optimizer groups."""
    with _WithoutDraws(), torch.device("meta"):
        model = Dalle(config, tensor=TensorGroup(0, tensor))
    # Whatever asks for 16-bit moments is what `optim.moments` speaks of.
    groups = resblock_groups(model, list(model.blocks), OptimConfig(moments="16-bit"))
    return ParameterSet(tuple(_described(model, groups, _role_in_transformer)))


@functools.lru_cache(maxsize=16)
def dvae_parameters(config: DiscreteVAEConfig) -> ParameterSet:
    """The parameters of a dVAE, in the order of their optimizer groups."""
    with _WithoutDraws(), torch.device("meta"):
        model = DiscreteVAE(config)
    return ParameterSet(tuple(_described(model, decay_groups(model, 0.0), _role_in_dvae)))


@functools.lru_cache(maxsize=1024)
def updated_by_group(parameters: ParameterSet, zero_stage: int, shards: int) -> tuple[int, ...]:
    """Elements of each optimizer group that one of `shards` processes updates; padding included."""
    if zero_stage == 0:
        return tuple(_numel(group) for group in parameters.groups)
    if zero_stage == 3:
        return tuple(sum(-(-parameter.numel // shards) for parameter in group) for group in parameters.groups)
    return tuple(2 * -(-_numel(group) // (2 * shards)) for group in parameters.groups)  # aligned to two elements


@functools.lru_cache(maxsize=1024)
def touched(parameters: ParameterSet, shards: int) -> int:
    """The most elements that all parameters of which a process updates a part have together, under ZeRO-1 and 2."""
    sums = [0] * shards
    for group, updated in zip(parameters.groups, updated_by_group(parameters, 1, shards), strict=True):
        begin = 0
        for parameter in group:
            end = begin + parameter.numel
            for shard in range(begin // updated, min(shards - 1, (end - 1) // updated) + 1):
                sums[shard] += parameter.numel
            begin = end
    return max(sums)


def _numel(parameters: Iterable[Parameter]) -> int:
    return sum(parameter.numel for parameter in parameters)


class _WithoutDraws(TorchFunctionMode):
    """Leaves weights undrawn: on "meta" there is nothing to draw, and torch would load its compiler to find that out."""

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        if getattr(func, "__module__", None) == nn.init.__name__:
            return args[0] if args else kwargs["tensor"]
        return func(*args, **kwargs)


def _described(model: nn.Module, groups: list[dict[str, Any]], role: Any) -> Iterable[Parameter]:
    names = {id(parameter): name for name, parameter in model.named_parameters()}
    for group in groups:
        for parameter in group["params"]:
            name = names[id(parameter)]
            yield Parameter(
                name=name,
                shape=tuple(parameter.shape),
                role=role(name),
                group=group["name"],
                block=group.get("block"),
                has_small_moments=group.get("moments") == "16-bit",
                is_divided=split_of(parameter) is not None,
                fused=getattr(parameter, "fused", 1),
            )


def _role_in_transformer(name: str) -> Role:
    if name.startswith("blocks."):
        return "blocks"
    return "embeddings" if name.startswith("embedding.") else "heads"


def _role_in_dvae(name: str) -> Role:
    return "encoder" if name.startswith("encoder.") else "decoder"
