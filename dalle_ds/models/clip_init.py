"""CLIP's first weights, drawn as OpenAI's and OpenCLIP's code draws them."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, nullcontext
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from dalle_ds.config import ClipConfig

Draw = Callable[[Tensor], object]


@torch.no_grad()
def initialize(model: nn.Module, config: ClipConfig) -> None:
    """Draw the weights of a `Clip` from torch's global generator, also where ZeRO-3 has divided them already."""
    for parameter, draw in _plan(model, config):
        with _whole(parameter):
            # In fp32 first: 16-bit engines of ZeRO-3 have 16-bit weights by now, which would be drawn in another way.
            drawn = torch.empty_like(parameter, dtype=torch.float32)
            draw(drawn)
            parameter.copy_(drawn)


def _plan(model: Any, config: ClipConfig) -> Iterator[tuple[Tensor, Draw]]:
    """Every parameter but the logit scale with what draws it."""
    if config.vision_depth:
        yield from _image_tower(model, config.vision_width)
    text, width, depth = model.text_model, config.text_width, config.text_depth
    residual = _normal(width**-0.5 * (2 * depth) ** -0.5)
    yield text.embeddings.token_embedding.weight, _normal(0.02)
    yield text.embeddings.position_embedding.weight, _normal(0.01)
    for layer in text.encoder.layers:
        attention, widen = _normal(width**-0.5), _normal((2 * width) ** -0.5)
        yield from _block(layer, attention=attention, out=residual, widen=widen, narrow=residual)
    yield from _norm(text.final_layer_norm)
    yield model.text_projection.weight, _normal(width**-0.5)


def _image_tower(model: Any, width: int) -> Iterator[tuple[Tensor, Draw]]:
    vision = model.vision_model
    yield vision.embeddings.class_embedding, _normal(width**-0.5)
    yield vision.embeddings.patch_embedding.weight, _default
    yield vision.embeddings.position_embedding.weight, _normal(width**-0.5)
    yield from _norm(vision.pre_layrnorm)
    for layer in vision.encoder.layers:
        # torch's MultiheadAttention: Xavier's over the three stacked matrices.
        bound = math.sqrt(6 / (width + 3 * width))
        uniform = partial(nn.init.uniform_, a=-bound, b=bound)
        yield from _block(layer, attention=uniform, out=_default, widen=_default, narrow=_default)
    yield from _norm(vision.post_layernorm)
    yield model.visual_projection.weight, _normal(width**-0.5)


def _block(layer: Any, *, attention: Draw, out: Draw, widen: Draw, narrow: Draw) -> Iterator[tuple[Tensor, Draw]]:
    yield from _norm(layer.layer_norm1)
    for linear in (layer.self_attn.q_proj, layer.self_attn.k_proj, layer.self_attn.v_proj):
        yield linear.weight, attention
        yield linear.bias, nn.init.zeros_
    yield layer.self_attn.out_proj.weight, out
    yield layer.self_attn.out_proj.bias, nn.init.zeros_
    yield from _norm(layer.layer_norm2)
    for linear, draw in ((layer.mlp.fc1, widen), (layer.mlp.fc2, narrow)):
        bound = linear.in_features**-0.5
        yield linear.weight, draw
        yield linear.bias, partial(nn.init.uniform_, a=-bound, b=bound)


def _norm(norm: nn.LayerNorm) -> Iterator[tuple[Tensor, Draw]]:
    yield norm.weight, nn.init.ones_
    yield norm.bias, nn.init.zeros_


def _normal(std: float) -> Draw:
    return partial(nn.init.normal_, std=std)


def _default(weight: Tensor) -> None:
    """PyTorch's own for linear layers and convolutions."""
    nn.init.kaiming_uniform_(weight, a=math.sqrt(5))


def _whole(parameter: Tensor) -> AbstractContextManager[object]:
    """Within it, a parameter that ZeRO-3 has divided is whole; what is done to it there is kept."""
    if not hasattr(parameter, "ds_id"):
        return nullcontext()
    import deepspeed

    return deepspeed.zero.GatheredParameters([parameter], modifier_rank=0)
