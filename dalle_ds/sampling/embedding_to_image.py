"""CLIP's image embeddings to images: unCLIP's decoder with all that using it needs (unCLIP §2.1)."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path

import torch
from torch import Tensor

from dalle_ds.config import ImageSampling
from dalle_ds.diffusion import guide
from dalle_ds.errors import CheckpointError, DataError
from dalle_ds.files import built_beside
from dalle_ds.models.clip import Clip
from dalle_ds.models.decoder import Condition, UnclipDecoder
from dalle_ds.models.pretrained import export_folder
from dalle_ds.sampling.image_diffusion import (
    DiffusionFacts,
    Known,
    OnStep,
    denoise_images,
    image_generators,
    invert_images,
    of_all,
)
from dalle_ds.sampling.prior import prepare_caption
from dalle_ds.sampling.text_to_embedding import CLIP_NAME, TOKENIZER_NAME
from dalle_ds.text.tokenizer import Tokenizer


class EmbeddingToImage:
    """Samples images from embeddings, captions, or both.

    Args:
        decoder: in eval mode; its device is where everything runs.
        tokenizer: the one that it was trained with; None where it reads CLIP's states.
        clip: whose states it reads; None where it reads tokens.
        clip_fingerprint: of the CLIP whose embeddings it was trained on.
        facts: of its training.
    """

    def __init__(
        self,
        decoder: UnclipDecoder,
        tokenizer: Tokenizer | None,
        clip: Clip | None,
        clip_fingerprint: str,
        facts: DiffusionFacts,
    ) -> None:
        self.decoder, self.tokenizer, self.clip = decoder, tokenizer, clip
        self.clip_fingerprint, self.facts = clip_fingerprint, facts

    @property
    def device(self) -> torch.device:
        """Where everything runs."""
        return next(self.decoder.parameters()).device

    @property
    def module(self) -> UnclipDecoder:
        """What has the weights."""
        return self.decoder

    def to(self, device: str | torch.device) -> None:
        """Move the model."""
        self.decoder.to(device)

    @classmethod
    def from_pretrained(
        cls,
        path: str | Path,
        device: str | torch.device = "cpu",
        dtype: torch.dtype = torch.float32,
        *,
        clip: Clip | None = None,
    ) -> EmbeddingToImage:
        """Load what a run of launchers/train_decoder.py exports.

        Args:
            path: the run directory or its export.
            dtype: of the decoder's weights.
            clip: whose embeddings it was trained on, where the folder need not have one.

        Raises:
            CheckpointError: something is missing or does not belong together.
        """
        folder = export_folder(path)
        facts, parts = DiffusionFacts.read(folder)
        decoder = UnclipDecoder.from_pretrained(folder).to(device, dtype)
        file = folder / TOKENIZER_NAME
        tokenizer = Tokenizer.load(file) if file.is_file() else None
        if decoder.config.text == "tokens":
            clip = None if clip is None or clip.fingerprint == parts.get("clip") else clip
        elif clip is None:
            clip = Clip.from_pretrained(folder / CLIP_NAME)
        for name, part in (("clip", clip), ("tokenizer", tokenizer)):
            if part is not None and part.fingerprint != parts.get(name):
                raise CheckpointError(
                    f"the {name} of {folder} is not the one that the decoder was trained with (fingerprint "
                    f"{part.fingerprint[:12]}, trained with {str(parts.get(name))[:12]}): put the right one there"
                )
        if decoder.config.text == "tokens" and tokenizer is None:
            raise CheckpointError(f"{folder} has no {TOKENIZER_NAME}: export the decoder again")
        return cls(decoder, tokenizer, clip, str(parts.get("clip")), facts)

    def save_pretrained(self, path: str | Path, *, with_clip: bool = True) -> None:
        """Write what `from_pretrained` reads into folder `path`, whole or not at all.

        Args:
            with_clip: whether CLIP is among it, where captions are read as its states.

        Raises:
            CheckpointError: it cannot be written.
        """
        tokenizer = None if self.tokenizer is None else self.tokenizer.fingerprint
        try:
            with built_beside(Path(path)) as partial:
                self.decoder.save_pretrained(partial)
                if self.tokenizer is not None:
                    self.tokenizer.save(partial / TOKENIZER_NAME)
                if self.clip is not None and with_clip:
                    self.clip.save_pretrained(partial / CLIP_NAME)
                self.facts.write(partial, clip=self.clip_fingerprint, tokenizer=tokenizer)
        except OSError as error:
            raise CheckpointError(f"could not write the decoder to {path}: {error}; free some space") from error

    @torch.no_grad()
    def sample(
        self,
        captions: Sequence[str],
        embeddings: Tensor | None,
        *,
        seed: int = 0,
        numbers: Sequence[int] | None = None,
        keys: Sequence[str] | None = None,
        read_captions: bool = True,
        sampling: ImageSampling | None = None,
        batch_size: int = 16,
        on_step: OnStep | None = None,
        start: Tensor | None = None,
        known: Known | None = None,
    ) -> Tensor:
        """Sample an image for each row.

        Args:
            embeddings: (B, embed_dim), CLIP's of images; None: of captions alone.
            seed, numbers, keys: choose image i's noise: the seed, numbers[i] (0 where None) and keys[i] (its caption where
                None).
            read_captions: False: of embeddings alone; captions then only choose the noise.
            sampling: None takes that of the export.
            batch_size: images at a time.
            on_step: told of steps done, over all images.
            start, known: as `denoise_images` takes them.

        Returns:
            (B, 3, image_size, image_size) fp32 in [0, 1], on the CPU.

        Raises:
            DataError: another number of embeddings than captions.
        """
        if embeddings is not None and len(embeddings) != len(captions):
            raise DataError(f"{len(captions)} captions need as many embeddings, found {len(embeddings)}")
        sampling, size = sampling or self.facts.sampling, self.decoder.config.image_size
        generators = image_generators("decoder", keys or captions, seed, numbers)
        found, chunks = [], range(0, len(captions), batch_size)
        for number, first in enumerate(chunks):
            chunk = slice(first, first + batch_size)
            given = None if embeddings is None else embeddings[chunk]
            images = denoise_images(
                self._predictor(captions[chunk], given, read_captions, sampling.guidance),
                (3, size, size),
                generators[chunk],
                self.facts,
                sampling,
                self.device,
                on_step=of_all(on_step, number, len(chunks)),
                start=None if start is None else start[chunk],
                known=None if known is None else known.of(chunk),
            )
            found.append(images.cpu())
        return (torch.cat(found) + 1) / 2 if found else torch.empty(0, 3, size, size)

    @torch.no_grad()
    def invert(
        self,
        images: Tensor,
        embeddings: Tensor,
        captions: Sequence[str] | None = None,
        *,
        steps: str,
        iterations: int = 0,
        batch_size: int = 16,
        on_step: OnStep | None = None,
    ) -> Tensor:
        """Noise of which `sample`, by DDIM with η = 0, no guidance and the same embeddings and captions, makes images again.

        Args:
            images: (B, 3, image_size, image_size) in [0, 1].
            captions: read beside the embeddings; None: not read.
            steps, iterations: as `invert_images` takes them.

        Returns:
            (B, 3, image_size, image_size) fp32, on the CPU.
        """
        found, chunks = [], range(0, len(images), batch_size)
        for number, first in enumerate(chunks):
            chunk = slice(first, first + batch_size)
            signed = images[chunk].to(self.device) * 2 - 1
            given = [""] * len(signed) if captions is None else captions[chunk]
            predict = self._predictor(given, embeddings[chunk], captions is not None, 1.0)
            told = of_all(on_step, number, len(chunks))
            found.append(invert_images(predict, signed, self.facts, steps, iterations, on_step=told).cpu())
        return torch.cat(found)

    def _predictor(
        self, captions: Sequence[str], embeddings: Tensor | None, read_captions: bool, guidance: float
    ) -> Callable[[Tensor, int], Tensor]:
        """What the decoder predicts for these rows, of x_t and a timestep, guided."""
        condition = self.condition(captions, embeddings, read_captions)
        guided = guidance != 1
        if guided:
            condition = _both(condition, self.condition(captions, None, False))

        def predict(x: Tensor, timestep: int) -> Tensor:
            x = torch.cat([x, x]) if guided else x
            steps = torch.full((len(x),), timestep, device=x.device)
            output = self.decoder.denoise(x, steps, condition)
            if not guided:
                return output
            conditional, null = output.chunk(2)
            return guide(conditional, null, guidance, channels=3)

        return predict

    def condition(self, captions: Sequence[str], embeddings: Tensor | None, read_captions: bool = True) -> Condition:
        """What the decoder is told of each row; None and False: nulls."""
        config = self.decoder.config
        rows = len(captions)
        everywhere = torch.ones(rows, dtype=torch.bool, device=self.device)
        of_text = torch.zeros(rows, config.embed_dim, device=self.device)
        if self.tokenizer is not None:
            text = self.tokenizer.encode_padded(captions, config.text_len)[0].to(self.device)
        else:
            assert self.clip is not None
            self.clip.to(self.device)
            text, of_text = self.clip.tokens(captions), self.clip.embed_texts(captions)
        caption = prepare_caption(config, text, of_text, self.clip)
        given = torch.zeros_like(of_text) if embeddings is None else embeddings.to(self.device)
        return self.decoder.condition(
            given,
            caption,
            everywhere if embeddings is None else None,
            None if read_captions else everywhere,
        )


def _both(one: Condition, other: Condition) -> Condition:
    keep = None if one.keep is None or other.keep is None else torch.cat([one.keep, other.keep])
    return Condition(torch.cat([one.context, other.context]), torch.cat([one.added, other.added]), keep)
