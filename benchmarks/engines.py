"""Training as the trainer does it, on batches that a benchmark gives: engine, gradient scales, updates."""

from __future__ import annotations

from typing import Any

import torch

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
    from dalle_ds.training.engine import build_engine, build_part, scale_gradients
    from dalle_ds.training.replicas import ReplicaReduction
    from dalle_ds.training.step import TrainStep
    from dalle_ds.training.strategies import strategy_for

    task = kind.planned(run)
    mesh = mesh.divide(run.parallel)
    config = resolve(json_config, run, mesh.world_size)
    torch.manual_seed(run.seed)

    engine = build_engine(lambda: build_part(task, mesh), task.parameter_groups, run.optim, config, mesh, run.seed)
    scales, replicas = scale_gradients(task, engine.module, config.precision, mesh), None
    if mesh.size("replica") > 1:
        replicas = ReplicaReduction(engine, mesh, run.powersgd, run.seed)
    strategy = strategy_for(task, engine, mesh)
    return engine, TrainStep(strategy, mesh, run.optim, scales=scales, replicas=replicas)
