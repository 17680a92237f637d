"""How the stages of an unCLIP are asked on the command line to sample."""

from __future__ import annotations

from dataclasses import dataclass, fields, replace

from dalle_ds.config import ImageSampling
from dalle_ds.config.plain import positive
from dalle_ds.diffusion import step_grid
from dalle_ds.errors import ConfigError
from dalle_ds.sampling.codes import Sampling
from dalle_ds.sampling.embedding_to_image import EmbeddingToImage
from dalle_ds.sampling.prior import PriorSampling
from dalle_ds.sampling.super_resolution import SuperResolution
from dalle_ds.sampling.unclip import Unclip, UnclipSampling


@dataclass(frozen=True)
class UnclipOptions:
    """How the stages of an unCLIP sample; None: as they were exported to."""

    prior_steps: str | None = None
    """Timesteps that the prior visits, as `dalle_ds.diffusion.step_grid` takes them."""
    prior_guidance: float | None = None
    """Classifier-free guidance of the prior; 1 is none."""
    decoder_steps: str | None = None
    """Timesteps that the decoder visits."""
    decoder_guidance: float | None = None
    """Classifier-free guidance of the decoder; 1 is none."""
    upsampler_steps: tuple[str, ...] = ()
    """Timesteps that the first upsampler visits, the second …"""
    tile: int | None = None
    """Side in pixels of the overlapping squares that upsamplers compute one at a time; None: whole images."""
    max_memory: float | None = None
    """GiB of weights on the device at a time, stages taking turns; None: all stay there."""

    def __post_init__(self) -> None:
        positive("unclip", self, "max_memory", "tile")

    @property
    def max_bytes(self) -> int | None:
        """`max_memory` in bytes."""
        return None if self.max_memory is None else int(self.max_memory * 2**30)

    def refuse_all(self, model: str) -> None:
        """Raise a ConfigError where something is given, for a model that is no unCLIP."""
        for entry in fields(self):
            if getattr(self, entry.name) != entry.default:
                found = getattr(self, entry.name)
                raise ConfigError(f"{entry.name}={found} is for an unCLIP, and {model} is none: leave it out")

    def resolved(self, pipe: Unclip, codes: Sampling) -> UnclipSampling:
        """With what the exports say; `codes` are for an autoregressive prior.

        Raises:
            ConfigError: settings of stages that are not there, or that these cannot have.
        """
        if codes.guidance != 1:
            raise ConfigError(f"guidance={codes.guidance}: an unCLIP has decoder_guidance and prior_guidance instead")
        given, have = len(self.upsampler_steps), len(pipe.upsamplers)
        if given > have:
            raise ConfigError(f"upsampler_steps has {given} grids for {have} upsamplers")
        every = zip(pipe.upsamplers, [*self.upsampler_steps, *[None] * (have - given)], strict=True)
        upsamplers = [_changed(stage, steps, None) for stage, steps in every]
        for stage in pipe.upsamplers:
            stage.check_tile(self.tile)
        return UnclipSampling(
            prior=self._of_prior(pipe, codes),
            decoder=_changed(pipe.decoder, self.decoder_steps, self.decoder_guidance),
            upsamplers=tuple(upsamplers),
            tile=self.tile,
        )

    def _of_prior(self, pipe: Unclip, codes: Sampling) -> PriorSampling | Sampling | None:
        if pipe.prior is not None and pipe.prior.kind == "autoregressive":
            if self.prior_steps is not None:
                raise ConfigError("prior_steps are a diffusion prior's, and this one is autoregressive: leave them out")
            return replace(codes, guidance=1.0 if self.prior_guidance is None else self.prior_guidance)
        if codes != Sampling():
            raise ConfigError(
                "temperature, top_k and top_p are for codes, which this unCLIP samples none of: leave them out"
            )
        if pipe.prior is None and (self.prior_steps is not None or self.prior_guidance is not None):
            raise ConfigError(
                "prior_steps and prior_guidance are for a prior, which this unCLIP has none of: leave them out"
            )
        if pipe.prior is None:
            return None
        given = {"steps": self.prior_steps, "guidance": self.prior_guidance}
        known = {name: value for name, value in given.items() if value is not None}
        how: PriorSampling = pipe.prior.resolved(replace(pipe.prior.sampling, **known))  # type: ignore[attr-defined]
        step_grid(how.steps or "", len(pipe.prior.schedule))  # type: ignore[attr-defined]
        return how


def _changed(stage: EmbeddingToImage | SuperResolution, steps: str | None, guidance: float | None) -> ImageSampling:
    sampling = stage.facts.sampling
    step_grid(sampling.steps if steps is None else steps, stage.facts.timesteps)  # refuses it before other stages run
    return replace(
        sampling,
        steps=sampling.steps if steps is None else steps,
        guidance=sampling.guidance if guidance is None else guidance,
    )
