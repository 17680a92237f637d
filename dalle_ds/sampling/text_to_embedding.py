"""Captions to CLIP's image embeddings: a prior with all that using it needs (unCLIP §2.2).

A sample is a function of (seed, its number, its caption), up to the rounding of products of other sizes: by which, in bf16, an
autoregressive prior may come to other codes in another batch.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from dataclasses import replace
from functools import cached_property
from pathlib import Path
from typing import Any, ClassVar, Generic, Literal, TypeVar

import torch
from safetensors.torch import save_file
from torch import Tensor

from dalle_ds.config import from_dict, to_dict
from dalle_ds.diffusion import AnalyticVariance, noise_schedule, step_grid
from dalle_ds.errors import CheckpointError, ConfigError, DataError
from dalle_ds.files import built_beside, write_json
from dalle_ds.models.clip import Clip
from dalle_ds.models.latent_prior import AutoregressivePrior
from dalle_ds.models.latents import EmbeddingScaling, LatentCodec
from dalle_ds.models.pretrained import CONFIG_NAME, export_folder, read_safetensors
from dalle_ds.models.prior import DiffusionPrior
from dalle_ds.models.prior_sampling import DenoisingWeights
from dalle_ds.parsing import parse_json
from dalle_ds.sampling.codes import Sampling, candidate_uniforms
from dalle_ds.sampling.prior import (
    STEPS,
    PriorSampling,
    best_of,
    caption_noise,
    denoise,
    prepare_caption,
    sample_codes,
    trim_padding,
)
from dalle_ds.text.tokenizer import Tokenizer

CLIP_NAME = "clip"
TOKENIZER_NAME = "tokenizer.model"
SPACE_NAME = "embeddings.safetensors"
"""What the prior's numbers mean as embeddings."""
PARTS_NAME = "prior.json"
"""Fingerprints of CLIP and the tokenizer that the prior was trained with, and its noise schedule."""
Prior = TypeVar("Prior", bound=DiffusionPrior | AutoregressivePrior)
How = TypeVar("How", bound=PriorSampling | Sampling)


class TextToEmbedding(ABC, Generic[Prior, How]):
    """Samples image embeddings for captions.

    Args:
        prior: in eval mode, and not changed afterwards; its device is where everything runs.
        clip: whose embeddings it was trained on.
        tokenizer: the one that it was trained with; None where it reads CLIP's tokens.

    Raises:
        CheckpointError: they do not belong together.
    """

    kind: ClassVar[Literal["diffusion", "autoregressive"]]
    how: ClassVar[type[PriorSampling | Sampling]]
    """What says how to sample."""

    def __init__(self, prior: Prior, clip: Clip, tokenizer: Tokenizer | None) -> None:
        if clip.config.embed_dim != prior.config.embed_dim:
            raise CheckpointError(
                f"CLIP's embeddings have {clip.config.embed_dim} dimensions, but the prior was trained with "
                f"{prior.config.embed_dim}: use the CLIP it was trained with"
            )
        self.prior, self.tokenizer = prior, tokenizer
        self.clip = clip.to(self.device)

    @property
    def module(self) -> Prior:
        """What has the weights."""
        return self.prior

    @property
    def device(self) -> torch.device:
        """Where everything runs."""
        return next(self.prior.parameters()).device

    def to(self, device: str | torch.device) -> None:
        """Move the prior; CLIP follows where it is used."""
        before = self.device
        self.prior.to(device)
        if self.device != before:
            self.__dict__.pop("_weights", None)

    @staticmethod
    def from_pretrained(
        path: str | Path,
        device: str | torch.device = "cpu",
        dtype: torch.dtype = torch.float32,
        *,
        clip: Clip | None = None,
    ) -> TextToEmbedding[Any, Any]:
        """Load what a run of either kind of prior exports.

        Args:
            path: the run directory or its export.
            dtype: of the prior's weights; CLIP stays in fp32.
            clip: the one that it was trained with, where the folder has none.

        Raises:
            CheckpointError: something is missing or does not belong together.
        """
        folder = export_folder(path)
        try:
            kind = parse_json((folder / CONFIG_NAME).read_bytes())["kind"]
            parts = dict(parse_json((folder / PARTS_NAME).read_bytes()))
        except (OSError, ValueError, TypeError, KeyError) as error:
            raise CheckpointError(
                f"{folder} is no exported prior: {PARTS_NAME} cannot be read ({error}): name a run of train_prior.py"
            ) from error
        clip = Clip.from_pretrained(folder / CLIP_NAME) if clip is None else clip
        file = folder / TOKENIZER_NAME
        tokenizer = Tokenizer.load(file) if file.is_file() else None
        for name, part in (("clip", clip), ("tokenizer", tokenizer)):
            found = None if part is None else part.fingerprint
            if parts.get(name) != found:
                raise CheckpointError(
                    f"the {name} in {folder} is not the one that the prior was trained with (fingerprint "
                    f"{str(found)[:12]}, trained with {str(parts.get(name))[:12]}): put the right one there, or export again"
                )
        space = read_safetensors(folder / SPACE_NAME)
        try:
            if kind == "latent_prior":
                latent = AutoregressivePrior.from_pretrained(folder).to(device, dtype)
                return LatentTextToEmbedding(latent, clip, tokenizer, LatentCodec.from_state_dict(space))
            scaling = EmbeddingScaling(space["shift"], space["factor"])
            prior = DiffusionPrior.from_pretrained(folder).to(device, dtype)
            return DiffusionTextToEmbedding(
                prior, clip, tokenizer, scaling, parts["schedule"], parts["timesteps"], parts["analytic"],
                from_dict(PriorSampling, parts["sampling"], str(folder / PARTS_NAME)) if "sampling" in parts else None,
            )  # fmt: skip
        except KeyError as error:
            raise CheckpointError(
                f"{folder}: {PARTS_NAME} or {SPACE_NAME} lacks {error}: export the prior again"
            ) from error

    def save_pretrained(self, path: str | Path, *, with_clip: bool = True) -> None:
        """Write what `from_pretrained` reads into folder `path`, whole or not at all; CLIP only if asked.

        Raises:
            CheckpointError: it cannot be written.
        """
        parts = {
            "clip": self.clip.fingerprint,
            "tokenizer": None if self.tokenizer is None else self.tokenizer.fingerprint,
            **self._facts(),
        }
        try:
            with built_beside(Path(path)) as partial:
                self.prior.save_pretrained(partial)
                if with_clip:
                    self.clip.save_pretrained(partial / CLIP_NAME)
                if self.tokenizer is not None:
                    self.tokenizer.save(partial / TOKENIZER_NAME)
                save_file({name: value.contiguous() for name, value in self._space().items()}, partial / SPACE_NAME)
                write_json(partial / PARTS_NAME, parts)
        except OSError as error:
            raise CheckpointError(f"could not write the prior to {path}: {error}; free some space") from error

    @torch.no_grad()
    def sample(
        self,
        captions: Sequence[str],
        num: int = 1,
        *,
        seed: int = 0,
        sampling: How | None = None,
        text_embeddings: Tensor | None = None,
        normalize: bool | None = None,
        batch_size: int = 64,
    ) -> Tensor:
        """Sample `num` image embeddings for each caption.

        Args:
            sampling: None takes that of the export, or else the defaults of the kind.
            text_embeddings: (B, embed_dim), CLIP's of the captions; None computes them.
            normalize: to unit length, otherwise as the prior makes them; None: as the CLIP's `config.unit_length` says.
            batch_size: captions at a time.

        Returns:
            (B, num, embed_dim) fp32.

        Raises:
            ConfigError: `num` is less than 1, or `sampling` is not for this prior.
            DataError: one text in place of a list.
        """
        if isinstance(captions, str):
            raise DataError(f"captions must be a list of texts, found the text {captions[:50]!r}: put it into a list")
        if num < 1:
            raise ConfigError(f"num must be at least 1, found {num}")
        if sampling is not None and not isinstance(sampling, self.how):
            raise ConfigError(f"a prior of kind {self.kind} takes {self.how.__name__}, found {type(sampling).__name__}")
        self.clip.to(self.device)
        found = []
        for start in range(0, len(captions), batch_size):
            some = captions[start : start + batch_size]
            if text_embeddings is None:
                embeddings = self.clip.embed_texts(some)
            else:
                embeddings = text_embeddings[start : start + batch_size].to(self.device)
            found.append(self._sample(some, embeddings, num, seed, sampling))
        samples = torch.cat(found) if found else torch.empty(0, num, self.prior.config.embed_dim)
        return self.clip.scaled(samples, normalize)

    def resolved(self, how: How) -> How:
        """With what it leaves open filled in."""
        return how

    @abstractmethod
    def _sample(self, captions: Sequence[str], embeddings: Tensor, num: int, seed: int, how: How | None) -> Tensor:
        """(B, num, embed_dim), for captions with (B, embed_dim) text embeddings."""

    @abstractmethod
    def _space(self) -> dict[str, Tensor]:
        """Content of `SPACE_NAME`."""

    def _facts(self) -> dict[str, Any]:
        """Content of `PARTS_NAME` besides fingerprints."""
        return {}

    def _tokens(self, captions: Sequence[str]) -> Tensor:
        """(B, text_len) int64 on the prior's device."""
        assert self.tokenizer is not None
        return self.tokenizer.encode_padded(captions, self.prior.config.text_len)[0].to(self.device)


class DiffusionTextToEmbedding(TextToEmbedding[DiffusionPrior, PriorSampling]):
    """Samples by diffusion.

    Args:
        scaling: of the embeddings.
        schedule, timesteps: noise of training.
        analytic: what `tasks/prior.py` measured for Analytic-DPM after training: grid, gamma, standard_error, rows,
            data_variance; None where it did not.
        sampling: where nothing else is said.
    """

    kind = "diffusion"
    how = PriorSampling

    def __init__(
        self,
        prior: DiffusionPrior,
        clip: Clip,
        tokenizer: Tokenizer | None,
        scaling: EmbeddingScaling,
        schedule: str,
        timesteps: int,
        analytic: Mapping[str, Any] | None = None,
        sampling: PriorSampling | None = None,
    ) -> None:
        super().__init__(prior, clip, tokenizer)
        self.scaling, self.analytic, self.sampling = scaling, analytic, sampling or PriorSampling()
        self.schedule = noise_schedule(schedule, timesteps)  # type: ignore[arg-type]
        self.schedule_name = schedule

    def _sample(
        self, captions: Sequence[str], embeddings: Tensor, num: int, seed: int, how: PriorSampling | None
    ) -> Tensor:
        how = self.resolved(how or self.sampling)
        assert how.steps is not None
        text = self.clip.tokens(captions) if self.tokenizer is None else self._tokens(captions)
        caption = prepare_caption(self.prior.config, text, embeddings, self.clip, scaling=self.scaling)
        draws, steps = num * how.best_of, len(step_grid(how.steps, len(self.schedule)))
        noise = caption_noise(captions, seed, draws, steps, self.prior.config.embed_dim)
        variance = self.variance(how.steps) if how.method == "analytic" else None
        scaled = denoise(self.prior, caption, noise, self.schedule, how, variance, self._weights)
        return best_of(self.scaling.unscale(scaled), embeddings, how.best_of)

    @cached_property
    def _weights(self) -> DenoisingWeights:
        return DenoisingWeights(self.prior)

    def resolved(self, how: PriorSampling) -> PriorSampling:
        measured = None if self.analytic is None else str(self.analytic["grid"])
        steps = how.steps or measured or str(min(int(STEPS), len(self.schedule)))
        return replace(how, steps=steps, method=how.method or ("analytic" if steps == measured else "ddpm"))

    def variance(self, steps: str) -> AnalyticVariance:
        """What was measured on the grid `steps`; ConfigError where nothing was."""
        if self.analytic is None or str(self.analytic["grid"]) != str(steps):
            measured = "nothing" if self.analytic is None else f"the grid {self.analytic['grid']}"
            raise ConfigError(
                f"prior_sampling.method=analytic on the grid {steps}, but {measured} was measured after training "
                "(objective.analytic_steps): take that, or prior_sampling.method ddpm or ddim"
            )
        grid = self.schedule.on(step_grid(steps, len(self.schedule)))
        return AnalyticVariance(grid, torch.tensor(self.analytic["gamma"]), self.analytic["data_variance"])

    def _space(self) -> dict[str, Tensor]:
        return self.scaling.state_dict()

    def _facts(self) -> dict[str, Any]:
        facts = {"schedule": self.schedule_name, "timesteps": len(self.schedule), "analytic": self.analytic}
        return {**facts, "sampling": to_dict(self.sampling)}


class LatentTextToEmbedding(TextToEmbedding[AutoregressivePrior, Sampling]):
    """Samples code by code.

    Args:
        codec: of the codes.
    """

    kind = "autoregressive"
    how = Sampling

    def __init__(self, prior: AutoregressivePrior, clip: Clip, tokenizer: Tokenizer | None, codec: LatentCodec) -> None:
        super().__init__(prior, clip, tokenizer)
        self.codec = codec

    def _sample(self, captions: Sequence[str], embeddings: Tensor, num: int, seed: int, how: Sampling | None) -> Tensor:
        count = self.prior.config.components + 1
        uniforms = torch.stack(
            [candidate_uniforms(key, seed, number, count) for key in captions for number in range(num)]
        )
        text = trim_padding(self.prior.config, self._tokens(captions))
        text, embeddings = (part.repeat_interleave(num, dim=0) for part in (text, embeddings))
        samples = sample_codes(self.prior, self.codec, text, embeddings, uniforms, how or Sampling())
        return samples.unflatten(0, (len(captions), num))

    def _space(self) -> dict[str, Tensor]:
        return self.codec.state_dict()
