"""CLIP (Radford et al. 2021): images and captions in one space, where those that belong together lie close.

The towers are those of `transformers`, and the state-dict keys those of its `CLIPModel`; `dalle_ds.interop` reads and
writes others' layouts.
"""

from __future__ import annotations

import hashlib
import json
import math
from collections.abc import Sequence
from functools import cached_property
from pathlib import Path
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from PIL import Image
from torch import Tensor, nn

from dalle_ds.config import PADDING, Checkpointing, ClipConfig, to_dict
from dalle_ds.errors import CheckpointError, ConfigError, DataError
from dalle_ds.files import built_beside
from dalle_ds.models.clip_images import check_images, square_pixels
from dalle_ds.models.clip_init import initialize
from dalle_ds.models.pretrained import export_folder, fingerprint, load_model, loaded, save_model
from dalle_ds.text.clip_tokenizer import ClipTokenizer

INITIAL_SCALE = 1 / 0.07
"""What cosines are multiplied by before training (CLIP §2.5)."""
LARGEST_SCALE = 100.0
"""What they are multiplied by at most, whatever has been learned (CLIP §2.5)."""


class ClipOutput(NamedTuple):
    """What a forward pass of CLIP gives; a tuple, so that DeepSpeed's hooks find its tensors."""

    image_embeddings: Tensor
    """(B, embed_dim) fp32, of length 1."""
    text_embeddings: Tensor
    """(B, embed_dim) fp32, of length 1."""
    scale: Tensor
    """() fp32, what their cosines are to be multiplied by."""


class Clip(nn.Module):
    """CLIP: `embed_images` and `embed_texts` for use, `forward` for training.

    Args:
        config: its shape.
        tokenizer: makes tokens of captions; without one, only tokens can be embedded.
        checkpointing: `full` computes each block again in the backward pass instead of keeping it.

    Raises:
        ConfigError: `transformers` is not installed, the tokenizer's tokens are not the configuration's, or `checkpointing` is
            "selective", which these towers do not have.

    Example:
        >>> clip = Clip.from_pretrained("runs/clip")
        >>> cosines = clip.embed_texts(["a red circle"]) @ clip.embed_images(images).T
    """

    def __init__(
        self, config: ClipConfig, *, tokenizer: ClipTokenizer | None = None, checkpointing: Checkpointing = "none"
    ) -> None:
        super().__init__()
        if checkpointing == "selective":
            raise ConfigError(
                "CLIP has no selective activation checkpointing: set train.activation_checkpointing to none or full"
            )
        if tokenizer is not None:
            tokenizer.check(config)
        self.config = config
        self.tokenizer = tokenizer
        # The towers draw weights too, how many depends on whether ZeRO-3 divides them meanwhile.
        random = torch.get_rng_state()
        vision, text = _towers(config)
        torch.set_rng_state(random)
        if config.vision_depth:
            self.vision_model, self.visual_projection = vision.vision_model, vision.visual_projection
        self.text_model, self.text_projection = text.text_model, text.text_projection
        # Not (), as in other programs' files: DeepSpeed's engine cannot broadcast parameters without dimensions.
        self.logit_scale = nn.Parameter(torch.full((1,), math.log(INITIAL_SCALE)))
        initialize(self, config)
        if checkpointing == "full":
            for tower in (vision.vision_model, text.text_model):
                # The older name is that of transformers 4.
                enable = getattr(tower, "activation_checkpointing_enable", None) or tower.gradient_checkpointing_enable
                enable({"use_reentrant": False})

    def forward(self, images: Tensor, text: Tensor) -> ClipOutput:
        """Embeddings of images and captions, with gradients.

        Args:
            images: (B, 3, image_size, image_size) floats in [0, 1].
            text: (B, T) int64 with T ≤ text_len: start token, pieces, end token; what follows is not looked at.

        Raises:
            DataError: another shape or type; on the CPU also a token outside the vocabulary, or a row without an end token.
        """
        check_images(images, self.config.image_size)
        check_text(self.config, text, values=text.device.type == "cpu")
        image, caption = self._project_images(images), self._project_text(text)
        scale = _LimitedExp.apply(self.logit_scale.float()).squeeze()
        return ClipOutput(F.normalize(image, dim=-1), F.normalize(caption, dim=-1), scale)

    @torch.no_grad()
    def embed_images(self, images: Tensor | Sequence[Image.Image], *, normalize: bool | None = None) -> Tensor:
        """Embeddings of images of any size: their central squares, resized to image_size.

        Args:
            images: (B, 3, H, W) floats in [0, 1], or a list of PIL images.
            normalize: to length 1; None: as `config.unit_length` says.

        Returns:
            (B, embed_dim) fp32, on the model's device.

        Raises:
            ConfigError: the model has no image tower.
            DataError: a tensor of another shape or type, or no list of images.
        """
        pixels = square_pixels(images, self.config.image_size).to(self.logit_scale.device)
        return self.scaled(self._project_images(pixels), normalize)

    @torch.no_grad()
    def embed_texts(self, texts: Sequence[str] | Tensor, *, normalize: bool | None = None) -> Tensor:
        """Embeddings of captions.

        Args:
            texts: captions, or (B, T) int64 tokens as `forward` takes them.
            normalize: as `embed_images`.

        Returns:
            (B, embed_dim) fp32, on the model's device.

        Raises:
            ConfigError: captions, and the model has no tokenizer.
            DataError: one text in place of a list; tokens of another shape or type, outside the vocabulary, or without an end
                token.
        """
        return self.scaled(self.project_states(*self.text_states(texts)), normalize)

    def scaled(self, embeddings: Tensor, normalize: bool | None = None) -> Tensor:
        """(…, embed_dim) at length 1, or as they are: `normalize` as `embed_images` takes it."""
        unit = self.config.unit_length if normalize is None else normalize
        return F.normalize(embeddings, dim=-1) if unit else embeddings

    @torch.no_grad()
    def text_states(self, texts: Sequence[str] | Tensor) -> tuple[Tensor, Tensor]:
        """What the text tower makes of each position, of which `embed_texts` projects the end token's.

        Args:
            texts: as `embed_texts` takes them.

        Returns:
            (B, T, text_width) fp32 states after the tower's last normalization, and (B, T) bool, which of them lie behind
            the end token and say nothing.

        Raises:
            ConfigError, DataError: as `embed_texts`.
        """
        text = self.tokens(texts)
        ends = (text == self.config.end).int().argmax(dim=1, keepdim=True)
        return self._text_hidden(text).float(), torch.arange(text.shape[1], device=text.device) > ends

    @torch.no_grad()
    def project_states(self, states: Tensor, padded: Tensor) -> Tensor:
        """(B, embed_dim) fp32 embeddings, of any length, of captions with these states (`text_states`)."""
        # Not the tower's own pooling, which takes the greatest token where the end token is 2.
        ends = states[torch.arange(len(states), device=states.device), (~padded).sum(dim=1) - 1]
        return self.text_projection(ends.to(self.text_projection.weight.dtype)).float()

    def tokens(self, texts: Sequence[str] | Tensor) -> Tensor:
        """(B, T) int64 on the model's device: of captions, or tokens that are looked at; errors as `embed_texts`."""
        if not isinstance(texts, Tensor):
            if self.tokenizer is None:
                raise ConfigError("this CLIP has no tokenizer: give it tokens, or make it again with a tokenizer")
            texts = self.tokenizer.encode(texts, self.config.text_len)
        check_text(self.config, texts, values=True)
        return texts.to(self.logit_scale.device)

    def _project_images(self, images: Tensor) -> Tensor:
        """(B, 3, S, S) in [0, 1] → (B, embed_dim) fp32, of any length."""
        if not self.config.vision_depth:
            raise ConfigError("this CLIP has no image tower (model.vision_depth=0): name one that has")
        # With plain numbers: tensors would be copied to a GPU in every call, which has to be waited for, and as buffers would
        # not stay fp32 in a model of 16 bits.
        standards = zip(images.float().unbind(dim=1), self.config.image_mean, self.config.image_std, strict=True)
        pixels = torch.stack([(channel - mean) / std for channel, mean, std in standards], dim=1)
        pooled = self.vision_model(pixel_values=pixels.to(self.visual_projection.weight.dtype)).pooler_output
        return self.visual_projection(pooled).float()

    def _project_text(self, text: Tensor) -> Tensor:
        """(B, T) tokens → (B, embed_dim) fp32, of any length."""
        is_end = text == self.config.end
        # Not the tower's own pooling, which takes the greatest token where the end token is 2.
        pooled = self._text_hidden(text)[torch.arange(len(text), device=text.device), is_end.int().argmax(dim=1)]
        return self.text_projection(pooled).float()

    def _text_hidden(self, text: Tensor) -> Tensor:
        """(B, T) tokens → (B, T, text_width)."""
        # The tower is causal: what stands behind the end token, padding of any kind, does not change what is read there.
        hidden: Tensor = self.text_model(input_ids=text.masked_fill(text == PADDING, self.config.end)).last_hidden_state
        return hidden

    @cached_property
    def fingerprint(self) -> str:
        """SHA-256 of weights, configuration and tokenizer as they are at the first call: names its embeddings."""
        tokenizer = None if self.tokenizer is None else self.tokenizer.fingerprint
        config = to_dict(self.config)
        if self.config.unit_length:
            del config["unit_length"]  # which those of before did not have
        parts = [fingerprint(self.state_dict()), config, tokenizer]
        return hashlib.sha256(json.dumps(parts, sort_keys=True).encode()).hexdigest()

    @classmethod
    def from_pretrained(
        cls, path: str | Path, device: str | torch.device = "cpu", dtype: torch.dtype = torch.float32
    ) -> Clip:
        """The CLIP exported in `path`, or in `path`/export where that is a run directory, in eval mode.

        Raises:
            CheckpointError: nothing there, another kind of model, or weights or a tokenizer that do not fit.
        """
        config, weights = load_model(path, "clip", ClipConfig)
        folder = export_folder(path)
        try:
            tokenizer = ClipTokenizer.find(folder, start=config.start, end=config.end)
        except ConfigError as error:
            raise CheckpointError(f"the tokenizer in {folder} does not fit the model: {error}") from error
        return loaded(lambda: cls(config, tokenizer=tokenizer), config, weights, path).to(device, dtype)

    def save_pretrained(self, path: str | Path) -> None:
        """Export to folder `path`: `config.json`, `model.safetensors` and the tokenizer's file, if it has one.

        Raises:
            CheckpointError: the folder cannot be written.
        """
        try:
            with built_beside(Path(path)) as partial:
                save_model(partial, "clip", self.config, self.state_dict())
                if self.tokenizer is not None:
                    self.tokenizer.save(partial)
        except (OSError, DataError) as error:
            raise CheckpointError(f"could not write the model to {path}: {error}; free some space") from error


def check_text(config: ClipConfig, text: Tensor, *, values: bool) -> None:
    """Raise a `DataError` where tokens are not what `Clip.forward` takes.

    Args:
        values: look at the tokens too, which a GPU has to be waited for.
    """
    if text.dim() != 2 or not 0 < text.shape[1] <= config.text_len or len(text) == 0:
        raise DataError(
            f"text must have shape (B, T) with B of at least 1 and T of at most {config.text_len}, found {tuple(text.shape)}"
        )
    if text.dtype != torch.int64:
        raise DataError(f"text must be int64, found {text.dtype}")
    if values:
        smallest, largest = (int(bound) for bound in text.aminmax())
        if smallest < PADDING or largest >= config.text_vocab:
            raise DataError(
                f"text must lie in [{PADDING}, {config.text_vocab - 1}], found values from {smallest} to {largest}"
            )
        endless = (text != config.end).all(dim=1)
        if bool(endless.any()):
            raise DataError(
                f"row {int(endless.int().argmax())} of text has no end token ({config.end}), where its embedding is read: "
                "make tokens with ClipTokenizer.encode"
            )


def _towers(config: ClipConfig) -> tuple[Any, Any]:
    """The two parts of `transformers`' CLIPModel of this shape: all of it but the logit scale."""
    try:
        from transformers import (
            CLIPTextConfig,
            CLIPTextModelWithProjection,
            CLIPVisionConfig,
            CLIPVisionModelWithProjection,
        )
    except ImportError as error:
        raise ConfigError("CLIP needs transformers: pip install 'dalle-ds[clip]'") from error
    fields = huggingface_config(config)
    vision, text = CLIPVisionConfig(**fields["vision_config"]), CLIPTextConfig(**fields["text_config"])
    return CLIPVisionModelWithProjection(vision), CLIPTextModelWithProjection(text)


HUGGINGFACE_FIELDS = {
    "vision": {
        "hidden_size": "vision_width",
        "num_hidden_layers": "vision_depth",
        "num_attention_heads": "vision_heads",
        "image_size": "image_size",
        "patch_size": "patch_size",
    },
    "text": {
        "hidden_size": "text_width",
        "num_hidden_layers": "text_depth",
        "num_attention_heads": "text_heads",
        "max_position_embeddings": "text_len",
        "vocab_size": "text_vocab",
    },
}
"""Of either tower, the names that `transformers` has for fields of `ClipConfig`."""


def huggingface_config(config: ClipConfig) -> dict[str, Any]:
    """The configuration of `transformers`' CLIPModel of this shape."""
    towers = {
        tower: {theirs: getattr(config, ours) for theirs, ours in fields.items()}
        for tower, fields in HUGGINGFACE_FIELDS.items()
    }
    for part in towers.values():
        part["intermediate_size"] = 4 * part["hidden_size"]
        part |= {"hidden_act": config.activation, "projection_dim": config.embed_dim}
    tokens = {"bos_token_id": config.start, "eos_token_id": config.end, "pad_token_id": config.end}
    return {
        "projection_dim": config.embed_dim,
        "logit_scale_init_value": math.log(INITIAL_SCALE),
        "vision_config": towers["vision"],
        "text_config": {**towers["text"], **tokens},
    }


class _LimitedExp(torch.autograd.Function):
    """exp, at most `LARGEST_SCALE`; from there on, a gradient passes only if following it would lower the exponent."""

    @staticmethod
    def forward(ctx: Any, exponent: Tensor) -> Tensor:
        value = exponent.exp().clamp(max=LARGEST_SCALE)
        ctx.save_for_backward(value)
        return value

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> Tensor:
        (value,) = ctx.saved_tensors
        (gradient,) = gradients
        raises = (value >= LARGEST_SCALE) & (gradient < 0)
        return torch.where(raises, 0.0, gradient * value)
