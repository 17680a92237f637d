"""Causal self-attention over text and image, and the sparse attention kinds of DALL·E App. B.1.

What the kinds mean is defined here; kernels and caches that exploit it are held against `attention_mask` by tests. The rest of
the model sees an `AttentionPattern`: something that takes queries, keys and values and attends.
"""

from __future__ import annotations

import torch
from torch import Tensor

from dalle_ds.config import ATTENTION_KINDS, DalleConfig
from dalle_ds.errors import ConfigError


def attention_mask(kind: str, text_len: int, grid: int, kernel: int = 11) -> Tensor:
    """Which position may attend to which (DALL·E App. B.1, Fig. 11).

    Text attends causally to text and never to the image; the image attends to all text. With q and k the raster indices
    of two codes on a grid of side W, and δ = q − k ≥ 0, code q attends to code k under

    * `row` where δ ≤ W: itself and the W before it, across the ends of rows;
    * `column` where δ is a multiple of W;
    * `conv` where δ = dr·W + dc for a row offset 0 ≤ dr ≤ kernel // 2 and a column offset |dc| ≤ kernel // 2. Offsets
      are flat, so a kernel at the edge of the grid wraps into the neighbouring row, as the row kind does;
    * `full` always.

    Returns:
        (T + W², T + W²) bool, indexed [query, key], True = may attend; text first, then the grid in raster order.

    Raises:
        ConfigError: an unknown kind, a length below 1, or an even kernel.
    """
    if kind not in ATTENTION_KINDS:
        raise ConfigError(f"unknown attention kind {kind!r}: known are {', '.join(ATTENTION_KINDS)}")
    if text_len < 1 or grid < 1:
        raise ConfigError(f"attention needs text_len and grid of at least 1, found text_len={text_len}, grid={grid}")
    if kernel < 1 or kernel % 2 == 0:
        raise ConfigError(f"the conv kind's kernel must be odd and positive, found {kernel}")
    total = text_len + grid**2
    mask = torch.ones(total, total, dtype=torch.bool).tril()
    raster = torch.arange(grid**2)
    mask[text_len:, text_len:] &= allowed_offsets(kind, grid, kernel)[(raster[:, None] - raster).clamp(min=0)]
    return mask


def allowed_offsets(kind: str, grid: int, kernel: int) -> Tensor:
    """(W²,) bool, indexed by δ."""
    offsets = torch.arange(grid**2)
    if kind == "row":
        return offsets <= grid
    if kind == "column":
        return offsets % grid == 0
    if kind == "conv":
        rows = torch.arange(kernel // 2 + 1)
        return ((offsets[:, None] - rows * grid).abs() <= kernel // 2).any(dim=1)
    return torch.ones_like(offsets, dtype=torch.bool)


def layer_kinds(depth: int) -> tuple[str, ...]:
    """The paper's attention kind of each of `depth` layers (DALL·E App. B.1).

    The last layer is `conv`; of the others, layers 2, 6, 10, … (counted from 1) are `column` and the rest `row`: 47
    row, 16 column and 1 conv at depth 64.
    """
    if depth < 1:
        raise ConfigError(f"depth must be at least 1, found {depth}")
    return (*("column" if layer % 4 == 2 else "row" for layer in range(1, depth)), "conv")


def configured_kinds(config: DalleConfig) -> tuple[str, ...]:
    """The attention kind of each layer: what `config.attention` names, or else the paper's schedule."""
    return config.attention if config.attention is not None else layer_kinds(config.depth)
