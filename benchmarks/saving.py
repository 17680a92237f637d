"""What a checkpoint costs training: while it is written beside it, and while training waits for it.

    deepspeed --num_gpus 2 benchmarks/saving.py [--width 512] [--folder DIR] [--json FILE]

Equal runs of updates are made in turn: without a checkpoint, with one that is begun before the first of them and written
beside them, and with one that is waited for. What a run with a checkpoint takes longer is what it costs; of that, the copy to
main memory is all that an update waits for. The share is that of `--minutes`, the time between two checkpoints.
"""

from __future__ import annotations

import json
import shutil
import statistics
import tempfile
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from engines import build_step
from measure import ShapeOptions, shape
from rich.console import Console
from rich.table import Table

from dalle_ds.cli import parse_options, run_launcher
from dalle_ds.config import OptimConfig, RecomputingTrainConfig, TransformerRun
from dalle_ds.optim import WeightAverage
from dalle_ds.parallel import Mesh
from dalle_ds.training.checkpoints.content import TrainedTensors
from dalle_ds.training.checkpoints.manifest import CheckpointFolder
from dalle_ds.training.checkpoints.saver import AsyncCheckpointer


@dataclass(frozen=True)
class Options(ShapeOptions):
    """Shape of the model, and how it is saved."""

    batch: int = 2
    """Rows of an update, per process."""
    updates: int = 8
    """Of each run: more than a checkpoint takes to be written."""
    repeats: int = 5
    """How often each kind of run is made."""
    minutes: float = 10.0
    """Between two checkpoints."""
    zero: int = 3
    """ZeRO stage."""
    folder: str | None = None
    """Where checkpoints go; None takes the system's folder for temporary files."""
    device: str = "auto"
    """auto, cpu or cuda."""
    json: str | None = None
    """File that gets the figures."""


class Bench:
    """An engine that is trained on random data, and saved."""

    def __init__(self, options: Options, mesh: Mesh, folder: Path) -> None:
        self.options, self.mesh, self.folder = options, mesh, folder
        rows = options.batch * mesh.world_size
        self.model = shape(options)
        run = TransformerRun(
            model=self.model,
            train=RecomputingTrainConfig(batch_size=rows, average_decay=0.99),
            optim=OptimConfig(warmup_steps=1),
        )
        json_config = {"bf16": {"enabled": True}, "zero_optimization": {"stage": options.zero}}
        self.engine, self.train_step = build_step(run, json_config, mesh)
        from dalle_ds.training.zero_state import MasterWeights

        self.weights = MasterWeights(self.engine)
        self.average = WeightAverage(self.weights.shards, 0.99)
        self.savers = {background: self._saver(background) for background in (True, False)}
        self.step = 0

    def _saver(self, background: bool) -> AsyncCheckpointer:
        folder = CheckpointFolder(self.folder / f"background-{background}")
        optimizer = self.engine.client_optimizer
        trained = TrainedTensors(self.weights, optimizer, self.average)
        return AsyncCheckpointer(folder, trained, self.mesh, keep=1, background=background)

    def update(self, saver: AsyncCheckpointer | None) -> None:
        """One update, with what a trainer does about a checkpoint in it."""
        generator = torch.Generator().manual_seed(self.step)
        size = (self.options.batch,)
        text = torch.randint(self.model.text_vocab, (*size, self.model.text_len), generator=generator)
        codes = torch.randint(self.model.image_vocab, (*size, self.model.grid**2), generator=generator)
        batch = {"text": text.to(self.mesh.device), "codes": codes.to(self.mesh.device)}
        flags = (0, 0) if saver is None else saver.progress()
        outcome = self.train_step.run([batch], self.step, 1e-4, flags)
        self.average.update(self.step)
        self.step += 1
        if saver is not None:
            saver.advance(*map(round, outcome.flags))

    def run(self, saver: AsyncCheckpointer | None) -> dict[str, float]:
        """Seconds of a run of updates, with a checkpoint or without."""
        self.mesh.barrier()
        began = time.perf_counter()
        copied = 0.0
        if saver is not None:
            saver.begin(self.step, {})
            copied = time.perf_counter() - began
        written = 0.0
        for _ in range(self.options.updates):
            self.update(saver)
            if saver is not None and not saver.busy and not written:
                written = time.perf_counter() - began
        seconds = time.perf_counter() - began
        if saver is not None and saver.busy:
            saver.finish()
            written = seconds = time.perf_counter() - began
        return {"seconds": seconds, "begun": copied, "written": written}


def measure(options: Options, mesh: Mesh, folder: Path) -> dict[str, Any]:
    """All figures; equal on all processes but for noise."""
    bench = Bench(options, mesh, folder)
    kinds: dict[str, AsyncCheckpointer | None] = {
        "none": None,
        "beside": bench.savers[True],
        "waiting": bench.savers[False],
    }
    found: dict[str, list[dict[str, float]]] = {kind: [] for kind in kinds}
    for kind in kinds:  # the first of each makes plans and takes memory
        bench.run(kinds[kind])
    for _ in range(options.repeats):
        for kind in kinds:
            found[kind].append(bench.run(kinds[kind]))
    newest = CheckpointFolder(folder / "background-True").newest()
    size = sum(file.stat().st_size for file in newest.rglob("*") if file.is_file()) if newest else 0
    medians = {
        kind: {name: statistics.median(run[name] for run in runs) for name in runs[0]} for kind, runs in found.items()
    }
    plain = medians["none"]["seconds"]
    figures: dict[str, Any] = {
        "processes": mesh.world_size,
        "checkpoint_bytes": size,
        "update_seconds": plain / options.updates,
        "waited_for_copy_seconds": medians["beside"]["begun"],
        "written_beside_after_seconds": medians["beside"]["written"],
    }
    for kind in ("beside", "waiting"):
        # Of runs that were made one after the other, since machines are faster at times.
        costs = [run["seconds"] - bare["seconds"] for run, bare in zip(found[kind], found["none"], strict=True)]
        cost = statistics.median(costs)
        figures[f"{kind}_seconds"] = cost
        figures[f"{kind}_share"] = cost / (60 * options.minutes)
    return figures


def main() -> None:
    """Measure and tell."""
    options = parse_options(Options)
    mesh = Mesh.start(options.device)
    folder = Path(mesh.decide(lambda: tempfile.mkdtemp(prefix="saving-", dir=options.folder)))
    figures = measure(options, mesh, folder)
    mesh.barrier()
    if mesh.is_main:
        table = Table("figure", "value")
        for name, value in figures.items():
            table.add_row(name, f"{value:.2%}" if name.endswith("share") else f"{value:,.4g}")
        Console().print(table)
        if options.json is not None:
            Path(options.json).write_text(json.dumps(figures, indent=2) + "\n")
        shutil.rmtree(folder, ignore_errors=True)
    mesh.stop()


if __name__ == "__main__":
    run_launcher(main)
