"""Training as the trainer does it, on batches that a benchmark gives: engine, gradient scales, updates."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from dalle_ds.config import TransformerRun
from dalle_ds.models import Dalle
from dalle_ds.models.dalle import ResidualBlock
from dalle_ds.models.pipeline import pipeline_layers
from dalle_ds.optim import resblock_groups
from dalle_ds.parallel import Mesh


class BatchLoss:
    """What a `TrainStep` asks of a task: the transformer's loss on {"text": (B, T), "codes": (B, W²)}."""

    rho = None

    def weight_of(self, batch: dict[str, Tensor]) -> Tensor:
        """Batches without padding all weigh the same."""
        return torch.ones((), device=batch["codes"].device)

    def inputs(self, batch: dict[str, Tensor]) -> tuple[Tensor, ...]:
        """What the transformer takes of a batch."""
        return batch["text"], batch["codes"]

    def loss(self, model: nn.Module, batch: dict[str, Tensor], step: int) -> tuple[Tensor, dict[str, Tensor]]:
        """() loss, and no other figures."""
        return model(batch["text"], batch["codes"], logits=False).loss, {}

    def digest(self, sums: dict[str, Tensor]) -> dict[str, float]:
        """No vectors among the figures."""
        return {}


def build_step(run: TransformerRun, json_config: dict[str, Any], mesh: Mesh) -> tuple[Any, Any]:
    """An engine around `run.model`, and the `TrainStep` that trains it.

    Args:
        run: `model`, `train`, `parallel`, `powersgd`, `optim`, `scaling` and `seed` are used.
        json_config: the DeepSpeed JSON's content.
        mesh: from `Mesh.start`, before DeepSpeed is imported; divided here.
    """
    from dalle_ds.config.deepspeed import resolve
    from dalle_ds.parallel.pipeline import Pipeline
    from dalle_ds.training.engine import build_engine, scale_gradients
    from dalle_ds.training.passes import passes_of
    from dalle_ds.training.replicas import ReplicaReduction
    from dalle_ds.training.step import TrainStep
    from dalle_ds.training.zero_state import MasterGradients

    mesh = mesh.divide(run.parallel)
    config = resolve(json_config, run, mesh.world_size)
    torch.manual_seed(run.seed)
    options: dict[str, Any] = {"checkpointing": run.train.activation_checkpointing, "tensor": mesh.tensor}

    def build_model() -> nn.Module:
        if mesh.size("pipe") > 1:
            return Pipeline(pipeline_layers(run.model, **options), mesh)
        return Dalle(run.model, **options)

    def blocks_of(model: nn.Module) -> list[ResidualBlock]:
        return [module for module in model.modules() if isinstance(module, ResidualBlock)]

    engine = build_engine(
        build_model,
        lambda model: resblock_groups(model, blocks_of(model), run.optim),
        run.optim,
        config,
        mesh,
        run.seed,
    )
    scales = replicas = None
    if config.precision == "fp16":
        blocks = blocks_of(engine.module)
        scales = scale_gradients(blocks, 2 * run.model.depth, run.scaling, config.precision, mesh)
    if mesh.size("replica") > 1:
        replicas = ReplicaReduction(engine, MasterGradients(engine), mesh, run.powersgd, run.seed)
    task: Any = BatchLoss()
    train_step = TrainStep(
        task,
        engine,
        passes_of(task, engine, mesh),
        mesh,
        run.optim,
        scales=scales,
        scaling=run.scaling,
        average=None,
        numerics=None,
        replicas=replicas,
    )
    return engine, train_step
