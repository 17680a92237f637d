"""What priors make of CLIP's embeddings (unCLIP §2.2, App. C): numbers of a fit size, or a few tokens.

Tokens are principal components, the most varied first, each cut into buckets.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import torch
from torch import Tensor

from dalle_ds.errors import CheckpointError, ConfigError, DataError


class EmbeddingMoments:
    """Running float64 sums over embeddings, from which mean, variances and principal components follow.

    Sums of several processes or parts add up: `sums` is what they exchange.

    Args:
        dim: dimensions of the embeddings.
    """

    def __init__(self, dim: int) -> None:
        self.count = torch.zeros((), dtype=torch.float64)
        self.total = torch.zeros(dim, dtype=torch.float64)
        self.products = torch.zeros(dim, dim, dtype=torch.float64)
        self.norms = torch.zeros((), dtype=torch.float64)

    @property
    def sums(self) -> list[Tensor]:
        """Tensors that add up over processes, in place."""
        return [self.count, self.total, self.products, self.norms]

    @classmethod
    def merged(cls, several: Sequence[EmbeddingMoments]) -> EmbeddingMoments:
        """Of all rows of several."""
        whole = cls(len(several[0].total))
        for moments in several:
            for total, part in zip(whole.sums, moments.sums, strict=True):
                total += part
        return whole

    def add(self, embeddings: Tensor) -> None:
        """Count (B, dim) embeddings of any dtype."""
        rows = embeddings.double().cpu()
        self.count += len(rows)
        self.total += rows.sum(0)
        self.products += rows.T @ rows
        self.norms += rows.norm(dim=1).sum()

    @property
    def mean(self) -> Tensor:
        """(dim,) float64."""
        self._need_rows()
        return self.total / self.count

    @property
    def covariance(self) -> Tensor:
        """(dim, dim) float64, divided by the number of rows."""
        mean = self.mean
        return self.products / self.count - mean.outer(mean)

    @property
    def std(self) -> Tensor:
        """(dim,) float64, of each dimension.

        Raises:
            DataError: a dimension that is the same in all rows, by which nothing can be divided.
        """
        variances = self.covariance.diagonal()
        if bool((variances <= 1e-12 * variances.max()).any()) or not bool(variances.max() > 0):
            raise DataError(
                "a dimension of the embeddings is the same in all rows: embed more images, or with another CLIP"
            )
        return variances.sqrt()

    @property
    def norm(self) -> float:
        """Mean length of an embedding."""
        self._need_rows()
        return float(self.norms / self.count)

    def components(self) -> tuple[Tensor, Tensor]:
        """Principal components by falling eigenvalue: (dim,) eigenvalues ≥ 0 and (dim, dim) directions as rows, float64.

        The greatest entry of each direction is positive, so that equal sums give equal directions.
        """
        values, vectors = torch.linalg.eigh(self.covariance)
        vectors = vectors.T.flip(0)
        signs = vectors.gather(1, vectors.abs().argmax(dim=1, keepdim=True)).sign()
        return values.flip(0).clamp(min=0), vectors * signs

    def _need_rows(self) -> None:
        if not self.count > 0:
            raise DataError("there are no embeddings to take moments of")


class EmbeddingScaling:
    """Embeddings as a diffusion model sees them: (z − shift) · factor.

    Args:
        shift, factor: (dim,) each; `constant` and `standardized` make them.

    Raises:
        ConfigError: a factor that is not finite and positive.
    """

    def __init__(self, shift: Tensor, factor: Tensor) -> None:
        if not bool((factor > 0).all() and torch.isfinite(factor).all() and torch.isfinite(shift).all()):
            raise ConfigError("embeddings can be scaled by finite numbers greater than 0 only")
        self.shift, self.factor = shift.float(), factor.float()

    @classmethod
    def constant(cls, dim: int, scale: float) -> EmbeddingScaling:
        """z · scale (17.2 in unCLIP App. C)."""
        return cls(torch.zeros(dim), torch.full((dim,), scale))

    @classmethod
    def standardized(cls, moments: EmbeddingMoments) -> EmbeddingScaling:
        """Mean 0 and variance 1 in each dimension; DataError where a dimension does not vary."""
        return cls(moments.mean, 1 / moments.std)

    def scale(self, embeddings: Tensor) -> Tensor:
        """(…, dim) → (…, dim) fp32."""
        return (embeddings.float() - self.shift.to(embeddings.device)) * self.factor.to(embeddings.device)

    def unscale(self, scaled: Tensor) -> Tensor:
        """The inverse of `scale`."""
        return scaled.float() / self.factor.to(scaled.device) + self.shift.to(scaled.device)

    def variance(self, moments: EmbeddingMoments) -> float:
        """Mean variance of the elements of scaled embeddings."""
        return float((moments.covariance.diagonal() * self.factor.double().square()).mean())

    def state_dict(self) -> dict[str, Tensor]:
        """Tensors for an export: the arguments."""
        return {"shift": self.shift, "factor": self.factor}


def components_for(eigenvalues: Tensor, lost: float) -> int:
    """The fewest first components beyond which at most the share `lost` of the variance lies (unCLIP §2.2: 319 of 1,024, for
    1 %)."""
    if not 0 <= lost < 1:
        raise ConfigError(f"the lost share of variance must lie in [0, 1), found {lost}")
    kept = eigenvalues.cumsum(0) / eigenvalues.sum()
    return min(int((kept < 1 - lost).sum()) + 1, len(eigenvalues))


class LatentCodec:
    """Embeddings to codes and back.

    A coordinate's bucket is its place among `buckets` equal steps between the least and the greatest value in training; what
    lies beyond goes to the outermost. Equal steps lose less than quantiles do: the mean squared error is the measure, and
    quantiles make the outer buckets wide.

    Args:
        mean: (dim,) of the embeddings.
        directions: (n, dim), orthonormal rows, the most varied first.
        low, high: (n,) least and greatest coordinates in training.
        buckets: of each coordinate.
    """

    def __init__(self, mean: Tensor, directions: Tensor, low: Tensor, high: Tensor, buckets: int) -> None:
        if buckets < 2:
            raise ConfigError(f"a coordinate needs at least 2 buckets, found {buckets}")
        if not bool((high > low).all()):
            raise ConfigError("a component is the same in all rows: keep fewer components")
        self.mean, self.directions = mean.float(), directions.float()
        self.low, self.high, self.buckets = low.float(), high.float(), buckets

    def __len__(self) -> int:
        return len(self.directions)

    def project(self, embeddings: Tensor) -> Tensor:
        """(B, dim) → (B, n) coordinates, fp32."""
        return (embeddings.float() - self.mean.to(embeddings.device)) @ self.directions.T.to(embeddings.device)

    def encode(self, embeddings: Tensor) -> Tensor:
        """(B, dim) → (B, n) int64 in [0, buckets)."""
        low, high = self.low.to(embeddings.device), self.high.to(embeddings.device)
        places = (self.project(embeddings) - low) / (high - low) * self.buckets
        return places.floor().clamp(0, self.buckets - 1).long()

    def decode(self, codes: Tensor) -> Tensor:
        """(B, n) int64 in [0, buckets) → (B, dim) fp32, of the buckets' centres."""
        low, high = self.low.to(codes.device), self.high.to(codes.device)
        coordinates = low + (codes.float() + 0.5) / self.buckets * (high - low)
        return coordinates @ self.directions.to(codes.device) + self.mean.to(codes.device)

    def lost(self, embeddings: Tensor) -> float:
        """Share of the variance of (B, dim) embeddings that the round trip loses."""
        rows = embeddings.double()
        error = (self.decode(self.encode(embeddings)).double() - rows).square().sum()
        return float(error / (rows - rows.mean(0)).square().sum())

    @classmethod
    def fitted(cls, moments: EmbeddingMoments, embeddings: Tensor, components: int, buckets: int) -> LatentCodec:
        """The first components of `moments`, between the least and the greatest values in (B, dim) embeddings."""
        directions = moments.components()[1][:components].float()
        coordinates = (embeddings.float() - moments.mean.float()) @ directions.T
        return cls(moments.mean, directions, coordinates.amin(0), coordinates.amax(0), buckets)

    def state_dict(self) -> dict[str, Tensor]:
        """Tensors for an export, read by `from_state_dict`."""
        return {
            "mean": self.mean,
            "directions": self.directions,
            "low": self.low,
            "high": self.high,
            "buckets": torch.tensor(self.buckets),
        }

    @classmethod
    def from_state_dict(cls, state: Mapping[str, Tensor]) -> LatentCodec:
        """Raises a `CheckpointError` where tensors are missing."""
        names = ("mean", "directions", "low", "high", "buckets")
        missing = [name for name in names if name not in state]
        if missing:
            raise CheckpointError(f"the codec of a latent prior lacks {', '.join(missing)}")
        mean, directions, low, high, buckets = (state[name] for name in names)
        return cls(mean, directions, low, high, int(buckets))
