"""Figures of pictures that a transformer draws for captions, and of the real ones beside them."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from dalle_ds.data.images import center_crop_resize
from dalle_ds.evaluation.appearance import Appearance, distances
from dalle_ds.evaluation.candidates import CAPTIONS, Candidates, best_of
from dalle_ds.evaluation.context import Context
from dalle_ds.evaluation.dealing import Collected, dealt
from dalle_ds.evaluation.matching import clip_scores, recalls, retrieval_ranks
from dalle_ds.evaluation.sets import pictures_of, stacked, to_size
from dalle_ds.sampling import Reranker, TextToImage, picture_grid

SHOWN = 8
"""Captions on the sheet."""


def measure_real_matching(context: Context) -> None:
    """CLIP score and retrieval of the captions' own, real pictures: what drawn ones would reach that were real. Collective."""
    judge, captions, mesh = context.judge, context.captions, context.mesh
    assert judge is not None
    rows = sorted({caption.row for caption in captions})
    image = Collected(len(rows), (judge.config.embed_dim,), torch.float32)
    for indices in dealt(len(rows), mesh, "real pictures and captions"):
        pixels = pictures_of(context.dataset, [rows[index] for index in indices], context.size)
        image.put(indices, judge.embed_images(pixels.to(mesh.device).float() / 255))
    place = {row: index for index, row in enumerate(rows)}
    own = torch.tensor([place[caption.row] for caption in captions])
    images, texts = image.everything(mesh), caption_embeddings(context)
    for name, chosen in context.of_captions.items():
        pool, inverse = own[chosen].unique(return_inverse=True)
        ranks = retrieval_ranks(images[pool], texts[chosen], inverse)
        figures = {"clip_score": float(clip_scores(images[own[chosen]], texts[chosen]).mean())}
        context.record(name, "real", figures | recalls(ranks, len(pool)))


def measure_pictures(
    context: Context, pipeline: TextToImage, candidates: Candidates, numbers: Sequence[int], reranker: Reranker | None
) -> list[dict[str, object]]:
    """The best of the first n candidates of every caption, for each n: appearance, and match with the caption. Collective.

    Args:
        candidates: of the context's captions, at least the greatest of `numbers` each.
        numbers: n.
        reranker: chooses; needed where an n is above 1.

    Returns:
        One line per caption that says what was chosen, on the main process.
    """
    assert context.network is not None
    mesh, judge, captions = context.mesh, context.judge, context.captions
    count, code_count = len(captions), pipeline.model.config.image_len
    looks = {n: Appearance(context.network, context.radii, context.of_captions, generated=True) for n in numbers}
    picks = Collected(count, (len(numbers),), torch.int64)
    picked_scores = Collected(count, (len(numbers),))
    shown = Collected(min(SHOWN, count), (len(numbers), code_count), torch.int64)
    images = {n: Collected(count, (judge.config.embed_dim,), torch.float32) for n in numbers if judge is not None}
    for rows in dealt(count, mesh, "captions drawn", CAPTIONS):
        codes = candidates.codes(rows)  # (B, N, W²)
        scores = torch.zeros(codes.shape[:2], dtype=torch.float64)
        if reranker is not None:
            for index, row in enumerate(rows):
                scores[index] = torch.tensor(reranker(captions[row].text, pipeline.decode(codes[index])))
        pick = torch.stack([best_of(scores, n) for n in numbers], dim=1)  # (B, numbers)
        picks.put(rows, pick)
        picked_scores.put(rows, scores.gather(1, pick))
        best = codes.gather(1, pick[..., None].expand(-1, -1, code_count))  # (B, numbers, W²)
        on_sheet = [index for index, row in enumerate(rows) if row < SHOWN]
        shown.put([rows[index] for index in on_sheet], best[on_sheet])
        for number, n in enumerate(numbers):
            pixels = drawn_pixels(pipeline, best[:, number], context.size).to(mesh.device)
            looks[n].add(rows, pixels)
            if judge is not None:
                images[n].put(rows, judge.embed_images(pixels.float() / 255))
    texts = caption_embeddings(context) if judge is not None else None
    all_picks, all_scores = picks.everything(mesh), picked_scores.everything(mesh)
    for number, n in enumerate(numbers):
        apart = distances(context.reference, looks[n].summed(mesh))
        embedded = images[n].everything(mesh) if judge is not None else None
        for name, chosen in context.of_captions.items():
            figures = dict(apart[name])
            if texts is not None and embedded is not None:
                figures["clip_score"] = float(clip_scores(embedded[chosen], texts[chosen]).mean())
                figures |= recalls(retrieval_ranks(embedded[chosen], texts[chosen]), int(chosen.sum()))
            if reranker is not None:
                figures["reranker_score"] = 100 * float(all_scores[chosen, number].mean())
            context.record(name, f"best_of_{n}", figures)
    on_sheet_codes = shown.everything(mesh)
    if not mesh.is_main:
        return []
    context.sheets["pictures"] = _sheet(context, pipeline, on_sheet_codes, numbers)
    return [
        {"caption": caption.text, "row": caption.row, "best": dict(zip(map(str, numbers), pick, strict=True))}
        for caption, pick in zip(captions, all_picks.tolist(), strict=True)
    ]


def drawn_pixels(pipeline: TextToImage, codes: Tensor, size: int) -> Tensor:
    """(B, W²) codes → (B, 3, size, size) uint8, on the CPU: the pictures that `TextToImage` gives out, resized if need be."""
    return to_size(stacked([np.asarray(picture) for picture in pipeline.decode(codes)]), size)


def caption_embeddings(context: Context) -> Tensor:
    """(captions, D) fp32 on the CPU, by the judge. Collective."""
    assert context.judge is not None
    found = Collected(len(context.captions), (context.judge.config.embed_dim,), torch.float32)
    for rows in dealt(len(context.captions), context.mesh):
        found.put(rows, context.judge.embed_texts([context.captions[row].text for row in rows]))
    return found.everything(context.mesh)


def _sheet(context: Context, pipeline: TextToImage, codes: Tensor, numbers: Sequence[int]) -> Image.Image:
    """The first captions: the real picture, then the best of each n."""
    rows = []
    for caption, of_caption in zip(context.captions, codes, strict=False):
        real = center_crop_resize(context.dataset.picture(caption.row), context.size)
        rows.append((caption.text, [Image.fromarray(real), *pipeline.decode(of_caption)]))
    return picture_grid(rows, titles=["real", *[f"best of {n}" for n in numbers]], cell=96, label_width=240)
