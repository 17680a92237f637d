"""Bytes that cross each axis of the mesh in one update, with plain and with compressed gradients, counted and predicted.

    deepspeed --num_gpus 4 benchmarks/comm.py --replicas 2 [--rank R] [--transport 1-6-9] [--json FILE]

Bytes are those that leave one process by the usual algorithms, from the tensors that it gives to collectives: of k processes,
an all-reduce of n bytes sends 2 n · (k − 1) / k; gathers, scatters and exchanges send half of that. Formulas for the axes are
the planner's (`dalle_ds/planning/traffic.py`). The last line holds the compression of those parameters that are compressed
against the paper's 1 − r (m + 2) / (2 d m), for a replica of m processes (DALL·E Tables 1 and 2).
"""

from __future__ import annotations

import json
from collections import Counter
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import torch
import torch.distributed as dist
from counting import Exchanges
from engines import build_step
from measure import check_flags
from rich.console import Console
from rich.table import Table

from dalle_ds.cli import parse_options, run_launcher
from dalle_ds.config import (
    DalleConfig,
    OptimConfig,
    ParallelConfig,
    PowerSGDConfig,
    RecomputingTrainConfig,
    TransformerRun,
)
from dalle_ds.config.deepspeed import resolve
from dalle_ds.errors import ConfigError
from dalle_ds.parallel import Mesh
from dalle_ds.parallel.powersgd import paper_rank
from dalle_ds.planning.layout import Layout
from dalle_ds.planning.model import stages_of
from dalle_ds.planning.traffic import traffic
from dalle_ds.tasks.transformer import TransformerTask

AXES: tuple[Literal["tensor", "shard", "replica"], ...] = ("tensor", "shard", "replica")
OTHER = "all"
"""What crosses among all processes: what they agree on."""
COUNTED_UPDATE = 3
"""DeepSpeed makes plans during the first ones."""


@dataclass(frozen=True)
class Options:
    """Shape of the model and how processes divide it."""

    width: int = 128
    """d_model."""
    depth: int = 4
    """Attention layers."""
    heads: int = 4
    """Attention heads."""
    text_len: int = 16
    """Text positions."""
    grid: int = 4
    """Image codes along each side."""
    text_vocab: int = 256
    """Text vocabulary."""
    image_vocab: int = 128
    """Image vocabulary."""
    replicas: int = 2
    """Replicas."""
    tensor: int = 1
    """Processes that divide every layer."""
    zero_stage: int = 3
    """ZeRO stage; gradients are compressed under ZeRO-3 only, and left plain under the others."""
    precision: Literal["fp32", "bf16"] = "fp32"
    """Arithmetic."""
    micro_batch: int = 1
    """Images per process."""
    rank: int | None = None
    """Rank of a whole matrix; None takes the paper's for this width."""
    storage: Literal["fp32", "1-6-9"] = "fp32"
    """Format of error buffers."""
    transport: Literal["fp32", "1-6-9"] = "fp32"
    """Format of the factors that cross."""
    device: str = "cpu"
    """cpu or cuda."""
    json: str | None = None
    """File for the figures."""


class AxisExchanges(Exchanges):
    """Bytes that this process sends, by axis of the mesh."""

    def __init__(self, mesh: Mesh) -> None:
        super().__init__(mesh.world_size)
        self.along: Counter[str] = Counter()
        """By axis; what is not along one of them is along "all"."""
        self._axes: dict[str, str] = {}
        for axis in AXES:
            if mesh.size(axis) > 1:
                group: Any = mesh.group(axis) or dist.group.WORLD
                self._axes[group.group_name] = axis

    def _count(self, operation: str, args: tuple[Any, ...]) -> None:
        group = next(found for found in map(_process_group, args) if found is not None)
        self._processes = group.size()
        before = sum(self.sent.values())
        super()._count(operation, args)
        self.along[self._axes.get(group.group_name, OTHER)] += sum(self.sent.values()) - before


def _process_group(argument: Any) -> Any:
    """The process group that an argument of a collective is; None if it is something else."""
    is_object = isinstance(argument, torch.ScriptObject)
    is_group = is_object and "ProcessGroup" in str(argument._type())
    return dist.ProcessGroup.unbox(argument) if is_group else None


def run_of(options: Options, world_size: int, *, compressed: bool) -> TransformerRun:
    """The run that is measured."""
    names = ("width", "depth", "heads", "text_len", "grid", "text_vocab", "image_vocab")
    parallel = ParallelConfig(replicas=options.replicas, tensor=options.tensor)
    return TransformerRun(
        model=DalleConfig(**{name: getattr(options, name) for name in names}),
        parallel=parallel,
        powersgd=PowerSGDConfig(
            enabled=compressed, rank=options.rank, storage=options.storage, transport=options.transport
        ),
        train=RecomputingTrainConfig(
            batch_size=options.micro_batch * world_size // options.tensor,
            micro_batch=options.micro_batch,
            average_decay=None,
        ),
        optim=OptimConfig(warmup_steps=0),
    )


def measure(options: Options, mesh: Mesh, *, compressed: bool) -> dict[str, Any]:
    """Bytes along every axis, counted and predicted. Collective."""
    run = run_of(options, mesh.world_size, compressed=compressed)
    zero: dict[str, Any] = {"stage": options.zero_stage}
    if options.zero_stage == 3:
        # Of a model as small as this, DeepSpeed would keep what it gathered from one pass to the next.
        zero |= {"stage3_param_persistence_threshold": 0, "stage3_prefetch_bucket_size": 0}
        zero |= {"stage3_max_live_parameters": 0, "stage3_max_reuse_distance": 0}
    json_config = {"bf16": {"enabled": options.precision == "bf16"}, "zero_optimization": zero}
    layout = Layout.of(run, resolve(json_config, run, mesh.world_size), mesh.world_size)
    (stage,) = stages_of(TransformerTask.planned(run), layout, mesh.device.type)
    transfers = traffic(stage, layout)
    shards = stage.compressed
    engine, train_step = build_step(run, json_config, mesh)
    divided = mesh.divide(run.parallel)
    generator = torch.Generator().manual_seed(divided.index("data"))
    exchanges = AxisExchanges(divided)
    for number in range(COUNTED_UPDATE + 1):
        text = torch.randint(run.model.text_vocab, (options.micro_batch, run.model.text_len), generator=generator)
        codes = torch.randint(run.model.image_vocab, (options.micro_batch, run.model.image_len), generator=generator)
        batch = {"text": text.to(mesh.device), "codes": codes.to(mesh.device)}
        if number == COUNTED_UPDATE:
            with exchanges:
                train_step.run([batch], number, 1e-3)
        else:
            train_step.run([batch], number, 1e-3)
    engine.destroy()
    most = torch.tensor([exchanges.along[axis] for axis in (*AXES, OTHER)], dtype=torch.int64, device=mesh.device)
    if mesh.world_size > 1:
        dist.all_reduce(most, op=dist.ReduceOp.MAX)
    return {
        "measured": dict(zip((*AXES, OTHER), most.tolist(), strict=True)),
        "predicted": {axis: sum(transfer.sent for transfer in transfers if transfer.axis == axis) for axis in AXES},
        "compressed_numel": sum(shard.numel for shard in shards),
    }


def compression(options: Options, plain: dict[str, Any], compressed: dict[str, Any], mesh: Mesh) -> dict[str, float]:
    """Share of the bytes of compressed parameters' gradients that did not cross, and what the paper's formula says."""
    divisor = mesh.world_size // options.replicas
    rank = options.rank if options.rank is not None else paper_rank(options.width, divisor)
    each = 4 * 2 * (options.replicas - 1) / options.replicas
    saved = plain["measured"]["replica"] - compressed["measured"]["replica"]
    crossing = rank * (divisor + 2) / (2 * options.width * divisor)
    return {
        "rank": rank,
        "measured": saved / (each * compressed["compressed_numel"]),
        "predicted": 1 - crossing * (0.5 if options.transport == "1-6-9" else 1.0),
    }


def main() -> None:
    """Count both, print a table."""
    # The deepspeed launcher tells the rank here, and in the environment.
    options = parse_options(Options)
    check_flags(options, "width", "depth", "heads", "replicas", "tensor", "micro_batch")
    mesh = Mesh.start(options.device)
    if mesh.world_size % (options.replicas * options.tensor):
        raise ConfigError(
            f"--replicas {options.replicas} × --tensor {options.tensor} does not divide {mesh.world_size} processes: start "
            "a multiple of them (deepspeed --num_gpus)"
        )
    results: dict[str, Any] = {"plain": measure(options, mesh, compressed=False)}
    if options.replicas > 1 and options.zero_stage == 3:
        results["powersgd"] = measure(options, mesh, compressed=True)
        results["compression"] = compression(options, results["plain"], results["powersgd"], mesh)
    if mesh.is_main:
        Console(width=120).print(table_of(options, results, mesh))
        if options.json is not None:
            Path(options.json).write_text(json.dumps(results, indent=2) + "\n")
    mesh.stop()


def table_of(options: Options, results: dict[str, Any], mesh: Mesh) -> Table:
    """Bytes by axis, and the compression below."""
    shards = mesh.world_size // (options.replicas * options.tensor)
    table = Table(
        title=f"bytes sent by one process in an update: {options.replicas} replicas × {shards} shards × {options.tensor} "
        f"parts, ZeRO-{options.zero_stage}, {options.precision}, width {options.width}",
        title_justify="left",
    )
    for column in ("gradients", "axis", "measured", "predicted", "error"):
        table.add_column(column, justify="left" if column in ("gradients", "axis") else "right")
    for gradients in ("plain", "powersgd"):
        figures = results.get(gradients, {"measured": {}, "predicted": {}})
        for axis, measured in figures["measured"].items():
            predicted = figures["predicted"].get(axis)
            if measured and predicted is not None:
                table.add_row(gradients, axis, f"{measured:,}", f"{predicted:,}", f"{predicted / measured - 1:+.1%}")
            elif measured:
                table.add_row(gradients, axis, f"{measured:,}", "–", "–")
    if "compression" in results:
        found = results["compression"]
        points = 100 * (found["predicted"] - found["measured"])
        what = f"compression at rank {found['rank']}"
        table.add_row(
            "powersgd", what, f"{found['measured']:.2%}", f"{found['predicted']:.2%}", f"{points:+.2f} points"
        )
    return table


if __name__ == "__main__":
    run_launcher(main)
