"""What a forward pass keeps for the backward pass, and what a block needs while it runs backward, in bytes."""

from __future__ import annotations

import functools
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.autograd.graph import saved_tensors_hooks

from dalle_ds.config import DalleConfig, DiscreteVAEConfig
from dalle_ds.models import DiscreteVAE
from dalle_ds.nn.cross_entropy import CHUNK, CHUNK_ON_GPU
from dalle_ds.planning.layout import Layout

STREAM = 4
"""Bytes of a number in the residual stream, which is fp32."""


@dataclass(frozen=True)
class Activations:
    """Of one micro-batch on one process, in bytes."""

    kept: int
    """From the forward pass of residual blocks to their backward pass."""
    loss_kept: int
    """By the last layers, whose gradients are made in the forward pass, to the backward pass."""
    loss_working: int
    """Besides, while the loss is computed; or in the forward pass of a block that is computed again later."""
    working: int
    """Besides what is kept, in the backward pass of a block."""
    boundary: int
    """What one residual block hands to the next."""


@dataclass(frozen=True)
class BlockBytes:
    """Of one position in one residual block, in bytes."""

    entry: int
    """The residual stream that enters it, and statistics of its normalization."""
    normalized: int
    """What the branch begins with."""
    made: int
    """Queries, keys, values and what attention made of them; or the MLP's hidden layer before GELU."""
    activated: int
    """The hidden layer after GELU."""

    def kept(self, checkpointing: str) -> int:
        """From the forward pass to the backward pass."""
        if checkpointing == "none":
            return self.entry + self.normalized + self.made + self.activated
        return self.entry - _STATISTICS + (self.made if checkpointing == "selective" else 0)


_STATISTICS = 2 * STREAM
"""Mean and deviation of a position; computed again together with the normalized vector."""


def block_bytes(config: DalleConfig, layout: Layout) -> tuple[BlockBytes, BlockBytes]:
    """Of an attention block and of an MLP block.

    Attention keeps its inputs, its output and, in fp32, one logarithm per head; its scores are made again. With
    `sequence`, the stream is that of this process's positions, and what enters the branch that of all.
    """
    number, width, parts = layout.branch_bytes, config.width, layout.tensor
    entry = (STREAM * width + _STATISTICS) // (parts if layout.sequence else 1)
    made = (4 * number * width + 4 * config.heads) // parts
    hidden = 4 * number * width // parts
    return BlockBytes(entry, number * width, made, 0), BlockBytes(entry, number * width, hidden, hidden)


def transformer_activations(
    config: DalleConfig, layout: Layout, blocks: Sequence[int], *, last: bool, device: str
) -> Activations:
    """Of the residual blocks of these numbers.

    Args:
        last: whether the last layers follow, which compute the loss.
        device: "cuda" or "cpu".
    """
    positions = layout.micro_batch * config.total_len
    own = positions // layout.tensor if layout.sequence else positions
    kinds = block_bytes(config, layout)
    kept = sum(positions * kinds[number % 2].kept(layout.checkpointing) for number in blocks)
    boundary = own * STREAM * config.width
    loss_kept = loss_working = 0
    if last:
        kept += own * (STREAM * config.width + _STATISTICS)  # what the last normalization takes
        loss_kept, loss_working = _loss(config, layout, device)
    if layout.checkpointing == "full":
        # An MLP has its hidden layer, before and after GELU, and its output, when the last block has not yet added that.
        hidden = kinds[1]
        forward = positions * (hidden.made + hidden.activated + hidden.normalized) - boundary
        loss_working = max(loss_working, forward - loss_kept)
    return Activations(kept, loss_kept, loss_working, _working(config, layout, blocks), boundary)


def _working(config: DalleConfig, layout: Layout, blocks: Sequence[int]) -> int:
    """The gradient of the stream, its copy in 16 bits, and what the block that runs backward makes (again)."""
    if not blocks:
        return 0
    positions = layout.micro_batch * config.total_len
    block = block_bytes(config, layout)[1 if any(number % 2 for number in blocks) else 0]
    stream = STREAM * config.width * positions // (layout.tensor if layout.sequence else 1)
    copy = layout.branch_bytes * config.width * positions if layout.branch_bytes < STREAM else 0
    # For an attention block: gradients of queries, keys and values and of the output.
    gradients = block.activated or block.made
    again = {"none": 0, "selective": block.activated, "full": block.normalized + block.made + block.activated}
    return stream + copy + positions * (gradients + again[layout.checkpointing])


def _loss(config: DalleConfig, layout: Layout, device: str) -> tuple[int, int]:
    """What `linear_cross_entropy` keeps (gradients of hidden states and, in fp32, of the heads), and what it works with."""
    number, width = layout.weight_bytes, config.width
    positions = layout.micro_batch * config.total_len
    vocabulary = (config.text_vocab + config.image_vocab) // layout.tensor
    kept = positions * number * width + 4 * vocabulary * (width + 1)
    heads = ((config.text_len, config.text_vocab), (config.image_len, config.image_vocab))
    working = [
        _head(layout.micro_batch * length, width, vocab // layout.tensor, number, device) for length, vocab in heads
    ]
    return kept, STREAM * width * positions + max(working)


def _head(rows: int, width: int, vocabulary: int, number: int, device: str) -> int:
    """What one head works with; `number` is the bytes of one of its weights."""
    chunk = min(CHUNK if device == "cpu" else CHUNK_ON_GPU, rows * vocabulary)
    factors = number * width * rows if number < STREAM else 0
    if device == "cpu":
        factors += STREAM * width * rows  # rows without padding
    # Logits and their logarithms, 16-bit gradients of them, and one chunk's gradient of the weight.
    return factors + chunk * (2 * 4 + (number if number < 4 else 0)) + vocabulary * width * number


@functools.lru_cache(maxsize=64)
def dvae_activations(config: DiscreteVAEConfig, micro_batch: int, weight_bytes: int) -> Activations:
    """Of a dVAE, whose saved tensors are counted on a model without memory."""
    dtype = torch.bfloat16 if weight_bytes == 2 else torch.float32
    with torch.device("meta"):
        model = DiscreteVAE(config).to(dtype)
        images = torch.empty(micro_batch, 3, config.image_size, config.image_size)
        noise = torch.empty(micro_batch, config.vocab_size, config.grid, config.grid)
        own = {_storage(parameter) for parameter in model.parameters()}
        saved: dict[Any, int] = {}
        largest = 0

        def note(tensor: Tensor) -> Tensor:
            nonlocal largest
            if _storage(tensor) not in own:
                saved[_storage(tensor)] = tensor.untyped_storage().nbytes()
                largest = max(largest, saved[_storage(tensor)])
            return tensor

        with saved_tensors_hooks(note, lambda tensor: tensor):
            output = model(images, 1.0, noise)
        kept = sum(saved.values())
        del output  # it kept the tensors alive whose storages were told apart
    # Running backward, a layer holds the gradients of its output and of its input.
    return Activations(kept, 0, largest, 2 * largest, 0)


def _storage(tensor: Tensor) -> int:
    return int(tensor.untyped_storage()._cdata)
