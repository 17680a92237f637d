"""What tasks promise the Trainer, and the mistakes they refuse."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F

from dalle_ds.config import PADDING, DalleConfig, DvaeObjective, DvaeRun, TransformerLoaderConfig, TransformerRun
from dalle_ds.data import PairDataset, evaluation_batches
from dalle_ds.data.augment import augment_for_dvae, augment_for_transformer, useful_short_side
from dalle_ds.data.codes import cache_codes
from dalle_ds.data.images import center_crop_resize
from dalle_ds.errors import CheckpointError, ConfigError, DataError
from dalle_ds.models import Dalle, DiscreteVAE
from dalle_ds.models.dvae import map_pixels
from dalle_ds.nn.attention import attention_mask, configured_kinds
from dalle_ds.optim import gumbel_temperature
from dalle_ds.sampling import TextToImage
from dalle_ds.tasks.dvae import DvaeTask
from dalle_ds.tasks.transformer import TransformerTask
from dalle_ds.text.tokenizer import Tokenizer
from tests.conftest import COLOURS, SHAPES, TINY_DALLE, TINY_DVAE


@pytest.fixture
def transformer_run(data: Path, dvae_export: Path, tokenizer_file: Path) -> TransformerRun:
    return TransformerRun(
        data=str(data),
        dvae=str(dvae_export),
        tokenizer=str(tokenizer_file),
        model=TINY_DALLE,
        loader=TransformerLoaderConfig(codes="live"),
    )


@pytest.fixture
def dvae_run(data: Path) -> DvaeRun:
    objective = DvaeObjective(kl_weight=3.0, kl_warmup_steps=10, temperature_steps=20)
    return DvaeRun(data=str(data), model=TINY_DVAE, objective=objective)


def test_what_names_the_data_of_a_run_is_its_manifest(
    dvae_run: DvaeRun, transformer_run: TransformerRun, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Shards, thousands of which may lie on a slow disk, are looked at once: by `samples`."""
    tasks = DvaeTask(dvae_run), TransformerTask(transformer_run)
    fingerprint = PairDataset.open(dvae_run.data, "train").fingerprint
    monkeypatch.setattr(PairDataset, "open", None)
    assert {task.identity()["data"] for task in tasks} == {fingerprint}


def test_validation_images_of_the_dvae_are_the_central_square_whatever_is_drawn(dvae_run: DvaeRun) -> None:
    dataset, samples = PairDataset.open(dvae_run.data, "validation"), DvaeTask(dvae_run).samples("validation")
    for row in range(0, len(dataset), 3):
        expected = center_crop_resize(dataset.image(row), 16).transpose(2, 0, 1)
        for seed in (0, 1):
            assert np.array_equal(samples.sample(row, np.random.default_rng(seed))["image"], expected)


def test_training_pictures_of_the_dvae_are_listing_1s_and_live_ones_of_the_transformer_listing_2s(
    dvae_run: DvaeRun, transformer_run: TransformerRun
) -> None:
    """By the same generator, byte for byte; the captions' dropout draws from it first."""
    dataset = PairDataset.open(dvae_run.data, "train")
    dvae, transformer = DvaeTask(dvae_run).samples("train"), TransformerTask(transformer_run)
    live, length = transformer.samples("train"), transformer_run.model.text_len
    rows = range(0, len(dataset), 7)
    lopsided = 0
    for row in rows:
        pixels = dataset.image(row, useful_short_side(16))
        view = dvae.sample(row, np.random.default_rng(row))["image"]
        expected = augment_for_dvae(pixels, 16, np.random.default_rng(row))
        assert np.array_equal(view, expected.transpose(2, 0, 1))
        sample, rng = live.sample(row, np.random.default_rng(row)), np.random.default_rng(row)
        assert rng.random() >= transformer_run.loader.caption_dropout
        captions = dataset.captions(row)
        transformer.tokenizer.encode(
            captions[int(rng.integers(len(captions)))], dropout=0.1, rng=rng, max_tokens=length + 1
        )
        expected = augment_for_transformer(pixels, 16, rng)
        assert np.array_equal(sample["image"], expected.transpose(2, 0, 1))
        lopsided += not np.array_equal(expected, expected[:, ::-1])
    assert lopsided > len(rows) // 2, "images that do not show whether they are mirrored"


def test_bpe_dropout_reaches_the_tokenizer_in_training_and_nowhere_else(
    transformer_run: TransformerRun, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Unless told otherwise it is the paper's 10 %."""
    asked: list[float] = []
    encode = Tokenizer.encode

    def spied(self: Tokenizer, text: str, **options: Any) -> list[int]:
        asked.append(options["dropout"])
        assert options["rng"] is not None
        return encode(self, text, **options)

    monkeypatch.setattr(Tokenizer, "encode", spied)
    more = dataclasses.replace(transformer_run, loader=TransformerLoaderConfig(codes="live", bpe_dropout=0.5))
    for run, share in ((transformer_run, 0.1), (more, 0.5)):
        task = TransformerTask(run)
        asked.clear()
        for seed in range(10):
            task.samples("train").sample(0, np.random.default_rng(seed))
        assert asked == [share] * 10
        asked.clear()
        task.samples("validation").sample(0, np.random.default_rng(0))
        assert asked == [0.0, 0.0]
    texts = {TransformerTask(more).samples("train").sample(0, np.random.default_rng(n))["text"].tobytes() for n in range(10)}  # type: ignore[union-attr]  # fmt: skip
    assert len(texts) > 1, "one caption in several ways"


@pytest.mark.parametrize("share", [0.0, 0.1, 0.6])
def test_captions_are_dropped_as_often_as_the_run_says_and_in_training_only(
    transformer_run: TransformerRun, share: float
) -> None:
    run = dataclasses.replace(transformer_run, loader=TransformerLoaderConfig(codes="live", caption_dropout=share))
    samples = {split: TransformerTask(run).samples(split) for split in ("train", "validation")}

    def dropped(split: str) -> float:
        texts = [samples[split].sample(0, np.random.default_rng(seed))["text"] for seed in range(200)]
        return float(np.mean([(text == PADDING).all() for text in texts]))

    assert dropped("train") == pytest.approx(share, abs=0.1 if share else 0)
    assert dropped("validation") == 0


def validation_batch(task: DvaeTask | TransformerTask, rows: int = 6) -> dict[str, torch.Tensor]:
    batch = next(evaluation_batches(task.samples("validation"), rows, rank=0, world_size=1, rows=rows))
    return {**task.prepare(batch), "loss_scale": torch.ones(())}


def test_the_dvae_loss_is_the_papers_with_its_constants(dvae_run: DvaeRun) -> None:
    """(−Σ ln f + β Σ KL) / (number of pixel values), App. A.2, at a step where β and τ are half-way."""
    task = DvaeTask(dvae_run)
    torch.manual_seed(0)
    model = task.build_model()
    batch = validation_batch(task)
    loss, metrics = task.loss(model, batch, step=5)
    images, positions, values = len(batch["key"]), TINY_DVAE.grid**2, 3 * TINY_DVAE.image_size**2
    nll_sum = metrics["nll"].item() * values * images
    kl_sum = metrics["kl"].item() * positions * images
    assert metrics["kl_weight"].item() == pytest.approx(1.5)
    assert loss.item() == pytest.approx((nll_sum + 1.5 * kl_sum) / (values * images), rel=1e-6)
    assert gumbel_temperature(task.run.objective, 10) == pytest.approx((1 + 1 / 16) / 2)


def test_dvae_validation_figures_against_plain_arithmetic(dvae_run: DvaeRun) -> None:
    task = DvaeTask(dvae_run)
    torch.manual_seed(0)
    model = task.build_model()
    batch = validation_batch(task)
    with torch.no_grad():
        figures = task.summarize(task.evaluate(model, batch))
    codes = model.encode(batch["image"])
    error = (model.decode(codes) - batch["image"]).double().pow(2).mean(dim=(1, 2, 3)).numpy()
    assert figures["psnr"] == pytest.approx(float(np.mean(10 * np.log10(1 / error))), abs=1e-3)
    counts = np.bincount(codes.numpy().ravel(), minlength=32)
    share = counts[counts > 0] / counts.sum()
    assert figures["perplexity"] == pytest.approx(float(np.exp(-(share * np.log(share)).sum())), rel=1e-4)
    assert figures["codes_used"] == (counts > 0).sum()
    assert figures["codes_used"] + figures["codes_dead"] == 32


def test_the_alarm_rings_on_collapse_after_the_warm_up_only(dvae_run: DvaeRun) -> None:
    task = DvaeTask(dvae_run)
    collapsed, healthy = {"perplexity": 1.3, "codes_used": 2.0}, {"perplexity": 20.0, "codes_used": 30.0}
    assert task.alarm(collapsed, step=5) is None
    assert task.alarm(healthy, step=100) is None
    sentence = task.alarm(collapsed, step=100)
    assert sentence is not None and "perplexity 1.3 of 32 codes" in sentence and "objective.kl_weight" in sentence


def test_shares_make_the_text_loss_a_mean_over_all_tokens(transformer_run: TransformerRun) -> None:
    task = TransformerTask(transformer_run)
    torch.manual_seed(0)
    model = task.build_model()
    text = torch.full((4, 8), -1)
    text[0, :7], text[1, :1], text[3, :3] = 5, 6, 7
    codes = torch.randint(0, 32, (4, 16))
    whole = model(text, codes)
    total = 0.0
    halves = [{"text": text[rows], "codes": codes[rows]} for rows in (slice(0, 2), slice(2, 4))]
    tokens = sum(task.num_items(half) for half in halves)
    for half in halves:
        half["loss_scale"] = task.num_items(half) * 2 / tokens
        loss, metrics = task.loss(model, half, 0)
        total += loss.item() / 2
        assert set(metrics) == {"text_loss", "image_loss"}
    assert total == pytest.approx(whole.loss.item(), rel=1e-5)


def test_transformer_validation_figures(transformer_run: TransformerRun) -> None:
    task = TransformerTask(transformer_run)
    torch.manual_seed(0)
    model = task.build_model().eval()
    batch = validation_batch(task)
    with torch.no_grad():
        figures = task.summarize(task.evaluate(model, batch))
    logits = model(batch["text"], batch["codes"]).image_logits
    expected = F.cross_entropy(logits.double().flatten(0, 1), batch["codes"].flatten()).item()
    assert figures["image_loss"] == pytest.approx(expected, abs=1e-5)
    swapped = model(batch["other_text"], batch["codes"]).image_loss.item()
    assert not (batch["other_text"] == batch["text"]).all(dim=1).any()
    assert figures["caption_gain"] == pytest.approx(swapped - expected, abs=1e-5)
    counts = np.bincount(batch["codes"].numpy().ravel())
    share = counts[counts > 0] / counts.sum()
    assert figures["code_entropy"] == pytest.approx(float(-(share * np.log(share)).sum()), abs=1e-5)


@pytest.mark.parametrize("elsewhere", [False, True])
def test_live_and_cached_codes_agree_on_validation_pictures(
    transformer_run: TransformerRun, tmp_path: Path, data: Path, dvae_export: Path, elsewhere: bool
) -> None:
    import shutil

    copy = tmp_path / "data"
    shutil.copytree(data, copy)
    live = TransformerTask(dataclasses.replace(transformer_run, data=str(copy)))
    expected = validation_batch(live)
    automatic = dataclasses.replace(transformer_run, data=str(copy), loader=TransformerLoaderConfig())
    assert TransformerTask(automatic).codes_source == "live"
    codes = str(tmp_path / "codes") if elsewhere else ""
    cache_codes(DiscreteVAE.from_pretrained(dvae_export), copy, views=2, batch_size=8, codes_dir=codes)
    cached = TransformerTask(dataclasses.replace(automatic, codes=codes))
    if elsewhere:
        assert TransformerTask(automatic).codes_source == "live"
    assert cached.codes_source == "cached"
    found = validation_batch(cached)
    assert "image" not in found
    assert torch.equal(found["codes"], expected["codes"])
    assert torch.equal(found["text"], expected["text"])


def test_flops_are_those_of_the_model(transformer_run: TransformerRun) -> None:
    """2 FLOPs per weight and position, and two products per allowed pair, times three for forward and backward."""
    config = TINY_DALLE
    found = TransformerTask(transformer_run).flops_per_sample()
    length, width = config.total_len, config.width
    pairs = sum(
        int(attention_mask(kind, config.text_len, config.grid, config.kernel).sum())
        for kind in configured_kinds(config)
    )
    blocks = config.depth * 2 * length * 12 * width**2 + 4 * width * pairs
    heads = 2 * width * (config.text_len * config.text_vocab + config.image_len * config.image_vocab)
    assert found == pytest.approx(3 * (blocks + heads), rel=1e-9)


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"model": dataclasses.replace(TINY_DALLE, image_vocab=64)}, "32 codes but.*is 64.*--model.image_vocab 32"),
        ({"model": dataclasses.replace(TINY_DALLE, grid=8)}, "makes 4×4 codes.*model.grid is 8.*--model.grid 4"),
        ({"model": dataclasses.replace(TINY_DALLE, text_vocab=300)}, r"pieces but model.text_vocab is only 300"),
        ({"dvae": ""}, "--dvae is missing"),
        ({"tokenizer": ""}, "--tokenizer is missing"),
        ({"loader": TransformerLoaderConfig(codes="cached")}, "has no codes of the dVAE.*--cache_codes"),
        ({"codes": "/no", "loader": TransformerLoaderConfig()}, "--codes /no has no.*--cache_codes.*--codes_out /no"),
        ({"codes": "/nowhere", "loader": TransformerLoaderConfig(codes="live")}, "loader.codes=live.*/nowhere"),
    ],
)  # fmt: skip
def test_parts_that_do_not_fit_are_refused(transformer_run: TransformerRun, change: dict, words: str) -> None:
    with pytest.raises(ConfigError, match=words):
        TransformerTask(dataclasses.replace(transformer_run, **change)).samples("train")


def test_missing_parts_are_named(transformer_run: TransformerRun, tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match="nowhere"):
        TransformerTask(dataclasses.replace(transformer_run, dvae=str(tmp_path / "nowhere")))
    with pytest.raises(CheckpointError, match="nowhere"):
        TransformerTask(dataclasses.replace(transformer_run, tokenizer=str(tmp_path / "nowhere")))
    with pytest.raises(DataError, match="nowhere"):
        TransformerTask(dataclasses.replace(transformer_run, data=str(tmp_path / "nowhere"))).samples("train")


def test_an_export_is_whole_and_refuses_foreign_parts(transformer_run: TransformerRun, tmp_path: Path) -> None:
    task = TransformerTask(transformer_run)
    torch.manual_seed(1)
    model = task.build_model()
    task.export(model, tmp_path / "export")
    pipeline = TextToImage.from_pretrained(tmp_path)
    assert all(torch.equal(a, b) for a, b in zip(pipeline.model.parameters(), model.parameters(), strict=True))
    assert not list(tmp_path.glob(".*")), "nothing is left beside the export"
    captions = [f"{shape} {colour} other" for colour in COLOURS for shape in SHAPES]
    Tokenizer.train(captions, tmp_path / "export" / "tokenizer.model", 390)
    with pytest.raises(
        CheckpointError, match=r"the tokenizer in .* is not the one that the transformer was trained with"
    ):
        TextToImage.from_pretrained(tmp_path)
    task.export(model, tmp_path / "export")  # replaces
    torch.manual_seed(9)
    DiscreteVAE(TINY_DVAE).save_pretrained(tmp_path / "export" / "dvae")
    with pytest.raises(CheckpointError, match=r"the dvae in .* is not the one"):
        TextToImage.from_pretrained(tmp_path)


def test_previews_show_what_they_should(transformer_run: TransformerRun, dvae_run: DvaeRun) -> None:
    dvae_task, task = DvaeTask(dvae_run), TransformerTask(transformer_run)
    torch.manual_seed(0)
    with torch.no_grad():
        small = dvae_task.preview(dvae_task.build_model(), validation_batch(dvae_task))
        large = task.preview(Dalle(TINY_DALLE).eval(), validation_batch(task))
    assert small.width > small.height > 256  # two rows of six
    assert large.height > 6 * 128 and large.width > 5 * 128


def test_dalle_config_of_the_exported_model_is_the_runs(transformer_run: TransformerRun, tmp_path: Path) -> None:
    task = TransformerTask(transformer_run)
    task.export(task.build_model(), tmp_path / "export")
    assert Dalle.from_pretrained(tmp_path).config == TINY_DALLE
    assert isinstance(TINY_DALLE, DalleConfig)


def test_validation_does_not_depend_on_how_rows_are_batched(transformer_run: TransformerRun, dvae_run: DvaeRun) -> None:
    """Micro-batch 1 and ones that leave an odd rest, over one and two processes, give the figures of one large batch."""
    for task in (DvaeTask(dvae_run), TransformerTask(transformer_run)):
        torch.manual_seed(0)
        model = task.build_model().eval()
        results = []
        for micro_batch, world_size in ((100, 1), (1, 1), (4, 2), (7, 1)):
            sums: dict[str, torch.Tensor] = {}
            with torch.no_grad():
                for rank in range(world_size):
                    rows = evaluation_batches(task.samples("validation"), micro_batch, rank=rank, world_size=world_size)
                    for batch in rows:
                        for name, value in task.evaluate(model, task.prepare(batch)).items():
                            sums[name] = sums.get(name, torch.zeros(())) + value
            results.append(task.summarize(sums))
        for result in results[1:]:
            assert result == pytest.approx(results[0], rel=1e-4)


def test_the_reported_bound_is_one_and_does_not_improve_as_the_posterior_flattens(dvae_run: DvaeRun) -> None:
    """ELB from codes drawn from the posterior; at the argmax, a flat posterior would get its low KL for nothing."""
    task = DvaeTask(dvae_run)
    torch.manual_seed(0)
    model = task.build_model()
    batch = validation_batch(task, rows=8)
    model.requires_grad_(False)
    sums = task.evaluate(model, batch)
    posterior = torch.distributions.Categorical(logits=model.encoder(map_pixels(batch["image"])).permute(0, 2, 3, 1))
    drawn = torch.stack([model.nll(batch["image"], posterior.sample()) for _ in range(64)])
    found = sums["nll"] / sums["count"]
    assert abs(float(found - drawn.mean())) < 6 * float(drawn.mean(dim=1).std())


def test_codebook_figures_are_those_of_the_whole_batch(dvae_run: DvaeRun) -> None:
    task = DvaeTask(dvae_run)
    torch.manual_seed(0)
    model = task.build_model()
    batch = validation_batch(task, rows=8)
    whole = task.loss(model, batch, 0)[1]["histogram"]
    halves = []
    for rows in (slice(0, 4), slice(4, 8)):
        half = {name: value[rows] if value.ndim else value for name, value in batch.items()}
        halves.append(task.loss(model, half, 0)[1]["histogram"])
    assert torch.equal(sum(halves), whole)
    assert task.digest({"histogram": whole})["codes_used"] == float((whole > 0).sum())
