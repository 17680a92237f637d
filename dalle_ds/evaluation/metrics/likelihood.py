"""What captions, codes and pixels cost under the models, exactly.

For an image x with codes z (the likeliest ones of the dVAE's encoder) and caption y,

    −ln P(x | y)  ≤  −ln P(x | z) − ln P(z | y)

since P(x | y) is a sum over all z. The second term is the transformer's. The first is the dVAE's, and a probability, not a
density: that of the 8-bit levels of x, each standing for the values of the logit-Laplace distribution that lie nearest to it.
Divided by 3 · H · W · ln 2, both are bits per dimension, and their sum is comparable with that of other models of pixels.
"""

from __future__ import annotations

import math

import torch
import torch.nn.functional as F
from torch import Tensor

from dalle_ds.config import PADDING
from dalle_ds.errors import DataError
from dalle_ds.models.dalle import Dalle
from dalle_ds.models.dvae import EPSILON, DiscreteVAE
from dalle_ds.sampling import score


@torch.no_grad()
def transformer_nats(model: Dalle, text: Tensor, codes: Tensor) -> tuple[Tensor, Tensor]:
    """−ln P(caption's tokens) and −ln P(codes | caption) of each row.

    Args:
        text: (B, T) int64, −1 where padded; padding costs nothing.
        codes: (B, W²) int64.

    Returns:
        (B,) and (B,) float64, nats per row.
    """
    output = model(text, codes)
    return _row_nats(output.text_logits, text), _row_nats(output.image_logits, codes)


def _row_nats(logits: Tensor, targets: Tensor) -> Tensor:
    losses = F.cross_entropy(logits.double().flatten(0, 1), targets.flatten(), ignore_index=PADDING, reduction="none")
    return losses.view(targets.shape).sum(dim=1)


@torch.no_grad()
def pixel_nats(vae: DiscreteVAE, pixels: Tensor, codes: Tensor) -> Tensor:
    """−ln P(8-bit image | codes) of each image under the dVAE, in nats.

    Args:
        pixels: (B, 3, H, W) uint8.
        codes: (B, h, w) int64.

    Returns:
        (B,) float64.
    """
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
    in groups of `candidates`, each caption against the images of its group; rows that fill no group are left out. Chance
    is 1 / candidates.

    Args:
        text: (N, T) int64, −1 where padded.
        codes: (N, W²) int64.

    Raises:
        DataError: fewer rows than candidates.
    """
    if len(text) < candidates:
        raise DataError(f"ranking {candidates} images needs as many rows, found {len(text)}")
    groups = len(text) // candidates
    right = 0
    for group in range(groups):
        rows = slice(group * candidates, (group + 1) * candidates)
        captions, pictures = text[rows], codes[rows]
        unconditional = score(model, torch.full_like(captions, PADDING), pictures)
        for index in range(candidates):
            repeated = captions[index : index + 1].expand(candidates, -1)
            gain = score(model, repeated, pictures) - unconditional
            right += int(gain.argmax() == index)
    return right / (groups * candidates)
