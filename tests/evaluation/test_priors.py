"""Sampled image embeddings against true ones: the figures, what they are compared with, and whole evaluations."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from dalle_ds.data import PairDataset
from dalle_ds.data.faults import RowError
from dalle_ds.errors import ConfigError, DataError
from dalle_ds.evaluation import evaluate as evaluate_module
from dalle_ds.evaluation import priors, results
from dalle_ds.evaluation.evaluate import EvaluateOptions, evaluate
from dalle_ds.evaluation.priors import (
    PENALTIES,
    NearestRows,
    PairMoments,
    Ridge,
    Truth,
    diversity,
    figures,
    fit_ridge,
    learned_guesses,
    over_draws,
    prior_figures,
    with_interval,
)
from dalle_ds.evaluation.results import Result, shown_figures
from dalle_ds.parallel import Mesh
from dalle_ds.sampling import Sampling
from dalle_ds.sampling.prior import PriorSampling, sample_noise
from dalle_ds.sampling.text_to_embedding import TextToEmbedding

ALONE = Mesh(0, 1, torch.device("cpu"))
DIM = 6


def random_units(*shape: int, seed: int, offset: float = 0.3) -> Tensor:
    """Vectors of length 1 around a mean that is not 0."""
    generator = torch.Generator().manual_seed(seed)
    return F.normalize(torch.randn(*shape, DIM, generator=generator) + offset, dim=-1)


def linked_pairs(rows: int, seed: int) -> tuple[Tensor, Tensor]:
    """Embeddings of captions, and of images that follow from them but for noise."""
    texts = random_units(rows, seed=seed)
    turn = torch.linalg.qr(torch.randn(DIM, DIM, generator=torch.Generator().manual_seed(1)))[0]
    return texts, F.normalize(texts @ turn + 0.4 * random_units(rows, seed=seed + 1, offset=0), dim=1)


class Cache:
    """An `EmbeddingCache` in memory, with rows that cannot be read."""

    dim = DIM

    def __init__(self, texts: Tensor, images: Tensor, unreadable: tuple[int, ...] = ()) -> None:
        self.texts, self.images, self.unreadable = texts, images, unreadable

    def __len__(self) -> int:
        return len(self.texts)

    def text(self, row: int, caption: int) -> np.ndarray:
        assert caption == 0
        return self.texts[row].numpy()

    def image(self, row: int, view: int) -> np.ndarray:
        assert view == 0
        if row in self.unreadable:
            raise RowError(f"row {row} has no embeddings")
        return self.images[row].numpy()


# --- figures


def test_figures_are_those_of_numpy() -> None:
    truth = Truth(random_units(20, seed=2), random_units(20, seed=3), random_units(seed=1) / 2)
    guess, mean = 3 * F.normalize(truth.images + random_units(20, seed=0), dim=1), truth.mean
    found = figures(guess, truth)
    g, z, t = (each.double().numpy() for each in (guess / 3, truth.images, truth.texts))
    m = mean.double().numpy()

    def cosine(a: np.ndarray, b: np.ndarray) -> float:
        return float(np.mean([x @ y / np.linalg.norm(x) / np.linalg.norm(y) for x, y in zip(a, b, strict=True)]))

    assert found["cosine"] == pytest.approx(cosine(g, z), abs=1e-6)
    assert found["centred_cosine"] == pytest.approx(cosine(g - m, z - m), abs=1e-6)
    assert found["text_cosine"] == pytest.approx(cosine(g, t), abs=1e-6)
    places = [int(np.flatnonzero(np.argsort(-(z @ g[row])) == row)[0]) for row in range(20)]
    assert found["norm"] == pytest.approx(3)
    for k in (1, 5, 10):
        assert found[f"retrieval_at_{k}"] == pytest.approx(np.mean([place < k for place in places]))
    assert 0 < found["retrieval_at_1"] < found["retrieval_at_10"]
    apart = [1 - g[a] @ g[b] for a in range(20) for b in range(a)]
    assert found["diversity"] == pytest.approx(np.mean(apart), abs=1e-6)


def test_diversity_is_that_of_pairs_within_each_row() -> None:
    samples = random_units(4, 3, seed=0)
    found = diversity(samples)
    for row, embeddings in enumerate(samples.double()):
        apart = [1 - float(embeddings[a] @ embeddings[b]) for a, b in ((0, 1), (0, 2), (1, 2))]
        assert float(found[row]) == pytest.approx(np.mean(apart), abs=1e-7)
    assert float(diversity(samples[0, :1].expand(5, -1))) == pytest.approx(0, abs=1e-7)


def test_all_figures_of_a_prior_are_those_of_single_draws() -> None:
    texts, images = linked_pairs(15, seed=5)
    truth = Truth(images, texts, images.mean(dim=0))
    samples, other = images[:, None] + 0.8 * random_units(15, 4, seed=8), random_units(15, seed=9)
    found = prior_figures(samples, truth, {"other": other}, best=2)
    draws = [figures(samples[:, number], truth) for number in range(4)]
    of_mean = figures(F.normalize(samples, dim=2).mean(dim=1), truth)
    for name in draws[0]:
        values = [draw[name] for draw in draws]
        assert found[f"sample/{name}"] == pytest.approx(np.mean(values), abs=1e-9)
        error = np.std(values, ddof=1) / 2
        assert found[f"sample/{name}/standard_error"] == pytest.approx(error, abs=1e-9)
        assert found[f"other/{name}"] == figures(other, truth)[name]
        assert found[f"mean_of_samples/{name}"] == pytest.approx(of_mean[name], abs=1e-6)
    chosen = []
    for pair in (samples[:, :2], samples[:, 2:]):
        products = (F.normalize(pair, dim=2) * texts[:, None]).sum(dim=2)
        chosen.append(pair[torch.arange(15), products.argmax(dim=1)])
    expected = over_draws([figures(draw, truth) for draw in chosen])
    assert {name: found[f"best_of_2/{name}"] for name in expected} == pytest.approx(expected)
    assert found["best_of_2/text_cosine"] > found["sample/text_cosine"]
    assert found["sample/norm"] == pytest.approx(float(samples.norm(dim=2).mean()))
    assert found["sample/caption_diversity"] == pytest.approx(float(diversity(F.normalize(samples, dim=2)).mean()))
    assert found["true_image/text_cosine"] == pytest.approx(float((images * texts).sum(dim=1).mean()))
    gain = found["sample/cosine"] - found["other/cosine"]
    assert found["gain/over_other"] == pytest.approx(gain)
    assert found["gain/over_other/low_95"] < gain < found["gain/over_other/high_95"]
    assert not any(name.startswith("best_of") for name in prior_figures(samples, truth, {}, best=1))


def test_neither_the_order_of_rows_nor_a_rotation_changes_a_figure() -> None:
    texts, images = linked_pairs(30, seed=0)
    of_training = linked_pairs(50, seed=10)
    samples = random_units(30, 4, seed=20)

    def measured(texts: Tensor, images: Tensor, samples: Tensor, training: tuple[Tensor, Tensor]) -> dict[str, float]:
        pairs, guesses = learned_guesses(Cache(*training), texts, ALONE)  # type: ignore[arg-type]
        return prior_figures(samples, Truth(images, texts, pairs.image_mean), guesses, best=2)

    found = measured(texts, images, samples, of_training)
    order = torch.randperm(30, generator=torch.Generator().manual_seed(0))
    permuted = measured(texts[order], images[order], samples[order], of_training)
    assert permuted == pytest.approx(found, abs=1e-6)
    turn = torch.linalg.qr(torch.randn(DIM, DIM, generator=torch.Generator().manual_seed(2)))[0]
    turned = measured(texts @ turn, images @ turn, samples @ turn, (of_training[0] @ turn, of_training[1] @ turn))
    assert turned == pytest.approx(found, abs=1e-6)


def test_intervals_are_those_of_normal_means() -> None:
    values = torch.randn(400, generator=torch.Generator().manual_seed(0), dtype=torch.float64) + 3
    found = with_interval("cosine", values)
    error = float(values.std()) / 20
    assert found["cosine"] == pytest.approx(float(values.mean()))
    assert found["cosine/low_95"] == pytest.approx(found["cosine"] - 1.96 * error, abs=0.15 * error)
    assert found["cosine/high_95"] == pytest.approx(found["cosine"] + 1.96 * error, abs=0.15 * error)


def test_figures_are_shown_with_what_belongs_to_them() -> None:
    metrics = {"a/x": 0.5, "a/x/standard_error": 0.25, "a/x/low_95": 0.1, "a/x/high_95": 0.9, "b": 1.0}
    assert shown_figures(metrics) == {"a/x": "0.5000 ± 0.2500 (0.1000 to 0.9000)", "b": "1.0000"}


# --- what training pairs tell


def test_moments_are_those_of_all_pairs_and_add_up() -> None:
    texts, images = linked_pairs(40, seed=0)
    parts = [PairMoments.of(texts[start : start + 16], images[start : start + 16]) for start in (0, 16, 32)]
    found = parts[0] + parts[1] + parts[2]
    x, y = texts.double(), images.double()
    assert found.count == 40
    torch.testing.assert_close(found.text_mean, x.mean(dim=0))
    torch.testing.assert_close(found.image_mean, y.mean(dim=0))
    assert found.image_diversity == pytest.approx(float(diversity(images)))
    a, b = random_units(2, seed=4).double()
    products, cross = found.about(a, b)
    torch.testing.assert_close(products, (x - a).T @ (x - a))
    torch.testing.assert_close(cross, (x - a).T @ (y - b))


def least_squares(texts: Tensor, images: Tensor, penalty: float) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Ridge regression as least squares with a row more for each dimension: means and weight."""
    x, y = texts.double().numpy(), images.double().numpy()
    x_mean, y_mean = x.mean(axis=0), y.mean(axis=0)
    x, y = x - x_mean, y - y_mean
    added = np.sqrt(penalty * np.square(x).sum() / DIM) * np.eye(DIM)
    weight = np.linalg.lstsq(np.concatenate([x, added]), np.concatenate([y, np.zeros((DIM, DIM))]), rcond=None)[0]
    return x_mean, y_mean, weight


@pytest.mark.parametrize("penalty", [1e-6, 0.1, 10.0])
def test_ridge_regression_is_regularized_least_squares(penalty: float) -> None:
    texts, images = linked_pairs(40, seed=0)
    found = Ridge.fit(PairMoments.of(texts, images), penalty)
    x_mean, y_mean, weight = least_squares(texts, images, penalty)
    np.testing.assert_allclose(found.weight.numpy(), weight, atol=1e-8)
    queries = random_units(5, seed=3)
    np.testing.assert_allclose(found(queries).numpy(), y_mean + (queries.double().numpy() - x_mean) @ weight, atol=1e-8)


def test_the_penalty_is_the_one_with_the_least_error_on_held_out_pairs() -> None:
    texts, images = linked_pairs(12, seed=0)
    others = linked_pairs(30, seed=40)
    errors = []
    for penalty in PENALTIES:
        x_mean, y_mean, weight = least_squares(texts, images, penalty)
        guess = y_mean + (others[0].double().numpy() - x_mean) @ weight
        errors.append(np.square(guess - others[1].double().numpy()).sum())
    best = int(np.argmin(errors))
    assert 0 < best < len(PENALTIES) - 1  # or the choice would show nothing
    found = fit_ridge(PairMoments.of(texts, images), PairMoments.of(*others))
    both = [torch.cat(parts) for parts in zip((texts, images), others, strict=True)]
    np.testing.assert_allclose(found.weight.numpy(), least_squares(*both, PENALTIES[best])[2], atol=1e-8)


def test_regression_on_equal_captions_is_the_mean() -> None:
    texts, images = linked_pairs(20, seed=0)
    pairs = PairMoments.of(texts[:1].expand(20, -1), images)
    torch.testing.assert_close(fit_ridge(pairs, pairs)(texts[:1])[0], images.double().mean(dim=0))


def test_the_nearest_caption_is_found_in_parts_and_by_several_processes(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(priors, "BLOCK", 3)
    queries, base = random_units(10, seed=0), random_units(50, seed=1)
    base[40] = base[7]  # the first of equals counts
    queries[4] = base[40]
    expected = [int(np.argmax(base.double().numpy() @ query.double().numpy())) for query in queries]
    expected[4] = 7
    ranks = []
    for rank in (0, 1):
        nearest = NearestRows(queries)
        for start in (0, 8, 16, 24, 32, 40, 48)[rank::2]:
            rows = torch.arange(start, min(start + 8, 50))
            nearest.look_through(rows, base[rows])
        ranks.append(nearest)
    for order in (ranks, ranks[::-1], [*ranks, NearestRows(queries)]):  # the third has no rows
        every = [(each.cosines, each.rows) for each in order]
        mesh = SimpleNamespace(gather_objects=lambda _, every=every: every)
        assert ranks[0].gather(mesh).tolist() == expected  # type: ignore[arg-type]


def test_guesses_are_of_readable_pairs_only() -> None:
    texts, images = linked_pairs(60, seed=0)
    lost = (3, 19, 20)
    kept = [row for row in range(60) if row not in lost]
    pairs, guesses = learned_guesses(Cache(texts, images, lost), texts, ALONE)  # type: ignore[arg-type]
    assert pairs.count == 57
    torch.testing.assert_close(guesses["training_mean"][0], images[kept].double().mean(dim=0))
    torch.testing.assert_close(guesses["nearest_caption"][kept], images[kept])
    assert guesses["ridge"].isfinite().all() and torch.equal(guesses["text"], texts)
    with pytest.raises(DataError, match="prepare at least 10"):
        learned_guesses(Cache(texts[:9], images[:9]), texts, ALONE)  # type: ignore[arg-type]


# --- whole evaluations


class Prior:
    """A `TextToEmbedding` whose samples are the caption's embedding and noise."""

    device = torch.device("cpu")

    def __init__(self, kind: str) -> None:
        self.kind, self.sampling = kind, PriorSampling()
        self.clip = SimpleNamespace(fingerprint="clip", config=SimpleNamespace(image_size=16, unit_length=True))
        self.prior = nn.Linear(2, 2)
        self.asked: list[object] = []

    def resolved(self, how: object) -> object:
        return how

    def sample(
        self, captions: list[str], num: int, *, seed: int, sampling: object, text_embeddings: Tensor, normalize: bool
    ) -> Tensor:
        self.asked.append(sampling)
        noise = [torch.stack([sample_noise(caption, seed, i, DIM) for i in range(num)]) for caption in captions]
        return text_embeddings[:, None] + 0.3 * torch.stack(noise)


@pytest.fixture
def caches(data: Path, monkeypatch: pytest.MonkeyPatch) -> dict[str, Cache]:
    """Embeddings of all rows of the corpus, in place of cached ones."""
    monkeypatch.setattr(results, "best_of_curves", lambda _: "")
    found = {}
    for number, split in enumerate(("train", "validation")):
        found[split] = Cache(*linked_pairs(len(PairDataset.open(data, split)), seed=100 * number))

    def opened(folder: Path, fingerprint: str, split: str) -> Cache:
        assert (folder, fingerprint) == (data, "clip")
        return found[split]

    monkeypatch.setattr(priors.EmbeddingCache, "open", opened)
    return found


def loaded(monkeypatch: pytest.MonkeyPatch, kind: str = "diffusion") -> Prior:
    """The prior that an evaluation will find."""
    prior = Prior(kind)
    monkeypatch.setattr(evaluate_module.TextToEmbedding, "from_pretrained", lambda *_: prior)
    return prior


@pytest.fixture
def options(data: Path, tmp_path: Path) -> EvaluateOptions:
    """Of a prior only."""
    return EvaluateOptions(out=str(tmp_path / "out"), data=str(data), prior="prior", num=4, device="cpu")


def test_a_prior_is_measured_on_every_row(
    options: EvaluateOptions, caches: dict[str, Cache], monkeypatch: pytest.MonkeyPatch
) -> None:
    prior = loaded(monkeypatch)
    result = evaluate(options, ALONE)
    assert Result.load(Path(options.out) / "result.json") == result
    assert "prior/sample/cosine" in (Path(options.out) / "evaluation.html").read_text()
    assert all(np.isfinite(value) for value in result.metrics.values())
    assert {name.split("/")[1] for name in result.metrics} == {
        *("sample", "best_of_2", "mean_of_samples", "text", "training_mean", "nearest_caption", "ridge"),
        *("true_image", "training_image", "gain"),
    }
    assert set(prior.asked) == {PriorSampling(best_of=1)}  # single samples, of which the best are chosen here
    assert result.protocol["prior"]["num"] == 4 and result.protocol["prior"]["best_of"] == 2
    assert result.notes == []
    own, dataset = caches["validation"], PairDataset.open(str(options.data), "validation")
    captions = [dataset.captions(row)[0] for row in range(len(dataset))]
    samples = prior.sample(captions, 4, seed=0, sampling=None, text_embeddings=own.texts, normalize=False)
    cosines = (F.normalize(samples, dim=2) * own.images[:, None]).sum(dim=2)
    assert result.metrics["prior/sample/cosine"] == pytest.approx(float(cosines.mean()), abs=1e-6)
    found = result.metrics
    assert found["prior/ridge/cosine"] > found["prior/text/cosine"]
    assert found["prior/mean_of_samples/diversity"] < found["prior/sample/diversity"]


def test_the_other_kind_is_sampled_by_its_own_options(
    options: EvaluateOptions, caches: dict[str, Cache], monkeypatch: pytest.MonkeyPatch
) -> None:
    prior = loaded(monkeypatch, "autoregressive")
    result = evaluate(replace(options, sampling=Sampling(temperature=0.5)), ALONE)
    assert set(prior.asked) == {Sampling(temperature=0.5)}
    assert result.protocol["prior"]["sampling"]["temperature"] == 0.5


def test_rows_without_embeddings_are_left_out_and_told(
    options: EvaluateOptions, caches: dict[str, Cache], monkeypatch: pytest.MonkeyPatch
) -> None:
    loaded(monkeypatch)
    own = caches["validation"]
    own.unreadable = (0, 3)
    found = evaluate(options, ALONE)
    assert len(found.notes) == 1 and found.notes[0].startswith("2 rows of validation")
    kept = [row for row in range(len(own)) if row not in own.unreadable]
    cosines = (own.texts * own.images).sum(dim=1)[kept]
    assert found.metrics["prior/text/cosine"] == pytest.approx(float(cosines.mean()), abs=1e-6)
    own.unreadable = tuple(range(1, len(own)))
    with pytest.raises(DataError, match="1 rows of validation have embeddings"):
        evaluate(options, ALONE)


def test_baselines_that_saw_the_rows_are_told(
    options: EvaluateOptions, caches: dict[str, Cache], monkeypatch: pytest.MonkeyPatch
) -> None:
    loaded(monkeypatch)
    result = evaluate(replace(options, split="train"), ALONE)
    assert len(result.notes) == 1
    assert result.metrics["prior/nearest_caption/cosine"] == pytest.approx(1)


# --- with real models


def real_options(embedded: Path, prior: Path, out: Path) -> EvaluateOptions:
    """Of a prior that samples quickly."""
    sampling = PriorSampling(method="ddpm", steps="4")
    return EvaluateOptions(
        out=str(out), data=str(embedded), prior=str(prior), num=4, prior_sampling=sampling, device="cpu"
    )


@pytest.mark.parametrize("kind", ["diffusion", "autoregressive"])
def test_figures_of_real_priors_are_those_computed_by_hand(
    kind: str, embedded: Path, prior_exports: dict[str, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(results, "best_of_curves", lambda _: "")
    options = real_options(embedded, prior_exports[kind], tmp_path)
    found = evaluate(options, ALONE).metrics
    pipeline = TextToEmbedding.from_pretrained(prior_exports[kind])
    dataset = PairDataset.open(embedded, "validation")
    captions = [dataset.captions(row)[0] for row in range(len(dataset))]
    pixels = torch.stack([torch.tensor(dataset.image(row)).permute(2, 0, 1) for row in range(len(dataset))])
    images, texts = pipeline.clip.embed_images(pixels / 255), pipeline.clip.embed_texts(captions)
    single = PriorSampling(method="ddpm", steps="4", best_of=1) if kind == "diffusion" else Sampling()
    samples = pipeline.sample(captions, 4, sampling=single)
    assert found["prior/text/cosine"] == pytest.approx(float((images * texts).sum(dim=1).mean()), abs=0.01)  # resizing
    assert found["prior/sample/cosine"] == pytest.approx(float((samples * images[:, None]).sum(dim=2).mean()), abs=0.01)
    products = (samples * texts[:, None]).sum(dim=2)
    assert found["prior/sample/text_cosine"] == pytest.approx(float(products.mean()), abs=1e-5)
    assert found["prior/sample/caption_diversity"] == pytest.approx(float(diversity(samples).mean()), abs=1e-5)
    of_best = products.unflatten(1, (2, 2)).amax(dim=2).mean()
    assert found["prior/best_of_2/text_cosine"] == pytest.approx(float(of_best), abs=1e-5)


def test_missing_embeddings_are_told_before_anything_is_sampled(
    data: Path, prior_exports: dict[str, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delattr(TextToEmbedding, "sample")
    with pytest.raises(DataError, match="--cache_embeddings"):
        evaluate(real_options(data, prior_exports["diffusion"], tmp_path), ALONE)


def test_a_standard_error_needs_two_draws() -> None:
    with pytest.raises(ConfigError, match="num must be at least 4"):
        EvaluateOptions(out="o", data="d", prior="p", num=3)
