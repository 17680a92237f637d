"""Shape of CLIP, and the shapes that have names."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Literal

from dalle_ds.config.checks import positive
from dalle_ds.errors import ConfigError


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
    """Blocks of the image tower."""
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

    def __post_init__(self) -> None:
        sizes = ("embed_dim", "image_size", "patch_size", "vision_width", "vision_depth", "vision_heads")
        positive("model", self, *sizes, "text_width", "text_depth", "text_heads")
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
        if self.text_len < 3:
            raise ConfigError(
                f"model.text_len must be at least 3 (a start token, some text, an end token), found {self.text_len}"
            )
        if self.text_vocab < 3:
            raise ConfigError(f"model.text_vocab must be at least 3, found {self.text_vocab}")
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


_VIT_L14 = ClipConfig(
    embed_dim=768,
    patch_size=14,
    vision_width=1024,
    vision_depth=24,
    vision_heads=16,
    text_width=768,
    text_heads=12,
)
CLIP_SHAPES: dict[str, ClipConfig] = {
    # Trains in minutes on a laptop CPU, on the toy preset's images and vocabulary.
    "toy": ClipConfig(
        embed_dim=64,
        image_size=32,
        patch_size=8,
        vision_width=128,
        vision_depth=4,
        vision_heads=2,
        text_width=128,
        text_depth=3,
        text_heads=2,
        text_len=32,
        text_vocab=4098,
    ),
    "ViT-B/32": ClipConfig(),
    "ViT-B/16": ClipConfig(patch_size=16),
    "ViT-L/14": _VIT_L14,
    "ViT-L/14@336px": replace(_VIT_L14, image_size=336),
    # unCLIP App. C gives no numbers of heads: "the rest as in CLIP", whose heads are all 64 wide. (open_clip's ViT-H, of other
    # authors, has 16 of 80 in its image tower.)
    "unclip-H/16": ClipConfig(
        embed_dim=1024,
        image_size=256,
        patch_size=16,
        vision_width=1280,
        vision_depth=32,
        vision_heads=20,
        text_width=1024,
        text_depth=24,
        text_heads=16,
    ),
}
"""The shapes of CLIP Table 20, of unCLIP App. C, and one for trying things out."""
