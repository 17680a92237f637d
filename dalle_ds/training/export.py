"""Exported models from checkpoints: what training exports at its end, at any update that is still kept.

One tensor is in memory at a time, and neither DeepSpeed nor a GPU is needed.
"""

from __future__ import annotations

import functools
import shutil
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any, Literal

import torch
from torch import Tensor, nn

from dalle_ds.config import Precision, Run
from dalle_ds.errors import CheckpointError, ConfigError
from dalle_ds.files import built_beside, write_json
from dalle_ds.models.adapters import Adapter, adapted, merge, product
from dalle_ds.models.card import CARD_NAME, write_card
from dalle_ds.models.pretrained import (
    CONFIG_NAME,
    WEIGHTS_NAME,
    export_folder,
    fingerprint,
    load_config,
    read_safetensors,
    save_model,
)
from dalle_ds.parsing import parse_json
from dalle_ds.precision.choice import DTYPES
from dalle_ds.sampling.text_to_embedding import PARTS_NAME as PRIOR_PARTS_NAME
from dalle_ds.tasks import Task
from dalle_ds.tasks.stages import STAGES
from dalle_ds.training.card import write_run_card
from dalle_ds.training.checkpoints.content import AVERAGE, TENSORS_NAME, WEIGHT, load_state
from dalle_ds.training.checkpoints.manifest import require_whole
from dalle_ds.training.checkpoints.storage import Index
from dalle_ds.training.checkpoints.writing import write_safetensors
from dalle_ds.training.run_directory import STEP_NAME, RunDirectory, read_config, run_of

Weights = Literal["average", "raw"]


def read_run(path: Path) -> tuple[str, Run]:
    """The stage and the configuration of the run in folder `path`; CheckpointError where there is none of a known stage."""
    stage, values = read_config(path)
    if stage not in STAGES:
        raise CheckpointError(f"{path} holds a run of stage {stage!r}: this version knows {', '.join(STAGES)}")
    return stage, run_of(STAGES[stage][0], values, str(path))


def export_checkpoint(
    run_dir: str | Path,
    *,
    step: int | None = None,
    weights: Weights | None = None,
    out: str | Path | None = None,
    dtype: Precision = "fp32",
) -> tuple[Path, int]:
    """Write an exported model of a run, as its task does at the end of training, whole or not at all.

    Args:
        step: updates that the model has had; None takes the newest checkpoint.
        weights: the average of the weights, or these themselves; None takes the average if there is one, as training does.
        out: folder to write, which is replaced; None takes the run's own export.
        dtype: of the weights that are written.

    Returns:
        The folder, and the updates that the model has had.

    Raises:
        CheckpointError: no such run or checkpoint, one that is broken, or a folder that cannot be written.
        ConfigError: an average asked for where there is none, or `out` is something else than an exported model.
    """
    path = Path(run_dir)
    stage, run = read_run(path)
    task = STAGES[stage][1](run)
    directory = RunDirectory(path, stage, run)
    checkpoints = directory.checkpoints
    newest = next(reversed(checkpoints.all()), None)
    checkpoint = newest if step is None else checkpoints.path / f"step-{step}"
    if checkpoint is None or not checkpoint.is_dir():
        kept = [folder.name for folder in checkpoints.all()]
        what = "no checkpoint" if step is None else f"no checkpoint of step {step}"
        raise CheckpointError(f"the run in {path} has {what}: it has {', '.join(kept) or 'none yet'}")
    require_whole(checkpoint)
    state = load_state(checkpoint)
    for name, found in task.parts().items():
        if found != state["identity"].get(name):
            where = f" at {getattr(run, name)}" if hasattr(run, name) else ""
            raise CheckpointError(f"the {name}{where} is not the one that the run began with: put that one back there")
    has_average = run.train.average_decay is not None and state["step"] >= run.train.average_every
    if weights == "average" and not has_average:
        raise ConfigError(f"{checkpoint} has no average of the weights yet: leave --weights out, or give raw")
    kind = AVERAGE if has_average and weights != "raw" else WEIGHT
    is_usual = (kind == AVERAGE) == has_average
    if is_usual and directory.exported_step() == state["step"]:
        task.recall(directory.export)
    index = Index(checkpoint / TENSORS_NAME)
    folder = Path(out) if out is not None else directory.export
    if folder.exists() and not (folder / WEIGHTS_NAME).is_file() and (folder.is_file() or any(folder.iterdir())):
        raise ConfigError(f"--out {folder} is there already, and no exported model: name a new folder")
    try:
        with built_beside(folder) as partial:
            task.export(_stored_model(task, index, kind, DTYPES[dtype]), partial)
            write_run_card(partial, task, state["step"], directory.metrics_file)
    except OSError as error:
        raise CheckpointError(f"could not write the model to {folder}: {error}; free some space") from error
    if folder == directory.export and dtype == "fp32" and is_usual:
        directory.mark_exported(state["step"])
    return folder, state["step"]


def merge_adapters(base: str | Path, adapters: Sequence[tuple[str | Path, float]], out: str | Path) -> Path:
    """Write an exported model with adapters merged into it: W + Σ weight · factor · B A, in whatever order they are given.

    Args:
        base: the exported model, or its run, that all of them were trained on.
        adapters: folders or runs, each with a weight.
        out: new folder.

    Returns:
        `out`.

    Raises:
        CheckpointError: an adapter is of another model, or something cannot be read or written.
        ConfigError: `out` is there already.
    """
    folder, out = export_folder(base), Path(out)
    if out.exists() or not adapters:
        raise ConfigError(f"--out {out} is there already: name a new folder" if adapters else "--adapter is missing")
    weights = read_safetensors(folder / WEIGHTS_NAME)
    known = fingerprint(weights)
    found: list[tuple[str, float, Adapter]] = []
    for path, weight in adapters:
        adapter = Adapter.load(path)
        if adapter.base != known:
            raise CheckpointError(
                f"--adapter {path} is not of the model in --model {base} ({known[:12]}), but of the one that was in "
                f"{adapter.where} ({adapter.base[:12]}): name that one"
            )
        found.append((fingerprint(adapter.weights), weight, adapter))
    kind = adapter.kind
    run_kind, task = STAGES[kind]
    blank: Any = run_kind()
    config = load_config(folder, kind, type(blank.model))
    with torch.device("meta"):
        model = task.planned(replace(blank, model=config)).build_model()
    model.load_state_dict({name: value.float() for name, value in weights.items()}, assign=True)
    for _, weight, adapter in sorted(found, key=lambda each: each[:2]):  # in an order of their own
        merge(model, adapter.weights, weight * adapter.factor)
    try:
        with built_beside(out) as partial:
            save_model(partial, kind, config, model.state_dict())
            own = {WEIGHTS_NAME, CONFIG_NAME, STEP_NAME, CARD_NAME}
            shutil.copytree(
                folder, partial, ignore=lambda where, _: own if Path(where) == folder else (), dirs_exist_ok=True
            )
            if (folder / CARD_NAME).is_file():  # where its data is from
                shutil.copy(folder / CARD_NAME, partial / "BASE.md")
            # A decoder's `x0_error` stays: it is near enough. What was measured for Analytic-DPM is of other weights.
            if kind == "prior":
                facts = parse_json((partial / PRIOR_PARTS_NAME).read_bytes())
                write_json(partial / PRIOR_PARTS_NAME, {**facts, "analytic": None})
            listed = "\n".join(f"- `{Path(path).name}`, times {weight:g}" for path, weight in adapters)
            merged = (
                f"Low-rank adapters were merged into the model of fingerprint `{known[:12]}` (BASE.md):\n\n{listed}"
            )
            write_card(partial, kind, {"Adapters": merged}, tags=("lora",))
    except OSError as error:
        raise CheckpointError(f"could not write the model to {out}: {error}; free some space") from error
    return out


def _stored_model(task: Task[Any], index: Index, kind: str, dtype: torch.dtype) -> nn.Module:
    """A model that has its weights in a checkpoint, and none in memory: of use for nothing but to be exported."""
    with torch.device("meta"):
        model = task.build_model()
    shapes = {name: value.shape for name, value in model.state_dict().items()}
    if task.lora is not None:
        initial = task.initial_weights() or {}
        adapters = {
            name: index.tensor(f"{kind}/{name}").view(entry["shape"]) for name, entry in index.parameters.items()
        }
    missing = next((name for name in shapes if task.lora is None and f"{kind}/{name}" not in index.tensors), None)
    if missing is not None:
        raise CheckpointError(f"{index.folder} has no {missing}: it is of another model")
    # An export asks the model for its device, which is not to be "meta".
    nothing = torch.zeros(())
    model.load_state_dict({name: nothing.expand(shape) for name, shape in shapes.items()}, assign=True)

    def read(name: str) -> Tensor:
        if task.lora is None:
            return index.tensor(f"{kind}/{name}").view(shapes[name])
        layer, whole = name.removesuffix(".weight"), initial[name].float()
        return whole + task.lora.factor * product(model, adapters, layer) if layer in adapted(adapters) else whole

    def save_pretrained(path: str | Path) -> None:
        save_model(path, task.name, model.config, {})
        tensors = [(name, dtype, shape, functools.partial(read, name)) for name, shape in shapes.items()]
        write_safetensors(Path(path) / WEIGHTS_NAME, tensors, {"format": "pt"})

    model.save_pretrained = save_pretrained  # type: ignore[assignment]
    return model
