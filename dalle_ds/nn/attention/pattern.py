"""One attention kind, and the choice of the kernel that computes it."""

from __future__ import annotations

import functools
import warnings
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from dalle_ds.meta_device import device_type
from dalle_ds.nn.attention.blockwise import blockwise_attention, is_worthwhile
from dalle_ds.nn.attention.flex import Layout, Refused, flex_attention, flex_pairs
from dalle_ds.nn.attention.masks import attention_mask
from dalle_ds.nn.layers import ColumnParallelLinear, RowParallelLinear
from dalle_ds.parallel import WHOLE, TensorGroup

KERNELS = {"cpu": "blockwise", "cuda": "flex"}
"""What computes the sparse kinds on which device; on others dense attention is masked. `benchmarks/attention.py` tells
which is fastest."""

SHORTEST_FLEX = 512
"""Sequences shorter than this are masked too: that costs less than compiling a kernel for them does."""


@dataclass(frozen=True)
class AttentionPattern:
    """Attention of a sequence to itself, restricted to one kind's mask; the fields are as `attention_mask` takes them."""

    kind: str
    text_len: int
    grid: int
    kernel: int

    def __call__(self, qkv: Tensor, keep: Tensor | None = None) -> Tensor:
        """Attend among positions 0 … n − 1.

        Args:
            qkv: (B, n, 3, heads, D) queries, keys and values.
            keep: (B, T) bool, which text keys may be attended to; None allows all. Position 0 must be kept.

        Returns:
            (B, n, heads · D).
        """
        length = qkv.shape[1]
        # The first code meets all text and itself, whatever the kind.
        if self.kind == "full" or length <= self.text_len + 1:
            return dense_attention(qkv, None if keep is None else self._mask(length, keep, qkv.device))
        options: dict[str, Any] = dict(vars(self))
        kernel = KERNELS.get(device_type(qkv))
        if kernel == "blockwise" and is_worthwhile(**options, length=length, dtype=qkv.dtype):
            return blockwise_attention(qkv, keep, **options)
        if kernel == "flex" and length >= SHORTEST_FLEX:
            if qkv.is_meta:  # what cannot be compiled for it has its counterpart in as many pairs of a plain kernel
                return dense_attention(qkv, keys=flex_pairs(Layout(**options), keep is not None) // length)
            try:
                return flex_attention(qkv, keep, **options)
            except Refused as refusal:
                _warn_once(
                    f"{self.kind} attention computes all pairs and masks them. FlexAttention is not used: {refusal}"
                )
        return dense_attention(qkv, self._mask(length, keep, qkv.device))

    def _mask(self, length: int, keep: Tensor | None, device: torch.device) -> Tensor:
        """(n, n) or (B, 1, n, n) bool."""
        mask = _mask_on(device, self.kind, self.text_len, self.grid, self.kernel)[:length, :length]
        if keep is None:
            return mask
        mask = mask.repeat(len(keep), 1, 1, 1)
        text_keys = min(length, self.text_len)
        mask[..., :text_keys] &= keep[:, None, None, :text_keys]
        return mask


@functools.lru_cache(maxsize=16)
def _mask_on(device: torch.device, kind: str, text_len: int, grid: int, kernel: int) -> Tensor:
    return attention_mask(kind, text_len, grid, kernel).to(device)


@functools.cache
def _warn_once(message: str) -> None:
    warnings.warn(message, stacklevel=4)


def dense_attention(qkv: Tensor, mask: Tensor | None = None, keys: int | None = None) -> Tensor:
    """Attention over all pairs: causal, or under a bool mask that broadcasts to (B, heads, n, n).

    Args:
        keys: attend to the first keys only.
    """
    query, key, value = qkv.permute(2, 0, 3, 1, 4).unbind(0)
    key, value = key[:, :, :keys], value[:, :, :keys]
    attended = F.scaled_dot_product_attention(query, key, value, attn_mask=mask, is_causal=mask is None)
    return attended.transpose(1, 2).flatten(2)


Attend = Callable[[Tensor, Tensor | None], Tensor]
"""Queries, keys and values (B, n, 3, heads, D), and which keys to keep (an `AttentionPattern`) or the mask itself
(`dense_attention`) → (B, n, heads · D)."""


class SelfAttention(nn.Module):
    """Multi-head attention with one fused projection to queries, keys and values; heads are divided among a tensor group.

    In two steps, `project` and `attend`: activation checkpointing and the cache have something to do between them.
    """

    def __init__(
        self,
        pattern: Attend,
        width: int,
        heads: int,
        residual_scale: float,
        tensor: TensorGroup = WHOLE,
    ) -> None:
        super().__init__()
        self.pattern = pattern
        self.heads = heads // tensor.size
        """Those of this process."""
        self.head_size = width // heads
        self.qkv = ColumnParallelLinear(width, 3 * width, tensor, fused=3)
        self.out = RowParallelLinear(width, width, tensor, scale=residual_scale)

    def project(self, x: Tensor) -> Tensor:
        """(B, n, width) → (B, n, 3, heads, head size) queries, keys and values, of the same dtype."""
        return self.qkv(x).view(*x.shape[:2], 3, self.heads, self.head_size)

    def attend(self, qkv: Tensor, keep: Tensor | None = None) -> Tensor:
        """Attend among positions 0 … n − 1.

        Args:
            qkv: what `project` returns for them.
            keep: as `AttentionPattern` takes it.

        Returns:
            (B, n, width) out of the tensor group, in the dtype of `qkv`.
        """
        return self.out(self.pattern(qkv, keep))
