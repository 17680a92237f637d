"""VQGAN and Gumbel-VQ of taming-transformers (Esser et al. 2021), which stand in for the dVAE: images ↔ a grid of codes.

They are imported (`dalle_ds.interop.vqgan`) and not trained here. The state-dict keys are those of taming's checkpoints.
"""

from __future__ import annotations

import itertools
from collections import OrderedDict
from functools import cached_property
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from dalle_ds.config import VqganConfig
from dalle_ds.models.dvae import DiscreteVAE, check_codes, check_images
from dalle_ds.models.pretrained import export_folder, fingerprint, load_model, loaded, read_config, save_model


def _norm(channels: int) -> nn.GroupNorm:
    return nn.GroupNorm(32, channels, eps=1e-6)


class ResnetBlock(nn.Module):
    """(B, channels_in, H, W) → (B, channels_out, H, W): x plus two of normalization, swish and 3×3 convolution."""

    def __init__(self, channels_in: int, channels_out: int) -> None:
        super().__init__()
        self.norm1 = _norm(channels_in)
        self.conv1 = nn.Conv2d(channels_in, channels_out, 3, padding=1)
        self.norm2 = _norm(channels_out)
        self.conv2 = nn.Conv2d(channels_out, channels_out, 3, padding=1)
        if channels_in != channels_out:
            self.nin_shortcut = nn.Conv2d(channels_in, channels_out, 1)

    def forward(self, x: Tensor) -> Tensor:
        """See the class."""
        residual = self.conv1(F.silu(self.norm1(x)))
        residual = self.conv2(F.silu(self.norm2(residual)))
        return (self.nin_shortcut(x) if hasattr(self, "nin_shortcut") else x) + residual


class AttnBlock(nn.Module):
    """(B, C, H, W) → the same: x plus what one head of attention over all places gathers."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.norm = _norm(channels)
        self.q, self.k, self.v, self.proj_out = (nn.Conv2d(channels, channels, 1) for _ in range(4))

    def forward(self, x: Tensor) -> Tensor:
        """See the class."""
        normed = self.norm(x)
        q, k, v = (each(normed).flatten(2).transpose(1, 2) for each in (self.q, self.k, self.v))  # (B, H·W, C)
        gathered = F.scaled_dot_product_attention(q, k, v)
        return x + self.proj_out(gathered.transpose(1, 2).reshape(x.shape))


class Resample(nn.Module):
    """(B, C, H, W) → half the height and width, or twice."""

    def __init__(self, channels: int, up: bool) -> None:
        super().__init__()
        self.up = up
        self.conv = nn.Conv2d(channels, channels, 3, stride=1 if up else 2, padding=1 if up else 0)

    def forward(self, x: Tensor) -> Tensor:
        """See the class."""
        # Halving pads at the right and the bottom alone.
        return self.conv(F.interpolate(x, scale_factor=2.0, mode="nearest") if self.up else F.pad(x, (0, 1, 0, 1)))


class Level(nn.Module):
    """(B, channels_in, H, W) → (B, channels_out, H, W), or as `resample` says: the blocks of one resolution.

    Args:
        attention: whether each block is followed by it.
        resample: "downsample", "upsample", or "" for none.
    """

    def __init__(self, channels_in: int, channels_out: int, blocks: int, attention: bool, resample: str) -> None:
        super().__init__()
        widths = [channels_in, *[channels_out] * blocks]
        self.block = nn.ModuleList(ResnetBlock(*pair) for pair in itertools.pairwise(widths))
        self.attn = nn.ModuleList(AttnBlock(channels_out) for _ in range(blocks if attention else 0))
        self.resample = resample
        if resample:
            self.add_module(resample, Resample(channels_out, up=resample == "upsample"))

    def forward(self, x: Tensor) -> Tensor:
        """See the class."""
        for block, attention in itertools.zip_longest(self.block, self.attn):
            x = block(x)
            x = attention(x) if attention is not None else x
        return getattr(self, self.resample)(x) if self.resample else x


def _middle(channels: int) -> nn.Sequential:
    first, second = ResnetBlock(channels, channels), ResnetBlock(channels, channels)
    return nn.Sequential(OrderedDict(block_1=first, attn_1=AttnBlock(channels), block_2=second))


class Encoder(nn.Module):
    """Images (B, 3, H, W) in [−1, 1] → (B, latent_channels, h, w)."""

    def __init__(self, config: VqganConfig) -> None:
        super().__init__()
        widths = [config.width * each for each in (1, *config.multipliers)]
        self.conv_in = nn.Conv2d(3, config.width, 3, padding=1)
        last = len(config.multipliers) - 1
        self.down = nn.ModuleList(
            Level(
                *pair, config.blocks_per_level, level in config.attention_levels, "downsample" if level < last else ""
            )
            for level, pair in enumerate(itertools.pairwise(widths))
        )
        self.mid = _middle(widths[-1])
        self.norm_out = _norm(widths[-1])
        self.conv_out = nn.Conv2d(widths[-1], config.latent_channels, 3, padding=1)

    def forward(self, images: Tensor) -> Tensor:
        """See the class."""
        x = self.conv_in(images)
        for level in self.down:
            x = level(x)
        return self.conv_out(F.silu(self.norm_out(self.mid(x))))


class Decoder(nn.Module):
    """(B, latent_channels, h, w) → images (B, 3, H, W), of which those in [−1, 1] can be seen."""

    def __init__(self, config: VqganConfig) -> None:
        super().__init__()
        widths = [config.width * each for each in (*config.multipliers, config.multipliers[-1])]
        self.conv_in = nn.Conv2d(config.latent_channels, widths[-1], 3, padding=1)
        self.mid = _middle(widths[-1])
        blocks = config.blocks_per_level + 1
        self.up = nn.ModuleList(  # by level, as in the encoder: the last is computed first
            Level(channels_in, channels_out, blocks, level in config.attention_levels, "upsample" if level else "")
            for level, (channels_out, channels_in) in enumerate(itertools.pairwise(widths))
        )
        self.norm_out = _norm(widths[0])
        self.conv_out = nn.Conv2d(widths[0], 3, 3, padding=1)

    def forward(self, latents: Tensor) -> Tensor:
        """See the class."""
        x = self.mid(self.conv_in(latents))
        for level in reversed(self.up):
            x = level(x)
        return self.conv_out(F.silu(self.norm_out(x)))


class Vqgan(nn.Module):
    """What `DiscreteVAE` is to the transformer and to sampling: `encode` images to codes, `decode` codes to images."""

    def __init__(self, config: VqganConfig) -> None:
        super().__init__()
        self.config = config
        self.encoder = Encoder(config)
        self.decoder = Decoder(config)
        codebook = nn.Embedding(config.vocab_size, config.embed_dim)
        self.quantize = nn.ModuleDict({"embed" if config.gumbel else "embedding": codebook})
        if config.gumbel:
            self.quantize["proj"] = nn.Conv2d(config.latent_channels, config.vocab_size, 1)
        self.quant_conv = nn.Conv2d(config.latent_channels, config.embed_dim, 1)
        self.post_quant_conv = nn.Conv2d(config.embed_dim, config.latent_channels, 1)

    @property
    def codebook(self) -> Tensor:
        """(vocab_size, embed_dim)."""
        return self.quantize["embed" if self.config.gumbel else "embedding"].get_parameter("weight")

    @torch.no_grad()
    def encode(self, images: Tensor) -> Tensor:
        """(B, 3, H, W) images in [0, 1] → (B, h, w) int64 codes: the nearest, or of Gumbel-VQ the most likely ones."""
        check_images(images, self.config)
        # TF32, PyTorch's default for convolutions, would choose other codes than fp32 does where two are close.
        with torch.backends.cudnn.flags(enabled=True, allow_tf32=False):
            latents = self.quant_conv(self.encoder(2 * images.float() - 1))
            if self.config.gumbel:
                return self.quantize["proj"](latents).argmax(dim=1)
        # |z − e|² without |z|², which is the same for all codes.
        products = latents.permute(0, 2, 3, 1) @ self.codebook.T
        return (self.codebook.square().sum(dim=1) - 2 * products).argmin(dim=-1)

    @torch.no_grad()
    def decode(self, codes: Tensor) -> Tensor:
        """(B, h, w) int64 codes → (B, 3, H, W) images in [0, 1]."""
        check_codes(codes, self.config)
        images = self.decoder(self.post_quant_conv(self.codebook[codes].permute(0, 3, 1, 2)))
        return ((images + 1) / 2).clamp(0, 1)

    @cached_property
    def fingerprint(self) -> str:
        """SHA-256 of the weights as they are at the first call: names the codes that this model makes."""
        return fingerprint(self.state_dict())

    @classmethod
    def from_pretrained(cls, path: str | Path) -> Vqgan:
        """The VQGAN exported in `path`; in eval mode, on the CPU.

        Raises:
            CheckpointError: nothing there, another kind of model, or weights that do not fit.
        """
        config, weights = load_model(path, "vqgan", VqganConfig)
        return loaded(lambda: cls(config), config, weights, path)

    def save_pretrained(self, path: str | Path) -> None:
        """Export to folder `path`: `config.json` and `model.safetensors`."""
        save_model(path, "vqgan", self.config, self.state_dict())


ImageTokenizer = DiscreteVAE | Vqgan
"""What makes codes of images and images of codes."""


def load_image_tokenizer(path: str | Path) -> ImageTokenizer:
    """The dVAE or VQGAN at `path`, an export or a run directory; arguments and errors as `DiscreteVAE.from_pretrained`."""
    kind = read_config(export_folder(path)).get("kind")
    return Vqgan.from_pretrained(path) if kind == "vqgan" else DiscreteVAE.from_pretrained(path)
