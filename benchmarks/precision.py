"""What each precision and optimizer setting costs: bytes held and bytes communicated per parameter, and the loss it reaches.

    deepspeed --num_gpus 2 benchmarks/precision.py [--json FILE]

Bytes are counted, not computed: those of all tensors that an engine holds between two updates, and between the last backward
pass and the step, times the number of processes; and those that a process gets from gathers and gives to reductions in an
update. All activations are computed again in the backward pass, so that ZeRO-3 gathers the weights twice.
A bf16 engine stands for DeepSpeed's fp16 engine, which is refused on CPUs: all its numbers are as large.
"""

from __future__ import annotations

import gc
import json
from dataclasses import dataclass, replace
from pathlib import Path
from types import FunctionType, ModuleType
from typing import Any

import torch
from engines import build_step
from measure import check_flags
from rich.console import Console
from rich.table import Table
from torch import Tensor

from dalle_ds.cli import parse_options, run_launcher
from dalle_ds.config import DalleConfig, OptimConfig, RecomputingTrainConfig, TransformerRun
from dalle_ds.parallel import Mesh

BUCKET = 50_000
"""Elements of DeepSpeed's own buffers, small against the model."""


@dataclass(frozen=True)
class Options:
    """Shape of the model and length of the runs."""

    width: int = 64
    """d_model."""
    depth: int = 8
    """Attention layers."""
    batch: int = 16
    """Images per update over all processes."""
    updates: int = 60
    """Updates of each run."""
    stages: tuple[int, ...] = (1, 3)
    """ZeRO stages."""
    device: str = "cpu"
    """cpu or cuda."""
    json: str | None = None
    """File for the figures."""


SETTINGS: dict[str, tuple[str, OptimConfig]] = {
    "fp32": ("fp32", OptimConfig()),
    "bf16 engine": ("bf16", OptimConfig()),
    "fp16 blocks": ("fp16", OptimConfig()),
    "fp16 blocks, 16-bit moments": ("fp16", OptimConfig(moments="16-bit")),
    "bf16 engine, 16-bit moments": ("bf16", OptimConfig(moments="16-bit")),
}


def batch(config: DalleConfig, size: int, update: int) -> dict[str, Tensor]:
    """Captions, and codes that follow from them by a fixed table."""
    table = torch.randint(0, config.image_vocab, (2, 32, config.image_len), generator=torch.Generator().manual_seed(0))
    text = torch.randint(0, 32, (size, config.text_len), generator=torch.Generator().manual_seed(update + 1))
    return {"text": text, "codes": (table[0][text[:, 0]] + table[1][text[:, 1]]) % config.image_vocab}


def bytes_behind(*roots: Any) -> int:
    """Bytes of all storages of tensors that can be reached from `roots`."""
    storages: dict[int, int] = {}
    seen: set[int] = set()
    waiting = list(roots)
    while waiting:
        thing = waiting.pop()
        # Functions and modules lead to all of the program.
        if id(thing) in seen or isinstance(thing, (type, FunctionType, ModuleType)):
            continue
        seen.add(id(thing))
        if isinstance(thing, Tensor) and thing.layout == torch.strided:
            storages[thing.untyped_storage().data_ptr()] = thing.untyped_storage().nbytes()
            if thing.is_leaf and thing.grad is not None:
                waiting.append(thing.grad)
        waiting += gc.get_referents(thing)
    return sum(storages.values())


def communicated() -> dict[str, int]:
    """Bytes that each kind of collective was given since the last call."""
    from deepspeed.comm import comm

    totals = {
        name: sum(size * record[0] for size, record in sizes.items())
        for name, sizes in comm.comms_logger.get_raw_data().items()
    }
    comm.comms_logger.reset_data()
    return totals


def measure(options: Options, stage: int, precision: str, optim: OptimConfig, mesh: Mesh) -> dict[str, float]:
    """Figures of one setting. Collective."""
    model = DalleConfig(
        width=options.width, depth=options.depth, heads=2, text_len=4, grid=4, text_vocab=32, image_vocab=32
    )
    train = RecomputingTrainConfig(batch_size=options.batch, activation_checkpointing="full")
    run = TransformerRun(model=model, train=train, optim=replace(optim, warmup_steps=0))
    zero = {"stage": stage, "reduce_bucket_size": BUCKET, "allgather_bucket_size": BUCKET}
    if stage == 3:
        zero |= {"stage3_param_persistence_threshold": 0, "stage3_prefetch_bucket_size": BUCKET}
        # Of a model as small as this, DeepSpeed would keep what it gathered from one pass to the next.
        zero |= {"stage3_max_live_parameters": 0, "stage3_max_reuse_distance": 0}
    json_config: dict[str, Any] = {
        **{name: {"enabled": name == precision} for name in ("bf16", "fp16")},
        "zero_optimization": zero,
        "comms_logger": {"enabled": True, "prof_all": True, "verbose": False},
    }
    engine, train_step = build_step(run, json_config, mesh)
    parameters = sum(getattr(p, "ds_numel", p.numel()) for p in engine.module.parameters())
    losses, held, with_gradients = [], 0, 0
    own = options.batch // mesh.world_size
    for update in range(options.updates):
        rows = {name: v[mesh.rank * own :][:own] for name, v in batch(model, options.batch, update).items()}
        if update == 2:
            communicated()
        if update == 3:
            sent = communicated()
            held = bytes_behind(engine)
            step = engine.step
            engine.step = lambda: None
            train_step.run([rows], update, 1e-3)
            with_gradients = bytes_behind(engine)
            engine.step = step
            engine.step()
            continue
        losses.append(train_step.run([rows], update, 1e-3).metrics["loss"])
    per = mesh.world_size / parameters
    figures = {"held": held * per, "with_gradients": with_gradients * per}
    gathered = sum(size for name, size in sent.items() if "gather" in name)
    # DeepSpeed counts what a process gives to a collective.
    figures |= {
        "gathered": gathered * mesh.world_size / parameters,
        "reduced": (sum(sent.values()) - gathered) / parameters,
    }
    engine.destroy()
    return figures | {"loss": sum(losses[-10:]) / len(losses[-10:])}


def main() -> None:
    """Measure every setting at every stage, print a table."""
    # The deepspeed launcher tells the rank here, and in the environment.
    options = parse_options(Options)
    check_flags(options, "width", "depth", "batch", "updates")
    mesh = Mesh.start(options.device)
    table = Table(title=f"{mesh.world_size} processes, per parameter", title_justify="left")
    columns = {
        "held": "bytes held",
        "with_gradients": "with gradients",
        "gathered": "bytes gathered",
        "reduced": "bytes reduced",
        "loss": "loss",
    }
    for column in ("stage", "setting", *columns.values()):
        table.add_column(column)
    results = {}
    for stage in options.stages:
        for name, (precision, optim) in SETTINGS.items():
            figures = results[f"zero{stage}, {name}"] = measure(options, stage, precision, optim, mesh)
            table.add_row(str(stage), name, *(f"{figures[key]:.4g}" for key in columns))
    if mesh.is_main:
        Console(width=120).print(table)
        if options.json is not None:
            Path(options.json).write_text(json.dumps(results, indent=2) + "\n")
    mesh.stop()


if __name__ == "__main__":
    run_launcher(main)
