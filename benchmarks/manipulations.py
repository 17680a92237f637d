"""How near images come back through their latents, and whether text diffs go where they are to.

    python benchmarks/manipulations.py --model demo/unclip --data demo/data --judge demo/judge [--json FILE]

Text diffs: a held-out image, the caption of another held-out image as the target; a second CLIP says how similar each frame is
to the target.
"""

from __future__ import annotations

import json
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import torch
from PIL import Image
from rich.console import Console
from rich.table import Table
from torch import Tensor

from dalle_ds.cli import parse_options, run_launcher
from dalle_ds.config import ImageSampling
from dalle_ds.data import PairDataset
from dalle_ds.models import Clip
from dalle_ds.sampling import Unclip
from dalle_ds.sampling.completion import open_image
from dalle_ds.sampling.manipulations import pixels_of, shrink_to


@dataclass(frozen=True)
class Options:
    """What to measure."""

    model: str
    """Folder of launchers/export_unclip.py."""
    data: str
    """Folder of launchers/prepare_data.py."""
    judge: str
    """A CLIP that the model was not trained with."""
    split: str = "validation"
    """Of the data."""
    images: int = 24
    """Images to invert."""
    cases: int = 50
    """Text diffs."""
    grids: tuple[str, ...] = ("25", "100", "25+3")
    """Steps of inversions, with corrections after +."""
    thetas: tuple[float, ...] = (0.0, 0.125, 0.25, 0.375, 0.5)
    """Of text diffs."""
    baseline: Literal["none", "caption", "a photo"] = "none"
    """What is taken off the target."""
    json: str | None = None
    """File for the figures."""


def psnr(images: Tensor, true: Tensor) -> Tensor:
    """(B,) dB, of images in [0, 1]."""
    return -10 * (images - true).square().flatten(1).mean(1).clamp(min=1e-10).log10()


def inversions(pipe: Unclip, images: list[Image.Image], grids: tuple[str, ...]) -> list[dict[str, Any]]:
    """Of the decoder's images, and of whole ones through all stages."""
    opened = [open_image(image, pipe.image_size) for image in images]
    whole, embeddings = pixels_of(opened), pipe.clip.embed_images(opened)
    low = shrink_to(whole, pipe.decoder.decoder.config.image_size)
    found = []
    for grid in grids:
        steps, _, corrections = grid.partition("+")
        started = time.monotonic()
        start = pipe.decoder.invert(low, embeddings, steps=steps, iterations=int(corrections or 0))
        sampling = ImageSampling("ddim", steps, threshold="none")
        names = [""] * len(images)
        back = pipe.decoder.sample(names, embeddings, read_captions=False, sampling=sampling, start=start)
        seconds = time.monotonic() - started
        latent = pipe.invert(images, steps=steps, iterations=int(corrections or 0))
        found.append(
            {
                "grid": grid,
                "decoder_psnr": float(psnr(back, low).mean()),
                "decoder_worst": float(psnr(back, low).min()),
                "noise_std": float(start.std()),
                "whole_psnr": float(psnr(pipe.reconstruct(latent), whole).mean()),
                "seconds_per_image": seconds / len(images),
            }
        )
    latent = pipe.invert(images[:2], steps=steps)
    ends = pixels_of(pipe.interpolate(latent, 3))[[0, 2]]
    apart = float((ends - pipe.reconstruct(latent)).abs().max())
    found.append({"grid": "ends of an interpolation", "difference": apart})
    return found


def text_diffs(pipe: Unclip, judge: Clip, data: PairDataset, options: Options) -> dict[str, Any]:
    """How many go steadily toward their targets."""
    rows = [number * len(data) // options.cases for number in range(options.cases)]
    images = [Image.fromarray(data.image(row)) for row in rows]
    captions = [data.captions(row)[0] for row in rows]
    latent = pipe.invert(images, steps="25", iterations=2)
    similarity, own = [], []
    for number in range(options.cases):
        other = (number + options.cases // 2) % options.cases
        before = {"none": None, "caption": captions[number], "a photo": "a photo"}[options.baseline]
        (frames,) = pipe.edit(latent.take([number]), captions[other], before, options.thetas)
        for texts, kept in ((captions[other], similarity), (captions[number], own)):
            kept.append((judge.embed_images(frames) @ judge.embed_texts([texts])[0]).tolist())
    curves = torch.tensor(similarity)
    rises = {f"rising over every {step}": curves[:, ::step].diff(dim=1) > 0 for step in (1, 2)}
    return {
        **{name: float(each.all(1).float().mean()) for name, each in rises.items()},
        "nearer_at_the_end": float((curves[:, -1] > curves[:, 0]).float().mean()),
        "to_target": curves.mean(0).tolist(),
        "to_own_caption": torch.tensor(own).mean(0).tolist(),
        "curves": similarity,
    }


def main() -> None:
    """Measure and print."""
    options = parse_options(Options)
    torch.set_num_threads(1)
    pipe, judge = Unclip.from_pretrained(options.model), Clip.from_pretrained(options.judge)
    data = PairDataset.open(options.data, options.split)
    rows = [number * len(data) // options.images for number in range(options.images)]
    found = {
        "inversions": inversions(pipe, [Image.fromarray(data.image(row)) for row in rows], options.grids),
        "text_diffs": text_diffs(pipe, judge, data, options),
    }
    table = Table("inversion", "", "")
    for each in found["inversions"]:
        for name, value in each.items():
            if name != "grid":
                table.add_row(str(each["grid"]), name, f"{value:.3f}")
    for name, value in found["text_diffs"].items():
        if name != "curves":
            table.add_row("text diffs", name, str(value if isinstance(value, float) else [f"{v:.3f}" for v in value]))
    Console(width=120).print(table)
    if options.json is not None:
        Path(options.json).write_text(json.dumps(found, indent=1))


if __name__ == "__main__":
    run_launcher(main)
