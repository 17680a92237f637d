"""unCLIPs in `diffusers`' layout, in which Karlo is published, as ours; and ours as such.

Each network has a folder of its own. What is exported serves both pipelines: `UnCLIPPipeline`, from captions, and
`UnCLIPImageVariationPipeline`, from images. What the layout has no place for, such as how to sample, is in `OWN_NAME` beside.
"""

from __future__ import annotations

import inspect
import json
import math
import sys
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any, NamedTuple

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from dalle_ds.config import (
    DecoderConfig,
    ImageSampling,
    PriorConfig,
    UpsamplerConfig,
    from_dict,
    to_dict,
)
from dalle_ds.errors import CheckpointError, ConfigError
from dalle_ds.files import built_beside, write_json
from dalle_ds.interop.clip_export import check_format, describe_tokenizer, preprocessor
from dalle_ds.interop.clip_import import HF_PREPROCESSOR, load_clip, read_weights
from dalle_ds.interop.clip_layouts import (
    from_huggingface,
    from_huggingface_config,
    plain_huggingface,
    to_huggingface,
)
from dalle_ds.interop.karlo_layouts import (
    HEAD,
    LEVELS,
    decoder_from_kakao,
    from_decoder,
    from_prior_transformer,
    prior_from_kakao,
    to_decoder,
    to_prior_transformer,
    unet_from_kakao,
)
from dalle_ds.interop.torch_files import load_tensors
from dalle_ds.models.clip import LARGEST_SCALE, Clip, huggingface_config
from dalle_ds.models.decoder import UnclipDecoder
from dalle_ds.models.latents import EmbeddingScaling
from dalle_ds.models.pretrained import check_shapes, load_weights, read_safetensors
from dalle_ds.models.prior import DiffusionPrior
from dalle_ds.models.upsampler import Upsampler
from dalle_ds.parsing import parse_json
from dalle_ds.sampling.embedding_to_image import EmbeddingToImage
from dalle_ds.sampling.image_diffusion import DiffusionFacts
from dalle_ds.sampling.prior import PriorSampling
from dalle_ds.sampling.super_resolution import SuperResolution
from dalle_ds.sampling.text_to_embedding import DiffusionTextToEmbedding
from dalle_ds.sampling.unclip import Unclip
from dalle_ds.text.clip_tokenizer import BytePairs, ClipTokenizer

INDEX_NAME = "model_index.json"
OWN_NAME = "dalle_ds.safetensors"
"""In an exported folder: what the layout has no place for, in tensors and in the metadata."""
PIPELINES = ("UnCLIPPipeline", "UnCLIPImageVariationPipeline")
_CLASSES = {
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
_WEIGHTS = "diffusion_pytorch_model.safetensors"
_CLIP_WEIGHTS = "model.safetensors"
_NO_TOWER = {
    **dict.fromkeys(("hidden_size", "num_attention_heads", "image_size", "patch_size"), 1),
    "intermediate_size": 4,
    "num_hidden_layers": 0,
}
"""As a configuration of CLIP's image tower."""
_PREDICTS = {"epsilon": "epsilon", "x0": "sample"}
"""What a network predicts, and how `UnCLIPScheduler` calls it."""
_KAKAO = {"prior": "prior-ckpt*.ckpt", "decoder": "decoder-ckpt*.ckpt", "super_res": "improved-sr-ckpt*.ckpt"}
_KAKAO_STATS, _KAKAO_CLIP, _KAKAO_VOCABULARY = "ViT-L-14_stats.th", "ViT-L-14.pt", "bpe_simple_vocab_16e6.txt.gz"


class _Part(NamedTuple):
    """A network or scheduler of theirs."""

    values: dict[str, Any]
    """Its configuration, with defaults where nothing is said."""
    weights: dict[str, Tensor]
    where: Path
    is_told: bool = True
    """Whether `values` were read; others follow from the weights' shapes."""


# --- theirs to ours


def import_karlo(path: str | Path, out: str | Path | None = None, *, clip: str | Path | None = None) -> Unclip:
    """The unCLIP in someone else's folder; in eval mode, in fp32, on the CPU.

    Its CLIP gives embeddings as they are (`ClipConfig.unit_length`). A text-to-image folder of `diffusers` has no image tower:
    without `clip`, the model has none either, generates, and cannot be trained on. An image-variation folder has no prior;
    embeddings of captions then stand in for those of images.

    Args:
        path: folder of `UnCLIPPipeline` or `UnCLIPImageVariationPipeline`, as any version of `diffusers` has written it; or of
            Kakao's own checkpoints: `prior-ckpt-….ckpt` with `ViT-L-14_stats.th`, `decoder-ckpt-….ckpt`,
            `improved-sr-ckpt-….ckpt`, and for CLIP `ViT-L-14.pt` with `bpe_simple_vocab_16e6.txt.gz`.
        out: folder to write the model to; None: none.
        clip: run directory or export of the same CLIP with both towers, as launchers/import_clip.py makes one.

    Raises:
        CheckpointError: something is missing, left over, of another shape, or not what we compute, named.
        ConfigError: `out` is there already.
    """
    folder = Path(path)
    if out is not None and Path(out).exists():
        raise ConfigError(f"--out {out} is there already: name a new folder")
    with _named(folder):
        if (folder / INDEX_NAME).is_file():
            parts, tensors, told = _read_diffusers(folder)
            model = _clip_of(folder, clip, tensors)
        else:
            parts, tensors, told = _read_kakao(folder), {}, {}
            model = _kakao_clip(folder, clip)
        decoder, upsampler = _decoder_of(parts, model, told), _upsampler_of(parts, told)
        prior = _prior_of(parts, model, tensors, told) if "prior" in parts else None
    unclip = Unclip(model, decoder, prior, [upsampler])
    if out is not None:
        unclip.save_pretrained(out)
    return unclip


def _prior_of(
    parts: Mapping[str, _Part], clip: Clip, tensors: Mapping[str, Tensor], told: Mapping[str, Any]
) -> DiffusionTextToEmbedding:
    part, scheduler = parts["prior"], parts["prior_scheduler"]
    values, dim = part.values, part.values["embedding_dim"]
    config = PriorConfig(
        width=values["num_attention_heads"] * values["attention_head_dim"],
        depth=values["num_layers"],
        heads=values["num_attention_heads"],
        text_len=values["num_embeddings"],
        embed_dim=dim,
        text="karlo",
        text_width=dim,
        mask_padding=True,
        dropout=values["dropout"],
    )

    def layout(state: dict[str, Tensor]) -> dict[str, Tensor]:
        statistics = {name: torch.empty(1, dim) for name in ("clip_mean", "clip_std")}
        return to_prior_transformer(state, config.depth) | statistics

    check_shapes(lambda: DiffusionPrior(config), replace(config, text_vocab=1), part.weights, part.where, layout)
    _check(part, _prior_values(config))
    model = DiffusionPrior(config)
    load_weights(model, from_prior_transformer(part.weights, config.depth), part.where)
    shift, std = (part.weights[name][0] for name in ("clip_mean", "clip_std"))
    factor = 1 / std
    if "factor" in tensors and torch.equal(1 / tensors["factor"], std):
        factor = tensors["factor"]  # which the division had rounded
    how = scheduler.values
    steps, bound = how["num_train_timesteps"], how["clip_sample_range"] if how["clip_sample"] else None
    sampling = PriorSampling("ddpm", str(min(25, steps)), guidance=4.0, bound=bound, best_of=1)
    if "prior" in told:
        sampling = from_dict(PriorSampling, told["prior"]["sampling"], str(part.where))
    _check(scheduler, _scheduler_values(steps, False, sampling.bound, "x0"))
    with _named(f"clip_mean or clip_std of {part.where}"):
        scaling = EmbeddingScaling(shift, factor)
    analytic = told["prior"]["analytic"] if "prior" in told else None
    return DiffusionTextToEmbedding(model.eval(), clip, None, scaling, "cosine", steps, analytic, sampling)


def _decoder_of(parts: Mapping[str, _Part], clip: Clip, told: Mapping[str, Any]) -> EmbeddingToImage:
    part, of_text, scheduler = parts["decoder"], parts["text_proj"], parts["decoder_scheduler"]
    values, side = part.values, part.values["sample_size"]
    kinds = enumerate(values["down_block_types"])
    config = DecoderConfig(
        **_unet_fields(values),
        attention=tuple(side >> level for level, kind in kinds if kind.startswith("SimpleCrossAttn")),
        head_channels=values["attention_head_dim"],
        embed_dim=of_text.values["clip_embeddings_dim"],
        image_tokens=of_text.values["clip_extra_context_tokens"],
        text="karlo",
        context_width=values["cross_attention_dim"],
        text_len=clip.config.text_len,
        text_width=of_text.values["clip_embeddings_dim"],
        mask_padding=True,
    )
    sized = replace(config, text_vocab=1, text_depth=1, text_heads=1, text_len=1)
    weights = {f"decoder.{name}": value for name, value in part.weights.items()}
    weights |= {f"text_proj.{name}": value for name, value in of_text.weights.items()}
    tokens = config.image_tokens
    check_shapes(
        lambda: UnclipDecoder(config), sized, weights, part.where.parent, lambda state: to_decoder(state, tokens)
    )
    model = UnclipDecoder(config)
    _check(part, _unet_values(model))
    _check(of_text, _text_proj_values(config))
    load_weights(model, from_decoder(weights, tokens), part.where)
    facts = _facts(scheduler, config.learned_variance, "25", 8.0, told.get("decoder"))
    return EmbeddingToImage(model.eval(), None, clip, clip.fingerprint, facts)


def _upsampler_of(parts: Mapping[str, _Part], told: Mapping[str, Any]) -> SuperResolution:
    first, last = parts["super_res_first"], parts["super_res_last"]
    config = UpsamplerConfig(
        **_unet_fields(first.values),
        low_size=parts["decoder"].values["sample_size"],
        scale_shift=first.values["resnet_time_scale_shift"] == "scale_shift",
    )
    found = []
    for part in (first, last):
        if part.values["sample_size"] is None:  # as in Karlo's last one
            part.values["sample_size"] = config.image_size
        check_shapes(
            lambda: Upsampler(config),
            config,
            part.weights,
            part.where,
            lambda state: {name.removeprefix("unet."): value for name, value in state.items()},
        )
        model = Upsampler(config)
        _check(part, _unet_values(model))
        load_weights(model, {f"unet.{name}": value for name, value in part.weights.items()}, part.where)
        found.append(model.eval())
    facts = _facts(parts["super_res_scheduler"], config.learned_variance, "7", 1.0, told.get("upsampler"))
    alike = all(torch.equal(value, last.weights[name]) for name, value in first.weights.items())
    return SuperResolution(found[0], facts, None if alike else found[1])


def _unet_fields(values: Mapping[str, Any]) -> dict[str, Any]:
    channels = values["block_out_channels"]
    return {
        "image_size": values["sample_size"],
        "channels": channels[0],
        "depth": values["layers_per_block"],
        "multiples": tuple(count // channels[0] for count in channels),
        "dropout": values["dropout"],
        "learned_variance": values["out_channels"] == 6,
    }


def _facts(scheduler: _Part, learned: bool, steps: str, guidance: float, told: dict[str, Any] | None) -> DiffusionFacts:
    values = scheduler.values
    count = values["num_train_timesteps"]
    predicts = {theirs: ours for ours, theirs in _PREDICTS.items()}.get(values["prediction_type"], "epsilon")
    threshold = "static" if values["clip_sample"] else "none"
    sampling = ImageSampling("ddpm", str(min(int(steps), count)), guidance=guidance, threshold=threshold)  # type: ignore[arg-type]
    if told is not None:
        sampling = from_dict(ImageSampling, told, str(scheduler.where))
    _check(scheduler, _scheduler_values(count, learned, None if sampling.threshold == "none" else 1.0, predicts))
    return DiffusionFacts("cosine", count, predicts, sampling)  # type: ignore[arg-type]


def _check(part: _Part, wanted: Mapping[str, Any]) -> None:
    """Refuse what is said of a part and is not so of ours."""
    if not part.is_told:
        return
    for name in sorted({*part.values, *wanted}):
        found, needed = part.values.get(name), wanted.get(name)
        if found != needed:
            raise CheckpointError(
                f"{part.where} says {name} = {str(found)[:100]}, where only {str(needed)[:100]} is supported beside the rest: "
                f"it is another kind of model, or {OWN_NAME} is of another one"
            )


@contextmanager
def _named(where: str | Path) -> Iterator[None]:
    """Turns what a value or tensor that is missing, or of a wrong type or shape, makes fail into an error that names it."""
    try:
        yield
    except CheckpointError:
        raise
    except KeyError as error:
        raise CheckpointError(f"{where} lacks {error}") from error
    except (TypeError, ValueError, RuntimeError, ZeroDivisionError) as error:
        raise CheckpointError(f"{where} is no unCLIP that can be read: {error}") from error


# --- configurations as they have them


def _defaults(kind: str) -> dict[str, Any]:
    parameters = inspect.signature(_class(kind).__init__).parameters.values()
    return _plain({each.name: each.default for each in parameters if each.default is not each.empty})


def _plain(values: Mapping[str, Any]) -> dict[str, Any]:
    """As JSON has them, without notes."""
    return {name: value for name, value in json.loads(json.dumps(values)).items() if not name.startswith("_")}


def _prior_values(config: PriorConfig) -> dict[str, Any]:
    return _defaults("PriorTransformer") | {
        "num_attention_heads": config.heads,
        "attention_head_dim": config.width // config.heads,
        "num_layers": config.depth,
        "embedding_dim": config.embed_dim,
        "num_embeddings": config.text_len,
        "dropout": config.dropout,
    }


def _unet_values(model: Any) -> dict[str, Any]:
    return _plain(model.unet.config) | {"dropout": model.config.dropout}


def _text_proj_values(config: DecoderConfig) -> dict[str, Any]:
    return {
        "clip_extra_context_tokens": config.image_tokens,
        "clip_embeddings_dim": config.embed_dim,
        "time_embed_dim": 4 * config.channels * config.multiples[0],
        "cross_attention_dim": config.context_width,
    }


def _scheduler_values(timesteps: int, learned: bool, bound: float | None, predicts: str) -> dict[str, Any]:
    return {
        "num_train_timesteps": timesteps,
        "variance_type": "learned_range" if learned else "fixed_small_log",
        "clip_sample": bound is not None,
        "clip_sample_range": 1.0 if bound is None else bound,
        "prediction_type": _PREDICTS[predicts],
        "beta_schedule": "squaredcos_cap_v2",
    }


# --- files of diffusers


def _read_diffusers(folder: Path) -> tuple[dict[str, _Part], dict[str, Tensor], dict[str, Any]]:
    """Networks and schedulers by name; and of `OWN_NAME` the tensors and the rest, empty where there is none."""
    index = _json(folder / INDEX_NAME)
    if index.get("_class_name") not in PIPELINES:
        raise CheckpointError(
            f"{folder / INDEX_NAME} is of a {index.get('_class_name')}: only {' and '.join(PIPELINES)} are read"
        )
    parts = {}
    for name, (library, kind) in _CLASSES.items():
        if library == "transformers" or (name.startswith("prior") and "prior" not in index):
            continue
        is_scheduler = name.endswith("_scheduler")
        file = folder / name / ("scheduler_config.json" if is_scheduler else "config.json")
        values = _defaults(kind) | _plain(_json(file))
        parts[name] = _Part(values, {} if is_scheduler else _weights(folder / name), file)
    own = folder / OWN_NAME
    if not own.is_file():
        return parts, {}, {}
    try:
        with safe_open(own, "pt") as opened:
            return parts, read_safetensors(own), parse_json(opened.metadata()["told"])
    except (OSError, SafetensorError, KeyError, TypeError, ValueError) as error:
        raise CheckpointError(f"{own} cannot be read: {error}; remove it, or export again") from error


def _weights(folder: Path) -> dict[str, Tensor]:
    """Of a network in a folder, in fp32: safetensors or an older .bin, in one file or in parts, of 32 bits or else of 16."""
    names = [
        name
        for variant in ("", ".fp16")
        for ending in (".safetensors", ".bin")
        for stem in ("diffusion_pytorch_model", "model", "pytorch_model")
        for name in (f"{stem}{variant}{ending}", f"{stem}{ending}.index{variant}.json")
    ]
    file = next((folder / name for name in names if (folder / name).is_file()), None)
    if file is None:
        raise CheckpointError(f"{folder} has no file of weights, such as {_WEIGHTS}, in the form of any version")
    return read_weights(file)


def _json(file: Path) -> dict[str, Any]:
    try:
        content = parse_json(file.read_bytes())
    except (OSError, ValueError) as error:
        raise CheckpointError(f"{file} cannot be read: {error}") from error
    if not isinstance(content, dict):
        raise CheckpointError(f"{file} is no mapping of fields")
    return content


def _clip_of(folder: Path, given: str | Path | None, tensors: Mapping[str, Tensor]) -> Clip:
    """Of text_encoder, image_encoder where there is one, tokenizer and feature_extractor."""
    text = _json(folder / "text_encoder" / "config.json")
    weights, images = _weights(folder / "text_encoder"), None
    vision: dict[str, Any] = {**_NO_TOWER, "hidden_act": text.get("hidden_act", "quick_gelu")}
    if (folder / "image_encoder").is_dir():
        vision = _json(folder / "image_encoder" / "config.json")
        weights |= _weights(folder / "image_encoder")
        images = _json(folder / "feature_extractor" / HF_PREPROCESSOR)
    weights = plain_huggingface(
        {"logit_scale": tensors.get("logit_scale", torch.tensor(math.log(LARGEST_SCALE))), **weights}
    )
    values = {"projection_dim": text.get("projection_dim", 512), "text_config": text, "vision_config": vision}
    config = replace(from_huggingface_config(values, images, str(folder / "text_encoder")), unit_length=False)
    check_shapes(lambda: Clip(config), config, weights, folder, to_huggingface)
    tokenizer = ClipTokenizer.load(folder / "tokenizer", start=config.start, end=config.end)
    model = Clip(config, tokenizer=tokenizer)
    load_weights(model, from_huggingface(weights), folder)
    return model.eval() if given is None else _with_both_towers(model, Clip.from_pretrained(given), f"{given}")


def _with_both_towers(found: Clip, given: Clip, where: str) -> Clip:
    """The CLIP that was given, if it is the one that was found, in as many bits as that has."""
    theirs, ours = found.state_dict(), given.state_dict()
    for name in sorted(theirs.keys() - {"logit_scale"}):
        value = ours.get(name)
        if value is None or value.shape != theirs[name].shape or not torch.allclose(value, theirs[name], 1e-2, 1e-3):
            raise CheckpointError(f"the CLIP in {where} is another one: its {name} is not that of the unCLIP")
    given.config = replace(given.config, unit_length=False)
    given.tokenizer = given.tokenizer or found.tokenizer
    return given


# --- Kakao's checkpoints


def _read_kakao(folder: Path) -> dict[str, _Part]:
    """As `_read_diffusers`; shapes are those that Karlo has for given widths and depths."""
    files: dict[str, Path] = {}
    for name, pattern in _KAKAO.items():
        found = sorted(folder.glob(pattern))
        if len(found) > 1 or (not found and name != "prior"):
            raise CheckpointError(
                f"{folder} has no {INDEX_NAME}, and {len(found)} files {pattern}, where one is needed"
            )
        files.update((name, file) for file in found)
    scheduler, small = _defaults("UnCLIPScheduler"), {"resnet_time_scale_shift": "default"}
    with _named(files["decoder"]):
        weights = decoder_from_kakao(_state(files["decoder"], "model."))
        of = {
            name: {key.removeprefix(f"{name}."): value for key, value in weights.items() if key.startswith(f"{name}.")}
            for name in ("decoder", "text_proj")
        }
        values = _unet_told(of["decoder"], 64)
        width, dim = of["text_proj"]["encoder_hidden_states_proj.weight"].shape
        tokens = len(of["text_proj"]["clip_extra_context_tokens_proj.bias"]) // width
        values |= {"cross_attention_dim": width, "attention_head_dim": HEAD}
        attends = [f"down_blocks.{level}.attentions.0.to_q.weight" in of["decoder"] for level in range(LEVELS)]
        values["down_block_types"] = ["SimpleCrossAttnDownBlock2D" if each else "" for each in attends]
    file = files["decoder"]
    parts = {
        "decoder": _Part(values, of["decoder"], file, False),
        "text_proj": _Part(
            {"clip_embeddings_dim": dim, "clip_extra_context_tokens": tokens}, of["text_proj"], file, False
        ),
        "decoder_scheduler": _Part({**scheduler, "variance_type": "learned_range"}, {}, file),
        "super_res_scheduler": _Part(scheduler, {}, files["super_res"]),
    }
    for name, prefix in (("super_res_first", "model_first_steps."), ("super_res_last", "model_last_step.")):
        with _named(files["super_res"]):
            weights = unet_from_kakao(_state(files["super_res"], prefix))
            parts[name] = _Part(_unet_told(weights, 256) | small, weights, files["super_res"], False)
    if "prior" in files:
        with _named(files["prior"]):
            weights = prior_from_kakao(_state(files["prior"], "model."))
            statistics = load_tensors(folder / _KAKAO_STATS, classes=None)
            weights |= {"clip_mean": statistics["0"].float()[None], "clip_std": statistics["1"].float()[None]}
            _, length, width = weights["positional_embedding"].shape
            depth = len({name.split(".")[1] for name in weights if name.startswith("transformer_blocks.")})
            values = {
                "num_attention_heads": width // HEAD,
                "attention_head_dim": HEAD,
                "num_layers": depth,
                "dropout": 0.0,
            }
            values |= {"embedding_dim": weights["proj_in.weight"].shape[1], "num_embeddings": length - 4}
        parts["prior"] = _Part(values, weights, files["prior"], False)
        how = {"prediction_type": "sample", "clip_sample_range": 5.0}
        parts["prior_scheduler"] = _Part({**scheduler, **how}, {}, files["prior"])
    return parts


def _state(file: Path, prefix: str) -> dict[str, Tensor]:
    """The tensors of a checkpoint's state dict whose names begin so, without that, in fp32."""
    prefix = f"state_dict.{prefix}"
    tensors = load_tensors(file, classes=None).items()
    return {name[len(prefix) :]: value.float() for name, value in tensors if name.startswith(prefix)}


def _unet_told(weights: Mapping[str, Tensor], side: int) -> dict[str, Any]:
    levels = range(LEVELS)
    depth = len({name for name in weights if name.startswith("down_blocks.0.resnets.") and name.endswith("conv1.bias")})
    return {
        "sample_size": side,
        "block_out_channels": [len(weights[f"down_blocks.{level}.resnets.0.conv1.bias"]) for level in levels],
        "layers_per_block": depth,
        "out_channels": len(weights["conv_out.bias"]),
        "dropout": 0.0,
    }


def _kakao_clip(folder: Path, given: str | Path | None) -> Clip:
    if given is None:
        model = load_clip(folder / _KAKAO_CLIP, "openai", tokenizer=folder / _KAKAO_VOCABULARY)
    else:
        model = Clip.from_pretrained(given)
    model.config = replace(model.config, unit_length=False)
    return model


# --- ours to theirs


def export_karlo(unclip: Unclip, path: str | Path) -> None:
    """Write an unCLIP into the new folder `path`, whole or not at all, for `diffusers`.

    `UnCLIPPipeline.from_pretrained` reads it up to 0.37.1; later ones, which cannot, by `pipeline`. So does
    `UnCLIPImageVariationPipeline`, where CLIP has an image tower. `import_karlo` of it is the same model to the bit.

    Raises:
        ConfigError: `path` is there already, or the model has what `diffusers` cannot compute, named.
        CheckpointError: the folder cannot be written.
    """
    folder = Path(path)
    if folder.exists():
        raise ConfigError(f"--out {folder} is there already: name a new folder")
    for name, found, known in _limits(unclip):
        if found not in known:
            raise ConfigError(
                f"the {name} is {found}, where diffusers' unCLIP has only {' or '.join(map(str, known))}: export one that was "
                "trained so"
            )
    try:
        with built_beside(folder) as partial:
            _write(unclip, partial)
    except OSError as error:
        raise CheckpointError(f"could not write the model to {folder}: {error}; free some space") from error


def _limits(unclip: Unclip) -> Iterator[tuple[str, Any, tuple[Any, ...]]]:
    """What there is, and what of it the layout has a place for."""
    clip, prior, decoder = unclip.clip.config, unclip.prior, unclip.decoder
    if clip.vision_depth:
        check_format(clip, "hf")
    pieces = None if unclip.clip.tokenizer is None else unclip.clip.tokenizer.pieces
    yield "CLIP's model.unit_length", clip.unit_length, (False,)
    yield "CLIP's tokenizer", "byte pairs" if isinstance(pieces, BytePairs) else "of sentencepiece", ("byte pairs",)
    yield "CLIP's model.text_width", clip.text_width, (clip.embed_dim,)
    if prior is None:
        yield "number of CLIP's towers, without a prior,", 1 + bool(clip.vision_depth), (2,)
    else:
        yield "prior's kind", prior.kind, ("diffusion",)
        yield "prior's objective.schedule", prior.schedule_name, ("cosine",)  # type: ignore[attr-defined]
        yield "prior's model.text", prior.prior.config.text, ("karlo",)
        yield "prior's model.text_len", prior.prior.config.text_len, (clip.text_len,)
    yield "decoder's model.text", decoder.decoder.config.text, ("karlo",)
    yield "decoder's model.text_len", decoder.decoder.config.text_len, (clip.text_len,)
    yield "decoder's model.learned_variance", decoder.decoder.config.learned_variance, (True,)
    yield "number of upsamplers", len(unclip.upsamplers), (1,)
    (upsampler,) = unclip.upsamplers
    yield "upsampler's model.noise_augmentation", upsampler.upsampler.config.noise_augmentation, (False,)
    yield "upsampler's objective.residual", upsampler.facts.residual, (0,)
    for name, facts in (("decoder", decoder.facts), ("upsampler", upsampler.facts)):
        yield f"{name}'s objective.schedule", facts.schedule, ("cosine",)
        yield f"{name}'s objective.predicts", facts.predicts, tuple(_PREDICTS)


def _write(unclip: Unclip, folder: Path) -> None:
    clip, stage, upsampler = unclip.clip, unclip.decoder, unclip.upsamplers[0]
    own: dict[str, Tensor] = {"logit_scale": clip.logit_scale.detach().reshape(())}
    told: dict[str, Any] = {"decoder": to_dict(stage.facts.sampling), "upsampler": to_dict(upsampler.facts.sampling)}
    if isinstance(unclip.prior, DiffusionTextToEmbedding):
        prior, config = unclip.prior, unclip.prior.prior.config
        own["factor"] = prior.scaling.factor
        told["prior"] = {"sampling": to_dict(prior.sampling), "analytic": prior.analytic}
        weights = to_prior_transformer(prior.prior.state_dict(), config.depth)
        weights |= {"clip_mean": prior.scaling.shift[None], "clip_std": 1 / prior.scaling.factor[None]}
        _write_part(folder, "prior", _prior_values(config), weights)
        _write_part(
            folder, "prior_scheduler", _scheduler_values(len(prior.schedule), False, prior.sampling.bound, "x0")
        )
    model = stage.decoder
    weights = to_decoder(model.state_dict(), model.config.image_tokens)
    for name, values in (("decoder", _unet_values(model)), ("text_proj", _text_proj_values(model.config))):
        of_part = {key.removeprefix(f"{name}."): value for key, value in weights.items() if key.startswith(f"{name}.")}
        _write_part(folder, name, values, of_part)
    for name, network in (("super_res_first", upsampler.upsampler), ("super_res_last", upsampler.last)):
        network = network or upsampler.upsampler
        _write_part(folder, name, _unet_values(network), network.unet.state_dict())
    for name, facts, learned in (
        ("decoder_scheduler", stage.facts, True),
        ("super_res_scheduler", upsampler.facts, upsampler.upsampler.config.learned_variance),
    ):
        bound = None if facts.sampling.threshold == "none" else 1.0
        _write_part(folder, name, _scheduler_values(facts.timesteps, learned, bound, facts.predicts))
    _write_clip(clip, folder)
    names = [name for name in _CLASSES if (folder / name).is_dir()]
    index = {**_notes(PIPELINES["prior" not in names]), **{name: _CLASSES[name] for name in names}}
    write_json(folder / INDEX_NAME, index)
    save_file({key: value.contiguous() for key, value in own.items()}, folder / OWN_NAME, {"told": json.dumps(told)})


def _write_part(folder: Path, name: str, values: dict[str, Any], weights: Mapping[str, Tensor] | None = None) -> None:
    (folder / name).mkdir()
    file = folder / name / ("scheduler_config.json" if weights is None else "config.json")
    write_json(file, {**_notes(_CLASSES[name][1]), **values})
    if weights is not None:
        _save(weights, folder / name / _WEIGHTS)


def _notes(kind: str) -> dict[str, str]:
    return {"_class_name": kind, "_diffusers_version": sys.modules["diffusers"].__version__}


def _write_clip(clip: Clip, folder: Path) -> None:
    config, state = huggingface_config(clip.config), to_huggingface(clip.state_dict())
    towers = {"text_encoder": "text", **({"image_encoder": "vision"} if clip.config.vision_depth else {})}
    for name, tower in towers.items():
        (folder / name).mkdir()
        kind = {"architectures": [_CLASSES[name][1]], "model_type": f"clip_{tower}_model"}
        write_json(folder / name / "config.json", kind | config[f"{tower}_config"])
        begins = (f"{tower}_model.", "text_projection." if tower == "text" else "visual_projection.")
        _save({key: value for key, value in state.items() if key.startswith(begins)}, folder / name / _CLIP_WEIGHTS)
    if clip.config.vision_depth:
        (folder / "feature_extractor").mkdir()
        write_json(folder / "feature_extractor" / HF_PREPROCESSOR, preprocessor(clip.config))
    (folder / "tokenizer").mkdir()
    assert clip.tokenizer is not None
    clip.tokenizer.save(folder / "tokenizer")
    describe_tokenizer(clip.tokenizer, clip.config, folder / "tokenizer")


def _save(weights: Mapping[str, Tensor], file: Path) -> None:
    save_file({name: value.detach().cpu().contiguous() for name, value in weights.items()}, file, {"format": "pt"})


# --- theirs, run


def pipeline(path: str | Path, *, variation: bool = False) -> Any:
    """`diffusers`' own pipeline of a folder in its layout; from 0.38 on, `from_pretrained` alone finds no class "unclip".

    Args:
        variation: `UnCLIPImageVariationPipeline` in place of `UnCLIPPipeline`.
    """
    kind = _class(PIPELINES[variation])
    before = sys.modules.get("unclip")
    sys.modules["unclip"] = sys.modules[_class("UnCLIPTextProjModel").__module__]
    try:
        return kind.from_pretrained(path)
    finally:
        del sys.modules["unclip"]
        if before is not None:
            sys.modules["unclip"] = before


def _class(kind: str) -> Any:
    try:
        import diffusers
    except ImportError as error:
        raise ConfigError("Karlo's layout needs diffusers: pip install 'dalle_ds[unclip]'") from error
    if hasattr(diffusers, kind):
        return getattr(diffusers, kind)
    return getattr(sys.modules[diffusers.UnCLIPPipeline.__module__], kind)  # whose place is another in each version
