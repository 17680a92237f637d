"""What FID and the Inception Score need of many pictures, as sums: over batches, over processes, in float64.

A distance is computed once, from the sums of all processes. The mean of distances of parts is another number, and a larger
one. Nothing of a picture is kept, so that a set may be of any size.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property

import numpy as np
import torch
from torch import Tensor

from dalle_ds.errors import DataError
from dalle_ds.parallel import Mesh

SPLITS = 10
"""Parts of a set whose Inception Scores are averaged (Salimans et al., 2016)."""
SPLIT_SEED = 2020
"""Of the order in which pictures are divided among the splits: torch-fidelity's."""


@dataclass(frozen=True)
class Moments:
    """Number, sum and sum of outer products of feature vectors; two of them add up."""

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

    def __add__(self, other: Moments) -> Moments:
        return Moments(self.count + other.count, self.total + other.total, self.outer + other.outer)

    def summed(self, mesh: Mesh) -> Moments:
        """The sum over all processes."""
        return Moments(mesh.sum(self.count, "world"), mesh.sum(self.total, "world"), mesh.sum(self.outer, "world"))

    def gaussian(self) -> tuple[Tensor, Tensor]:
        """Mean (D,) and covariance (D, D), the latter with n − 1 in the denominator.

        Raises:
            DataError: fewer than two feature vectors.
        """
        if self.count < 2:
            raise DataError(f"a covariance needs at least 2 pictures, found {int(self.count)}")
        mean = self.total / self.count
        return mean, (self.outer - self.count * torch.outer(mean, mean)) / (self.count - 1)

    @cached_property
    def root(self) -> Tensor:
        """(D, r) whose product with its transpose is the covariance, of rank r: less than D where there are few pictures.

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
        DataError: a set of fewer than two pictures.
    """
    mean_1, covariance_1 = one.gaussian()
    mean_2, covariance_2 = other.gaussian()
    product = one.root.T @ covariance_2 @ one.root
    roots = torch.linalg.eigvalsh((product + product.T) / 2).clamp_min(0).sqrt().sum()
    return float((mean_1 - mean_2).square().sum() + covariance_1.trace() + covariance_2.trace() - 2 * roots)


@dataclass(frozen=True)
class Predictions:
    """Sums of the class probabilities of pictures, for each split of a set; two of them add up."""

    count: Tensor
    """(S,) float64."""
    probability: Tensor
    """(S, C) float64, Σ p."""
    negentropy: Tensor
    """(S,) float64, Σ Σ_c p ln p."""

    @classmethod
    def of(cls, logits: Tensor, splits: Tensor, number: int) -> Predictions:
        """Those of (B, C) logits of pictures that belong to `splits` (B,) of `number`."""
        log_p = logits.double().log_softmax(dim=1)
        p = log_p.exp()
        member = torch.nn.functional.one_hot(splits.to(logits.device), number).double()  # (B, S)
        return cls(member.sum(dim=0), member.T @ p, member.T @ (p * log_p).sum(dim=1))

    def __add__(self, other: Predictions) -> Predictions:
        return Predictions(
            self.count + other.count, self.probability + other.probability, self.negentropy + other.negentropy
        )

    def summed(self, mesh: Mesh) -> Predictions:
        """The sum over all processes."""
        return Predictions(
            mesh.sum(self.count, "world"), mesh.sum(self.probability, "world"), mesh.sum(self.negentropy, "world")
        )


def inception_score(predictions: Predictions) -> float:
    """exp of the mean of KL(p(class | picture), p(class)), averaged over splits (Salimans et al., 2016).

    The mean KL of a split is Σ p ln p / n − Σ_c q ln q with q the mean of p, hence its sums suffice. Of generated pictures: of
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
    """10, or fewer where they would have fewer than two pictures: a split of one has a score of 1, whatever it shows."""
    return max(1, min(SPLITS, rows // 2))
