"""Multi-head self-attention."""

from __future__ import annotations

from torch import Tensor, nn

from dalle_ds.models.attention.pattern import AttentionPattern
from dalle_ds.models.layers import Linear


class SelfAttention(nn.Module):
    """Multi-head attention with one fused projection to queries, keys and values.

    In two steps, `project` and `attend`: activation checkpointing and the cache have something to do between them.
    """

    def __init__(self, pattern: AttentionPattern, width: int, heads: int, residual_scale: float) -> None:
        super().__init__()
        self.pattern = pattern
        self.heads = heads
        self.qkv = Linear(width, 3 * width)
        self.out = Linear(width, width, scale=residual_scale)

    def project(self, x: Tensor) -> Tensor:
        """(B, n, width) → (B, n, 3, heads, head size) queries, keys and values, of the same dtype."""
        batch, length, width = x.shape
        return self.qkv(x).view(batch, length, 3, self.heads, width // self.heads)

    def attend(self, qkv: Tensor, keep: Tensor | None = None) -> Tensor:
        """Attend among positions 0 … n − 1.

        Args:
            qkv: what `project` returns for them.
            keep: as `AttentionPattern` takes it.

        Returns:
            (B, n, width), in the dtype of `qkv`.
        """
        return self.out(self.pattern(qkv, keep))
