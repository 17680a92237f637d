"""Floating-point operations of a run's model, stage by stage of a pipeline."""

from __future__ import annotations

import functools
from collections.abc import Sequence
from dataclasses import dataclass

import torch

from dalle_ds.config import DalleConfig, DiscreteVAEConfig, DvaeRun, Run, TransformerRun
from dalle_ds.models import DiscreteVAE
from dalle_ds.models.flops import Flops, executed_flops, layer_flops, model_flops
from dalle_ds.planning.layout import Layout
from dalle_ds.planning.stages import Stage
from dalle_ds.precision.rates import DTYPES


@dataclass(frozen=True)
class Operations:
    """Of one sample on one process of a stage, forward and backward, with what is computed again."""

    body: float
    """Outside of the heads."""
    heads: float
    """In the heads, which are fp32 in a model whose weights are."""


@dataclass(frozen=True)
class Work:
    """What an update computes."""

    needed: float
    """Operations of one sample that the model needs, nothing computed twice: the base of the MFU."""
    executed: tuple[Operations, ...]
    """By stage."""
    items: tuple[str, int]
    """What throughput counts, and how many of them a sample has."""


def work_of(run: Run, stages: Sequence[Stage], layout: Layout, device: str) -> Work:
    """The work of a run.

    Args:
        stages: from `stages_of`.
        device: "cuda" or "cpu": the kernels of attention differ, and so does what they compute too much.
    """
    if isinstance(run, TransformerRun):
        return _transformer(run.model, stages, layout, device)
    assert isinstance(run, DvaeRun), f"no plan for a {type(run).__name__}"
    flops = _dvae_flops(run.model)
    return Work(flops, (Operations(flops, 0.0),), ("pixels", run.model.image_size**2))


def _transformer(config: DalleConfig, stages: Sequence[Stage], layout: Layout, device: str) -> Work:
    needed, executed = _flops(config, layout.checkpointing, layout.precision, device)
    costs = layer_flops(config)[1:-1]
    body = executed.projections + executed.attention
    parts = layout.tensor
    return Work(
        float(needed.total),
        tuple(
            Operations(
                body * sum(costs[block] for block in stage.blocks) / sum(costs) / parts,
                executed.heads / parts if stage.has_heads else 0.0,
            )
            for stage in stages
        ),
        ("tokens", config.total_len),
    )


@functools.lru_cache(maxsize=64)
def _flops(config: DalleConfig, checkpointing: str, precision: str, device: str) -> tuple[Flops, Flops]:
    return _needed(config), executed_flops(config, checkpointing, dtype=DTYPES[precision], device=device)


@functools.lru_cache(maxsize=16)
def _needed(config: DalleConfig) -> Flops:
    return model_flops(config)


@functools.lru_cache(maxsize=16)
def _dvae_flops(config: DiscreteVAEConfig) -> float:
    from dalle_ds.tasks.flops import training_flops  # takes a second that a transformer's plan need not wait for

    images = (1, 3, config.image_size, config.image_size)
    noise = (1, config.vocab_size, config.grid, config.grid)
    return training_flops(
        lambda: DiscreteVAE(config), lambda model: model(torch.zeros(images), 1.0, torch.zeros(noise))
    )
