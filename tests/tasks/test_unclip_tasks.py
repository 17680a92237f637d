"""What the tasks of the decoder and of upsamplers promise the Trainer, through real runs: trained, resumed, divided, exported,
sampled from."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from safetensors.torch import load_file
from scipy import stats

from dalle_ds.config import (
    DecoderConfig,
    DecoderObjective,
    DecoderRun,
    ImageSampling,
    ParallelConfig,
    UpsamplerConfig,
    UpsamplerObjective,
    UpsamplerRun,
    to_dict,
)
from dalle_ds.config.training import OptimConfig
from dalle_ds.data import BatchLoader, EmbeddingSamples, evaluation_batches
from dalle_ds.data.augment import clip_center_view, clip_random_view
from dalle_ds.diffusion import noise_schedule
from dalle_ds.errors import CheckpointError, ConfigError
from dalle_ds.models import Clip
from dalle_ds.models.prior import Caption
from dalle_ds.models.upsampler import enlarge
from dalle_ds.parallel import Mesh
from dalle_ds.sampling.embedding_to_image import EmbeddingToImage
from dalle_ds.sampling.image_diffusion import DiffusionFacts
from dalle_ds.sampling.super_resolution import SuperResolution
from dalle_ds.tasks.decoder import DecoderTask
from dalle_ds.tasks.upsampler import UpsamplerTask
from dalle_ds.training.export import export_checkpoint
from dalle_ds.training.trainer import Trainer
from tests.conftest import EVERYTHING, TINY_DALLE
from tests.models.test_decoder import fill
from tests.processes import run_ranks
from tests.tasks.test_clip_task import SHAPE
from tests.tasks.test_prior_tasks import ZERO1, clip, metrics, options, with_raw_clip

__all__ = ["clip"]  # a fixture
DECODER = DecoderConfig(
    image_size=16, channels=32, depth=1, multiples=(1, 2), dropout=0.1, attention=(8,), head_channels=32, embed_dim=16,
    context_width=16, text_len=8, text_vocab=TINY_DALLE.text_vocab, text_depth=1, text_heads=2,
)  # fmt: skip
UPSAMPLER = UpsamplerConfig(image_size=32, low_size=16, channels=32, depth=1, multiples=(1, 2), dropout=0.1)
FAST = ImageSampling(steps="4")
AnyRun = DecoderRun | UpsamplerRun


@pytest.fixture(scope="module", autouse=True)
def mesh() -> Iterator[Mesh]:
    """This process as a run of its own."""
    mesh = Mesh.start("cpu")
    yield mesh
    mesh.stop()


@pytest.fixture
def decoder_run(clip: Path, data: Path, tokenizer_file: Path, tmp_path: Path) -> DecoderRun:
    given = options(clip, data, tokenizer_file) | {
        "optim": OptimConfig(lr=1e-3, eps=1e-4, schedule="constant", warmup_steps=0)
    }
    objective = DecoderObjective(timesteps=50)
    return DecoderRun(**given, run_dir=str(tmp_path / "decoder"), model=DECODER, objective=objective, sampling=FAST)


@pytest.fixture
def upsampler_run(data: Path, tmp_path: Path) -> UpsamplerRun:
    given = options(data, data, data) | {"optim": OptimConfig(lr=1e-3, eps=1e-4, schedule="constant", warmup_steps=0)}
    for name in ("clip", "tokenizer"):
        del given[name]
    objective = UpsamplerObjective(timesteps=50, crop=0.5, degradation="bsr", degraded=0.5)
    sampling = ImageSampling("ddim", "4")
    return UpsamplerRun(**given, run_dir=str(tmp_path / "up"), model=UPSAMPLER, objective=objective, sampling=sampling)


def fit(run: AnyRun) -> Trainer:
    trainer = Trainer(DecoderTask if isinstance(run, DecoderRun) else UpsamplerTask, run, ZERO1, Mesh.start("cpu"))  # type: ignore[arg-type]
    trainer.fit()
    return trainer


def first_batch(task: DecoderTask | UpsamplerTask, rows: int = 8) -> dict[str, torch.Tensor]:
    loader = BatchLoader(task.samples("train"), seed=0, batch_size=rows, micro_batch=rows, rank=0, world_size=1)
    return task.prepare(next(iter(loader)))


# --- runs


@pytest.mark.parametrize(
    "change",
    [
        {},
        *(
            {"text": text, "mask_padding": True, "text_width": SHAPE.text_width, "text_len": SHAPE.text_len}
            for text in ("clip_states", "karlo")
        ),
        {"learned_variance": False},
    ],
)
def test_a_decoder_is_trained_exported_and_sampled_from(
    decoder_run: DecoderRun, change: dict[str, Any], clip: Path, data: Path, tmp_path: Path
) -> None:
    run = dataclasses.replace(decoder_run, model=dataclasses.replace(decoder_run.model, **change))
    if "text" in change:
        run = dataclasses.replace(run, tokenizer="")
    if change.get("text") == "karlo":
        run = dataclasses.replace(run, clip=with_raw_clip(clip, data, tmp_path / "raw"))
    fit(run)
    assert (Path(run.run_dir) / "samples" / "step-4.png").is_file()
    last = [line for line in metrics(run.run_dir) if "validation/loss" in line][-1]
    assert {"validation/embedding_gain", "validation/caption_gain"} <= last.keys()
    assert ("vb" in metrics(run.run_dir)[0]) == run.model.learned_variance
    pipeline = EmbeddingToImage.from_pretrained(run.run_dir)
    assert pipeline.facts.sampling == FAST and pipeline.facts.timesteps == 50
    assert (Path(run.run_dir) / "export" / "clip").exists() == ("text" in change)
    captions = ["a red circle", "a blue square", "a black triangle"]
    embeddings = F.normalize(torch.randn(3, 16), dim=1)
    how = dataclasses.replace(FAST, guidance=2.0)
    found = pipeline.sample(captions, embeddings, seed=3, numbers=[0, 1, 0], sampling=how)
    assert found.shape == (3, 3, 16, 16) and float(found.min()) >= 0 and float(found.max()) <= 1
    alone = pipeline.sample(captions[1:2], embeddings[1:2], seed=3, numbers=[1], sampling=how)
    torch.testing.assert_close(alone[0], found[1], rtol=0, atol=1e-4)
    assert pipeline.sample(captions, None, sampling=how).shape == (3, 3, 16, 16)


def test_an_upsampler_is_trained_exported_and_sampled_from(upsampler_run: UpsamplerRun) -> None:
    fit(upsampler_run)
    assert (Path(upsampler_run.run_dir) / "samples" / "step-4.png").is_file()
    pipeline = SuperResolution.from_pretrained(upsampler_run.run_dir)
    low = torch.rand(3, 3, 16, 24)
    found = pipeline.sample(low, ["a", "b", "c"], seed=1)
    assert found.shape == (3, 3, 32, 48) and float(found.min()) >= 0 and float(found.max()) <= 1
    torch.testing.assert_close(pipeline.sample(low[1:2], ["b"], seed=1)[0], found[1], rtol=0, atol=1e-4)
    assert (pipeline.sample(low, ["a", "b", "c"], seed=2) - found).abs().max() > 1e-3


def test_runs_resume_to_the_bit(decoder_run: DecoderRun, upsampler_run: UpsamplerRun, tmp_path: Path) -> None:
    """Dropout, noise, drops, crops and degradations included."""
    for whole in (decoder_run, upsampler_run):
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
def test_layouts_change_nothing(decoder_run: DecoderRun, upsampler_run: UpsamplerRun, tmp_path: Path) -> None:
    """Two processes under ZeRO-3, one of the runs in micro-batches, against one."""
    engine = {"zero_optimization": {"stage": 3, "stage3_param_persistence_threshold": 0}}
    jobs: list[dict[str, Any]] = []
    for whole in (decoder_run, upsampler_run):
        fit(whole)
        for micro_batch in (4, 2) if EVERYTHING else (4 if whole is decoder_run else 2,):
            train = dataclasses.replace(whole.train, micro_batch=micro_batch, activation_checkpointing="full")
            name = f"{Path(whole.run_dir).name}-{micro_batch}"
            parted = dataclasses.replace(whole, train=train, parallel=ParallelConfig(), run_dir=str(tmp_path / name))
            stage = "decoder" if whole is decoder_run else "upsampler"
            jobs.append({"name": name, "stage": stage, "run": to_dict(parted), "deepspeed": engine})
    (tmp_path / "jobs.json").write_text(json.dumps(jobs))
    worker = Path(__file__).parents[1] / "training" / "layouts_worker.py"
    done = run_ranks(worker, tmp_path / "jobs.json", processes=2)
    assert done.returncode == 0, done.stdout[-6000:] + done.stderr[-6000:]
    for job in jobs:
        whole = decoder_run if job["stage"] == "decoder" else upsampler_run
        for ours, theirs in zip(metrics(whole.run_dir), metrics(job["run"]["run_dir"]), strict=True):
            for name in ours.keys() & {"loss", "grad_norm", "validation/loss", "text_dropped", "embedding_dropped"}:
                assert theirs[name] == pytest.approx(ours[name], rel=1e-5), (job["name"], name)
        folders = [Path(folder) / "export" for folder in (whole.run_dir, job["run"]["run_dir"])]
        ours, theirs = (load_file(folder / "model.safetensors") for folder in folders)
        assert ours.keys() == theirs.keys()
        for name, value in ours.items():
            torch.testing.assert_close(
                theirs[name], value, rtol=1e-4, atol=1e-4, msg=lambda text, n=name: f"{n}: {text}"
            )


def test_checkpoints_are_exported_as_training_does(
    decoder_run: DecoderRun, upsampler_run: UpsamplerRun, tmp_path: Path
) -> None:
    for run in (decoder_run, upsampler_run):
        fit(run)
        export = Path(run.run_dir) / "export"
        folder, step = export_checkpoint(run.run_dir, out=tmp_path / f"out-{Path(run.run_dir).name}")
        assert step == 4
        written = [path for path in export.iterdir() if path.name != "step.json"]  # the run directory's own
        assert sorted(path.name for path in folder.iterdir()) == sorted(path.name for path in written)
        for path in written:
            assert path.read_bytes() == (folder / path.name).read_bytes(), path.name


@pytest.mark.parametrize("stage", ["decoder", "upsampler"])
def test_what_an_x0_model_loses_of_clean_images_is_measured(
    decoder_run: DecoderRun, upsampler_run: UpsamplerRun, tmp_path: Path, stage: str
) -> None:
    run: AnyRun = decoder_run if stage == "decoder" else upsampler_run
    fit(run)
    assert DiffusionFacts.read(Path(run.run_dir) / "export")[0].x0_error == 0  # of v
    model = dataclasses.replace(run.model, learned_variance=False)
    objective = dataclasses.replace(run.objective, predicts="x0")
    run = dataclasses.replace(run, model=model, objective=objective, run_dir=str(tmp_path / "x0"))  # type: ignore[arg-type]
    trainer = fit(run)
    found = DiffusionFacts.read(Path(run.run_dir) / "export")[0].x0_error
    again, _ = export_checkpoint(run.run_dir, out=tmp_path / "again")
    assert DiffusionFacts.read(again)[0].x0_error == found
    # By hand, of other views of the same few images.
    task, batch = trainer.task, first_batch(trainer.task)
    clean, steps = batch["image"], torch.zeros(8, dtype=torch.int64)
    x = clean * float(task.schedule.alpha_bars[0]) ** 0.5
    with torch.no_grad():
        if isinstance(task, DecoderTask):
            pipe = EmbeddingToImage.from_pretrained(run.run_dir)
            seen = pipe.decoder(x, steps, batch["image_embedding"], Caption(batch["text"], batch["text_embedding"]))
        else:
            seen = SuperResolution.from_pretrained(run.run_dir).upsampler(x, steps, batch["low"])
    assert float((seen - clean).square().mean().sqrt()) == pytest.approx(found, rel=0.3)


def test_an_export_refuses_another_clip(decoder_run: DecoderRun, clip: Path) -> None:
    shape = {"text_width": SHAPE.text_width, "text_len": SHAPE.text_len}
    model = dataclasses.replace(decoder_run.model, text="clip_states", **shape)
    run = dataclasses.replace(decoder_run, model=model, tokenizer="", steps=1)
    fit(run)
    other = Clip.from_pretrained(clip)
    with torch.no_grad():
        other.visual_projection.weight.mul_(2)
    for refused in (lambda: EmbeddingToImage.from_pretrained(run.run_dir, clip=other),):
        with pytest.raises(CheckpointError, match="clip"):
            refused()


# --- what is learned from


def test_the_decoders_loss_is_the_papers(decoder_run: DecoderRun) -> None:
    """The error of ε̂ at x_t, of the noise and timesteps of each row's key; the bound is added."""
    run = dataclasses.replace(decoder_run, model=dataclasses.replace(DECODER, dropout=0.0))
    task = DecoderTask(run)
    torch.manual_seed(0)
    model = task.build_model()
    fill(model)
    batch = first_batch(task)
    loss, told = task.loss(model, batch, 0)
    loss = loss.detach()
    steps, noise, uniforms = task.random_noise(batch, 2)
    a = noise_schedule("cosine", 50).alpha_bars[steps].float()[:, None, None, None]
    output = model(
        a.sqrt() * batch["image"] + (1 - a).sqrt() * noise,
        steps,
        batch["image_embedding"],
        Caption(batch["text"], batch["text_embedding"]),
        embedding_dropped=uniforms[:, 0] < 0.1,
        text_dropped=uniforms[:, 1] < 0.5,
    )
    assert float(told["mse"]) == pytest.approx(float((output[:, :3].detach() - noise).square().mean()), rel=1e-5)
    assert float(loss) == pytest.approx(float(told["mse"] + told["vb"]), rel=1e-5) and float(told["vb"]) > 0
    assert float(batch["image"].min()) >= -1 and float(batch["image"].max()) <= 1


def test_drops_have_their_rates_and_are_independent(decoder_run: DecoderRun) -> None:
    task = DecoderTask(decoder_run)
    keys = torch.arange(5_000) * 7_919 + 13
    batch = {"image": torch.zeros(5_000, 3, 1, 1), "key": keys}
    steps, _, uniforms = task.random_noise(batch, 2)
    embedding, text = uniforms[:, 0] < 0.1, uniforms[:, 1] < 0.5
    for found, rate in ((embedding, 0.1), (text, 0.5), (embedding & text, 0.05)):
        assert stats.binomtest(int(found.sum()), 5_000, rate).pvalue > 1e-3
    assert stats.chisquare(torch.bincount(steps, minlength=50).tolist()).pvalue > 1e-3
    some = {"image": torch.zeros(1, 3, 1, 1), "key": keys[17:18]}
    assert torch.equal(task.random_noise(some, 2)[2][0], uniforms[17])


def test_images_are_the_views_that_are_embedded(decoder_run: DecoderRun) -> None:
    """Whatever the decoder's size: the CLIP's own view, at its size, is the one that was embedded."""
    task = DecoderTask(decoder_run)
    samples = task.samples("train")
    assert isinstance(samples, EmbeddingSamples)
    samples._image_size = task.clip.config.image_size  # as the cache saw it
    batch = next(iter(BatchLoader(samples, seed=0, batch_size=32, micro_batch=32, rank=0, world_size=1)))
    again = task.clip.embed_images(batch["image"].float() / 255)
    torch.testing.assert_close(again, batch["image_embedding"], atol=1e-4, rtol=0)
    pixels = samples._dataset.image(0)
    views = [samples._view(0, view) for view in range(2)]
    assert (views[0] == clip_center_view(pixels, samples._image_size)).all() and (views[0] != views[1]).any()


def test_an_upsamplers_crops_and_small_images_belong_together(upsampler_run: UpsamplerRun) -> None:
    objective = dataclasses.replace(upsampler_run.objective, degradation="none", crop=0.25)
    task = UpsamplerTask(dataclasses.replace(upsampler_run, objective=objective))
    batch = first_batch(task)
    assert batch["image"].shape == (8, 3, 8, 8) and batch["low"].shape == (8, 3, 4, 4)
    means = F.avg_pool2d(batch["image"], 2)
    torch.testing.assert_close(batch["low"], means, atol=0.5 / 127.5 + 1e-5, rtol=0)
    task = UpsamplerTask(upsampler_run)
    item = next(iter(BatchLoader(task.samples("train"), seed=0, batch_size=64, micro_batch=64, rank=0, world_size=1)))
    exact = F.avg_pool2d(item["image"].float(), 2)
    changed = (item["low"].float() - exact).abs().amax((1, 2, 3)) > 1
    assert stats.binomtest(int(changed.sum()), 64, 0.5).pvalue > 1e-3
    # Validation is of whole images, and nothing is done to small ones: DALLE2-pytorch's blur stays on.
    for item in evaluation_batches(task.samples("validation"), 9, rank=0, world_size=1):
        assert item["image"].shape[2:] == (32, 32)
        assert (item["low"].float() - F.avg_pool2d(item["image"].float(), 2)).abs().max() <= 0.5


def test_noise_augmentation_is_of_the_timesteps_that_are_told(upsampler_run: UpsamplerRun) -> None:
    model = dataclasses.replace(UPSAMPLER, noise_augmentation=True)
    objective = dataclasses.replace(upsampler_run.objective, noise=0.5)
    task = UpsamplerTask(dataclasses.replace(upsampler_run, model=model, objective=objective))
    batch, seen = first_batch(task, 64), {}

    def spy(x, steps, low, **given):  # type: ignore[no-untyped-def]
        seen.update(low=low, **given)
        return torch.zeros(len(x), 6, *x.shape[2:])

    task.loss(spy, batch, 0)  # type: ignore[arg-type]
    steps = seen["noise_steps"]
    assert int(steps.min()) >= 0 and 20 < int(steps.max()) < 25
    alpha_bars = noise_schedule("cosine", 50).alpha_bars[steps].float()[:, None, None, None]
    noise = (seen["low"] - alpha_bars.sqrt() * batch["low"]) / (1 - alpha_bars).sqrt()
    some = steps > 0
    assert abs(float(noise[some].std()) - 1) < 0.05
    assert torch.equal(seen["low"][~some], batch["low"][~some])
    _, of_image, _ = task.random_noise(batch, 1)
    both = torch.corrcoef(torch.stack([noise[some].flatten(), of_image[some][:, :, :8, :8].flatten()]))
    assert abs(float(both[0, 1])) < 0.05


def test_a_difference_is_learned_from_the_enlarged_small_image(upsampler_run: UpsamplerRun) -> None:
    """A model that tells nothing is off by what the small image does not tell."""
    objective = dataclasses.replace(upsampler_run.objective, predicts="x0", residual=5.0)
    model = dataclasses.replace(UPSAMPLER, learned_variance=False)
    task = UpsamplerTask(dataclasses.replace(upsampler_run, model=model, objective=objective))
    batch = first_batch(task)
    loss, _ = task.loss(task.build_model(), batch, 0)
    missed = (batch["image"] - enlarge(batch["low"], 2)).square().mean()
    assert float(loss.detach()) == pytest.approx(25 * float(missed), rel=1e-5)
    assert task.pipeline(task.build_model()).facts.residual == 5.0


def test_validation_does_not_depend_on_how_rows_are_batched(
    decoder_run: DecoderRun, upsampler_run: UpsamplerRun
) -> None:
    for task in (DecoderTask(decoder_run), UpsamplerTask(upsampler_run)):
        torch.manual_seed(0)
        model = task.build_model().eval()
        fill(model)
        found = []
        for micro_batch in (2, 9):
            sums: dict[str, torch.Tensor] = {}
            for batch in evaluation_batches(task.samples("validation"), micro_batch, rank=0, world_size=1, rows=9):
                with torch.no_grad():
                    for name, value in task.evaluate(model, task.prepare(batch)).items():
                        sums[name] = sums.get(name, torch.zeros(())) + value
            found.append(task.summarize(sums))
        assert found[0] == pytest.approx(found[1], rel=1e-4, abs=1e-5)


# --- mistakes


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"clip": ""}, "--clip"),
        ({"tokenizer": ""}, "--tokenizer"),
        ({"model": dataclasses.replace(DECODER, embed_dim=32)}, "--model.embed_dim 16"),
        ({"model": dataclasses.replace(DECODER, text_vocab=10)}, "--model.text_vocab"),
        ({"model": dataclasses.replace(DECODER, text="clip_states")}, "--tokenizer"),
        ({"sampling": ImageSampling(steps="51")}, "step grid"),
        ({"sampling": ImageSampling(noise=0.1)}, "sampling.noise"),
    ],
)
def test_mistakes_of_the_decoder_are_told(decoder_run: DecoderRun, change: dict[str, Any], words: str) -> None:
    with pytest.raises(ConfigError, match=words):
        DecoderTask(dataclasses.replace(decoder_run, **change))


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"objective": UpsamplerObjective(crop=0.35)}, "objective.crop"),
        ({"objective": UpsamplerObjective(crop=0.0)}, "objective.crop"),
        ({"objective": UpsamplerObjective(crop=0.5, noise=0.2)}, "model.noise_augmentation"),
        ({"sampling": ImageSampling(guidance=2.0)}, "sampling.guidance"),
        ({"objective": UpsamplerObjective(predicts="v", crop=0.5, residual=5.0)}, "objective.residual"),
    ],
)
def test_mistakes_of_an_upsampler_are_told(upsampler_run: UpsamplerRun, change: dict[str, Any], words: str) -> None:
    with pytest.raises(ConfigError, match=words):
        dataclasses.replace(upsampler_run, **change)


def test_random_views_are_of_the_same_part_at_any_size() -> None:
    """What `embedded_view` relies on: the box is drawn before the size matters."""
    import numpy as np

    pixels = np.random.default_rng(0).integers(0, 255, (96, 128, 3), dtype=np.uint8)
    small, large = (clip_random_view(pixels, size, np.random.default_rng(5), 0.9) for size in (16, 48))
    means = large.reshape(16, 3, 16, 3, 3).mean((1, 3))
    assert np.corrcoef(small.ravel(), means.ravel())[0, 1] > 0.9


@pytest.mark.parametrize("dropout", [0.0, 0.1])
def test_a_run_is_planned_without_reading_files(dropout: float) -> None:
    """Dropout reads seeds, which a plan has none of."""
    decoder = DecoderTask.planned(DecoderRun(model=dataclasses.replace(DECODER, dropout=dropout)))
    upsampler = UpsamplerTask.planned(UpsamplerRun(model=dataclasses.replace(UPSAMPLER, dropout=dropout)))
    assert decoder.flops_per_sample() > 1e7 < upsampler.flops_per_sample()
