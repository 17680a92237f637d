"""What a run takes over from the model that it begins with (`init`): its shape, what it was trained to, and with what."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from dalle_ds.config import Run, to_dict
from dalle_ds.errors import CheckpointError, ConfigError
from dalle_ds.models.pretrained import export_folder, load_config
from dalle_ds.parsing import parse_json
from dalle_ds.sampling import image_diffusion, pipeline, text_to_embedding

_FACTS = (pipeline.PARTS_NAME, text_to_embedding.PARTS_NAME, image_diffusion.PARTS_NAME)
_TRAINED_TO = ("schedule", "timesteps", "predicts", "residual")
"""Of `objective`: what the outputs of a model mean."""
_FREE = ("dropout", "noise")
"""What may be another."""


def initial_facts(path: str | Path) -> dict[str, Any]:
    """What an export says of its training besides the model's shape: fingerprints of parts, noise; CheckpointError where it
    cannot be read."""
    folder = export_folder(path)
    facts: dict[str, Any] = {}
    for file in (folder / name for name in _FACTS):
        try:
            facts |= parse_json(file.read_bytes()) if file.is_file() else {}
        except (OSError, ValueError, TypeError) as error:
            raise CheckpointError(f"{file} cannot be read ({error}): export the model again") from error
    return facts


def initial_settings(kind: type[Run], stage: str, path: str | Path) -> dict[str, dict[str, Any]]:
    """Sections of a run's configuration, in part, that go on as the exported model at `path` was trained.

    CheckpointError, ConfigError where it is none of this stage.
    """
    run: Any = kind()
    config, facts = load_config(export_folder(path), stage, type(run.model)), initial_facts(path)
    found = {"model": _stated(config)}
    if hasattr(run, "objective"):
        found["objective"] = {
            name: facts[name] for name in _TRAINED_TO if name in facts and hasattr(run.objective, name)
        }
    if "noise_share" in facts and hasattr(run.objective, "noise"):
        found["objective"]["noise"] = facts["noise_share"]
    if hasattr(run, "sampling"):
        found["sampling"] = facts.get("sampling", {})
    return found


def check_settings(run: Run, stage: str) -> None:
    """Refuse a run that would give the weights of `run.init` another meaning; a ConfigError names the options to add."""
    flags = []
    for section, there in initial_settings(type(run), stage, run.init).items():
        if section != "sampling":
            wanted = _stated(getattr(run, section))
            unlike = {name: value for name, value in there.items() if name not in _FREE and wanted[name] != value}
            flags += [f"--{section}.{name} {_flag(value)}" for name, value in unlike.items()]
    if flags:
        raise ConfigError(
            f"the model in --init {run.init} is not this run's: add {' '.join(flags)}, or name no --preset, which takes "
            "all of that from there"
        )


def _stated(config: Any) -> dict[str, Any]:
    # CLIP's tokens may be stated or left to the vocabulary's size.
    tokens = {f"{name}_token": getattr(config, name) for name in ("start", "end") if hasattr(config, f"{name}_token")}
    return to_dict(config) | tokens


def _flag(value: Any) -> str:
    return " ".join(map(str, value)) if isinstance(value, (list, tuple)) else str(value)
