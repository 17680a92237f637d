"""Shapes of the models."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar, Literal

from dalle_ds.config.plain import at_least, fraction, positive
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
        at_least(2, "model", self, "vocab_size")
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
class VqganConfig:
    """Shape of a VQGAN of taming-transformers. The defaults are those of its ImageNet model with 1,024 codes, f = 16."""

    image_size: int = 256
    """Side in pixels of the square images that it is used for; it changes no weight."""
    width: int = 128
    """Channels beside the pixels (taming's `ch`)."""
    multipliers: tuple[int, ...] = (1, 1, 2, 2, 4)
    """Channels of each level, in `width`s (`ch_mult`); each level but the last halves the resolution."""
    blocks_per_level: int = 2
    """Residual blocks of each of the encoder's levels (`num_res_blocks`); the decoder's have one more."""
    attention_levels: tuple[int, ...] = (4,)
    """Levels whose blocks are followed by attention (`attn_resolutions`), 0 being the one of the pixels."""
    latent_channels: int = 256
    """Channels that the encoder returns (`z_channels`)."""
    embed_dim: int = 256
    """Width of the codebook."""
    vocab_size: int = 1024
    """Number of codes (`n_embed`)."""
    gumbel: bool = False
    """Whether codes are the likeliest of a 1×1 convolution (Gumbel-VQ), and not the nearest rows of the codebook."""

    def __post_init__(self) -> None:
        positive("model", self, "image_size", "width", "blocks_per_level", "latent_channels", "embed_dim")
        at_least(2, "model", self, "vocab_size")
        if not 0 < len(self.multipliers) <= 16:
            raise ConfigError(f"model.multipliers has {len(self.multipliers)} levels: give 1 to 16")
        if any(each <= 0 or self.width * each % 32 for each in self.multipliers):
            raise ConfigError(
                f"model.width={self.width} times each of model.multipliers={self.multipliers} must be a multiple of 32, "
                "the groups of its normalization"
            )
        if self.image_size % self.factor:
            raise ConfigError(f"model.image_size={self.image_size} is not a multiple of {self.factor}: set one that is")
        if self.gumbel and self.latent_channels != self.embed_dim:
            raise ConfigError(
                f"model.embed_dim={self.embed_dim} must be model.latent_channels={self.latent_channels} with model.gumbel"
            )

    @property
    def factor(self) -> int:
        """How many pixels of a side become one code."""
        return 2 ** (len(self.multipliers) - 1)

    @property
    def grid(self) -> int:
        """Codes along each side of an image."""
        return self.image_size // self.factor


@dataclass(frozen=True)
class DalleConfig:
    """Shape of the autoregressive text-image transformer (DALL·E App. B.1). The defaults are the 12 B model's."""

    divided: ClassVar = ("heads", "text_vocab", "image_vocab")
    """What a tensor group divides evenly."""
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
class ClipConfig:
    """Shape of CLIP (Radford et al. 2021, Tables 19 and 20): a vision transformer and a causal text transformer that meet in
    one space. The defaults are ViT-B/32's."""

    embed_dim: int = 512
    """Dimensions of the space that images and texts share."""
    image_size: int = 224
    """Side in pixels of the square images that it sees."""
    patch_size: int = 32
    """Side in pixels of the squares that become one position each."""
    vision_width: int = 768
    """Width of the image tower's residual stream."""
    vision_depth: int = 12
    """Blocks of the image tower; 0: there is none, and only captions are embedded."""
    vision_heads: int = 12
    """Attention heads of the image tower; CLIP's are vision_width / 64."""
    text_width: int = 512
    """Width of the text tower's residual stream."""
    text_depth: int = 12
    """Blocks of the text tower."""
    text_heads: int = 8
    """Attention heads of the text tower; CLIP's are text_width / 64."""
    text_len: int = 77
    """Text positions, of which a start and an end token take two; longer captions are cut."""
    text_vocab: int = 49_408
    """Text vocabulary: room for the tokenizer's pieces, the start and the end token."""
    start_token: int | None = None
    """Token that begins every caption; None is text_vocab - 2."""
    end_token: int | None = None
    """Token that ends every caption, where its embedding is read; None is text_vocab - 1."""
    activation: Literal["quick_gelu", "gelu"] = "quick_gelu"
    """Of the MLPs: OpenAI's weights have quick_gelu, x · σ(1.702 x), most of open_clip's the exact GELU."""
    image_mean: tuple[float, ...] = (0.48145466, 0.4578275, 0.40821073)
    """What is subtracted from red, green and blue in [0, 1]."""
    image_std: tuple[float, ...] = (0.26862954, 0.26130258, 0.27577711)
    """What they are then divided by."""
    unit_length: bool = True
    """Whether models that are trained on its embeddings get them at length 1, or as its projections give them, as Karlo's
    (model.text=karlo)."""

    def __post_init__(self) -> None:
        sizes = ("embed_dim", "image_size", "patch_size", "vision_width", "vision_heads")
        positive("model", self, *sizes, "text_width", "text_depth", "text_heads")
        at_least(0, "model", self, "vision_depth")
        if self.image_size % self.patch_size:
            raise ConfigError(
                f"model.image_size={self.image_size} is not a multiple of model.patch_size={self.patch_size}: patches would "
                "not cover the image"
            )
        for tower in ("vision", "text"):
            width, heads = getattr(self, f"{tower}_width"), getattr(self, f"{tower}_heads")
            if width % heads:
                raise ConfigError(
                    f"model.{tower}_width={width} cannot be split over model.{tower}_heads={heads}: set "
                    f"model.{tower}_heads to a divisor of it (width / 64 in CLIP)"
                )
        at_least(3, "model", self, "text_len", "text_vocab")  # a start token, some text, an end token
        for name in ("start", "end"):
            if not 0 <= getattr(self, name) < self.text_vocab:
                raise ConfigError(
                    f"model.{name}_token must lie in [0, {self.text_vocab}), the vocabulary, found {getattr(self, name)}"
                )
        if self.start == self.end:
            raise ConfigError(f"model.start_token and model.end_token must differ, found {self.start} for both")
        if len(self.image_mean) != 3 or len(self.image_std) != 3 or not all(value > 0 for value in self.image_std):
            raise ConfigError(
                "model.image_mean and model.image_std must have three values each, those of image_std greater than 0, found "
                f"{self.image_mean} and {self.image_std}"
            )

    @property
    def start(self) -> int:
        """Token that begins every caption."""
        return self.text_vocab - 2 if self.start_token is None else self.start_token

    @property
    def end(self) -> int:
        """Token that ends every caption."""
        return self.text_vocab - 1 if self.end_token is None else self.end_token

    @property
    def grid(self) -> int:
        """Patches along each side of an image."""
        return self.image_size // self.patch_size
