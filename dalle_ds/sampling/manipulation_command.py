"""The subcommands of `launchers/generate.py` that change images, or ask what CLIP sees in them."""

from __future__ import annotations

import io
import tempfile
from abc import ABC, abstractmethod
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path
from typing import Annotated, Literal

import torch
import tyro
from PIL import Image

from dalle_ds.errors import ConfigError
from dalle_ds.files import write_bytes
from dalle_ds.models.latents import EmbeddingMoments
from dalle_ds.parallel import Mesh
from dalle_ds.precision.choice import DTYPES, choose_precision
from dalle_ds.sampling.command import show_stages
from dalle_ds.sampling.completion import open_image
from dalle_ds.sampling.grid import image_grid, to_pil_images
from dalle_ds.sampling.latent import BipartiteLatent
from dalle_ds.sampling.unclip import OnStage, Unclip

CELL = 128
"""Least side in pixels of an image on a sheet or in a film."""
FRAME_SECONDS = 0.15


@dataclass(frozen=True)
class Manipulation(ABC):
    model: str
    """Folder of launchers/export_unclip.py."""
    out: str
    """PNG file to write: a labelled sheet."""
    image: Annotated[tuple[str, ...], tyro.conf.UseAppendAction] = ()
    """Image, whose central square is used; given again, another one."""
    seed: int = 0
    """Seed of all noise that is drawn."""
    batch_size: int = 16
    """Images of the decoder at a time."""
    device: Literal["cpu", "cuda"] = "cpu"
    """Where to compute."""
    dtype: Literal["auto", "fp32", "bf16"] = "fp32"
    """Arithmetic of the stages. Images come back from their latents in fp32 alone."""
    max_memory: float | None = None
    """GiB of weights on the device at a time, stages taking turns; None: all stay there."""

    films = False
    """Whether the result is a way, which a film can show."""

    @abstractmethod
    def run(self) -> None:
        """Write what was asked for."""

    def check(self) -> None:
        """Refuse, with a ConfigError, what cannot be written or read."""
        out, kinds = Path(self.out), (".png", ".gif", ".mp4") if self.films else (".png",)
        if out.suffix.lower() not in kinds or not out.parent.is_dir() or out.is_dir():
            raise ConfigError(f"out must be a {' or '.join(kinds)} file in a folder that exists, found {self.out}")
        if self.batch_size < 1:
            raise ConfigError(f"batch_size must be at least 1, found {self.batch_size}")
        if not self.has_images:
            raise ConfigError("nothing to begin with: give --image FILE")

    @property
    def has_images(self) -> bool:
        """Whether there is something to begin with."""
        return bool(self.image)

    def pipe(self) -> Unclip:
        """The model."""
        dtype = DTYPES[choose_precision(self.dtype, Mesh(0, 1, torch.device(self.device)))]
        memory = None if self.max_memory is None else int(self.max_memory * 2**30)
        return Unclip.from_pretrained(self.model, self.device, dtype, max_memory=memory)

    def originals(self, pipe: Unclip) -> list[Image.Image]:
        """The images as the model sees them."""
        return [open_image(name, pipe.image_size) for name in self.image]


@dataclass(frozen=True)
class LatentManipulation(Manipulation):
    """One that begins with the latents of images."""

    steps: str = "25"
    """Steps of the inversion of images and of the way back, of each stage."""
    iterations: int = 1
    """Corrections of each step of the inversion, which bring it nearer than as many more steps."""
    latent: str | None = None
    """File of the images' latents (safetensors): written where images are given, read in their place where none is."""

    def check(self) -> None:
        """Also that latents can be written."""
        super().check()
        if self.latent is not None and (not Path(self.latent).parent.is_dir() or Path(self.latent).is_dir()):
            raise ConfigError(f"latent must be a file in a folder that exists, found {self.latent}")

    @property
    def has_images(self) -> bool:
        """Images, or their latents."""
        return super().has_images or (self.latent is not None and Path(self.latent).is_file())

    def latents(self, pipe: Unclip, on_stage: OnStage) -> tuple[BipartiteLatent, list[str]]:
        """Those of the images, with labels of these.

        Raises:
            ConfigError: a file of latents of another model.
        """
        if self.image:
            latent = pipe.invert(
                self.image, steps=self.steps, iterations=self.iterations, batch_size=self.batch_size, on_stage=on_stage
            )
            if self.latent is not None:
                latent.save(self.latent)
            return latent, [Path(name).name for name in self.image]
        latent = BipartiteLatent.load(self.latent or "")
        known = pipe.fingerprints()
        for name in latent.provenance.keys() & known.keys():
            if latent.provenance[name] != known[name]:
                raise ConfigError(
                    f"latent={self.latent} was made with another {name}, or in another --dtype: give the images"
                )
        return latent, [f"image {number}" for number in range(1, len(latent) + 1)]


@dataclass(frozen=True)
class VaryOptions(LatentManipulation):
    """Variations of images (unCLIP §3.1)."""

    num: int = 4
    """Variations for each η."""
    eta: tuple[float, ...] = (1.0,)
    """How much changes, from 0, which makes the image again, to 1; several: one after the other."""

    def run(self) -> None:
        """Write the sheet: the image, the image from its latent, the variations."""
        pipe = self.pipe()
        with show_stages() as on_stage:
            latent, labels = self.latents(pipe, on_stage)
            columns = [[image] for image in to_pil_images(pipe.reconstruct(latent, batch_size=self.batch_size))]
            titles = ["η = 0"]
            for eta in self.eta:
                found = pipe.vary(
                    latent, self.num, eta=eta, seed=self.seed, batch_size=self.batch_size, on_stage=on_stage
                )
                columns = [[*before, *new] for before, new in zip(columns, found, strict=True)]
                titles += [f"η = {eta:g}"] * self.num
        _write(self.out, labels, columns, titles, self.originals(pipe))


@dataclass(frozen=True)
class InterpolateOptions(LatentManipulation):
    """The way from each image to the next (unCLIP §3.2), as a strip, or a film where OUT ends in .gif or .mp4."""

    frames: int = 9
    """From one image to the next, both counted."""
    fixed_noise: bool = False
    """Whether all frames have one noise, of --seed, in place of one between those of the images."""

    films = True

    def check(self) -> None:
        """Also that there is a way."""
        super().check()
        if self.frames < 2 or len(self.image) == 1:
            raise ConfigError(
                f"frames={self.frames} of {len(self.image)} images: a way needs at least 2 frames and 2 images, give --image "
                "again"
            )

    def run(self) -> None:
        """Write the strip or the film."""
        pipe = self.pipe()
        with show_stages() as on_stage:
            latent, labels = self.latents(pipe, on_stage)
            frames = pipe.interpolate(
                latent, self.frames, fixed_noise=self.fixed_noise, seed=self.seed, batch_size=self.batch_size,
                on_stage=on_stage,
            )  # fmt: skip
        if Path(self.out).suffix.lower() == ".png":
            ways = [frames[start : start + self.frames] for start in range(0, len(frames) - 1, self.frames - 1)]
            rows = [f"{a} to {b}" for a, b in pairwise(labels)]
            _write(self.out, rows, ways, [f"{number / (self.frames - 1):.2f}" for number in range(self.frames)])
        else:
            write_film(self.out, frames)


@dataclass(frozen=True)
class EditOptions(LatentManipulation):
    """Images turned toward a text (text diffs, unCLIP §3.3), as a strip, or a film where OUT ends in .gif or .mp4."""

    target: str = ""
    """What the image is to show."""
    baseline: str | None = None
    """What it shows now, or a dummy such as "a photo"; by default nothing is taken off the target."""
    theta: float = 0.5
    """How far to turn at most, as a share of the arc to the text; the paper's lie between 0.25 and 0.50."""
    frames: int = 5
    """From none to --theta."""

    films = True

    def check(self) -> None:
        """Also that there is a target, and somewhere to go."""
        super().check()
        if not self.target or self.frames < 2 or not 0 < self.theta <= 1:
            raise ConfigError(
                f"target={self.target!r}, theta={self.theta}, frames={self.frames}: give --target TEXT, a theta in (0, 1] and "
                "at least 2 frames"
            )

    def run(self) -> None:
        """Write the strip or the film."""
        pipe = self.pipe()
        thetas = [self.theta * number / (self.frames - 1) for number in range(self.frames)]
        with show_stages() as on_stage:
            latent, labels = self.latents(pipe, on_stage)
            rows = pipe.edit(latent, self.target, self.baseline, thetas, batch_size=self.batch_size, on_stage=on_stage)
        if Path(self.out).suffix.lower() == ".png":
            rows_of = [f"{label}: {self.target}" for label in labels]
            _write(self.out, rows_of, rows, [f"θ = {theta:.3g}" for theta in thetas], self.originals(pipe))
        else:
            write_film(self.out, [beside(images) for images in zip(*rows, strict=True)])


@dataclass(frozen=True)
class InpaintOptions(Manipulation):
    """Images of which a part is filled."""

    mask: str = ""
    """Image of the same proportions, white where it is to be filled and black where it stays."""
    prompt: str | None = None
    """What the whole image is to show; None: what it shows."""
    num: int = 4
    """Samples of each."""
    rounds: int = 4
    """How often each step is taken, so that new pixels fit known ones."""

    def check(self) -> None:
        """Also that there is a mask."""
        super().check()
        if not self.mask:
            raise ConfigError(f"mask={self.mask!r}: give --mask FILE")

    def run(self) -> None:
        """Write the sheet: the image, the mask, the samples."""
        pipe = self.pipe()
        mask = open_image(self.mask, pipe.image_size)
        with show_stages() as on_stage:
            rows = [
                [mask, *pipe.inpaint(
                    image, self.mask, self.prompt, self.num, rounds=self.rounds, seed=self.seed,
                    batch_size=self.batch_size, on_stage=on_stage,
                )]
                for image in self.image
            ]  # fmt: skip
        labels = [
            Path(name).name if self.prompt is None else f"{Path(name).name}: {self.prompt}" for name in self.image
        ]
        _write(self.out, labels, rows, ["mask", *[""] * self.num], self.originals(pipe))


@dataclass(frozen=True)
class ProbeOptions(Manipulation):
    """What is in CLIP's embeddings (unCLIP §4): images from their first principal components (with --data), or the typographic
    attack (with --labels and --words)."""

    data: str | None = None
    """Folder of launchers/prepare_data.py with the CLIP's embeddings, whose principal components are taken."""
    components: tuple[int, ...] = ()
    """Numbers of components; by default the paper's 20 to 320 of 1,024, or their share."""
    labels: tuple[str, ...] = ()
    """Texts that CLIP chooses among."""
    words: tuple[str, ...] = ()
    """Words to write on the image, one at a time."""
    num: int = 3
    """Variations of each image with a word."""

    def check(self) -> None:
        """Also that one of the two is asked for."""
        super().check()
        if (self.data is None) == (not self.labels) or len(self.labels) == 1:
            raise ConfigError(
                f"data={self.data}, labels={list(self.labels)}: give either --data DIR, or at least 2 --labels with --words"
            )

    def run(self) -> None:
        """Write the sheet."""
        pipe = self.pipe()
        names = [Path(name).name for name in self.image]
        with show_stages() as on_stage:
            if self.data is not None:
                from dalle_ds.data.embeddings import EmbeddingCache

                moments: EmbeddingMoments = EmbeddingCache.open(self.data, pipe.clip.fingerprint, "train").moments
                counts, rows = pipe.project(
                    self.image, moments, self.components or None, seed=self.seed, batch_size=self.batch_size,
                    on_stage=on_stage,
                )  # fmt: skip
                _write(self.out, names, rows, [f"{count} components" for count in counts], self.originals(pipe))
                return
            rows, notes, labels = [], [], []
            for name, image in zip(names, self.image, strict=True):
                found = pipe.typography(
                    image,
                    self.labels,
                    self.words,
                    self.num,
                    seed=self.seed,
                    batch_size=self.batch_size,
                    on_stage=on_stage,
                )
                for number, word in enumerate(["", *self.words]):
                    labels.append(f"{name}, “{word}” written on it" if word else name)
                    shares = zip(self.labels, found.probabilities[number].tolist(), strict=True)
                    notes.append([", ".join(f"{label} {share:.1%}" for label, share in shares)])
                    rows.append([found.images[number], *found.variations[number]])
        _write(self.out, labels, rows, ["CLIP", *["variation"] * self.num], notes=notes)


SUBCOMMANDS: dict[str, type[Manipulation]] = {
    "vary": VaryOptions,
    "interpolate": InterpolateOptions,
    "edit": EditOptions,
    "inpaint": InpaintOptions,
    "probe": ProbeOptions,
}


def _write(
    path: str,
    labels: Sequence[str],
    rows: Sequence[Sequence[Image.Image]],
    titles: Sequence[str],
    originals: Sequence[Image.Image] = (),
    notes: Sequence[Sequence[str]] | None = None,
) -> None:
    """A sheet, whose first column are the originals where there are any."""
    if originals:
        rows = [[original, *row] for original, row in zip(originals, rows, strict=True)]
        titles = ["image", *titles]
    cell = max(CELL, rows[0][0].width)
    buffer = io.BytesIO()
    sheet = image_grid(list(zip(labels, rows, strict=True)), titles=titles, notes=notes, cell=cell)
    sheet.save(buffer, format="PNG")
    write_bytes(Path(path), buffer.getvalue())


def beside(images: Sequence[Image.Image]) -> Image.Image:
    """Images in one row."""
    row = Image.new("RGB", (sum(image.width for image in images), images[0].height))
    for number, image in enumerate(images):
        row.paste(image, (number * image.width, 0))
    return row


def write_film(path: str | Path, frames: Sequence[Image.Image]) -> None:
    """Frames there and back as .gif, or once as .mp4 (H.264, by ffmpeg).

    Raises:
        ConfigError: .mp4 without `imageio-ffmpeg`.
    """
    factor = max(1, CELL // frames[0].height)
    shown = [frame.resize((frame.width * factor, frame.height * factor), Image.Resampling.NEAREST) for frame in frames]
    if Path(path).suffix.lower() == ".gif":
        buffer, loop = io.BytesIO(), [*shown, *shown[-2:0:-1]]
        loop[0].save(
            buffer, format="GIF", save_all=True, append_images=loop[1:], duration=int(FRAME_SECONDS * 1000), loop=0
        )
        write_bytes(Path(path), buffer.getvalue())
        return
    try:
        import imageio_ffmpeg
    except ImportError as error:
        raise ConfigError(
            "films in .mp4 are made by imageio-ffmpeg: pip install imageio-ffmpeg, or take .gif"
        ) from error
    even = [frame.crop((0, 0, frame.width // 2 * 2, frame.height // 2 * 2)) for frame in shown]
    with tempfile.TemporaryDirectory() as folder:
        film = Path(folder) / "film.mp4"
        writer = imageio_ffmpeg.write_frames(str(film), even[0].size, fps=1 / FRAME_SECONDS, macro_block_size=2)
        writer.send(None)
        for frame in even:
            writer.send(frame.tobytes())
        writer.close()
        write_bytes(Path(path), film.read_bytes())
