"""Our CLIPs in the layouts of OpenAI's code, Hugging Face's `transformers` and open_clip."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from torch import Tensor

from dalle_ds.config import ClipConfig
from dalle_ds.errors import CheckpointError, ConfigError
from dalle_ds.files import built_beside, write_json
from dalle_ds.interop.clip_import import (
    HF_CONFIG,
    HF_PREPROCESSOR,
    HF_WEIGHTS,
    OPEN_CLIP_CONFIG,
    OPEN_CLIP_WEIGHTS,
    ClipFormat,
)
from dalle_ds.interop.clip_layouts import BICUBIC, open_clip_config, to_huggingface, to_openai
from dalle_ds.models.clip import Clip, huggingface_config
from dalle_ds.text.clip_tokenizer import VOCABULARY_NAME, BytePairs, ClipTokenizer


def export_clip(model: Clip, out: str | Path, format: ClipFormat) -> None:
    """Write a CLIP into the new folder `out`, whole or not at all.

    Args:
        format: "openai" is a state dict in `model.pt`, for `clip/model.py`; "hf" what `CLIPModel.from_pretrained` and
            `CLIPProcessor.from_pretrained` read; "open_clip" what `open_clip.create_model("local-dir:…")` reads. The
            tokenizer's file goes with it. These programs know CLIP's own vocabulary, not ours of sentencepiece.

    Raises:
        ConfigError: `out` is there already, or the model has what the layout cannot say, named.
        CheckpointError: the folder cannot be written.
    """
    folder = Path(out)
    if folder.exists():
        raise ConfigError(f"--out {folder} is there already: name a new folder")
    check_format(model.config, format)
    weights = {name: value.detach().cpu() for name, value in model.state_dict().items()}
    try:
        with built_beside(folder) as partial:
            _write(model.config, weights, format, partial)
            if model.tokenizer is not None:
                model.tokenizer.save(partial)
                if format == "hf":
                    describe_tokenizer(model.tokenizer, model.config, partial)
    except OSError as error:
        raise CheckpointError(f"could not write the model to {folder}: {error}; free some space") from error


def check_format(config: ClipConfig, format: ClipFormat) -> None:
    """Refuse what the program that reads the layout would take for something else, without a word."""
    usual = ClipConfig()
    if not config.vision_depth:
        raise ConfigError("the model has no image tower (model.vision_depth=0), which the layouts of CLIP have")
    wanted: dict[str, tuple[Any, Any]] = {}
    if format == "openai":
        wanted = {
            "activation": (config.activation, "quick_gelu"),
            "vision_heads": (config.vision_heads, config.vision_width / 64),
            "text_heads": (config.text_heads, config.text_width / 64),
            "image_mean": (config.image_mean, usual.image_mean),
            "image_std": (config.image_std, usual.image_std),
            "end_token": (config.end, config.text_vocab - 1),
        }
    elif format == "hf" and config.end == 2:
        wanted = {"end_token": (2, "another number, since transformers takes 2 for the greatest token")}
    for name, (found, needed) in wanted.items():
        if found != needed:
            raise ConfigError(
                f"the model's {name} is {found}, where the format {format} knows only {needed}: choose another"
            )


def _write(config: ClipConfig, weights: dict[str, Tensor], format: ClipFormat, folder: Path) -> None:
    theirs = to_huggingface(weights) if format == "hf" else to_openai(weights, config)
    theirs = {name: value.contiguous() for name, value in theirs.items()}
    if format == "openai":
        torch.save(theirs, folder / "model.pt")
        return
    file = HF_WEIGHTS[0] if format == "hf" else OPEN_CLIP_WEIGHTS[0]
    save_file(theirs, folder / file, metadata={"format": "pt"})
    if format == "open_clip":
        write_json(folder / OPEN_CLIP_CONFIG, open_clip_config(config))
        return
    write_json(folder / HF_CONFIG, {"architectures": ["CLIPModel"], "model_type": "clip", **huggingface_config(config)})
    write_json(folder / HF_PREPROCESSOR, preprocessor(config))


def preprocessor(config: ClipConfig) -> dict[str, Any]:
    """What `transformers` is to do with images."""
    size = config.image_size
    return {
        "image_processor_type": "CLIPImageProcessor",
        "do_resize": True,
        "size": {"shortest_edge": size},
        "resample": BICUBIC,
        "do_center_crop": True,
        "crop_size": {"height": size, "width": size},
        "do_rescale": True,
        "rescale_factor": 1 / 255,
        "do_normalize": True,
        "image_mean": list(config.image_mean),
        "image_std": list(config.image_std),
        "do_convert_rgb": True,
    }


def describe_tokenizer(tokenizer: ClipTokenizer, config: ClipConfig, folder: Path) -> None:
    """What `transformers` needs besides the merges."""
    if not isinstance(tokenizer.pieces, BytePairs):
        return
    start, end = "<|startoftext|>", "<|endoftext|>"
    write_json(folder / VOCABULARY_NAME, {**tokenizer.pieces.vocabulary, start: tokenizer.start, end: tokenizer.end})
    description = {
        "tokenizer_class": "CLIPTokenizer",
        "bos_token": start,
        "eos_token": end,
        "unk_token": end,
        "pad_token": end,
        "model_max_length": config.text_len,
    }
    write_json(folder / "tokenizer_config.json", description)
