"""Checkpoints made by one process, without an engine."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from dalle_ds.training.checkpoint_folder import CheckpointFolder
from dalle_ds.training.manifest import Manifest, record_of
from dalle_ds.training.storage import Pieces, Planner


def write_tensors(folder: Path, pieces: Mapping[str, Pieces], parameters: dict[str, dict[str, Any]]) -> None:
    """Tensors and their index."""
    plan = Planner().plan(pieces)
    plan.write(folder, pieces)
    plan.write_index(folder, parameters)


def write_checkpoint(
    folder: Path, state: dict[str, Any], pieces: Mapping[str, Pieces], parameters: dict[str, dict[str, Any]]
) -> Path:
    """A complete checkpoint."""
    checkpoints = CheckpointFolder(folder)
    partial = checkpoints.begin(state["step"])
    (partial / "tensors").mkdir()
    write_tensors(partial / "tensors", pieces, parameters)
    (partial / "state.json").write_text(json.dumps({"format": 3, **state}))
    names = [path.relative_to(partial).as_posix() for path in partial.rglob("*") if path.is_file()]
    return checkpoints.complete(partial, Manifest(state["step"], {name: record_of(partial / name) for name in names}))
