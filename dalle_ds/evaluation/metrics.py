"""What is computed of images, codes and captions: reconstruction, use of the codebook, likelihood, match with captions.

For an image x with codes z (the likeliest ones of the dVAE's encoder) and caption y,

    −ln P(x | y)  ≤  −ln P(x | z) − ln P(z | y)

since P(x | y) is a sum over all z. The second term is the transformer's. The first is the dVAE's, and a probability, not a
density: that of the 8-bit levels of x, each standing for the values of the logit-Laplace distribution that lie nearest to it.
Divided by 3 · H · W · ln 2, both are bits per dimension, and their sum is comparable with that of other models of pixels.
"""

from __future__ import annotations

import math
from collections.abc import Callable

import torch
import torch.nn.functional as F
from PIL import Image
from torch import Tensor

from dalle_ds.config import PADDING
from dalle_ds.data.images import Pixels
from dalle_ds.errors import ConfigError, DataError
from dalle_ds.models.dalle import Dalle
from dalle_ds.models.dvae import EPSILON, DiscreteVAE
from dalle_ds.models.vqgan import ImageTokenizer
from dalle_ds.sampling import score
from dalle_ds.sampling.grid import image_grid, to_pil_images

CUTOFFS = (1, 5, 10)
BLOCK = 1024
"""Captions whose similarities to all images are in memory at once."""
ROUNDING = 1e-6
"""Cosines that differ by less count as equal. Two equal images' embeddings differ by 1e-7 if they were computed in batches
of different sizes, and a model that generates the same for every caption must not find any."""
SHOWN = 8
"""Most used and least used codes on the panel, each."""
EXAMPLES = 7
"""Places where a code occurs, beside what it looks like."""
OUTSIDE = (225, 225, 225)
"""Around images: most codes of many sets are white."""


# --- reconstruction


def psnr(pixels: Tensor, others: Tensor) -> Tensor:
    """Peak signal-to-noise ratio of each pair, dB: (B, 3, H, W) uint8 twice → (B,) float64; equal images have 100."""
    squared = (pixels.double() - others.double()).square().mean(dim=(1, 2, 3)) / 255**2
    return -10 * torch.log10(squared.clamp_min(1e-10))


def ssim(pixels: Tensor, others: Tensor) -> Tensor:
    """Structural similarity of each pair (Wang et al., 2004): (B, 3, H, W) uint8 twice → (B,) float64 of at most 1.

    Gaussian windows of σ = 1.5 (11×11), constants 0.01² and 0.03² of the range, mean over pixels and channels.

    Raises:
        ConfigError: torchmetrics is not installed.
    """
    try:
        from torchmetrics.functional.image import structural_similarity_index_measure
    except ImportError as error:
        raise ConfigError('SSIM needs torchmetrics: pip install "dalle-ds[eval]"') from error
    one, other = pixels.float() / 255, others.float() / 255
    value = structural_similarity_index_measure(one, other, data_range=1.0, reduction="none")
    assert isinstance(value, Tensor)
    return value.double().view(len(pixels))


# --- the codebook


def codebook_usage(histogram: Tensor) -> dict[str, float]:
    """Health of a codebook of which a histogram (K,) is given: exp of the entropy of the codes' frequencies, which is K where
    all are used alike; codes that occur, that do not, and the share of the former."""
    share = histogram.double() / histogram.sum().clamp_min(1)
    used, size = int((histogram > 0).sum()), len(histogram)
    perplexity = float((-torch.special.xlogy(share, share).sum()).exp())
    return {"perplexity": perplexity, "used": float(used), "dead": float(size - used), "usage": used / size}


def codebook_panel(vae: ImageTokenizer, codes: Tensor, image: Callable[[int], Pixels]) -> Image.Image:
    """The most and the least used codes that occur: their share, the image of a grid full of each, and places of the set where
    it occurs, with surroundings that are one code wide.

    Args:
        codes: (N, h, w) of the set's rows.
        image: row → (H, W, 3), as the codes were made from.
    """
    counts = torch.bincount(codes.flatten(), minlength=vae.config.vocab_size)
    order = counts.argsort(descending=True, stable=True).tolist()
    occurring = [code for code in order if counts[code] > 0]
    rows = []
    for code in [*occurring[:SHOWN], *occurring[SHOWN:][-SHOWN:]]:
        label = f"code {code}: {int(counts[code]):,} ({int(counts[code]) / int(counts.sum()):.2%})"
        rows.append((label, [code_image(vae, code), *_occurrences(vae, codes, code, image)]))
    return image_grid(rows, titles=["alone", *["occurs"] * EXAMPLES], cell=96)


def code_image(vae: ImageTokenizer, code: int) -> Image.Image:
    """What the dVAE makes of a grid full of one code: its middle, three codes wide, where the border does not reach."""
    grid, factor = vae.config.grid, vae.config.factor
    device = next(vae.parameters()).device
    whole = to_pil_images(vae.decode(torch.full((1, grid, grid), code, device=device)))[0]
    side = min(3, grid) * factor
    corner = (whole.width - side) // 2
    framed = Image.new("RGB", (side + 2, side + 2), OUTSIDE)
    framed.paste(whole.crop((corner, corner, corner + side, corner + side)), (1, 1))
    return framed


def _occurrences(vae: ImageTokenizer, codes: Tensor, code: int, image: Callable[[int], Pixels]) -> list[Image.Image]:
    """Up to `EXAMPLES` places of a code, in different rows where there are as many, spread over the set."""
    found = (codes == code).nonzero()
    first = torch.ones(len(found), dtype=torch.bool)
    first[1:] = found[1:, 0] != found[:-1, 0]
    places = found[first]
    if len(places) < EXAMPLES:
        places = torch.cat([places, found[~first]])[:EXAMPLES]
    else:
        places = places[torch.linspace(0, len(places) - 1, EXAMPLES).long()]
    factor = vae.config.factor
    patches = []
    for row, y, x in places.tolist():
        patch = Image.new("RGB", (3 * factor, 3 * factor), OUTSIDE)
        patch.paste(Image.fromarray(image(row)), ((1 - x) * factor, (1 - y) * factor))
        patches.append(patch)
    return patches


# --- likelihood


@torch.no_grad()
def transformer_nats(model: Dalle, text: Tensor, codes: Tensor) -> tuple[Tensor, Tensor]:
    """−ln P(caption's tokens) and −ln P(codes | caption) of each row: (B, T) int64, −1 where padded, which costs nothing, and
    (B, W²) int64 → (B,) and (B,) float64 nats."""
    output = model(text, codes)
    return _row_nats(output.text_logits, text), _row_nats(output.image_logits, codes)


def _row_nats(logits: Tensor, targets: Tensor) -> Tensor:
    losses = F.cross_entropy(logits.double().flatten(0, 1), targets.flatten(), ignore_index=PADDING, reduction="none")
    return losses.view(targets.shape).sum(dim=1)


@torch.no_grad()
def pixel_nats(vae: DiscreteVAE, pixels: Tensor, codes: Tensor) -> Tensor:
    """−ln P(8-bit image | codes) of each image under the dVAE: (B, 3, H, W) uint8, (B, h, w) int64 → (B,) float64 nats."""
    weights = F.one_hot(codes, vae.config.vocab_size).permute(0, 3, 1, 2).float()
    mu, log_b = vae.likelihood_parameters(weights)
    return level_nats(pixels, mu.double(), log_b.double()).sum(dim=(1, 2, 3))


def level_nats(pixels: Tensor, mu: Tensor, log_b: Tensor) -> Tensor:
    """−ln of the probability of each 8-bit level under the logit-Laplace distribution; over all 256 levels it sums to 1.

    Level k stands for the mapped pixel ε + (1 − 2ε) · k / 255 and all that is nearer to it than to another level; 0 and 255
    for all that lies beyond, too. In logit space that is an interval, whose Laplace probability is a difference of two
    exponentials.

    Args:
        pixels: (…) uint8.
        mu, log_b: (…) float64, location and log scale.

    Returns:
        (…) float64.
    """
    step = (1 - 2 * EPSILON) / 255
    middle = EPSILON + step * pixels.double()
    low = torch.logit(middle - step / 2).masked_fill(pixels == 0, -math.inf)
    high = torch.logit(middle + step / 2).masked_fill(pixels == 255, math.inf)
    scale = torch.exp(log_b)
    a, b = (low - mu) / scale, (high - mu) / scale
    # By symmetry an interval on the right of μ becomes one on its left, where the distribution function is an exponential
    # and the difference of two small numbers can be taken as a logarithm.
    right = a > 0
    a, b = torch.where(right, -b, a), torch.where(right, -a, b)
    left_of_mu = b - math.log(2) + torch.log(-torch.expm1(a - b))
    around = torch.log(-0.5 * (torch.expm1(a) + torch.expm1(-b)))
    return -torch.where(b <= 0, left_of_mu, around)


def ranking_accuracy(model: Dalle, text: Tensor, codes: Tensor, candidates: int = 16) -> float:
    """Share of captions whose own image ranks first of `candidates` by log p(codes | caption) − log p(codes | no caption).

    Subtracting the likelihood without a caption removes what makes an image likely whatever is said of it. Rows are taken
    in groups of `candidates`, each caption against the images of its group; rows that fill no group are left out.

    Args:
        text, codes: (N, T) int64, −1 where padded, and (N, W²) int64.

    Raises:
        DataError: fewer rows than candidates.
    """
    if len(text) < candidates:
        raise DataError(f"ranking {candidates} images needs as many rows, found {len(text)}")
    groups = len(text) // candidates
    right = 0
    for captions, images in list(zip(text.split(candidates), codes.split(candidates), strict=True))[:groups]:
        unconditional = score(model, torch.full_like(captions, PADDING), images)
        for index in range(candidates):
            gain = score(model, captions[index].expand(candidates, -1), images) - unconditional
            right += int(gain.argmax() == index)
    return right / (groups * candidates)


# --- match with captions, by a contrastive model


def clip_scores(image: Tensor, text: Tensor) -> Tensor:
    """CLIP score of each image with its caption: 100 · max(cosine, 0) (Hessel et al., 2021, without their factor 2.5); of
    (N, D) twice, L2-normalized, (N,) float64."""
    return 100 * (image.double() * text.double()).sum(dim=1).clamp_min(0)


def retrieval_ranks(image: Tensor, text: Tensor, own: Tensor | None = None) -> Tensor:
    """For each caption, how many other images match it at least as well as its own: 0 where its own comes first.

    Args:
        image, text: (P, D) and (N, D), L2-normalized.
        own: (N,) int64, which image is each caption's; None: row i of one belongs to row i of the other.

    Returns:
        (N,) int64.

    Raises:
        DataError: a value that is not finite, which would rank anywhere.
    """
    if not (image.isfinite().all() and text.isfinite().all()):
        raise DataError("the contrastive model gives embeddings that are not numbers: its weights are damaged")
    own = torch.arange(len(text)) if own is None else own
    ranks = []
    image = image.double()
    for part, own_of_part in zip(text.split(BLOCK), own.split(BLOCK), strict=True):
        similarity = part.double() @ image.T
        matched = similarity.gather(1, own_of_part[:, None])
        ranks.append((similarity >= matched - ROUNDING).sum(dim=1) - 1)
    return torch.cat(ranks)


def recalls(ranks: Tensor, images: int) -> dict[str, float]:
    """Share of captions whose own image is among the first 1, 5 and 10, where there are more images than that."""
    return {f"retrieval_at_{k}": float((ranks < k).double().mean()) for k in CUTOFFS if k < images}
