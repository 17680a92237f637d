"""unCLIP's networks in `diffusers`' layout, which is Karlo's: their names for our tensors, their words for our shapes.

Nothing is computed, so that there and back is exact.
"""

from __future__ import annotations

import inspect
import json
import sys
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor

from dalle_ds.config import DecoderConfig, PriorConfig
from dalle_ds.errors import CheckpointError, ConfigError

Weights = Mapping[str, Tensor]
INDEX_NAME = "model_index.json"
OWN_NAME = "dalle_ds.safetensors"
"""In an exported folder: what the layout has no place for, in tensors and in the metadata."""
PIPELINES = ("UnCLIPPipeline", "UnCLIPImageVariationPipeline")
CLASSES = {
    "prior": ("diffusers", "PriorTransformer"),
    "decoder": ("diffusers", "UNet2DConditionModel"),
    "text_proj": ("unclip", "UnCLIPTextProjModel"),
    "text_encoder": ("transformers", "CLIPTextModelWithProjection"),
    "tokenizer": ("transformers", "CLIPTokenizer"),
    "image_encoder": ("transformers", "CLIPVisionModelWithProjection"),
    "feature_extractor": ("transformers", "CLIPImageProcessor"),
    "super_res_first": ("diffusers", "UNet2DModel"),
    "super_res_last": ("diffusers", "UNet2DModel"),
    "prior_scheduler": ("diffusers", "UnCLIPScheduler"),
    "decoder_scheduler": ("diffusers", "UnCLIPScheduler"),
    "super_res_scheduler": ("diffusers", "UnCLIPScheduler"),
}
"""Of what is in a folder: the library that it is from, as `INDEX_NAME` has it, and the class."""
WEIGHTS_NAME = "diffusion_pytorch_model.safetensors"
PREDICTS = {"epsilon": "epsilon", "x0": "sample"}
"""What a network predicts, and how `UnCLIPScheduler` calls it."""


class Part(NamedTuple):
    """A network or scheduler of theirs."""

    values: dict[str, Any]
    """Its configuration, with defaults where nothing is said."""
    weights: dict[str, Tensor]
    """None of a scheduler's."""
    where: Path
    """The file that says so."""

    def check(self, wanted: Mapping[str, Any]) -> None:
        """Raise a `CheckpointError` where it is configured otherwise."""
        for name in sorted({*self.values, *wanted}):
            found, needed = self.values.get(name), wanted.get(name)
            if found != needed:
                raise CheckpointError(
                    f"{self.where} says {name} = {str(found)[:100]}, where {str(needed)[:100]} is needed beside the rest"
                )


ENTRIES = ("weight", "bias")
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
_TEXT_PROJ_NAMES = [(f"{o}.{entry}", f"text_proj.{t}.{entry}") for o, t in _TEXT_PROJ for entry in ENTRIES]
NULL = "text_proj.learned_classifier_free_guidance_embeddings"
CONTEXT = "text_proj.clip_extra_context_tokens_proj"


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
    found = [(f"{ours}.{entry}", f"{theirs}.{entry}") for ours, theirs in pairs for entry in ENTRIES]
    return [pair for pair in found if pair not in _transposed(depth)]


def _transposed(depth: int) -> list[tuple[str, str]]:
    return [(f"blocks.{2 * n + 1}.down.weight", f"transformer_blocks.{n}.ff.net.2.weight") for n in range(depth)]


def _stacks(depth: int) -> list[tuple[str, list[str]]]:
    return [
        (f"blocks.{2 * n}.attention.qkv.{entry}", [f"transformer_blocks.{n}.attn1.to_{part}.{entry}" for part in "qkv"])
        for n in range(depth)
        for entry in ENTRIES
    ]


def to_decoder(weights: Weights, tokens: int) -> dict[str, Tensor]:
    """Our decoder's tensors as those of the U-Net, behind "decoder.", and of `UnCLIPTextProjModel`, behind "text_proj."."""
    found = {f"decoder.{name[5:]}": value for name, value in weights.items() if name.startswith("unet.")}
    found |= {theirs: weights[ours] for ours, theirs in _TEXT_PROJ_NAMES}
    for entry in ENTRIES:  # (token, width) rows become (width, token)
        rows = weights[f"embedding_tokens.{entry}"].unflatten(0, (tokens, -1))
        found[f"{CONTEXT}.{entry}"] = rows.transpose(0, 1).flatten(0, 1)
    return {**found, NULL: weights["null_embedding.weight"][0]}


def from_decoder(weights: Weights, tokens: int) -> dict[str, Tensor]:
    """The inverse of `to_decoder`."""
    found = {f"unet.{name[8:]}": value for name, value in weights.items() if name.startswith("decoder.")}
    found |= {ours: weights[theirs] for ours, theirs in _TEXT_PROJ_NAMES}
    for entry in ENTRIES:
        rows = weights[f"{CONTEXT}.{entry}"].unflatten(0, (-1, tokens))
        found[f"embedding_tokens.{entry}"] = rows.transpose(0, 1).flatten(0, 1)
    return {**found, "null_embedding.weight": weights[NULL][None]}


def behind(weights: Weights, prefix: str) -> dict[str, Tensor]:
    """Those whose names begin so, named without it."""
    return {name[len(prefix) :]: value for name, value in weights.items() if name.startswith(prefix)}


# --- configurations


def prior_values(config: PriorConfig) -> dict[str, Any]:
    """Of `PriorTransformer`."""
    return defaults("PriorTransformer") | {
        "num_attention_heads": config.heads,
        "attention_head_dim": config.width // config.heads,
        "num_layers": config.depth,
        "embedding_dim": config.embed_dim,
        "num_embeddings": config.text_len,
        "dropout": config.dropout,
    }


def unet_values(model: Any) -> dict[str, Any]:
    """Of our decoder's or an upsampler's U-Net."""
    return {**plain(model.unet.config), "dropout": model.config.dropout}


def text_proj_values(config: DecoderConfig) -> dict[str, Any]:
    """Of `UnCLIPTextProjModel`."""
    return {
        "clip_extra_context_tokens": config.image_tokens,
        "clip_embeddings_dim": config.embed_dim,
        "time_embed_dim": 4 * config.channels * config.multiples[0],
        "cross_attention_dim": config.context_width,
    }


def scheduler_values(timesteps: int, predicts: str, bound: float | None, *, learned: bool = False) -> dict[str, Any]:
    """Of `UnCLIPScheduler`: what is clean is kept in [−bound, bound]; `learned` is the variance."""
    return {
        "num_train_timesteps": timesteps,
        "variance_type": "learned_range" if learned else "fixed_small_log",
        "clip_sample": bound is not None,
        "clip_sample_range": 1.0 if bound is None else bound,
        "prediction_type": PREDICTS[predicts],
        "beta_schedule": "squaredcos_cap_v2",
    }


def defaults(kind: str) -> dict[str, Any]:
    """What a class of `diffusers` is configured with where nothing else is said."""
    parameters = inspect.signature(diffusers_class(kind).__init__).parameters.values()
    return plain({each.name: each.default for each in parameters if each.default is not each.empty})


def plain(values: Mapping[str, Any]) -> dict[str, Any]:
    """As JSON has them, without notes."""
    return {name: value for name, value in json.loads(json.dumps(values)).items() if not name.startswith("_")}


def diffusers_class(kind: str) -> Any:
    """The class of that name; ConfigError where `diffusers` is not installed."""
    try:
        import diffusers
    except ImportError as error:
        raise ConfigError("Karlo's layout needs diffusers: pip install 'dalle_ds[unclip]'") from error
    # UnCLIPTextProjModel is in another module in each version.
    return getattr(diffusers if hasattr(diffusers, kind) else sys.modules[diffusers.UnCLIPPipeline.__module__], kind)


@contextmanager
def named(where: str | Path) -> Iterator[None]:
    """Turns what a missing value or tensor, or one of a wrong type or shape, makes fail into an error that names it."""
    try:
        yield
    except CheckpointError:
        raise
    except KeyError as error:
        raise CheckpointError(f"{where} lacks {error}") from error
    except (TypeError, ValueError, RuntimeError, ZeroDivisionError) as error:
        raise CheckpointError(f"{where} is no unCLIP that can be read: {error}") from error
