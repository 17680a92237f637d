"""Forward and backward passes of one update: on a plain engine, with cached gradients, in a pipeline, sharpness-aware."""

from __future__ import annotations

from typing import Any

from dalle_ds.parallel import Mesh
from dalle_ds.tasks import Task
from dalle_ds.tasks.layered import LayeredTask
from dalle_ds.tasks.whole_batch import WholeBatchTask
from dalle_ds.training.passes.base import EnginePasses, Passes
from dalle_ds.training.passes.caching import CachingPasses
from dalle_ds.training.passes.pipeline import PipelinePasses
from dalle_ds.training.passes.sharpness import SharpPasses

__all__ = ["CachingPasses", "EnginePasses", "Passes", "PipelinePasses", "SharpPasses", "passes_of"]


def passes_of(task: Task[Any], engine: Any, mesh: Mesh) -> Passes:
    """The passes that fit an engine and its task."""
    if mesh.size("pipe") > 1:
        assert isinstance(task, LayeredTask)
        return PipelinePasses(task, engine, mesh)
    if isinstance(task, WholeBatchTask):
        return CachingPasses(task, engine, mesh) if task.sharpness is None else SharpPasses(task, engine, mesh)
    return EnginePasses(task, engine)
