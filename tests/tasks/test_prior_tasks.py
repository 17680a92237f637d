"""What both priors' tasks promise the Trainer, through real runs: trained, resumed, divided, exported, sampled from."""

from __future__ import annotations

import dataclasses
import json
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from safetensors.torch import load_file

from dalle_ds.config import (
    LatentPriorConfig,
    LatentPriorRun,
    OptimConfig,
    ParallelConfig,
    PriorConfig,
    PriorObjective,
    PriorRun,
    ReportConfig,
    to_dict,
)
from dalle_ds.config.training import LoaderConfig, RecomputingTrainConfig
from dalle_ds.data import BatchLoader, evaluation_batches
from dalle_ds.data.embeddings import cache_embeddings
from dalle_ds.data.prepare import PrepareOptions, prepare
from dalle_ds.diffusion import noise_schedule
from dalle_ds.errors import CheckpointError, ConfigError, DataError
from dalle_ds.models import Clip
from dalle_ds.models.latents import EmbeddingMoments
from dalle_ds.parallel import Mesh
from dalle_ds.sampling.prior import PriorSampling
from dalle_ds.sampling.text_to_embedding import (
    CLIP_NAME,
    PARTS_NAME,
    DiffusionTextToEmbedding,
    LatentTextToEmbedding,
    TextToEmbedding,
)
from dalle_ds.tasks.base import row_noise
from dalle_ds.tasks.latent_prior import LatentPriorTask
from dalle_ds.tasks.prior import PriorTask
from dalle_ds.tasks.stages import STAGES
from dalle_ds.text.clip_tokenizer import ClipTokenizer
from dalle_ds.training.export import export_checkpoint
from dalle_ds.training.trainer import Trainer
from tests.conftest import TINY_DALLE
from tests.processes import run_ranks
from tests.tasks.test_clip_task import SHAPE

ZERO1 = {"zero_optimization": {"stage": 1}}
PRIOR = PriorConfig(
    width=16, depth=2, heads=2, text_len=8, embed_dim=16, text_vocab=TINY_DALLE.text_vocab, mask_padding=True
)
LATENT = LatentPriorConfig(
    text_width=16, text_depth=1, text_heads=2, text_len=8, text_vocab=TINY_DALLE.text_vocab,
    width=16, depth=2, heads=2, embed_dim=16, components=5, buckets=8, similarity_buckets=4,
)  # fmt: skip


@pytest.fixture(scope="module", autouse=True)
def mesh() -> Iterator[Mesh]:
    """This process as a run of its own."""
    mesh = Mesh.start("cpu")
    yield mesh
    mesh.stop()


@pytest.fixture(scope="module")
def clip(data: Path, tokenizer_file: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A random CLIP, whose embeddings of the corpus are cached."""
    folder = tmp_path_factory.mktemp("clip") / "export"
    torch.manual_seed(0)
    tokenizer = ClipTokenizer.load(tokenizer_file, start=SHAPE.start, end=SHAPE.end)
    model = Clip(SHAPE, tokenizer=tokenizer)
    model.save_pretrained(folder)
    cache_embeddings(model, data, views=2, text_states=True)
    return folder


def options(clip: Path, data: Path, tokenizer_file: Path) -> dict[str, Any]:
    return {
        "data": str(data),
        "clip": str(clip),
        "tokenizer": str(tokenizer_file),
        "steps": 4,
        "save_every": 2,
        "train": RecomputingTrainConfig(batch_size=8, average_decay=0.5),
        # Of gradients that are rounding alone, such as those of keys' biases, a small eps would make whole steps.
        "optim": OptimConfig(lr=1e-2, eps=1e-4, schedule="constant", warmup_steps=0),
        "loader": LoaderConfig(workers=0),
        "report": ReportConfig(log_every=1, validate_every=2, preview_every=2, validation_rows=9),
    }


@pytest.fixture
def run(clip: Path, data: Path, tokenizer_file: Path, tmp_path: Path) -> PriorRun:
    objective = PriorObjective(draws_per_row=3, timesteps=50, analytic_steps="5", analytic_rows=20)
    given = options(clip, data, tokenizer_file)
    return PriorRun(**given, run_dir=str(tmp_path / "prior"), model=PRIOR, objective=objective)


@pytest.fixture
def latent_run(clip: Path, data: Path, tokenizer_file: Path, tmp_path: Path) -> LatentPriorRun:
    return LatentPriorRun(**options(clip, data, tokenizer_file), run_dir=str(tmp_path / "latent"), model=LATENT)


def fit(run: PriorRun | LatentPriorRun) -> Trainer:
    task = PriorTask if isinstance(run, PriorRun) else LatentPriorTask
    trainer = Trainer(task, run, ZERO1, Mesh.start("cpu"))
    trainer.fit()
    return trainer


def first_batch(task: PriorTask | LatentPriorTask) -> dict[str, torch.Tensor]:
    loader = BatchLoader(task.samples("train"), seed=0, batch_size=8, micro_batch=8, rank=0, world_size=1)
    return task.prepare(next(iter(loader)))


def metrics(run_dir: str) -> list[dict[str, float]]:
    return [json.loads(line) for line in (Path(run_dir) / "metrics.jsonl").read_text().splitlines()]


# --- runs


def with_raw_clip(clip: Path, data: Path, folder: Path) -> str:
    """The same CLIP without unit_length, its embeddings cached."""
    model = Clip.from_pretrained(clip)
    model.config = dataclasses.replace(model.config, unit_length=False)
    model.save_pretrained(folder)
    cache_embeddings(model, data, views=2)
    return str(folder)


@pytest.mark.parametrize("text", ["tokens", "clip_states", "karlo"])
def test_a_diffusion_prior_is_trained_exported_and_sampled_from(
    run: PriorRun, text: Any, clip: Path, data: Path, tmp_path: Path
) -> None:
    model = dataclasses.replace(run.model, text=text)
    if text != "tokens":
        model = dataclasses.replace(model, text_width=SHAPE.text_width, text_len=SHAPE.text_len, mask_padding=True)
        run = dataclasses.replace(run, tokenizer="")
    if text == "karlo":
        run = dataclasses.replace(run, clip=with_raw_clip(clip, data, tmp_path / "raw"))
    run = dataclasses.replace(run, model=model)
    fit(run)
    assert (Path(run.run_dir) / "samples" / "step-4.png").is_file()
    last = [line for line in metrics(run.run_dir) if "validation/cosine" in line][-1]
    assert -1 <= last["validation/cosine"] <= 1 and last["validation/loss"] > 0
    pipeline = TextToEmbedding.from_pretrained(run.run_dir)
    assert isinstance(pipeline, DiffusionTextToEmbedding) and pipeline.analytic is not None
    assert pipeline.analytic["rows"] == 24 and len(pipeline.analytic["gamma"]) == 5
    captions = ["a red circle", "a blue square", "a black triangle"]
    how = PriorSampling(steps="5", guidance=2.0)
    found = pipeline.sample(captions, num=2, seed=3, sampling=how, normalize=True)
    assert found.shape == (3, 2, SHAPE.embed_dim)
    torch.testing.assert_close(found.norm(dim=-1), torch.ones(3, 2))
    assert (found[:, 0] - found[:, 1]).norm(dim=-1).min() > 1e-4  # after four updates, all but the mean
    alone = pipeline.sample(captions[1:2], num=1, seed=3, sampling=how, normalize=True)
    torch.testing.assert_close(alone[0, 0], found[1, 0], rtol=0, atol=1e-5)
    with pytest.raises(ConfigError, match="analytic_steps"):
        pipeline.sample(captions, sampling=PriorSampling("analytic", "4"))
    with pytest.raises(DataError):
        pipeline.sample("a red circle")  # type: ignore[arg-type]


def test_cached_text_states_are_those_that_are_computed_otherwise(run: PriorRun) -> None:
    shape = {"text_width": SHAPE.text_width, "text_len": SHAPE.text_len}
    model = dataclasses.replace(run.model, text="clip_states", mask_padding=True, **shape)
    task = PriorTask(dataclasses.replace(run, tokenizer="", model=model))
    batch = next(iter(BatchLoader(task.samples("train"), seed=0, batch_size=8, micro_batch=8, rank=0, world_size=1)))
    cached = task.prepare(batch)
    computed = task.prepare({name: value for name, value in batch.items() if name != "states"})
    assert torch.equal(cached["padded"], computed["padded"]) and 0 < cached["padded"].sum() < cached["padded"].numel()
    kept = ~cached["padded"]
    torch.testing.assert_close(cached["text"][kept], computed["text"][kept], rtol=1e-5, atol=1e-5)


def test_an_autoregressive_prior_is_trained_exported_and_sampled_from(latent_run: LatentPriorRun) -> None:
    fit(latent_run)
    pipeline = TextToEmbedding.from_pretrained(latent_run.run_dir)
    assert isinstance(pipeline, LatentTextToEmbedding)
    captions = ["a red circle", "a blue square"]
    found = pipeline.sample(captions, num=3, seed=1, normalize=False)
    # Every sample is an embedding that codes stand for.
    again = pipeline.codec.decode(pipeline.codec.encode(found.flatten(0, 1))).view_as(found)
    torch.testing.assert_close(again, found)
    torch.testing.assert_close(pipeline.sample(captions[1:], num=1, seed=1)[0, 0], F.normalize(found[1, 0], dim=-1))


def test_runs_resume_to_the_bit(run: PriorRun, latent_run: LatentPriorRun, tmp_path: Path) -> None:
    for whole in (run, latent_run):
        fit(whole)
        parted = dataclasses.replace(whole, run_dir=str(tmp_path / f"parted-{Path(whole.run_dir).name}"))
        fit(dataclasses.replace(parted, steps=2))
        fit(parted)
        files = [Path(folder) / "export" / "model.safetensors" for folder in (whole.run_dir, parted.run_dir)]
        assert files[0].read_bytes() == files[1].read_bytes()
        losses = [
            {line["step"]: line["loss"] for line in metrics(d) if "loss" in line}
            for d in (whole.run_dir, parted.run_dir)
        ]
        assert losses[0] == losses[1]


@pytest.mark.launch
def test_layouts_change_nothing(run: PriorRun, latent_run: LatentPriorRun, tmp_path: Path) -> None:
    """Two processes under ZeRO-3, and as a tensor group, against one: metrics, weights and Γ."""
    shards = {"zero_optimization": {"stage": 3, "stage3_param_persistence_threshold": 0}}
    layouts = {"sharded": (ParallelConfig(), shards), "tensor": (ParallelConfig(tensor=2), ZERO1)}
    jobs: list[dict[str, Any]] = []
    for stage, whole in (("prior", run), ("latent_prior", latent_run)):
        fit(whole)
        for name, (degrees, engine) in layouts.items():
            parted = dataclasses.replace(whole, parallel=degrees, run_dir=str(tmp_path / f"{stage}-{name}"))
            jobs.append({"name": name, "stage": stage, "run": to_dict(parted), "deepspeed": engine})
    (tmp_path / "jobs.json").write_text(json.dumps(jobs))
    worker = Path(__file__).parents[1] / "training" / "layouts_worker.py"
    done = run_ranks(worker, tmp_path / "jobs.json", processes=2)
    assert done.returncode == 0, done.stdout[-6000:] + done.stderr[-6000:]
    for job in jobs:
        whole = run if job["stage"] == "prior" else latent_run
        for ours, theirs in zip(metrics(whole.run_dir), metrics(job["run"]["run_dir"]), strict=True):
            for name in ours.keys() & {"loss", "grad_norm", "validation/loss", "validation/cosine"}:
                assert theirs[name] == pytest.approx(ours[name], rel=1e-5), (job["stage"], job["name"], name)
        folders = [Path(folder) / "export" for folder in (whole.run_dir, job["run"]["run_dir"])]
        ours, theirs = (load_file(folder / "model.safetensors") for folder in folders)
        assert ours.keys() == theirs.keys()
        for name, value in ours.items():
            torch.testing.assert_close(
                theirs[name], value, rtol=1e-4, atol=2e-5, msg=lambda text, n=name: f"{n}: {text}"
            )
        if job["stage"] == "prior":
            gamma = [json.loads((folder / PARTS_NAME).read_text())["analytic"]["gamma"] for folder in folders]
            assert gamma[1] == pytest.approx(gamma[0], rel=1e-5)


def test_a_checkpoint_is_exported_as_training_does(run: PriorRun, tmp_path: Path) -> None:
    fit(run)
    folder, step = export_checkpoint(run.run_dir, step=2, out=tmp_path / "out")
    assert step == 2
    pipeline = TextToEmbedding.from_pretrained(folder)
    assert isinstance(pipeline, DiffusionTextToEmbedding) and pipeline.analytic is None
    assert pipeline.sample(["a red circle"], sampling=PriorSampling(method="ddim", steps="3")).shape == (1, 1, 16)
    before = (Path(run.run_dir) / "export" / PARTS_NAME).read_text()
    assert "gamma" in before
    export_checkpoint(run.run_dir)
    assert (Path(run.run_dir) / "export" / PARTS_NAME).read_text() == before


def test_an_export_is_of_the_clip_and_the_embeddings_that_the_run_began_with(
    run: PriorRun, latent_run: LatentPriorRun, monkeypatch: pytest.MonkeyPatch
) -> None:
    def refused(some: PriorRun | LatentPriorRun, part: str) -> None:
        with pytest.raises(CheckpointError, match=f"the {part}.* is not the one that the run began with"):
            export_checkpoint(some.run_dir)

    fit(run)
    fit(latent_run)
    with monkeypatch.context() as patch:
        patch.setattr(LatentPriorTask, "embeddings", lambda task: {"embeddings": "other"})
        refused(latent_run, "embeddings")
    monkeypatch.setattr(Clip, "fingerprint", "other")
    refused(run, "clip")


def test_an_export_refuses_another_clip(run: PriorRun, clip: Path, tmp_path: Path) -> None:
    fit(run)
    other = Clip.from_pretrained(clip)
    with torch.no_grad():
        other.visual_projection.weight.mul_(2)
    other.save_pretrained(Path(run.run_dir) / "export" / CLIP_NAME)
    with pytest.raises(CheckpointError, match="clip"):
        TextToEmbedding.from_pretrained(run.run_dir)


# --- what is learned from


def test_the_loss_is_the_papers(run: PriorRun) -> None:
    """Against the model called for each draw by itself, on noise made by hand."""
    task = PriorTask(run)
    torch.manual_seed(0)
    model = task.build_model()
    batch = first_batch(task)
    objective = run.objective
    clean = 17.2 * batch["image_embedding"] / batch["image_embedding"].norm(dim=1, keepdim=True)
    torch.testing.assert_close(batch["image_embedding"], clean)
    loss, told = task.loss(model, batch, 0)
    uniforms, noise = row_noise(batch["key"], objective.draws_per_row, 16, torch.device("cpu"))
    dropped = uniforms[:, 0] < objective.text_drop
    alpha_bars = noise_schedule("cosine", objective.timesteps).alpha_bars
    total = 0.0
    for draw in range(objective.draws_per_row):
        times = ((uniforms[:, 1] + draw) / objective.draws_per_row * objective.timesteps).long()
        a = alpha_bars[times].float()[:, None]
        noised = a.sqrt() * clean + (1 - a).sqrt() * noise[:, draw]
        found = model(task.caption(batch), noised[:, None], times[:, None], dropped=dropped)[:, 0]
        total += float((found - clean).square().mean()) / objective.draws_per_row
    assert float(loss) == pytest.approx(total, rel=1e-5)
    assert float(told["dropped"]) == float(dropped.float().mean())


def test_validation_cosines_are_those_of_a_model_that_knows_the_truth(run: PriorRun) -> None:
    task = PriorTask(run)
    sums: dict[str, torch.Tensor] = {}
    texts = []
    for raw in evaluation_batches(task.samples("validation"), 8, rank=0, world_size=1):
        batch = task.prepare(raw)
        clean = batch["image_embedding"]
        found = task.evaluate(lambda _, noised, *__, x0=clean, **___: x0[:, None].expand_as(noised), batch)
        sums = {name: sums.get(name, 0) + value for name, value in found.items()}
        both = (batch[name][batch["valid"] == 1] for name in ("image_embedding", "text_embedding"))
        texts.append(F.cosine_similarity(*both))
    metrics = task.summarize(sums)
    assert metrics["loss"] == 0 and metrics["cosine"] == pytest.approx(1, abs=1e-5)
    assert metrics["text_cosine"] == pytest.approx(float(torch.cat(texts).mean()), abs=1e-5)


def test_several_corpora_are_learned_from(
    run: PriorRun, latent_run: LatentPriorRun, corpus: Path, clip: Path, tmp_path: Path
) -> None:
    """One of them without validation rows, of which previews show none."""
    other = tmp_path / "other"
    options = PrepareOptions(corpus="folder", source=str(corpus), validation=0)
    prepare(options, str(other), workers=1, overwrite=False)
    cache_embeddings(Clip.from_pretrained(clip), other)
    for some in (run, latent_run):
        both = dataclasses.replace(some, data=(str(other), str(some.data)))
        fit(both)
        assert (Path(both.run_dir) / "samples" / "step-4.png").is_file()
        task = STAGES[PriorTask.name if some is run else LatentPriorTask.name][1](both)
        assert [len(cache) for cache in task.caches] == [90, 68]  # type: ignore[attr-defined]
        assert int(task.moments.count) == 90 + 2 * 68  # type: ignore[attr-defined]


def test_noise_and_drops_are_each_rows_own_and_of_the_rate_asked_for() -> None:
    keys = torch.arange(4000) * 7919
    uniforms, noise = row_noise(keys, 2, 3, torch.device("cpu"))
    other = row_noise(keys[17:18], 2, 3, torch.device("cpu"))
    torch.testing.assert_close(other[0][0], uniforms[17])
    torch.testing.assert_close(other[1][0], noise[17])
    assert abs(float((uniforms[:, 0] < 0.1).float().mean()) - 0.1) < 0.02
    assert abs(float(noise.std()) - 1) < 0.02 and abs(float(noise.mean())) < 0.02


def test_gamma_of_a_model_that_knows_nothing_is_that_of_the_data(run: PriorRun) -> None:
    """A model that says 0 has the score −x / (1 − ᾱ), whose mean square is (ᾱ E z² + 1 − ᾱ) / (1 − ᾱ)²."""
    run = dataclasses.replace(run, objective=dataclasses.replace(run.objective, analytic_rows=4000))
    task = PriorTask(run)
    loader = BatchLoader(task.samples("train"), seed=0, batch_size=8, micro_batch=8, rank=0, world_size=1)
    task.measure(lambda caption, noised, times: torch.zeros_like(noised), map(task.prepare, loader), Mesh.start("cpu"))
    assert task.analytic is not None
    grid = task.schedule.on([0, 12, 24, 37, 49])
    power, a = 17.2**2 / 16, grid.alpha_bars
    wanted = (a * power + 1 - a) / (1 - a).square()
    found, error = (torch.tensor(task.analytic[name]) for name in ("gamma", "standard_error"))
    assert bool(((found - wanted).abs() < 5 * error + 1e-9).all())
    assert bool((error / found < 0.05).all())


def test_embeddings_are_standardized_by_the_training_images(run: PriorRun) -> None:
    objective = dataclasses.replace(run.objective, embeddings="standardized")
    task = PriorTask(dataclasses.replace(run, objective=objective))
    cache = task.caches[0]
    every = torch.stack([torch.from_numpy(cache.image(row, view)) for row in range(len(cache)) for view in range(2)])
    scaled = task.scaling_of_embeddings.scale(every)
    torch.testing.assert_close(scaled.mean(0), torch.zeros(16), rtol=0, atol=1e-3)
    torch.testing.assert_close(scaled.std(0, correction=0), torch.ones(16), rtol=1e-3, atol=0)
    torch.testing.assert_close(task.scaling_of_embeddings.unscale(scaled), every, rtol=0, atol=1e-5)
    assert task.scaling_of_embeddings.variance(task.moments) == pytest.approx(1, abs=1e-5)


def test_similarities_are_in_buckets_of_as_many_images(latent_run: LatentPriorRun) -> None:
    task = LatentPriorTask(latent_run)
    (cache,) = task.caches
    image = torch.from_numpy(np.stack([cache.image(row, row % cache.views) for row in range(len(cache))]))
    text = torch.from_numpy(np.stack([cache.text(row, 0) for row in range(len(cache))]))
    tokens = torch.zeros(len(image), 8, dtype=torch.int64)
    batch = task.prepare({"image_embedding": image, "text_embedding": text, "text": tokens})
    assert torch.bincount(batch["similarity"], minlength=4).float().std() <= 1
    order = (image * text).sum(1).argsort()
    assert bool((batch["similarity"][order].diff() >= 0).all())
    assert batch["codes"].shape == (len(image), 5) and bool((batch["codes"].amin(0) == 0).all())
    assert bool((batch["codes"].amax(0) == 7).all())


def test_moments_of_several_corpora_add_up() -> None:
    rows = torch.randn(40, 6)
    parts = [EmbeddingMoments(6), EmbeddingMoments(6)]
    for part, some in zip(parts, rows.split([13, 27]), strict=True):
        part.add(some)
    whole = EmbeddingMoments.merged(parts)
    torch.testing.assert_close(
        whole.covariance, torch.from_numpy(__import__("numpy").cov(rows.double().T.numpy(), bias=True))
    )


def test_validation_does_not_depend_on_how_rows_are_batched(run: PriorRun, latent_run: LatentPriorRun) -> None:
    for task in (PriorTask(run), LatentPriorTask(latent_run)):
        torch.manual_seed(0)
        model = task.build_model().eval()
        found = []
        for micro_batch in (2, 9):
            sums: dict[str, torch.Tensor] = {}
            for batch in evaluation_batches(task.samples("validation"), micro_batch, rank=0, world_size=1, rows=9):
                for name, value in task.evaluate(model, task.prepare(batch)).items():
                    sums[name] = sums.get(name, torch.zeros(())) + value
            found.append(task.summarize(sums))
        assert found[0] == pytest.approx(found[1], rel=1e-4)


# --- mistakes


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"clip": ""}, "--clip"),
        ({"tokenizer": ""}, "--tokenizer"),
        ({"model": dataclasses.replace(PRIOR, embed_dim=32)}, "--model.embed_dim 16"),
        ({"model": dataclasses.replace(PRIOR, text_vocab=10)}, "--model.text_vocab"),
        ({"model": dataclasses.replace(PRIOR, text="clip_states")}, "--tokenizer"),
        ({"model": dataclasses.replace(PRIOR, text="clip_states"), "tokenizer": ""}, "--model.text_width 16"),
    ],
)
def test_parts_that_do_not_fit_are_refused(run: PriorRun, change: dict[str, Any], words: str) -> None:
    with pytest.raises(ConfigError, match=words):
        PriorTask(dataclasses.replace(run, **change))


def test_embeddings_that_are_not_cached_are_asked_for(run: PriorRun, data: Path, tmp_path: Path) -> None:
    copy = tmp_path / "data"
    shutil.copytree(data, copy, ignore=shutil.ignore_patterns("embeddings"))
    with pytest.raises(DataError, match="--cache_embeddings"):
        PriorTask(dataclasses.replace(run, data=str(copy))).samples("train")


def test_pipelines_are_refused(run: PriorRun) -> None:
    mesh = Mesh(0, 2, torch.device("cpu"), ParallelConfig(pipe=2))
    with pytest.raises(ConfigError, match=r"parallel\.pipe"):
        PriorTask(run).check_layout(mesh, 8, "fp32")
