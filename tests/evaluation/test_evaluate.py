"""Whole evaluations of tiny models, in one process and in several."""

from __future__ import annotations

import json
import math
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from torch import Tensor, nn
from torch.nn.functional import cross_entropy

from dalle_ds.config import PADDING
from dalle_ds.data import PairDataset
from dalle_ds.data.filters import FilterOptions
from dalle_ds.data.prepare import PrepareOptions, prepare
from dalle_ds.errors import CheckpointError, ConfigError, DataError
from dalle_ds.evaluation import evaluate as evaluate_module
from dalle_ds.evaluation import measure, results
from dalle_ds.evaluation.evaluate import EvaluateOptions, evaluate
from dalle_ds.evaluation.features import FeatureNetwork
from dalle_ds.evaluation.frechet import (
    Moments,
    Predictions,
    frechet_distance,
    inception_score,
    split_count,
    split_of_rows,
)
from dalle_ds.evaluation.metrics import pixel_nats
from dalle_ds.evaluation.results import Result, compare, compare_command
from dalle_ds.evaluation.sets import choose_captions, images_of
from dalle_ds.models import Clip, DiscreteVAE
from dalle_ds.parallel import Mesh
from dalle_ds.precision import choice
from dalle_ds.sampling import TextToImage
from dalle_ds.sampling.prior import PriorSampling
from tests.processes import run_ranks
from tests.references import reference

ALONE = Mesh(0, 1, torch.device("cpu"))


class Colours(nn.Module):
    """A network whose features are means of colours, and whose classes are red, green and blue."""

    def forward(self, pixels: Tensor) -> tuple[Tensor, Tensor]:
        means = pixels.float().mean(dim=(2, 3)) / 255
        return torch.cat([means, means.square()], dim=1), 50 * means


NETWORK = FeatureNetwork("colours", "00", "colour_distance", "colour_score", Colours())


@pytest.fixture
def quick(monkeypatch: pytest.MonkeyPatch) -> None:
    """Features that take no time, and no curves, which take seconds."""
    monkeypatch.setattr(results, "best_of_curves", lambda _: "")
    monkeypatch.setattr(evaluate_module, "load_network", lambda *_: NETWORK)


@pytest.fixture
def options(
    data: Path, dvae_export: Path, transformer_export: Path, clip_exports: tuple[Path, Path], tmp_path: Path
) -> EvaluateOptions:
    """Of all parts."""
    return EvaluateOptions(
        out=str(tmp_path / "out"),
        data=str(data),
        transformer=str(transformer_export),
        dvae=str(dvae_export),
        clip=str(clip_exports[0]),
        judge=str(clip_exports[1]),
        captions=7,
        best_of="1,3",
        blur="0,2",
        device="cpu",
        dtype="fp32",
    )


def test_all_parts_are_measured_and_written(options: EvaluateOptions, quick: None) -> None:
    result = evaluate(options, ALONE)
    out = Path(options.out)
    assert Result.load(out / "result.json") == result
    assert {path.name for path in out.iterdir()} == {
        *("result.json", "evaluation.html", "captions.jsonl"),
        *("codebook.png", "reconstructions.png", "pictures.png"),
    }
    groups = {name.split("/")[0] for name in result.metrics}
    assert groups == {"reconstruction", "codebook", "likelihood", "real", "best_of_1", "best_of_3"}
    assert all(np.isfinite(value) for value in result.metrics.values())
    assert result.metrics["codebook/used"] + result.metrics["codebook/dead"] == 32
    assert result.metrics["best_of_3/reranker_score"] > result.metrics["best_of_1/reranker_score"]
    assert result.notes == []
    lines = [json.loads(line) for line in (out / "captions.jsonl").read_text().splitlines()]
    chosen = choose_captions(PairDataset.open(str(options.data), "validation"), 7, 0)
    assert [(line["caption"], line["row"]) for line in lines] == [(caption.text, caption.row) for caption in chosen]
    assert all(line["best"]["1"] == 0 and 0 <= line["best"]["3"] < 3 for line in lines)


def test_the_protocol_says_how_the_set_was_filtered(
    options: EvaluateOptions, quick: None, corpus: Path, tmp_path: Path
) -> None:
    def measured(data: Path) -> Result:
        only = replace(options, data=str(data), split="train", transformer=None, clip=None, judge=None)
        return evaluate(only, ALONE)

    def prepared(name: str, **filters: Any) -> Path:
        out = tmp_path / name
        prepare(PrepareOptions("folder", str(corpus), validation=0, filters=FilterOptions(**filters)), str(out))
        return out

    whole = measured(prepared("whole", none=True))
    assert whole.protocol["set"]["filters"] == "none" and whole.protocol["set"]["dropped"] == "none"
    fewer = measured(prepared("fewer", min_caption_chars=16)).protocol["set"]
    assert fewer["filters"]["max_aspect_ratio"] == 2.0 and fewer["filters"]["min_caption_chars"] == 16
    assert fewer["rows"] + sum(fewer["dropped"].values()) == whole.protocol["set"]["rows"]
    # An older preparation, and one with the same rows and other filters.
    old = prepared("old", none=True)
    info = json.loads((old / "info.json").read_text())
    del info["dropped"]
    (old / "info.json").write_text(json.dumps(info))
    unknown = measured(old)
    assert unknown.protocol["set"] == {**whole.protocol["set"], "filters": "unknown", "dropped": "unknown"}
    with pytest.raises(ConfigError, match=r"set\.filters"):
        compare(whole, unknown)


def test_figures_are_those_computed_by_hand(options: EvaluateOptions, quick: None) -> None:
    """From images that the public interface draws, by torch-fidelity's formulas, without a blur."""
    options = replace(options, best_of="3", blur="0")
    result = evaluate(options, ALONE)
    dataset = PairDataset.open(str(options.data), "validation")
    captions = [caption.text for caption in choose_captions(dataset, 7, 0)]
    pipeline = TextToImage.from_pretrained(str(options.transformer))
    clip, judge = Clip.from_pretrained(str(options.clip)), Clip.from_pretrained(str(options.judge))

    def pixels(pictures: list[Image.Image]) -> Tensor:
        return torch.stack([torch.tensor(np.asarray(picture)) for picture in pictures]).permute(0, 3, 1, 2)

    drawn = pipeline.generate(captions, num=3)
    best = []
    for caption, candidates in zip(captions, drawn, strict=True):
        scores = clip.embed_images(pixels(candidates) / 255) @ clip.embed_texts([caption])[0]
        best.append(candidates[int(scores.argmax())])
    fake, real = pixels(best), images_of(dataset, range(len(dataset)), 16)
    fid, isc = reference("torch_fidelity.metric_fid"), reference("torch_fidelity.metric_isc")
    statistics = [fid.fid_features_to_statistics(NETWORK(each)[0].double()) for each in (real, fake)]
    distance = fid.fid_statistics_to_metric(*statistics, verbose=False)["frechet_inception_distance"]
    assert result.metrics["best_of_3/colour_distance/blur_0"] == pytest.approx(distance, rel=1e-4)
    score = isc.isc_features_to_metric(NETWORK(fake)[1], 3, True, 2020)["inception_score_mean"]
    assert result.metrics["best_of_3/colour_score/blur_0"] == pytest.approx(score, rel=1e-6)
    assert score > 1.0001  # or any score would do
    cosines = (judge.embed_images(fake / 255) * judge.embed_texts(captions)).sum(dim=1)
    assert result.metrics["best_of_3/clip_score"] == pytest.approx(100 * float(cosines.clamp_min(0).mean()), rel=1e-4)
    vae = DiscreteVAE.from_pretrained(str(options.dvae))
    restored = (vae.decode(vae.encode(real / 255)) * 255).round().byte()
    statistics = [fid.fid_features_to_statistics(NETWORK(each)[0].double()) for each in (real, restored)]
    distance = fid.fid_statistics_to_metric(*statistics, verbose=False)["frechet_inception_distance"]
    assert result.metrics["reconstruction/colour_distance/blur_0"] == pytest.approx(distance, rel=1e-4)


def test_likelihoods_and_what_real_pictures_reach_are_those_computed_by_hand(
    options: EvaluateOptions, quick: None
) -> None:
    """And the generated images' distance from the captions' own images only."""
    options = replace(options, dvae=None, best_of="1", blur="0", reference="captions")
    found = evaluate(options, ALONE).metrics
    dataset = PairDataset.open(str(options.data), "validation")
    pipeline, judge = TextToImage.from_pretrained(str(options.transformer)), Clip.from_pretrained(str(options.judge))
    pixels = images_of(dataset, range(len(dataset)), 16)
    codes = pipeline.dvae.encode(pixels / 255)
    nats, counts = torch.zeros(3, dtype=torch.float64), torch.zeros(2)
    for row in range(len(dataset)):
        text, image = pipeline.encode(dataset.captions(row)[:1]), codes[row].view(1, -1)
        with torch.no_grad():
            output = pipeline.model(text, image)
        read = int((text != PADDING).sum())
        nats[0] += cross_entropy(output.text_logits[0, :read], text[0, :read], reduction="sum")
        nats[1] += cross_entropy(output.image_logits[0], image[0], reduction="sum")
        counts += torch.tensor([read, image.numel()])
    nats[2] = pixel_nats(pipeline.dvae, pixels, codes).sum()
    assert found["likelihood/text_nats_per_token"] == pytest.approx(float(nats[0] / counts[0]), rel=1e-5)
    assert found["likelihood/image_nats_per_token"] == pytest.approx(float(nats[1] / counts[1]), rel=1e-5)
    of_codes, of_pixels = (nats[1:] / (pixels.numel() * math.log(2))).tolist()
    assert found["likelihood/codes_bits_per_dimension"] == pytest.approx(of_codes, rel=1e-5)
    assert found["likelihood/pixels_bits_per_dimension"] == pytest.approx(of_pixels, rel=1e-5)
    assert found["likelihood/bits_per_dimension"] == pytest.approx(of_codes + of_pixels, rel=1e-5)

    captions = choose_captions(dataset, 7, 0)
    own = pixels[[caption.row for caption in captions]]
    texts, images = judge.embed_texts([caption.text for caption in captions]), judge.embed_images(own / 255)
    cosines = texts.double() @ images.double().T
    first = [row.argmax() == index for index, row in enumerate(cosines)]
    assert found["real/retrieval_at_1"] == pytest.approx(sum(map(float, first)) / 7)
    assert found["real/clip_score"] == pytest.approx(100 * float(cosines.diag().clamp_min(0).mean()), rel=1e-5)

    drawn = pipeline.generate([caption.text for caption in captions], num=1)
    fake = torch.stack([torch.tensor(np.asarray(picture)) for (picture,) in drawn]).permute(0, 3, 1, 2)
    distance = frechet_distance(*(Moments.of(NETWORK(each)[0]) for each in (own, fake)))
    assert found["best_of_1/colour_distance/blur_0"] == pytest.approx(distance, rel=1e-6)


def test_a_reranker_that_judges_itself_is_told(options: EvaluateOptions, quick: None) -> None:
    result = evaluate(replace(options, judge=None, dvae=None, captions=4), ALONE)
    assert len(result.notes) == 1 and "--judge" in result.notes[0]
    assert result.protocol["judge"] == result.protocol["reranker"]


def test_kept_pictures_give_the_same_figures(
    options: EvaluateOptions, quick: None, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    options = replace(options, dvae=None, captions=5, pictures=str(tmp_path / "kept"))
    first = evaluate(options, ALONE)

    def never(*_: object, **__: object) -> None:
        raise AssertionError("it was drawn before")

    monkeypatch.setattr("dalle_ds.evaluation.candidates.sample_codes", never)
    # In their precision, where the device would take another.
    monkeypatch.setattr(choice, "choose", lambda _: choice.Choice("bf16", "measured"))
    again = evaluate(replace(options, dtype="auto"), ALONE)
    assert again.metrics == first.metrics and again.protocol["generation"]["dtype"] == "fp32"


def test_without_the_overlap_is_as_if_its_rows_were_not_there(
    options: EvaluateOptions, quick: None, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    dataset = PairDataset.open(str(options.data), "validation")
    overlapping = [caption.row for caption in choose_captions(dataset, 7, 0)[:3]]
    listed = tmp_path / "overlap.json"
    listed.write_text(json.dumps({"split": "validation", "fingerprint": dataset.fingerprint, "rows": overlapping}))
    both = evaluate(replace(options, without=str(listed)), ALONE)
    assert compare(both, evaluate(options, ALONE), allow=["without"]).keys() >= {"reconstruction/psnr"}

    class Fewer:
        """The split without these rows."""

        def __init__(self, whole: PairDataset) -> None:
            self.whole = whole
            self.rows = [row for row in range(len(whole)) if row not in overlapping]
            self.split, self.fingerprint = whole.split, whole.fingerprint

        @classmethod
        def open(cls, folder: str, split: str) -> Fewer:
            return cls(PairDataset.open(folder, split))

        def __len__(self) -> int:
            return len(self.rows)

        def captions(self, row: int) -> list[str]:
            return self.whole.captions(self.rows[row])

        def image(self, row: int, short_side: int | None = None) -> np.ndarray:
            return self.whole.image(self.rows[row], short_side)

    kept = [caption.text for caption in choose_captions(dataset, 7, 0)[3:]]
    monkeypatch.setattr(evaluate_module, "PairDataset", Fewer)
    monkeypatch.setattr(
        evaluate_module,
        "choose_captions",
        lambda fewer, *_: [
            next(caption for caption in choose_captions(fewer, None, 0) if caption.text == text) for text in kept
        ],
    )
    fewer = evaluate(options, ALONE)
    found = {name.removeprefix("without_overlap/"): v for name, v in both.metrics.items() if name.startswith("without")}
    assert found.keys() == fewer.metrics.keys()
    for name, value in fewer.metrics.items():
        assert found[name] == pytest.approx(value, rel=1e-5), name


def save_all(folder: Path, pictures: list[tuple[int, int, int]]) -> str:
    """A folder of plain images."""
    folder.mkdir()
    for number, colour in enumerate(pictures):
        Image.new("RGB", (8, 8), colour).save(folder / f"{number}.png")
    return str(folder)


RED, GREEN, BLUE = (255, 0, 0), (0, 255, 0), (0, 0, 255)


def test_the_score_is_of_the_generated_pictures(tmp_path: Path, quick: None) -> None:
    various = save_all(tmp_path / "various", [RED, GREEN, BLUE] * 20)
    alike = save_all(tmp_path / "alike", [RED] * 30)
    scores = {}
    for name, real, fake in (("various", alike, various), ("alike", various, alike)):
        result = evaluate(EvaluateOptions(out=str(tmp_path / name), real=real, fake=fake, device="cpu"), ALONE)
        scores[name] = result.metrics["colour_score/blur_0"]
    # Ten splits of six images have fewer than three kinds now and then.
    assert scores["alike"] == pytest.approx(1) and 2 < scores["various"] < 3


def test_the_score_is_of_drawn_pictures_too(
    options: EvaluateOptions, quick: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(measure, "generated_pixels", lambda pipeline, codes, size: _plain(len(codes), size))
    dataset = PairDataset.open(str(options.data), "validation")
    rows = [caption.row for caption in choose_captions(dataset, 5, 0)]
    of_real = Predictions.of(NETWORK(images_of(dataset, rows, 16))[1], split_of_rows(5), split_count(5))
    assert inception_score(of_real) > 1.0001
    result = evaluate(replace(options, dvae=None, best_of="1", captions=5), ALONE)
    assert result.metrics["best_of_1/colour_score/blur_0"] == pytest.approx(1)
    assert not any("score/blur" in name for name in result.metrics if not name.startswith("best_of"))


def _plain(count: int, size: int) -> Tensor:
    """Red images."""
    pixels = torch.zeros(count, 3, size, size, dtype=torch.uint8)
    pixels[:, 0] = 255
    return pixels


def test_equal_folders_have_no_distance_and_name_their_pictures(tmp_path: Path, quick: None) -> None:
    colours = [(20 * i, 250 - 10 * i, 7 * i) for i in range(12)]
    one, other = save_all(tmp_path / "one", colours), save_all(tmp_path / "other", colours)
    result = evaluate(EvaluateOptions(out=str(tmp_path / "out"), real=one, fake=other, device="cpu"), ALONE)
    assert abs(result.metrics["colour_distance/blur_0"]) < 1e-7
    assert result.models["pictures"] == result.protocol["set"]["fingerprint"]


def test_folders_of_several_sizes_need_one(tmp_path: Path, quick: None) -> None:
    one, other = save_all(tmp_path / "one", [RED, BLUE]), save_all(tmp_path / "other", [RED, GREEN])
    Image.new("RGB", (9, 8)).save(tmp_path / "other" / "0.png")
    options = EvaluateOptions(out=str(tmp_path / "out"), real=one, fake=other, device="cpu")
    with pytest.raises(ConfigError, match="sides of 8, 9 pixels: say with --size"):
        evaluate(options, ALONE)
    assert evaluate(replace(options, size=8), ALONE).protocol["pictures"]["size"] == 8
    (tmp_path / "other" / "1.png").write_bytes(b"no picture")
    with pytest.raises(DataError, match=r"1\.png"):
        evaluate(replace(options, size=8), ALONE)


@pytest.mark.parametrize(
    ("fields", "words"),
    [
        ({}, "nothing to measure on"),
        ({"data": "d"}, "nothing to measure: give --transformer"),
        ({"data": "d", "transformer": "t", "best_of": "1,8"}, "needs a model that chooses"),
        ({"data": "d", "transformer": "t", "best_of": "1,x"}, "numbers with commas"),
        ({"data": "d", "transformer": "t", "best_of": "0"}, "at least 1"),
        ({"data": "d", "dvae": "t", "blur": "-1"}, "0 or greater"),
        ({"data": "d", "dvae": "t", "blur": ""}, "0 or greater"),
        ({"data": "d", "dvae": "t", "captions": 0}, "captions must be greater than 0"),
        ({"real": "r"}, "belong together"),
        ({"real": "r", "fake": "f", "dvae": "d"}, "leave --data and the models out"),
    ],
)
def test_options_that_ask_for_nothing_are_refused(fields: dict[str, object], words: str) -> None:
    with pytest.raises(ConfigError, match=words):
        EvaluateOptions(out="o", **fields)  # type: ignore[arg-type]


def test_a_dvae_is_no_transformer(options: EvaluateOptions) -> None:
    with pytest.raises(CheckpointError, match="'dvae' model"):
        evaluate(replace(options, transformer=options.dvae), ALONE)


def test_one_caption_is_too_few_and_nothing_is_drawn(
    options: EvaluateOptions, quick: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delattr("dalle_ds.evaluation.candidates.sample_codes")
    with pytest.raises(DataError, match="there are 1 captions"):
        evaluate(replace(options, captions=1), ALONE)


def test_a_folder_that_cannot_be_made_is_told_before_anything_is_measured(
    options: EvaluateOptions, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delattr(evaluate_module, "_evaluate_models")
    (tmp_path / "file").touch()
    for out in ("file", "file/below"):
        with pytest.raises(ConfigError, match=f"{out} must be a folder"):
            evaluate(replace(options, out=str(tmp_path / out)), ALONE)


@pytest.mark.launch
def test_two_processes_find_the_same_and_results_are_compared(
    options: EvaluateOptions,
    embedded: Path,
    prior_exports: dict[str, Path],
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    """By the launcher, with the real feature network."""
    # What `auto` takes is measured, and may differ between launches.
    options = replace(options, captions=6, best_of="1,2", blur="0", split="validation", dtype="fp32")
    prior = prior_exports["diffusion"]
    options = replace(options, data=str(embedded), prior=str(prior), prior_sampling=PriorSampling("ddpm", "4"))
    command = ["--out", str(tmp_path / "two"), "--prior_sampling.method", "ddpm", "--prior_sampling.steps", "4"]
    models = ("transformer", "dvae", "clip", "judge", "prior")
    for name in ("data", *models, "captions", "best_of", "blur", "device", "dtype"):
        command += [f"--{name}", str(getattr(options, name))]
    done = run_ranks("launchers/evaluate.py", *command, processes=2)
    assert done.returncode == 0, done.stderr[-3000:]
    one, two = evaluate(options, ALONE), Result.load(tmp_path / "two" / "result.json")
    figures = compare(one, two)
    assert figures.keys() == one.metrics.keys() and "best_of_2/efficientnet_frechet/blur_0" in figures
    assert "prior/nearest_caption/cosine" in figures
    for name, (first, second) in figures.items():
        assert first == pytest.approx(second, rel=1e-6, abs=1e-9), name
    assert not any("fid" in name or "inception" in name for name in figures)
    results = [str(Path(options.out) / "result.json"), str(tmp_path / "two" / "result.json")]
    compare_command(results)
    told = capsys.readouterr().out
    assert "transformer: the same" in told and "codebook/perplexity" in told
    content = json.loads(Path(results[1]).read_text())
    content["protocol"]["captions"]["number"] = 5
    Path(results[1]).write_text(json.dumps(content))
    with pytest.raises(ConfigError, match=r"captions\.number: 6 and 5"):
        compare_command(results)
    compare_command([*results, "--allow", "captions.number"])
