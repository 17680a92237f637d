"""Training as the trainer does it, on batches that a benchmark gives: engine, gradient scales, updates."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from dalle_ds.config import TransformerRun
from dalle_ds.models import Dalle
from dalle_ds.optim import resblock_groups
from dalle_ds.parallel import Mesh


class BatchLoss:
    """What an `Updater` asks of a task: the transformer's loss on {"text": (B, T), "codes": (B, W²)}."""

    def weight_of(self, batch: dict[str, Tensor]) -> Tensor:
        """Batches without padding all weigh the same."""
        return torch.ones((), device=batch["codes"].device)

    def loss(self, model: nn.Module, batch: dict[str, Tensor], step: int) -> tuple[Tensor, dict[str, Tensor]]:
        """() loss, and no other figures."""
        return model(batch["text"], batch["codes"], logits=False).loss, {}

    def digest(self, sums: dict[str, Tensor]) -> dict[str, float]:
        """No vectors among the figures."""
        return {}


def build_updater(run: TransformerRun, json_config: dict[str, Any], mesh: Mesh) -> tuple[Any, Any]:
    """An engine around `run.model`, and the `Updater` that trains it.

    Args:
        run: `model`, `train`, `optim`, `scaling` and `seed` are used.
        json_config: the DeepSpeed JSON's content.
        mesh: from `Mesh.start`, before DeepSpeed is imported.
    """
    from dalle_ds.training.deepspeed_config import resolve
    from dalle_ds.training.engine import build_engine, scale_gradients
    from dalle_ds.training.update import Updater

    config = resolve(json_config, run, mesh.world_size)
    torch.manual_seed(run.seed)
    engine = build_engine(
        lambda: Dalle(run.model, checkpointing=run.train.activation_checkpointing),
        lambda model: resblock_groups(model, list(model.blocks), run.optim),
        run.optim,
        config,
        mesh,
        run.seed,
    )
    scales = None
    if config.precision == "fp16":
        scales = scale_gradients(list(engine.module.blocks), run.scaling, config.precision, mesh)
    updater = Updater(
        BatchLoss(), engine, mesh, run.optim, scales=scales, scaling=run.scaling, average=None, numerics=None
    )
    return engine, updater
