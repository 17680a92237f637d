"""How the stages of an unCLIP are asked on the command line to sample."""

from __future__ import annotations

from dataclasses import dataclass, fields, replace

from dalle_ds.config import ImageSampling
from dalle_ds.config.plain import positive
from dalle_ds.errors import ConfigError
from dalle_ds.sampling.codes import Sampling
from dalle_ds.sampling.prior import PriorSampling
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
        """With what the exports say; of `codes`, the guidance is the decoder's where nothing else is given, the rest an
        autoregressive prior's."""
        guidance = self.decoder_guidance
        if guidance is None and codes.guidance != 1:
            guidance = codes.guidance
        upsamplers = []
        for number, steps in enumerate(self.upsampler_steps):
            if number >= len(pipe.upsamplers):
                have = len(pipe.upsamplers)
                raise ConfigError(f"upsampler_steps has {len(self.upsampler_steps)} grids for {have} upsamplers")
            upsamplers.append(_changed(pipe.upsamplers[number].facts.sampling, steps, None))
        return UnclipSampling(
            prior=self._of_prior(pipe, codes),
            decoder=_changed(pipe.decoder.facts.sampling, self.decoder_steps, guidance),
            upsamplers=tuple(upsamplers),
            tile=self.tile,
        )

    def _of_prior(self, pipe: Unclip, codes: Sampling) -> PriorSampling | Sampling | None:
        if pipe.prior is not None and pipe.prior.kind == "autoregressive":
            if self.prior_steps is not None:
                raise ConfigError("prior_steps are a diffusion prior's, and this one is autoregressive: leave them out")
            return replace(codes, guidance=1.0 if self.prior_guidance is None else self.prior_guidance)
        if replace(codes, guidance=1.0) != Sampling():
            raise ConfigError(
                "temperature, top_k and top_p are for codes, which this unCLIP samples none of: leave them out"
            )
        if pipe.prior is None and (self.prior_steps is not None or self.prior_guidance is not None):
            raise ConfigError(
                "prior_steps and prior_guidance are for a prior, which this unCLIP has none of: leave them out"
            )
        guidance = 1.0 if self.prior_guidance is None else self.prior_guidance
        return PriorSampling(steps=self.prior_steps, guidance=guidance)


def _changed(sampling: ImageSampling, steps: str | None, guidance: float | None) -> ImageSampling:
    return replace(
        sampling,
        steps=sampling.steps if steps is None else steps,
        guidance=sampling.guidance if guidance is None else guidance,
    )
