"""What a checkpoint holds, whether it is whole, and in which layouts its run can go on from it."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

import torch
from rich.console import Group, RenderableType
from rich.table import Table

from dalle_ds.config import ParallelConfig, Run, TransformerRun
from dalle_ds.errors import CheckpointError, ConfigError
from dalle_ds.parallel import Mesh
from dalle_ds.training.checkpoints.content import (
    AVERAGE,
    ERROR,
    MOMENTS,
    STATE_NAME,
    TENSORS_NAME,
    WEIGHT,
    load_state,
)
from dalle_ds.training.checkpoints.manifest import CheckpointFolder, faults_of
from dalle_ds.training.checkpoints.storage import Index, matrix_size
from dalle_ds.training.export import read_run

_KINDS = {
    WEIGHT: "weights",
    MOMENTS[0]: "Adam's first moments",
    MOMENTS[1]: "Adam's second moments",
    AVERAGE: "average of the weights",
    ERROR: "PowerSGD's error-feedback buffers",
}


def check_checkpoint(path: Path) -> tuple[RenderableType, list[str]]:
    """Look at a checkpoint, or at the newest one of a run directory: what there is to show, and what is wrong.

    Raises:
        CheckpointError: there is none, or it cannot even be told what it should hold.
    """
    folder = path
    if (path / "checkpoints").is_dir():
        complete = CheckpointFolder(path / "checkpoints").all()
        if not complete:
            raise CheckpointError(f"the run in {path} has no complete checkpoint yet")
        folder = complete[-1]
    if not folder.is_dir():
        raise CheckpointError(f"{folder} is no folder: name a run directory or a checkpoint in its checkpoints/")
    if not (folder / STATE_NAME).is_file():
        raise CheckpointError(f"{folder} has no {STATE_NAME}, without which it is no checkpoint")
    run_dir = folder.absolute().parent.parent
    run = read_run(run_dir)[1] if (run_dir / "config.yaml").is_file() else None
    state, index = load_state(folder), Index(folder / TENSORS_NAME)
    faults = [*faults_of(folder), *_holes(index)]
    resumed = _table("can be resumed with", [("precision", state["layout"]["precision"]), *_layouts(run).items()])
    summary = _table(str(folder), _summary(state, index))
    summary.add_row(
        "state",
        "; ".join(faults) or "complete: every file is as it was written",
        style="bold red" if faults else None,
    )
    sizes = _table("on the disk", _sizes(index), ("", "tensors", "type", "MiB"))
    return Group(summary, sizes, resumed), faults


def _summary(state: dict[str, Any], index: Index) -> list[tuple[str, str]]:
    layout, rows = state["layout"], index.parameters.values()
    in_16_bits = sum(row["moments"] == "16-bit" for row in rows)
    axes = " × ".join(f"{layout[axis]} {axis}" for axis in ("replicas", "pipe", "shards", "tensor"))
    written = (
        f"dalle_ds {state.get('version', 'unknown')}, {layout['processes']} processes ({axes}), "
        f"ZeRO-{layout['zero_stage']}, offload {layout['offload']}, {layout['accumulation']} × {layout['micro_batch']} "
        "rows each"
    )
    return [
        ("updates", f"{state['step']:,}"),
        ("written by", written),
        ("precision", layout["precision"]),
        ("parameters", f"{sum(torch.Size(row['shape']).numel() for row in rows):,} in {len(rows):,} tensors"),
        ("moments", f"16-bit in {in_16_bits} tensors, fp32 in {len(rows) - in_16_bits}" if in_16_bits else "fp32"),
    ]


def _sizes(index: Index) -> list[tuple[str, str, str, str]]:
    """Tensors on the disk by what they are, in the order of `_KINDS`, and all of them."""
    table, together = [], 0
    for kind, words in _KINDS.items():
        stored = [entry for name, entry in index.tensors.items() if name.startswith(f"{kind}/")]
        types = sorted({str(entry.dtype).removeprefix("torch.") for entry in stored})
        size = sum(entry.size[0] * entry.size[1] * entry.dtype.itemsize for entry in stored)
        together += size
        if size:
            table.append((words, f"{len(stored):,}", ", ".join(types), f"{size / 2**20:,.1f}"))
    return [*table, ("together", f"{len(index.tensors):,}", "", f"{together / 2**20:,.1f}")]


def _layouts(run: Run | None) -> dict[str, str]:
    """How a run's work may be divided when it is resumed: option → values, in words."""
    if run is None:
        return {"layouts": "unknown: the run's config.yaml is not two folders above"}
    batch = run.train.batch_size
    readers = [str(count) for count in range(1, batch + 1) if batch % count == 0]
    found = {
        "data-parallel processes": f"{', '.join(readers)}: replicas × shards must divide train.batch_size={batch}",
        "ZeRO stage, offload, micro-batch": "any",
    }
    if isinstance(run, TransformerRun):
        parts = [n for n in range(1, run.model.heads + 1) if _fits(run, ParallelConfig(tensor=n))]
        stages = [n for n in range(1, 4 * run.model.depth) if _fits(run, ParallelConfig(pipe=n))]
        found["parallel.tensor"] = ", ".join(map(str, parts))
        found["parallel.pipe"] = f"1 to {stages[-1]}, more than 1 with ZeRO-1 and one replica"
    return found


def _fits(run: TransformerRun, degrees: ParallelConfig) -> bool:
    try:
        Mesh(0, degrees.tensor * degrees.pipe, torch.device("cpu"), degrees).check(run.model)
    except ConfigError:
        return False
    return True


def _holes(index: Index) -> Iterable[str]:
    """Sentences about tensors that the index does not have, or not whole."""
    for name, row in index.parameters.items():
        kinds = [WEIGHT, *(MOMENTS if row["step"] > 0 else ())]
        yield from (f"{kind}/{name} is missing" for kind in kinds if f"{kind}/{name}" not in index.tensors)
    for name, stored in index.tensors.items():
        shape = index.parameters.get(name.partition("/")[2], {}).get("shape")
        covered = sum(chunk.at.rows * chunk.at.columns for chunk in stored.chunks)
        if shape is None or matrix_size(shape) != stored.size or covered != stored.size[0] * stored.size[1]:
            yield f"{name} is not stored whole"


def _table(title: str, rows: Iterable[Sequence[str]], columns: Sequence[str] = ("", "")) -> Table:
    table = Table(title=title, title_justify="left", title_style="bold", show_header=any(columns))
    for number, column in enumerate(columns):
        table.add_column(column, justify="right" if number and len(columns) > 2 else "left")
    for row in rows:
        table.add_row(*row)
    return table
