"""unCLIP's networks in `diffusers`' layout, which is Karlo's: their names for our tensors, and Kakao's names for theirs.

Nothing is computed, so that there and back is exact.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping

import torch
from torch import Tensor

Weights = Mapping[str, Tensor]
_ENTRIES = ("weight", "bias")
_PRIOR = (
    ("text_input", "encoder_hidden_states_proj"),
    ("embedding_input", "embedding_proj"),
    ("time_input.0", "time_embedding.linear_1"),
    ("time_input.2", "time_embedding.linear_2"),
    ("noised_input", "proj_in"),
    ("norm", "norm_out"),
    ("output", "proj_to_clip_embeddings"),
)
_TOKENS = {"query.weight": "prd_embedding", "position.weight": "positional_embedding"}
_TEXT_PROJ = (
    ("embedding_time", "clip_image_embeddings_project_to_time_embeddings"),
    ("text_time", "embedding_proj"),
    ("text_input", "encoder_hidden_states_proj"),
    ("text_norm", "text_encoder_hidden_states_norm"),
)
_TEXT_PROJ_NAMES = [(f"{o}.{entry}", f"text_proj.{t}.{entry}") for o, t in _TEXT_PROJ for entry in _ENTRIES]
_NULL = "text_proj.learned_classifier_free_guidance_embeddings"
_CONTEXT = "text_proj.clip_extra_context_tokens_proj"


def to_prior_transformer(weights: Weights, depth: int) -> dict[str, Tensor]:
    """Our prior's tensors as those of `PriorTransformer`, all but clip_mean and clip_std."""
    found = {theirs: weights[ours] for ours, theirs in _prior_names(depth)}
    found |= {theirs: weights[ours][None] for ours, theirs in _TOKENS.items()}
    found |= {theirs: weights[ours].T for ours, theirs in _transposed(depth)}
    for ours, theirs in _stacks(depth):
        found |= dict(zip(theirs, weights[ours].chunk(3), strict=True))
    return found


def from_prior_transformer(weights: Weights, depth: int) -> dict[str, Tensor]:
    """The inverse of `to_prior_transformer`."""
    found = {ours: weights[theirs] for ours, theirs in _prior_names(depth)}
    found |= {ours: weights[theirs][0] for ours, theirs in _TOKENS.items()}
    found |= {ours: weights[theirs].T for ours, theirs in _transposed(depth)}
    return found | {ours: torch.cat([weights[name] for name in theirs]) for ours, theirs in _stacks(depth)}


def _prior_names(depth: int) -> list[tuple[str, str]]:
    pairs = list(_PRIOR)
    for number in range(depth):
        attention, mlp, block = f"blocks.{2 * number}", f"blocks.{2 * number + 1}", f"transformer_blocks.{number}"
        pairs += [(f"{attention}.norm", f"{block}.norm1"), (f"{attention}.attention.out", f"{block}.attn1.to_out.0")]
        pairs += [(f"{mlp}.norm", f"{block}.norm3"), (f"{mlp}.up", f"{block}.ff.net.0.proj")]
        pairs += [(f"{mlp}.down", f"{block}.ff.net.2")]
    found = [(f"{ours}.{entry}", f"{theirs}.{entry}") for ours, theirs in pairs for entry in _ENTRIES]
    return [pair for pair in found if pair not in _transposed(depth)]


def _transposed(depth: int) -> list[tuple[str, str]]:
    return [(f"blocks.{2 * n + 1}.down.weight", f"transformer_blocks.{n}.ff.net.2.weight") for n in range(depth)]


def _stacks(depth: int) -> list[tuple[str, list[str]]]:
    return [
        (f"blocks.{2 * n}.attention.qkv.{entry}", [f"transformer_blocks.{n}.attn1.to_{part}.{entry}" for part in "qkv"])
        for n in range(depth)
        for entry in _ENTRIES
    ]


def to_decoder(weights: Weights, tokens: int) -> dict[str, Tensor]:
    """Our decoder's tensors as those of the U-Net, behind "decoder.", and of `UnCLIPTextProjModel`, behind "text_proj."."""
    found = {f"decoder.{name[5:]}": value for name, value in weights.items() if name.startswith("unet.")}
    found |= {theirs: weights[ours] for ours, theirs in _TEXT_PROJ_NAMES}
    for entry in _ENTRIES:  # (token, width) rows become (width, token)
        rows = weights[f"embedding_tokens.{entry}"].unflatten(0, (tokens, -1))
        found[f"{_CONTEXT}.{entry}"] = rows.transpose(0, 1).flatten(0, 1)
    return {**found, _NULL: weights["null_embedding.weight"][0]}


def from_decoder(weights: Weights, tokens: int) -> dict[str, Tensor]:
    """The inverse of `to_decoder`."""
    found = {f"unet.{name[8:]}": value for name, value in weights.items() if name.startswith("decoder.")}
    found |= {ours: weights[theirs] for ours, theirs in _TEXT_PROJ_NAMES}
    for entry in _ENTRIES:
        rows = weights[f"{_CONTEXT}.{entry}"].unflatten(0, (-1, tokens))
        found[f"embedding_tokens.{entry}"] = rows.transpose(0, 1).flatten(0, 1)
    return {**found, "null_embedding.weight": weights[_NULL][None]}


# --- Kakao's own checkpoints

HEAD = 64
"""Width of all heads of Karlo's."""
LEVELS = 4
"""Resolutions of all U-Nets of Karlo's."""
_KAKAO_PRIOR = {
    r"time_embed\.0": "time_embedding.linear_1",
    r"time_embed\.2": "time_embedding.linear_2",
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
_KAKAO_TEXT_PROJ = {
    r"text_seq_proj\.0": "text_proj.encoder_hidden_states_proj",
    r"text_seq_proj\.1": "text_proj.text_encoder_hidden_states_norm",
    r"clip_tok_proj": _CONTEXT,
    r"text_feat_proj": "text_proj.embedding_proj",
    r"clip_emb": "text_proj.clip_image_embeddings_project_to_time_embeddings",
    r"cf_param": _NULL,
}
_KAKAO_ENDS = {
    r"time_embed\.0": "time_embedding.linear_1",
    r"time_embed\.2": "time_embedding.linear_2",
    r"input_blocks\.0\.0": "conv_in",
    r"out\.0": "conv_norm_out",
    r"out\.2": "conv_out",
}
_KAKAO_RESNET = {
    "in_layers.0": "norm1",
    "in_layers.2": "conv1",
    "emb_layers.1": "time_emb_proj",
    "out_layers.0": "norm2",
    "out_layers.3": "conv2",
    "skip_connection": "conv_shortcut",
}
_KAKAO_ATTENTION = {
    "norm": "group_norm",
    "qkv": "to_q+to_k+to_v",
    "encoder_kv": "add_k_proj+add_v_proj",
    "proj_out": "to_out.0",
}
_BLOCK = re.compile(r"(input|middle|output)_(?:blocks|block)\.(\d+)(?:\.(\d+))?\.([a-z]\w*(?:\.\d)?)")


def prior_from_kakao(weights: Weights) -> dict[str, Tensor]:
    """Kakao's prior under the names of `PriorTransformer`; what none is known for keeps its own."""
    return _renamed(weights, lambda name: _by_pattern(name, _KAKAO_PRIOR))


def decoder_from_kakao(weights: Weights) -> dict[str, Tensor]:
    """Kakao's decoder as `to_decoder` names it."""

    def name_of(name: str) -> str:
        of_text = _by_pattern(name, _KAKAO_TEXT_PROJ)
        return f"decoder.{_unet_name(name, depth)}" if of_text == name else of_text

    depth = _depth(weights)
    return _renamed(weights, name_of)


def unet_from_kakao(weights: Weights) -> dict[str, Tensor]:
    """Kakao's U-Net under the names of `diffusers`."""
    depth = _depth(weights)
    return _renamed(weights, lambda name: _unet_name(name, depth))


def _renamed(weights: Weights, name_of: Callable[[str], str]) -> dict[str, Tensor]:
    """Under other names, without biases' and weights' ending; where it has several, joined by +, the rows are theirs in turn,
    head by head. Products over positions are convolutions there."""
    found: dict[str, Tensor] = {}
    for name, value in weights.items():
        stem, dot, entry = name.rpartition(".")
        place, new = ("", name_of(name)) if entry not in _ENTRIES else (dot + entry, name_of(stem))
        value = value[..., 0] if value.dim() == 3 and place == ".weight" else value
        before, _, last = new.rpartition(".")
        several = last.split("+")
        parts = value.unflatten(0, (-1, len(several), HEAD)).unbind(1) if len(several) > 1 else (value[None],)
        found |= {
            f"{before}.{one}".lstrip(".") + place: part.flatten(0, 1) for one, part in zip(several, parts, strict=True)
        }
    return found


def _by_pattern(name: str, patterns: Mapping[str, str]) -> str:
    for pattern, new in patterns.items():
        if match := re.fullmatch(pattern, name):
            return match.expand(new)
    return name


def _depth(weights: Weights) -> int:
    blocks = {int(name.split(".")[1]) for name in weights if name.startswith("output_blocks.")}
    return len(blocks) // LEVELS - 1


def _unet_name(name: str, depth: int) -> str:
    ends = _by_pattern(name, _KAKAO_ENDS)
    match = _BLOCK.fullmatch(name)
    if ends != name or match is None:
        return ends
    side, block, within, leaf = match[1], int(match[2]), int(match[3] or 0), match[4]
    is_attention = leaf in _KAKAO_ATTENTION
    new = _KAKAO_ATTENTION.get(leaf) or _KAKAO_RESNET.get(leaf, leaf)
    if side == "middle":
        return f"mid_block.attentions.0.{new}" if is_attention else f"mid_block.resnets.{int(block > 0)}.{new}"
    # The block of a level that halves is the last one on the way down; on the way up, one within the last one doubles.
    level, number = divmod(block - (side == "input"), depth + 1)
    if is_attention:
        place = f"attentions.{number}"
    elif side == "input":
        place = f"resnets.{number}" if number < depth else "downsamplers.0"
    else:
        place = f"resnets.{number}" if within == 0 else "upsamplers.0"
    return f"{'down' if side == 'input' else 'up'}_blocks.{level}.{place}.{new}"
