"""unCLIPs in `diffusers`' layout, in which Karlo is published, as ours; `karlo_export.py` writes ours as such.

Each network has a folder of its own. What is exported serves both pipelines: `UnCLIPPipeline`, from captions, and
`UnCLIPImageVariationPipeline`, from images. What the layout has no place for, such as how to sample, is in `OWN_NAME` beside.
"""

from __future__ import annotations

import math
import sys
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any, NamedTuple

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from dalle_ds.config import DecoderConfig, ImageSampling, PriorConfig, UpsamplerConfig, from_dict
from dalle_ds.errors import CheckpointError, ConfigError
from dalle_ds.interop.clip_import import HF_PREPROCESSOR, read_json, read_weights
from dalle_ds.interop.clip_layouts import (
    from_huggingface,
    from_huggingface_config,
    plain_huggingface,
    to_huggingface,
)
from dalle_ds.interop.kakao import kakao_clip, read_kakao
from dalle_ds.interop.karlo_layouts import (
    CLASSES,
    INDEX_NAME,
    OWN_NAME,
    PIPELINES,
    PREDICTS,
    WEIGHTS_NAME,
    Part,
    behind,
    defaults,
    diffusers_class,
    from_decoder,
    from_prior_transformer,
    named,
    plain,
    prior_values,
    scheduler_values,
    text_proj_values,
    to_decoder,
    to_prior_transformer,
    unet_values,
)
from dalle_ds.models.clip import LARGEST_SCALE, Clip
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
from dalle_ds.text.clip_tokenizer import ClipTokenizer

_NO_TOWER = {
    **dict.fromkeys(("hidden_size", "num_attention_heads", "image_size", "patch_size"), 1),
    "intermediate_size": 4,
    "num_hidden_layers": 0,
}
"""As a configuration of CLIP's image tower."""


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
    with named(folder):
        if (folder / INDEX_NAME).is_file():
            parts, own = _read_diffusers(folder), _read_own(folder)
            model = _read_clip(folder, own)
            model = model if clip is None else _same_clip(model, clip)
        else:
            parts, own = read_kakao(folder), _Own()
            model = kakao_clip(folder) if clip is None else Clip.from_pretrained(clip)
        model.config = replace(model.config, unit_length=False)
        decoder, upsampler = _decoder_of(parts, model, own), _upsampler_of(parts, own)
        prior = _prior_of(parts, model, own) if "prior" in parts else None
    unclip = Unclip(model, decoder, prior, [upsampler])
    if out is not None:
        unclip.save_pretrained(out)
    return unclip


class _Own(NamedTuple):
    """Content of `OWN_NAME`."""

    tensors: Mapping[str, Tensor] = {}
    told: Mapping[str, Any] = {}
    """How each stage samples, and the prior's analytic variances."""


def _prior_of(parts: Mapping[str, Part], clip: Clip, own: _Own) -> DiffusionTextToEmbedding:
    part, scheduler = parts["prior"], parts["prior_scheduler"]
    heads, depth, shape = part.values["num_attention_heads"], part.values["num_layers"], clip.config
    config = PriorConfig(
        width=heads * part.values["attention_head_dim"],
        depth=depth,
        heads=heads,
        text_len=shape.text_len,
        embed_dim=shape.embed_dim,
        text="karlo",
        text_width=shape.text_width,
        mask_padding=True,
        dropout=part.values["dropout"],
    )

    def layout(state: dict[str, Tensor]) -> dict[str, Tensor]:
        moments = {name: torch.empty(1, shape.embed_dim) for name in ("clip_mean", "clip_std")}
        return to_prior_transformer(state, depth) | moments

    check_shapes(lambda: DiffusionPrior(config), replace(config, text_vocab=1), part.weights, part.where, layout)
    part.check(prior_values(config))
    model = DiffusionPrior(config)
    load_weights(model, from_prior_transformer(part.weights, depth), part.where)
    mean, std = (part.weights[name][0] for name in ("clip_mean", "clip_std"))
    factor = own.tensors.get("factor")
    if factor is None or not torch.equal(1 / factor, std):  # else it is what the division had rounded
        factor = 1 / std
    with named(f"clip_mean or clip_std of {part.where}"):
        scaling = EmbeddingScaling(mean, factor)
    steps, bound = _steps_and_bound(scheduler)
    sampling = PriorSampling("ddpm", str(min(25, steps)), guidance=4.0, bound=bound, best_of=1)
    if "prior" in own.told:
        sampling = from_dict(PriorSampling, own.told["prior"], OWN_NAME)
    scheduler.check(scheduler_values(steps, "x0", sampling.bound))
    analytic = own.told.get("analytic")
    return DiffusionTextToEmbedding(model.eval(), clip, None, scaling, "cosine", steps, analytic, sampling)


def _decoder_of(parts: Mapping[str, Part], clip: Clip, own: _Own) -> EmbeddingToImage:
    part, of_text = parts["decoder"], parts["text_proj"]
    values, side, tokens = part.values, part.values["sample_size"], of_text.values["clip_extra_context_tokens"]
    kinds = enumerate(values["down_block_types"])
    config = DecoderConfig(
        **_unet_fields(values),
        attention=tuple(side >> level for level, kind in kinds if kind.startswith("SimpleCrossAttn")),
        head_channels=values["attention_head_dim"],
        embed_dim=clip.config.embed_dim,
        image_tokens=tokens,
        text="karlo",
        context_width=values["cross_attention_dim"],
        text_len=clip.config.text_len,
        text_width=clip.config.text_width,
        mask_padding=True,
    )
    sized = replace(config, text_vocab=1, text_depth=1, text_heads=1, text_len=1)
    weights = {f"decoder.{name}": value for name, value in part.weights.items()}
    weights |= {f"text_proj.{name}": value for name, value in of_text.weights.items()}
    where = part.where.parent.parent
    check_shapes(lambda: UnclipDecoder(config), sized, weights, where, lambda state: to_decoder(state, tokens))
    model = UnclipDecoder(config)
    part.check(unet_values(model))
    of_text.check(text_proj_values(config))
    load_weights(model, from_decoder(weights, tokens), where)
    facts = _facts(
        parts["decoder_scheduler"], config, ImageSampling("ddpm", "25", guidance=8.0), own.told.get("decoder")
    )
    return EmbeddingToImage(model.eval(), None, clip, clip.fingerprint, facts)


def _upsampler_of(parts: Mapping[str, Part], own: _Own) -> SuperResolution:
    first, last = parts["super_res_first"], parts["super_res_last"]
    config = UpsamplerConfig(
        **_unet_fields(first.values),
        low_size=parts["decoder"].values["sample_size"],
        scale_shift=first.values["resnet_time_scale_shift"] == "scale_shift",
    )
    found = []
    for part in (first, last):
        if part.values["sample_size"] is None:  # as of Karlo's last one
            part.values["sample_size"] = config.image_size
        check_shapes(lambda: Upsampler(config), config, part.weights, part.where, lambda state: behind(state, "unet."))
        model = Upsampler(config)
        part.check(unet_values(model))
        load_weights(model, {f"unet.{name}": value for name, value in part.weights.items()}, part.where)
        found.append(model.eval())
    facts = _facts(parts["super_res_scheduler"], config, ImageSampling("ddpm", "7"), own.told.get("upsampler"))
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


def _steps_and_bound(scheduler: Part) -> tuple[int, float | None]:
    values = scheduler.values
    return values["num_train_timesteps"], values["clip_sample_range"] if values["clip_sample"] else None


def _facts(
    scheduler: Part, config: DecoderConfig | UpsamplerConfig, usual: ImageSampling, told: dict[str, Any] | None
) -> DiffusionFacts:
    steps, bound = _steps_and_bound(scheduler)
    sampling = replace(usual, steps=str(min(int(usual.steps), steps)), threshold="none" if bound is None else "static")
    if told is not None:
        sampling = from_dict(ImageSampling, told, OWN_NAME)
    predicts = {theirs: ours for ours, theirs in PREDICTS.items()}[scheduler.values["prediction_type"]]
    bound = None if sampling.threshold == "none" else 1.0
    scheduler.check(scheduler_values(steps, predicts, bound, learned=config.learned_variance))
    return DiffusionFacts("cosine", steps, predicts, sampling)  # type: ignore[arg-type]


# --- files of diffusers


def _read_diffusers(folder: Path) -> dict[str, Part]:
    """Networks and schedulers, by name."""
    index = _json(folder / INDEX_NAME)
    pipeline_class, unknown = index.get("_class_name"), sorted(plain(index).keys() - CLASSES.keys())
    if pipeline_class not in PIPELINES or unknown:
        what = f"has {', '.join(unknown)}" if pipeline_class in PIPELINES else f"is of a {pipeline_class}"
        raise CheckpointError(f"{folder / INDEX_NAME} {what}: only {' and '.join(PIPELINES)} are read")
    parts = {}
    for name, (library, kind) in CLASSES.items():
        if library == "transformers" or (name.startswith("prior") and pipeline_class != PIPELINES[0]):
            continue
        is_scheduler = kind == "UnCLIPScheduler"
        file = folder / name / ("scheduler_config.json" if is_scheduler else "config.json")
        parts[name] = Part(defaults(kind) | plain(_json(file)), {} if is_scheduler else _weights(folder / name), file)
    return parts


def _read_own(folder: Path) -> _Own:
    file = folder / OWN_NAME
    if not file.is_file():
        return _Own()
    try:
        with safe_open(file, "pt") as opened:
            return _Own(read_safetensors(file), parse_json(opened.metadata()["told"]))
    except (OSError, SafetensorError, KeyError, TypeError, ValueError) as error:
        raise CheckpointError(f"{file} cannot be read: {error}; remove it, or export again") from error


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
        raise CheckpointError(f"{folder} has no file of weights, such as {WEIGHTS_NAME}, in the form of any version")
    return read_weights(file)


def _json(file: Path) -> dict[str, Any]:
    content = read_json(file)
    if not isinstance(content, dict):
        raise CheckpointError(f"{file} is no mapping of fields")
    return content


def _read_clip(folder: Path, own: _Own) -> Clip:
    """Of text_encoder and tokenizer, and of image_encoder and feature_extractor where there are any."""
    text, weights = _json(folder / "text_encoder" / "config.json"), _weights(folder / "text_encoder")
    vision: dict[str, Any] = {**_NO_TOWER, "hidden_act": text.get("hidden_act", "quick_gelu")}
    images = None
    if (folder / "image_encoder").is_dir():
        vision = _json(folder / "image_encoder" / "config.json")
        weights |= _weights(folder / "image_encoder")
        images = _json(folder / "feature_extractor" / HF_PREPROCESSOR)
    weights["logit_scale"] = own.tensors.get(
        "logit_scale", torch.tensor(math.log(LARGEST_SCALE))
    )  # as OpenAI's have it
    weights = plain_huggingface(weights)
    values = {"projection_dim": text.get("projection_dim", 512), "text_config": text, "vision_config": vision}
    config = from_huggingface_config(values, images, str(folder / "text_encoder"))
    check_shapes(lambda: Clip(config), config, weights, folder, to_huggingface)
    model = Clip(config, tokenizer=ClipTokenizer.load(folder / "tokenizer", start=config.start, end=config.end))
    load_weights(model, from_huggingface(weights), folder)
    return model.eval()


def _same_clip(found: Clip, path: str | Path) -> Clip:
    """The CLIP in `path`, whose towers must be those that were found, of which there may be one, and in 16 bits."""
    given = Clip.from_pretrained(path)
    weights = given.state_dict()
    for name, value in found.state_dict().items():
        other = weights.get(name, torch.empty(0))
        if name != "logit_scale" and (other.shape != value.shape or not torch.allclose(other, value, 1e-2, 1e-3)):
            raise CheckpointError(f"the CLIP in {path} is another one: its {name} is not that of the unCLIP")
    given.tokenizer = given.tokenizer or found.tokenizer
    return given


# --- theirs, run


def pipeline(path: str | Path, *, variation: bool = False) -> Any:
    """`diffusers`' own pipeline of a folder in its layout; from 0.38 on, `from_pretrained` alone finds no class "unclip".

    Args:
        variation: `UnCLIPImageVariationPipeline` in place of `UnCLIPPipeline`.
    """
    kind = diffusers_class(PIPELINES[variation])
    # What the folder calls "unclip" is imported as such, since it is no longer where pipelines are.
    sys.modules.setdefault("unclip", sys.modules[diffusers_class("UnCLIPTextProjModel").__module__])
    return kind.from_pretrained(path)
