"""Karlo as Kakao Brain published it: its checkpoints, in the layout of `diffusers`."""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from torch import Tensor

from dalle_ds.errors import CheckpointError
from dalle_ds.interop.clip_import import load_clip
from dalle_ds.interop.karlo_layouts import CONTEXT, ENTRIES, NULL, Part, Weights, behind, defaults, named
from dalle_ds.interop.torch_files import load_tensors
from dalle_ds.models.clip import Clip

_FILES = {"prior": "prior-ckpt*.ckpt", "decoder": "decoder-ckpt*.ckpt", "super_res": "improved-sr-ckpt*.ckpt"}
_STATISTICS, _CLIP, _VOCABULARY = "ViT-L-14_stats.th", "ViT-L-14.pt", "bpe_simple_vocab_16e6.txt.gz"
_HEAD = 64
"""Width of all attention heads."""
_LEVELS = 4
"""Resolutions of all U-Nets."""
_SCHEDULERS: dict[str, dict[str, Any]] = {
    "prior": {"prediction_type": "sample", "clip_sample_range": 5.0},
    "decoder": {"variance_type": "learned_range"},
    "super_res": {},
}
_TIMES = {r"time_embed\.0": "time_embedding.linear_1", r"time_embed\.2": "time_embedding.linear_2"}
# Names as patterns. Where several are joined by +, the rows are theirs in turn, head by head.
_PRIOR = {
    **_TIMES,
    r"clip_img_proj": "proj_in",
    r"text_emb_proj": "embedding_proj",
    r"text_enc_proj": "encoder_hidden_states_proj",
    r"prd_emb": "prd_embedding",
    r"final_ln": "norm_out",
    r"out_proj": "proj_to_clip_embeddings",
    r"transformer\.resblocks\.(\d+)\.ln_1": r"transformer_blocks.\1.norm1",
    r"transformer\.resblocks\.(\d+)\.ln_2": r"transformer_blocks.\1.norm3",
    r"transformer\.resblocks\.(\d+)\.attn\.c_qkv": r"transformer_blocks.\1.attn1.to_q+to_k+to_v",
    r"transformer\.resblocks\.(\d+)\.attn\.c_proj": r"transformer_blocks.\1.attn1.to_out.0",
    r"transformer\.resblocks\.(\d+)\.mlp\.c_fc": r"transformer_blocks.\1.ff.net.0.proj",
    r"transformer\.resblocks\.(\d+)\.mlp\.c_proj": r"transformer_blocks.\1.ff.net.2",
}
_TEXT_PROJ = {
    r"text_seq_proj\.0": "text_proj.encoder_hidden_states_proj",
    r"text_seq_proj\.1": "text_proj.text_encoder_hidden_states_norm",
    r"clip_tok_proj": CONTEXT,
    r"text_feat_proj": "text_proj.embedding_proj",
    r"clip_emb": "text_proj.clip_image_embeddings_project_to_time_embeddings",
    r"cf_param": NULL,
}
_ENDS = {**_TIMES, r"input_blocks\.0\.0": "conv_in", r"out\.0": "conv_norm_out", r"out\.2": "conv_out"}
_RESNET = {
    "in_layers.0": "norm1",
    "in_layers.2": "conv1",
    "emb_layers.1": "time_emb_proj",
    "out_layers.0": "norm2",
    "out_layers.3": "conv2",
    "skip_connection": "conv_shortcut",
}
_ATTENTION = {
    "norm": "group_norm",
    "qkv": "to_q+to_k+to_v",
    "encoder_kv": "add_k_proj+add_v_proj",
    "proj_out": "to_out.0",
}
_BLOCK = re.compile(r"(input|middle|output)_blocks?\.(\d+)(?:\.(\d+))?\.([a-z]\w*(?:\.\d)?)")


def read_kakao(folder: Path) -> dict[str, Part]:
    """The networks and schedulers, by the names that they have in a folder of `diffusers`. Widths and depths follow from the
    weights, the rest of their shapes is Karlo's.

    Raises:
        CheckpointError: a file is missing or cannot be read, or holds something else.
    """
    if not any(folder.glob("*.ckpt")):
        raise CheckpointError(
            f"{folder} is no folder of an unCLIP: it has neither diffusers' model_index.json nor Kakao's .ckpt files"
        )
    files: dict[str, Path] = {}
    for name, pattern in _FILES.items():
        found = sorted(folder.glob(pattern))
        if len(found) > 1 or (not found and name != "prior"):
            raise CheckpointError(f"{folder} has {len(found)} files {pattern}, where one is needed")
        files.update((name, file) for file in found)
    parts = {
        f"{name}_scheduler": Part(_values("UnCLIPScheduler", _SCHEDULERS[name]), {}, files[name]) for name in files
    }
    parts |= _decoder(files["decoder"]) | _upsamplers(files["super_res"])
    return parts | ({"prior": _prior(files["prior"], folder / _STATISTICS)} if "prior" in files else {})


def kakao_clip(folder: Path) -> Clip:
    """The CLIP in the folder, of OpenAI's files; errors as `load_clip`."""
    return load_clip(folder / _CLIP, "openai", tokenizer=folder / _VOCABULARY)


def _prior(file: Path, statistics: Path) -> Part:
    moments = load_tensors(statistics, classes=None)
    with named(file):
        weights = _renamed(_state(file, "model.")["model."], lambda name: _by_pattern(name, _PRIOR))
        weights |= {name: moments[f"{place}"].float()[None] for place, name in enumerate(("clip_mean", "clip_std"))}
        _, length, width = weights["positional_embedding"].shape
        values = {
            "num_attention_heads": width // _HEAD,
            "attention_head_dim": _HEAD,
            "num_layers": len({name.split(".")[1] for name in weights if name.startswith("transformer_blocks.")}),
            "embedding_dim": weights["proj_in.weight"].shape[1],
            "num_embeddings": length - 4,
        }
        return Part(_values("PriorTransformer", values), weights, file)


def _decoder(file: Path) -> dict[str, Part]:
    with named(file):
        state = _state(file, "model.")["model."]
        depth = _depth(state)

        def name_of(name: str) -> str:
            of_text = _by_pattern(name, _TEXT_PROJ)
            return f"decoder.{_unet_name(name, depth)}" if of_text == name else of_text

        weights = _renamed(state, name_of)
        unet, text_proj = (behind(weights, f"{name}.") for name in ("decoder", "text_proj"))
        width, dim = text_proj["encoder_hidden_states_proj.weight"].shape
        attends = [f"down_blocks.{level}.attentions.0.to_q.weight" in unet for level in range(_LEVELS)]
        kinds = ["SimpleCrossAttnDownBlock2D" if each else "ResnetDownsampleBlock2D" for each in attends]
        values = _unet_values(unet, depth, 64, kinds) | {
            "mid_block_type": "UNetMidBlock2DSimpleCrossAttn",
            "attention_head_dim": _HEAD,
            "cross_attention_dim": width,
            "resnet_time_scale_shift": "scale_shift",
            "class_embed_type": "identity",
        }
        of_text = {
            "clip_embeddings_dim": dim,
            "clip_extra_context_tokens": len(weights[f"{CONTEXT}.bias"]) // width,
            "time_embed_dim": len(text_proj["embedding_proj.bias"]),
            "cross_attention_dim": width,
        }
        return {
            "decoder": Part(_values("UNet2DConditionModel", values), unet, file),
            "text_proj": Part(_values("UnCLIPTextProjModel", of_text), text_proj, file),
        }


def _upsamplers(file: Path) -> dict[str, Part]:
    parts = {}
    with named(file):
        states = _state(file, "model_first_steps.", "model_last_step.")
        for name, state in zip(("super_res_first", "super_res_last"), states.values(), strict=True):
            depth = _depth(state)
            weights = _renamed(state, lambda name, depth=depth: _unet_name(name, depth))  # type: ignore[misc]
            values = _unet_values(weights, depth, 256, ["ResnetDownsampleBlock2D"] * _LEVELS)
            parts[name] = Part(
                _values("UNet2DModel", {**values, "in_channels": 6, "add_attention": False}), weights, file
            )
    return parts


def _values(kind: str, values: Mapping[str, Any]) -> dict[str, Any]:
    return defaults(kind) | dict(values)


def _unet_values(weights: Weights, depth: int, side: int, kinds: list[str]) -> dict[str, Any]:
    levels = range(_LEVELS)
    return {
        "sample_size": side,
        "in_channels": 3,
        "out_channels": len(weights["conv_out.bias"]),
        "layers_per_block": depth,
        "block_out_channels": [len(weights[f"down_blocks.{level}.resnets.0.conv1.bias"]) for level in levels],
        "down_block_types": kinds,
        "up_block_types": [kind.replace("Downsample", "Upsample").replace("Down", "Up") for kind in reversed(kinds)],
    }


def _state(file: Path, *prefixes: str) -> dict[str, dict[str, Tensor]]:
    """The tensors of a checkpoint's state dict, in fp32, by how their names begin, and named without it."""
    weights = {name: value.float() for name, value in behind(load_tensors(file, classes=None), "state_dict.").items()}
    for name in weights:
        if not name.startswith(prefixes):
            raise CheckpointError(f"{file} has {name}, which none of Karlo's has")
    return {prefix: behind(weights, prefix) for prefix in prefixes}


def _renamed(weights: Weights, name_of: Callable[[str], str]) -> dict[str, Tensor]:
    """Under other names, without ".weight" and ".bias". Products over positions are convolutions there."""
    found: dict[str, Tensor] = {}
    for name, value in weights.items():
        stem, dot, entry = name.rpartition(".")
        new, ending = (name_of(stem), dot + entry) if entry in ENTRIES else (name_of(name), "")
        matrix = value[..., 0] if value.dim() == 3 and ending == ".weight" else value
        place, dot, last = new.rpartition(".")
        several = last.split("+")
        parts = matrix.unflatten(0, (-1, len(several), _HEAD)).unbind(1) if len(several) > 1 else (matrix[None],)
        found |= {place + dot + one + ending: part.flatten(0, 1) for one, part in zip(several, parts, strict=True)}
    return found


def _by_pattern(name: str, patterns: Mapping[str, str]) -> str:
    """The name that there is for it, or itself."""
    found = ((re.fullmatch(pattern, name), new) for pattern, new in patterns.items())
    return next((match.expand(new) for match, new in found if match), name)


def _depth(weights: Weights) -> int:
    """Residual blocks of a level, of which there is one more on the way up."""
    return len({name.split(".")[1] for name in weights if name.startswith("output_blocks.")}) // _LEVELS - 1


def _unet_name(name: str, depth: int) -> str:
    match = _BLOCK.fullmatch(name)
    if match is None or name == "input_blocks.0.0":
        return _by_pattern(name, _ENDS)
    side, block, within, leaf = match[1], int(match[2]), int(match[3] or 0), match[4]
    is_attention = leaf in _ATTENTION
    new = _ATTENTION.get(leaf) or _RESNET.get(leaf, leaf)
    if side == "middle":
        return f"mid_block.attentions.0.{new}" if is_attention else f"mid_block.resnets.{int(block > 0)}.{new}"
    # The last block of a level on the way down halves; on the way up, a part of the last one doubles.
    level, number = divmod(block - (side == "input"), depth + 1)
    if is_attention:
        place = f"attentions.{number}"
    elif side == "input":
        place = f"resnets.{number}" if number < depth else "downsamplers.0"
    else:
        place = f"resnets.{number}" if within == 0 else "upsamplers.0"
    return f"{'down' if side == 'input' else 'up'}_blocks.{level}.{place}.{new}"
