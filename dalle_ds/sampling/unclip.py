"""Captions to images by all of unCLIP's stages: prior, decoder, upsamplers (unCLIP §2).

A folder has all of them:

    unclip.json      what it is, and the fingerprint of its CLIP
    clip/            whose embeddings the stages speak of
    prior/           may be missing: embeddings of captions then stand in for those of images
    decoder/
    upsampler_1/ …   as many as there are
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from functools import cached_property, partial
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol

import torch
from PIL import Image
from torch import Tensor, nn

from dalle_ds.config import ImageSampling
from dalle_ds.errors import CheckpointError, ConfigError, DataError
from dalle_ds.files import built_beside, write_json
from dalle_ds.models.card import write_card
from dalle_ds.models.clip import Clip
from dalle_ds.models.pretrained import fingerprint
from dalle_ds.parsing import parse_json
from dalle_ds.sampling import manipulations
from dalle_ds.sampling.candidates import ClipReranker, checked_scores
from dalle_ds.sampling.codes import Sampling
from dalle_ds.sampling.embedding_to_image import EmbeddingToImage
from dalle_ds.sampling.grid import to_pil_images
from dalle_ds.sampling.image_diffusion import Known, OnStep
from dalle_ds.sampling.pipeline import usable_device
from dalle_ds.sampling.prior import PriorSampling
from dalle_ds.sampling.super_resolution import SuperResolution
from dalle_ds.sampling.text_to_embedding import CLIP_NAME, TextToEmbedding

if TYPE_CHECKING:
    from dalle_ds.sampling.candidates import Reranker

UNCLIP_NAME = "unclip.json"
PRIOR_NAME, DECODER_NAME = "prior", "decoder"
OnStage = Callable[[str, int, int], None]
"""Told of a stage's name ("prior", "decoder", "upsampler_1" …), how much of it is done, of how much."""


@dataclass(frozen=True)
class UnclipSampling:
    """How each stage samples; None: as its export says."""

    prior: PriorSampling | Sampling | None = None
    """For the prior's kind."""
    decoder: ImageSampling | None = None
    upsamplers: tuple[ImageSampling | None, ...] = ()
    """Of the first, the second …; those beyond sample as their exports say."""
    tile: int | None = None
    """As `SuperResolution.sample` takes it."""


class Movable(Protocol):
    """A stage, or CLIP."""

    def to(self, device: torch.device) -> Any:
        """Move it."""


@dataclass
class Residents:
    """What takes turns on a device.

    Args:
        device: where stages compute.
        max_bytes: of the weights that may be there at a time; None: no bound.
    """

    device: torch.device
    max_bytes: int | None = None
    here: list[tuple[Movable, int]] = field(default_factory=list)

    def bring(self, *wanted: tuple[Movable, int]) -> None:
        """Move these, with their bytes, to the device; what was used longest ago goes to main memory where there is no room.

        Raises:
            ConfigError: these alone are too large.
        """
        needed = sum(size for _, size in wanted)
        if self.max_bytes is not None and needed > self.max_bytes:
            raise ConfigError(f"max_memory={self.max_bytes:,} bytes is too little: a stage has weights of {needed:,}")
        rest = [one for one in self.here if all(one[0] is not other for other, _ in wanted)]
        while self.max_bytes is not None and rest and needed + sum(size for _, size in rest) > self.max_bytes:
            rest.pop(0)[0].to(torch.device("cpu"))
        for one, _ in wanted:
            one.to(self.device)
        self.here = [*rest, *wanted]


class Unclip:
    """Generates images for prompts.

    Args:
        clip: whose embeddings the stages were trained on, with its tokenizer.
        decoder: makes images of embeddings.
        prior: makes embeddings of captions; None: those of captions themselves stand in.
        upsamplers: each takes what the one before makes.
        device: where stages compute.
        max_memory: bytes of weights that may be there at a time; stages then take turns. None: all stay there.

    Raises:
        CheckpointError: the parts do not belong together.
    """

    def __init__(
        self,
        clip: Clip,
        decoder: EmbeddingToImage,
        prior: TextToEmbedding[Any, Any] | None = None,
        upsamplers: Sequence[SuperResolution] = (),
        device: str | torch.device = "cpu",
        max_memory: int | None = None,
    ) -> None:
        self.clip, self.decoder, self.prior, self.upsamplers = clip, decoder, prior, tuple(upsamplers)
        if clip.tokenizer is None:
            raise CheckpointError("this CLIP has no tokenizer, so it cannot read captions: export it with one")
        trained = {"decoder": decoder.clip_fingerprint}
        if prior is not None:
            trained["prior"] = prior.clip.fingerprint
        for name, found in trained.items():
            if found != clip.fingerprint:
                raise CheckpointError(
                    f"the {name} was trained on embeddings of another CLIP (fingerprint {found[:12]}) than this one "
                    f"({clip.fingerprint[:12]}): take one that was trained on the same"
                )
        side = decoder.decoder.config.image_size
        for number, stage in enumerate(self.upsamplers, start=1):
            config = stage.upsampler.config
            if config.low_size != side:
                raise CheckpointError(
                    f"upsampler {number} takes images of {config.low_size} pixels, and the stage before makes {side}: take "
                    "one that fits"
                )
            side = config.image_size
        self.image_size: int = side
        """Side in pixels of the images that it makes."""
        self.residents = Residents(usable_device(device), max_memory)
        if max_memory is None:
            for part in (clip, prior, decoder, *self.upsamplers):
                if part is not None:
                    self.bring(part)

    # --- files

    @classmethod
    def from_runs(
        cls,
        decoder: str | Path,
        prior: str | Path | None = None,
        upsamplers: Sequence[str | Path] = (),
        clip: str | Path | None = None,
    ) -> Unclip:
        """Put runs or exports of the stages together.

        Args:
            clip: needed where there is no prior, which has it; with a prior, it must be the same.

        Raises:
            CheckpointError: something is missing or does not belong together.
            ConfigError: neither a prior nor a CLIP.
        """
        if clip is None and prior is None:
            raise ConfigError(
                "without a prior, a CLIP is needed: name the one whose embeddings the decoder was trained on"
            )
        given = None if clip is None else Clip.from_pretrained(clip)
        first = None if prior is None else TextToEmbedding.from_pretrained(prior, clip=given)
        read = first.clip if first is not None else given
        assert read is not None
        second = EmbeddingToImage.from_pretrained(decoder, clip=read)
        return cls(read, second, first, [SuperResolution.from_pretrained(path) for path in upsamplers])

    @classmethod
    def from_pretrained(
        cls,
        path: str | Path,
        device: str | torch.device = "cpu",
        dtype: torch.dtype = torch.float32,
        *,
        max_memory: int | None = None,
    ) -> Unclip:
        """Load a folder that `save_pretrained` wrote.

        Args:
            dtype: of the weights of prior, decoder and upsamplers; CLIP stays in fp32.
            device, max_memory: see the class.

        Raises:
            CheckpointError: something is missing or does not belong together.
        """
        folder = Path(path)
        if not is_unclip(folder):
            raise CheckpointError(f"{folder} has no {UNCLIP_NAME}: name a folder that launchers/export_unclip.py wrote")
        try:
            parts = dict(parse_json((folder / UNCLIP_NAME).read_bytes()))
            names, wanted = [str(name) for name in parts["stages"]], str(parts["clip"])
        except (OSError, ValueError, TypeError, KeyError) as error:
            raise CheckpointError(
                f"{folder / UNCLIP_NAME} cannot be read ({error}): put the stages together again"
            ) from error
        clip = Clip.from_pretrained(folder / CLIP_NAME)
        if clip.fingerprint != wanted:
            raise CheckpointError(
                f"the clip in {folder} is not the one that the stages were trained with: put that one there"
            )
        prior = None
        if PRIOR_NAME in names:
            prior = TextToEmbedding.from_pretrained(folder / PRIOR_NAME, dtype=dtype, clip=clip)
        decoder = EmbeddingToImage.from_pretrained(folder / DECODER_NAME, dtype=dtype, clip=clip)
        upsamplers = [
            SuperResolution.from_pretrained(folder / name, dtype=dtype)
            for name in names
            if name.startswith("upsampler_")
        ]
        return cls(clip, decoder, prior, upsamplers, device, max_memory)

    def save_pretrained(self, path: str | Path) -> None:
        """Write what `from_pretrained` reads into folder `path`, whole or not at all; CheckpointError where it cannot be."""
        try:
            with built_beside(Path(path)) as partial:
                self.clip.save_pretrained(partial / CLIP_NAME)
                for name, stage in self.stages.items():
                    # CLIP is there once for all that read its states.
                    shared = {} if name.startswith("upsampler") else {"with_clip": False}
                    stage.save_pretrained(partial / name, **shared)
                description = {"kind": "unclip", "clip": self.clip.fingerprint, "stages": list(self.stages)}
                write_json(partial / UNCLIP_NAME, description)
                write_card(partial, "unclip", {"Stages": "\n".join(f"- `{name}`" for name in self.stages)})
        except OSError as error:
            raise CheckpointError(f"could not write the model to {path}: {error}; free some space") from error

    # --- images

    @torch.no_grad()
    def generate(
        self,
        prompts: str | Sequence[str],
        num: int = 1,
        *,
        seed: int = 0,
        sampling: UnclipSampling | None = None,
        rerank: Reranker | Clip | None = None,
        keep: int | None = None,
        batch_size: int = 16,
        on_stage: OnStage | None = None,
    ) -> list[list[Image.Image]]:
        """Sample `num` images for each prompt.

        Args:
            prompts: one or several.
            seed: image i of a prompt depends on the seed, i and the prompt only, not on what is sampled beside it, up to the
                rounding of products of other sizes.
            rerank: given, each prompt's images are sorted by its scores, best first.
            keep: how many of the reranked images to return; None: all.
            batch_size: images of the decoder at a time; upsamplers take as many fewer as theirs are larger.
            on_stage: told how far each stage is.

        Returns:
            One list of images per prompt.

        Raises:
            ConfigError: an argument out of range.
            DataError: no prompt, or a reranker that does not give one score per image.
        """
        prompts = [prompts] if isinstance(prompts, str) else list(prompts)
        if not prompts:
            raise DataError("no prompt was given: name at least one")
        if keep is not None and (rerank is None or not 1 <= keep <= num):
            raise ConfigError(f"keep={keep} takes the best of num={num} by rerank: give rerank, and keep from 1 to num")
        embeddings = self.embed(prompts, num, seed=seed, sampling=sampling, on_stage=on_stage)
        captions = [prompt for prompt in prompts for _ in range(num)]
        numbers = list(range(num)) * len(prompts)
        pixels = self.decode(
            captions,
            embeddings.flatten(0, 1),
            numbers,
            seed=seed,
            sampling=sampling,
            batch_size=batch_size,
            on_stage=on_stage,
        )
        found = [to_pil_images(some) for some in pixels.split(num)]
        if rerank is None:
            return found
        score = ClipReranker(rerank) if isinstance(rerank, Clip) else rerank
        if isinstance(rerank, Clip):
            self.residents.bring((rerank, _bytes(rerank)))
        sorted_images = []
        for prompt, images in zip(prompts, found, strict=True):
            scores = checked_scores(score(prompt, images), prompt, len(images))
            order = sorted(range(num), key=lambda place, of=scores: -of[place])  # type: ignore[misc]
            sorted_images.append([images[place] for place in order[:keep]])
        return sorted_images

    @torch.no_grad()
    def embed(
        self,
        prompts: Sequence[str],
        num: int = 1,
        *,
        seed: int = 0,
        sampling: UnclipSampling | None = None,
        on_stage: OnStage | None = None,
    ) -> Tensor:
        """(P, num, embed_dim) image embeddings of length 1, sampled by the prior; without one, `num` times the caption's."""
        if num < 1:
            raise ConfigError(f"num must be at least 1, found {num}")
        if self.prior is None:
            self.bring(self.clip)
            return self.clip.embed_texts(list(prompts))[:, None].expand(-1, num, -1)
        self.bring(self.prior)
        how = None if sampling is None else sampling.prior
        found = []
        for done, start in enumerate(range(0, len(prompts), PRIOR_BATCH)):
            if on_stage is not None:
                on_stage(PRIOR_NAME, done * PRIOR_BATCH, len(prompts))
            found.append(self.prior.sample(prompts[start : start + PRIOR_BATCH], num, seed=seed, sampling=how))
        if on_stage is not None:
            on_stage(PRIOR_NAME, len(prompts), len(prompts))
        return torch.cat(found)

    @torch.no_grad()
    def decode(
        self,
        captions: Sequence[str],
        embeddings: Tensor | None,
        numbers: Sequence[int] | None = None,
        *,
        seed: int = 0,
        sampling: UnclipSampling | None = None,
        read_captions: bool = True,
        batch_size: int = 16,
        on_stage: OnStage | None = None,
        known: Callable[[int], Known] | None = None,
    ) -> Tensor:
        """Images of embeddings and captions, through all upsamplers; arguments as `EmbeddingToImage.sample`.

        Args:
            known: of a stage's side in pixels, what its images are to have.

        Returns:
            (B, 3, image_size, image_size) fp32 in [0, 1], on the CPU.
        """
        sampling = sampling or UnclipSampling()
        self.bring(self.decoder)
        pixels = self.decoder.sample(
            captions, embeddings, seed=seed, numbers=numbers, read_captions=read_captions, sampling=sampling.decoder,
            batch_size=batch_size, on_step=self.told(on_stage, 0),
            known=None if known is None else known(self.decoder.decoder.config.image_size),
        )  # fmt: skip
        settings = [*sampling.upsamplers, *[None] * len(self.upsamplers)]
        for number, (stage, how) in enumerate(zip(self.upsamplers, settings, strict=False), start=1):
            self.bring(stage)
            fewer = max(1, batch_size // stage.upsampler.config.scale**2)
            pixels = stage.sample(
                pixels, captions, seed=seed, numbers=numbers, sampling=how, tile=sampling.tile, batch_size=fewer,
                on_step=self.told(on_stage, number),
                known=None if known is None else known(stage.upsampler.config.image_size),
            )  # fmt: skip
        return pixels

    # --- images changed

    invert, reconstruct, vary = manipulations.invert, manipulations.reconstruct, manipulations.vary
    interpolate, edit, inpaint = manipulations.interpolation, manipulations.edit, manipulations.inpaint
    project, typography = manipulations.project, manipulations.typography

    # --- stages

    def fingerprints(self) -> dict[str, str]:
        """SHA-256 of the weights of each stage, by name; "clip" is CLIP's."""
        return dict(self._fingerprints)

    @cached_property
    def _fingerprints(self) -> dict[str, str]:
        weights = {name: fingerprint(stage.module.state_dict()) for name, stage in self.stages.items()}
        return {"clip": self.clip.fingerprint, **weights}

    @property
    def stages(self) -> dict[str, Any]:
        """Prior, if any, decoder and upsamplers, by the names of their folders in an export."""
        prior = {} if self.prior is None else {PRIOR_NAME: self.prior}
        upsamplers = {f"upsampler_{number}": stage for number, stage in enumerate(self.upsamplers, start=1)}
        return {**prior, DECODER_NAME: self.decoder, **upsamplers}

    def told(self, on_stage: OnStage | None, number: int) -> OnStep | None:
        """What the decoder (0) or upsampler `number` tells of its steps, for `on_stage`."""
        if on_stage is None:
            return None
        return partial(on_stage, f"upsampler_{number}" if number else DECODER_NAME)

    def bring(self, stage: Clip | TextToEmbedding[Any, Any] | EmbeddingToImage | SuperResolution) -> None:
        """Have a stage, or CLIP, on the device."""
        reads_clip = isinstance(stage, TextToEmbedding) or (
            isinstance(stage, EmbeddingToImage) and stage.clip is not None
        )
        wanted: list[tuple[Movable, int]] = [(self.clip, _bytes(self.clip))] if reads_clip else []
        module = stage if isinstance(stage, nn.Module) else stage.module
        self.residents.bring(*wanted, (stage, _bytes(module)))


PRIOR_BATCH = 64
"""Captions that the prior reads at a time."""


def is_unclip(path: str | Path) -> bool:
    """Whether a folder is one of these, and not a DALL·E's."""
    return (Path(path) / UNCLIP_NAME).is_file()


def _bytes(module: nn.Module) -> int:
    return sum(value.numel() * value.element_size() for value in module.state_dict().values())
