"""A small transformer, trained for some steps: by every process for itself, and by all of them under ZeRO-3."""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from dalle_ds.cluster.links import synchronize
from dalle_ds.config import DalleConfig, RecomputingTrainConfig, TransformerRun
from dalle_ds.models import Dalle
from dalle_ds.models.dalle import ResidualBlock
from dalle_ds.optim import resblock_groups
from dalle_ds.parallel import Mesh

STEPS = 10
SMALL = DalleConfig(width=64, depth=2, heads=2, text_len=16, grid=8, text_vocab=512, image_vocab=256)
LARGE = DalleConfig(width=1024, depth=8, heads=16, text_len=64, grid=16, text_vocab=4096, image_vocab=4096)
"""For GPUs: enough for one to be busy."""
BATCH = 4


@dataclass(frozen=True)
class Trial:
    """Of one process."""

    compute: float
    """Seconds of a forward and a backward pass, with no one to wait for: slow processes are told by this one."""
    step: float
    """Seconds of a step with all others."""
    loss: float
    """Of the last step. All processes train on the same rows, so all should have the same."""


def run_trial(mesh: Mesh) -> Trial:
    """Train. Collective.

    Args:
        mesh: before it is divided: ZeRO-3 divides weights among all processes.
    """
    config = LARGE if mesh.device.type == "cuda" else SMALL
    rows = _rows(config, mesh.device)
    torch.manual_seed(0)
    mesh.barrier()
    compute = _seconds(_alone(config, rows, mesh.device), mesh)
    losses: list[float] = []
    step = _seconds(_together(config, rows, mesh, losses), mesh)
    return Trial(compute, step, losses[-1])


def _alone(config: DalleConfig, rows: tuple[Tensor, Tensor], device: torch.device) -> Callable[[], None]:
    """A forward and a backward pass of this process's own."""
    model = Dalle(config).to(device)

    def step() -> None:
        model.zero_grad()
        with torch.autocast(device.type, torch.bfloat16, enabled=device.type == "cuda"):
            loss = model(*rows, logits=False).loss
        loss.backward()

    return step


def _together(config: DalleConfig, rows: tuple[Tensor, Tensor], mesh: Mesh, losses: list[float]) -> Callable[[], None]:
    """A step under ZeRO-3, which adds its loss to a list."""
    from dalle_ds.config.deepspeed import resolve
    from dalle_ds.training.engine import build_engine

    def groups(model: nn.Module) -> list[dict[str, Any]]:
        return resblock_groups(model, [part for part in model.modules() if isinstance(part, ResidualBlock)], run.optim)

    run = TransformerRun(model=config, train=RecomputingTrainConfig(batch_size=BATCH * mesh.world_size))
    json: dict[str, Any] = {"bf16": {"enabled": mesh.device.type == "cuda"}, "zero_optimization": {"stage": 3}}
    engine = build_engine(lambda: Dalle(config), groups, run.optim, resolve(json, run, mesh.world_size), mesh)

    def step() -> None:
        loss = engine(*rows, logits=False).loss
        engine.backward(loss)
        engine.step()
        losses.append(float(loss.detach()))

    return step


def _rows(config: DalleConfig, device: torch.device) -> tuple[Tensor, Tensor]:
    """(B, T) text and (B, grid²) codes, the same on all processes."""
    random = torch.Generator().manual_seed(0)
    text = torch.randint(config.text_vocab, (BATCH, config.text_len), generator=random)
    codes = torch.randint(config.image_vocab, (BATCH, config.grid**2), generator=random)
    return text.to(device), codes.to(device)


def _seconds(step: Callable[[], None], mesh: Mesh) -> float:
    """Median of `STEPS` steps, after two that set things up."""
    found = []
    for _ in range(2 + STEPS):
        synchronize(mesh)
        began = time.perf_counter()
        step()
        synchronize(mesh)
        found.append(time.perf_counter() - began)
    return statistics.median(found[2:])
