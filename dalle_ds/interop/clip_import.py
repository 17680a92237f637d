"""CLIPs that others published (OpenAI's, Hugging Face's, open_clip's files) as one of ours, with none of their code run."""

from __future__ import annotations

import re
import warnings
from collections.abc import Callable, Mapping
from functools import partial
from pathlib import Path
from typing import Any, Literal

import torch
from torch import Tensor

from dalle_ds.config import ClipConfig
from dalle_ds.errors import CheckpointError, ConfigError
from dalle_ds.interop.clip_layouts import (
    HF_MARK,
    OPENAI_MARK,
    config_of_openai,
    from_huggingface,
    from_huggingface_config,
    from_open_clip_config,
    from_openai,
    plain_huggingface,
    plain_openai,
    to_huggingface,
    to_openai,
    unwrapped,
)
from dalle_ds.interop.openai_dvae import described, exported
from dalle_ds.interop.torch_files import load_tensors
from dalle_ds.models.clip import Clip
from dalle_ds.models.pretrained import check_shapes, load_weights, read_safetensors
from dalle_ds.parsing import parse_json
from dalle_ds.text.clip_tokenizer import ClipTokenizer

ClipFormat = Literal["openai", "hf", "open_clip"]
Activation = Literal["quick_gelu", "gelu"]
HF_CONFIG = "config.json"
HF_PREPROCESSOR = "preprocessor_config.json"
HF_PROCESSOR = "processor_config.json"
"""Holds the content of the former since transformers 5."""
HF_WEIGHTS = ("model.safetensors", "pytorch_model.bin")
OPEN_CLIP_CONFIG = "open_clip_config.json"
OPEN_CLIP_WEIGHTS = ("open_clip_model.safetensors", "open_clip_pytorch_model.bin")
_PART = re.compile(r"-\d+-of-\d+\.(safetensors|bin)$")
_INDEX = ".index.json"
"""Behind the name of a file of weights: lists the files that have its tensors, where these are in parts."""
_WEIGHTS: dict[ClipFormat, tuple[str, ...]] = {
    "open_clip": tuple(f"{name}{end}" for name in OPEN_CLIP_WEIGHTS for end in ("", _INDEX)),
    "hf": tuple(f"{name}{end}" for name in HF_WEIGHTS for end in ("", _INDEX)),
    "openai": ("model.pt",),
}
_MARKS: dict[ClipFormat, str] = {"open_clip": OPEN_CLIP_CONFIG, "hf": HF_CONFIG, "openai": "model.pt"}
"""The file by which a folder is known; some are of open_clip and of Hugging Face too."""


def load_clip(
    source: str | Path,
    format: ClipFormat | Literal["auto"] = "auto",
    *,
    tokenizer: str | Path | None = None,
    activation: Activation | None = None,
) -> Clip:
    """The CLIP in someone else's file or folder; in eval mode, in fp32, on the CPU.

    Args:
        source: of OpenAI, a TorchScript archive such as `ViT-B-32.pt`, or a file with its state dict (of `torch.save`, or
            safetensors; training programs' checkpoints too, with whatever else is in them), or a folder with such a
            `model.pt`; a folder of Hugging Face's CLIPModel or of open_clip, whose weights may be in parts.
        format: "auto" goes by the names of the files in the folder, or beside a file that is named as in such a folder; any
            other single file it takes for OpenAI's.
        tokenizer: file or folder that `ClipTokenizer.load` reads; None takes the one in the folder, if any.
        activation: of the MLPs; None takes what the folder's configuration says, and "quick_gelu" for a single file, which is
            right for OpenAI's. A file of open_clip's weights alone does not say that its model has "gelu"; one with the
            name that open_clip gives it is not read without.

    Raises:
        CheckpointError: a file that cannot be read or is not trusted, or a tensor or field that no CLIP of ours has, named.
        ConfigError: a format or tokenizer that does not fit the source.
    """
    path = Path(source)
    chosen, file = _found(path, format)
    if format == "auto" and chosen == "openai" and path.name in OPEN_CLIP_WEIGHTS and activation is None:
        raise ConfigError(
            f"{path} does not say the activation of its model, and there is no {OPEN_CLIP_CONFIG} beside it: put it there, or "
            "give --activation gelu, as most of open_clip's have, or quick_gelu"
        )
    config, weights = _READERS[chosen](file, activation)
    if activation is not None and config.activation != activation:
        raise ConfigError(f"{path} is a model with activation {config.activation}, found {activation}: leave it out")
    special = {"start": config.start, "end": config.end}
    found = None
    if tokenizer is not None:
        found = ClipTokenizer.load(tokenizer, **special)
    elif path.is_dir() or chosen != "openai":  # what lies beside a single file of OpenAI's need not be its own
        found = ClipTokenizer.find(file.parent, **special)
    model = Clip(config, tokenizer=found)
    load_weights(model, weights, file)
    return model.eval()


def import_clip(
    source: str | Path,
    out: str | Path,
    format: ClipFormat | Literal["auto"] = "auto",
    *,
    tokenizer: str | Path | None = None,
    activation: Activation | None = None,
) -> Clip:
    """`load_clip`, exported to folder `out`, with the SHA-256 of the files of weights in `source.json` beside them.

    Raises:
        CheckpointError: as `load_clip`, or the folder cannot be written.
        ConfigError: as `load_clip`, or `out` is there already, and is something else than an imported model.
    """

    def make() -> tuple[Clip, dict[str, Any]]:
        model = load_clip(source, format, tokenizer=tokenizer, activation=activation)
        _, file = _found(Path(source), format)
        found: dict[str, Any] = dict(described(file))
        if file.name.endswith(_INDEX):
            found["parts"] = {part.name: described(part)["sha256"] for part in parts_of(file)}
        return model, found

    return exported(make, out)


def _format(path: Path) -> ClipFormat:
    if not path.exists():
        raise CheckpointError(f"there is no {path}: name a file or folder of a CLIP")
    if path.is_file():
        if _PART.search(path.name):
            raise CheckpointError(
                f"{path} is one of several files of weights: name its folder, which has their {_INDEX} too"
            )
        beside = (format for format, names in _WEIGHTS.items() if path.name in names)
        return next((format for format in beside if (path.parent / _MARKS[format]).is_file()), "openai")
    for format, name in _MARKS.items():
        if (path / name).is_file():
            return format
    raise CheckpointError(f"{path} holds no CLIP: it has none of {', '.join(_MARKS.values())}")


def _found(path: Path, format: ClipFormat | Literal["auto"]) -> tuple[ClipFormat, Path]:
    """The layout, and the file of weights: `path` itself, or the one in that folder."""
    chosen = _format(path) if format == "auto" else format
    if path.is_file():
        return chosen, path
    names = _WEIGHTS[chosen]
    file = next((path / name for name in names if (path / name).is_file()), None)
    if file is None:
        raise CheckpointError(
            f"{path} has no file of weights: it has none of {', '.join(names)} (parts are not read without their {_INDEX})"
        )
    return chosen, file


Read = tuple[ClipConfig, dict[str, Tensor]]


def _read_openai(file: Path, activation: Activation | None) -> Read:
    tensors = read_weights(file)
    weights = plain_openai(unwrapped(tensors, OPENAI_MARK, str(file)))
    if activation is None and OPENAI_MARK in weights and OPENAI_MARK not in tensors:
        warnings.warn(
            f"{file} does not say the activation of its model: it is taken for quick_gelu, which OpenAI's have, where most of "
            "open_clip's need --activation gelu",
            stacklevel=2,
        )
    config = config_of_openai(weights, activation or "quick_gelu", str(file))
    return config, _from_openai(weights, config, file)


def _read_open_clip(file: Path, activation: Activation | None) -> Read:
    description = file.parent / OPEN_CLIP_CONFIG
    config = from_open_clip_config(read_json(description), str(description))
    weights = plain_openai(unwrapped(read_weights(file), OPENAI_MARK, str(file)))
    return config, _from_openai(weights, config, file)


def _read_huggingface(file: Path, activation: Activation | None) -> Read:
    description = file.parent / HF_CONFIG
    config = from_huggingface_config(read_json(description), _preprocessor(file.parent), str(description))
    weights = plain_huggingface(unwrapped(read_weights(file), HF_MARK, str(file)))
    check_shapes(lambda: Clip(config), config, weights, file, to_huggingface)
    return config, from_huggingface(weights)


def _preprocessor(folder: Path) -> Any:
    """What a folder of Hugging Face says of images, or None; the newer of two places goes first, as in transformers."""
    newer, older = folder / HF_PROCESSOR, folder / HF_PREPROCESSOR
    content = read_json(newer) if newer.is_file() else None
    if isinstance(content, dict) and "image_processor" in content:
        return content["image_processor"]
    return read_json(older) if older.is_file() else None


_READERS: dict[str, Callable[[Path, Activation | None], Read]] = {
    "openai": _read_openai,
    "hf": _read_huggingface,
    "open_clip": _read_open_clip,
}


def _from_openai(weights: Mapping[str, Tensor], config: ClipConfig, file: Path) -> dict[str, Tensor]:
    check_shapes(lambda: Clip(config), config, weights, file, partial(to_openai, config=config))
    return from_openai(weights, config)


def read_weights(file: Path) -> dict[str, Tensor]:
    """Tensors of a file, or of the files that an index lists, in fp32."""
    found = read_tensors(file)
    return {name: value.to(torch.float32) if value.is_floating_point() else value for name, value in found.items()}


def read_tensors(file: Path) -> dict[str, Tensor]:
    """Tensors of a file, or of the files that an index lists, in the dtypes that they have."""
    if file.suffix == ".json":
        return _tensors_of_parts(file)
    return read_safetensors(file) if file.suffix == ".safetensors" else load_tensors(file, classes=None)


def parts_of(index: Path) -> dict[Path, set[str]]:
    """The files that an index lists, with the names of their tensors."""
    content = read_json(index)
    places = content.get("weight_map") if isinstance(content, dict) else None
    if not isinstance(places, dict) or not places:
        raise CheckpointError(f"{index} has no weight_map, which says where each tensor is")
    parts: dict[Path, set[str]] = {}
    for name, place in places.items():
        if not isinstance(place, str) or Path(place).name != place or place.endswith(".json"):
            raise CheckpointError(f"{index} says that {name} is in {place!r}, which is no file beside it")
        parts.setdefault(index.parent / place, set()).add(name)
    missing = sorted(part.name for part in parts if not part.is_file())
    if missing:
        raise CheckpointError(f"{index} lists {len(parts)} files, of which these are missing: {', '.join(missing)}")
    return parts


def _tensors_of_parts(index: Path) -> dict[str, Tensor]:
    found: dict[str, Tensor] = {}
    for part, names in parts_of(index).items():
        tensors = read_tensors(part)
        for name in sorted(tensors.keys() ^ names):
            what = f"lacks {name}, which is in it by" if name in names else f"has {name}, which is not in it by"
            raise CheckpointError(f"{part} {what} {index.name}: files of two models, or copied in part?")
        found |= tensors
    return found


def read_json(file: Path) -> Any:
    """Content of a file; CheckpointError where it cannot be read."""
    try:
        return parse_json(file.read_bytes())
    except (OSError, ValueError) as error:
        raise CheckpointError(f"{file} cannot be read: {error}") from error
