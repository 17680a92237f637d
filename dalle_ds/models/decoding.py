"""Incremental decoding: `new_cache`, `prefill` once, then `DecodingWeights.step(codes_0, 0, …)`, `step(codes_1, 1, …)`, ….

A step is the transformer's arithmetic for one new position of every row, with weights made ready for it. It reads every
weight once and multiplies few rows with it, so it runs at the speed of memory, if nothing else gets in its way. What does:
on a CPU, a matrix product of few rows first rearranges its weight, in every call. Here weights are rearranged once. Matrix
products also differ in the last bits of a row with the number of rows they have; images must not, so products are made of
as many rows as are known to give the same bits (`ROWS_ALIKE`).
"""

from __future__ import annotations

import warnings
from collections.abc import Callable, Sequence
from typing import NamedTuple
from weakref import WeakKeyDictionary

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from dalle_ds.config import PADDING, DalleConfig
from dalle_ds.errors import ConfigError, DataError
from dalle_ds.models.dalle import Dalle, check_range, kept_text
from dalle_ds.nn.attention.decoding import (
    ROWS,
    ROWS_ALIKE,
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
from dalle_ds.nn.layers import Linear, RowParallelLinear, Unembedding

Layer = Callable[[Tensor], Tensor]
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


class PackedLinear:
    """A linear layer on the CPU, its weight in the layout that the matrix product works in.

    Without oneDNN's operators for that, it is an ordinary one.

    Args:
        gelu: whether GELU follows.
    """

    def __init__(self, weight: Tensor, bias: Tensor | None, *, gelu: bool = False) -> None:
        self.bias = bias
        self.gelu = gelu
        packed = _packed(weight)
        self.weight = weight if packed is None else packed
        self.packed = packed is not None
        self.rows_at_once = ROWS_ALIKE[weight.dtype] if self.packed else ROWS

    def __call__(self, x: Tensor) -> Tensor:
        """(rows, inputs) → (rows, outputs)."""
        if self.rows_at_once is None or len(x) <= self.rows_at_once:
            return self._multiply(x)
        return torch.cat([self._multiply(some) for some in x.split(self.rows_at_once)])

    def _multiply(self, x: Tensor) -> Tensor:
        if self.packed:
            # The last argument names the kind of GELU: none is the exact one.
            activation = "gelu" if self.gelu else "none"
            return torch.ops.mkldnn._linear_pointwise.default(x, self.weight, self.bias, activation, [], "none")
        x = F.linear(x, self.weight, self.bias)
        return F.gelu(x) if self.gelu else x


def _packed(weight: Tensor) -> Tensor | None:
    """The weight in oneDNN's own layout; None where this machine or this PyTorch cannot."""
    if weight.dtype not in ROWS_ALIKE or not torch.backends.mkldnn.is_available():
        return None
    try:
        packed = torch.ops.mkldnn._reorder_linear_weight(weight, ROWS)
        torch.ops.mkldnn._linear_pointwise(weight.new_zeros(ROWS, weight.shape[1]), packed, None, "none", [], "none")
    except (AttributeError, RuntimeError):
        return None
    return packed


class _Layer(NamedTuple):
    """One attention layer and its MLP."""

    attention_norm: Layer
    qkv: Layer
    out: Layer
    mlp_norm: Layer
    up: Layer
    """With GELU."""
    down: Layer


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
        self._graphs: WeakKeyDictionary[KVCache, _StepGraph] = WeakKeyDictionary()
        with torch.no_grad():
            self.layers = [
                _Layer(
                    self._norm(attention.norm),
                    self._linear(attention.attention.qkv),
                    self._linear(attention.attention.out),
                    self._norm(mlp.norm),
                    self._linear(mlp.up, gelu=True),
                    self._linear(mlp.down),
                )
                for attention, mlp in model.layers
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
            self._graphs[cache] = _StepGraph(cache.rows, self.device)
        return self._graphs[cache](self, codes, step, cache)

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
        if not self._ready:
            return norm
        gain, bias = norm.weight.float(), norm.bias.float()
        return lambda x: F.layer_norm(x, norm.normalized_shape, gain, bias, norm.eps)

    def _linear(self, linear: Linear, *, gelu: bool = False) -> Layer:
        if not self._ready:
            return (lambda x: F.gelu(linear(x))) if gelu else linear
        weight, bias = linear.matrix.detach(), linear.bias.detach()
        if isinstance(linear, RowParallelLinear) and linear.tensor.size > 1:
            share = self._product(weight, None)
            return lambda x: linear.tensor.sum_(share(x)).add_(bias)
        product = self._product(weight, bias, gelu=gelu)
        if isinstance(linear, Unembedding):
            return lambda x: linear.tensor.gather(product(x))
        return product

    def _product(self, weight: Tensor, bias: Tensor | None, *, gelu: bool = False) -> Layer:
        if self.device.type == "cpu":
            return PackedLinear(weight, bias, gelu=gelu)
        return lambda x: F.gelu(F.linear(x, weight, bias)) if gelu else F.linear(x, weight, bias)


def _layer_of_each(cache: KVCache) -> dict[Place, LayerCache]:
    """Any layer of each kind and device."""
    return {(kind, layer.codes.device): layer for kind, layer in zip(cache.kinds, cache.layers, strict=True)}


class _StepGraph:
    """A step held in a CUDA graph: one launch in place of some twenty for each layer.

    Always called with the same weights and the same cache, whose tensors the graph reads and writes where they lie. Where a
    step cannot be held, steps are computed one by one, with one warning.
    """

    def __init__(self, rows: int, device: torch.device) -> None:
        self.device = device
        self.codes = torch.zeros(rows, dtype=torch.int64, device=device)
        self.step = torch.zeros(1, dtype=torch.int64, device=device)
        self.logits: Tensor | None = None
        self._tried = False

    def __call__(self, weights: DecodingWeights, codes: Tensor, step: int, cache: KVCache) -> Tensor:
        self.codes.copy_(codes)
        self.step.fill_(step)
        with torch.cuda.device(self.device):
            if not self._tried:
                self._tried = True
                self._capture(weights, cache)
            if self.logits is None:
                return weights.step_of_tensor(self.codes, self.step, cache)
            self.graph.replay()
            return self.logits.clone()

    def _capture(self, weights: DecodingWeights, cache: KVCache) -> None:
        # What is computed to warm up, and while the graph is taken, writes to the cache; the first replay writes over it what
        # belongs there, since it is for the same step.
        side = torch.cuda.Stream()
        side.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(side):
            weights.step_of_tensor(self.codes, self.step, cache)
        torch.cuda.current_stream().wait_stream(side)
        self.graph = torch.cuda.CUDAGraph()
        try:
            # Other threads of the process may go on to allocate memory meanwhile.
            with torch.cuda.graph(self.graph, capture_error_mode="thread_local"):
                self.logits = weights.step_of_tensor(self.codes, self.step, cache)
        except RuntimeError as error:
            self.logits = None
            warnings.warn(f"decoding goes on without a CUDA graph, more slowly: {error}", stacklevel=2)


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
