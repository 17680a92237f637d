"""A model as the planner sees it: what the processes of each stage of a pipeline hold."""

from __future__ import annotations

import functools
from dataclasses import dataclass

from dalle_ds.config import DalleConfig, DvaeRun, Run, TransformerRun
from dalle_ds.models.flops import layer_flops
from dalle_ds.parallel.stages import balanced
from dalle_ds.planning.activations import Activations, dvae_activations, transformer_activations
from dalle_ds.planning.layout import Layout
from dalle_ds.planning.parameters import ParameterSet, dvae_parameters, transformer_parameters


@dataclass(frozen=True)
class Stage:
    """What one stage's processes hold; without a pipeline, there is one."""

    number: int
    """Counted from 0."""
    parameters: ParameterSet
    """Of one process, before ZeRO divides them."""
    activations: Activations
    """Of one micro-batch."""
    blocks: tuple[int, ...] = ()
    """Numbers of a transformer's residual blocks."""
    has_embeddings: bool = False
    """Whether a transformer's first layer is here."""
    has_heads: bool = False
    """Whether its last layers are."""
    width: int = 0
    """Of the residual stream; 0 where there is none."""


def stages_of(run: Run, layout: Layout, device: str) -> tuple[Stage, ...]:
    """The stages of a run's model.

    Args:
        device: "cuda" or "cpu".
    """
    if isinstance(run, TransformerRun):
        return tuple(_transformer_stage(run.model, layout, number, device) for number in range(layout.pipe))
    assert isinstance(run, DvaeRun), f"no plan for a {type(run).__name__}"
    activations = dvae_activations(run.model, layout.micro_batch, layout.weight_bytes)
    return (Stage(0, dvae_parameters(run.model), activations),)


def _transformer_stage(config: DalleConfig, layout: Layout, number: int, device: str) -> Stage:
    bounds = _bounds(config, layout.pipe)
    layers = range(bounds[number], bounds[number + 1])
    # Layer 0 is the embedding, layer 2 · depth + 1 the heads.
    blocks = tuple(layer - 1 for layer in layers if 0 < layer <= 2 * config.depth)
    first, last = layers[0] == 0, layers[-1] == 2 * config.depth + 1
    return Stage(
        number=number,
        parameters=_held(config, layout.tensor, blocks, first, last),
        activations=transformer_activations(config, layout, blocks, last=last, device=device),
        blocks=blocks,
        has_embeddings=first,
        has_heads=last,
        width=config.width,
    )


@functools.lru_cache(maxsize=1024)
def _held(config: DalleConfig, tensor: int, blocks: tuple[int, ...], first: bool, last: bool) -> ParameterSet:
    inside = set(blocks)
    return ParameterSet(
        tuple(
            parameter
            for parameter in transformer_parameters(config, tensor)
            if parameter.block in inside
            or (first and parameter.role == "embeddings")
            or (last and parameter.role == "heads")
        )
    )


@functools.lru_cache(maxsize=64)
def _bounds(config: DalleConfig, pipe: int) -> list[int]:
    return balanced(layer_flops(config), pipe)
