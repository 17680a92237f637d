"""What a training step is compared with: a plain dense transformer, and DALLE-pytorch where it is installed."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from dalle_ds.config import DalleConfig
from dalle_ds.errors import ConfigError


class DenseTransformer(nn.Module):
    """What PyTorch offers without further thought: causal attention over all positions, logits only where they are used."""

    def __init__(self, config: DalleConfig) -> None:
        super().__init__()
        self.config = config
        width = config.width
        self.text_token = nn.Embedding(config.text_vocab, width)
        self.image_token = nn.Embedding(config.image_vocab, width)
        self.position = nn.Parameter(torch.randn(config.total_len, width) * 0.02)
        self.blocks = nn.ModuleList(_DenseBlock(width, config.heads) for _ in range(config.depth))
        self.norm = nn.LayerNorm(width)
        self.text_head = nn.Linear(width, config.text_vocab)
        self.image_head = nn.Linear(width, config.image_vocab)

    def forward(self, text: Tensor, codes: Tensor) -> Tensor:
        """(B, T) and (B, W²) int64 → () loss."""
        x = torch.cat([self.text_token(text), self.image_token(codes)], dim=1) + self.position
        for block in self.blocks:
            x = block(x)
        x = self.norm(x)
        text_logits = self.text_head(x[:, : self.config.text_len]).float()
        image_logits = self.image_head(x[:, self.config.text_len :]).float()
        text_loss = F.cross_entropy(text_logits.flatten(0, 1), text.flatten())
        return text_loss / 8 + F.cross_entropy(image_logits.flatten(0, 1), codes.flatten()) * 7 / 8


class _DenseBlock(nn.Module):
    def __init__(self, width: int, heads: int) -> None:
        super().__init__()
        self.heads = heads
        self.attention_norm, self.mlp_norm = nn.LayerNorm(width), nn.LayerNorm(width)
        self.qkv, self.out = nn.Linear(width, 3 * width), nn.Linear(width, width)
        self.up, self.down = nn.Linear(width, 4 * width), nn.Linear(4 * width, width)

    def forward(self, x: Tensor) -> Tensor:
        batch, length, width = x.shape
        qkv = self.qkv(self.attention_norm(x)).view(batch, length, 3, self.heads, width // self.heads)
        attended = F.scaled_dot_product_attention(*qkv.permute(2, 0, 3, 1, 4), is_causal=True)
        x = x + self.out(attended.transpose(1, 2).reshape(batch, length, width))
        return x + self.down(F.gelu(self.up(self.mlp_norm(x))))


class DallePytorch(nn.Module):
    """lucidrains' DALLE-pytorch at the same shape, with its axial attention, which is the nearest to the paper's kinds.

    Raises:
        ConfigError: it is not installed.
    """

    def __init__(self, config: DalleConfig) -> None:
        super().__init__()
        try:
            from dalle_pytorch import DALLE, DiscreteVAE
        except ImportError as error:
            raise ConfigError(f"--model dalle_pytorch needs the package dalle-pytorch: {error}") from error
        layers = config.grid.bit_length()
        vae = DiscreteVAE(image_size=config.grid * 2**layers, num_layers=layers, num_tokens=config.image_vocab)
        self.model = DALLE(
            dim=config.width,
            vae=vae,
            num_text_tokens=config.text_vocab,
            text_seq_len=config.text_len,
            depth=config.depth,
            heads=config.heads,
            dim_head=config.width // config.heads,
            attn_types=("axial_row", "axial_col", "axial_row", "axial_row"),
            loss_img_weight=7,
        )

    def forward(self, text: Tensor, codes: Tensor) -> Tensor:
        """(B, T) and (B, W²) int64 → () loss."""
        return self.model(text, codes, return_loss=True)
