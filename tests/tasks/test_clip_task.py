"""What CLIP's task promises the Trainer: samples, the loss's parts, retrieval, and the mistakes that it refuses."""

from __future__ import annotations

import dataclasses
import json
import shutil
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors.torch import load_file

from dalle_ds.config import ClipConfig, ClipObjective, ClipRun, ReportConfig, SharpnessConfig, load_preset
from dalle_ds.data import BatchLoader, ClipSamples, PairDataset, evaluation_batches
from dalle_ds.data.augment import clip_center_view, clip_random_view
from dalle_ds.data.dataset import read_info
from dalle_ds.errors import ConfigError
from dalle_ds.models import Clip
from dalle_ds.models.clip_images import square_pixels
from dalle_ds.nn.contrastive import contrastive_logits
from dalle_ds.sampling.grid import image_grid, to_pil_images
from dalle_ds.tasks.clip import ClipTask, recalls
from dalle_ds.text.clip_tokenizer import ClipTokenizer
from dalle_ds.text.tokenizer import Tokenizer
from dalle_ds.training.export import export_checkpoint
from tests.clip_shapes import CLIP_SHAPES
from tests.conftest import TINY_DALLE
from tests.processes import run_ranks

SHAPE = ClipConfig(
    embed_dim=16,
    image_size=16,
    patch_size=4,
    vision_width=16,
    vision_depth=2,
    vision_heads=2,
    text_width=16,
    text_depth=2,
    text_heads=2,
    text_len=10,
    text_vocab=TINY_DALLE.text_vocab + 2,
)


@pytest.fixture
def run(data: Path, tokenizer_file: Path) -> ClipRun:
    return ClipRun(data=str(data), tokenizer=str(tokenizer_file), model=SHAPE, report=ReportConfig(validation_rows=15))


@pytest.fixture
def task(run: ClipRun) -> ClipTask:
    return ClipTask(run)


def pixels(height: int, width: int) -> np.ndarray:
    rng = np.random.default_rng(height)
    small = rng.integers(0, 256, (height // 4 + 1, width // 4 + 1, 3), dtype=np.uint8)
    return np.asarray(Image.fromarray(small).resize((width, height), Image.Resampling.BILINEAR))


# --- samples


@pytest.mark.parametrize(("height", "width"), [(16, 16), (40, 23), (23, 57), (9, 13), (72, 72)])
def test_views_of_evaluation_are_those_that_the_model_takes_of_pictures(height: int, width: int) -> None:
    picture = pixels(height, width)
    expected = square_pixels([Image.fromarray(picture)], 16)[0].permute(1, 2, 0)
    assert torch.equal(torch.from_numpy(clip_center_view(picture, 16).copy()).float() / 255, expected)


def test_pictures_that_are_very_long_take_no_memory_for_what_is_cut_away() -> None:
    picture = pixels(2, 400)
    expected = square_pixels([Image.fromarray(picture)], 16)[0].permute(1, 2, 0)
    for long in (picture, picture.transpose(1, 0, 2)):
        view = torch.from_numpy(clip_center_view(long, 16).copy()).float() / 255
        assert torch.equal(view if long is picture else view.transpose(0, 1), expected)
    assert clip_center_view(np.zeros((1, 500_000, 3), np.uint8), 224).shape == (224, 224, 3)  # resized first: 75 GB


def test_random_views_are_random_squares_of_at_least_the_asked_share() -> None:
    """Of an image whose red and green tell the place of each pixel."""
    across, down = np.meshgrid(np.arange(120), np.arange(80))
    picture = np.stack([across * 2, down * 2, np.zeros_like(down)], axis=2).astype(np.uint8)
    rng = np.random.default_rng(0)
    sides, lefts, mirrored = [], [], 0
    for _ in range(200):
        view = clip_random_view(picture, 20, rng, 0.25, mirror=True).astype(float) / 2
        assert view.shape == (20, 20, 3)
        step = (view[10, 15, 0] - view[10, 5, 0]) / 10
        mirrored += step < 0
        sides.append(abs(step) * 20)
        lefts.append(min(view[10, 0, 0], view[10, -1, 0]))
        assert (view[15, 10, 1] - view[5, 10, 1]) / 10 == pytest.approx(abs(step), abs=0.15), "not a square"
    assert 38 <= min(sides) < 46 and 74 < max(sides) <= 82, "areas from a quarter of 80 × 80 to all of it"
    assert min(lefts) < 8 and max(lefts) > 50
    assert 70 < mirrored < 130
    plain = clip_random_view(picture, 20, np.random.default_rng(1))
    assert plain[10, 19, 0] > plain[10, 0, 0] and plain[19, 10, 1] - plain[0, 10, 1] == pytest.approx(152, abs=3)


def test_samples_have_whole_captions_or_cut_ones_with_their_end(data: Path, tokenizer_file: Path) -> None:
    tokenizer = ClipTokenizer.load(tokenizer_file, start=SHAPE.start, end=SHAPE.end)
    dataset = PairDataset.open(str(data), "validation")
    for length in (4, 40):
        samples = ClipSamples(dataset, tokenizer, text_len=length, image_size=16, train=False)
        for row in range(3):
            sample = samples.sample(row, np.random.default_rng(0))
            text = sample["text"]
            assert isinstance(text, np.ndarray) and text.shape == (length,)
            assert text.tolist() == tokenizer.encode([dataset.captions(row)[0]], length)[0].tolist()
            assert sample["truncated"] == int(length == 4)
            if length == 40:
                assert tokenizer.decode(text) == dataset.captions(row)[0]
            picture = clip_center_view(dataset.image(row, 16), 16)
            assert np.array_equal(sample["image"], picture.transpose(2, 0, 1))


def test_training_takes_each_caption_of_several_and_validation_the_first(tokenizer_file: Path) -> None:
    class Rows:
        def __len__(self) -> int:
            return 1

        def captions(self, row: int) -> list[str]:
            return ["red", "green", "blue"]

        def image(self, row: int, short_side: int) -> np.ndarray:
            return pixels(16, 16)

    tokenizer = ClipTokenizer.load(tokenizer_file, start=SHAPE.start, end=SHAPE.end)
    for train, expected in ((True, {"red", "green", "blue"}), (False, {"red"})):
        samples = ClipSamples(Rows(), tokenizer, text_len=10, image_size=16, train=train)  # type: ignore[arg-type]
        texts = [samples.sample(0, np.random.default_rng(seed))["text"] for seed in range(30)]
        assert {tokenizer.decode(np.asarray(text).tolist()) for text in texts} == expected


def test_training_samples_depend_on_their_generator_alone(task: ClipTask) -> None:
    samples = task.samples("train")
    first, again, other = (samples.sample(3, np.random.default_rng(seed)) for seed in (1, 1, 2))
    assert np.array_equal(first["image"], again["image"]) and np.array_equal(first["text"], again["text"])
    assert not np.array_equal(first["image"], other["image"])


def test_training_pictures_are_the_views_that_the_objective_asks_for(run: ClipRun) -> None:
    objective = ClipObjective(min_crop=0.3, mirror=True)
    samples = ClipTask(dataclasses.replace(run, objective=objective)).samples("train")
    dataset = PairDataset.open(run.data, "train")
    for row in range(6):
        rng = np.random.default_rng(row)
        rng.integers(len(dataset.captions(row)))  # chooses the caption
        view = clip_random_view(dataset.image(row, 32), 16, rng, 0.3, mirror=True)
        assert np.array_equal(samples.sample(row, np.random.default_rng(row))["image"], view.transpose(2, 0, 1))


# --- the loss


def test_gains_biases_embeddings_and_the_scale_are_not_decayed(task: ClipTask) -> None:
    model = task.build_model()
    names = {id(parameter): name for name, parameter in model.named_parameters()}
    decayed, others = ({names[id(p)] for p in group["params"]} for group in task.parameter_groups(model))
    assert len(decayed) + len(others) == len(names)
    # Attention and MLP matrices of both towers, the patches' kernel, both projections.
    assert len(decayed) == (4 + 2) * (SHAPE.vision_depth + SHAPE.text_depth) + 1 + 2
    assert all(name.endswith(".weight") and "norm" not in name for name in decayed)
    embeddings = {name for name in others if "embedding" in name or name == "logit_scale"}
    assert {name.rsplit(".", 1)[-1] if "class" in name else name for name in embeddings} == {
        "class_embedding",
        "vision_model.embeddings.position_embedding.weight",
        "text_model.embeddings.token_embedding.weight",
        "text_model.embeddings.position_embedding.weight",
        "logit_scale",
    }
    assert all(name.endswith(".bias") or "norm" in name for name in others - embeddings)


def test_the_loss_of_a_batch_is_the_contrastive_one_of_its_embeddings(task: ClipTask) -> None:
    torch.manual_seed(0)
    model = task.build_model()
    batch = task.prepare(next(evaluation_batches(task.samples("validation"), 6, rank=0, world_size=1)))
    loss, metrics = task.loss(model, batch, 0)
    images, texts = model.embed_images(batch["image"]), model.embed_texts(batch["text"])
    assert float(loss.detach()) == pytest.approx(
        float(contrastive_logits(images, texts, torch.tensor(1 / 0.07)).loss()), rel=1e-5
    )
    assert float(metrics["scale"]) == pytest.approx(1 / 0.07)
    cosines = images.double() @ images.double().T
    spreads = task.digest({name: value for name, value in metrics.items() if value.ndim})
    assert spreads["image_spread"] == pytest.approx(float((1 - cosines).mean()), abs=1e-5)
    assert not any(value.requires_grad for value in metrics.values())


def test_spreads_are_those_of_the_whole_batch_however_it_is_shared_out(task: ClipTask) -> None:
    """Of one row for itself, there is none; that must not be taken for embeddings that are all the same."""
    rng = torch.Generator().manual_seed(0)
    image, text = (torch.nn.functional.normalize(torch.randn(6, 8, generator=rng), dim=1) for _ in range(2))
    spreads = []
    for size in (6, 2, 1):
        sums: dict[str, torch.Tensor] = {}
        for rows in torch.arange(6).split(size):
            _, metrics = task.loss_of({"image": image[rows], "text": text[rows], "scale": torch.tensor(20.0)})
            for name, value in metrics.items():
                if value.ndim:
                    sums[name] = sums[name] + value if name in sums else value
        spreads.append(task.digest(sums))
    assert spreads[1] == pytest.approx(spreads[0]) and spreads[2] == pytest.approx(spreads[0])
    assert spreads[0].keys() == {"image_spread", "text_spread"}
    assert spreads[0]["text_spread"] == pytest.approx(float((1 - text @ text.T).mean()), abs=1e-5)


# --- retrieval


def test_evaluation_adds_up_to_all_rows_against_all_however_they_are_shared_out(task: ClipTask) -> None:
    torch.manual_seed(0)
    model = task.build_model().eval()
    samples = task.samples("validation")
    results = []
    for size, world in ((15, 1), (4, 1), (2, 3)):
        sums: dict[str, torch.Tensor] = {}
        for rank in range(world):
            for batch in evaluation_batches(samples, size, rank=rank, world_size=world, rows=15):
                with torch.no_grad():
                    found = task.evaluate(model, task.prepare(batch))
                sums = {name: sums[name] + value if name in sums else value for name, value in found.items()}
        results.append(task.summarize(sums))
    assert results[1] == pytest.approx(results[0], abs=1e-5) and results[2] == pytest.approx(results[0], abs=1e-5)
    rows = [samples.sample(number * len(samples) // 15, np.random.default_rng(0)) for number in range(15)]
    images = model.embed_images(torch.stack([torch.from_numpy(np.asarray(row["image"])) for row in rows]).float() / 255)
    texts = model.embed_texts(torch.stack([torch.from_numpy(np.asarray(row["text"])) for row in rows]))
    order = (texts @ images.T).argsort(dim=1, descending=True)
    for k in (1, 5, 10):
        hits = sum(number in order[number, :k].tolist() for number in range(15))
        assert results[0][f"recall@{k}"] == pytest.approx(hits / 15)
    assert results[0]["loss"] == pytest.approx(
        float(contrastive_logits(images, texts, torch.tensor(1 / 0.07)).loss()), rel=1e-4
    )


def test_recalls_count_columns_that_are_as_similar_or_more_so() -> None:
    similarities = torch.eye(20)
    assert recalls(similarities) == {1: 1.0, 5: 1.0, 10: 1.0}
    similarities[0, 1:6] = 2.0  # five are better than the first row's own
    assert recalls(similarities) == pytest.approx({1: 0.95, 5: 0.95, 10: 1.0})
    assert recalls(torch.ones(20, 20)) == {1: 0.0, 5: 0.0, 10: 0.0}, "embeddings that are all the same recall nothing"


def test_captions_recall_pictures_and_not_the_other_way_round(task: ClipTask) -> None:
    """Captions 0 and 1 are both nearest to image 0; every image is nearest to its own caption."""
    images = torch.eye(16)[:15]
    texts = images.clone()
    texts[1] = torch.nn.functional.normalize(images[1] + 1.2 * images[0], dim=0)
    texts[0] = images[0]
    sums = {"image": images, "text": texts, "count": torch.tensor(15.0), "scale": torch.tensor(15 * 20.0)}
    figures = task.summarize(sums)
    assert figures["recall@1"] == pytest.approx(14 / 15) and figures["image_recall@1"] == 1.0
    assert figures["scale"] == 20.0


# --- alarms, images, files


def test_alarms(task: ClipTask) -> None:
    healthy = {"scale": 30.0, "image_spread": 0.5, "text_spread": 0.5}
    warm = task.run.optim.warmup_steps
    assert task.alarm(healthy, warm) is None
    for name, value, words in (
        ("scale", 100.0, "scaled by 100"),
        ("text_spread", 0.001, "text embeddings are collapsing"),
    ):
        assert words in (task.alarm({**healthy, name: value}, warm) or "")
        assert task.alarm({**healthy, name: value}, warm - 1) is None


def test_the_preview_shows_captions_and_the_export_reads_back(
    task: ClipTask, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    torch.manual_seed(0)
    model = task.build_model().eval()
    batch = task.prepare(next(evaluation_batches(task.samples("validation"), 16, rank=0, world_size=1, rows=16)))
    assert task.preview(model, batch).height > 16 * 64
    drawn: list[tuple[str, list[Image.Image]]] = []

    def spy(rows: list[tuple[str, list[Image.Image]]], **options: object) -> Image.Image:
        drawn.extend(rows)
        return image_grid(rows)

    monkeypatch.setattr("dalle_ds.tasks.clip.image_grid", spy)
    task.preview(model, batch)
    matches = (model.embed_texts(batch["text"]) @ model.embed_images(batch["image"]).T).argsort(dim=1, descending=True)
    shown = [picture.tobytes() for picture in to_pil_images(batch["image"])]
    for number, (_, pictures) in enumerate(drawn):
        expected = [shown[number], *(shown[found] for found in matches[number, :4].tolist())]
        assert [picture.tobytes() for picture in pictures] == expected, (
            "its own image, then those nearest to the caption"
        )
    task.export(model, tmp_path / "export")
    again = Clip.from_pretrained(tmp_path / "export")
    assert again.fingerprint == model.fingerprint and again.tokenizer is not None
    caption = "a red circle"
    assert torch.equal(
        again.embed_texts([caption]), model.embed_texts(task.tokenizer.encode([caption], SHAPE.text_len))
    )


def test_flops_grow_with_the_model(run: ClipRun) -> None:
    small = ClipTask(run).flops_per_sample()
    deeper = ClipTask(dataclasses.replace(run, model=dataclasses.replace(SHAPE, vision_depth=4))).flops_per_sample()
    # Two more blocks of 17 positions of width 16: 24 · n · d² for matrices, 4 · n² · d for attention, three times.
    assert deeper - small == pytest.approx(2 * 3 * (24 * 17 * 16**2 + 4 * 17**2 * 16))


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"tokenizer": ""}, "--tokenizer is missing"),
        ({"model": dataclasses.replace(SHAPE, text_vocab=300)}, "set model.text_vocab to"),
        ({"init": "{init}", "model": dataclasses.replace(SHAPE, vision_depth=3)}, "add --model.vision_depth 2"),
        ({"init": "{init}", "tokenizer": "{other}"}, "leave --tokenizer out"),
    ],
)
def test_mistakes(run: ClipRun, changes: dict[str, object], words: str, tmp_path: Path, tokenizer_file: Path) -> None:
    tokenizer = ClipTokenizer.load(tokenizer_file, start=SHAPE.start, end=SHAPE.end)
    Clip(SHAPE, tokenizer=tokenizer).save_pretrained(tmp_path / "init")
    Tokenizer.train(["something else entirely"], tmp_path / "other.model", 300)
    places = {"init": str(tmp_path / "init"), "other": str(tmp_path / "other.model")}
    changes = {name: value.format(**places) if isinstance(value, str) else value for name, value in changes.items()}
    with pytest.raises(ConfigError, match=words):
        ClipTask(dataclasses.replace(run, **changes))


def test_what_cannot_be_is_refused() -> None:
    with pytest.raises(ConfigError, match=r"objective\.min_crop must lie in \(0, 1\]"):
        ClipObjective(min_crop=0.0)
    with pytest.raises(ConfigError, match=r"sharpness\.rho must be greater than 0"):
        SharpnessConfig(rho=0.0)


SHAPES = {
    "toy": "toy",
    "emoji": None,
    "small": None,
    "medium": "ViT-B/32",
    "dalle-1b": "ViT-B/16",
    "dalle-3b": "ViT-L/14",
    "dalle-6b": "ViT-L/14",
    "dalle-12b": "unclip-H/16",
}


@pytest.mark.parametrize("name", SHAPES)
def test_presets_have_the_papers_shapes_and_optimizer(name: str) -> None:
    run = load_preset(name, "clip", ClipRun)
    shape = SHAPES[name]
    assert shape is None or run.model == CLIP_SHAPES[shape]
    assert (run.optim.beta1, run.optim.beta2, run.optim.eps) == (0.9, 0.98, 1e-6)
    assert run.optim.schedule == "cosine" and run.optim.decay_steps == run.steps
    assert run.optim.second_moment_clip is None and run.sharpness.rho == (0.1 if name == "dalle-12b" else None)


# --- a run


@pytest.mark.launch
def test_a_run_begins_with_another_clip_and_goes_on_bit_for_bit(
    run: ClipRun, tmp_path: Path, tokenizer_file: Path
) -> None:
    """Two processes, ZeRO-3, two micro-batches each, SAM: trained in one go, and once more from the middle."""
    tokenizer = ClipTokenizer.load(tokenizer_file, start=SHAPE.start, end=SHAPE.end)
    torch.manual_seed(3)
    initial = Clip(SHAPE, tokenizer=tokenizer)
    initial.save_pretrained(tmp_path / "init")
    shape = [f"--model.{entry.name}={getattr(SHAPE, entry.name)}" for entry in dataclasses.fields(SHAPE)[:10]]
    shape += [f"--model.text_len={SHAPE.text_len}", f"--model.text_vocab={SHAPE.text_vocab}"]
    common = ["--deepspeed_config", "ds_configs/zero3_fp32.json", "--preset", "toy", "--data", run.data, *shape]
    common += ["--init", str(tmp_path / "init"), "--train.batch_size", "16", "--train.micro_batch", "4"]
    common += ["--sharpness.rho", "0.001", "--sharpness.pairs", "4", "--save_every", "2", "--report.log_every", "1"]
    common += ["--train.average_decay", "None", "--optim.warmup_steps", "1"]

    def launch(name: str, *options: str) -> str:
        arguments = [*common, "--run_dir", tmp_path / name, *options]
        done = run_ranks("launchers/train_clip.py", *arguments, processes=2)
        assert done.returncode == 0, done.stdout[-4000:] + done.stderr[-4000:]
        return done.stdout

    launch("straight", "--steps", "4")
    shutil.copytree(tmp_path / "straight", tmp_path / "resumed")
    for what in ("checkpoints/step-4", "export"):
        shutil.rmtree(tmp_path / "resumed" / what)
    assert "step-2" in launch("resumed", "--steps", "4").partition("resumed from")[2]
    lines = [json.loads(line) for line in (tmp_path / "straight" / "metrics.jsonl").read_text().splitlines()]
    losses = [line["loss"] for line in lines if "loss" in line]
    task = ClipTask(dataclasses.replace(run, objective=load_preset("toy", "clip", ClipRun).objective))
    loader = BatchLoader(task.samples("train"), seed=0, batch_size=16, micro_batch=16, rank=0, world_size=1)
    expected, _ = task.loss(initial, task.prepare(next(iter(loader))), 0)
    assert len(losses) == 4 and losses[0] == pytest.approx(float(expected.detach()), rel=1e-5)
    assert all(line["sharpness"] > 0 for line in lines if "loss" in line)
    assert any("validation/recall@1" in line for line in lines)
    one, two = (load_file(tmp_path / name / "export" / "model.safetensors") for name in ("straight", "resumed"))
    assert all(torch.equal(value, two[name]) for name, value in one.items())
    export_checkpoint(tmp_path / "straight", out=tmp_path / "again")
    assert (
        Clip.from_pretrained(tmp_path / "again").fingerprint == Clip.from_pretrained(tmp_path / "straight").fingerprint
    )
    moved = [name for name, value in initial.state_dict().items() if not torch.equal(value, one[name])]
    assert len(moved) > 20
    # Four updates of Adam go no further than four times the rate, and decay takes a little.
    assert all((value - one[name]).abs().max() < 0.01 for name, value in initial.state_dict().items())
    saved = read_info(Path(run.data))["fingerprint"]
    assert json.loads((tmp_path / "straight" / "identity.json").read_text())["data"] == saved
