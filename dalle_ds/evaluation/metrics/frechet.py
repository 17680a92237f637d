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
from dalle_ds.evaluation.metrics.features import PROBE, SPLITS, FeatureNetwork, gaussian_blur
from dalle_ds.evaluation.sets import CHUNK, Selections
from dalle_ds.parallel import Mesh

if TYPE_CHECKING:
    from typing_extensions import Self

SPLIT_SEED = 2020
"""Of the order in which images are divided among the splits: torch-fidelity's."""


class Sums:
    """Dataclasses of tensors that add up, over batches and over processes."""

    def __add__(self, other: Self) -> Self:
        return type(self)(*(getattr(self, name) + getattr(other, name) for name in self._names()))

    def summed(self, mesh: Mesh) -> Self:
        """The sum over all processes."""
        return type(self)(*(mesh.sum(getattr(self, name), "world") for name in self._names()))

    def _names(self) -> list[str]:
        return [field.name for field in fields(self)]  # type: ignore[arg-type]


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


Key = tuple[str, float]
"""Selection, blur radius."""


class Appearance:
    """Statistics of a set, of which each process adds its rows.

    Args:
        network: takes the features.
        radii: of the blur before that.
        selections: parts of the set that get statistics of their own.
        generated: whether it gets a score, which is of generated images only.
    """

    def __init__(
        self, network: FeatureNetwork, radii: Sequence[float], selections: Selections, *, generated: bool
    ) -> None:
        self.network = network
        self.radii = list(radii)
        self.selections = selections
        self.generated = generated
        self.moments: dict[Key, Moments] = {}
        self.predictions: dict[Key, Predictions] = {}
        self._splits: dict[str, Tensor] = {}
        self._numbers: dict[str, int] = {}
        for name, chosen in selections.items():
            rows = int(chosen.sum())
            self._numbers[name] = split_count(rows)
            self._splits[name] = torch.zeros(len(chosen), dtype=torch.int64)
            self._splits[name][chosen] = split_of_rows(rows)

    def add(self, rows: Sequence[int], pixels: Tensor) -> None:
        """Add images (len(rows), 3, H, W) uint8; a row must be added once, by one process."""
        index = torch.tensor(rows, dtype=torch.int64)
        blurred = torch.cat([gaussian_blur(pixels, radius) for radius in self.radii])
        outputs = [self.network(chunk) for chunk in blurred.split(CHUNK)]
        features = torch.cat([features for features, _ in outputs]).split(len(rows))
        logits = torch.cat([logits for _, logits in outputs]).split(len(rows))
        for number, radius in enumerate(self.radii):
            for name, chosen in self.selections.items():
                mask = chosen[index]
                self._accumulate((name, radius), features[number], logits[number], mask, self._splits[name][index])

    def _accumulate(self, key: Key, features: Tensor, logits: Tensor, mask: Tensor, splits: Tensor) -> None:
        kept = mask.to(features.device)
        moments = Moments.of(features[kept])
        self.moments[key] = self.moments[key] + moments if key in self.moments else moments
        if self.generated:
            predictions = Predictions.of(logits[kept], splits[mask], self._numbers[key[0]])
            self.predictions[key] = self.predictions[key] + predictions if key in self.predictions else predictions

    def summed(self, mesh: Mesh) -> Appearance:
        """That of all processes' rows. Collective."""
        whole = Appearance(self.network, self.radii, self.selections, generated=self.generated)
        keys = [(name, radius) for name in self.selections for radius in self.radii]
        if not self.moments:  # no row came here: zeros of the sizes that others have
            nothing = torch.zeros(0, dtype=torch.int64)
            features, logits = self.network(torch.zeros(1, 3, PROBE, PROBE, dtype=torch.uint8, device=mesh.device))
            for key in keys:
                self._accumulate(key, features[:0], logits[:0], nothing.bool(), nothing)
        whole.moments = {key: self.moments[key].summed(mesh) for key in keys}
        if self.generated:
            whole.predictions = {key: self.predictions[key].summed(mesh) for key in keys}
        return whole


def distances(reference: Appearance, other: Appearance) -> dict[str, dict[str, float]]:
    """Selection → figures: Fréchet distance at every radius, and the score of the other set where it is a generated one.

    Selections that the reference lacks are compared with all of it.
    """
    figures: dict[str, dict[str, float]] = {}
    for name in other.selections:
        basis = name if name in reference.selections else ""
        found: dict[str, float] = {}
        for radius in other.radii:
            moments = other.moments[name, radius]
            found[f"{other.network.distance}/blur_{radius:g}"] = frechet_distance(
                reference.moments[basis, radius], moments
            )
        if other.generated:
            for radius in other.radii:
                found[f"{other.network.score}/blur_{radius:g}"] = inception_score(other.predictions[name, radius])
        figures[name] = found
    return figures
