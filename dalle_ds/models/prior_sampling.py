"""The diffusion prior, many times under the same captions: what does not depend on the noise is computed once.

    text (T)    z_t    timestep    noised z_i    query

In causal order, text and z_t depend on the caption alone, and a timestep's position on it and the caption: keys and values of
all of them, for all steps, come from one pass before the first step. A step computes two positions a sample.
"""

from __future__ import annotations

import functools

import torch
import torch.nn.functional as F
from torch import Tensor

from dalle_ds.models.dalle import AttentionBlock, MlpBlock
from dalle_ds.models.inference import InferenceLayer, StepGraph, ready_linear, ready_norm
from dalle_ds.models.prior import Caption, DiffusionPrior
from dalle_ds.nn.attention.decoding import ROWS

STEP = 2
"""Positions of a step: noised embedding, query."""


class DenoisingWeights:
    """A prior's weights, made ready for steps of denoising when they are first asked for.

    To be made anew when the prior has changed: some are copies.

    Args:
        prior: in eval mode.
    """

    def __init__(self, prior: DiffusionPrior) -> None:
        self.prior = prior
        self.dtype = prior.noised_input.weight.dtype

    def layers(self, rows: int) -> list[InferenceLayer]:
        """For steps of so many rows."""
        return self._packed if rows >= ROWS else self._plain

    @functools.cached_property
    def _packed(self) -> list[InferenceLayer]:
        return self._ready(packed=True)

    @functools.cached_property
    def _plain(self) -> list[InferenceLayer]:
        return self._ready(packed=False)

    def _ready(self, *, packed: bool) -> list[InferenceLayer]:
        linear = functools.partial(ready_linear, packed=packed)
        with torch.no_grad():
            return [InferenceLayer.of(*blocks, ready_norm, linear) for blocks in pairs(self.prior)]


class CachedPrior:
    """Denoises under fixed captions and timesteps.

    Args:
        caption: of B captions.
        draws: samples for each caption, K.
        timesteps: (N,) int64, of all steps, on the prior's device.
        dropped: (B,) bool, captions that nulls stand in for.
    """

    @torch.no_grad()
    def __init__(
        self,
        weights: DenoisingWeights,
        caption: Caption,
        draws: int,
        timesteps: Tensor,
        dropped: Tensor | None = None,
    ) -> None:
        self.prior = prior = weights.prior
        self.dtype = weights.dtype
        x = prior.prefix(caption, dropped)
        rows, self._prefix, width = x.shape
        self._layers = weights.layers(STEP * rows * draws)
        # Every timestep's position sees the prefix and itself.
        mask = prior.mask(caption, self._prefix, len(timesteps), dropped, tail=1)
        x = torch.cat([x, prior.times(timesteps).expand(rows, -1, -1)], dim=1)
        length = self._prefix + 1 + STEP * draws
        blocks = pairs(prior)
        self._heads = blocks[0][0].attention.heads
        shape = (len(blocks), 2, rows, self._heads, length, width // prior.config.heads)
        self._cache = torch.empty(shape, dtype=self.dtype, device=x.device)
        """Keys and values of each layer: the prefix's; behind them the step's timestep's and positions', written anew."""
        self._times = self._cache.new_empty(len(timesteps), *shape[:4], shape[5])
        for number, (attention, mlp) in enumerate(blocks):
            qkv = attention.project(x)
            made = qkv[:, :, 1:].permute(2, 0, 3, 1, 4)
            self._cache[number, :, :, :, : self._prefix] = made[:, :, :, : self._prefix]
            self._times[:, number] = made[:, :, :, self._prefix :].movedim(3, 0)
            if number + 1 < len(blocks):
                x = mlp(x + attention.attention.attend(qkv, mask))
        allowed = prior.mask(caption, self._prefix + 1, draws, dropped, tail=STEP)[..., self._prefix + 1 :, :]
        self._mask = torch.zeros(allowed.shape, dtype=self.dtype, device=x.device)
        self._mask.masked_fill_(~allowed, float("-inf"))
        self._numbers = torch.arange(len(timesteps), device=x.device)
        self._query = prior.queries()
        self._graph = StepGraph(x.device) if x.is_cuda else None

    @torch.no_grad()
    def __call__(self, noised: Tensor, number: int) -> Tensor:
        """(B, K, embed_dim) at timesteps[number] → (B, K, embed_dim) fp32, as `DiffusionPrior.forward`."""
        inputs = noised, self._numbers[number, None]
        return self._compute(*inputs) if self._graph is None else self._graph(self._compute, *inputs)

    def _compute(self, noised: Tensor, number: Tensor) -> Tensor:
        noised = self.prior.noised(noised)
        rows, draws, width = noised.shape
        x = torch.stack([noised, self._query.expand_as(noised)], dim=2).view(-1, width)
        self._cache[..., self._prefix, :] = self._times.index_select(0, number)[0]
        parts = (rows, STEP * draws, 3, self._heads, -1)
        for layer, cache in zip(self._layers, self._cache, strict=True):
            qkv = layer.qkv(layer.attention_norm(x).to(self.dtype)).view(parts).permute(2, 0, 3, 1, 4)
            cache[..., self._prefix + 1 :, :] = qkv[1:]
            attended = F.scaled_dot_product_attention(qkv[0], cache[0], cache[1], attn_mask=self._mask)
            x = x + layer.out(attended.transpose(1, 2).reshape(len(x), -1))
            x = x + layer.down(layer.up(layer.mlp_norm(x).to(self.dtype)))
        return self.prior.read(x.view(rows, draws, STEP, width)[:, :, 1])


def pairs(prior: DiffusionPrior) -> list[tuple[AttentionBlock, MlpBlock]]:
    """Each attention with the MLP behind it."""
    blocks = iter(prior.blocks)
    return list(zip(blocks, blocks, strict=True))  # type: ignore[arg-type]
