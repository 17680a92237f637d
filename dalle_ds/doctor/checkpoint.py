"""What a checkpoint holds, whether it is whole, and in which layouts its run can go on from it."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
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
from dalle_ds.training.checkpoints.folder import CheckpointFolder, faults_of
from dalle_ds.training.checkpoints.storage import Index, matrix_size
from dalle_ds.training.export import read_run

_KINDS = {
    WEIGHT: "weights",
    MOMENTS[0]: "Adam's first moments",
    MOMENTS[1]: "Adam's second moments",
    AVERAGE: "average of the weights",
    ERROR: "PowerSGD's error sums",
}


@dataclass(frozen=True)
class Inspection:
    """A checkpoint, looked at."""

    path: Path
    """Its folder."""
    state: dict[str, Any]
    """As `load_state` returns it."""
    index: Index
    """Of its tensors."""
    run: Run | None
    """The run's configuration; None where the checkpoint lies outside of a run directory."""
    faults: list[str]
    """What is wrong with it, a sentence each."""

    def bytes_by_kind(self) -> dict[str, int]:
        """Bytes of tensors on the disk by what they are, in the order weights, moments, average, error sums."""
        found = dict.fromkeys(_KINDS, 0)
        for name, stored in self.index.tensors.items():
            found[name.partition("/")[0]] += stored.size[0] * stored.size[1] * stored.dtype.itemsize
        return {kind: size for kind, size in found.items() if size}

    def report(self) -> RenderableType:
        """For a terminal."""
        return Group(self._summary(), self._sizes(), self._layouts())

    def _summary(self) -> Table:
        table = _table(str(self.path), "", "")
        layout, rows = self.state["layout"], self.index.parameters.values()
        in_16_bits = sum(row["moments"] == "16-bit" for row in rows)
        for name, value in (
            ("updates", f"{self.state['step']:,}"),
            ("written by", f"dalle_ds {self.state.get('version', 'unknown')}, {_in_words(layout)}"),
            ("precision", layout["precision"]),
            ("parameters", f"{sum(torch.Size(row['shape']).numel() for row in rows):,} in {len(rows):,} tensors"),
            ("moments", f"16-bit in {in_16_bits} tensors, fp32 in {len(rows) - in_16_bits}" if in_16_bits else "fp32"),
            (
                "state",
                "; ".join(self.faults) if self.faults else "complete: every file is as it was written",
            ),
        ):
            table.add_row(name, value, style="bold red" if name == "state" and self.faults else None)
        return table

    def _sizes(self) -> Table:
        table = _table("on the disk", "", "tensors", "type", "MiB")
        sizes = self.bytes_by_kind()
        for kind, size in sizes.items():
            stored = [entry for name, entry in self.index.tensors.items() if name.startswith(f"{kind}/")]
            types = sorted({str(entry.dtype).removeprefix("torch.") for entry in stored})
            table.add_row(_KINDS[kind], f"{len(stored):,}", ", ".join(types), f"{size / 2**20:,.1f}")
        table.add_row("together", f"{len(self.index.tensors):,}", "", f"{sum(sizes.values()) / 2**20:,.1f}")
        return table

    def _layouts(self) -> Table:
        table = _table("can be resumed with", "", "")
        table.add_row("precision", self.state["layout"]["precision"])
        if self.run is None:
            table.add_row("layouts", "unknown: the run's config.yaml is not two folders above")
        else:
            for name, values in layouts(self.run).items():
                table.add_row(name, values)
        return table


def inspect(path: str | Path) -> Inspection:
    """Look at a checkpoint, or at the newest one of a run directory.

    Raises:
        CheckpointError: there is none, or it cannot even be told what it should hold.
    """
    path = Path(path)
    folder: Path | None = path
    if (path / "checkpoints").is_dir():
        folder = next(reversed(CheckpointFolder(path / "checkpoints").all()), None)
        if folder is None:
            raise CheckpointError(f"the run in {path} has no complete checkpoint yet")
    assert folder is not None
    if not folder.is_dir():
        raise CheckpointError(f"{folder} is no folder: name a run directory or a checkpoint in its checkpoints/")
    if not (folder / STATE_NAME).is_file():
        raise CheckpointError(f"{folder} has no {STATE_NAME}, without which it is no checkpoint")
    run_dir = folder.absolute().parent.parent
    run = read_run(run_dir)[1] if (run_dir / "config.yaml").is_file() else None
    state = load_state(folder)
    index = Index(folder / TENSORS_NAME)
    return Inspection(folder, state, index, run, [*faults_of(folder), *_holes(index)])


def layouts(run: Run) -> dict[str, str]:
    """How a run's work may be divided when it is resumed: option → values, in words."""
    batch = run.train.batch_size
    found = {
        "data-parallel processes": f"{_listed(_divisors(batch))}: replicas × shards must divide train.batch_size={batch}",
        "ZeRO stage, offload, micro-batch": "any",
    }
    if isinstance(run, TransformerRun):
        parts = [degree for degree in range(1, run.model.heads + 1) if _fits(run, ParallelConfig(tensor=degree))]
        stages = [degree for degree in range(1, 4 * run.model.depth) if _fits(run, ParallelConfig(pipe=degree))]
        found["parallel.tensor"] = _listed(parts)
        found["parallel.pipe"] = f"1 to {stages[-1]}, more than 1 with ZeRO-1 and one replica"
    return found


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


def _fits(run: TransformerRun, degrees: ParallelConfig) -> bool:
    mesh = Mesh(0, degrees.tensor * degrees.pipe, torch.device("cpu"), degrees)
    try:
        mesh.check(run.model)
    except ConfigError:
        return False
    return True


def _in_words(layout: dict[str, Any]) -> str:
    axes = " × ".join(f"{layout[axis]} {axis}" for axis in ("replicas", "pipe", "shards", "tensor"))
    return (
        f"{layout['processes']} processes ({axes}), ZeRO-{layout['zero_stage']}, offload {layout['offload']}, "
        f"{layout['accumulation']} × {layout['micro_batch']} rows each"
    )


def _divisors(number: int) -> list[int]:
    return [divisor for divisor in range(1, number + 1) if number % divisor == 0]


def _listed(numbers: list[int]) -> str:
    return ", ".join(map(str, numbers))


def _table(title: str, *columns: str) -> Table:
    table = Table(title=title, title_justify="left", title_style="bold", show_header=any(columns))
    for number, column in enumerate(columns):
        table.add_column(column, justify="right" if number and len(columns) > 2 else "left")
    return table
