"""Shapes of the models."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from dalle_ds.config.checks import fraction, positive
from dalle_ds.errors import ConfigError

PADDING = -1
"""What a text tensor holds where there is no token."""
ATTENTION_KINDS = ("row", "column", "conv", "full")


@dataclass(frozen=True)
class DiscreteVAEConfig:
    """Shape of the discrete VAE (DALL·E App. A.1). The defaults are the released model's."""

    image_size: int = 256
    """Side in pixels of the square images that it is trained on."""
    groups: int = 4
    """Groups of residual blocks; each but the last halves (encoder) or doubles (decoder) the resolution."""
    blocks_per_group: int = 2
    """Residual blocks in each group."""
    encoder_width: int = 256
    """Channels of the encoder's first group; each further group doubles them."""
    decoder_width: int = 256
    """Channels of the decoder's last group; each earlier group doubles them."""
    decoder_input: int = 128
    """Channels between the decoder's 1×1 input convolution (the codebook) and its first group."""
    vocab_size: int = 8192
    """Number of codes."""
    min_log_scale: float | None = None
    """Floor of the decoder's ln b. The paper has none; images with large areas of one exact colour need one, or those
    areas' likelihood grows without bound and takes the gradient from everything else (docs/dvae.md)."""

    def __post_init__(self) -> None:
        positive(
            "model", self, "image_size", "groups", "blocks_per_group", "encoder_width", "decoder_width", "decoder_input"
        )
        if self.groups > 16:
            raise ConfigError(f"model.groups={self.groups} would shrink any image to nothing: set it to 16 at most")
        if self.vocab_size < 2:
            raise ConfigError(f"model.vocab_size must be at least 2, found {self.vocab_size}")
        for name in ("encoder_width", "decoder_width"):
            if getattr(self, name) % 4:
                raise ConfigError(
                    f"model.{name} must be a multiple of 4 (a residual block's inner width is a quarter), "
                    f"found {getattr(self, name)}"
                )
        if self.image_size % self.factor:
            raise ConfigError(
                f"model.image_size={self.image_size} is not a multiple of {self.factor}, by which {self.groups} groups "
                f"shrink an image: set model.image_size to a multiple of {self.factor}, or model.groups lower"
            )

    @property
    def factor(self) -> int:
        """How many pixels of a side become one code."""
        return 2 ** (self.groups - 1)

    @property
    def grid(self) -> int:
        """Codes along each side of an image."""
        return self.image_size // self.factor


@dataclass(frozen=True)
class DalleConfig:
    """Shape of the autoregressive text-image transformer (DALL·E App. B.1). The defaults are the 12 B model's."""

    width: int = 3968
    """d_model: width of the residual stream."""
    depth: int = 64
    """Attention layers, each followed by an MLP."""
    heads: int = 62
    """Attention heads; the head size is width / heads (64 in the paper)."""
    text_len: int = 256
    """Text positions."""
    grid: int = 32
    """Image codes along each side; the image takes grid² positions."""
    text_vocab: int = 16384
    """Text vocabulary: room for as many pieces; the tokenizer may have fewer."""
    image_vocab: int = 8192
    """Image vocabulary. Must be the dVAE's."""
    attention: tuple[Literal["row", "column", "conv", "full"], ...] | None = None
    """Attention kind of every layer, first to last; None is the paper's schedule (`dalle_ds.nn.attention.layer_kinds`)."""
    kernel: int = 11
    """Side of the conv kind's kernel; odd."""
    mask_padding: bool = False
    """Whether padding is left out of what every position attends to; the paper's model attends to it."""
    text_weight: float = 0.125
    """Weight of the text loss; the image loss has 1 minus this (DALL·E §2.2: 1/8 and 7/8)."""
    dropout: float = 0.0
    """Share of the outputs of residual branches that is dropped in training. The paper has none; small corpora may want it."""

    def __post_init__(self) -> None:
        positive("model", self, "width", "depth", "heads", "text_len", "grid", "text_vocab", "image_vocab")
        if self.width % self.heads:
            raise ConfigError(
                f"model.width={self.width} cannot be split over model.heads={self.heads}: "
                "set model.heads to a divisor of model.width (width / 64 in the paper)"
            )
        fraction("model", self, "dropout")
        if not 1 <= self.kernel < 1_000 or self.kernel % 2 == 0:
            raise ConfigError(f"model.kernel must be odd, positive and less than 1,000, found {self.kernel}")
        if not 0.0 <= self.text_weight <= 1.0:
            raise ConfigError(f"model.text_weight must lie in [0, 1], found {self.text_weight}")
        if self.attention is not None:
            unknown = sorted(set(self.attention) - set(ATTENTION_KINDS))
            if unknown:
                raise ConfigError(
                    f"model.attention has unknown kinds {unknown}; known are {', '.join(ATTENTION_KINDS)}"
                )
            if len(self.attention) != self.depth:
                raise ConfigError(
                    f"model.attention names {len(self.attention)} layers but model.depth is {self.depth}: "
                    "give one kind per layer, or leave it out for the paper's schedule"
                )

    @property
    def image_len(self) -> int:
        """Image positions."""
        return self.grid**2

    @property
    def total_len(self) -> int:
        """Text and image positions together (1280 in the paper)."""
        return self.text_len + self.image_len


@dataclass(frozen=True)
class PriorConfig:
    """Shape of the diffusion prior (unCLIP Table 3). The defaults are the paper's."""

    width: int = 2048
    """Width of the residual stream."""
    depth: int = 24
    """Attention layers, each followed by an MLP."""
    heads: int = 32
    """Attention heads."""
    text_len: int = 256
    """Text positions."""
    embed_dim: int = 1024
    """Dimensions of CLIP's embeddings."""
    text: Literal["tokens", "clip_states"] = "tokens"
    """What is read of a caption: tokens (the paper's 24 blocks are its text encoder), or the last states of CLIP's frozen text
    tower, as Karlo's does."""
    text_vocab: int = 16384
    """Vocabulary of `tokens`."""
    text_width: int = 1024
    """Width of `clip_states`."""
    mask_padding: bool = False
    """Whether padding is left out of what every position attends to; the positions' learned padding embeddings are attended to
    otherwise."""
    dropout: float = 0.0
    """Share of the outputs of residual branches that is dropped in training."""

    def __post_init__(self) -> None:
        names = ("width", "depth", "heads", "text_len", "embed_dim", "text_vocab", "text_width")
        positive("model", self, *names)
        fraction("model", self, "dropout")
        if self.width % self.heads:
            raise ConfigError(
                f"model.width={self.width} cannot be split over model.heads={self.heads}: set model.heads to a divisor"
            )
        if self.text not in ("tokens", "clip_states"):
            raise ConfigError(f"model.text must be tokens or clip_states, found {self.text!r}")


@dataclass(frozen=True)
class LatentPriorConfig:
    """Shape of the autoregressive prior (unCLIP Table 3). The defaults are the paper's."""

    text_width: int = 2048
    """Width of the text encoder."""
    text_depth: int = 24
    """Layers of the text encoder."""
    text_heads: int = 32
    """Attention heads of the text encoder."""
    text_len: int = 256
    """Text positions."""
    text_vocab: int = 16384
    """Vocabulary of the captions."""
    width: int = 1664
    """Width of the latent decoder."""
    depth: int = 24
    """Layers of the latent decoder, each attending to the text encoder's states as well."""
    heads: int = 26
    """Attention heads of the latent decoder."""
    embed_dim: int = 1024
    """Dimensions of CLIP's embeddings."""
    components: int = 319
    """Principal components of an image embedding, a token each."""
    buckets: int = 1024
    """Values of each of these tokens."""
    similarity_buckets: int = 64
    """Values of the token of the similarity of image and text embedding, equally many images in each; even."""
    dropout: float = 0.0
    """Share of the outputs of residual branches that is dropped in training."""

    def __post_init__(self) -> None:
        positive("model", self, *(name for name in self.__dataclass_fields__ if name != "dropout"))
        fraction("model", self, "dropout")
        for width, heads in (("text_width", "text_heads"), ("width", "heads")):
            if getattr(self, width) % getattr(self, heads):
                raise ConfigError(
                    f"model.{width}={getattr(self, width)} cannot be split over model.{heads}={getattr(self, heads)}: set "
                    f"model.{heads} to a divisor"
                )
        if self.similarity_buckets % 2 or self.buckets < 2:
            raise ConfigError(
                f"model.similarity_buckets must be even and model.buckets at least 2, found {self.similarity_buckets} and "
                f"{self.buckets}"
            )
        if self.components > self.embed_dim:
            raise ConfigError(
                f"model.components={self.components} is more than the embeddings' {self.embed_dim} dimensions: set it lower"
            )
