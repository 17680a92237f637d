"""The detector of duplicates: its shape, the distortions that it learns to see through, its training (CLIP App. C)."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Literal

from dalle_ds.config.checks import positive
from dalle_ds.config.runs import Run
from dalle_ds.errors import ConfigError

_MOST_STAGES = 6
_MOST_BLOCKS = 100


@dataclass(frozen=True)
class DuplicateDetectorConfig:
    """Shape of the duplicate detector, a residual network of bottleneck blocks. The defaults are a ResNet-50's."""

    image_size: int = 224
    """Side in pixels of the square pictures that it looks at."""
    width: int = 64
    """Inner channels of the first stage's blocks. Each further stage has twice as many; outside, blocks have four times their
    inner channels."""
    blocks: tuple[int, ...] = (3, 4, 6, 3)
    """Residual blocks of each stage; each stage but the first halves the resolution."""
    stem_halvings: Literal[0, 1, 2] = 2
    """How often the resolution is halved before the first stage: twice in a ResNet-50; less for small pictures."""
    embed_dim: int = 512
    """Numbers in an embedding."""

    def __post_init__(self) -> None:
        positive("model", self, "image_size", "width", "embed_dim")
        if not 1 <= len(self.blocks) <= _MOST_STAGES:
            raise ConfigError(f"model.blocks must have 1 to {_MOST_STAGES} stages, found {len(self.blocks)}")
        if not all(1 <= count <= _MOST_BLOCKS for count in self.blocks):
            raise ConfigError(f"each of model.blocks must be 1 to {_MOST_BLOCKS}, found {self.blocks}")
        if self.image_size % self.factor or self.image_size < 2 * self.factor:
            raise ConfigError(
                f"model.image_size={self.image_size} is not a multiple of {self.factor}, by which the stem and "
                f"{len(self.blocks)} stages shrink a picture, or less than twice that: change it, or model.stem_halvings"
            )

    @property
    def factor(self) -> int:
        """How many pixels of a side become one position of the last stage."""
        return 2 ** (self.stem_halvings + len(self.blocks) - 1)


@dataclass(frozen=True)
class DistortionConfig:
    """How pictures are distorted, as copies on the web are (CLIP App. C). Each distortion can be left out by its own field."""

    probability: float = 0.7
    """Each distortion happens with this probability, whether others do or not."""
    smallest_crop: float = 0.6
    """Cropping and zooming: least share of each side that is kept, then enlarged to the whole; 1 does not crop."""
    most_stretch: float = 1.4
    """Aspect distortion: most by which width / height is multiplied or divided; 1 does not stretch."""
    smallest_scale: float = 0.35
    """Lost resolution: least share of each side to which a picture shrinks before it is enlarged again; 1 does not shrink."""
    most_degrees: float = 8.0
    """Rotation: greatest angle, either way; 0 does not rotate."""
    lowest_quality: int = 30
    """JPEG: lowest quality, 1 to 95; 100 does not compress."""
    hue: float = 0.04
    """HSV jitter: most by which hue turns, as a share of the circle; 0 keeps it."""
    saturation: float = 0.3
    """HSV jitter: most by which saturation grows or falls, as a share of itself; 0 keeps it."""
    value: float = 0.3
    """HSV jitter: most by which value (brightness) grows or falls, as a share of itself; 0 keeps it."""

    def __post_init__(self) -> None:
        for name in ("probability", "hue", "saturation", "value"):
            if not 0.0 <= getattr(self, name) <= 1.0:
                raise ConfigError(f"distortions.{name} must lie in [0, 1], found {getattr(self, name)}")
        for name in ("smallest_crop", "smallest_scale"):
            if not 0.0 < getattr(self, name) <= 1.0:
                raise ConfigError(f"distortions.{name} must lie in (0, 1], found {getattr(self, name)}")
        if not 1.0 <= self.most_stretch <= 10.0:
            raise ConfigError(f"distortions.most_stretch must lie in [1, 10], found {self.most_stretch}")
        if not 0.0 <= self.most_degrees <= 180.0:
            raise ConfigError(f"distortions.most_degrees must lie in [0, 180], found {self.most_degrees}")
        if not (1 <= self.lowest_quality <= 95 or self.lowest_quality == 100):
            raise ConfigError(f"distortions.lowest_quality must be 1 to 95, or 100, found {self.lowest_quality}")


@dataclass(frozen=True)
class DuplicateObjective:
    """The contrastive loss between a picture and its distortion."""

    temperature: float = 0.07
    """Cosine similarities are divided by it; it is not learned."""
    views: Literal["picture", "distorted"] = "picture"
    """What a distortion is compared with: the `picture` itself, or another `distorted` one of it, which is harder."""

    def __post_init__(self) -> None:
        if not 0.01 <= self.temperature <= 10:
            raise ConfigError(f"objective.temperature must lie in [0.01, 10], found {self.temperature}")


@dataclass(frozen=True)
class DuplicateRun(Run):
    """Training of the duplicate detector (`launchers/train_duplicates.py`)."""

    model: DuplicateDetectorConfig = field(default_factory=DuplicateDetectorConfig)
    """Shape of the model."""
    distortions: DistortionConfig = field(default_factory=DistortionConfig)
    """What happens to copies."""
    objective: DuplicateObjective = field(default_factory=DuplicateObjective)
    """The loss."""
