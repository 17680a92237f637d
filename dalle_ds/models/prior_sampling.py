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

from dalle_ds.models.dalle import two_by_two
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
        with torch.no_grad():
            self.noised_input, self.norm = ready_linear(prior.noised_input, packed=False), ready_norm(prior.norm)
            self.output = prior.output.bias.float(), prior.output.weight.float().t()
            self.noised_position, self.query = prior.tail_position(1), prior.queries()

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
            return [InferenceLayer.of(*blocks, ready_norm, linear) for blocks in two_by_two(self.prior.blocks)]


class CachedPrior:
    """Denoises under fixed captions and timesteps.

    Args:
        weights: of the prior.
        caption: of B captions.
        draws: samples for each caption, K.
        timesteps: (N,) int64, of all steps, on the prior's device.
        guided: whether as many rows more have nulls in place of captions.
    """

    @torch.no_grad()
    def __init__(
        self,
        weights: DenoisingWeights,
        caption: Caption,
        draws: int,
        timesteps: Tensor,
        guided: bool = False,
    ) -> None:
        self.weights, prior = weights, weights.prior
        count = len(caption.embedding)
        dropped, rows = None, count
        row_of: Tensor | slice = slice(None)
        if guided:  # one row more, of nulls, which are the same beside every caption
            parts = (None if part is None else torch.cat([part, part[:1]]) for part in caption[:3])
            caption = Caption(*parts)._replace(empty=caption.empty)  # type: ignore[arg-type]
            places = torch.arange(2 * count, device=timesteps.device).clamp(max=count)
            row_of, rows = places, 2 * count
            caption, dropped = caption.drop(places[: count + 1] == count)
        x = prior.prefix(caption, dropped)
        prefix, width = x.shape[1:]
        self._layers = weights.layers(STEP * rows * draws)
        # Every timestep's position sees the prefix and itself.
        mask = prior.mask(caption, prefix, len(timesteps), dropped, tail=1)
        x = torch.cat([x, prior.times(timesteps).expand(len(x), -1, -1)], dim=1)
        length = prefix + 1 + STEP * draws
        blocks = two_by_two(prior.blocks)
        self._heads = blocks[0][0].attention.heads
        shape = (len(blocks), 2, rows, self._heads, length, width // prior.config.heads)
        self._cache = torch.empty(shape, dtype=weights.dtype, device=x.device)
        """Keys and values of each layer: the prefix's; behind them the step's timestep's and positions', written anew."""
        self._times = self._cache.new_empty(len(timesteps), *shape[:4], shape[5])
        for number, (attention, mlp) in enumerate(blocks):
            qkv = attention.project(x)
            made = qkv[:, :, 1:].permute(2, 0, 3, 1, 4)[:, row_of]
            self._cache[number, :, :, :, :prefix] = made[:, :, :, :prefix]
            self._times[:, number] = made[:, :, :, prefix:].movedim(3, 0)
            if number + 1 < len(blocks):
                x = mlp(x + attention.attention.attend(qkv, mask))
        allowed = prior.mask(caption, prefix + 1, draws, dropped, tail=STEP)[..., prefix + 1 :, :]
        allowed = allowed if len(allowed) == 1 else allowed[row_of]
        self._mask = torch.zeros(allowed.shape, dtype=weights.dtype, device=x.device)
        self._mask.masked_fill_(~allowed, float("-inf"))
        self._queries = weights.query.expand(rows * draws, -1)
        # Views are made once: in a step, an operator takes longer to start than to run.
        self._time = self._cache[..., prefix, :]
        self._views = [(cache[..., prefix + 1 :, :], cache[0], cache[1]) for cache in self._cache]
        self._query_mask = self._mask[..., 1::STEP, :]
        self._graph = StepGraph(x.device) if x.is_cuda else None

    @torch.inference_mode()
    def __call__(self, noised: Tensor, number: int) -> Tensor:
        """(B, K, embed_dim), or (2 · B, …) where guided, at timesteps[number] → the same shape in fp32, as
        `DiffusionPrior.forward`."""
        self._time.copy_(self._times[number])
        return self._compute(noised) if self._graph is None else self._graph(self._compute, noised)

    def _compute(self, noised: Tensor) -> Tensor:
        weights, dtype = self.weights, self.weights.dtype
        rows, draws = noised.shape[:2]
        x = weights.noised_input(noised.flatten(0, 1).to(dtype)) + weights.noised_position
        x = torch.stack([x, self._queries], dim=1).flatten(0, 1)
        parts = (rows, STEP * draws, 3, self._heads, -1)
        mask = self._mask
        for layer, (own, keys, values) in zip(self._layers, self._views, strict=True):
            qkv = layer.qkv(layer.attention_norm(x).to(dtype)).view(parts).permute(2, 0, 3, 1, 4)
            own.copy_(qkv[1:])
            query = qkv[0]
            if layer is self._layers[-1]:  # only queries are read after it
                x, query, mask = x[1::STEP], query[..., 1::STEP, :], self._query_mask
            attended = F.scaled_dot_product_attention(query, keys, values, attn_mask=mask)
            x += layer.out(attended.transpose(1, 2).reshape(len(x), -1))
            x += layer.down(layer.up(layer.mlp_norm(x).to(dtype)))
        bias, output = weights.output
        return torch.addmm(bias, weights.norm(x), output).view(rows, draws, -1)
