"""Our unCLIP in `diffusers`' layout, in which Karlo is published; `karlo.py` reads it."""

from __future__ import annotations

import json
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from safetensors.torch import save_file
from torch import Tensor

from dalle_ds.config import to_dict
from dalle_ds.errors import CheckpointError, ConfigError
from dalle_ds.files import built_beside, write_json
from dalle_ds.interop.clip_export import check_format, describe_tokenizer, preprocessor
from dalle_ds.interop.clip_import import HF_PREPROCESSOR
from dalle_ds.interop.clip_layouts import to_huggingface
from dalle_ds.interop.karlo_layouts import (
    CLASSES,
    INDEX_NAME,
    OWN_NAME,
    PIPELINES,
    PREDICTS,
    WEIGHTS_NAME,
    Weights,
    behind,
    prior_values,
    scheduler_values,
    text_proj_values,
    to_decoder,
    to_prior_transformer,
    unet_values,
)
from dalle_ds.models.card import write_card
from dalle_ds.models.clip import Clip, huggingface_config
from dalle_ds.sampling.text_to_embedding import DiffusionTextToEmbedding
from dalle_ds.sampling.unclip import Unclip
from dalle_ds.text.clip_tokenizer import BytePairs

_LOAD = """from dalle_ds.interop.karlo import pipeline

model = pipeline(".")  # this folder; up to diffusers 0.37.1 also UnCLIPPipeline.from_pretrained(".")
images = model("a red circle").images"""
_LOAD_VARIATION = """from dalle_ds.interop.karlo import pipeline
from PIL import Image

model = pipeline(".", variation=True)  # up to diffusers 0.37.1 also UnCLIPImageVariationPipeline.from_pretrained(".")
images = model(Image.open("image.png")).images"""


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
        yield f"{name}'s objective.predicts", facts.predicts, tuple(PREDICTS)


def _write(unclip: Unclip, folder: Path) -> None:
    clip, decoder, upsampler = unclip.clip, unclip.decoder, unclip.upsamplers[0]
    model, first, last = decoder.decoder, upsampler.upsampler, upsampler.last or upsampler.upsampler
    tensors: dict[str, Tensor] = {"logit_scale": clip.logit_scale.detach().reshape(())}
    told: dict[str, Any] = {"decoder": to_dict(decoder.facts.sampling), "upsampler": to_dict(upsampler.facts.sampling)}
    if isinstance(unclip.prior, DiffusionTextToEmbedding):
        prior, config, scaling = unclip.prior, unclip.prior.prior.config, unclip.prior.scaling
        tensors["factor"] = scaling.factor
        told |= {"prior": to_dict(prior.sampling), "analytic": prior.analytic}
        weights = to_prior_transformer(prior.prior.state_dict(), config.depth)
        weights |= {"clip_mean": scaling.shift[None], "clip_std": 1 / scaling.factor[None]}
        _write_part(folder, "prior", prior_values(config), weights)
        _write_part(folder, "prior_scheduler", scheduler_values(len(prior.schedule), "x0", prior.sampling.bound))
    weights = to_decoder(model.state_dict(), model.config.image_tokens)
    _write_part(folder, "decoder", unet_values(model), behind(weights, "decoder."))
    _write_part(folder, "text_proj", text_proj_values(model.config), behind(weights, "text_proj."))
    _write_part(folder, "super_res_first", unet_values(first), first.unet.state_dict())
    _write_part(folder, "super_res_last", unet_values(last), last.unet.state_dict())
    for name, facts, network in (("decoder", decoder.facts, model), ("super_res", upsampler.facts, first)):
        bound, learned = None if facts.sampling.threshold == "none" else 1.0, network.config.learned_variance
        values = scheduler_values(facts.timesteps, facts.predicts, bound, learned=learned)
        _write_part(folder, f"{name}_scheduler", values)
    _write_clip(clip, folder)
    names = [name for name in CLASSES if (folder / name).is_dir()]
    index = {name: CLASSES[name] for name in names}
    write_json(folder / INDEX_NAME, {**_notes(PIPELINES["prior" not in names]), **index})
    _save(tensors, folder / OWN_NAME, told=json.dumps(told))
    load = _LOAD if "prior" in names else _LOAD_VARIATION
    write_card(folder, "unclip", library="diffusers", load=load)


def _write_part(folder: Path, name: str, values: dict[str, Any], weights: Weights | None = None) -> None:
    (folder / name).mkdir()
    file = folder / name / ("scheduler_config.json" if weights is None else "config.json")
    write_json(file, {**_notes(CLASSES[name][1]), **values})
    if weights is not None:
        _save(weights, folder / name / WEIGHTS_NAME)


def _notes(kind: str) -> dict[str, str]:
    return {"_class_name": kind, "_diffusers_version": sys.modules["diffusers"].__version__}


def _write_clip(clip: Clip, folder: Path) -> None:
    config, state, has_images = (
        huggingface_config(clip.config),
        to_huggingface(clip.state_dict()),
        clip.config.vision_depth,
    )
    towers = [("text_encoder", "text", "text"), *([("image_encoder", "vision", "visual")] if has_images else [])]
    for name, tower, projection in towers:
        (folder / name).mkdir()
        kind = {"architectures": [CLASSES[name][1]], "model_type": f"clip_{tower}_model"}
        write_json(folder / name / "config.json", {**kind, **config[f"{tower}_config"]})
        begins = (f"{tower}_model.", f"{projection}_projection.")
        _save(
            {key: value for key, value in state.items() if key.startswith(begins)}, folder / name / "model.safetensors"
        )
    if has_images:
        (folder / "feature_extractor").mkdir()
        write_json(folder / "feature_extractor" / HF_PREPROCESSOR, preprocessor(clip.config))
    (folder / "tokenizer").mkdir()
    assert clip.tokenizer is not None
    clip.tokenizer.save(folder / "tokenizer")
    describe_tokenizer(clip.tokenizer, clip.config, folder / "tokenizer")


def _save(weights: Weights, file: Path, **metadata: str) -> None:
    tensors = {name: value.detach().cpu().contiguous() for name, value in weights.items()}
    save_file(tensors, file, {"format": "pt", **metadata})
