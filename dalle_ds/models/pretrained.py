"""Exported models: `config.json` + `model.safetensors`, readable with no DeepSpeed and no pickle (design decision 10)."""

from __future__ import annotations

import hashlib
import shlex
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, TypeVar

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor

from dalle_ds.config import from_dict, to_dict
from dalle_ds.errors import CheckpointError
from dalle_ds.files import built_beside, write_json
from dalle_ds.parsing import parse_json

Config = TypeVar("Config")
Model = TypeVar("Model", bound=torch.nn.Module)
CONFIG_NAME = "config.json"
WEIGHTS_NAME = "model.safetensors"


def save_model(path: str | Path, kind: str, config: Any, state_dict: Mapping[str, Tensor]) -> None:
    """Write an exported model into folder `path`, replacing one that is there only when the new one is complete.

    Args:
        kind: what it is ("dvae", "transformer"); `load_model` refuses another.
        config: the dataclass that the model was built from.
        state_dict: its weights; written contiguous, in the dtype they have.

    Raises:
        CheckpointError: the folder cannot be written (no space left, no permission); nothing is left half-written.
    """
    weights = {name: value.detach().cpu().contiguous() for name, value in state_dict.items()}
    try:
        with built_beside(Path(path)) as partial:
            save_file(weights, partial / WEIGHTS_NAME, metadata={"format": "pt"})
            write_json(partial / CONFIG_NAME, {"kind": kind, "model": to_dict(config)})
    except (OSError, SafetensorError) as error:
        raise CheckpointError(
            f"could not write the model to {path}: {error}; free some space or name another folder"
        ) from error


def export_folder(path: str | Path) -> Path:
    """The folder of the exported model at `path`: `path` itself, or its `export` where `path` is a run directory.

    Raises:
        CheckpointError: there is neither.
    """
    path = Path(path)
    for folder in (path, path / "export"):
        if (folder / CONFIG_NAME).is_file() and (folder / WEIGHTS_NAME).is_file():
            return folder
    if not path.exists():
        raise CheckpointError(f"no model at {path}: there is no such folder; name a run directory or an exported model")
    if (path / "config.yaml").is_file():
        export = f"python launchers/export.py --run_dir {shlex.quote(str(path))}"
        advice = "let it reach its first checkpoint"
        if next((path / "checkpoints").glob("step-*"), None) is not None:
            advice = f"make one of its newest checkpoint with {export}"
        raise CheckpointError(
            f"the run in {path} has exported no model yet (no {path / 'export'}): {advice}, or let it reach its last step"
        )
    raise CheckpointError(
        f"no model at {path}: it has neither {CONFIG_NAME} and {WEIGHTS_NAME} nor an export folder; "
        "name a run directory or an exported model"
    )


def load_model(path: str | Path, kind: str, config_class: type[Config]) -> tuple[Config, dict[str, Tensor]]:
    """Configuration and weights (on the CPU) of the exported model at `path`, an export or a run directory.

    Raises:
        CheckpointError: no model there, one of another kind, or a file that cannot be read.
        ConfigError: its configuration has a field or value that the model cannot have.
    """
    folder = export_folder(path)
    return load_config(folder, kind, config_class), read_safetensors(folder / WEIGHTS_NAME)


def read_safetensors(file: Path) -> dict[str, Tensor]:
    """The tensors of a file, on the CPU; CheckpointError where it cannot be read."""
    try:
        return load_file(file)
    except (OSError, SafetensorError, KeyError) as error:  # KeyError: a dtype that this version of safetensors lacks
        raise CheckpointError(f"{file} cannot be read: {error}; export or save it again") from error


def read_config(folder: Path) -> dict[str, Any]:
    """The content of a folder's `config.json`, "kind" and "model" if it is one of ours; CheckpointError as `load_model`."""
    try:
        description = parse_json((folder / CONFIG_NAME).read_bytes())
    except (OSError, ValueError) as error:
        raise CheckpointError(f"{folder / CONFIG_NAME} cannot be read: {error}; export the model again") from error
    return description if isinstance(description, dict) else {}


def load_config(folder: Path, kind: str, config_class: type[Config]) -> Config:
    """Configuration of the model exported in `folder` itself.

    Raises:
        CheckpointError, ConfigError: as `load_model`.
    """
    description = read_config(folder)
    found = description.get("kind")
    if found != kind:
        what = f"a {found!r} model" if isinstance(found, str) and len(found) < 50 else "none of our models"
        raise CheckpointError(f"{folder} holds {what} where a {kind!r} model is needed: name another folder")
    return from_dict(config_class, description.get("model", {}), str(folder / CONFIG_NAME))


def check_shapes(
    make: Callable[[], torch.nn.Module],
    config: Any,
    weights: Mapping[str, Tensor],
    where: str | Path,
    layout: Callable[[dict[str, Tensor]], dict[str, Tensor]] = dict,
) -> None:
    """Refuse a configuration that is not the weights', before the model takes the memory that it asks for.

    Args:
        make: builds the model of `config`, here without memory.
        config: what `make` builds from. No whole number in it, but for the size of images, may be greater than all sizes and
            the number of the weights that have elements, so that `make` does not take for ever. None: it is the user's own.
        layout: makes of the model's state dict what `weights` are, where these have other names.

    Raises:
        CheckpointError: a missing, unexpected or wrongly shaped tensor, named.
    """
    # Of tensors without elements, a few bytes may tell any size, and a short header any number.
    filled = [value.shape for value in weights.values() if value.numel()]
    limit = max([len(filled), *(size for shape in filled for size in shape)])
    for name, number in ({} if config is None else to_dict(config)).items():
        if name not in ("image_size", "low_size", "kernel") and isinstance(number, int) and number > limit:
            raise CheckpointError(
                f"the weights in {where} are not those of a model with {name}={number}: export it again"
            )
    try:
        with torch.device("meta"):
            state = layout(make().state_dict())
    except RuntimeError as error:
        raise CheckpointError(f"no model can be made of the configuration in {where}: {error}") from error
    wanted = {name: tuple(value.shape) for name, value in state.items()}
    found = {name: tuple(value.shape) for name, value in weights.items()}
    if found != wanted:
        name = min(name for name in {*found, *wanted} if found.get(name) != wanted.get(name))
        raise CheckpointError(
            f"the weights in {where} do not fit the model: {name[:100]!r} has shape {found.get(name)}, where "
            f"{wanted.get(name)} is needed"
        )


def load_weights(model: torch.nn.Module, weights: Mapping[str, Tensor], where: str | Path) -> None:
    """Load `weights` into `model`, every tensor and no other.

    Raises:
        CheckpointError: a missing, unexpected or wrongly shaped tensor, named.
    """
    try:
        model.load_state_dict(weights, strict=True)
    except RuntimeError as error:
        raise CheckpointError(f"the weights in {where} do not fit the model: {error}") from error


def loaded(make: Callable[[], Model], config: Any, weights: Mapping[str, Tensor], where: str | Path) -> Model:
    """The model that `make` builds, with `weights`, in eval mode; arguments and errors as `check_shapes`."""
    check_shapes(make, config, weights, where)
    model = make()
    load_weights(model, weights, where)
    return model.eval()


def fingerprint(state_dict: Mapping[str, Tensor]) -> str:
    """SHA-256, in hex, of names, shapes and values: equal for equal weights, wherever they lie and however stored."""
    digest = hashlib.sha256()
    for name in sorted(state_dict):
        value = state_dict[name].detach().cpu().contiguous()
        digest.update(f"{name} {value.dtype} {tuple(value.shape)}".encode())
        digest.update(value.reshape(-1).view(torch.uint8).numpy().data)
    return digest.hexdigest()
