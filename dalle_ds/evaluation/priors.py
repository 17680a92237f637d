"""What a prior knows of a caption's image: sampled image embeddings against true ones, beside simpler guesses.

Cosine alone misleads. Of all guesses, the mean of the images that a caption may have comes closest to the one that it has, and
the mean is no image: a regression may have a greater cosine than samples that are as images are. So it is measured, too, how
far samples of one caption lie apart, and those of different captions, for which true images set the measure.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from dalle_ds.data import PairDataset
from dalle_ds.data.embeddings import EmbeddingCache
from dalle_ds.data.faults import RowError
from dalle_ds.errors import DataError
from dalle_ds.evaluation.measure import Context
from dalle_ds.evaluation.metrics import BLOCK, ROUNDING, recalls, retrieval_ranks
from dalle_ds.evaluation.results import HIGH, LOW, STANDARD_ERROR
from dalle_ds.evaluation.sets import GatheredRows, shard_rows
from dalle_ds.parallel import Mesh
from dalle_ds.sampling import Sampling
from dalle_ds.sampling.prior import PriorSampling, best_of
from dalle_ds.sampling.text_to_embedding import TextToEmbedding

PENALTIES = [10 ** (exponent / 2) for exponent in range(-12, 5)]
"""Of ridge regression, in units of the mean variance of a dimension: what is chosen from."""
HELD_OUT = 10
"""Every so many-th training row chooses the penalty."""
TRAINING_ROWS = 4096
"""Training rows in memory at once."""
RESAMPLES = 2000
"""Of the bootstrap."""


# --- figures


@dataclass(frozen=True)
class Truth:
    """What guesses are held against."""

    images: Tensor
    """(M, D) image embeddings of length 1."""
    texts: Tensor
    """(M, D) embeddings of their captions, of length 1."""
    mean: Tensor
    """(D,) of training images' embeddings."""

    def of(self, chosen: Tensor) -> Truth:
        """Some of the rows."""
        return Truth(self.images[chosen], self.texts[chosen], self.mean)


def cosines(guess: Tensor, truth: Truth) -> Tensor:
    """Cosine of (M, D) guesses of any length to the true image embeddings: (M,) float64."""
    return F.cosine_similarity(guess.double(), truth.images.double(), dim=1)


def figures(guess: Tensor, truth: Truth) -> dict[str, float]:
    """Figures of one guess for each row, (M, D) of any length: of its direction, and "norm"."""
    unit, mean = F.normalize(guess.double(), dim=1), truth.mean.double()
    centred = F.cosine_similarity(unit - mean, truth.images.double() - mean, dim=1)
    return {
        "cosine": float(cosines(guess, truth).mean()),
        "centred_cosine": float(centred.mean()),
        "text_cosine": float((unit * truth.texts.double()).sum(dim=1).mean()),
        **recalls(retrieval_ranks(truth.images, unit), len(unit)),
        "diversity": float(diversity(unit)),
        "norm": float(guess.double().norm(dim=1).mean()),
    }


def diversity(embeddings: Tensor) -> Tensor:
    """Mean of 1 − cosine over the pairs of (…, N, D) embeddings of length 1: (…) float64."""
    rows = embeddings.double()
    return _mean_distance(rows.sum(dim=-2), rows.square().sum(dim=(-2, -1)), rows.shape[-2])


def _mean_distance(total: Tensor, squares: Tensor, count: float) -> Tensor:
    """`diversity`, from the sums of vectors and of squared lengths: the pairs' products are what squaring the former adds."""
    return 1 - (total.square().sum(dim=-1) - squares) / (count * (count - 1))


def over_draws(draws: Sequence[Mapping[str, float]]) -> dict[str, float]:
    """Means of several draws' figures, each with its standard error."""
    found = {}
    for name in draws[0]:
        values = torch.tensor([draw[name] for draw in draws], dtype=torch.float64)
        found[name] = float(values.mean())
        found[f"{name}/{STANDARD_ERROR}"] = float(values.std()) / len(draws) ** 0.5
    return found


def with_interval(name: str, values: Tensor) -> dict[str, float]:
    """The mean of (M,) values with its 95 % interval, by the bootstrap over rows. The rows' order does not matter."""
    values, generator = values.double().sort().values, torch.Generator().manual_seed(0)
    drawn = [values[torch.randint(len(values), (len(values),), generator=generator)].mean() for _ in range(RESAMPLES)]
    low, high = torch.stack(drawn).quantile(torch.tensor([0.025, 0.975], dtype=torch.float64)).tolist()
    return {name: float(values.mean()), f"{name}/{LOW}": low, f"{name}/{HIGH}": high}


def prior_figures(samples: Tensor, truth: Truth, guesses: Mapping[str, Tensor], best: int) -> dict[str, float]:
    """All figures of a prior's samples and of what they are compared with.

    Args:
        samples: (M, N, D) of any length, N of at least 2 · `best`.
        guesses: name → (M, D) other guesses.
        best: each so many samples, the one nearest to its caption is figured, too; 1 leaves that out.

    Returns:
        "sample/…", "best_of_n/…", "mean_of_samples/…" and "NAME/…" as `figures`; "true_image/…"; and "gain/over_NAME", by how
        much a sample's cosine exceeds that of each guess.
    """
    draws, units = samples.unbind(dim=1), F.normalize(samples.double(), dim=2)
    groups = {"sample": over_draws([figures(draw, truth) for draw in draws])}
    of_samples = torch.stack([cosines(draw, truth) for draw in draws]).mean(dim=0)
    groups["sample"] |= with_interval("cosine", of_samples)
    groups["sample"]["caption_diversity"] = float(diversity(units).mean())
    if best > 1:
        whole = samples[:, : samples.shape[1] // best * best]
        chosen = best_of(whole, truth.texts, best)
        groups[f"best_of_{best}"] = over_draws([figures(draw, truth) for draw in chosen.unbind(dim=1)])
    groups |= {name: figures(guess, truth) for name, guess in {"mean_of_samples": units.mean(dim=1), **guesses}.items()}
    true = figures(truth.images, truth)
    groups["true_image"] = {name: true[name] for name in ("text_cosine", "diversity")}
    groups["gain"] = {}
    for name, guess in guesses.items():
        groups["gain"] |= with_interval(f"over_{name}", of_samples - cosines(guess, truth))
    return {f"{group}/{name}": value for group, found in groups.items() for name, value in found.items()}


# --- what is learned of the training pairs


class PairMoments:
    """Running float64 sums over pairs of embeddings (D,) of captions and images, which add up over parts and processes.

    Args:
        sums: (2 D + 1, 2 D + 1), sums of products of all that [1, caption, image] has.
    """

    def __init__(self, sums: Tensor) -> None:
        self.sums = sums
        dim = len(sums) // 2
        self.count = float(sums[0, 0])
        self.text_mean, self.image_mean = (sums[0, 1:] / sums[0, 0]).split(dim)

    @classmethod
    def of(cls, texts: Tensor, images: Tensor) -> PairMoments:
        """Of (B, D) pairs."""
        rows = torch.cat([torch.ones(len(texts), 1, dtype=torch.float64), texts.double(), images.double()], dim=1)
        return cls(rows.T @ rows)

    def __add__(self, other: PairMoments) -> PairMoments:
        return PairMoments(self.sums + other.sums)

    @property
    def image_diversity(self) -> float:
        """`diversity` of the images."""
        dim = len(self.image_mean)
        return float(_mean_distance(self.sums[0, -dim:], self.sums.diagonal()[-dim:].sum(), self.count))

    def about(self, text: Tensor, image: Tensor) -> tuple[Tensor, Tensor]:
        """Sums of products, (D, D) of captions and (D, D) of captions with images, `text` and `image` being taken off."""
        centre, total = torch.cat([text, image]), self.sums[0, 1:]
        sums = self.sums[1:, 1:] - total.outer(centre) - centre.outer(total - self.count * centre)
        products, cross = sums[: len(text)].split(len(text), dim=1)
        return products, cross


@dataclass(frozen=True)
class Ridge:
    """Ridge regression from embeddings of captions to those of images."""

    text_mean: Tensor
    image_mean: Tensor
    weight: Tensor
    """(D, D) float64."""

    @classmethod
    def fit(cls, pairs: PairMoments, penalty: float) -> Ridge:
        """To pairs, with a penalty in units of the mean variance of a dimension; the intercept has none."""
        products, cross = pairs.about(pairs.text_mean, pairs.image_mean)
        added = penalty * products.diagonal().mean() + 1e-12  # not 0 where all captions are the same
        weight = torch.linalg.solve(products + added * torch.eye(len(products), dtype=torch.float64), cross)
        return cls(pairs.text_mean, pairs.image_mean, weight)

    def error(self, pairs: PairMoments) -> float:
        """Squared error over pairs, less what does not depend on the weight."""
        products, cross = pairs.about(self.text_mean, self.image_mean)
        return float((self.weight * (products @ self.weight - 2 * cross)).sum())

    def __call__(self, texts: Tensor) -> Tensor:
        """(M, D) → (M, D) float64."""
        return self.image_mean + (texts.double() - self.text_mean) @ self.weight


def fit_ridge(fitted: PairMoments, held_out: PairMoments) -> Ridge:
    """To all pairs, with the penalty by which regression on the first ones has the least squared error on those held out."""
    penalty = min(PENALTIES, key=lambda penalty: Ridge.fit(fitted, penalty).error(held_out))
    return Ridge.fit(fitted + held_out, penalty)


class NearestRows:
    """For each of (M, D) embeddings the most similar of many others, of which any number is looked through at a time. Of
    equally similar ones (`ROUNDING`), such as rows of one caption, the first."""

    def __init__(self, queries: Tensor) -> None:
        self._queries = queries
        self.cosines = torch.full((len(queries),), -2.0)
        self.rows = torch.full((len(queries),), -1)

    def look_through(self, rows: Tensor, embeddings: Tensor) -> None:
        """Rows (B,), in rising order and above those before, and their embeddings (B, D)."""
        parts = [_first_greatest(part @ embeddings.T, rows) for part in self._queries.split(BLOCK)]
        cosines, found = (torch.cat(each) for each in zip(*parts, strict=True))
        better = cosines > self.cosines + ROUNDING
        self.cosines, self.rows = torch.where(better, cosines, self.cosines), torch.where(better, found, self.rows)

    def gather(self, mesh: Mesh) -> Tensor:
        """(M,) rows, of what all processes have looked through. Collective."""
        every = mesh.gather_objects((self.cosines, self.rows))
        return _first_greatest(*(torch.stack(each, dim=1) for each in zip(*every, strict=True)))[1]


def _first_greatest(similarity: Tensor, rows: Tensor) -> tuple[Tensor, Tensor]:
    """The greatest of each line of (M, B) similarities, and of its `rows`, (B,) or (M, B), the least: (M,) each."""
    greatest, beyond = similarity.amax(dim=1), torch.iinfo(torch.int64).max
    return greatest, rows.expand_as(similarity).masked_fill(similarity < greatest[:, None] - ROUNDING, beyond).amin(
        dim=1
    )


# --- reading and sampling


def measure_prior(
    context: Context,
    pipeline: TextToEmbedding[Any, Any],
    num: int,
    seed: int,
    sampling: PriorSampling | Sampling,
    best: int,
) -> None:
    """Figures of the split's first captions, whose images can be read. Collective.

    Args:
        num: samples of each caption.
        sampling: of single samples, for the prior's kind.
        best: see `prior_figures`.

    Raises:
        DataError: embeddings of the CLIP are missing, or fewer than two rows have any.
    """
    dataset, mesh, data = context.dataset, context.mesh, context.dataset.data_dir
    clip = pipeline.clip.fingerprint
    own, train = EmbeddingCache.open(data, clip, dataset.split), EmbeddingCache.open(data, clip, "train")
    found = GatheredRows(len(dataset), (2 + num, own.dim), torch.float32)
    has_any = GatheredRows(len(dataset), (), torch.int32)
    for indices in shard_rows(len(dataset), mesh, "sampled embeddings"):
        rows, texts, images, captions = read_pairs(own, indices, dataset)
        values, readable = torch.zeros(len(indices), 2 + num, own.dim), torch.zeros(len(indices))
        if rows:
            sampled = pipeline.sample(
                captions, num, seed=seed, sampling=sampling, normalize=False,
                text_embeddings=texts if pipeline.clip.config.unit_length else None,
            )  # fmt: skip
            places = torch.tensor(rows) - indices[0]
            values[places] = torch.cat([torch.stack([texts, images], dim=1), sampled.cpu()], dim=1)
            readable[places] = 1
        found.put(indices, values)
        has_any.put(indices, readable)
    kept = has_any.gather(mesh).bool()
    every = found.gather(mesh)[kept]
    texts, images, samples = every[:, 0], every[:, 1], every[:, 2:]
    selections = context.selections(kept.nonzero()[:, 0].tolist())
    for name, chosen in selections.items():
        if int(chosen.sum()) < 2:
            where = f" {name}" if name else ""
            raise DataError(f"{int(chosen.sum())} rows of {dataset.split}{where} have embeddings: take another split")
    if lost := len(dataset) - len(texts):
        context.notes.append(f"{lost:,} rows of {dataset.split} have no embeddings and are not in the prior's figures.")
    if dataset.split == "train":
        context.notes.append("The nearest caption and ridge regression saw the very rows that they are measured on.")
    pairs, guesses = learned_guesses(train, texts, mesh)
    truth = Truth(images, texts, pairs.image_mean)
    for name, chosen in selections.items():
        of_chosen = {guess: values[chosen] for guess, values in guesses.items()}
        context.record(name, "prior", prior_figures(samples[chosen], truth.of(chosen), of_chosen, best))
    context.record("", "prior/training_image", {"diversity": pairs.image_diversity})


def learned_guesses(train: EmbeddingCache, texts: Tensor, mesh: Mesh) -> tuple[PairMoments, dict[str, Tensor]]:
    """What training pairs, without a prior, let one guess of the images of captions (M, D); and the pairs' sums. Collective.

    Raises:
        DataError: too few pairs.
    """
    empty = torch.zeros(0, train.dim)
    parts, nearest = [PairMoments.of(empty, empty)] * 2, NearestRows(texts)
    for indices in shard_rows(len(train), mesh, "training embeddings", TRAINING_ROWS):
        rows, of_texts, of_images, _ = read_pairs(train, indices)
        if rows:
            numbers = torch.tensor(rows)
            nearest.look_through(numbers, of_texts)
            held = numbers % HELD_OUT == HELD_OUT - 1
            of_rows = [PairMoments.of(of_texts[chosen], of_images[chosen]) for chosen in (~held, held)]
            parts = [part + more for part, more in zip(parts, of_rows, strict=True)]
    fitted, held_out = (PairMoments(mesh.sum(part.sums, "world").cpu()) for part in parts)
    if min(fitted.count, held_out.count) < 1:
        raise DataError(
            f"{fitted.count + held_out.count:.0f} training rows have embeddings, too few to compare a prior with: "
            f"prepare at least {HELD_OUT}"
        )
    pairs = fitted + held_out
    similar = torch.stack([torch.as_tensor(train.image(row, 0)) for row in nearest.gather(mesh).tolist()])
    return pairs, {
        "text": texts,
        "training_mean": pairs.image_mean.expand_as(texts),
        "nearest_caption": similar,
        "ridge": fit_ridge(fitted, held_out)(texts),
    }


def read_pairs(
    cache: EmbeddingCache, rows: Iterable[int], dataset: PairDataset | None = None
) -> tuple[list[int], Tensor, Tensor, list[str]]:
    """Of those rows that can be read: numbers, embeddings of first captions and images, (B, D) each, of length 1, and the
    captions, where a dataset is given."""
    found: list[int] = []
    texts, images, captions = [], [], []
    for row in rows:
        try:
            pair = torch.as_tensor(cache.text(row, 0)), torch.as_tensor(cache.image(row, 0))
            captions += dataset.captions(row)[:1] if dataset is not None else []
        except RowError:
            continue
        found.append(row)
        texts.append(pair[0])
        images.append(pair[1])
    if not found:
        return [], torch.zeros(0, cache.dim), torch.zeros(0, cache.dim), []
    return found, F.normalize(torch.stack(texts)), F.normalize(torch.stack(images)), captions
