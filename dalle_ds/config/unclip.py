"""Shapes and objectives of unCLIP's stages (Ramesh et al. 2022)."""

from __future__ import annotations

import math
from dataclasses import dataclass, fields
from typing import ClassVar, Literal

from dalle_ds.config.plain import at_least, fraction, positive
from dalle_ds.errors import ConfigError


@dataclass(frozen=True)
class PriorConfig:
    """Shape of the diffusion prior (unCLIP Table 3). The defaults are the paper's."""

    divided: ClassVar = ("heads", "text_vocab")
    """What a tensor group divides evenly."""
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
    text: Literal["tokens", "clip_states", "karlo"] = "tokens"
    """What is read of a caption: tokens (the paper's 24 blocks are its text encoder); the last states of CLIP's frozen text
    tower; or these in Karlo's manner, which `diffusers` runs: the caption "" stands in for dropped ones, and embeddings are
    read as a CLIP without unit_length gives them."""
    text_vocab: int = 16384
    """Vocabulary of `tokens`."""
    text_width: int = 1024
    """Width of CLIP's states."""
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
        _check_text(self)


def _check_text(model: PriorConfig | DecoderConfig) -> None:
    if model.text not in ("tokens", "clip_states", "karlo"):
        raise ConfigError(f"model.text must be tokens, clip_states or karlo, found {model.text!r}")
    if model.text == "karlo" and not model.mask_padding:
        raise ConfigError("model.text=karlo attends to no padding: set model.mask_padding True")


@dataclass(frozen=True)
class LatentPriorConfig:
    """Shape of the autoregressive prior (unCLIP Table 3). The defaults are the paper's."""

    divided: ClassVar = ("text_heads", "heads", "text_vocab", "buckets")
    """What a tensor group divides evenly."""
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
    mask_padding: bool = False
    """Hide padding positions of the caption; otherwise they have learned embeddings, one for each position."""
    dropout: float = 0.0
    """Share of the outputs of residual branches that is dropped in training."""

    def __post_init__(self) -> None:
        positive(
            "model", self, *(entry.name for entry in fields(self) if entry.name not in ("dropout", "mask_padding"))
        )
        fraction("model", self, "dropout")
        for width, heads in (("text_width", "text_heads"), ("width", "heads")):
            if getattr(self, width) % getattr(self, heads):
                raise ConfigError(
                    f"model.{width}={getattr(self, width)} cannot be split over model.{heads}={getattr(self, heads)}: set "
                    f"model.{heads} to a divisor"
                )
        at_least(2, "model", self, "buckets")
        if self.similarity_buckets % 2:
            raise ConfigError(f"model.similarity_buckets must be even, found {self.similarity_buckets}")
        if self.components > self.embed_dim:
            raise ConfigError(
                f"model.components={self.components} is more than the embeddings' {self.embed_dim} dimensions: set it lower"
            )


@dataclass(frozen=True)
class PriorObjective:
    """What the diffusion prior learns to undo (unCLIP §2.2, App. C)."""

    schedule: Literal["cosine", "linear"] = "cosine"
    """Noise schedule."""
    timesteps: int = 1_000
    """Steps of the schedule."""
    draws_per_row: int = 1
    """Noised embeddings of each image in an update, which share the computation of its caption."""
    text_drop: float = 0.1
    """Share of captions, with their embeddings, that learned nulls stand in for: classifier-free guidance needs it."""
    embeddings: Literal["constant", "standardized"] = "constant"
    """Scale of the embeddings: unit length times `scale`, or mean 0 and variance 1 in each dimension."""
    scale: float = 17.2
    """Of `constant` (unCLIP App. C)."""
    analytic_steps: str = "64"
    """Grid of timesteps on which the variance of Analytic-DPM is measured after training, as `dalle_ds.diffusion.step_grid`
    takes it: the one to sample with."""
    analytic_rows: int = 4_096
    """Images that it is measured on, rounded up to whole updates."""

    def __post_init__(self) -> None:
        positive("objective", self, "timesteps", "draws_per_row", "scale", "analytic_rows")
        fraction("objective", self, "text_drop")


@dataclass(frozen=True)
class LatentPriorObjective:
    """What the autoregressive prior learns from (unCLIP §2.2)."""

    text_drop: float = 0.1
    """Share of captions, with their embeddings, that learned nulls stand in for: classifier-free guidance needs it."""
    fit_rows: int = 65_536
    """Training images, evenly spread, that bounds of the components and of the similarities are taken from."""

    def __post_init__(self) -> None:
        positive("objective", self, "fit_rows")
        fraction("objective", self, "text_drop")


NORM_GROUPS = 32
"""Groups of channels that a U-Net normalizes together."""


@dataclass(frozen=True)
class UnetConfig:
    """What both kinds of U-Nets have (ADM: Dhariwal and Nichol 2021)."""

    image_size: int = 64
    """Side in pixels of the square images that it makes."""
    channels: int = 512
    """Channels at full resolution."""
    depth: int = 3
    """Residual blocks at each resolution on the way down; there is one more on the way up."""
    multiples: tuple[int, ...] = (1, 2, 3, 4)
    """Channels at each resolution, as multiples of `channels`; each resolution is half the one before."""
    dropout: float = 0.1
    """Share of activations inside residual blocks that is dropped in training."""
    learned_variance: bool = True
    """Whether it tells the variance of reverse steps, too (Nichol and Dhariwal 2021): twice as many channels of output."""

    def __post_init__(self) -> None:
        positive("model", self, "image_size", "channels", "depth")
        fraction("model", self, "dropout")
        if not self.multiples or min(self.multiples) < 1:
            raise ConfigError(f"model.multiples must be whole numbers greater than 0, found {self.multiples}")
        if self.channels % NORM_GROUPS:
            raise ConfigError(
                f"model.channels must be a multiple of {NORM_GROUPS}, the groups of its normalization, found {self.channels}"
            )
        if self.image_size % self.factor:
            raise ConfigError(
                f"model.image_size={self.image_size} cannot be halved {len(self.multiples) - 1} times: set it to a multiple "
                f"of {self.factor}, or give fewer of model.multiples"
            )

    @property
    def factor(self) -> int:
        """What the sides of images must be multiples of."""
        return 2 ** (len(self.multiples) - 1)

    @property
    def resolutions(self) -> tuple[int, ...]:
        """Sides at which it works, greatest first."""
        return tuple(self.image_size >> halvings for halvings in range(len(self.multiples)))


@dataclass(frozen=True)
class DecoderConfig(UnetConfig):
    """Shape of the decoder (unCLIP Table 3, on GLIDE's U-Net). The defaults are the paper's."""

    attention: tuple[int, ...] = (32, 16, 8)
    """Sides of resolutions with attention; the lowest has it in its middle in any case."""
    head_channels: int = 64
    """Channels of an attention head."""
    embed_dim: int = 1024
    """Dimensions of CLIP's embeddings."""
    image_tokens: int = 4
    """Context tokens that the image embedding becomes (unCLIP §2.1)."""
    text: Literal["tokens", "clip_states", "karlo"] = "tokens"
    """What is read of a caption: tokens, by a text transformer of the decoder's own, as GLIDE's; or the rest as
    `PriorConfig.text`."""
    context_width: int = 2048
    """Width of the context tokens, and of the text transformer."""
    text_len: int = 256
    """Text positions."""
    text_vocab: int = 16384
    """Vocabulary of `tokens`."""
    text_depth: int = 24
    """Layers of the text transformer."""
    text_heads: int = 32
    """Attention heads of the text transformer."""
    text_width: int = 1024
    """Width of CLIP's states."""
    mask_padding: bool = False
    """Whether padding is left out of what is attended to; GLIDE has learned embeddings of padding positions instead."""

    def __post_init__(self) -> None:
        super().__post_init__()
        names = ("head_channels", "embed_dim", "image_tokens", "context_width", "text_len", "text_vocab", "text_depth")
        positive("model", self, *names, "text_heads", "text_width")
        unknown = sorted(set(self.attention) - set(self.resolutions))
        if unknown:
            raise ConfigError(
                f"model.attention has {unknown}: the U-Net works at {', '.join(map(str, self.resolutions))}"
            )
        for side, multiple in zip(self.resolutions, self.multiples, strict=True):
            if self.channels * multiple % self.head_channels and (
                side in self.attention or side == self.resolutions[-1]
            ):
                raise ConfigError(
                    f"model.head_channels={self.head_channels} does not divide the {self.channels * multiple} channels at "
                    f"side {side}: set it to a divisor"
                )
        if self.text == "tokens" and self.context_width % self.text_heads:
            raise ConfigError(
                f"model.context_width={self.context_width} cannot be split over model.text_heads={self.text_heads}: set "
                "model.text_heads to a divisor"
            )
        _check_text(self)


@dataclass(frozen=True)
class UpsamplerConfig(UnetConfig):
    """Shape of an upsampler (unCLIP Table 3): convolutions alone, so that it takes images of any size. The defaults are those
    from 64 to 256 pixels."""

    image_size: int = 256
    """Side in pixels of the square images that it makes."""
    channels: int = 320
    """Channels at full resolution."""
    low_size: int = 64
    """Side in pixels of the images that it enlarges."""
    noise_augmentation: bool = False
    """Whether it is told how much noise was added to the image that it enlarges (Ho et al. 2021), so that sampling may add
    some."""
    scale_shift: bool = True
    """Whether the timestep scales what is normalized, and does not only shift it, as in Karlo's."""

    def __post_init__(self) -> None:
        super().__post_init__()
        positive("model", self, "low_size")
        if self.image_size % self.low_size or self.image_size == self.low_size:
            raise ConfigError(
                f"model.image_size={self.image_size} must be a multiple of model.low_size={self.low_size}, and greater"
            )

    @property
    def scale(self) -> int:
        """How much longer sides become."""
        return self.image_size // self.low_size


@dataclass(frozen=True)
class ImageDiffusionObjective:
    """What both kinds of U-Nets learn to undo."""

    schedule: Literal["cosine", "linear"] = "cosine"
    """Noise schedule."""
    timesteps: int = 1_000
    """Steps of the schedule."""
    predicts: Literal["epsilon", "x0", "v"] = "epsilon"
    """What the output is: the noise (the paper's), the image, which small models learn far better (docs/unclip.md), or v."""

    def __post_init__(self) -> None:
        positive("objective", self, "timesteps")


@dataclass(frozen=True)
class DecoderObjective(ImageDiffusionObjective):
    """What the decoder learns to undo (unCLIP §2.1, App. C)."""

    embedding_drop: float = 0.1
    """Share of image embeddings that a learned null stands in for."""
    text_drop: float = 0.5
    """Share of captions that a learned null stands in for, independently."""

    def __post_init__(self) -> None:
        super().__post_init__()
        fraction("objective", self, "embedding_drop", "text_drop")


@dataclass(frozen=True)
class UpsamplerObjective(ImageDiffusionObjective):
    """What an upsampler learns to undo, and what of images it sees (unCLIP §2.1, App. C)."""

    crop: float = 0.25
    """Side of the random squares that it is trained on, as a share of `model.image_size`."""
    degradation: Literal["none", "blur", "bsr", "bsr_light"] = "blur"
    """What is done to the small images: a Gaussian blur (the first upsampler's), or BSRGAN's chain of degradations (the
    second's) or its light variant."""
    degraded: float = 1.0
    """Share of small images that it is done to, in [0, 1]; validation and sampling have none."""
    noise: float = 0.0
    """With `model.noise_augmentation`: small images are noised as at random timesteps of the first part of the schedule, which
    is this share of it."""
    mirror: bool = False
    """Whether every other training image is mirrored."""
    residual: float = 0.0
    """Greater than 0: the difference from the enlarged small image, times this, is noised and predicted in place of the image.
    A small model does not learn in minutes to copy that image through its normalizations. The smaller the factor, the more
    timesteps have noise greater than the difference, and the nearer samples are to the mean (docs/unclip.md)."""

    def __post_init__(self) -> None:
        super().__post_init__()
        fraction("objective", self, "noise")
        if not 0 <= self.residual < math.inf:
            raise ConfigError(f"objective.residual must be 0 (off) or greater, found {self.residual}")
        for name in ("crop", "degraded"):
            if not 0.0 <= getattr(self, name) <= 1.0:
                raise ConfigError(f"objective.{name} must lie in [0, 1], found {getattr(self, name)}")


@dataclass(frozen=True)
class ImageSampling:
    """How a decoder or an upsampler samples images."""

    method: Literal["ddpm", "ddim", "dpm"] = "ddpm"
    """Reverse steps: ancestral, with the learned variance where there is one; DDIM's, by eta; or DPM-Solver++ of second order,
    which is deterministic."""
    steps: str = "250"
    """Timesteps visited, as `dalle_ds.diffusion.step_grid` takes them."""
    eta: float = 0.0
    """Of DDIM: 0 is deterministic, 1 has DDPM's variance."""
    guidance: float = 1.0
    """Classifier-free guidance, toward embedding and caption; 1 is none. Upsamplers have none."""
    threshold: Literal["static", "dynamic", "none"] = "static"
    """What keeps the image that is seen at each step within [-1, 1]: clipping, dynamic thresholding (Imagen §2.3), nothing."""
    quantile: float = 0.995
    """Of dynamic thresholding."""
    noise: float = 0.0
    """Of an upsampler with noise augmentation: noise that is added to the image that it enlarges, as in `objective.noise`."""

    def __post_init__(self) -> None:
        if self.method not in ("ddpm", "ddim", "dpm"):
            raise ConfigError(f"sampling.method must be ddpm, ddim or dpm, found {self.method!r}")
        if self.threshold not in ("static", "dynamic", "none"):
            raise ConfigError(f"sampling.threshold must be static, dynamic or none, found {self.threshold!r}")
        if not 0 <= self.eta <= 1 or (self.eta and self.method != "ddim"):
            raise ConfigError(f"sampling.eta must lie in [0, 1] and belongs to method ddim, found {self.eta}")
        if not 0 <= self.guidance < math.inf:
            raise ConfigError(f"sampling.guidance must be 0 (unconditional), 1 (off) or greater, found {self.guidance}")
        if not 0 < self.quantile <= 1:
            raise ConfigError(f"sampling.quantile must lie in (0, 1], found {self.quantile}")
        fraction("sampling", self, "noise")
