"""Floating-point operations of the transformer, counted from shapes: a multiplication and an addition are two."""

from __future__ import annotations

from dataclasses import dataclass

import torch

from dalle_ds.config import DalleConfig
from dalle_ds.nn.attention.blockwise import block_pairs, is_worthwhile
from dalle_ds.nn.attention.decoding import bytes_per_row
from dalle_ds.nn.attention.flex import Layout, flex_pairs
from dalle_ds.nn.attention.masks import attention_mask, configured_kinds
from dalle_ds.nn.attention.pattern import KERNELS, SHORTEST_FLEX

BACKWARD_PRODUCTS = {"blockwise": 5, "flex": 7, "masked": 5, "causal": 5}
"""Matrix products over the scores in a backward pass, by kernel; forward there are two. Four are needed. The fifth makes the
scores again; FlexAttention makes them, and their gradients, once for the queries and once for the keys."""


@dataclass(frozen=True)
class Flops:
    """Of one sequence, forward and backward; a matrix product takes twice as many backward as forward."""

    projections: int
    """Queries, keys, values and outputs of attention, and the MLPs."""
    attention: int
    """Scores, and values weighted by them."""
    heads: int
    """Logits, each vocabulary at its own positions."""

    @property
    def total(self) -> int:
        """All together."""
        return self.projections + self.attention + self.heads


def model_flops(config: DalleConfig) -> Flops:
    """What the model needs: only pairs that the masks allow, nothing computed twice. The base of the MFU."""
    masks = {
        kind: attention_mask(kind, config.text_len, config.grid, config.kernel)
        for kind in set(configured_kinds(config))
    }
    pairs = {kind: int(mask.sum()) for kind, mask in masks.items()}
    attention = sum(6 * 2 * config.width * pairs[kind] for kind in configured_kinds(config))
    return Flops(3 * _projections(config), attention, 3 * _heads(config))


def layer_flops(config: DalleConfig) -> list[float]:
    """Operations of one sequence in a forward pass, layer by layer: embeddings, residual blocks, heads.

    Attention counts those pairs that are computed, on a GPU where there is one.
    """
    device = "cuda" if torch.cuda.is_available() else "cpu"
    products = 2 * config.total_len * config.width**2
    embeddings = 4.0 * config.total_len * config.width
    costs = [embeddings]
    for kind in configured_kinds(config):
        _, pairs = executed_pairs(kind, config, torch.bfloat16, device)
        costs += [4.0 * products + 4.0 * config.width * pairs, 8.0 * products]
    return [*costs, float(_heads(config))]


def decoding_flops(config: DalleConfig, position: int) -> int:
    """Of one step of decoding for one image, at image position `position`: nothing is computed that is not needed."""
    read = bytes_per_row(config, torch.int8, read_at=position).values()  # a key and a value of `width` bytes each
    attention = 2 * (2 * config.depth * config.text_len * config.width + sum(read))
    return 2 * (12 * config.depth * config.width**2 + config.width * config.image_vocab) + attention


def executed_flops(
    config: DalleConfig,
    checkpointing: str = "none",
    text_tokens: int | None = None,
    dtype: torch.dtype = torch.float32,
    device: str = "cpu",
) -> Flops:
    """What a training step executes, with what it computes again and what blocks of scores hold too much.

    Args:
        checkpointing: as `RecomputingTrainConfig.activation_checkpointing`.
        text_tokens: text positions without padding; None takes all.
        dtype: of the weights.
        device: type of device.
    """
    attention = 0
    for kind in configured_kinds(config):
        kernel, pairs = executed_pairs(kind, config, dtype, device)
        forward = 2 * (2 if checkpointing == "full" else 1)
        attention += (forward + BACKWARD_PRODUCTS[kernel]) * 2 * config.width * pairs
    projections = 3 * _projections(config)
    if checkpointing == "full":
        # All but the last product of each residual block.
        projections += config.depth * 2 * config.total_len * (3 + 4) * config.width**2
    return Flops(projections, attention, 3 * _heads(config, text_tokens))


def executed_pairs(
    kind: str, config: DalleConfig, dtype: torch.dtype = torch.float32, device: str = "cpu"
) -> tuple[str, int]:
    """The kernel that computes a kind, if nothing goes wrong with it, and the query-key pairs whose scores it computes."""
    length = config.total_len
    if kind == "full":
        return ("masked", length**2) if config.mask_padding else ("causal", length * (length + 1) // 2)
    pattern = (kind, config.text_len, config.grid, config.kernel)
    kernel = KERNELS.get(device)
    if kernel == "blockwise" and is_worthwhile(*pattern, length, dtype):
        return kernel, block_pairs(*pattern, length)
    if kernel == "flex" and length >= SHORTEST_FLEX:
        return kernel, flex_pairs(Layout(*pattern), config.mask_padding)
    return "masked", length**2


def _projections(config: DalleConfig) -> int:
    return config.depth * 2 * config.total_len * 12 * config.width**2


def _heads(config: DalleConfig, text_tokens: int | None = None) -> int:
    text_tokens = config.text_len if text_tokens is None else text_tokens
    return 2 * config.width * (text_tokens * config.text_vocab + config.image_len * config.image_vocab)
