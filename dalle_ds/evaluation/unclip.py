"""What an unCLIP makes of captions and of image embeddings, held against the true images.

Cosines are to the true image, never to the caption alone: an image that is decoded from the caption's own embedding would win
by construction. The prior ablation of unCLIP §5.1 is these figures of one decoder that is given the prior's embedding, the
caption's in its place, or none.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from dalle_ds.data.augment import clip_center_view
from dalle_ds.diffusion.degradation import shrink
from dalle_ds.evaluation.frechet import Appearance, distances
from dalle_ds.evaluation.measure import Context, matching
from dalle_ds.evaluation.metrics import psnr
from dalle_ds.evaluation.priors import with_interval
from dalle_ds.evaluation.sets import GatheredRows, images_of, shard_rows, stacked, to_size
from dalle_ds.sampling import Unclip, UnclipSampling, image_grid
from dalle_ds.sampling.grid import to_pil_images

TRUE, PRIOR, TEXT, CAPTION = "true_embedding", "prior", "text_embedding", "caption_only"
SHOWN = 8
"""Captions on the sheet."""
SWAPPED = 64
"""Captions whose embeddings and words are swapped."""
RESIZINGS = {"bicubic": Image.Resampling.BICUBIC, "lanczos": Image.Resampling.LANCZOS}


@dataclass(frozen=True)
class UnclipRequest:
    """What is measured of an unCLIP."""

    sampling: UnclipSampling
    """How its stages sample."""
    guidances: Sequence[float] = ()
    """Of the decoder, of which images from the prior's embeddings are measured, too."""
    seed: int = 0
    """Of the images."""


def measure_unclip(context: Context, pipe: Unclip, request: UnclipRequest) -> None:
    """Figures of images of the captions, from each kind of embedding. Collective.

    With a judge, an independent CLIP, cosines are also by it, and captions look for their images among all.
    """
    captions, mesh = context.captions, context.mesh
    given = _embeddings(context, pipe, request)
    decoder = request.sampling.decoder or pipe.decoder.facts.sampling
    kinds = {name: (name, decoder) for name in given if name != "image"}
    source = PRIOR if PRIOR in given else TEXT
    for guidance in request.guidances:
        kinds[f"guidance_{guidance:g}"] = source, replace(decoder, guidance=guidance)
    looks = {name: context.appearance(context.of_captions) for name in kinds}
    clips = {"": pipe.clip} | ({"judge_": context.judge} if context.judge is not None else {})
    embedded = {
        (clip, name): GatheredRows(len(captions), (model.config.embed_dim,), torch.float32)
        for clip, model in clips.items()
        for name in ("real", *kinds)
    }
    shown: dict[str, list[Image.Image]] = {}
    for rows in shard_rows(len(captions), mesh, "images of captions"):
        texts = [captions[row].text for row in rows]
        real = images_of(context.dataset, [captions[row].row for row in rows], context.size)
        found = {"real": real.to(mesh.device)}
        for name, (kind, how) in kinds.items():
            embeddings = given[kind]
            pixels = pipe.decode(
                texts,
                None if embeddings is None else embeddings[rows],
                seed=request.seed,
                sampling=replace(request.sampling, decoder=how),
            )
            found[name] = to_size(_bytes(pixels), context.size).to(mesh.device)
            looks[name].add(rows, found[name])
            if mesh.is_main:
                shown.setdefault(name, []).extend(to_pil_images(pixels[: max(0, SHOWN - len(shown.get(name, ())))]))
        for (clip, name), into in embedded.items():
            model = clips[clip].to(mesh.device)
            into.put(rows, model.embed_images(found[name].float() / 255, normalize=True))
    vectors = {key: value.gather(mesh) for key, value in embedded.items()}
    clip = "judge_" if context.judge is not None else ""
    for name in kinds:
        apart = distances(context.reference, looks[name].summed(mesh))
        for selection, members in context.of_captions.items():
            figures = dict(apart[selection])
            for who in clips:
                cosines = (vectors[who, name].double() * vectors[who, "real"].double()).sum(dim=1)[members]
                figures |= with_interval(f"{who}cosine", cosines)
            if context.judge is not None:
                own = torch.arange(int(members.sum()))
                figures |= matching(vectors[clip, name][members], context.caption_embeddings[members], own)
            context.record(selection, f"unclip/{name}", figures)
    true = vectors[clip, "real"].double()
    for selection, members in context.of_captions.items():
        of = {name: (vectors[clip, name].double() * true).sum(dim=1)[members] for name in kinds}
        for better, worse in ((PRIOR, TEXT), (TEXT, CAPTION)):
            if better in of and worse in of:
                context.record(
                    selection, "unclip/gain", with_interval(f"{better}_over_{worse}", of[better] - of[worse])
                )
    true_embeddings = given[TRUE]
    assert true_embeddings is not None
    _measure_swaps(context, pipe, request, true_embeddings)
    if mesh.is_main:
        _sheet(context, pipe, request, given, shown)


def _embeddings(context: Context, pipe: Unclip, request: UnclipRequest) -> dict[str, Tensor | None]:
    """(captions, D) of each kind, on the CPU; None for captions alone. Collective."""
    captions, dim = context.captions, pipe.clip.config.embed_dim
    kinds = [TRUE, *([PRIOR] if pipe.prior is not None else []), TEXT]
    into = {name: GatheredRows(len(captions), (dim,), torch.float32) for name in kinds}
    size = pipe.clip.config.image_size
    for rows in shard_rows(len(captions), context.mesh, "embeddings of captions"):
        texts = [captions[row].text for row in rows]
        views = [clip_center_view(context.dataset.image(captions[row].row), size) for row in rows]
        pipe.bring(pipe.clip)
        clip = pipe.clip
        into[TRUE].put(rows, clip.embed_images(stacked(views).to(context.mesh.device).float() / 255))
        into[TEXT].put(rows, clip.embed_texts(texts))
        if pipe.prior is not None:
            into[PRIOR].put(rows, pipe.embed(texts, seed=request.seed, sampling=request.sampling)[:, 0])
    return {**{name: rows.gather(context.mesh) for name, rows in into.items()}, CAPTION: None}


def _sheet(
    context: Context,
    pipe: Unclip,
    request: UnclipRequest,
    given: dict[str, Tensor | None],
    shown: dict[str, list[Image.Image]],
) -> None:
    """Captions, their images, what the decoder makes of each kind of embedding, and the last upsampler of the first of them
    that takes a caption alone."""
    kinds = [name for name in (TRUE, PRIOR, TEXT, CAPTION) if name in given]
    texts = [caption.text for caption in context.captions[:SHOWN]]
    rows = [[Image.fromarray(clip_center_view(context.dataset.image(caption.row), context.size))]
            for caption in context.captions[:SHOWN]]  # fmt: skip
    for name in kinds:
        embeddings = given[name]
        some = None if embeddings is None else embeddings[: len(texts)]
        pipe.bring(pipe.decoder)
        images = pipe.decoder.sample(texts, some, seed=request.seed, sampling=request.sampling.decoder)
        for row, image in zip(rows, to_pil_images(images), strict=True):
            row.append(image)
    titles = ["real", *(name.replace("_", " ") for name in kinds)]
    source = PRIOR if PRIOR in given else TEXT
    if pipe.upsamplers:
        titles.append(f"{source}, {pipe.image_size} px".replace("_", " "))
        for row, image in zip(rows, shown[source], strict=True):
            row.append(image)
    cell = max(96, context.size)
    context.sheets["unclip"] = image_grid(
        list(zip(texts, rows, strict=True)), titles=titles, cell=cell, label_width=240
    )


def _measure_swaps(context: Context, pipe: Unclip, request: UnclipRequest, embeddings: Tensor) -> None:
    """How much an image changes, in cosine of its embedding, when the image embedding or the caption is another's and the
    noise stays. Collective."""
    texts = [caption.text for caption in context.captions[:SWAPPED]]
    changes = GatheredRows(len(texts), (2,))
    for rows in shard_rows(len(texts), context.mesh, "swapped"):
        other = [(row + len(texts) // 2) % len(texts) for row in rows]
        own = [texts[row] for row in rows]
        pipe.bring(pipe.decoder)
        images = [
            pipe.decoder.sample(words, embeddings[of], keys=own, seed=request.seed, sampling=request.sampling.decoder)
            for words, of in ((own, rows), (own, other), ([texts[row] for row in other], rows))
        ]
        pipe.bring(pipe.clip)
        first, *swapped = (pipe.clip.embed_images(each, normalize=True) for each in images)
        changes.put(rows, torch.stack([1 - (first * each).sum(dim=1) for each in swapped], dim=1))
    values = changes.gather(context.mesh)
    for name, column in (("embedding", 0), ("caption", 1)):
        context.record("", "unclip/swapped", with_interval(name, values[:, column]))


def measure_upsamplers(context: Context, pipe: Unclip, request: UnclipRequest) -> None:
    """Each upsampler on true images made small, beside resizing: error, distance, and whether the result, made small again, is
    what it was made of. Collective."""
    assert context.network is not None
    captions, mesh = context.captions, context.mesh
    for number, stage in enumerate(pipe.upsamplers):
        config, name = stage.upsampler.config, f"upsampler_{number + 1}"
        size, scale = config.image_size, config.scale
        settings = request.sampling.upsamplers
        how = settings[number] if number < len(settings) else None
        ways = ["sample", *RESIZINGS]
        looks = {way: Appearance(context.network, context.radii[:1], context.of_captions) for way in ("real", *ways)}
        errors = {way: GatheredRows(len(captions), (2,)) for way in ways}
        for rows in shard_rows(len(captions), mesh, name):
            views = [clip_center_view(context.dataset.image(captions[row].row), size) for row in rows]
            small = [shrink(view, scale) for view in views]
            pipe.bring(stage)
            texts = [captions[row].text for row in rows]
            sampled = stage.sample(
                stacked(small).float() / 255, texts, seed=request.seed, sampling=how, tile=request.sampling.tile
            )
            images = {"real": stacked(views), "sample": _bytes(sampled).cpu()}
            for way, filter in RESIZINGS.items():
                images[way] = stacked([np.asarray(Image.fromarray(one).resize((size, size), filter)) for one in small])
            for way, pixels in images.items():
                looks[way].add(rows, pixels.to(mesh.device))
                if way != "real":
                    again = stacked([shrink(one.permute(1, 2, 0).numpy(), scale) for one in pixels])
                    both = psnr(pixels, images["real"]), psnr(again, stacked(small))
                    errors[way].put(rows, torch.stack(both, dim=1))
        summed = {way: look.summed(mesh) for way, look in looks.items()}
        for way in ways:
            error = errors[way].gather(mesh)
            apart = distances(summed["real"], summed[way])
            for selection, members in context.of_captions.items():
                values = error[members].mean(dim=0).tolist()
                figures = {"psnr": values[0], "consistency_psnr": values[1], **apart[selection]}
                context.record(selection, f"{name}/{way}", figures)


def _bytes(pixels: Tensor) -> Tensor:
    """fp32 in [0, 1] → uint8, as `to_pil_images`."""
    return (pixels.clamp(0, 1) * 255).round().byte()
