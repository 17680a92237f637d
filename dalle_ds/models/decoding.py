"""Incremental decoding: `new_cache`, `prefill` once, then `DecodingWeights.step(codes_0, 0, …)`, `step(codes_1, 1, …)`, ….

A step is the transformer's arithmetic for one new position of every row, with weights made ready for it. It reads every
weight once (`models/inference.py`). Matrix products differ in the last bits of a row with the number of rows they have;
images must not, so products are made of as many rows as are known to give the same bits (`ROWS_ALIKE`).
"""

from __future__ import annotations

import functools
from collections.abc import Sequence
from weakref import WeakKeyDictionary

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from dalle_ds.config import PADDING, DalleConfig
from dalle_ds.errors import ConfigError, DataError
from dalle_ds.models.dalle import Dalle, check_range, kept_text
from dalle_ds.models.inference import InferenceLayer, Layer, StepGraph, ready_linear, ready_norm
from dalle_ds.nn.attention.decoding import (
    KVCache,
    LayerCache,
    Runs,
    SlotTables,
    Table,
    Window,
    attend_to_cache,
    bytes_per_prompt,
    bytes_per_row,
)
from dalle_ds.nn.layers import Linear

Place = tuple[str, torch.device]
"""An attention kind, and where layers of it compute: these write and read alike."""


def new_cache(model: Dalle, rows: int | Sequence[int]) -> KVCache:
    """An empty cache of whole images.

    Args:
        rows: the number of the prompt that each image continues, counted from 0; or how many images, each with a
            prompt of its own. A prompt's text is kept and read once, however many images continue it.
    """
    if model.tensor.sequence:
        raise ConfigError("a transformer whose positions are divided (parallel.sequence) cannot draw: leave it out")
    prompt_of_row = range(rows) if isinstance(rows, int) else rows
    heads = model.layers[0][0].attention.heads
    return KVCache(model.config, prompt_of_row, model.weights_dtype, layer_devices(model), heads)


@torch.no_grad()
def prefill(model: Dalle, text: Tensor, cache: KVCache, codes: Tensor | None = None) -> Tensor:
    """Start `cache` with captions, and with the first codes of their images if there are any.

    Args:
        text: (P, T), as in `Dalle.forward`, one caption for each of the cache's prompts.
        codes: (P, m) int64 in [0, image_vocab), with m < W²; None for m = 0.

    Returns:
        (rows, image_vocab) fp32 logits of code m.
    """
    config = model.config
    check_range(text, "text", config.text_len, PADDING, config.text_vocab)
    if len(text) != cache.prompts:
        raise DataError(f"the cache has {cache.prompts} prompts, found {len(text)} captions: give one for each")
    x = model.embedding.prefix(text)
    if codes is not None:
        if codes.dim() != 2 or codes.shape[1] >= config.image_len:
            raise DataError(
                f"codes must have shape (P, m) with m of at most {config.image_len - 1}, found {tuple(codes.shape)}"
            )
        check_range(codes, "codes", codes.shape[1], 0, config.image_vocab)
        if len(text) != len(codes):
            raise DataError(f"text has {len(text)} rows and codes {len(codes)}: give one caption per image")
        x = torch.cat([x, model.embedding.codes(codes, 0)], dim=1)
    kept = kept_text(config, text)
    cache.keep(kept)
    cache.positions = x.shape[1] - config.text_len
    of_row = torch.tensor(cache.prompt_of_row)
    for (attention, mlp), layer in zip(model.layers, cache.layers, strict=True):
        device = layer.codes.device
        x = x.to(device)
        qkv = attention.project(x)
        layer.load(qkv, config.text_len, of_row)
        x = mlp(x + attention.attention.attend(qkv, None if kept is None else kept.to(device)))
    logits = model.image_head(model.norm(x[:, -1])).to(decoding_device(model))
    return logits.index_select(0, of_row.to(logits.device))


class DecodingWeights:
    """A model's weights, made ready for many steps of decoding.

    To be made anew when the model has changed: some are copies, such as the large ones on a CPU, and some the model's own.
    Modules of a model whose layers lie on several devices, or are fetched when they are used, are left as they are.

    Args:
        model: evaluated without gradients.
        reused: False makes nothing ready, for a step or two.
    """

    def __init__(self, model: Dalle, *, reused: bool = True) -> None:
        self.config = config = model.config
        dispatched = any(hasattr(module, "_hf_hook") for module in model.modules())
        self.device = decoding_device(model)
        self._ready = reused and not dispatched
        self._tables: dict[Place, SlotTables] = {}
        # A graph must not outlive its cache, nor keep it: either may be a large part of a GPU's memory.
        self._graphs: WeakKeyDictionary[KVCache, StepGraph] = WeakKeyDictionary()
        with torch.no_grad():
            self.layers = [
                InferenceLayer.of(attention, mlp, self._norm, self._linear) for attention, mlp in model.layers
            ]
            self.norm = self._norm(model.norm)
            self.image_head = self._linear(model.image_head)
            self.image_token = model.embedding.image_token
            self.positions = model.embedding.image_positions(0, config.image_len, self.device)
            self.dtype = model.weights_dtype
            self.heads = model.layers[0][0].attention.heads

    @torch.no_grad()
    def step(self, codes: Tensor, step: int, cache: KVCache) -> Tensor:
        """Add code `step` of every image to the cache, one position of it.

        Args:
            codes: (rows,) int64 in [0, image_vocab).
            step: in [0, W² − 2]; codes 0 … step − 1 must have been added before.

        Returns:
            (rows, image_vocab) fp32 logits of code step + 1.
        """
        config = self.config
        if not 0 <= step < config.image_len - 1:
            raise ConfigError(f"step must lie in [0, {config.image_len - 2}] for this model, found {step}")
        check_range(codes[:, None], "codes", 1, 0, config.image_vocab)
        if self.device.type == "cuda" and self._ready:
            return self.step_by_graph(codes, step, cache)
        return self.step_of_number(codes, step, cache)

    def step_of_number(self, codes: Tensor, step: int, cache: KVCache) -> Tensor:
        """`step`, reading slices of exactly what is needed."""
        windows: dict[Place, Window] = {
            where: Runs(layer.slots, step + 1) for where, layer in _layer_of_each(cache).items()
        }
        return self._compute(codes, self.positions[step + 1], cache, windows)

    def step_by_graph(self, codes: Tensor, step: int, cache: KVCache) -> Tensor:
        """`step`, held in a CUDA graph from the first call with a cache on."""
        if cache not in self._graphs:
            self._graphs[cache] = StepGraph(self.device)
        compute = functools.partial(self.step_of_tensor, cache=cache)
        return self._graphs[cache](compute, codes, torch.full((1,), step, device=self.device))

    def step_of_tensor(self, codes: Tensor, step: Tensor, cache: KVCache) -> Tensor:
        """`step` without a number that Python knows: `step` is (1,) int64, and all shapes are the same in every step."""
        windows: dict[Place, Window] = {}
        for where, layer in _layer_of_each(cache).items():
            if where not in self._tables:
                self._tables[where] = SlotTables(layer.slots, where[1])
            windows[where] = Table(self._tables[where], step + 1)
        return self._compute(codes, self.positions.index_select(0, step + 1), cache, windows)

    def _compute(self, codes: Tensor, position: Tensor, cache: KVCache, windows: dict[Place, Window]) -> Tensor:
        x = self.image_token(codes) + position
        parts = (len(codes), 3, self.heads, -1)
        for weights, kind, layer in zip(self.layers, cache.kinds, cache.layers, strict=True):
            device = layer.codes.device
            x = x.to(device)
            qkv = weights.qkv(weights.attention_norm(x).to(self.dtype)).view(parts)
            attended = attend_to_cache(
                qkv, layer.text, layer.codes, windows[kind, device], cache.groups[device], cache.text_bias.get(device)
            )
            x += weights.out(attended).to(device)
            # Of a model that is spread over devices, an MLP may lie on the next one.
            x += weights.down(weights.up(weights.mlp_norm(x).to(self.dtype))).to(device)
        # In 16 bits, an fp32 head would be four times as slow at 32 rows, and logits hardly more exact than blocks let them.
        return self.image_head(self.norm(x).to(self.dtype)).to(self.device, torch.float32)

    def _norm(self, norm: nn.LayerNorm) -> Layer:
        return ready_norm(norm) if self._ready else norm

    def _linear(self, linear: Linear, *, gelu: bool = False) -> Layer:
        if self._ready:
            return ready_linear(linear, gelu=gelu)
        return (lambda x: F.gelu(linear(x))) if gelu else linear


def _layer_of_each(cache: KVCache) -> dict[Place, LayerCache]:
    """Any layer of each kind and device."""
    return {(kind, layer.codes.device): layer for kind, layer in zip(cache.kinds, cache.layers, strict=True)}


def decoding_device(model: Dalle) -> torch.device:
    """Where codes go in: the device of the weights, or the first one that computes where `accelerate` has spread them."""
    placed = getattr(model, "hf_device_map", None)
    if placed is None:
        return model.image_head.weight.device
    return torch.device(next((place for place in placed.values() if place not in ("cpu", "disk")), "cpu"))


def layer_devices(model: Dalle) -> list[torch.device]:
    """Where each attention layer computes; keys and values lie there too."""
    placed = getattr(model, "hf_device_map", {})
    main = decoding_device(model)
    devices = []
    for index in range(model.config.depth):
        place = next((placed[name] for name in (f"blocks.{2 * index}", "blocks", "") if name in placed), main)
        # What lies in main memory or on disk is brought to the main device to be used.
        devices.append(main if place in ("cpu", "disk") else torch.device(place))
    return devices


def bytes_per_step(
    config: DalleConfig, dtype: torch.dtype, *, rows: int, prompts: int, position: int
) -> dict[str, int]:
    """Bytes that one step has to read, counted from shapes: weights and prompts once, codes that each kind allows.

    Args:
        dtype: of the weights, keys and values; norms are read in fp32.
        rows: sequences that are decoded, those that only fill up included.
        prompts: distinct captions among them.
        position: image position of the step, code `position` − 1's.

    Returns:
        By what is read: `blocks`, `image_head`, `text`, and one entry for each attention kind.
    """
    width, fp32 = config.width, torch.float32.itemsize
    matrices, biases, norms = 12 * width**2, 9 * width, 4 * width
    of_codes = bytes_per_row(config, dtype, read_at=position)
    return {
        "blocks": config.depth * ((matrices + biases) * dtype.itemsize + norms * fp32),
        "image_head": config.image_vocab * (width + 1) * dtype.itemsize + 2 * width * fp32,
        "text": prompts * bytes_per_prompt(config, dtype),
        **{kind: rows * count for kind, count in of_codes.items()},
    }
