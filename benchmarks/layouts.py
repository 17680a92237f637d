"""One computation, every layout: losses and gradient norms of one run, and what becomes of it when it is resumed in another.

    python benchmarks/layouts.py [--resume True] [--json FILE]

Starts the deepspeed launcher for each number of processes, up to four on one machine. Every layout trains the same
transformer, in fp32, from one seed on the same made-up captions and images, with clipping in every update; the first table
holds it against one process. With `--resume True` a run of each layout is stopped half-way and taken further in every other
one; the second table says how far its losses then are from those of the run that was not stopped, and which are equal to the
bit.
"""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
import tempfile
from collections import defaultdict
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from measure import check_flags
from PIL import Image
from rich.console import Console
from rich.table import Table
from torch import nn

from dalle_ds.cli import parse_options, run_launcher
from dalle_ds.config import PADDING, DalleConfig, TransformerRun, from_dict, to_dict
from dalle_ds.data.faults import Fault
from dalle_ds.errors import DalleError
from dalle_ds.models import Dalle
from dalle_ds.parallel import Mesh
from dalle_ds.tasks import Batch
from dalle_ds.tasks.base import Samples, Task
from dalle_ds.tasks.transformer import TransformerTask
from dalle_ds.training.checkpoints.manifest import CheckpointFolder

ROWS = 64
"""Images of the made-up training data."""


@dataclass(frozen=True)
class Options:
    """Shape of the model and length of the runs."""

    width: int = 64
    """d_model."""
    depth: int = 4
    """Attention layers."""
    batch: int = 8
    """Images per update over all processes."""
    steps: int = 10
    """Updates; runs are stopped after half of them."""
    resume: bool = False
    """Whether to make the second table too, which takes some ten minutes."""
    layouts: tuple[str, ...] = ()
    """Names of layouts, with `one` among them; all by default."""
    device: str = "cpu"
    """cpu or cuda."""
    json: str | None = None
    """File for the figures."""


@dataclass(frozen=True)
class Layout:
    """One way to divide the work."""

    processes: int
    zero_stage: int
    parallel: dict[str, Any]


LAYOUTS = {
    "one": Layout(1, 0, {}),
    "ZeRO-1 ×2": Layout(2, 1, {}),
    "ZeRO-2 ×2": Layout(2, 2, {}),
    "ZeRO-3 ×2": Layout(2, 3, {}),
    "ZeRO-1 ×4": Layout(4, 1, {}),
    "ZeRO-2 ×4": Layout(4, 2, {}),
    "ZeRO-3 ×4": Layout(4, 3, {}),
    "hierarchical 2×2": Layout(4, 3, {"replicas": 2}),
    "TP 2": Layout(2, 1, {"tensor": 2}),
    "TP 2, sequence": Layout(2, 1, {"tensor": 2, "sequence": True}),
    "TP 4": Layout(4, 1, {"tensor": 4}),
    "TP 2 × ZeRO-3 2": Layout(4, 3, {"tensor": 2}),
    "PP 2": Layout(2, 1, {"pipe": 2}),
    "PP 4": Layout(4, 1, {"pipe": 4}),
    "PP 2 × TP 2": Layout(4, 1, {"pipe": 2, "tensor": 2}),
    "PP 2 × DP 2": Layout(4, 1, {"pipe": 2}),
}


class MadeUp:
    """Captions and codes from a row's number; rows of `loader.Samples`."""

    faults: tuple[Fault, ...] = ()

    def __init__(self, config: DalleConfig, rows: int) -> None:
        self._config, self._rows = config, rows

    def __len__(self) -> int:
        return self._rows

    def sample(self, row: int, rng: np.random.Generator) -> dict[str, Any]:
        """A caption of a length of its own, another one, and an image's codes."""
        drawn = np.random.default_rng(row)
        texts = [np.full(self._config.text_len, PADDING, dtype=np.int64) for _ in range(2)]
        for text in texts:
            length = int(drawn.integers(1, self._config.text_len + 1))
            text[:length] = drawn.integers(0, self._config.text_vocab, length)
        codes = drawn.integers(0, self._config.image_vocab, self._config.image_len)
        return {"text": texts[0], "other_text": texts[1], "codes": codes}

    def check_unchanged(self) -> None:
        """Numbers do not change."""


class MadeUpTask(TransformerTask):
    """The transformer's task, without a dVAE, a tokenizer or a corpus."""

    def __init__(self, run: TransformerRun) -> None:
        Task.__init__(self, run)

    def samples(self, split: str) -> Samples:
        return MadeUp(self.run.model, ROWS if split == "train" else 8)

    def identity(self) -> dict[str, str]:
        return {"data": "made up"}

    def describe(self) -> list[str]:
        return []

    def preview(self, model: nn.Module, batch: Batch) -> Image.Image:
        return Image.new("RGB", (1, 1))

    def export(self, model: nn.Module, folder: Path) -> None:
        assert isinstance(model, Dalle)
        model.save_pretrained(folder)


def main() -> None:
    """Plan, launch, compare."""
    if sys.argv[-1].endswith("jobs.json"):
        work_on(Path(sys.argv[-1]))
        return
    options = parse_options(Options)
    check_flags(options, "width", "depth", "batch", "steps")
    names = options.layouts or tuple(LAYOUTS)
    with tempfile.TemporaryDirectory() as folder:
        results = measured(options, names, Path(folder))
    console = Console(width=None if sys.stdout.isatty() else 127)
    console.print(straight_table(results["straight"]))
    if options.resume:
        console.print(resumed_table(results["resumed"]))
    if options.json is not None:
        Path(options.json).write_text(json.dumps(results, indent=2) + "\n")


def measured(options: Options, names: tuple[str, ...], folder: Path) -> dict[str, Any]:
    """Losses and norms of straight runs, and how far resumed ones are from them."""
    launch_all(options, [(name, folder / name) for name in names], folder)
    runs = {name: figures(folder / name) for name in names}
    straight = {name: {"loss": run["loss"], "grad_norm": run["grad_norm"]} for name, run in runs.items()}
    results: dict[str, Any] = {"straight": straight, "resumed": {}}
    if options.resume:
        half = options.steps // 2
        pairs = [(source, target, folder / f"{source} to {target}") for source in names for target in names]
        for source, _, run_dir in pairs:
            half_of(folder / source, run_dir, half)
        launch_all(options, [(target, run_dir) for _, target, run_dir in pairs], folder)
        for source in names:
            for target in names:
                resumed = figures(folder / f"{source} to {target}")
                same = all(resumed[key] == runs[source][key] for key in resumed)
                distance = max(
                    abs(a - b) for a, b in zip(resumed["loss"][half:], runs[source]["loss"][half:], strict=True)
                )
                results["resumed"].setdefault(source, {})[target] = {"loss": distance, "same_bits": same}
    return results


def job(options: Options, name: str, run_dir: Path) -> dict[str, Any]:
    """What a process needs to know to train under a layout."""
    layout = LAYOUTS[name]
    model = DalleConfig(
        width=options.width, depth=options.depth, heads=4, text_len=12, grid=6, text_vocab=96, image_vocab=64
    )
    run = {
        "run_dir": str(run_dir),
        "steps": options.steps,
        "save_every": options.steps // 2,
        "model": to_dict(model),
        "parallel": layout.parallel,
        "train": {"batch_size": options.batch, "average_decay": 0.9},
        "optim": {"lr": 3e-3, "warmup_steps": 3, "schedule": "cosine", "decay_steps": options.steps, "clip": 0.25},
        "loader": {"workers": 0},
        "report": {"log_every": 1, "validate_every": 0, "preview_every": 0, "keep_checkpoints": 2},
    }
    # Small parameters are not sharded by default, which would hide what sharding breaks.
    zero = {"stage": layout.zero_stage} | ({"stage3_param_persistence_threshold": 0} if layout.zero_stage == 3 else {})
    return {"run": run, "deepspeed": {"zero_optimization": zero}}


def half_of(run_dir: Path, copy: Path, step: int) -> None:
    """Copy a run as it was after `step` updates."""
    shutil.copytree(run_dir, copy)
    shutil.rmtree(copy / "export")
    CheckpointFolder(copy / "checkpoints").drop_after(step)


def launch_all(options: Options, runs: list[tuple[str, Path]], folder: Path) -> None:
    """Train (layout, run directory) for each, with one launch for each number of processes."""
    for processes in sorted({LAYOUTS[name].processes for name, _ in runs}):
        some = [(name, run_dir) for name, run_dir in runs if LAYOUTS[name].processes == processes]
        jobs = [job(options, name, run_dir) for name, run_dir in some]
        launch({"device": options.device, "jobs": jobs}, processes, folder)


def launch(work: dict[str, Any], processes: int, folder: Path) -> None:
    """Do jobs, one after the other, in new processes."""
    description = folder / "jobs.json"
    description.write_text(json.dumps(work))
    launcher = Path(sys.executable).with_name("deepspeed")
    command = [str(launcher), "--num_gpus", str(processes), "--master_port", "29611", __file__, str(description)]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    if done.returncode != 0:
        raise DalleError(f"{processes} processes failed:\n{done.stdout[-3000:]}{done.stderr[-3000:]}")


def work_on(description: Path) -> None:
    """Do jobs, as one of the launched processes."""
    work = json.loads(description.read_text())
    mesh = Mesh.start(work["device"])
    from dalle_ds.training.trainer import Trainer

    for entry in work["jobs"]:
        run = from_dict(TransformerRun, entry["run"], str(description))
        Trainer(MadeUpTask, run, entry["deepspeed"], mesh).fit()
    mesh.stop()


def figures(run_dir: Path) -> dict[str, list[float]]:
    """Losses and norms of a run, update by update."""
    found: dict[str, list[float]] = defaultdict(list)
    for line in (run_dir / "metrics.jsonl").read_text().splitlines():
        record = json.loads(line)
        for name in ("loss", "grad_norm", "grad_norm_clipped"):
            if name in record:
                found[name].append(record[name])
    return dict(found)


def straight_table(runs: dict[str, Any]) -> Table:
    """Each layout against one process."""
    table = Table(title="from one seed, in fp32: largest differences from one process")
    for column in ("layout", "ranks", "first loss", "last loss", "last norm", "Δ loss", "Δ norm"):
        table.add_column(column, justify="left" if column == "layout" else "right", no_wrap=True)
    one = runs["one"]
    for name, run in runs.items():
        loss = max(abs(a - b) for a, b in zip(run["loss"], one["loss"], strict=True))
        norm = max(abs(a - b) for a, b in zip(run["grad_norm"], one["grad_norm"], strict=True))
        cells = [f"{number:.6f}" for number in (run["loss"][0], run["loss"][-1], run["grad_norm"][-1])]
        table.add_row(name, str(LAYOUTS[name].processes), *cells, f"{loss:.1e}", f"{norm:.1e}")
    return table


def resumed_table(resumed: dict[str, Any]) -> Table:
    """Each pair of layouts."""
    table = Table(title="saved in (row), resumed in (column): by how many millionths losses differ; = equal to the bit")
    table.add_column("")
    table.add_column("saved in", no_wrap=True)
    for number, _ in enumerate(resumed, 1):
        table.add_column(str(number), justify="right", no_wrap=True)
    for number, (source, targets) in enumerate(resumed.items(), 1):
        cells = ["=" if entry["same_bits"] else f"{1e6 * entry['loss']:.1f}" for entry in targets.values()]
        table.add_row(str(number), source, *cells)
    return table


if __name__ == "__main__":
    run_launcher(main)
