"""Figures of a dVAE: reconstructions and codebook."""

from __future__ import annotations

import torch
from PIL import Image

from dalle_ds.data.images import Pixels, center_crop_resize
from dalle_ds.evaluation.context import Context
from dalle_ds.evaluation.dealing import Collected, dealt
from dalle_ds.evaluation.metrics.appearance import Appearance, distances
from dalle_ds.evaluation.metrics.codebook import codebook_panel, codebook_usage
from dalle_ds.evaluation.metrics.reconstruction import psnr, ssim
from dalle_ds.evaluation.sets import pictures_of, stacked, to_size
from dalle_ds.models.dvae import DiscreteVAE
from dalle_ds.sampling.grid import picture_grid
from dalle_ds.sampling.pixels import to_pictures

EXTREMES = 8
"""Worst and best reconstructions that are shown, each."""


def measure_dvae(context: Context, vae: DiscreteVAE) -> None:
    """PSNR, SSIM, distance of the reconstructed set from the real one, and use of the codebook, over all rows. Collective.

    Pictures are reconstructed at the dVAE's size, where PSNR and SSIM are taken; the sets are compared at the context's.
    """
    assert context.network is not None
    dataset, mesh, size = context.dataset, context.mesh, vae.config.image_size
    rows, grid = len(dataset), vae.config.grid
    signal, similarity = Collected(rows), Collected(rows)
    codes = Collected(rows, (grid, grid), torch.int32)
    restored = Appearance(context.network, context.radii, context.of_rows, generated=False)
    for indices in dealt(rows, mesh, "reconstructions"):
        pixels = pictures_of(dataset, indices, size).to(mesh.device)
        found = vae.encode(pixels.float() / 255)
        again = (vae.decode(found) * 255).round().byte()
        signal.put(indices, psnr(pixels, again))
        similarity.put(indices, ssim(pixels, again))
        codes.put(indices, found)
        restored.add(indices, to_size(again, context.size))
    all_codes, signals, similarities = (each.everything(mesh) for each in (codes, signal, similarity))
    apart = distances(context.whole_split, restored.summed(mesh))
    for name, chosen in context.of_rows.items():
        mean = {"psnr": float(signals[chosen].mean()), "ssim": float(similarities[chosen].mean())}
        context.record(name, "reconstruction", mean | apart[name])
        histogram = torch.bincount(all_codes[chosen].flatten().long(), minlength=vae.config.vocab_size)
        context.record(name, "codebook", codebook_usage(histogram))
    if mesh.is_main:

        def picture(row: int) -> Pixels:
            return center_crop_resize(dataset.picture(row), size)

        context.sheets["codebook"] = codebook_panel(vae, all_codes.long(), picture)
        order = signals.argsort().tolist()
        count = min(EXTREMES, rows // 2)
        lines: list[tuple[str, list[Image.Image]]] = []
        for what, chosen_rows in (("worst", order[:count]), ("best", order[::-1][:count])):
            pictures = [picture(row) for row in chosen_rows]
            values = ", ".join(f"{signals[row]:.1f}" for row in chosen_rows)
            images = stacked(pictures).to(mesh.device).float() / 255
            lines.append((f"{what} by PSNR: {values} dB", [Image.fromarray(pixels) for pixels in pictures]))
            lines.append(("their reconstructions", to_pictures(vae.decode(vae.encode(images)))))
        context.sheets["reconstructions"] = picture_grid(lines, cell=96)
