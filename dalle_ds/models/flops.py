"""Floating-point operations of the transformer, counted from shapes: a multiplication and an addition are two."""

from __future__ import annotations

from dataclasses import dataclass

import torch

from dalle_ds.config import DalleConfig
from dalle_ds.models.attention.blockwise import block_pairs, is_worthwhile
from dalle_ds.models.attention.kinds import attention_mask, configured_kinds


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
        kind: attention_mask(kind, config.text_len, config.grid, config.kernel) for kind in configured_kinds(config)
    }
    pairs = {kind: int(mask.sum()) for kind, mask in masks.items()}
    attention = sum(6 * 2 * config.width * pairs[kind] for kind in configured_kinds(config))
    return Flops(3 * _projections(config), attention, 3 * _heads(config))


def executed_flops(
    config: DalleConfig,
    checkpointing: str = "none",
    text_tokens: int | None = None,
    dtype: torch.dtype = torch.float32,
) -> Flops:
    """What a training step on a CPU executes, with what it computes again and what blocks of scores hold too much.

    Args:
        checkpointing: as `TrainConfig.activation_checkpointing`.
        text_tokens: text positions without padding; None takes all.
        dtype: of the weights.
    """
    attention = 0
    for kind in configured_kinds(config):
        product = 2 * config.width * executed_pairs(kind, config, dtype)
        # Two products forward; five backward, the first of which makes the scores again.
        attention += (2 * (2 if checkpointing == "full" else 1) + 5) * product
    projections = 3 * _projections(config)
    if checkpointing == "full":
        # All but the last product of each residual block.
        projections += config.depth * 2 * config.total_len * (3 + 4) * config.width**2
    return Flops(projections, attention, 3 * _heads(config, text_tokens))


def executed_pairs(kind: str, config: DalleConfig, dtype: torch.dtype = torch.float32) -> int:
    """Query-key pairs whose scores are computed on a CPU, in blocks or else in a square."""
    length = config.total_len
    if kind == "full":
        return length * (length + 1) // 2
    pattern = (kind, config.text_len, config.grid, config.kernel, length)
    return block_pairs(*pattern) if is_worthwhile(*pattern, dtype) else length**2


def _projections(config: DalleConfig) -> int:
    return config.depth * 2 * config.total_len * 12 * config.width**2


def _heads(config: DalleConfig, text_tokens: int | None = None) -> int:
    text_tokens = config.text_len if text_tokens is None else text_tokens
    return 2 * config.width * (text_tokens * config.text_vocab + config.image_len * config.image_vocab)
