"""The autoregressive prior: the codes of an image embedding, one after the other, given its caption (unCLIP §2.2, App. C).

A text encoder reads the caption (no causal mask). A causal decoder, which also attends to the encoder's states, reads

    z_t    similarity    c₀    …    c_{n−2}        and predicts
           c₀            c₁    …    c_{n−1}

with codes as `models/latents.py` makes them. The paper's decoder has 384 positions, too few for 256 of text beside 319
codes, so the caption must come in from outside of them; it does not say how, and cross-attention is this model's choice.
"""

from __future__ import annotations

import functools
from pathlib import Path
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from dalle_ds.config import PADDING, Checkpointing, LatentPriorConfig
from dalle_ds.errors import ConfigError, DataError
from dalle_ds.models.dalle import AttentionBlock, MlpBlock, ResidualBlock, check_range
from dalle_ds.models.inference import InferenceLayer, Layer, ready_linear, ready_norm
from dalle_ds.models.pretrained import load_model, loaded, save_model
from dalle_ds.models.text_encoder import TextEncoder
from dalle_ds.nn.attention.decoding import ROWS
from dalle_ds.nn.attention.pattern import dense_attention
from dalle_ds.nn.layers import (
    ColumnParallelLinear,
    Embedding,
    LayerNorm,
    Linear,
    RowParallelLinear,
    Unembedding,
    VocabParallelEmbedding,
    recomputed,
    seeds_on_host,
)
from dalle_ds.parallel import WHOLE, TensorGroup
from dalle_ds.precision import enter_branch

HEAD_START = 2
"""Positions before the first code: z_t and the similarity."""
REACH = 0.5
"""How far, as a share of all buckets, those of a code begin alike (`make_neighbours_alike`). Where they are classes without an
order, thousands of embeddings are too few to find one; the paper had millions."""


class CrossAttentionBlock(ResidualBlock):
    """Residual block x + attention(norm(x), states): every position attends to all states of another sequence."""

    def __init__(
        self, width: int, states_width: int, heads: int, residual_scale: float, tensor: TensorGroup = WHOLE
    ) -> None:
        super().__init__(width, tensor)
        self.heads = heads // tensor.size
        self.query = ColumnParallelLinear(width, width, tensor)
        self.states = ColumnParallelLinear(states_width, 2 * width, tensor, fused=2)
        self.out = RowParallelLinear(width, width, tensor, scale=residual_scale)

    def forward(
        self, x: Tensor, states: Tensor, dropout_seeds: Tensor | None = None, mask: Tensor | None = None
    ) -> Tensor:
        """(B, n, width) and (B, T, states_width) fp32 → (B, n, width), where `mask`, (B, 1, 1, T) bool, is True."""
        key, value = self.keys(states)
        query = self.query(self._enter(x, self.query.weight.dtype))
        query = query.view(*query.shape[:2], self.heads, -1).transpose(1, 2)
        attended = F.scaled_dot_product_attention(query, key.to(query.dtype), value.to(query.dtype), attn_mask=mask)
        return self._join(x, self.out(attended.transpose(1, 2).flatten(2)), dropout_seeds)

    def keys(self, states: Tensor) -> tuple[Tensor, Tensor]:
        """Keys and values, (B, heads, T, D) each."""
        dtype = self.states.weight.dtype
        entered = states.to(dtype) if self.precision is None else enter_branch(states, self.precision)
        both = self.states(self.tensor.copy_to_tensor_region(entered))
        key, value = both.view(*both.shape[:2], 2, self.heads, -1).permute(2, 0, 3, 1, 4)
        return key, value


class AutoregressivePrior(nn.Module):
    """Predicts the codes of image embeddings.

    Padding positions of a caption have learned embeddings of their own and are attended to, or with `config.mask_padding` are
    not. Dropping a caption puts learned nulls in place of its text and of z_t; the similarity stays.

    Args:
        config: shape of the model.
        checkpointing: "none" or "full".
        tensor: as `Dalle` takes it; the group must not divide positions.
    """

    def __init__(
        self, config: LatentPriorConfig, *, checkpointing: Checkpointing = "none", tensor: TensorGroup = WHOLE
    ) -> None:
        super().__init__()
        tensor.check(config)
        if checkpointing == "selective":
            raise ConfigError("the autoregressive prior has no selective checkpointing: set none or full")
        self.config, self.tensor = config, tensor
        self.checkpointing: Checkpointing = checkpointing
        self.text_encoder = TextEncoder(
            config.text_vocab,
            config.text_len,
            config.text_width,
            config.text_depth,
            config.text_heads,
            mask_padding=config.mask_padding,
            dropout=config.dropout,
            checkpointing=checkpointing,
            tensor=tensor,
        )

        width, scale = config.width, (3 * config.depth) ** -0.5
        self.embedding_input = Linear(config.embed_dim, width)
        self.null_embedding = Embedding(1, width)
        self.similarity_input = Embedding(config.similarity_buckets, width)
        reach = REACH * config.buckets
        self.code_input = VocabParallelEmbedding(config.buckets, width, tensor, reach=reach)
        self.position = Embedding(config.components, width)
        self.blocks = nn.ModuleList()
        for _ in range(config.depth):
            self.blocks.append(AttentionBlock(dense_attention, width, config.heads, scale, tensor))
            self.blocks.append(CrossAttentionBlock(width, config.text_width, config.heads, scale, tensor))
            self.blocks.append(MlpBlock(width, scale, tensor))
        self.norm = LayerNorm(width)
        self.head = Unembedding(width, config.buckets, tensor, reach=reach)
        for number, block in enumerate([*self.blocks], len(self.text_encoder.blocks)):
            block.number, block.dropout = number, config.dropout

    def forward(
        self,
        text: Tensor,
        embedding: Tensor,
        similarity: Tensor,
        codes: Tensor,
        *,
        dropped: Tensor | None = None,
        dropout_seeds: Tensor | None = None,
        logits: bool = False,
    ) -> tuple[Tensor, Tensor | None]:
        """Loss and, if asked for, logits.

        Args:
            text: (B, T) int64 in [0, text_vocab), −1 where padded; T is text_len, or less where padding is masked.
            embedding: (B, embed_dim), CLIP's text embedding z_t, of length 1.
            similarity: (B,) int64 in [0, similarity_buckets), the bucket of z_i · z_t.
            codes: (B, components) int64 in [0, buckets).
            dropped: (B,) bool, captions that nulls stand in for; None: none.
            dropout_seeds: as `Dalle.forward` takes them.

        Returns:
            () mean cross-entropy in nats per code, fp32; (B, components, buckets) fp32 or None.

        Raises:
            DataError: a wrong shape, dtype or, on the CPU, value.
        """
        self._check(text, embedding, similarity, codes)
        dropout_seeds = seeds_on_host(dropout_seeds, self.config.dropout)
        states, mask = self.encode(text, dropped, dropout_seeds)
        x = torch.cat([self._start(embedding, similarity, dropped), self._codes(codes[:, :-1], 0)], dim=1)
        for block in self.blocks:
            if isinstance(block, CrossAttentionBlock):
                x = self._run(block, x, states, dropout_seeds, mask)
            else:
                x = self._run(block, x, dropout_seeds)
        hidden = self.tensor.copy_to_tensor_region(self.norm(x[:, 1:]))
        if logits:
            scores: Tensor = self.head(hidden)
            return F.cross_entropy(scores.flatten(0, 1), codes.flatten()), scores
        return self.head(hidden, codes) / codes.numel(), None

    def encode(
        self, text: Tensor, dropped: Tensor | None = None, dropout_seeds: Tensor | None = None
    ) -> tuple[Tensor, Tensor | None]:
        """(B, T, text_width) fp32, the encoder's normalized states; and, where padding is masked, (B, 1, 1, T) bool, which of
        them are attended to."""
        states, keep = self.text_encoder(text, dropped, dropout_seeds)
        return states, None if keep is None else keep[:, None, None]

    def _run(self, block: nn.Module, x: Tensor, *inputs: Tensor | None) -> Tensor:
        if self.checkpointing == "full" and torch.is_grad_enabled():
            return recomputed(block, x, *inputs)
        result: Tensor = block(x, *inputs)
        return result

    def _start(self, embedding: Tensor, similarity: Tensor, dropped: Tensor | None) -> Tensor:
        """(B, 2, width) fp32, inputs of the two positions before the codes. The first has no position embedding."""
        unit = embedding * self.config.embed_dim**0.5  # elements of about 1, for which weights are drawn
        first = self.embedding_input(unit.to(self.embedding_input.weight.dtype)).float()
        if dropped is not None:
            null = self.null_embedding(torch.zeros((), dtype=torch.int64, device=first.device)).float()
            first = torch.where(dropped[:, None], null, first)
        second = self.similarity_input(similarity) + self.position(torch.zeros_like(similarity))
        return torch.stack([first, second.float()], dim=1)

    def _codes(self, codes: Tensor, first: int) -> Tensor:
        """(B, m) codes number first, first + 1, … → (B, m, width) fp32, inputs that predict the ones after them."""
        places = torch.arange(first + 1, first + 1 + codes.shape[1], device=codes.device)
        return self.code_input(codes).float() + self.position(places).float()

    def _check(self, text: Tensor, embedding: Tensor, similarity: Tensor, codes: Tensor) -> None:
        config = self.config
        shorter = config.mask_padding and text.dim() == 2 and 0 < text.shape[1] < config.text_len
        check_range(text, "text", text.shape[1] if shorter else config.text_len, PADDING, config.text_vocab)
        check_range(codes, "codes", config.components, 0, config.buckets)
        check_range(similarity[:, None], "similarity", 1, 0, config.similarity_buckets)
        if embedding.shape != (len(text), config.embed_dim) or not len(text) == len(codes) == len(similarity):
            raise DataError(
                f"text, embeddings (B, {config.embed_dim}), similarities and codes must have as many rows, found "
                f"{len(text)}, {tuple(embedding.shape)}, {len(similarity)} and {len(codes)}"
            )

    @classmethod
    def from_pretrained(cls, path: str | Path) -> AutoregressivePrior:
        """The prior exported in `path`, or in `path`/export where that is a run directory, in eval mode on the CPU.

        Raises:
            CheckpointError: nothing there, another kind of model, or weights that do not fit.
        """
        config, weights = load_model(path, "latent_prior", LatentPriorConfig)
        return loaded(lambda: cls(config), config, weights, path)

    def save_pretrained(self, path: str | Path) -> None:
        """Export to folder `path`: `config.json` and `model.safetensors`; CheckpointError where it cannot be written."""
        save_model(path, "latent_prior", self.config, self.state_dict())


class LatentSampler:
    """Samples codes one after the other; a step computes one position, on cached keys and values.

    Args:
        prior: in eval mode.
        text, embedding, similarity, dropped: of B rows, as `AutoregressivePrior.forward` takes them.
    """

    @torch.no_grad()
    def __init__(
        self,
        prior: AutoregressivePrior,
        text: Tensor,
        embedding: Tensor,
        similarity: Tensor,
        dropped: Tensor | None = None,
    ) -> None:
        self.prior, self.length = prior, 0
        self._dtype = prior.embedding_input.weight.dtype
        states, self._mask = prior.encode(text, dropped)
        linear = functools.partial(ready_linear, packed=len(text) >= ROWS)
        self._layers: list[_SamplerLayer] = []
        blocks = iter(prior.blocks)
        for attention, cross, mlp in zip(blocks, blocks, blocks, strict=True):
            assert isinstance(attention, AttentionBlock) and isinstance(cross, CrossAttentionBlock)
            assert isinstance(mlp, MlpBlock)
            keys, values = cross.keys(states)
            cache = keys.new_empty(2, *keys.shape[:2], prior.config.components + 1, keys.shape[3], dtype=self._dtype)
            self._layers.append(
                _SamplerLayer(
                    InferenceLayer.of(attention, mlp, ready_norm, linear),
                    ready_norm(cross.norm),
                    linear(cross.query),
                    linear(cross.out),
                    (keys.to(self._dtype), values.to(self._dtype)),
                    cache,
                )
            )
        self.logits = self._advance(prior._start(embedding, similarity, dropped))
        """(B, buckets) fp32, of the next code."""

    @torch.no_grad()
    def step(self, codes: Tensor) -> None:
        """Take (B,) int64, the next code of every row; `logits` then are those of the code after it."""
        number = self.length - HEAD_START
        if number >= self.prior.config.components - 1:
            raise ConfigError(f"all {self.prior.config.components} codes are sampled")
        self.logits = self._advance(self.prior._codes(codes[:, None], number))

    def _advance(self, x: Tensor) -> Tensor:
        start, self.length = self.length, self.length + x.shape[1]
        (rows, positions), x = x.shape[:2], x.flatten(0, 1)
        for layer, cross_norm, cross_query, cross_out, states, cache in self._layers:
            heads = cache.shape[2]
            qkv = layer.qkv(layer.attention_norm(x).to(self._dtype)).view(rows, positions, 3, heads, -1)
            qkv = qkv.permute(2, 0, 3, 1, 4)
            cache[:, :, :, start : self.length] = qkv[1:]
            keys, values = cache[:, :, :, : self.length]
            attended = F.scaled_dot_product_attention(qkv[0], keys, values, is_causal=start == 0)
            x = x + layer.out(attended.transpose(1, 2).reshape(len(x), -1))
            query = cross_query(cross_norm(x).to(self._dtype)).view(rows, positions, heads, -1).transpose(1, 2)
            attended = F.scaled_dot_product_attention(query, *states, attn_mask=self._mask)
            x = x + cross_out(attended.transpose(1, 2).reshape(len(x), -1))
            x = x + layer.down(layer.up(layer.mlp_norm(x).to(self._dtype)))
        scores: Tensor = self.prior.head(self.prior.norm(x.view(rows, positions, -1)[:, -1]))
        return scores


class _SamplerLayer(NamedTuple):
    own: InferenceLayer
    cross_norm: Layer
    cross_query: Layer
    cross_out: Layer
    states: tuple[Tensor, Tensor]
    """Keys and values of the text."""
    cache: Tensor
    """(2, B, heads, components + 1, D), keys and values of the positions so far."""
