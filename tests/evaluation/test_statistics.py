"""Distances and scores against torch-fidelity and torchmetrics, and their sums over parts."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn
from torchmetrics.image.fid import FrechetInceptionDistance

from dalle_ds.errors import DataError
from dalle_ds.evaluation.frechet import (
    Moments,
    Predictions,
    frechet_distance,
    inception_score,
    split_count,
    split_of_rows,
)
from tests.references import reference


def vectors(count: int, dimensions: int, seed: int) -> Tensor:
    """Correlated features with a mean, in fp32 as a network gives them."""
    generator = torch.Generator().manual_seed(seed)
    mixing = torch.randn(dimensions, dimensions, generator=generator) / dimensions**0.5
    return torch.randn(count, dimensions, generator=generator) @ mixing + 0.5 + 0.1 * seed


def fidelity_fid(one: Tensor, other: Tensor) -> float:
    fid = reference("torch_fidelity.metric_fid")
    statistics = [fid.fid_features_to_statistics(features.double()) for features in (one, other)]
    return fid.fid_statistics_to_metric(*statistics, verbose=False)["frechet_inception_distance"]


def of_parts(features: Tensor, size: int) -> Moments:
    parts = [Moments.of(part) for part in features.split(size)]
    return sum(parts[1:], parts[0])


@pytest.mark.parametrize("count", [300, 20])  # the second one with singular covariances
def test_distance_is_torch_fidelitys(count: int) -> None:
    one, other = vectors(count, 48, 1), vectors(count + 17, 48, 2)
    ours = frechet_distance(of_parts(one, 7), of_parts(other, 5))
    # The reference takes roots of eigenvalues that rounding has moved off 0: 1e-7 and not 0, where there are many.
    assert ours == pytest.approx(fidelity_fid(one, other), rel=1e-4)


def test_distance_is_torchmetrics() -> None:
    class Same(nn.Module):
        num_features = 32

        def forward(self, x: Tensor) -> Tensor:
            return x.double()

    one, other = vectors(200, 32, 3), vectors(150, 32, 4)
    metric = FrechetInceptionDistance(feature=Same())
    metric.update(one, real=True)
    metric.update(other, real=False)
    assert frechet_distance(of_parts(one, 64), of_parts(other, 64)) == pytest.approx(float(metric.compute()), rel=1e-6)


def test_a_mean_of_distances_of_parts_is_another_number() -> None:
    one, other = vectors(200, 32, 5), vectors(200, 32, 6)
    whole = frechet_distance(Moments.of(one), Moments.of(other))
    halves = [
        frechet_distance(Moments.of(a), Moments.of(b)) for a, b in zip(one.split(100), other.split(100), strict=True)
    ]
    assert sum(halves) / 2 > 1.05 * whole


def test_equal_sets_have_no_distance() -> None:
    features = Moments.of(vectors(100, 16, 7))
    assert abs(frechet_distance(features, features)) < 1e-9


def test_distance_of_few_pictures_is_exact() -> None:
    """Against singular values of the features themselves: tr (Σ₁Σ₂)^½ is their sum, for centred A and B, of A Bᵀ."""
    one, other = vectors(30, 200, 1).double(), vectors(41, 200, 2).double()
    a, b = ((each - each.mean(dim=0)) / (len(each) - 1) ** 0.5 for each in (one, other))
    expected = (one.mean(dim=0) - other.mean(dim=0)).square().sum() + a.square().sum() + b.square().sum()
    expected -= 2 * torch.linalg.svdvals(a @ b.T).sum()
    moments = Moments.of(one), Moments.of(other)
    assert frechet_distance(*moments) == pytest.approx(float(expected), rel=1e-8)
    assert frechet_distance(*moments[::-1]) == pytest.approx(float(expected), rel=1e-8)


def test_pictures_that_are_all_alike_have_a_distance() -> None:
    alike, others = torch.ones(5, 3), vectors(9, 3, 4)
    mean, covariance = Moments.of(others).gaussian()
    expected = float((mean - 1).square().sum() + covariance.trace())
    for pair in ((alike, others), (others, alike)):
        assert frechet_distance(*map(Moments.of, pair)) == pytest.approx(expected, rel=1e-9)


def test_one_picture_has_no_covariance() -> None:
    with pytest.raises(DataError, match="at least 2 images, found 1"):
        frechet_distance(Moments.of(vectors(1, 4, 8)), Moments.of(vectors(9, 4, 8)))


@pytest.mark.parametrize("count", [237, 10, 3])
def test_score_is_torch_fidelitys(count: int) -> None:
    logits = 3 * vectors(count, 20, 9)
    splits, number = split_of_rows(count), split_count(count)
    parts = [Predictions.of(a, b, number) for a, b in zip(logits.split(7), splits.split(7), strict=True)]
    isc = reference("torch_fidelity.metric_isc")
    expected = isc.isc_features_to_metric(logits, splits=number, shuffle=True, rng_seed=2020)["inception_score_mean"]
    assert inception_score(sum(parts[1:], parts[0])) == pytest.approx(expected, rel=1e-9)


def test_score_of_certain_and_various_pictures_is_the_number_of_classes() -> None:
    logits = 100 * torch.eye(4).repeat(50, 1)
    one = Predictions.of(logits, torch.zeros(200, dtype=torch.int64), 1)
    assert inception_score(one) == pytest.approx(4, rel=1e-9)
    assert [split_count(rows) for rows in (1, 3, 7, 19, 20, 999)] == [1, 1, 3, 9, 10, 10]
    same = Predictions.of(logits[:1].repeat(200, 1), torch.zeros(200, dtype=torch.int64), 1)
    assert inception_score(same) == pytest.approx(1, rel=1e-9)
