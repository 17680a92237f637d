"""Checkpoints that are complete or absent: written beside, renamed last (design decision 10)."""

from __future__ import annotations

import json
import pickle
import re
import shutil
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file

from dalle_ds.errors import CheckpointError
from dalle_ds.files import sync_folder
from dalle_ds.optim import WeightAverage
from dalle_ds.parallel import Mesh

ENGINE_TAG = "engine"
STATE_NAME = "state.json"
_STEP = re.compile(r"step-(\d+)")


def newest_checkpoint(folder: Path) -> Path | None:
    """The complete checkpoint of the latest update in `folder`, or None. Unfinished ones have other names."""
    return max(_complete(folder), key=_step_of, default=None)


def newest_good_checkpoint(folder: Path) -> Path | None:
    """The newest one that was not written in the midst of updates that went wrong, as the last of a run may be."""
    for checkpoint in sorted(_complete(folder), key=_step_of, reverse=True):
        guard = load_state(checkpoint).get("guard")
        if guard is None or guard["bad_in_a_row"] == 0:
            return checkpoint
    return None


def drop_checkpoints_after(folder: Path, step: int) -> None:
    """Remove the checkpoints of updates beyond `step`, which a run that went back there must not be resumed from."""
    for checkpoint in _complete(folder):
        if _step_of(checkpoint) > step:
            shutil.rmtree(checkpoint, ignore_errors=True)


def save_checkpoint(
    folder: Path, step: int, engine: Any, average: WeightAverage | None, state: dict[str, Any], mesh: Mesh, keep: int
) -> Path:
    """Write `folder/step-N` and delete all but the `keep` newest. Collective.

    Args:
        step: updates done.
        state: JSON-able; comes back from `load_state`.

    Raises:
        CheckpointError: it could not be written, on this process; no half-written checkpoint remains under a valid name.
    """
    final = folder / f"step-{step}"
    partial = folder / f"partial-step-{step}"
    try:
        if mesh.is_main:
            shutil.rmtree(partial, ignore_errors=True)
            partial.mkdir(parents=True)
        mesh.barrier()
        engine.save_checkpoint(str(partial), tag=ENGINE_TAG, save_latest=False)
        if average is not None:
            save_file(average.state_dict(), _average_file(partial, mesh))
        mesh.barrier()
        if mesh.is_main:
            (partial / STATE_NAME).write_text(json.dumps(state, indent=2) + "\n")
            sync_folder(partial)
            shutil.rmtree(final, ignore_errors=True)
            partial.rename(final)
            for old in sorted(_complete(folder), key=_step_of)[:-keep]:
                shutil.rmtree(old, ignore_errors=True)
        mesh.barrier()
    except (OSError, RuntimeError, SafetensorError) as error:
        # PyTorch reports a full disk in words of its own, so the space is told too.
        free = shutil.disk_usage(folder).free / 2**20
        shutil.rmtree(partial, ignore_errors=True)
        raise CheckpointError(
            f"could not save the checkpoint of step {step} to {final} ({free:,.0f} MiB free there; {error}): free some space "
            "and start the run again, it goes on from the last complete checkpoint"
        ) from error
    return final


def load_state(checkpoint: Path) -> dict[str, Any]:
    """What `save_checkpoint` was given as `state`."""
    try:
        state: dict[str, Any] = json.loads((checkpoint / STATE_NAME).read_text())
        missing = {"step", "identity", "layout", "learning_rate"} - set(state)
        if missing:
            raise ValueError(f"it has no {', '.join(sorted(missing))}")
    except (OSError, ValueError, TypeError) as error:
        raise CheckpointError(
            f"the checkpoint {checkpoint} cannot be read: {error}; delete it to resume from an older one"
        ) from error
    return state


def load_checkpoint(checkpoint: Path, engine: Any, average: WeightAverage | None, mesh: Mesh) -> None:
    """Put a checkpoint's weights, optimizer state and average into a fresh engine of the same layout. Collective.

    Raises:
        CheckpointError: a file is missing or broken.
    """
    try:
        loaded, _ = engine.load_checkpoint(str(checkpoint), tag=ENGINE_TAG)
        if loaded is None:
            raise CheckpointError(f"DeepSpeed found no weights in {checkpoint}")
        if average is not None:
            average.load_state_dict(load_file(_average_file(checkpoint, mesh)))
    except (OSError, EOFError, pickle.UnpicklingError, SafetensorError) as error:
        raise CheckpointError(
            f"the checkpoint {checkpoint} has a broken or missing file ({error}): delete it to resume from an older one"
        ) from error
    except (RuntimeError, KeyError, ValueError, AssertionError) as error:
        raise CheckpointError(
            f"the checkpoint {checkpoint} cannot be loaded ({str(error) or 'a file is missing or does not fit'}): resume with "
            "the DeepSpeed JSON that it was written with; where a file is broken, delete it to resume from an older one"
        ) from error
    if torch.cuda.is_available():
        torch.cuda.empty_cache()


def _average_file(folder: Path, mesh: Mesh) -> Path:
    return folder / f"average-rank-{mesh.rank}.safetensors"


def _complete(folder: Path) -> list[Path]:
    if not folder.is_dir():
        return []
    return [path for path in folder.iterdir() if _STEP.fullmatch(path.name) and (path / STATE_NAME).is_file()]


def _step_of(path: Path) -> int:
    match = _STEP.fullmatch(path.name)
    assert match is not None
    return int(match[1])
