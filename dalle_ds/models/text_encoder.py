"""A transformer that reads a caption in both directions, as GLIDE's does (Nichol et al. 2021, §2.3): no causal mask."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from dalle_ds.config import PADDING, Checkpointing
from dalle_ds.models.dalle import AttentionBlock, MlpBlock
from dalle_ds.nn.attention.pattern import dense_attention
from dalle_ds.nn.layers import Embedding, LayerNorm, VocabParallelEmbedding, recomputed
from dalle_ds.parallel import WHOLE, TensorGroup


class TextEncoder(nn.Module):
    """Tokens to states.

    Padding positions have learned embeddings of their own, one for each, and are attended to, or with `mask_padding` are not.
    A dropped caption is a learned null at all positions; under `mask_padding` one null long: how far others reach must not
    matter to it.

    Args:
        tensor: as `Dalle` takes it; the group must not divide positions.
    """

    def __init__(
        self,
        vocab: int,
        length: int,
        width: int,
        depth: int,
        heads: int,
        *,
        mask_padding: bool = False,
        dropout: float = 0.0,
        checkpointing: Checkpointing = "none",
        tensor: TensorGroup = WHOLE,
    ) -> None:
        super().__init__()
        self.mask_padding = mask_padding
        self.checkpointing: Checkpointing = checkpointing
        self.input = VocabParallelEmbedding(vocab, width, tensor)
        self.padding = Embedding(length, width)
        self.null = Embedding(1, width)
        self.position = Embedding(length, width)
        self.blocks = nn.ModuleList()
        scale = (2 * depth) ** -0.5
        for _ in range(depth):
            self.blocks.append(AttentionBlock(dense_attention, width, heads, scale, tensor))
            self.blocks.append(MlpBlock(width, scale, tensor))
        for number, block in enumerate([*self.blocks]):
            block.number, block.dropout = number, dropout
        self.norm = LayerNorm(width)

    def forward(
        self, text: Tensor, dropped: Tensor | None = None, dropout_seeds: Tensor | None = None
    ) -> tuple[Tensor, Tensor | None]:
        """Read captions.

        Args:
            text: (B, T) int64 in [0, vocab), −1 where padded; T is at most `length`, and less only where padding is masked.
            dropped: (B,) bool, captions that nulls stand in for; None: none.
            dropout_seeds: as `Dalle.forward` takes them.

        Returns:
            (B, T, width) fp32, normalized; and, where padding is masked, (B, T) bool, which states are to be attended to.
        """
        places = torch.arange(text.shape[1], device=text.device)
        padded = (text == PADDING)[..., None]
        x = torch.where(padded, self.padding(places), self.input(text.clamp(min=0))).float()
        if dropped is not None:
            x = torch.where(dropped[:, None, None], self.null(torch.zeros_like(places[0])).float(), x)
        x = x + self.position(places).float()
        keep = None
        if self.mask_padding:
            keep = text != PADDING if dropped is None else (text != PADDING) & ~dropped[:, None]
            keep = keep | (places == 0)  # an empty caption has something to attend to, too
        everything = torch.ones(1, 1, 1, 1, dtype=torch.bool, device=text.device)  # None would be a causal mask
        mask = everything if keep is None else keep[:, None, None]
        for block in self.blocks:
            inputs = (x, dropout_seeds, mask) if isinstance(block, AttentionBlock) else (x, dropout_seeds)
            again = self.checkpointing == "full" and torch.is_grad_enabled()
            x = recomputed(block, *inputs) if again else block(*inputs)
        normalized: Tensor = self.norm(x)
        return normalized, keep
