"""What a run tells of itself on the card of the model that it exports."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import yaml

from dalle_ds.config import load_preset, preset_names, to_dict
from dalle_ds.data.dataset import read_info
from dalle_ds.errors import ConfigError, DataError
from dalle_ds.jsonl import read_records
from dalle_ds.models.card import write_card
from dalle_ds.models.pretrained import export_folder
from dalle_ds.tasks import Task
from dalle_ds.tasks.stages import SECTIONS

_TOLD = ("model", "objective", "lora", "optim", "train", "sampling")
"""Sections of the configuration that say what the model is, without paths."""


def write_run_card(folder: Path, task: Task[Any], step: int, metrics_file: Path) -> None:
    """Write the card of a run's export in `folder`, whose weights have had `step` updates; OSError where that fails."""
    run = task.run
    names = [Path(corpus).resolve().name for corpus in run.corpora]
    try:
        infos = [read_info(Path(corpus)) for corpus in run.corpora]
    except DataError:  # moved or gone since
        infos = []
    lines = [] if infos else [f"- `{name}`" for name in names]
    for name, info in zip(names, infos, strict=False):
        counts = ", ".join(f"{count:,} {split}" for split, count in info["splits"].items())
        lines.append(
            f"- `{name}`: corpus {info['options']['corpus']}, rows: {counts}. {' '.join(info.get('notes', []))}".strip()
        )
    done = f"{step:,} updates of {run.train.batch_size} images, seed {run.seed}."
    if presets := _presets(task):
        done += f" Its shape is that of the preset {' and '.join(presets)}."
    if run.init:
        place = export_folder(run.init).resolve()
        name = place.parent.name if place.name == "export" else place.name
        done += f"\n\nIt began with the model in `{name}`, fingerprint `{task.initial_fingerprint[:12]}`"
        done += f", and {'low-rank adapters were' if task.lora else 'all of it was'} trained."
    values = to_dict(run)
    config = yaml.safe_dump({name: values[name] for name in _TOLD if name in values}, sort_keys=False)
    sections = {"Training": done, "Data": "\n".join(lines)}
    at, validation = _last_validation(metrics_file, step)
    if validation:
        rows = run.report.validation_rows
        if infos:
            rows = min(rows, sum(info["splits"].get("validation", 0) for info in infos))
        table = "\n".join(f"| {name} | {value:.4g} |" for name, value in validation.items())
        protocol = (
            f"After update {at:,}, of {rows:,} rows evenly spread over the split `validation`, by the averaged weights"
        )
        protocol += " where the run averages them."
        sections["Validation"] = f"{protocol}\n\n| metric | value |\n|---|---|\n{table}"
    sections["Configuration"] = f"```yaml\n{config}```"
    tags = ("lora",) if task.lora else ()
    write_card(folder, task.name, sections, tags=tags, validation=validation, data=" and ".join(names))


def _last_validation(metrics_file: Path, step: int) -> tuple[int, dict[str, float]]:
    """Metrics of the last validation up to an update, and that update."""
    found: Sequence[dict[str, Any]] = [
        record
        for record in (read_records(metrics_file) if metrics_file.is_file() else ())
        if record["step"] <= step and any(name.startswith("validation/") for name in record)
    ]
    if not found:
        return 0, {}
    named = {
        name.removeprefix("validation/"): value for name, value in found[-1].items() if name.startswith("validation/")
    }
    return found[-1]["step"], named


def _presets(task: Task[Any]) -> list[str]:
    """Those whose model has the same shape."""
    found = []
    for section in (name for name, stage in SECTIONS.items() if stage == task.name):
        for preset in preset_names():
            try:
                if load_preset(preset, section, type(task.run)).model == task.run.model:
                    found.append(preset)
            except ConfigError:  # it has no such section
                continue
    return found
