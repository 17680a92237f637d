"""CLIP in the layouts of others: their names for its tensors, their words for its shape.

Ours are the tensors of `transformers`' CLIPModel, but for the logit scale, which has no dimensions there. OpenAI's and
open_clip's differ in names, in that queries, keys and values are one matrix, and in that projections are transposed. Nothing
is computed, so that there and back is exact.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from dalle_ds.config import ClipConfig, from_dict
from dalle_ds.errors import CheckpointError, ConfigError
from dalle_ds.models.clip import HUGGINGFACE_FIELDS

# Patterns of our names and OpenAI's, of tensors that are the same in both.
_SAME = (
    ("vision_model.embeddings.class_embedding", "visual.class_embedding"),
    ("vision_model.embeddings.patch_embedding.weight", "visual.conv1.weight"),
    ("vision_model.embeddings.position_embedding.weight", "visual.positional_embedding"),
    ("vision_model.pre_layrnorm.*", "visual.ln_pre.*"),
    ("vision_model.post_layernorm.*", "visual.ln_post.*"),
    ("text_model.embeddings.token_embedding.weight", "token_embedding.weight"),
    ("text_model.embeddings.position_embedding.weight", "positional_embedding"),
    ("text_model.final_layer_norm.*", "ln_final.*"),
)
_TRANSPOSED = (("visual_projection.weight", "visual.proj"), ("text_projection.weight", "text_projection"))
_TOWERS = (
    ("vision_model.encoder.layers", "visual.transformer.resblocks"),
    ("text_model.encoder.layers", "transformer.resblocks"),
)
_IN_BLOCKS = (
    ("layer_norm1.*", "ln_1.*"),
    ("layer_norm2.*", "ln_2.*"),
    ("self_attn.out_proj.*", "attn.out_proj.*"),
    ("mlp.fc1.*", "mlp.c_fc.*"),
    ("mlp.fc2.*", "mlp.c_proj.*"),
)
_SCALE = "logit_scale"
_STACKED = ("q_proj", "k_proj", "v_proj")
_ENTRIES = ("weight", "bias")
# Of OpenAI's files, besides weights.
_NUMBERS = ("input_resolution", "context_length", "vocab_size")
_EPSILON = 1e-5
BICUBIC = 3
"""Pillow's number, which Hugging Face's files have."""


def to_openai(weights: Mapping[str, Tensor], config: ClipConfig) -> dict[str, Tensor]:
    """Our tensors in the layout of OpenAI's `clip/model.py` and of open_clip's `CLIP`."""
    found = {theirs: weights[ours] for ours, theirs in _names(config)}
    found |= {theirs: weights[ours].T for ours, theirs in _TRANSPOSED}
    found[_SCALE] = weights[_SCALE].reshape(())
    for ours, theirs in _stacks(config):
        found[theirs] = torch.cat([weights[name] for name in ours])
    return found


def from_openai(weights: Mapping[str, Tensor], config: ClipConfig) -> dict[str, Tensor]:
    """The inverse of `to_openai`; the tensors are those that a model of this configuration has there."""
    found = {ours: weights[theirs] for ours, theirs in _names(config)}
    found |= {ours: weights[theirs].T for ours, theirs in _TRANSPOSED}
    found[_SCALE] = weights[_SCALE].reshape(1)
    for ours, theirs in _stacks(config):
        found |= dict(zip(ours, weights[theirs].chunk(3), strict=True))
    return found


def to_huggingface(weights: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Our tensors in the layout of `transformers`' CLIPModel."""
    return {name: value.reshape(()) if name == _SCALE else value for name, value in weights.items()}


def from_huggingface(weights: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """The inverse of `to_huggingface`."""
    return {name: value.reshape(1) if name == _SCALE else value for name, value in weights.items()}


def _names(config: ClipConfig) -> list[tuple[str, str]]:
    pairs = list(_SAME)
    for (ours, theirs), depth in zip(_TOWERS, (config.vision_depth, config.text_depth), strict=True):
        pairs += [(f"{ours}.{n}.{own}", f"{theirs}.{n}.{other}") for n in range(depth) for own, other in _IN_BLOCKS]
    return [
        (own.replace("*", entry), other.replace("*", entry))
        for own, other in pairs
        for entry in (_ENTRIES if "*" in own else ("",))
    ]


def _stacks(config: ClipConfig) -> list[tuple[list[str], str]]:
    return [
        ([f"{ours}.{n}.self_attn.{part}.{entry}" for part in _STACKED], f"{theirs}.{n}.attn.in_proj_{entry}")
        for (ours, theirs), depth in zip(_TOWERS, (config.vision_depth, config.text_depth), strict=True)
        for n in range(depth)
        for entry in _ENTRIES
    ]


_WRAPPERS = ("module", "_orig_mod", "_fsdp_wrapped_module", "_checkpoint_wrapped_module")
"""What PyTorch puts into names, anywhere in them: DistributedDataParallel, compile, FSDP, recomputing."""
OPENAI_MARK = "visual.conv1.weight"
HF_MARK = "vision_model.embeddings.patch_embedding.weight"


def unwrapped(tensors: Mapping[str, Tensor], mark: str, where: str) -> dict[str, Tensor]:
    """The tensors of the model in a training program's checkpoint, whose names have begun with keys, attributes and wrappers.

    Args:
        mark: the name of a tensor that each model of the layout has once.

    Returns:
        What began as that tensor does, without the beginning; all where there is no such tensor.

    Raises:
        CheckpointError: there are several models, named, or two tensors of one name.
    """
    wrapper = rf"(?:{'|'.join(_WRAPPERS)})\."
    pattern = re.compile(r"((?:.*\.)?)" + rf"\.(?:{wrapper})*".join(mark.split(".")))
    begins = sorted({match[1] for name in tensors if (match := pattern.fullmatch(name))}) or [""]
    if len(begins) > 1:
        keys = ", ".join(repr(begin.rstrip(".")) for begin in begins[:5])
        raise CheckpointError(
            f"{where} has several models, under {keys}: save the tensors of one of them in a file of its own"
        )
    found: dict[str, Tensor] = {}
    for name, value in tensors.items():
        plain = re.sub(rf"(?:^|(?<=\.)){wrapper}", "", name.removeprefix(begins[0]))
        if name.startswith(begins[0]) and found.setdefault(plain, value) is not value:
            raise CheckpointError(
                f"{where} has {plain} with and without a wrapper ({', '.join(_WRAPPERS)}) in its name"
            )
    return found


def plain_openai(weights: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Only the weights, under OpenAI's names, also where the text tower's begin with "text." (open_clip's CustomTextCLIP)."""
    return {name.removeprefix("text."): value for name, value in weights.items() if name not in _NUMBERS}


def plain_huggingface(weights: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Only the weights: files of before 2023 have the numbers of the positions too."""
    return {name: value for name, value in weights.items() if not name.endswith(".embeddings.position_ids")}


# --- shapes -----------------------------------------------------------------------------------------------------------


def config_of_openai(weights: Mapping[str, Tensor], activation: str, where: str) -> ClipConfig:
    """The shape of the model that has these tensors, under OpenAI's names; heads are 64 wide, as OpenAI's all are.

    Raises:
        CheckpointError: a tensor is missing, or the shapes make no CLIP with a vision transformer.
    """
    if HF_MARK in unwrapped(weights, HF_MARK, where):
        raise CheckpointError(
            f"{where} has Hugging Face's layout: put it into a folder as pytorch_model.bin, beside its config.json"
        )
    if any(name.startswith("visual.layer1.") for name in weights):
        raise CheckpointError(f"{where} is a CLIP with a ResNet: only those with a vision transformer (ViT) are read")

    def shape(name: str, dimensions: int) -> tuple[int, ...]:
        found = tuple(weights[name].shape) if name in weights else None
        if found is None or len(found) != dimensions or 0 in found:
            has = ", ".join(sorted(weights)[:3])
            raise CheckpointError(
                f"{where} is no CLIP of OpenAI's layout: its {name} has shape {found}; it has {has} …"
            )
        return found

    vision_width, _, patch_size, _ = shape("visual.conv1.weight", 4)
    positions, _ = shape("visual.positional_embedding", 2)
    text_vocab, text_width = shape("token_embedding.weight", 2)
    text_len, _ = shape("positional_embedding", 2)
    fields = {
        "embed_dim": shape("text_projection", 2)[1],
        "image_size": patch_size * round((positions - 1) ** 0.5),
        "patch_size": patch_size,
        "vision_width": vision_width,
        "vision_depth": _depth(weights, _TOWERS[0][1]),
        "vision_heads": _heads(vision_width, where),
        "text_width": text_width,
        "text_depth": _depth(weights, _TOWERS[1][1]),
        "text_heads": _heads(text_width, where),
        "text_len": text_len,
        "text_vocab": text_vocab,
        "activation": activation,
    }
    return _config(fields, where)


def _depth(weights: Mapping[str, Tensor], prefix: str) -> int:
    pattern = re.compile(rf"{re.escape(prefix)}\.(\d+)\.")
    return len({found.group(1) for name in weights if (found := pattern.match(name))})


def _heads(width: int, where: str) -> int:
    if width % 64:
        raise CheckpointError(
            f"{where} has a tower of width {width}, no multiple of 64, and does not say how many heads it has: "
            "import it from a folder with a configuration"
        )
    return width // 64


def from_huggingface_config(values: Any, preprocessor: Any, where: str) -> ClipConfig:
    """The shape that the `config.json` of a `transformers` CLIPModel tells; what is left out has the defaults there.

    Args:
        values: the content of `config.json`.
        preprocessor: that of `preprocessor_config.json`, or None. What it says is to be how `clip_pixels` makes images.

    Raises:
        CheckpointError: a field that our CLIP cannot have so, named.
    """
    values = _mapping(values, where)
    # The older name, of which transformers lets a value win.
    vision, text = (
        {
            **_mapping(values.get(f"{tower}_config") or {}, where),
            **_mapping(values.get(f"{tower}_config_dict") or {}, where),
        }
        for tower in ("vision", "text")
    )
    fields = {
        "embed_dim": values.get("projection_dim", ClipConfig.embed_dim),
        **_fields(vision, HUGGINGFACE_FIELDS["vision"]),
        **_fields(text, HUGGINGFACE_FIELDS["text"]),
        "activation": text.get("hidden_act", "quick_gelu"),
    }
    # Files of before 2023 say 2, which is wrong, and which transformers takes for "where the greatest token is".
    if text.get("eos_token_id", 49_407) != 2:
        vocabulary = fields["text_vocab"] if isinstance(fields["text_vocab"], int) else 0
        for name, key, place in (("start_token", "bos_token_id", 2), ("end_token", "eos_token_id", 1)):
            token = text.get(key, 49_408 - place)
            fields[name] = None if token == vocabulary - place else token
    for tower, part in (("vision", vision), ("text", text)):
        _check_huggingface_tower(tower, part, fields[f"{tower}_width"], fields["activation"], where)
    config = _config({**fields, **_standardization(preprocessor, "image_mean", "image_std", where)}, where)
    _check_preprocessor(preprocessor or {}, config.image_size, where)
    return config


def _check_preprocessor(preprocessor: dict[str, Any], size: int, where: str) -> None:
    """Refuse images that are not resized to `size` along the shorter side, cut and standardized."""
    # Older files have numbers for sizes. A height and a width would squeeze the image, where it is not cut.
    allowed: dict[str, tuple[Any, ...]] = {
        "size": ({"shortest_edge": size}, size),
        "crop_size": ({"height": size, "width": size}, size),
        "resample": (BICUBIC,),
        "rescale_factor": (1 / 255,),
        **dict.fromkeys(("do_resize", "do_center_crop", "do_rescale", "do_normalize"), (True,)),
    }
    for name, values in allowed.items():
        found = preprocessor.get(name)
        if found is not None and found not in values:
            raise _unknown(where, f"preprocessor {name}", found, values[0])


def _check_huggingface_tower(tower: str, part: dict[str, Any], width: Any, activation: Any, where: str) -> None:
    """Refuse what changes the tower's arithmetic and has no field in our configuration."""
    wanted = {
        "hidden_act": activation,
        "intermediate_size": 4 * width if isinstance(width, int) else None,
        "layer_norm_eps": _EPSILON,
        "num_channels": 3,
    }
    # What transformers takes where the file says nothing.
    usual = {**wanted, "intermediate_size": 3072 if tower == "vision" else 2048, "hidden_act": "quick_gelu"}
    _check({**usual, **part}, wanted, where, f"{tower}_config.")


_OPEN_CLIP_FIELDS = {
    "vision_cfg": {
        "image_size": "image_size",
        "layers": "vision_depth",
        "width": "vision_width",
        "patch_size": "patch_size",
    },
    "text_cfg": {
        "context_length": "text_len",
        "vocab_size": "text_vocab",
        "width": "text_width",
        "heads": "text_heads",
        "layers": "text_depth",
    },
}
_OPEN_CLIP_READ = {"vision_cfg": ("head_width",), "text_cfg": ("eos_id",)}
"""Besides these."""
_OPEN_CLIP_POOLS = {"vision_cfg": ("tok",), "text_cfg": ("argmax", "eos")}
_OPEN_CLIP_PLAIN: dict[str, Any] = {
    "mlp_ratio": 4.0,
    "ls_init_value": None,
    "attentional_pool": False,
    "no_ln_pre": False,
    "pos_embed_type": "learnable",
    "final_ln_after_pool": False,
    "block_type": None,
    "act_kwargs": None,
    "norm_kwargs": None,
    "timm_model_name": None,
    "hf_model_name": None,
    "embed_cls": False,
    "no_causal_mask": False,
    "proj_bias": False,
    "proj_type": "linear",
    **dict.fromkeys(
        ("qk_norm", "scaled_cosine_attn", "scale_heads", "scale_attn_inner", "scale_attn", "scale_fc"), False
    ),
}
"""Fields that change what open_clip's towers compute, with the values at which they are CLIP's."""
_OPEN_CLIP_IDLE = ("patch_dropout", "attn_pooler_", "output_tokens", "timm_", "hf_", "tokenizer_", "pad_id")
"""How fields begin that change nothing once the ones above are as they must be."""


def from_open_clip_config(values: Any, where: str) -> ClipConfig:
    """The shape that an `open_clip_config.json` tells; what is left out has open_clip's defaults.

    Raises:
        CheckpointError: a field that our CLIP cannot have so, named.
    """
    values = _mapping(values, where)
    model = _mapping(values.get("model_cfg"), f"{where} model_cfg")
    parts = {name: _mapping(model.get(name), f"{where} {name}") for name in _OPEN_CLIP_FIELDS}
    vision, text = parts["vision_cfg"], {"pool_type": "argmax", **parts["text_cfg"]}
    _check(model, {"multimodal_cfg": None, "init_logit_bias": None}, where)
    for tower, part in parts.items():
        for name, value in part.items():
            allowed: tuple[Any, ...] = ()
            if name == "pool_type":
                allowed = _OPEN_CLIP_POOLS[tower]
            elif name in _OPEN_CLIP_PLAIN:
                allowed = (_OPEN_CLIP_PLAIN[name],)
            elif name in (*_OPEN_CLIP_FIELDS[tower], *_OPEN_CLIP_READ[tower]) or name.startswith(_OPEN_CLIP_IDLE):
                continue
            if value not in allowed:
                raise _unknown(where, f"{tower}.{name}", value, allowed[0] if allowed else None)
    fields = {
        "embed_dim": model.get("embed_dim"),
        **_fields({"patch_size": 16, **vision}, _OPEN_CLIP_FIELDS["vision_cfg"]),
        **_fields(text, _OPEN_CLIP_FIELDS["text_cfg"]),
        "activation": "quick_gelu" if model.get("quick_gelu", False) else "gelu",
    }
    width, head = fields["vision_width"], vision.get("head_width", 64)
    fields["vision_heads"] = width // head if isinstance(width, int) and isinstance(head, int) and head > 0 else None
    if text["pool_type"] == "eos":
        fields["end_token"] = text.get("eos_id", 2)
    preprocess = _mapping(values.get("preprocess_cfg") or {}, f"{where} preprocess_cfg")
    usual = {"mode": "RGB", "interpolation": "bicubic", "resize_mode": "shortest"}
    _check(preprocess, usual, where, "preprocess_cfg.")
    config = _config({**fields, **_standardization(preprocess, "mean", "std", where)}, where)
    if _side(preprocess.get("size") or config.image_size) != config.image_size:
        raise _unknown(where, "preprocess_cfg.size", preprocess["size"], config.image_size)
    return config


def open_clip_config(config: ClipConfig) -> dict[str, Any]:
    """The content of the `open_clip_config.json` of a model of this shape."""
    size = config.image_size
    model: dict[str, Any] = {"embed_dim": config.embed_dim, "quick_gelu": config.activation == "quick_gelu"}
    for tower, fields in _OPEN_CLIP_FIELDS.items():
        model[tower] = {theirs: getattr(config, ours) for theirs, ours in fields.items()}
    model["vision_cfg"]["head_width"] = config.vision_width // config.vision_heads
    if config.end != config.text_vocab - 1:
        model["text_cfg"] |= {"pool_type": "eos", "eos_id": config.end}
    preprocess = {
        "size": [size, size],
        "mode": "RGB",
        "mean": list(config.image_mean),
        "std": list(config.image_std),
        "interpolation": "bicubic",
        "resize_mode": "shortest",
    }
    return {"model_cfg": model, "preprocess_cfg": preprocess}


def _config(fields: dict[str, Any], where: str) -> ClipConfig:
    try:
        return from_dict(ClipConfig, fields, where)
    except ConfigError as error:
        raise CheckpointError(f"{where} is no CLIP that can be read: {error}") from error


def _mapping(value: Any, where: str) -> dict[str, Any]:
    if not isinstance(value, dict):
        raise CheckpointError(f"{where} is no CLIP's: it should be a mapping of fields, found a {type(value).__name__}")
    return value


def _fields(part: dict[str, Any], names: dict[str, str]) -> dict[str, Any]:
    """Our fields of a tower, with our defaults, most of which are those of others; `names` are theirs and ours."""
    found = {ours: part.get(theirs, getattr(ClipConfig, ours)) for theirs, ours in names.items()}
    return {name: _side(value) if name in ("image_size", "patch_size") else value for name, value in found.items()}


def _side(value: Any) -> Any:
    """Of a square, of which both sides may be given."""
    return value[0] if isinstance(value, list) and len(value) == 2 and value[0] == value[1] else value


def _standardization(values: Any, mean: str, std: str, where: str) -> dict[str, Any]:
    names = {"image_mean": mean, "image_std": std}
    found = {} if values is None else _mapping(values, where)
    return {ours: found[theirs] for ours, theirs in names.items() if theirs in found}


def _check(values: dict[str, Any], wanted: dict[str, Any], where: str, prefix: str = "") -> None:
    """Refuse fields, where there are any, of other values."""
    for name, value in wanted.items():
        if values.get(name, value) != value:
            raise _unknown(where, f"{prefix}{name}", values[name], value)


def _unknown(where: str, name: str, found: Any, wanted: Any) -> CheckpointError:
    return CheckpointError(
        f"{where} says {name} = {str(found)[:100]}, where only {str(wanted)[:100]} is supported: it is another kind of model"
    )
