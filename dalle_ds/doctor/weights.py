"""What a file or folder of weights is, what it loads into, whether it is whole, and what opening it elsewhere would run.

Nothing in a file is run here. Safetensors are mapped, so that little more than their headers is read; an archive of
`torch.save` is read once, to compare it with its checksums.
"""

from __future__ import annotations

import re
import zipfile
from collections import Counter
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from typing import Any, NamedTuple

import torch
from rich.console import RenderableType
from rich.table import Table
from rich.text import Text  # what files say is no markup
from torch import Tensor, nn

from dalle_ds.config import (
    ClipConfig,
    DalleConfig,
    DecoderConfig,
    DiscreteVAEConfig,
    LatentPriorConfig,
    PriorConfig,
    UpsamplerConfig,
    VqganConfig,
    from_dict,
    to_dict,
)
from dalle_ds.errors import CheckpointError, ConfigError
from dalle_ds.interop.clip_import import parts_of, read_json, read_tensors
from dalle_ds.interop.clip_layouts import (
    HF_MARK,
    OPENAI_MARK,
    config_of_openai,
    from_huggingface_config,
    plain_huggingface,
    plain_openai,
    to_huggingface,
    to_openai,
    unwrapped,
)
from dalle_ds.interop.openai_dvae import config_of_openai_dvae
from dalle_ds.interop.torch_files import imported_names
from dalle_ds.interop.vqgan import TRAINING_ONLY, VQGAN_MARK, config_of_vqgan
from dalle_ds.models import (
    AutoregressivePrior,
    Clip,
    Dalle,
    DiffusionPrior,
    DiscreteVAE,
    UnclipDecoder,
    Upsampler,
    Vqgan,
)
from dalle_ds.models.pretrained import CONFIG_NAME, WEIGHTS_NAME, export_folder
from dalle_ds.parsing import shown

_OURS: dict[str, tuple[Any, Callable[[Any], nn.Module]]] = {
    "dvae": (DiscreteVAEConfig, DiscreteVAE),
    "vqgan": (VqganConfig, Vqgan),
    "transformer": (DalleConfig, Dalle),
    "clip": (ClipConfig, Clip),
    "prior": (PriorConfig, DiffusionPrior),
    "latent_prior": (LatentPriorConfig, AutoregressivePrior),
    "decoder": (DecoderConfig, UnclipDecoder),
    "upsampler": (UpsamplerConfig, Upsampler),
}
_DIFFUSERS = ("UNet2DConditionModel", "UNet2DModel", "PriorTransformer", "VQModel")
"""Classes of `diffusers` that are built, without memory, to compare with."""
_KAKAO = {"prd_emb": "prior", "cf_param": "decoder", "model_last_step.time_embed.0.weight": "upsampler"}
"""Ends of names that only one of Karlo's own checkpoints has."""
_REPEATED = re.compile(r"depth|layers|blocks|^groups|multipl")
"""Fields that say how often something is built, which must not take for ever."""
_FOLDERS = {"unclip.json": "kind", "model_index.json": "_class_name"}
"""Descriptions of folders of several models, ours and those of `diffusers`, and the field that says what they are."""
_SUFFIXES = (".safetensors", ".bin", ".pt", ".pth", ".pkl", ".ckpt", ".th")
_INDEX = ".index.json"
_SHOWN = 6


class _Target(NamedTuple):
    """What weights load into."""

    what: str
    found: Mapping[str, Tensor]
    """The tensors that go there, by the names that they have there."""
    wanted: dict[str, Tensor] | None = None
    """What it has, on the meta device; None where that is not known without loading."""


def check_weights(path: Path) -> tuple[RenderableType, list[str]]:
    """Look at a file, a folder or a run's export: what there is to show, and what is wrong.

    Faults are files that are broken, that do not fit what they load into, and pickles that name anything but what makes
    tensors: to open them elsewhere, with `pickle` or `torch.load(weights_only=False)`, imports it and may call it.

    Raises:
        CheckpointError: there are no weights, or not all that an index lists.
    """
    faults: list[str] = []
    table = Table(show_header=False)
    for name, key in _FOLDERS.items():
        if (path / name).is_file():
            table.add_row("folder", Text(f"{path}: {shown(_json(path / name).get(key))}"), end_section=True)
    for file in _files(path):
        rows, wrong = _look_at(file)
        for name, value in rows:
            table.add_row(name, Text(value))
        state = Text("; ".join(wrong) or "sound")
        table.add_row("state", state, style="bold red" if wrong else None, end_section=True)
        faults += wrong
    return table, faults


def _files(path: Path) -> list[Path]:
    """Files of weights at a path; in place of several that belong together, their index."""
    if path.is_file():
        return [path]
    if not path.is_dir():
        raise CheckpointError(f"there is no {path}: name a file or folder of weights")
    folder = export_folder(path) if (path / "config.yaml").is_file() else path
    indices = sorted(folder.rglob(f"*{_INDEX}"))
    listed = {part for index in indices for part in parts_of(index)}
    single = (file for file in sorted(folder.rglob("*")) if file.suffix in _SUFFIXES and file.is_file())
    found = [*indices, *(file for file in single if file not in listed)]
    if not found:
        raise CheckpointError(f"{path} has no weights: it has no file with one of the endings {', '.join(_SUFFIXES)}")
    return found


def _look_at(file: Path) -> tuple[list[tuple[str, str]], list[str]]:
    """Rows to show of a file, and what is wrong with it."""
    rows, faults = [("file", str(file))], []
    try:
        rows.append(("format", _format(file)))
        parts = parts_of(file) if file.name.endswith(_INDEX) else [file]
        pickles = (part for part in parts if not _has_safetensors_header(part))
        if names := sorted({name for part in pickles for name in imported_names(part)}):
            faults.append(f"opening it elsewhere imports, and may call, {_few(names)}")
        tensors = read_tensors(file)
        dtypes = Counter(str(value.dtype).removeprefix("torch.") for value in tensors.values())
        rows.append(("tensors", ", ".join(f"{count:,} of {name}" for name, count in dtypes.items())))
        target = _target(tensors, file)
        rows += [
            ("parameters", f"{sum(value.numel() for value in target.found.values()):,}"),
            ("loads into", target.what),
        ]
        if target.wanted is not None:
            found, wanted = target.found, target.wanted
            both = wanted.keys() & found.keys()
            differing = {
                "missing": wanted.keys() - found.keys(),
                "unexpected": found.keys() - wanted.keys(),
                "of another shape": {name for name in both if wanted[name].shape != found[name].shape},
            }
            faults += [f"{what}: {_few(_prefixes(names))}" for what, names in differing.items() if names]
    except (CheckpointError, ConfigError) as error:
        faults.append(str(error))
    return rows, faults


def _has_safetensors_header(file: Path) -> bool:
    """By its content: other programs do not go by names."""
    with file.open("rb") as content:
        return content.read(9)[8:] == b"{"


def _format(file: Path) -> str:
    try:
        with file.open("rb") as content:
            head = content.read(4)
        if head.startswith(b"PK\x03\x04"):
            with zipfile.ZipFile(file) as archive:
                entries = archive.namelist()
            if any(name.endswith("/constants.pkl") for name in entries):
                return "TorchScript archive, with code that only torch.jit.load runs"
            return "torch.save's zip archive" if any(name.endswith("/data.pkl") for name in entries) else "zip archive"
    except (OSError, zipfile.BadZipFile, NotImplementedError, ValueError) as error:
        raise CheckpointError(f"{file} cannot be read: {error}") from error
    if file.name.endswith(_INDEX):
        return f"index of {len(parts_of(file))} files"
    if _has_safetensors_header(file):
        return "safetensors"
    return "torch.save's pickles, as before PyTorch 1.6" if head.startswith(b"\x80") else "unknown"


def _target(tensors: Mapping[str, Tensor], file: Path) -> _Target:
    """What the weights load into, by the configuration beside them or by their names.

    Raises:
        CheckpointError: of a kind that is known, but no model that can be.
    """
    where, beside = str(file), file.parent / CONFIG_NAME
    told = _json(beside) if beside.is_file() else {}
    kind, diffusers_class = str(told.get("kind")), str(told.get("_class_name"))
    if file.name == WEIGHTS_NAME and kind in _OURS:
        config_class, model = _OURS[kind]
        config = from_dict(config_class, told.get("model", {}), str(beside))
        return _Target(f"dalle_ds: {kind}", tensors, _built(model, config, tensors, where))
    if diffusers_class in _DIFFUSERS:
        import diffusers

        made = getattr(diffusers, diffusers_class).from_config
        return _Target(f"diffusers: {diffusers_class}", tensors, _built(made, told, tensors, where))
    if "blocks.input.w" in tensors:
        part, dvae = config_of_openai_dvae(tensors, where)
        wanted = _built(lambda config: getattr(DiscreteVAE(config), part), dvae, tensors, where)
        return _Target(f"OpenAI's dVAE: {part} (import_dvae --{part})", tensors, wanted)
    found = unwrapped(tensors, VQGAN_MARK, where)
    if VQGAN_MARK in found and "quant_conv.weight" in found:
        found = {name: value for name, value in found.items() if not name.startswith(TRAINING_ONLY)}
        vqgan = config_of_vqgan(found, where)
        what = f"taming's {'GumbelVQ' if vqgan.gumbel else 'VQModel'} (import_dvae --vqgan)"
        return _Target(what, found, _built(Vqgan, vqgan, found, where))
    found = plain_openai(unwrapped(tensors, OPENAI_MARK, where))
    if OPENAI_MARK in found:
        clip = config_of_openai(found, "quick_gelu", where)
        wanted = to_openai(_built(Clip, clip, found, where), clip)
        return _Target("CLIP in OpenAI's or open_clip's layout (import_clip)", found, wanted)
    found = plain_huggingface(unwrapped(tensors, HF_MARK, where))
    if HF_MARK in found and "text_projection.weight" in found:
        what = "CLIP in Hugging Face's layout (import_clip)"
        if not told:
            return _Target(f"{what}, which needs its {CONFIG_NAME} beside it", found)
        clip = from_huggingface_config(told, None, str(beside))
        return _Target(what, found, to_huggingface(_built(Clip, clip, found, where)))
    for end, part in _KAKAO.items():
        if any(name.endswith(end) for name in tensors):
            return _Target(f"Karlo's own checkpoint: {part}", tensors)
    other = told.get("_class_name", told.get("architectures"))
    what = f"{shown(other)}, by its {CONFIG_NAME}" if other else f"unknown: {_few(_prefixes(tensors))}"
    return _Target(what, tensors)


def _built(make: Callable[[Any], Any], config: Any, tensors: Mapping[str, Tensor], where: str) -> dict[str, Tensor]:
    """The state dict of the model that `make` builds of a configuration, without memory."""
    for name, value in (config if isinstance(config, dict) else to_dict(config)).items():
        times = len(value) if isinstance(value, (list, tuple)) else value if isinstance(value, int) else 0
        if _REPEATED.search(name) and times > len(tensors):
            raise CheckpointError(
                f"{where} has {len(tensors)} tensors, and not those of a model with {name}={shown(value)}"
            )
    try:
        with torch.device("meta"):
            return dict(make(config).state_dict())
    except Exception as error:  # whatever values that make no model bring about in a library
        raise CheckpointError(f"no model can be made of the configuration of {where}: {error}") from error


def _json(file: Path) -> dict[str, Any]:
    content = read_json(file)
    return content if isinstance(content, dict) else {}


def _prefixes(names: Iterable[str]) -> list[str]:
    """Names, those of one module together: "encoder.down… (12)"."""
    groups = Counter(".".join(name.split(".")[:2]) for name in names)
    whole = {".".join(name.split(".")[:2]): name for name in names}
    return [whole[group] if count == 1 else f"{group}… ({count:,})" for group, count in sorted(groups.items())]


def _few(names: list[str]) -> str:
    """The first of some names, as a terminal can show them."""
    first = ("".join(letter if letter.isprintable() else "?" for letter in name[:100]) for name in names[:_SHOWN])
    rest = len(names) - _SHOWN
    return ", ".join(first) + (f" and {rest:,} more" if rest > 0 else "")
