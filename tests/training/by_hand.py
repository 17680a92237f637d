"""Checkpoints that tests write: by one process without an engine, and at once."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from dalle_ds.errors import CheckpointError
from dalle_ds.parallel import Mesh
from dalle_ds.training.checkpoints.content import TrainedTensors
from dalle_ds.training.checkpoints.manifest import CheckpointFolder, Manifest, record_of
from dalle_ds.training.checkpoints.saver import AsyncCheckpointer
from dalle_ds.training.checkpoints.storage import LocalShards
from dalle_ds.training.checkpoints.writing import plan_for


def write_tensors(folder: Path, shards: Mapping[str, LocalShards], parameters: dict[str, dict[str, Any]]) -> None:
    """Tensors and their index."""
    plan = plan_for(shards, None)
    plan.write(folder, shards)
    plan.write_index(folder, parameters)


def write_checkpoint(
    folder: Path, state: dict[str, Any], shards: Mapping[str, LocalShards], parameters: dict[str, dict[str, Any]]
) -> Path:
    """A complete checkpoint."""
    checkpoints = CheckpointFolder(folder)
    partial = checkpoints.begin(state["step"])
    (partial / "tensors").mkdir()
    write_tensors(partial / "tensors", shards, parameters)
    (partial / "state.json").write_text(json.dumps({"format": 3, **state}))
    names = [path.relative_to(partial).as_posix() for path in partial.rglob("*") if path.is_file()]
    return checkpoints.complete(partial, Manifest(state["step"], {name: record_of(partial / name) for name in names}))


def save_checkpoint(
    folder: Path, step: int, state: dict[str, Any], trained: TrainedTensors, mesh: Mesh, *, keep: int
) -> Path:
    """Write `folder/step-N` and wait for it; delete all but the `keep` newest. Collective.

    Args:
        step: updates done.
        state: JSON-able; comes back from `load_state`.

    Raises:
        CheckpointError: it could not be written, on some process; no half-written checkpoint remains under a valid name.
    """
    checkpoints = CheckpointFolder(folder)
    saver = AsyncCheckpointer(checkpoints, trained, mesh, keep=keep, background=False)
    saver.begin(step, state)
    saved = saver.finish()
    assert saved is not None
    if saved.failure is not None:
        raise CheckpointError(saved.failure)
    return folder / f"step-{step}"
