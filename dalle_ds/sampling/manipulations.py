"""Images changed through their latents, and what CLIP sees in them (unCLIP §3 and §4): methods of `Unclip`."""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image, ImageDraw, ImageOps
from torch import Tensor

from dalle_ds.config import ImageSampling
from dalle_ds.errors import ConfigError, DataError
from dalle_ds.models.latents import EmbeddingMoments
from dalle_ds.sampling.completion import open_image
from dalle_ds.sampling.grid import LabelFont, to_pil_images
from dalle_ds.sampling.image_diffusion import Known, image_generators
from dalle_ds.sampling.latent import (
    BipartiteLatent,
    component_counts,
    interpolate,
    reduce_components,
    text_diff,
)

if TYPE_CHECKING:
    from dalle_ds.sampling.unclip import OnStage, Unclip, UnclipSampling

ImageSource = str | Path | Image.Image
"""A file, or an image of any size and mode, of which the central square is used."""
Images = list[Image.Image]


# --- there and back


@torch.no_grad()
def invert(
    self: Unclip,
    images: Sequence[ImageSource],
    captions: Sequence[str] | None = None,
    *,
    steps: str = "25",
    iterations: int = 1,
    batch_size: int = 16,
    on_stage: OnStage | None = None,
) -> BipartiteLatent:
    """The latents of images: z_i, and x_T of every stage by DDIM inversion (unCLIP §3, ADM App. F).

    Args:
        images: of which the central squares are used.
        captions: that the decoder reads beside; None: none.
        steps: grid of every stage; the more, the nearer `reconstruct` comes.
        iterations: corrections of each step, by which fewer steps do; each costs as much as a step.
        batch_size: images of the decoder at a time.

    Raises:
        DataError: an image that cannot be read; another number of captions.
    """
    if captions is not None and len(captions) != len(images):
        raise DataError(f"{len(images)} images need as many captions, found {len(captions)}")
    opened = [open_image(image, self.image_size) for image in images]
    self.bring(self.clip)
    embeddings = self.clip.embed_images(opened).cpu()
    pixels = pixels_of(opened)
    self.bring(self.decoder)
    low = shrink_to(pixels, self.decoder.decoder.config.image_size)
    noise = [
        self.decoder.invert(
            low, embeddings, captions, steps=steps, iterations=iterations, batch_size=batch_size,
            on_step=self.told(on_stage, 0),
        )
    ]  # fmt: skip
    for number, stage in enumerate(self.upsamplers, start=1):
        self.bring(stage)
        high = shrink_to(pixels, stage.upsampler.config.image_size)
        fewer = max(1, batch_size // stage.upsampler.config.scale**2)
        noise.append(
            stage.invert(
                high, low, steps=steps, iterations=iterations, batch_size=fewer, on_step=self.told(on_stage, number)
            )
        )
        low = high
    return BipartiteLatent(
        embeddings,
        tuple(noise),
        tuple(hashlib.sha256(image.tobytes()).hexdigest() for image in opened),
        steps,
        None if captions is None else tuple(captions),
        {
            **{name: found for name, found in self.fingerprints().items() if name != "prior"},
            "iterations": str(iterations),
        },
    )


@torch.no_grad()
def reconstruct(
    self: Unclip,
    latent: BipartiteLatent,
    *,
    eta: float = 0.0,
    seed: int = 0,
    numbers: Sequence[int] | None = None,
    batch_size: int = 16,
    on_stage: OnStage | None = None,
) -> Tensor:
    """Images of latents, by DDIM without guidance or clipping, as `invert` assumes.

    Args:
        eta: 0 makes of `invert`'s latents their images; the more, the further from them, about what z_i says (unCLIP §3.1).
        seed, numbers: choose the noise of steps where η > 0: the seed, numbers[i] (0 where None), and the image's key.

    Returns:
        (B, 3, image_size, image_size) fp32 in [0, 1], on the CPU.

    Raises:
        DataError: latents of a model with other stages.
    """
    sides = [self.decoder.decoder.config.image_size, *(each.upsampler.config.image_size for each in self.upsamplers)]
    if [each.shape[-1] for each in latent.noise] != sides:
        found = ", ".join(str(each.shape[-1]) for each in latent.noise)
        raise DataError(f"the latents are of stages of {found} pixels, and this model's make {sides}: invert again")
    sampling = ImageSampling("ddim", latent.steps, eta, threshold="none")
    self.bring(self.decoder)
    pixels = self.decoder.sample(
        latent.captions or [""] * len(latent), latent.embeddings, seed=seed, numbers=numbers, keys=latent.keys,
        read_captions=latent.captions is not None, sampling=sampling, batch_size=batch_size,
        on_step=self.told(on_stage, 0), start=latent.noise[0],
    )  # fmt: skip
    for number, stage in enumerate(self.upsamplers, start=1):
        self.bring(stage)
        fewer = max(1, batch_size // stage.upsampler.config.scale**2)
        pixels = stage.sample(
            pixels, latent.keys, seed=seed, numbers=numbers, sampling=sampling, batch_size=fewer,
            on_step=self.told(on_stage, number), start=latent.noise[number],
        )  # fmt: skip
    return pixels


def vary(
    self: Unclip,
    latent: BipartiteLatent,
    num: int = 4,
    *,
    eta: float = 1.0,
    seed: int = 0,
    batch_size: int = 16,
    on_stage: OnStage | None = None,
) -> list[Images]:
    """`num` variations of each image: what z_i says stays, the rest changes the more, the greater η is (unCLIP §3.1).

    Raises:
        ConfigError: `num` less than 1, or η outside of [0, 1].
    """
    if num < 1:
        raise ConfigError(f"num must be at least 1, found {num}")
    rows = [row for row in range(len(latent)) for _ in range(num)]
    numbers = list(range(num)) * len(latent)
    pixels = reconstruct(
        self, latent.take(rows), eta=eta, seed=seed, numbers=numbers, batch_size=batch_size, on_stage=on_stage
    )
    return [to_pil_images(some) for some in pixels.split(num)]


# --- ways through the latents


def interpolation(
    self: Unclip,
    latent: BipartiteLatent,
    frames: int = 9,
    *,
    fixed_noise: bool = False,
    seed: int = 0,
    batch_size: int = 16,
    on_stage: OnStage | None = None,
) -> Images:
    """The way from each image to the next (unCLIP §3.2).

    Args:
        frames: from one image to the next, both counted.
        fixed_noise: one noise, drawn by `seed`, for all frames, in place of that between the images': another way for each
            seed, whose ends are no reconstructions.
    """
    noise = None
    if fixed_noise:
        noise = [
            torch.randn(1, *each.shape[1:], generator=image_generators(f"x_T {number}", [""], seed)[0])
            for number, each in enumerate(latent.noise)
        ]
    way = interpolate(latent, frames, fixed_noise=noise)
    return to_pil_images(reconstruct(self, way, batch_size=batch_size, on_stage=on_stage))


def edit(
    self: Unclip,
    latent: BipartiteLatent,
    target: str,
    baseline: str | Sequence[str] | None = None,
    thetas: Sequence[float] = (0.0, 0.125, 0.25, 0.375, 0.5),
    *,
    batch_size: int = 16,
    on_stage: OnStage | None = None,
) -> list[Images]:
    """Turn images toward a text by a text diff (unCLIP §3.3).

    Args:
        target: what they are to show.
        baseline: what they show now: a caption for all or for each, or a dummy such as "a photo"; None takes nothing off.
        thetas: how far to turn, as shares of the arc; for each a frame.

    Returns:
        For each image its frames.

    Raises:
        ConfigError, DataError: as `text_diff`.
    """
    self.bring(self.clip)
    before = None
    if baseline is not None:
        texts = [baseline] if isinstance(baseline, str) else list(baseline)
        if len(texts) not in (1, len(latent)):
            raise DataError(f"{len(latent)} images need one baseline or as many, found {len(texts)}")
        before = self.clip.embed_texts(texts).cpu()
    after = self.clip.embed_texts([target])[0].cpu()
    turned = text_diff(latent, after, before, thetas)
    pixels = reconstruct(self, turned, batch_size=batch_size, on_stage=on_stage)
    return [to_pil_images(some) for some in pixels.split(len(thetas))]


# --- inpainting


@torch.no_grad()
def inpaint(
    self: Unclip,
    image: ImageSource,
    mask: ImageSource,
    prompt: str | None = None,
    num: int = 4,
    *,
    rounds: int = 4,
    seed: int = 0,
    sampling: UnclipSampling | None = None,
    batch_size: int = 16,
    on_stage: OnStage | None = None,
) -> Images:
    """Fill a part of an image; all other pixels stay as they are.

    No model is trained to: at every step, what is known is put in place, with as much noise as that step has.

    Args:
        mask: white where the image is to be filled, black where it stays; of the image's proportions.
        prompt: what the whole image is to show; None: what it shows.
        num: how many samples.
        rounds: how often each step is taken, so that new pixels fit known ones (RePaint §4.2).
        sampling: as `Unclip.generate` takes it.

    Returns:
        `num` images.

    Raises:
        ConfigError: `num` or `rounds` less than 1.
        DataError: a mask with nothing to fill, or of other proportions.
    """
    if num < 1:
        raise ConfigError(f"num must be at least 1, found {num}")
    (width, height), (mask_width, mask_height) = map(_size, (image, mask))
    if abs(width * mask_height - mask_width * height) > max(width * mask_height, mask_width * height) / 50:
        raise DataError(
            f"the mask has {mask_width} × {mask_height} pixels and the image {width} × {height}: make it of its proportions"
        )
    whole = pixels_of([open_image(image, self.image_size)])
    unknown = pixels_of([open_image(mask, self.image_size)]).mean(1, keepdim=True) > 0.5
    if not unknown.any():
        raise DataError("the mask has no white pixel: paint white what is to be filled")
    if prompt is None:
        self.bring(self.clip)
        embeddings = self.clip.embed_images([open_image(image, self.image_size)]).cpu().expand(num, -1)
    else:
        embeddings = self.embed([prompt], num, seed=seed, sampling=sampling)[0]

    def known(side: int) -> Known:
        # A small pixel that is partly unknown is filled.
        factor = self.image_size // side
        small = F.max_pool2d(unknown.float(), factor) > 0
        signed = shrink_to(whole, side) * 2 - 1
        return Known(signed.expand(num, -1, -1, -1), ~small, rounds)

    sampling = _without_memory(self, sampling)
    pixels = self.decode(
        [prompt or ""] * num, embeddings, list(range(num)), seed=seed, sampling=sampling,
        read_captions=prompt is not None, batch_size=batch_size, on_stage=on_stage, known=known,
    )  # fmt: skip
    return to_pil_images(pixels)


def _without_memory(pipe: Unclip, sampling: UnclipSampling | None) -> UnclipSampling:
    """With DDIM in place of DPM-Solver, which remembers its steps; both follow one flow."""
    from dalle_ds.sampling.unclip import UnclipSampling

    sampling = sampling or UnclipSampling()
    facts = [pipe.decoder.facts, *(stage.facts for stage in pipe.upsamplers)]
    given = [sampling.decoder, *sampling.upsamplers, *[None] * len(pipe.upsamplers)]
    every = [each or of_stage.sampling for each, of_stage in zip(given, facts, strict=False)]
    plain = [replace(each, method="ddim") if each.method == "dpm" else each for each in every]
    return replace(sampling, decoder=plain[0], upsamplers=tuple(plain[1:]))


# --- probes


def project(
    self: Unclip,
    images: Sequence[ImageSource],
    moments: EmbeddingMoments,
    counts: Sequence[int] | None = None,
    *,
    seed: int = 0,
    sampling: UnclipSampling | None = None,
    batch_size: int = 16,
    on_stage: OnStage | None = None,
) -> tuple[list[int], list[Images]]:
    """Images of embeddings that are left with their first principal components (unCLIP §4, Fig. 7), from one noise.

    Args:
        moments: of the embeddings whose components they are, `EmbeddingCache.moments`.
        counts: of components; None takes the paper's, or their share of a smaller embedding.

    Returns:
        The counts, and for each image one sample for each.
    """
    self.bring(self.clip)
    embeddings = self.clip.embed_images([open_image(image, self.image_size) for image in images]).cpu()
    counts = component_counts(embeddings.shape[1]) if counts is None else list(counts)
    reduced = reduce_components(embeddings, moments.mean, moments.components()[1], counts)
    rows = len(images) * len(counts)
    pixels = self.decode(
        [""] * rows, reduced.flatten(0, 1), seed=seed, sampling=sampling, read_captions=False, batch_size=batch_size,
        on_stage=on_stage,
    )  # fmt: skip
    return counts, [to_pil_images(some) for some in pixels.split(len(counts))]


@dataclass(frozen=True)
class Typography:
    """What a written word does to an image (unCLIP §4, Fig. 6)."""

    images: Images
    """The plain image, then with each of the words on it."""
    probabilities: Tensor
    """(1 + words, labels), CLIP's, by softmax over the labels."""
    variations: list[Images]
    """Of each of the images."""


@torch.no_grad()
def typography(
    self: Unclip,
    image: ImageSource,
    labels: Sequence[str],
    words: Sequence[str],
    num: int = 3,
    *,
    steps: str = "25",
    eta: float = 1.0,
    seed: int = 0,
    batch_size: int = 16,
    on_stage: OnStage | None = None,
) -> Typography:
    """Write words on an image, and see which label CLIP gives it and what the decoder makes of it.

    Args:
        labels: texts that CLIP chooses among.
        words: each is written on a copy.
        num: variations of each.
        steps, eta: of these.

    Raises:
        DataError: fewer than two labels.
    """
    if len(labels) < 2:
        raise DataError(f"probabilities need at least 2 labels, found {len(labels)}")
    plain = open_image(image, self.image_size)
    images = [plain, *(write_on(plain, word) for word in words)]
    self.bring(self.clip)
    seen, read = (
        F.normalize(each.float(), dim=1).cpu()
        for each in (self.clip.embed_images(images), self.clip.embed_texts(labels))
    )
    scale = float(self.clip.logit_scale.detach().float().exp().clamp(max=100))
    latent = invert(self, images, steps=steps, batch_size=batch_size, on_stage=on_stage)
    return Typography(
        images,
        (scale * seen @ read.T).softmax(dim=1),
        vary(self, latent, num, eta=eta, seed=seed, batch_size=batch_size, on_stage=on_stage),
    )


def write_on(image: Image.Image, word: str) -> Image.Image:
    """A copy with a label of paper on it that has a word, a third of the image high or as wide as it is."""
    copy, size = image.copy(), max(4, image.height // 4)
    while size > 4 and LabelFont(size).getlength(word) > 0.9 * image.width:
        size -= 1
    font = LabelFont(size)
    width, height = font.getlength(word), font.line_height
    left, top = (image.width - width) / 2, (image.height - height) / 2
    pen = ImageDraw.Draw(copy)
    pad = size / 4
    pen.rectangle(
        (left - pad, top - pad / 2, left + width + pad, top + height + pad / 2), fill="white", outline="black"
    )
    font.write(pen, (round(left), round(top)), [word], (0, 0, 0))
    return copy


# --- pixels


def _size(image: ImageSource) -> tuple[int, int]:
    """Width and height; DataError for what is no image."""
    if isinstance(image, Image.Image):
        return image.size
    try:
        with Image.open(image) as opened:
            return ImageOps.exif_transpose(opened).size
    except OSError as error:
        raise DataError(f"the image {image} cannot be read: {error}; name a file with an image") from error


def pixels_of(images: Sequence[Image.Image]) -> Tensor:
    """RGB images of one size → (B, 3, H, W) fp32 in [0, 1]."""
    arrays = np.stack([np.asarray(image, dtype=np.uint8) for image in images])
    return torch.from_numpy(arrays).permute(0, 3, 1, 2).float() / 255


def shrink_to(pixels: Tensor, side: int) -> Tensor:
    """Means of squares, as upsamplers are trained on: (B, 3, H, H) → (B, 3, side, side)."""
    return F.avg_pool2d(pixels, pixels.shape[-1] // side)
