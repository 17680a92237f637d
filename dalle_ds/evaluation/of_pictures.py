"""Figures of pictures that a transformer draws for captions, and of the real ones beside them."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from dalle_ds.data.images import center_crop_resize
from dalle_ds.evaluation.candidates import CAPTIONS, Candidates, best_of
from dalle_ds.evaluation.context import Context
from dalle_ds.evaluation.dealing import Collected, dealt
from dalle_ds.evaluation.metrics.appearance import Appearance, distances
from dalle_ds.evaluation.metrics.matching import clip_scores, recalls, retrieval_ranks
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


class BestOf:
    """What is found of the best of the first n candidates of every caption.

    Args:
        n: how many there are to choose among.
    """

    def __init__(self, context: Context, n: int) -> None:
        assert context.network is not None
        count = len(context.captions)
        self.context = context
        self.n = n
        self.looks = Appearance(context.network, context.radii, context.of_captions, generated=True)
        self.picks = Collected(count, dtype=torch.int64)
        self.scores = Collected(count)
        self.images: Collected | None = None
        if context.judge is not None:
            self.images = Collected(count, (context.judge.config.embed_dim,), torch.float32)

    def add(self, rows: list[int], picks: Tensor, scores: Tensor, pixels: Tensor) -> None:
        """What was chosen for some captions.

        Args:
            picks: (B,) int64, the candidates' numbers.
            scores: (B,) theirs.
            pixels: (B, 3, size, size) uint8 pictures of them.
        """
        pixels = pixels.to(self.context.mesh.device)
        self.picks.put(rows, picks)
        self.scores.put(rows, scores)
        self.looks.add(rows, pixels)
        if self.images is not None and self.context.judge is not None:
            self.images.put(rows, self.context.judge.embed_images(pixels.float() / 255))

    def record(self, texts: Tensor | None, *, chosen_by_score: bool) -> list[int]:
        """Compute the figures, with the captions' embeddings where there is a judge; the picks of all captions. Collective."""
        context, mesh = self.context, self.context.mesh
        apart = distances(context.reference, self.looks.summed(mesh))
        scores = self.scores.everything(mesh)
        images = self.images.everything(mesh) if self.images is not None else None
        for name, members in context.of_captions.items():
            figures = dict(apart[name])
            if images is not None and texts is not None:
                figures["clip_score"] = float(clip_scores(images[members], texts[members]).mean())
                figures |= recalls(retrieval_ranks(images[members], texts[members]), int(members.sum()))
            if chosen_by_score:
                figures["reranker_score"] = 100 * float(scores[members].mean())
            context.record(name, f"best_of_{self.n}", figures)
        return self.picks.everything(mesh).tolist()


def measure_pictures(
    context: Context, pipeline: TextToImage, candidates: Candidates, numbers: Sequence[int], reranker: Reranker | None
) -> list[dict[str, object]]:
    """The best of the first n candidates of every caption, for each n: appearance, and match with the caption. Collective.

    Args:
        candidates: of the context's captions, at least the greatest of `numbers` each.
        numbers: n.
        reranker: chooses; needed where an n is above 1.

    Returns:
        One line per caption that says what was chosen.
    """
    captions, mesh = context.captions, context.mesh
    found = [BestOf(context, n) for n in numbers]
    shown = Collected(min(SHOWN, len(captions)), (len(numbers), pipeline.model.config.image_len), torch.int64)
    for rows in dealt(len(captions), mesh, "captions drawn", CAPTIONS):
        codes = candidates.codes(rows)  # (B, N, W²)
        scores = torch.zeros(codes.shape[:2], dtype=torch.float64)
        if reranker is not None:
            for index, row in enumerate(rows):
                scores[index] = torch.tensor(reranker(captions[row].text, pipeline.decode(codes[index])))
        batch, best = torch.arange(len(rows)), []
        for of_n in found:
            picks = best_of(scores, of_n.n)
            best.append(codes[batch, picks])
            of_n.add(rows, picks, scores[batch, picks], drawn_pixels(pipeline, best[-1], context.size))
        on_sheet = [row for row in rows if row < SHOWN]
        shown.put(on_sheet, torch.stack(best, dim=1)[: len(on_sheet)])
    texts = caption_embeddings(context) if context.judge is not None else None
    picks_of = [of_n.record(texts, chosen_by_score=reranker is not None) for of_n in found]
    on_sheet_codes = shown.everything(mesh)
    if mesh.is_main:
        context.sheets["pictures"] = _sheet(context, pipeline, on_sheet_codes, numbers)
    return [
        {"caption": caption.text, "row": caption.row, "best": dict(zip(map(str, numbers), picks, strict=True))}
        for caption, *picks in zip(captions, *picks_of, strict=True)
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
