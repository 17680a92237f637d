"""Export a model from a checkpoint, as training does at its end: no DeepSpeed, one process, one tensor in memory at a time."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from dalle_ds.cli import parse_options


@dataclass(frozen=True)
class Options:
    """Write the exported model of any checkpoint that a run still has."""

    run_dir: str
    """Run directory of launchers/train_dvae.py or train_transformer.py; the run may be going on."""
    step: int | None = None
    """Checkpoint, by the updates it has had; None takes the newest."""
    weights: Literal["average", "raw"] | None = None
    """`average` of the weights or `raw` ones; None takes the average if the run has one, as training does."""
    out: str | None = None
    """Folder to write, or to replace; None takes RUN_DIR/export."""
    dtype: Literal["fp32", "bf16", "fp16"] = "fp32"
    """Of the weights that are written."""


def main() -> None:
    """Parse, export."""
    options = parse_options(Options)
    # Imported once the options are read, so that --help and mistakes in them are quick.
    from dalle_ds.training.export import export_checkpoint

    folder, step = export_checkpoint(
        options.run_dir, step=options.step, weights=options.weights, out=options.out, dtype=options.dtype
    )
    print(f"exported step {step} to {folder}")
