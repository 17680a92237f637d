"""The diffusion prior: from a caption and its CLIP text embedding z_t to the image embedding z_i (unCLIP §2.2, App. C).

A decoder-only transformer with a causal mask over

    text (T)    z_t    timestep    noised z_i    query

whose output at the last position is projected to the clean z_i. Only the last three change from one denoising step to the
next. What comes before them is a prefix: in training K noised embeddings share one, under a mask that hides them from each
other; in sampling its keys and values are computed once for a caption (`models/prior_sampling.py`).
"""

from __future__ import annotations

import math
from dataclasses import replace
from pathlib import Path
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from dalle_ds.config import PADDING, Checkpointing, PriorConfig
from dalle_ds.errors import DataError
from dalle_ds.models.dalle import AttentionBlock, MlpBlock, ResidualBlock, run_block
from dalle_ds.models.pretrained import load_model, loaded, save_model
from dalle_ds.nn.attention.pattern import dense_attention
from dalle_ds.nn.layers import Embedding, LayerNorm, Linear, Unembedding, VocabParallelEmbedding, seeds_on_host
from dalle_ds.parallel import WHOLE, TensorGroup

TAIL = 3
"""Positions of one denoising: timestep, noised embedding, query."""


class Caption(NamedTuple):
    """What the prior knows of each caption."""

    text: Tensor
    """(B, T') tokens, int64, −1 where padded; or CLIP's states, (B, T', text_width) floats. T' is at most
    `text_len`: columns that are padding in every row may be left out where padding is masked."""
    embedding: Tensor
    """(B, embed_dim), CLIP's text embedding z_t, scaled as the image embeddings are, of `text="karlo"` as CLIP gives it."""
    padded: Tensor | None = None
    """(B, T') bool, which states are padding. Tokens say so themselves."""
    empty: tuple[Tensor, Tensor] | None = None
    """Of the caption "", which stands in for dropped ones with `text="karlo"`: (n, text_width) states with n ≤ T', and
    (embed_dim,) embedding."""

    def drop(self, dropped: Tensor | None) -> tuple[Caption, Tensor | None]:
        """With `empty` in place of those that are (B,) bool `dropped`, and what is then left for learned nulls to replace."""
        if self.empty is None or self.padded is None or dropped is None:
            return self, dropped
        states, embedding = self.empty
        count, length = len(states), self.text.shape[1]
        states = F.pad(states.to(self.text), (0, 0, 0, length - count))
        text = torch.where(dropped[:, None, None], states, self.text)
        padded = torch.where(dropped[:, None], torch.arange(length, device=text.device) >= count, self.padded)
        return Caption(text, torch.where(dropped[:, None], embedding.to(self.embedding), self.embedding), padded), None


class DiffusionPrior(nn.Module):
    """Predicts the clean image embedding from a noised one (unCLIP §2.2: x₀, not ε).

    Padding positions have learned embeddings of their own, as in the DALL·E transformer, and are attended to unless
    `mask_padding`. Dropping a caption (classifier-free guidance) puts learned nulls, or `Caption.empty`, in place of all text
    positions and of z_t; timestep and noised embedding stay.

    Args:
        config: shape of the model.
        checkpointing, tensor: as `Dalle` takes them; the group must not divide positions.
    """

    def __init__(
        self, config: PriorConfig, *, checkpointing: Checkpointing = "none", tensor: TensorGroup = WHOLE
    ) -> None:
        super().__init__()
        tensor.check(config)
        self.config = config
        self.checkpointing: Checkpointing = checkpointing
        self.tensor = tensor
        width = config.width
        self.text_input: VocabParallelEmbedding | Linear
        if config.text == "tokens":
            self.text_input = VocabParallelEmbedding(config.text_vocab, width, tensor)
        else:
            self.text_input = Linear(config.text_width, width)
        if config.text != "karlo":
            self.padding = Embedding(config.text_len, width)
            self.null_text = Embedding(1, width)
            self.null_embedding = Embedding(1, width)
        self.embedding_input = Linear(config.embed_dim, width)
        self.time_input = nn.Sequential(Linear(width, width), nn.SiLU(), Linear(width, width))
        self.noised_input = Linear(config.embed_dim, width)
        self.query = Embedding(1, width)
        self.position = Embedding(config.text_len + 1 + TAIL, width)
        scale = (2 * config.depth) ** -0.5
        self.blocks = nn.ModuleList()
        for number in range(2 * config.depth):
            block: ResidualBlock
            if number % 2:
                block = MlpBlock(width, scale, tensor)
            else:
                block = AttentionBlock(dense_attention, width, config.heads, scale, tensor)
            block.number, block.dropout = number, config.dropout
            self.blocks.append(block)
        self.norm = LayerNorm(width)
        self.output = Unembedding(width, config.embed_dim)

    def forward(
        self,
        caption: Caption,
        noised: Tensor,
        timesteps: Tensor,
        *,
        dropped: Tensor | None = None,
        dropout_seeds: Tensor | None = None,
    ) -> Tensor:
        """Predict K clean embeddings for each caption.

        Args:
            noised: (B, K, embed_dim) noised image embeddings.
            timesteps: (B, K) int64 training timesteps.
            dropped: (B,) bool, captions that nulls stand in for; None: none.
            dropout_seeds: as `Dalle.forward` takes them.

        Returns:
            (B, K, embed_dim) fp32.

        Raises:
            DataError: a wrong shape or dtype.
        """
        self._check(caption, noised, timesteps)
        caption, dropped = caption.drop(dropped)
        prefix = self.prefix(caption, dropped)
        x = torch.cat([prefix, self.tail(noised, timesteps)], dim=1)
        mask = self.mask(caption, prefix.shape[1], noised.shape[1], dropped)
        dropout_seeds = seeds_on_host(dropout_seeds, self.config.dropout)
        for block in self.blocks[:-1]:
            x = run_block(block, x, dropout_seeds, mask, self.checkpointing)
        # The last MLP is computed where it is read: at the queries.
        queries = x[:, prefix.shape[1] + TAIL - 1 :: TAIL]
        x = run_block(self.blocks[-1], queries, dropout_seeds, mask, self.checkpointing)
        predicted: Tensor = self.output(self.norm(x))
        return predicted

    def prefix(self, caption: Caption, dropped: Tensor | None = None) -> Tensor:
        """(B, T' + 1, width) fp32, inputs of the text positions and of z_t."""
        text = self._text(caption)
        embedding = self.embedding_input(caption.embedding.to(self.embedding_input.weight.dtype)).float()
        if dropped is not None:
            zero = torch.zeros((), dtype=torch.int64, device=text.device)
            text = torch.where(dropped[:, None, None], self.null_text(zero).float(), text)
            embedding = torch.where(dropped[:, None], self.null_embedding(zero).float(), embedding)
        length = text.shape[1]
        places = torch.arange(length + 1, device=text.device)
        places[length] = self.config.text_len
        return torch.cat([text, embedding[:, None]], dim=1) + self.position(places).float()

    def tail(self, noised: Tensor, timesteps: Tensor) -> Tensor:
        """(B, 3 K, width) fp32, inputs of the three positions of each of K denoisings."""
        noised = self.noised(noised)
        inputs = [self.times(timesteps), noised, self.queries().expand_as(noised)]
        return torch.stack(inputs, dim=2).flatten(1, 2)

    def times(self, timesteps: Tensor) -> Tensor:
        """(…) int64 → (…, width) fp32, inputs of timestep positions."""
        time = sinusoid(timesteps, self.config.width).to(self.noised_input.weight.dtype)
        return self.time_input(time).float() + self.tail_position(0)

    def noised(self, noised: Tensor) -> Tensor:
        """(…, embed_dim) → (…, width) fp32, inputs of positions of noised embeddings."""
        return self.noised_input(noised.to(self.noised_input.weight.dtype)).float() + self.tail_position(1)

    def queries(self) -> Tensor:
        """(width,) fp32, the input of query positions."""
        return self.query.weight[0].float() + self.tail_position(2)

    def mask(
        self, caption: Caption, prefix: int, draws: int, dropped: Tensor | None = None, tail: int = TAIL
    ) -> Tensor:
        """(1 or B, 1, n, n) bool, [query, key]: causal, and the K denoisings, of `tail` positions each, do not see each
        other. Where padding is masked, dropped captions are one null long: how far others reach must not matter to them."""
        device = caption.embedding.device
        length = prefix + tail * draws
        places = torch.arange(length, device=device)
        owner = torch.where(places < prefix, -1, (places - prefix) // tail)
        mask = (places[:, None] >= places) & ((owner[:, None] == owner) | (owner == -1))
        padded = self._padded(caption) if self.config.mask_padding else None
        if padded is None:
            return mask[None, None]
        if dropped is not None:
            padded = torch.where(dropped[:, None], torch.arange(padded.shape[1], device=device) > 0, padded)
        keep = torch.ones(len(padded), length, dtype=torch.bool, device=device)
        keep[:, : padded.shape[1]] = ~padded
        return (mask & (keep[:, None] | torch.eye(length, dtype=torch.bool, device=device)))[:, None]

    def tail_position(self, number: int) -> Tensor:
        """(width,) fp32, the position embedding of each denoising's position 0, 1 or 2."""
        return self.position.weight[self.config.text_len + 1 + number].float()

    def _padded(self, caption: Caption) -> Tensor | None:
        return caption.text == PADDING if self.config.text == "tokens" else caption.padded

    def _text(self, caption: Caption) -> Tensor:
        if self.config.text == "tokens":
            text = self.text_input(caption.text.clamp(min=0)).float()
        else:
            text = self.text_input(caption.text.to(self.text_input.weight.dtype)).float()
        padded = self._padded(caption)
        if padded is None or self.config.text == "karlo":
            return text
        own = self.padding(torch.arange(text.shape[1], device=text.device)).float()
        return torch.where(padded[..., None], own, text)

    def _check(self, caption: Caption, noised: Tensor, timesteps: Tensor) -> None:
        rows, config = len(caption.embedding), self.config
        text = (rows, caption.text.shape[1], *(() if config.text == "tokens" else (config.text_width,)))
        fits = caption.text.shape == text and 0 < caption.text.shape[1] <= config.text_len
        if not fits or (caption.padded is not None and caption.padded.shape != text[:2]):
            raise DataError(
                f"text must have shape {text} with at most {config.text_len} positions, found {tuple(caption.text.shape)}"
            )
        if caption.embedding.shape != (rows, config.embed_dim):
            raise DataError(
                f"text embeddings must have shape (B, {config.embed_dim}), found {tuple(caption.embedding.shape)}"
            )
        if noised.dim() != 3 or noised.shape[::2] != (rows, config.embed_dim) or timesteps.shape != noised.shape[:2]:
            raise DataError(
                f"noised embeddings must have shape ({rows}, K, {config.embed_dim}) and timesteps ({rows}, K), found "
                f"{tuple(noised.shape)} and {tuple(timesteps.shape)}"
            )

    @classmethod
    def from_pretrained(cls, path: str | Path) -> DiffusionPrior:
        """The prior exported in `path`, or in `path`/export where that is a run directory, in eval mode on the CPU.

        Raises:
            CheckpointError: nothing there, another kind of model, or weights that do not fit.
        """
        config, weights = load_model(path, "prior", PriorConfig)
        # What the weights are measured by is what they have; the other kind of text is not among them.
        sized = replace(config, text_width=1) if config.text == "tokens" else replace(config, text_vocab=1)
        return loaded(lambda: cls(config), sized, weights, path)

    def save_pretrained(self, path: str | Path) -> None:
        """Export to folder `path`: `config.json` and `model.safetensors`; CheckpointError where it cannot be written."""
        save_model(path, "prior", self.config, self.state_dict())


def sinusoid(timesteps: Tensor, width: int) -> Tensor:
    """(…) → (…, width) fp32, cosines and sines of frequencies from 1 down to 1e-4 (Vaswani et al. 2017, as in ADM)."""
    half = width // 2
    frequencies = torch.exp(-math.log(10_000) * torch.arange(half, device=timesteps.device) / half)
    angles = timesteps[..., None].float() * frequencies
    return F.pad(torch.cat([angles.cos(), angles.sin()], dim=-1), (0, width % 2))
