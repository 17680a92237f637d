"""What `launchers/evaluate.py` is told."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Annotated, Literal

import tyro

from dalle_ds.config.plain import sound
from dalle_ds.errors import ConfigError
from dalle_ds.sampling import Sampling


@dataclass(frozen=True)
class EvaluateOptions:
    """Measure trained models on a split of prepared data, or generated images against real ones in two folders.

    Every part runs whose model is given: reconstructions and codebook with --dvae; likelihoods and images drawn for captions
    with --transformer; caption matching and the choice among candidates with --clip. Several processes (deepspeed or torchrun)
    divide the work, with the same figures.
    """

    out: str
    """Folder for result.json, evaluation.html and images."""
    data: str | None = None
    """Folder that launchers/prepare_data.py made."""
    split: str = "validation"
    """Split of the data to measure on."""
    transformer: str | None = None
    """Run directory or export of a transformer."""
    dvae: str | None = None
    """Run directory or export of a dVAE."""
    clip: str | None = None
    """Run directory or export of a CLIP: chooses among candidates, and judges where there is no --judge."""
    judge: str | None = None
    """A second CLIP, for CLIP score and retrieval, so that candidates are not judged by the model that chose them."""
    captions: int | None = 30_000
    """Captions to generate images for: a random choice among the split's different ones, all if there are fewer; None: all."""
    best_of: str = "1"
    """Numbers of candidates, as 1,8,64,512: of the first n of each caption, the one that --clip prefers is measured. Empty
    draws no images."""
    reference: Literal["split", "captions"] = "split"
    """Real images that drawn ones are compared with: all of the split, or those of the captions only."""
    inception: str | None = None
    """File pt_inception-2015-12-05-6726825d.pth, by whose features FID and Inception Score are defined (it needs
    torch-fidelity), or a TorchScript archive; without it, an EfficientNet-lite0 is used, and the figures have other names."""
    blur: str = "0,1,2,4,8"
    """Radii of the Gaussian blur of real and generated images before features are taken: standard deviations, pixels."""
    size: int | None = None
    """Side in pixels to which images are resized before they are blurred; None takes that of the models' images."""
    temperature: float = 1.0
    """The logits are divided by it; 0 takes the likeliest code always."""
    top_k: int | None = None
    """Draw among the k likeliest codes only."""
    top_p: float | None = None
    """Draw among the fewest likeliest codes that have this probability together."""
    guidance: float = 1.0
    """Classifier-free guidance; 1 is off."""
    seed: int = 0
    """Of the choice of captions and of the images."""
    pictures: str | None = None
    """Folder that keeps the codes of generated images, for an evaluation that is stopped, or another with the same ones."""
    without: str | None = None
    """JSON of rows that overlap with the training data (launchers/overlap.py): figures come with and without them."""
    real: str | None = None
    """Folder of real images, instead of data and models."""
    fake: str | None = None
    """Folder of generated images, to be compared with those in --real."""
    device: Literal["auto", "cpu", "cuda"] = "auto"
    """Where to compute; auto takes GPUs where there are any."""
    dtype: Literal["auto", "fp32", "bf16"] = "auto"
    """Arithmetic of the transformer when it draws, and of its likelihoods; auto takes that of the codes in --pictures,
    else what the device computes fastest.
    Results of different ones are not compared."""

    def __post_init__(self) -> None:
        sound(self)
        _ = self.sampling, self.radii, self.numbers
        for name in ("captions", "size"):
            value = getattr(self, name)
            if value is not None and value < 1:
                raise ConfigError(f"{name} must be at least 1, found {value}")
        if (self.real is None) != (self.fake is None):
            raise ConfigError("--real and --fake belong together: name a folder of real and one of generated images")
        models = [name for name in ("transformer", "dvae", "clip", "judge") if getattr(self, name) is not None]
        if self.real is not None:
            if self.data is not None or models:
                raise ConfigError("--real and --fake compare two folders: leave --data and the models out")
        elif self.data is None:
            raise ConfigError(
                "nothing to measure on: name prepared data with --data, or two folders with --real, --fake"
            )
        elif not models:
            raise ConfigError("nothing to measure: give --transformer, --dvae or --clip, or several of them")
        if self.transformer is not None and max(self.numbers, default=1) > 1 and self.clip is None:
            raise ConfigError(f"--best_of {self.best_of} needs a model that chooses: name one with --clip")

    @property
    def sampling(self) -> Sampling:
        """How codes are drawn."""
        return Sampling(self.temperature, self.top_k, self.top_p, self.guidance)

    @property
    def radii(self) -> list[float]:
        """`blur` as numbers, in increasing order."""
        radii = sorted(set(_numbers("blur", self.blur)))
        if not radii or radii[0] < 0 or not all(map(math.isfinite, radii)):
            raise ConfigError(f"blur must be radii of 0 or greater, as 0,1,2, found {self.blur!r}")
        return radii

    @property
    def numbers(self) -> list[int]:
        """`best_of` as numbers, in increasing order."""
        numbers = sorted(set(_numbers("best_of", self.best_of)))
        if any(number < 1 or number != int(number) for number in numbers):
            raise ConfigError(f"best_of must be whole numbers of at least 1, as 1,8,64, found {self.best_of!r}")
        return [int(number) for number in numbers]


@dataclass(frozen=True)
class CompareOptions:
    """Show the figures of two evaluations side by side, if they were measured by one protocol."""

    results: tyro.conf.Positional[tuple[str, str]]
    """Two files result.json."""
    allow: Annotated[tuple[str, ...], tyro.conf.UseAppendAction] = ()
    """Field of the protocol that may differ, such as generation.sampling.guidance; given again, another one."""


def _numbers(name: str, text: str) -> list[float]:
    try:
        return [float(part) for part in text.split(",") if part.strip()]
    except ValueError as error:
        raise ConfigError(f"{name} must be numbers with commas between them, found {text!r}") from error
