"""Multi-head self-attention."""

from __future__ import annotations

from torch import Tensor, nn

from dalle_ds.nn.attention.pattern import AttentionPattern
from dalle_ds.nn.layers import ColumnParallelLinear, RowParallelLinear
from dalle_ds.parallel import WHOLE, TensorGroup


class SelfAttention(nn.Module):
    """Multi-head attention with one fused projection to queries, keys and values; heads are divided among a tensor group.

    In two steps, `project` and `attend`: activation checkpointing and the cache have something to do between them.
    """

    def __init__(
        self,
        pattern: AttentionPattern,
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
