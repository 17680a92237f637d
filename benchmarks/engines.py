"""Training as the trainer does it, on batches that a benchmark gives: engine, gradient scales, updates."""

from __future__ import annotations

from typing import Any

import torch
from torch import nn

from dalle_ds.config import Run
from dalle_ds.parallel import Mesh
from dalle_ds.tasks import Task
from dalle_ds.tasks.transformer import TransformerTask


def build_step(
    run: Run, json_config: dict[str, Any], mesh: Mesh, kind: type[Task[Any]] = TransformerTask
) -> tuple[Any, Any]:
    """An engine around a run's model, and the `TrainStep` that trains it. No files are read.

    Args:
        json_config: the DeepSpeed JSON's content.
        mesh: from `Mesh.start`, before DeepSpeed is imported; divided here.
        kind: the run's task.
    """
    from dalle_ds.config.deepspeed import resolve
    from dalle_ds.parallel.pipeline import Pipeline
    from dalle_ds.training.engine import build_engine, scale_gradients
    from dalle_ds.training.passes import passes_of
    from dalle_ds.training.replicas import ReplicaReduction
    from dalle_ds.training.step import TrainStep
    from dalle_ds.training.zero_state import MasterGradients

    task = kind.planned(run)
    mesh = mesh.divide(run.parallel)
    config = resolve(json_config, run, mesh.world_size)
    torch.manual_seed(run.seed)

    def build_model() -> nn.Module:
        if mesh.size("pipe") > 1:
            return Pipeline(task.pipeline_layers(mesh.tensor), mesh)
        return task.build_model(mesh.tensor)

    engine = build_engine(build_model, task.parameter_groups, run.optim, config, mesh, run.seed)
    scales = replicas = None
    if config.precision == "fp16":
        assert task.scaling is not None
        blocks = task.resblocks(engine.module)
        scales = scale_gradients(blocks, task.resblock_count, task.scaling, config.precision, mesh)
    if mesh.size("replica") > 1:
        replicas = ReplicaReduction(engine, MasterGradients(engine), mesh, run.powersgd, run.seed)
    train_step = TrainStep(
        task,
        engine,
        passes_of(task, engine, mesh),
        mesh,
        run.optim,
        scales=scales,
        scaling=task.scaling,
        average=None,
        numerics=None,
        replicas=replicas,
    )
    return engine, train_step
