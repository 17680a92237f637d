"""How close a dVAE's reconstructions are, how a set uses its codes, and what these look like."""

from __future__ import annotations

from collections.abc import Callable

import torch
from PIL import Image
from torch import Tensor

from dalle_ds.data.images import Pixels
from dalle_ds.errors import ConfigError
from dalle_ds.models.dvae import DiscreteVAE
from dalle_ds.sampling.grid import image_grid, to_pil_images

SHOWN = 8
"""Most used and least used codes on the panel, each."""
EXAMPLES = 7
"""Places where a code occurs, beside what it looks like."""
OUTSIDE = (225, 225, 225)
"""Around images: most codes of many sets are white."""


def codebook_usage(histogram: Tensor) -> dict[str, float]:
    """Health of a codebook.

    Args:
        histogram: (K,) how often each code occurs.

    Returns:
        perplexity: exp of the entropy of the codes' frequencies; K where all are used alike.
        used, dead: codes that occur, and that do not.
        usage: share of codes that occur.
    """
    share = histogram.double() / histogram.sum().clamp_min(1)
    used = int((histogram > 0).sum())
    entropy = -torch.special.xlogy(share, share).sum()
    size = len(histogram)
    return {
        "perplexity": float(entropy.exp()),
        "used": float(used),
        "dead": float(size - used),
        "usage": used / size,
    }


def codebook_panel(vae: DiscreteVAE, codes: Tensor, picture: Callable[[int], Pixels]) -> Image.Image:
    """The most and the least used codes that occur at all, as images.

    Each row has the code's share, the image of a grid full of it, and places of the set where it occurs, each with the
    surroundings that are one code wide.

    Args:
        codes: (N, h, w) of the set's rows.
        picture: row → (H, W, 3), as the codes were made from.
    """
    counts = torch.bincount(codes.flatten(), minlength=vae.config.vocab_size)
    order = counts.argsort(descending=True, stable=True).tolist()
    occurring = [code for code in order if counts[code] > 0]
    rare = occurring[SHOWN:][-SHOWN:]
    total = int(counts.sum())
    rows = []
    for code in [*occurring[:SHOWN], *rare]:
        label = f"code {code}: {int(counts[code]):,} ({int(counts[code]) / total:.2%})"
        rows.append((label, [code_picture(vae, code), *_occurrences(vae, codes, code, picture)]))
    return image_grid(rows, titles=["alone", *["occurs"] * EXAMPLES], cell=96)


def code_picture(vae: DiscreteVAE, code: int) -> Image.Image:
    """What the dVAE makes of a grid full of one code: its middle, three codes wide, where the border does not reach."""
    grid, factor = vae.config.grid, vae.config.factor
    device = next(vae.parameters()).device
    whole = to_pil_images(vae.decode(torch.full((1, grid, grid), code, device=device)))[0]
    side = min(3, grid) * factor
    corner = (whole.width - side) // 2
    framed = Image.new("RGB", (side + 2, side + 2), OUTSIDE)
    framed.paste(whole.crop((corner, corner, corner + side, corner + side)), (1, 1))
    return framed


def _occurrences(vae: DiscreteVAE, codes: Tensor, code: int, picture: Callable[[int], Pixels]) -> list[Image.Image]:
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
        patch.paste(Image.fromarray(picture(row)), ((1 - x) * factor, (1 - y) * factor))
        patches.append(patch)
    return patches


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
