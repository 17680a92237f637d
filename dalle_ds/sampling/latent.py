"""The bipartite latent of an image: CLIP's embedding z_i says what is in it, the noise x_T the rest (unCLIP §3).

What is done to images here is done to their latents, of which `Unclip.reconstruct` makes images.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path

import torch
import torch.nn.functional as F
from safetensors import SafetensorError, safe_open
from safetensors.torch import save
from torch import Tensor

from dalle_ds.errors import CheckpointError, ConfigError, DataError
from dalle_ds.files import write_bytes

PAPER_COMPONENTS = (20, 30, 40, 80, 120, 160, 200, 320)
"""Of 1,024, in unCLIP's Fig. 7."""


@dataclass(frozen=True)
class BipartiteLatent:
    """Of B images."""

    embeddings: Tensor
    """(B, embed_dim) fp32, z_i."""
    noise: tuple[Tensor, ...]
    """(B, 3, side, side) fp32 x_T of the decoder, of the first upsampler …"""
    keys: tuple[str, ...]
    """B names of what images are made of; they choose the noise of steps where η > 0."""
    steps: str = "25"
    """Grid that x_T belongs to, over the steps of `image_diffusion.invertible_grid`."""
    captions: tuple[str, ...] | None = None
    """B captions that the decoder reads beside; None: none."""
    provenance: Mapping[str, str] = field(default_factory=dict)
    """Fingerprints of the models that it belongs to, by stage, and how it was made."""

    def __len__(self) -> int:
        return len(self.embeddings)

    def take(self, rows: Sequence[int]) -> BipartiteLatent:
        """Of some of the images, in this order, any as often as wanted."""
        captions = None if self.captions is None else tuple(self.captions[row] for row in rows)
        return replace(
            self,
            embeddings=self.embeddings[rows],
            noise=tuple(each[rows] for each in self.noise),
            keys=tuple(self.keys[row] for row in rows),
            captions=captions,
        )

    def save(self, path: str | Path) -> None:
        """Write a safetensors file, whole or not at all."""
        tensors = {"embeddings": self.embeddings, **{f"noise_{number}": each for number, each in enumerate(self.noise)}}
        facts = {name: value for name, value in asdict(self).items() if name not in ("embeddings", "noise")}
        metadata = {"format": "dalle_ds latent", **{name: json.dumps(value) for name, value in facts.items()}}
        write_bytes(Path(path), save({name: each.contiguous() for name, each in tensors.items()}, metadata))

    @classmethod
    def load(cls, path: str | Path) -> BipartiteLatent:
        """Read what `save` wrote; CheckpointError where it is something else, or damaged."""
        try:
            with safe_open(path, "pt") as file:
                tensors, metadata = {name: file.get_tensor(name) for name in file.keys()}, file.metadata()  # noqa: SIM118
            facts = {name: json.loads(metadata[name]) for name in ("keys", "steps", "captions", "provenance")}
            captions = facts["captions"]
            noise = tuple(tensors[f"noise_{number}"] for number in range(len(tensors) - 1))
            found = cls(
                tensors["embeddings"],
                noise,
                tuple(facts["keys"]),
                str(facts["steps"]),
                None if captions is None else tuple(captions),
                dict(facts["provenance"]),
            )
        except (OSError, SafetensorError, KeyError, TypeError, ValueError) as error:
            raise CheckpointError(
                f"{path} is no latent of images ({error}): name a file that --latent wrote"
            ) from error
        parts = [*map(len, found.noise), len(found.keys), *([] if found.captions is None else [len(found.captions)])]
        if any(count != len(found) for count in parts):
            raise CheckpointError(f"{path} has parts of different numbers of images: make it again")
        return found


def slerp(first: Tensor, second: Tensor, share: float) -> Tensor:
    """From `first` (share 0) to `second` (1) along the arc between their directions; each row of (B, …) by itself.

    Of vectors of length 1 it returns such. The ends are returned as they are.
    """
    if share in (0, 1):
        return (second if share else first).clone()
    flat = [F.normalize(each.flatten(1).double(), dim=1) for each in (first, second)]
    angle = (flat[0] * flat[1]).sum(1).clamp(-1, 1).arccos().reshape(-1, *[1] * (first.dim() - 1))
    # In one direction there is no arc: sin(s Ω) / sin Ω is s.
    shares = [
        torch.where(angle < 1e-6, part, (part * angle).sin() / angle.sin().clamp(min=1e-12))
        for part in (1 - share, share)
    ]
    return (shares[0] * first + shares[1] * second).to(first.dtype)


def interpolate(
    latent: BipartiteLatent, frames: int, *, fixed_noise: Sequence[Tensor] | None = None
) -> BipartiteLatent:
    """The way from each image to the next, by slerp of z_i and x_T (unCLIP §3.2).

    Args:
        latent: of two images or more.
        frames: from one image to the next, both counted.
        fixed_noise: (1, 3, side, side) for each stage, the noise of all frames instead; ends are then no reconstructions.

    Returns:
        Of (B − 1) (frames − 1) + 1 frames.

    Raises:
        ConfigError: fewer than two frames.
        DataError: fewer than two images.
    """
    if frames < 2:
        raise ConfigError(f"frames={frames}: from one image to another there are at least 2, both counted")
    if len(latent) < 2:
        raise DataError(f"an interpolation needs at least 2 images, found {len(latent)}")
    places = [(row, number / (frames - 1)) for row in range(len(latent) - 1) for number in range(frames - 1)]
    places.append((len(latent) - 2, 1.0))

    def between(each: Tensor) -> Tensor:
        return torch.cat([slerp(each[row : row + 1], each[row + 1 : row + 2], share) for row, share in places])

    nearest = latent.take([row + round(share) for row, share in places])
    if fixed_noise is None:
        noise = tuple(map(between, latent.noise))
    else:
        noise = tuple(each.expand(len(places), -1, -1, -1) for each in fixed_noise)
    return replace(nearest, embeddings=between(latent.embeddings), noise=noise)


def text_diff(
    latent: BipartiteLatent, target: Tensor, baseline: Tensor | None, thetas: Sequence[float]
) -> BipartiteLatent:
    """Images turned toward a text: slerp of z_i toward norm(z_t − z_t0), x_T fixed (unCLIP §3.3).

    Args:
        target: (embed_dim,), z_t of the text.
        baseline: (embed_dim,) or (B, embed_dim), z_t0: of a caption of the image as it is, or of a dummy such as "a photo";
            None: nothing is taken off.
        thetas: how far, as shares of the arc; the paper goes from 0 to somewhere between 0.25 and 0.50.

    Returns:
        For each image all thetas, in turn.

    Raises:
        ConfigError: thetas outside of [0, 1].
        DataError: a baseline that is the target, so that there is no direction.
    """
    if not thetas or not all(0 <= theta <= 1 for theta in thetas):
        raise ConfigError(f"thetas must lie in [0, 1], found {list(thetas)}")
    difference = (target if baseline is None else target - baseline).expand_as(latent.embeddings)
    if bool((difference.norm(dim=1) < 1e-6).any()):
        raise DataError("the target says what the baseline says: name a text that differs")
    # As long as z_i, where that is not of length 1.
    difference = F.normalize(difference, dim=1) * latent.embeddings.norm(dim=1, keepdim=True)
    turned = torch.stack([slerp(latent.embeddings, difference, theta) for theta in thetas], dim=1)
    rows = latent.take([row for row in range(len(latent)) for _ in thetas])
    return replace(rows, embeddings=turned.flatten(0, 1))


def component_counts(dim: int) -> list[int]:
    """Of the principal components of embeddings, the paper's numbers, or their share of fewer dimensions than 1,024."""
    return sorted({max(1, round(count * min(1, dim / 1024))) for count in PAPER_COMPONENTS})


def reduce_components(embeddings: Tensor, mean: Tensor, components: Tensor, counts: Sequence[int]) -> Tensor:
    """Embeddings from their first principal components alone (unCLIP §4, Fig. 7).

    Args:
        embeddings: (B, D).
        mean, components: (D,), (D, D) directions as rows, as `EmbeddingMoments` has them.
        counts: how many to keep, each in [1, D].

    Returns:
        (B, len(counts), D), each as long as its embedding.

    Raises:
        ConfigError: counts out of range.
    """
    if not counts or not all(1 <= count <= len(mean) for count in counts):
        raise ConfigError(f"components must lie in [1, {len(mean)}], found {list(counts)}")
    centred = embeddings.double() - mean
    found = []
    for count in counts:
        first = components[:count]
        found.append(mean + centred @ first.T @ first)
    length = embeddings.double().norm(dim=1)[:, None, None]
    return (F.normalize(torch.stack(found, dim=1), dim=2) * length).float()
