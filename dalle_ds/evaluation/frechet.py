"""Fréchet distance (FID) and Inception Score, of sums over batches and processes in float64.

A distance is computed once, from the sums of all processes. The mean of distances of parts is another number, and a larger
one. Nothing of an image is kept, so that a set may be of any size.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, fields
from functools import cached_property
from typing import TYPE_CHECKING

import numpy as np
import torch
from torch import Tensor

from dalle_ds.errors import DataError
from dalle_ds.evaluation.features import PROBE, SPLITS, FeatureNetwork, gaussian_blur
from dalle_ds.evaluation.sets import CHUNK, Selections
from dalle_ds.parallel import Mesh

if TYPE_CHECKING:
    from typing_extensions import Self

SPLIT_SEED = 2020
"""Of the order in which images are divided among the splits: torch-fidelity's."""


class Sums:
    """Dataclasses of three tensors that add up, over batches and over processes."""

    def __add__(self, other: Self) -> Self:
        return type(self)(*map(torch.add, self._tensors(), other._tensors()))

    def summed(self, mesh: Mesh) -> Self:
        """The sum over all processes."""
        return type(self)(*(mesh.sum(tensor, "world") for tensor in self._tensors()))

    def _tensors(self) -> list[Tensor]:
        return [getattr(self, field.name) for field in fields(self)]  # type: ignore[arg-type]


@dataclass(frozen=True)
class Moments(Sums):
    """Number, sum and sum of outer products of feature vectors."""

    count: Tensor
    """() float64."""
    total: Tensor
    """(D,) float64."""
    outer: Tensor
    """(D, D) float64."""

    @classmethod
    def of(cls, features: Tensor) -> Moments:
        """Those of (B, D) features."""
        features = features.double()
        return cls(features.new_tensor(len(features)), features.sum(dim=0), features.T @ features)

    def gaussian(self) -> tuple[Tensor, Tensor]:
        """Mean (D,) and covariance (D, D), the latter with n − 1 in the denominator.

        Raises:
            DataError: fewer than two feature vectors.
        """
        if self.count < 2:
            raise DataError(f"a covariance needs at least 2 images, found {int(self.count)}")
        mean = self.total / self.count
        return mean, (self.outer - self.count * torch.outer(mean, mean)) / (self.count - 1)

    @cached_property
    def root(self) -> Tensor:
        """(D, r) whose product with its transpose is the covariance, of rank r: less than D where there are few images.

        What rounding has moved off 0 is left out; it would count, since roots of small numbers are not small.
        """
        _, covariance = self.gaussian()
        values, vectors = torch.linalg.eigh(covariance)
        some = values > len(values) * torch.finfo(values.dtype).eps * values[-1]
        return vectors[:, some] * values[some].sqrt()


def frechet_distance(one: Moments, other: Moments) -> float:
    """Squared Fréchet distance of the Gaussians with the moments of two sets (Heusel et al., 2017).

    |μ₁ − μ₂|² + tr(Σ₁ + Σ₂ − 2 (Σ₁Σ₂)^½). With Σ₁ = R Rᵀ, the trace of the root is the sum of the roots of the eigenvalues of
    Rᵀ Σ₂ R, which is symmetric, so that they are real; those that rounding makes negative count as 0. R is kept with the first
    set.

    Raises:
        DataError: a set of fewer than two images.
    """
    mean_1, covariance_1 = one.gaussian()
    mean_2, covariance_2 = other.gaussian()
    product = one.root.T @ covariance_2 @ one.root
    roots = torch.linalg.eigvalsh((product + product.T) / 2).clamp_min(0).sqrt().sum()
    return float((mean_1 - mean_2).square().sum() + covariance_1.trace() + covariance_2.trace() - 2 * roots)


@dataclass(frozen=True)
class Predictions(Sums):
    """Sums of the class probabilities of images, for each split of a set."""

    count: Tensor
    """(S,) float64."""
    probability: Tensor
    """(S, C) float64, Σ p."""
    negentropy: Tensor
    """(S,) float64, Σ Σ_c p ln p."""

    @classmethod
    def of(cls, logits: Tensor, splits: Tensor, number: int) -> Predictions:
        """Those of (B, C) logits of images that belong to `splits` (B,) of `number`."""
        log_p = logits.double().log_softmax(dim=1)
        p = log_p.exp()
        member = torch.nn.functional.one_hot(splits.to(logits.device), number).double()  # (B, S)
        return cls(member.sum(dim=0), member.T @ p, member.T @ (p * log_p).sum(dim=1))


def inception_score(predictions: Predictions) -> float:
    """exp of the mean of KL(p(class | image), p(class)), averaged over splits (Salimans et al., 2016).

    The mean KL of a split is Σ p ln p / n − Σ_c q ln q with q the mean of p, hence its sums suffice. Of generated images: of
    real ones it says nothing about a model.
    """
    held = predictions.count > 0
    count, negentropy = predictions.count[held], predictions.negentropy[held]
    q = predictions.probability[held] / count[:, None]
    divergence = negentropy / count - torch.special.xlogy(q, q).sum(dim=1)
    return float(divergence.exp().mean())


def split_of_rows(rows: int) -> Tensor:
    """Which of `split_count(rows)` splits each row of a set belongs to: (rows,) int64, as torch-fidelity divides them."""
    number = split_count(rows)
    order = np.random.RandomState(SPLIT_SEED).permutation(rows)
    splits = torch.empty(rows, dtype=torch.int64)
    for split in range(number):
        splits[order[split * rows // number : (split + 1) * rows // number]] = split
    return splits


def split_count(rows: int) -> int:
    """10, or fewer where they would have fewer than two images: a split of one has a score of 1, whatever it shows."""
    return max(1, min(SPLITS, rows // 2))


class Appearance:
    """Statistics of a set, of which each process adds its rows.

    Args:
        network: takes the features.
        radii: of the blur before that.
        selections: parts of the set that get statistics of their own.
    """

    def __init__(self, network: FeatureNetwork, radii: Sequence[float], selections: Selections) -> None:
        self.network = network
        self.radii = list(radii)
        self.sums: dict[tuple[str, float], tuple[Moments, Predictions]] = {}
        """By selection and radius."""
        self._splits: dict[str, Tensor] = {}
        """Selection → (rows,) the split that each row belongs to, −1 outside of the selection."""
        for name, chosen in selections.items():
            self._splits[name] = torch.full((len(chosen),), -1)
            self._splits[name][chosen] = split_of_rows(int(chosen.sum()))

    def add(self, rows: Sequence[int], pixels: Tensor) -> None:
        """Add images (len(rows), 3, H, W) uint8; a row must be added once, by one process."""
        index = torch.tensor(rows, dtype=torch.int64)
        self._add(pixels, {name: splits[index] for name, splits in self._splits.items()})

    def _add(self, pixels: Tensor, splits: dict[str, Tensor]) -> None:
        blurred = torch.cat([gaussian_blur(pixels, radius) for radius in self.radii])
        outputs = [self.network(chunk) for chunk in blurred.split(CHUNK)]
        features, logits = (torch.cat(each).split(len(pixels)) for each in zip(*outputs, strict=True))
        for name, split in splits.items():
            number = split_count(int((self._splits[name] >= 0).sum()))
            chosen = split >= 0
            for radius, vectors, classes in zip(self.radii, features, logits, strict=True):
                kept = chosen.to(vectors.device)
                moments = Moments.of(vectors[kept])
                predictions = Predictions.of(classes[kept], split[chosen], number)
                if (name, radius) in self.sums:
                    before = self.sums[name, radius]
                    moments, predictions = before[0] + moments, before[1] + predictions
                self.sums[name, radius] = moments, predictions

    def summed(self, mesh: Mesh) -> Appearance:
        """The same with all processes' rows in it; no more can be added. Collective."""
        if not self.sums:  # no row came here: zeros of the sizes that others have
            nothing = torch.zeros(1, 3, PROBE, PROBE, dtype=torch.uint8, device=mesh.device)
            self._add(nothing, {name: torch.tensor([-1]) for name in self._splits})
        for key, (moments, predictions) in self.sums.items():
            self.sums[key] = moments.summed(mesh), predictions.summed(mesh)
        return self


def distances(reference: Appearance, other: Appearance) -> dict[str, dict[str, float]]:
    """Selection → figures: Fréchet distance at every radius; from all of the reference where it lacks the selection."""
    figures: dict[str, dict[str, float]] = {}
    for (name, radius), (moments, _) in other.sums.items():
        basis, _ = reference.sums.get((name, radius)) or reference.sums["", radius]
        title = f"{other.network.distance}/blur_{radius:g}"
        figures.setdefault(name, {})[title] = frechet_distance(basis, moments)
    return figures


def inception_scores(generated: Appearance) -> dict[str, dict[str, float]]:
    """Selection → figures: Inception Score at every radius."""
    figures: dict[str, dict[str, float]] = {}
    for (name, radius), (_, predictions) in generated.sums.items():
        title = f"{generated.network.score}/blur_{radius:g}"
        figures.setdefault(name, {})[title] = inception_score(predictions)
    return figures
