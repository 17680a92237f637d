"""The parts of an evaluation, on what they share: a dVAE, likelihoods, images generated for captions, the real ones."""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import cached_property

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from dalle_ds.config import PADDING
from dalle_ds.data import PairDataset
from dalle_ds.data.images import Pixels, center_crop_resize
from dalle_ds.evaluation.candidates import CAPTIONS, Candidates, best_of
from dalle_ds.evaluation.features import FeatureNetwork
from dalle_ds.evaluation.frechet import Appearance, distances, inception_scores
from dalle_ds.evaluation.metrics import (
    clip_scores,
    codebook_panel,
    codebook_usage,
    pixel_nats,
    psnr,
    recalls,
    retrieval_ranks,
    ssim,
    transformer_nats,
)
from dalle_ds.evaluation.sets import Caption, GatheredRows, Selections, images_of, shard_rows, stacked, to_size
from dalle_ds.models.clip import Clip
from dalle_ds.models.dvae import DiscreteVAE
from dalle_ds.models.vqgan import ImageTokenizer
from dalle_ds.parallel import Mesh
from dalle_ds.sampling import Reranker, TextToImage, image_grid
from dalle_ds.sampling.grid import to_pil_images

EXTREMES = 8
"""Worst and best reconstructions that are shown, each."""
ROWS = 4
"""Captioned images whose logits are in memory at once."""
SHOWN = 8
"""Captions on the sheet."""


@dataclass
class Context:
    """A split, how its images are looked at, and what has been found so far."""

    mesh: Mesh
    dataset: PairDataset
    captions: list[Caption]
    """To generate images for."""
    size: int
    """Side in pixels that images are compared at."""
    radii: list[float]
    """Of the blur."""
    network: FeatureNetwork | None
    """None where no two sets are compared."""
    kept: Tensor | None = None
    """(rows,) bool, rows that do not overlap with the training data; None where that is not looked at."""
    reference_of_captions: bool = False
    """Whether the real set is that of the captions' rows instead of the whole split."""
    judge: Clip | None = None
    """Says how well captions and images match."""
    metrics: dict[str, float] = field(default_factory=dict)
    """Figures by name."""
    sheets: dict[str, Image.Image] = field(default_factory=dict)
    """Images for the page by name, on the main process."""
    seconds: dict[str, float] = field(default_factory=dict)
    """How long each part took."""
    notes: list[str] = field(default_factory=list)
    """What a reader must know."""

    def selections(self, rows: Sequence[int]) -> Selections:
        """Of things that belong to these rows of the split."""
        every: Selections = {"": torch.ones(len(rows), dtype=torch.bool)}
        return every if self.kept is None else every | {"without_overlap": self.kept[list(rows)]}

    @property
    def of_rows(self) -> Selections:
        """Of all rows."""
        return self.selections(range(len(self.dataset)))

    @property
    def of_captions(self) -> Selections:
        """Of all captions."""
        return self.selections([caption.row for caption in self.captions])

    def record(self, selection: str, prefix: str, figures: dict[str, float]) -> None:
        """Add figures under their names."""
        start = "/".join(part for part in (selection, prefix) if part)
        self.metrics |= {f"{start}/{name}": value for name, value in figures.items()}

    @contextmanager
    def timed(self, part: str) -> Iterator[None]:
        """Measure how long a part takes."""
        started = time.monotonic()
        yield
        self.seconds[part] = round(time.monotonic() - started, 1)

    def appearance(self, rows: Selections) -> Appearance:
        """Statistics to be filled, of images that `rows` select from."""
        assert self.network is not None
        return Appearance(self.network, self.radii, rows)

    @cached_property
    def whole_split(self) -> Appearance:
        """Statistics of all real images of the split. Collective, at the first use."""
        return self._real(range(len(self.dataset)))

    @cached_property
    def reference(self) -> Appearance:
        """Statistics of the real images that generated ones are compared with. Collective, at the first use."""
        if not self.reference_of_captions:
            return self.whole_split
        return self._real(sorted({caption.row for caption in self.captions}))

    def _real(self, rows: Sequence[int]) -> Appearance:
        found = self.appearance(self.selections(rows))
        for indices in shard_rows(len(rows), self.mesh, "real images"):
            pixels = images_of(self.dataset, [rows[index] for index in indices], self.size)
            found.add(indices, pixels.to(self.mesh.device))
        return found.summed(self.mesh)

    @cached_property
    def caption_embeddings(self) -> Tensor:
        """(captions, D) fp32 on the CPU, by the judge. Collective, at the first use."""
        return self.embedded(
            len(self.captions),
            lambda clip, rows: clip.embed_texts([self.captions[row].text for row in rows], normalize=True),
        )

    def embedded(self, rows: int, embed: Callable[[Clip, list[int]], Tensor], what: str = "") -> Tensor:
        """(rows, D) fp32 on the CPU: what the judge makes of some rows, `embed`, of all of them. Collective."""
        assert self.judge is not None
        found = GatheredRows(rows, (self.judge.config.embed_dim,), torch.float32)
        for indices in shard_rows(rows, self.mesh, what):
            found.put(indices, embed(self.judge, indices))
        return found.gather(self.mesh)


def measure_dvae(context: Context, vae: ImageTokenizer) -> None:
    """PSNR, SSIM, distance of the reconstructed set from the real one, and use of the codebook, over all rows. Collective.

    Images are reconstructed at the dVAE's size, where PSNR and SSIM are taken; the sets are compared at the context's.
    """
    dataset, mesh, size = context.dataset, context.mesh, vae.config.image_size
    rows, grid = len(dataset), vae.config.grid
    likeness, codes = GatheredRows(rows, (2,)), GatheredRows(rows, (grid, grid), torch.int32)
    restored = context.appearance(context.of_rows)
    for indices in shard_rows(rows, mesh, "reconstructions"):
        pixels = images_of(dataset, indices, size).to(mesh.device)
        found = vae.encode(pixels.float() / 255)
        again = (vae.decode(found) * 255).round().byte()
        likeness.put(indices, torch.stack([psnr(pixels, again), ssim(pixels, again)], dim=1))
        codes.put(indices, found)
        restored.add(indices, to_size(again, context.size))
    all_codes, (signals, similarities) = codes.gather(mesh), likeness.gather(mesh).T.contiguous()
    apart = distances(context.whole_split, restored.summed(mesh))
    for name, chosen in context.of_rows.items():
        mean = {"psnr": float(signals[chosen].mean()), "ssim": float(similarities[chosen].mean())}
        context.record(name, "reconstruction", mean | apart[name])
        histogram = torch.bincount(all_codes[chosen].flatten().long(), minlength=vae.config.vocab_size)
        context.record(name, "codebook", codebook_usage(histogram))
    if mesh.is_main:
        context.sheets |= _dvae_sheets(context, vae, all_codes.long(), signals)


def _dvae_sheets(context: Context, vae: ImageTokenizer, codes: Tensor, signals: Tensor) -> dict[str, Image.Image]:
    """Codes and what they look like; the worst and best reconstructions by their PSNR, `signals` (rows,)."""

    def image(row: int) -> Pixels:
        return center_crop_resize(context.dataset.image(row), vae.config.image_size)

    order = signals.argsort().tolist()
    count = min(EXTREMES, len(order) // 2)
    lines: list[tuple[str, list[Image.Image]]] = []
    for what, rows in (("worst", order[:count]), ("best", order[::-1][:count])):
        images = [image(row) for row in rows]
        batch = stacked(images).to(context.mesh.device).float() / 255
        values = ", ".join(f"{signals[row]:.1f}" for row in rows)
        lines.append((f"{what} by PSNR: {values} dB", [Image.fromarray(pixels) for pixels in images]))
        lines.append(("their reconstructions", to_pil_images(vae.decode(vae.encode(batch)))))
    return {"codebook": codebook_panel(vae, codes, image), "reconstructions": image_grid(lines, cell=96)}


def measure_likelihood(context: Context, pipeline: TextToImage) -> None:
    """What first captions, codes and pixels of all rows cost under the transformer and its dVAE. Collective.

    - text_nats_per_token: of the captions' tokens, padding left out.
    - image_nats_per_token: of the codes, given the caption.
    - codes_bits_per_dimension: of the codes, given the caption, in bits per pixel value (3 · H · W of them). No likelihood of
      the image: codes lose what the dVAE does not keep.
    - pixels_bits_per_dimension: of the 8-bit image, given its codes, under the dVAE (a VQGAN has no likelihood).
    - bits_per_dimension: the sum of these two, an upper bound on −log2 P(image | caption) per pixel value.
    - captions_cut: share of captions with more tokens than the model has room for.
    """
    dataset, mesh, vae = context.dataset, context.mesh, pipeline.dvae
    size, length, rows = vae.config.image_size, pipeline.model.config.text_len, len(context.dataset)
    found = GatheredRows(rows, (5,))
    for indices in shard_rows(rows, mesh, "likelihoods", ROWS):
        pixels = images_of(dataset, indices, size).to(mesh.device)
        codes = vae.encode(pixels.float() / 255)
        encoded = [pipeline.tokenizer.encode_padded([dataset.captions(row)[0]], length) for row in indices]
        text = torch.cat([tokens for tokens, _ in encoded]).to(mesh.device)
        cut = torch.tensor([cut for _, cut in encoded], device=mesh.device)
        text_nats, code_nats = transformer_nats(pipeline.model, text, codes.flatten(1))
        pixels_nats = pixel_nats(vae, pixels, codes) if isinstance(vae, DiscreteVAE) else torch.zeros_like(code_nats)
        columns = text_nats, (text != PADDING).sum(dim=1), code_nats, pixels_nats, cut
        found.put(indices, torch.stack([column.double() for column in columns], dim=1))
    sums, dimensions = found.gather(mesh), 3 * size**2 * math.log(2)
    for name, chosen in context.of_rows.items():
        of_text, tokens, of_codes, of_pixels, share_cut = (float(each.mean()) for each in sums[chosen].T.contiguous())
        in_codes, in_pixels = of_codes / dimensions, of_pixels / dimensions
        figures = {
            "text_nats_per_token": of_text / max(tokens, 1e-12),
            "image_nats_per_token": of_codes / pipeline.model.config.image_len,
            "codes_bits_per_dimension": in_codes,
            "captions_cut": share_cut,
        }
        if isinstance(vae, DiscreteVAE):
            figures |= {"pixels_bits_per_dimension": in_pixels, "bits_per_dimension": in_codes + in_pixels}
        context.record(name, "likelihood", figures)


def measure_real_matching(context: Context) -> None:
    """CLIP score and retrieval of the captions' own, real images: what to compare generated ones with. Collective."""
    rows = sorted({caption.row for caption in context.captions})

    def embed(clip: Clip, indices: list[int]) -> Tensor:
        pixels = images_of(context.dataset, [rows[index] for index in indices], context.size)
        return clip.embed_images(pixels.to(context.mesh.device).float() / 255, normalize=True)

    images, texts = context.embedded(len(rows), embed, "real images and captions"), context.caption_embeddings
    place = {row: index for index, row in enumerate(rows)}
    own = torch.tensor([place[caption.row] for caption in context.captions])
    for name, chosen in context.of_captions.items():
        pool, own_in_pool = own[chosen].unique(return_inverse=True)
        context.record(name, "real", matching(images[pool], texts[chosen], own_in_pool))


def matching(images: Tensor, texts: Tensor, own: Tensor) -> dict[str, float]:
    """CLIP score and retrieval of embeddings (P, D) and (N, D), of which `own` (N,) is each caption's image."""
    ranks = retrieval_ranks(images, texts, own)
    return {"clip_score": float(clip_scores(images[own], texts).mean())} | recalls(ranks, len(images))


def measure_generated(
    context: Context, pipeline: TextToImage, candidates: Candidates, numbers: Sequence[int], reranker: Reranker | None
) -> list[dict[str, object]]:
    """The best of the first n candidates of every caption, for each n: appearance, and match with the caption. Collective.

    Args:
        candidates: of the context's captions, at least the greatest of `numbers` each.
        numbers: n.
        reranker: chooses; needed where an n is above 1.

    Returns:
        For each caption, what was chosen.
    """
    captions, mesh, judge = context.captions, context.mesh, context.judge
    count, every_n = len(captions), (len(numbers),)
    looks = [context.appearance(context.of_captions) for _ in numbers]
    picks, scores = GatheredRows(count, every_n, torch.int64), GatheredRows(count, every_n)
    embedded = GatheredRows(count, (*every_n, judge.config.embed_dim), torch.float32) if judge is not None else None
    shown = GatheredRows(min(SHOWN, count), (*every_n, pipeline.model.config.image_len), torch.int64)
    for rows in shard_rows(count, mesh, "captions", CAPTIONS):
        codes = candidates.codes(rows)  # (B, N, W²)
        of_all = torch.zeros(codes.shape[:2], dtype=torch.float64)
        if reranker is not None:
            for index, row in enumerate(rows):
                of_all[index] = torch.tensor(reranker(captions[row].text, pipeline.decode(codes[index])))
        best = torch.stack([best_of(of_all, n) for n in numbers], dim=1)
        codes = codes[torch.arange(len(rows))[:, None], best]  # (B, numbers, W²)
        picks.put(rows, best)
        scores.put(rows, of_all.gather(1, best))
        embeddings = []
        for look, of_n in zip(looks, codes.unbind(dim=1), strict=True):
            pixels = generated_pixels(pipeline, of_n, context.size).to(mesh.device)
            look.add(rows, pixels)
            if judge is not None:
                embeddings.append(judge.embed_images(pixels.float() / 255, normalize=True))
        if embedded is not None:
            embedded.put(rows, torch.stack(embeddings, dim=1))
        on_sheet = [row for row in rows if row < SHOWN]
        shown.put(on_sheet, codes[: len(on_sheet)])
    all_picks, all_scores, sheet_codes = (each.gather(mesh) for each in (picks, scores, shown))
    images = embedded.gather(mesh) if embedded is not None else None
    for index, (n, look) in enumerate(zip(numbers, looks, strict=True)):
        apart, quality = distances(context.reference, look.summed(mesh)), inception_scores(look)
        for name, members in context.of_captions.items():
            figures = apart[name] | quality[name]
            if images is not None:
                own = torch.arange(int(members.sum()))
                figures |= matching(images[members, index], context.caption_embeddings[members], own)
            if reranker is not None:
                figures["reranker_score"] = 100 * float(all_scores[members, index].mean())
            context.record(name, f"best_of_{n}", figures)
    if mesh.is_main:
        lines = []
        for caption, of_caption in zip(captions, sheet_codes, strict=False):
            real = center_crop_resize(context.dataset.image(caption.row), context.size)
            lines.append((caption.text, [Image.fromarray(real), *pipeline.decode(of_caption)]))
        titles = ["real", *[f"best of {n}" for n in numbers]]
        context.sheets["pictures"] = image_grid(lines, titles=titles, cell=96, label_width=240)
    return [
        {"caption": caption.text, "row": caption.row, "best": dict(zip(map(str, numbers), chosen, strict=True))}
        for caption, chosen in zip(captions, all_picks.tolist(), strict=True)
    ]


def generated_pixels(pipeline: TextToImage, codes: Tensor, size: int) -> Tensor:
    """(B, W²) codes → (B, 3, size, size) uint8, on the CPU: the images that `TextToImage` gives out, resized if need be."""
    return to_size(stacked([np.asarray(image) for image in pipeline.decode(codes)]), size)
