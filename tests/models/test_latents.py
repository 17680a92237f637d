"""Embeddings as tokens: moments and components against numpy and scikit-like references, round trips."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from torch import Tensor

from dalle_ds.errors import ConfigError, DataError
from dalle_ds.models.latents import EmbeddingMoments, LatentCodec, components_for


def embeddings(rows: int = 4000, dim: int = 24) -> Tensor:
    generator = torch.Generator().manual_seed(0)
    scales = 0.5 ** (torch.arange(dim) / 2)
    turn = torch.linalg.qr(torch.randn(dim, dim, generator=generator)).Q
    return (torch.randn(rows, dim, generator=generator) * scales) @ turn + torch.randn(dim, generator=generator)


def codec_of(rows: Tensor, count: int, buckets: int = 64) -> LatentCodec:
    moments = EmbeddingMoments(rows.shape[1])
    moments.add(rows)
    directions = moments.components()[1][:count]
    ends = (rows.double() - moments.mean) @ directions.T
    return LatentCodec(moments.mean, directions, ends.amin(0), ends.amax(0), buckets)


def test_moments_are_numpys_and_add_up_over_parts() -> None:
    rows = embeddings()
    whole, parts = EmbeddingMoments(24), [EmbeddingMoments(24) for _ in range(3)]
    whole.add(rows)
    for number, part in enumerate(parts):
        for batch in rows[number::3].split(77):
            part.add(batch)
    for other in parts[1:]:
        for mine, theirs in zip(parts[0].sums, other.sums, strict=True):
            mine += theirs
    reference = rows.double().numpy()
    for moments in (whole, parts[0]):
        np.testing.assert_allclose(moments.mean.numpy(), reference.mean(0), rtol=0, atol=1e-12)
        np.testing.assert_allclose(moments.covariance.numpy(), np.cov(reference.T, bias=True), rtol=0, atol=1e-11)
        np.testing.assert_allclose(moments.std.numpy(), reference.std(0), rtol=1e-9)
        assert moments.norm == pytest.approx(np.linalg.norm(reference, axis=1).mean(), rel=1e-12)
    values, directions = whole.components()
    singular = np.linalg.svd(reference - reference.mean(0), full_matrices=False)
    np.testing.assert_allclose(values.numpy(), singular[1] ** 2 / len(rows), rtol=1e-8, atol=1e-13)
    np.testing.assert_allclose(np.abs((directions.numpy() * singular[2]).sum(1)), 1, atol=1e-6)
    torch.testing.assert_close(directions, parts[0].components()[1], rtol=0, atol=1e-6)


def test_components_are_chosen_by_the_variance_they_leave() -> None:
    values = torch.tensor([80.0, 15.0, 4.0, 0.9, 0.1])
    assert [components_for(values, lost) for lost in (0.5, 0.21, 0.19, 0.05, 0.049, 0.01, 0.0)] == [1, 1, 2, 2, 3, 3, 5]
    with pytest.raises(ConfigError):
        components_for(values, 1.0)


def test_round_trips_lose_what_components_and_buckets_leave() -> None:
    rows = embeddings()
    moments = EmbeddingMoments(24)
    moments.add(rows)
    values = moments.components()[0]
    for count in (4, 12, 24):
        codec = codec_of(rows, count, buckets=64)
        codes = codec.encode(rows)
        assert codes.shape == (4000, count) and codes.min() == 0 and codes.max() == 63
        left = float(values[count:].sum() / values.sum())
        step = (codec.high - codec.low) / 64
        rounding = float((step**2 / 12).sum() / values.sum())  # of values spread evenly within a bucket
        assert codec.lost(rows) == pytest.approx(left + rounding, rel=0.05)
        # Codes are kept exactly, and twice is as good as once.
        torch.testing.assert_close(codec.encode(codec.decode(codes)), codes)
        again = LatentCodec.from_state_dict(codec.state_dict())
        assert torch.equal(again.decode(codes), codec.decode(codes))


def test_what_lies_beyond_goes_to_the_outermost_bucket() -> None:
    codec = codec_of(embeddings(), 3)
    far = codec.mean + 100 * codec.directions[0]
    assert codec.encode(torch.stack([far, 2 * codec.mean - far]))[:, 0].tolist() == [63, 0]


def test_embeddings_without_variance_are_refused() -> None:
    moments = EmbeddingMoments(3)
    with pytest.raises(DataError):
        _ = moments.mean
    moments.add(torch.tensor([[1.0, 2.0, 3.0], [1.0, 0.0, 1.0]]))
    with pytest.raises(DataError):
        _ = moments.std
    with pytest.raises(ConfigError):
        LatentCodec(torch.zeros(3), torch.eye(3), torch.zeros(3), torch.tensor([1.0, 0.0, 1.0]), 8)
    with pytest.raises(ConfigError):
        LatentCodec(torch.zeros(3), torch.eye(3), torch.zeros(3), torch.ones(3), 1)
