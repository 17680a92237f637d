"""unCLIP's decoder: from an image embedding and a caption to an image, by diffusion (unCLIP §2.1, App. C; GLIDE §2.3).

The image embedding z_i reaches the U-Net in two ways: added to the embedding of the timestep, and as context tokens before
those of the caption. The caption's states are context, and their last one is added to the timestep's embedding as well. The
context does not depend on x_t: in sampling, it is computed once for an image (`condition`).
"""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from dalle_ds.config import Checkpointing, DecoderConfig
from dalle_ds.errors import DataError
from dalle_ds.models.pretrained import load_model, loaded, save_model
from dalle_ds.models.prior import Caption
from dalle_ds.models.text_encoder import TextEncoder
from dalle_ds.models.unet import decoder_unet, use_keyed_dropout
from dalle_ds.nn.layers import Embedding, LayerNorm, Linear


class Condition(NamedTuple):
    """What the U-Net is told besides x_t and the timestep."""

    context: Tensor
    """(B, image_tokens + T, context_width)."""
    added: Tensor
    """(B, 4 · channels · multiples[0]), to the embedding of the timestep."""
    keep: Tensor | None
    """(B, image_tokens + T) bool, which context is attended to; None: all."""


class UnclipDecoder(nn.Module):
    """Predicts noise, clean image or v, as it was trained to, from a noised image; with `learned_variance`, behind them what
    `diffusion.steps.learned_log_variance` takes.

    Embedding and caption are dropped independently, and learned nulls (or `Caption.empty`) stand in for them: 10 % and 50 % in
    training (unCLIP §2.1), both for classifier-free guidance.

    Args:
        config: shape of the model.
        checkpointing: "none" or "full".
    """

    def __init__(self, config: DecoderConfig, *, checkpointing: Checkpointing = "none") -> None:
        super().__init__()
        self.config = config
        width, added = config.context_width, 4 * config.channels * config.multiples[0]
        self.unet = decoder_unet(config, checkpointing)
        self._give_seeds = use_keyed_dropout(self.unet, config.dropout)
        self.embedding_time = Linear(config.embed_dim, added)
        self.embedding_tokens = Linear(config.embed_dim, config.image_tokens * width)
        self.null_embedding = Embedding(1, config.embed_dim)
        # Elements of about 1, for which weights are drawn; Karlo's embeddings are not of length 1.
        self.embedding_scale = 1.0 if config.text == "karlo" else config.embed_dim**0.5
        if config.text == "tokens":
            self.text_encoder = TextEncoder(
                config.text_vocab,
                config.text_len,
                width,
                config.text_depth,
                config.text_heads,
                mask_padding=config.mask_padding,
                checkpointing=checkpointing,
            )
            self.text_time = Linear(width, added)
        else:
            self.text_input = Linear(config.text_width, width)
            self.text_norm = LayerNorm(width)
            self.text_time = Linear(config.embed_dim, added)
            if config.text != "karlo":
                self.padding = Embedding(config.text_len, width)
                self.null_text = Embedding(1, width)
                self.null_text_embedding = Embedding(1, config.embed_dim)

    def forward(
        self,
        x: Tensor,
        timesteps: Tensor,
        embedding: Tensor,
        caption: Caption,
        *,
        embedding_dropped: Tensor | None = None,
        text_dropped: Tensor | None = None,
        dropout_seeds: Tensor | None = None,
    ) -> Tensor:
        """Predict.

        Args:
            x: (B, 3, image_size, image_size), noised images whose clean pixels are in [−1, 1].
            timesteps: (B,) int64 training timesteps.
            embedding: (B, embed_dim) CLIP's image embeddings, of length 1; of `text="karlo"` as CLIP gives them.
            caption: of B captions, its text embeddings likewise, which are not read with `tokens`.
            embedding_dropped, text_dropped: (B,) bool, what nulls stand in for; None: none.
            dropout_seeds: (B,) int64, what `dropout` drops of each image in training; None drops nothing.

        Returns:
            (B, 3 or 6, image_size, image_size) fp32.

        Raises:
            DataError: a wrong shape.
        """
        return self.denoise(
            x, timesteps, self.condition(embedding, caption, embedding_dropped, text_dropped), dropout_seeds
        )

    def condition(
        self,
        embedding: Tensor,
        caption: Caption,
        embedding_dropped: Tensor | None = None,
        text_dropped: Tensor | None = None,
    ) -> Condition:
        """All that does not depend on x_t and the timestep; arguments as `forward`."""
        if embedding.dim() != 2 or embedding.shape[1] != self.config.embed_dim or len(embedding) != len(caption.text):
            raise DataError(
                f"image embeddings must have shape ({len(caption.text)}, {self.config.embed_dim}), a row for each caption, "
                f"found {tuple(embedding.shape)}"
            )
        dtype, zero = self.embedding_time.weight.dtype, torch.zeros((), dtype=torch.int64, device=embedding.device)
        caption, text_dropped = caption.drop(text_dropped)
        given = embedding.float()
        if embedding_dropped is not None:
            given = torch.where(embedding_dropped[:, None], self.null_embedding(zero).float(), given)
        given = (given * self.embedding_scale).to(dtype)
        tokens = self.embedding_tokens(given).view(len(given), self.config.image_tokens, -1)
        states, of_time, keep = self._text(caption, text_dropped)
        if keep is not None:
            keep = F.pad(keep, (self.config.image_tokens, 0), value=True)
        context = torch.cat([tokens, states.to(dtype)], dim=1)
        return Condition(context, self.embedding_time(given) + self.text_time(of_time.to(dtype)), keep)

    def denoise(
        self, x: Tensor, timesteps: Tensor, condition: Condition, dropout_seeds: Tensor | None = None
    ) -> Tensor:
        """As `forward`, under what `condition` returned."""
        size = self.config.image_size
        if x.shape[1:] != (3, size, size) or not len(x) == len(timesteps) == len(condition.added):
            raise DataError(
                f"noised images must have shape ({len(condition.added)}, 3, {size}, {size}) and as many timesteps, found "
                f"{tuple(x.shape)} and {tuple(timesteps.shape)}"
            )
        self._give_seeds(dropout_seeds)
        output = self.unet(
            x.to(condition.added.dtype),
            timesteps,
            condition.context,
            class_labels=condition.added,
            encoder_attention_mask=None,
            attention_mask=condition.keep,
        )
        predicted: Tensor = output.sample
        return predicted.float()

    def _text(self, caption: Caption, dropped: Tensor | None) -> tuple[Tensor, Tensor, Tensor | None]:
        """States, what of the caption is added to the timestep, and which states are attended to."""
        text, padded, config = caption.text, caption.padded, self.config
        if config.text == "tokens":
            states, keep = self.text_encoder(text, dropped)
            last = torch.full_like(text[:, 0], text.shape[1] - 1)  # GLIDE's, be it padding
            if keep is not None:
                last = keep.sum(dim=1) - 1
            return states, states[torch.arange(len(states), device=states.device), last], keep
        zero = torch.zeros((), dtype=torch.int64, device=text.device)
        dtype = self.text_input.weight.dtype
        states, of_time = self.text_norm(self.text_input(text.to(dtype)).float()), caption.embedding.float()
        keep = None
        if padded is not None and not config.mask_padding:
            own = self.padding(torch.arange(text.shape[1], device=text.device)).float()
            states = torch.where(padded[..., None], own, states)
        elif padded is not None:
            keep = ~padded
        if dropped is not None:
            states = torch.where(dropped[:, None, None], self.null_text(zero).float(), states)
            of_time = torch.where(dropped[:, None], self.null_text_embedding(zero).float(), of_time)
            if keep is not None:  # one null long: how far others reach must not matter
                keep = torch.where(dropped[:, None], torch.arange(keep.shape[1], device=keep.device) == 0, keep)
        return states, of_time * self.embedding_scale, keep

    @classmethod
    def from_pretrained(cls, path: str | Path) -> UnclipDecoder:
        """The decoder exported in `path`, or in `path`/export where that is a run directory, in eval mode on the CPU.

        Raises:
            CheckpointError: nothing there, another kind of model, or weights that do not fit.
        """
        config, weights = load_model(path, "decoder", DecoderConfig)
        # What the weights are measured by is what they have; the other kind of text is not among them.
        if config.text == "tokens":
            sized = replace(config, text_width=1)
        else:
            sized = replace(config, text_vocab=1, text_depth=1, text_heads=1)
        return loaded(lambda: cls(config), sized, weights, path)

    def save_pretrained(self, path: str | Path) -> None:
        """Export to folder `path`: `config.json` and `model.safetensors`; CheckpointError where it cannot be written."""
        save_model(path, "decoder", self.config, self.state_dict())
