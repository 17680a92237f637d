"""Preparation: what is kept, where it goes, and that a folder is never half there."""

from __future__ import annotations

import errno
import io
import itertools
import json
import shutil
from collections import defaultdict
from collections.abc import Iterator
from pathlib import Path

import datasets
import numpy as np
import pytest
from PIL import Image
from rich.console import Console

from dalle_ds.data import corpora, reasons, store_writer
from dalle_ds.data import prepare as prepare_module
from dalle_ds.data.corpora import Corpus, RawPair, Unit
from dalle_ds.data.dataset import PairDataset
from dalle_ds.data.filters import FilterOptions
from dalle_ds.data.prepare import PrepareOptions, prepare
from dalle_ds.data.splits import compositional_holdout, unit_hash
from dalle_ds.errors import ConfigError, DataError
from tests.data.conftest import picture_bytes


def options_for(corpus: Path, **changes) -> PrepareOptions:
    return PrepareOptions(corpus="folder", source=str(corpus), **changes)


def contents(out: Path) -> dict[str, list[dict]]:
    """Split → rows, read by `datasets` itself."""
    splits = json.loads((out / "info.json").read_text())["splits"]
    return {split: list(datasets.load_from_disk(str(out / split))) for split in splits}


def all_files(folder: Path) -> dict[str, bytes]:
    return {str(path.relative_to(folder)): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


# --- the result -----------------------------------------------------------------------------------------------------


def test_every_pair_is_kept_once_with_its_bytes(prepared: Path, folder_corpus: Path) -> None:
    splits = contents(prepared)
    assert 1 <= len(splits["validation"]) <= 15
    rows = [row for split in splits.values() for row in split]
    assert sorted(row["name"] for row in rows) == [f"{number:02d}.png" for number in range(30)]
    for row in rows:
        number = int(row["name"][:2])
        assert row["image"] == (folder_corpus / row["name"]).read_bytes()
        assert row["captions"] == [f"image number {number}", f"another caption of {number}"]


def test_workers_and_repetition_change_nothing(folder_corpus: Path, prepared: Path, tmp_path: Path) -> None:
    out = tmp_path / "data"
    prepare(options_for(folder_corpus, validation=0.2), str(out), workers=2)
    assert all_files(out) == all_files(prepared)


def test_seed_chooses_the_split_and_the_fingerprint_tells(folder_corpus: Path, prepared: Path, tmp_path: Path) -> None:
    report = prepare(options_for(folder_corpus, validation=0.2, seed=1), str(tmp_path / "data"))
    validation = {row["name"] for row in contents(tmp_path / "data")["validation"]}
    assert validation != {row["name"] for row in contents(prepared)["validation"]}
    assert report.fingerprint != json.loads((prepared / "info.json").read_text())["fingerprint"]


def test_files_and_batches_are_all_read_back(monkeypatch, folder_corpus: Path, prepared: Path, tmp_path: Path) -> None:
    monkeypatch.setattr(store_writer, "_FILE_BYTES", 4_000)
    monkeypatch.setattr(store_writer, "_BATCH_ROWS", 2)
    out = tmp_path / "data"
    prepare(options_for(folder_corpus, validation=0.2), str(out))
    assert len(list((out / "train").glob("*.arrow"))) > 2
    assert contents(out) == contents(prepared)
    names = [row["name"] for row in contents(out)["train"]]
    dataset = PairDataset.open(out, "train")
    assert [dataset.name(row) for row in range(len(dataset))] == names
    assert dataset.fingerprint == PairDataset.open(prepared, "train").fingerprint


def test_fingerprint_depends_on_every_letter_and_pixel(folder_corpus: Path, prepared: Path, tmp_path: Path) -> None:
    def fingerprint(name: str, content: bytes) -> str:
        shutil.copytree(folder_corpus, tmp_path / name)
        (tmp_path / name / name).write_bytes(content)
        return prepare(options_for(tmp_path / name, validation=0.2), str(tmp_path / f"{name}.data")).fingerprint

    caption = (folder_corpus / "07.txt").read_bytes()
    fingerprints = {
        PairDataset.open(prepared, "train").fingerprint,
        fingerprint("07.txt", caption.replace(b"7", b"8")),
        fingerprint("08.png", picture_bytes(99, (48, 40))),
    }
    assert len(fingerprints) == 3


@pytest.mark.parametrize("fraction", [0.0, 0.05, 0.5])
def test_share_of_validation(fraction: float) -> None:
    share = np.mean([unit_hash(3, f"group {number}") < fraction for number in range(20_000)])
    assert abs(share - fraction) < 0.012


def test_equal_pictures_never_straddle_the_split(tmp_path: Path) -> None:
    corpus, out = tmp_path / "corpus", tmp_path / "data"
    corpus.mkdir()
    for number in range(60):
        (corpus / f"{number}.png").write_bytes(picture_bytes(number % 20))
        (corpus / f"{number}.txt").write_text(f"caption {number}")
    prepare(options_for(corpus, validation=0.3), str(out))
    places = defaultdict(set)
    for split, rows in contents(out).items():
        for row in rows:
            places[row["image"]].add(split)
    assert len(places) == 20
    assert all(len(splits) == 1 for splits in places.values())
    assert {"train", "validation"} == set.union(*places.values())


@pytest.mark.parametrize("seed", range(6))
def test_validation_gets_a_whole_group_even_of_a_few_pictures(tmp_path: Path, seed: int) -> None:
    corpus, out = tmp_path / "corpus", tmp_path / "data"
    corpus.mkdir()
    for number in range(12):
        (corpus / f"{number:02d}.png").write_bytes(picture_bytes(number % 4))
        (corpus / f"{number:02d}.txt").write_text(f"caption {number}")
    prepare(options_for(corpus, validation=1e-6, seed=seed), str(out))
    splits = contents(out)
    assert (len(splits["train"]), len(splits["validation"])) == (9, 3)
    groups = {row["group"] for rows in splits.values() for row in rows}
    assert {row["group"] for row in splits["validation"]} == {min(groups, key=lambda group: unit_hash(seed, group))}


def test_no_validation_when_none_is_asked_for_or_possible(tmp_path: Path) -> None:
    corpus = tmp_path / "corpus"
    corpus.mkdir()
    for number in range(3):
        (corpus / f"{number}.png").write_bytes(picture_bytes(0))
        (corpus / f"{number}.txt").write_text(f"caption {number}")
    report = prepare(options_for(corpus, validation=0.4), str(tmp_path / "one_group"))
    assert sorted(report.kept.values()) == [0, 3]
    if report.kept["validation"] == 0:
        assert "validation split is empty" in report.notes[0]
    report = prepare(options_for(corpus, validation=0.0), str(tmp_path / "none"))
    assert report.kept == {"train": 3, "validation": 0} and not report.notes


# --- Twemoji --------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def emoji_splits(tmp_path_factory: pytest.TempPathFactory) -> dict[str, list[dict]]:
    out = tmp_path_factory.mktemp("emoji") / "data"
    report = prepare(PrepareOptions(corpus="twemoji"), str(out))
    assert not report.dropped
    assert "CC-BY" in report.notes[0]
    return contents(out)


def test_twemoji_is_kept_whole(emoji_splits: dict[str, list[dict]]) -> None:
    assert sum(map(len, emoji_splits.values())) == 3953
    assert 120 < len(emoji_splits["validation"]) < 280
    assert 60 < len(emoji_splits["compositional"]) <= 0.05 * 2030


def test_no_base_emoji_is_in_train_and_validation(emoji_splits: dict[str, list[dict]]) -> None:
    groups = {split: {row["group"] for row in rows} for split, rows in emoji_splits.items()}
    assert not groups["train"] & groups["validation"]
    assert not groups["compositional"] & groups["validation"]


def test_held_out_combinations_are_new_but_their_parts_are_not(emoji_splits: dict[str, list[dict]]) -> None:
    def parts(row: dict) -> tuple[str, str]:
        points = row["name"].split("-")
        tones = [point for point in points if point in ("1f3fb", "1f3fc", "1f3fd", "1f3fe", "1f3ff")]
        return "-".join(point for point in points if point not in tones), "-".join(tones)

    seen = [parts(row) for row in emoji_splits["train"]]
    for row in emoji_splits["compositional"]:
        base, tone = parts(row)
        assert tone
        assert (base, tone) not in seen
        assert any(b == base and t not in ("", tone) for b, t in seen)
        assert any(t == tone and b != base for b, t in seen)


@pytest.mark.parametrize("seed", range(5))
def test_variants_when_no_group_falls_into_validation(seed: int, monkeypatch, tmp_path: Path) -> None:
    def few_emoji() -> Iterator[RawPair]:
        for number, (group, variant) in enumerate(itertools.product("abcde", "1234")):
            yield RawPair(picture_bytes(number), [f"{group} with {variant}"], f"{group}{variant}", group, variant)

    monkeypatch.setattr(corpora, "read_twemoji", lambda: Corpus(lambda: iter([Unit("emoji", few_emoji)])))
    options = PrepareOptions(corpus="twemoji", validation=1e-9, compositional=0.5, seed=seed)
    report = prepare(options, str(tmp_path / "d"))
    splits = {split: {row["name"] for row in rows} for split, rows in contents(tmp_path / "d").items()}
    assert len({name[0] for name in splits["validation"]}) == 1 and len(splits["validation"]) == 4
    assert report.kept == {"train": 8, "validation": 4, "compositional": 8}
    assert {name[0] for name in splits["compositional"]} <= {name[0] for name in splits["train"]}
    assert {name[1] for name in splits["compositional"]} <= {name[1] for name in splits["train"]}


def test_holdout_takes_nothing_whose_parts_would_be_gone() -> None:
    assert compositional_holdout([("a", "1"), ("b", "2")], 0.9, 0) == set()
    grid = [(group, variant) for group in "abcd" for variant in "1234"]
    held_out = compositional_holdout(grid, 0.99, 0)
    kept = set(grid) - held_out
    assert {group for group, _ in kept} == set("abcd") and {variant for _, variant in kept} == set("1234")
    assert len(compositional_holdout(grid, 0.25, 0)) == 4
    assert compositional_holdout(grid, 0.25, 0) != compositional_holdout(grid, 0.25, 1)
    assert compositional_holdout(grid, 0.0, 0) == set()


# --- what people's folders contain ----------------------------------------------------------------------------------


def test_a_folder_of_everything(tmp_path: Path) -> None:
    """Every awkward image and caption is either handled or counted under its reason."""
    corpus, out = tmp_path / "corpus", tmp_path / "data"
    corpus.mkdir()

    def add(name: str, image: bytes | Image.Image, caption: str, format: str = "PNG", **save) -> None:
        if isinstance(image, Image.Image):
            buffer = io.BytesIO()
            image.save(buffer, format=format, **save)
            image = buffer.getvalue()
        (corpus / name).write_bytes(image)
        (corpus / name).with_suffix(".txt").write_text(caption, encoding="utf-8")

    palette = Image.new("P", (20, 20))
    palette.putpalette([255, 0, 0, 0, 0, 255])
    add("cmyk.jpg", Image.new("CMYK", (20, 20), (0, 255, 255, 0)), "red by subtraction", "JPEG")
    add("palette.png", palette, "a palette with alpha", transparency=b"\x80")
    add("sixteen.png", Image.fromarray(np.full((20, 20), 32896, np.uint16)), "a deep grey")
    add("one_pixel.png", Image.new("RGB", (1, 1), "green"), "a single pixel")
    add("forty_megapixels.jpg", picture_bytes(3, (8000, 5000), "JPEG"), "a very large image")
    add("corrupt.png", b"\x89PNG\r\n\x1a\n nothing more", "a broken image")
    add("truncated.jpg", picture_bytes(4, (64, 64), "JPEG")[:-200], "an image cut short")
    add("wide.png", Image.new("RGB", (50, 20)), "a panorama")
    add("empty_caption.png", picture_bytes(5), "  \n \t\n")
    add("no_lines.png", picture_bytes(6), "")
    add("long_caption.png", picture_bytes(7), "word " * 2000)
    add("japanese.png", picture_bytes(8), "猫が座っている")
    add("arabic.png", picture_bytes(9), "قطة على سجادة")
    add("date.png", picture_bytes(10), "Photographed on 4 March 2012\na cat in spring")
    add("only_date.png", picture_bytes(11), "Photographed on 4 March 2012")
    add("twice_a.png", picture_bytes(12), "the same pair")
    add("twice_b.png", picture_bytes(12), "the  same pair\nonly here")
    add("twice_c.png", picture_bytes(12), "the same pair")
    add("same_words.png", picture_bytes(14), "the same pair")
    (corpus / "alone.png").write_bytes(picture_bytes(13))

    options = options_for(corpus, validation=0.0, shrink=512)
    report = prepare(options, str(out))
    assert {reason: entry.examples for reason, entry in report.dropped.items()} == {
        "no caption": ["alone.png", "no_lines.png"],
        "undecodable image": ["corrupt.png", "truncated.jpg"],
        "empty caption": ["empty_caption.png"],
        "boilerplate caption": ["only_date.png"],
        "duplicate": ["twice_c.png"],
        "aspect ratio": ["wide.png"],
    }
    assert report.captions_cut == 1
    assert report.captions_dropped == {"boilerplate caption": 1, "duplicate": 1}
    assert report.read == 20

    dataset = PairDataset.open(out, "train")
    rows = {dataset.name(row): row for row in range(len(dataset))}
    assert len(rows) == 12
    pictures = {name: dataset.image(row) for name, row in rows.items()}
    captions = {name: dataset.captions(row) for name, row in rows.items()}
    assert np.abs(pictures["cmyk.jpg"][10, 10].astype(int) - (255, 0, 0)).max() < 8
    assert pictures["palette.png"][0, 0].tolist() == [255, 127, 127]
    assert pictures["sixteen.png"][0, 0].tolist() == [128, 128, 128]
    assert pictures["one_pixel.png"].tolist() == [[[0, 128, 0]]]
    assert pictures["forty_megapixels.jpg"].shape == (512, 819, 3)
    assert captions["japanese.png"] == ["猫が座っている"] and captions["arabic.png"] == ["قطة على سجادة"]
    assert captions["date.png"] == ["a cat in spring"]
    assert captions["twice_b.png"] == ["only here"]
    assert len(captions["long_caption.png"][0]) == 999


def test_nothing_to_keep_is_an_error_that_says_why(tmp_path: Path) -> None:
    corpus = tmp_path / "corpus"
    corpus.mkdir()
    (corpus / "a.png").write_bytes(b"broken")
    (corpus / "a.txt").write_text("a caption")
    with pytest.raises(DataError, match=r"no pair that can be kept: dropped undecodable image \(1\)"):
        prepare(options_for(corpus), str(tmp_path / "data"))
    assert sorted(path.name for path in tmp_path.iterdir()) == ["corpus"]


def test_names_that_are_not_unicode_are_stored(tmp_path: Path) -> None:
    corpus = tmp_path / "corpus"
    corpus.mkdir()
    (corpus / "caf\udce9.png").write_bytes(picture_bytes(0))
    (corpus / "caf\udce9.txt").write_text("coffee")
    prepare(options_for(corpus, validation=0.0), str(tmp_path / "data"))
    assert PairDataset.open(tmp_path / "data", "train").name(0) == "caf\\udce9.png"


# --- the folder -----------------------------------------------------------------------------------------------------


def test_the_same_preparation_is_left_alone(folder_corpus: Path, prepared: Path) -> None:
    before = all_files(prepared)
    report = prepare(options_for(folder_corpus, validation=0.2), str(prepared))
    assert report.already_there and sum(report.kept.values()) == 30
    assert all_files(prepared) == before


def test_another_preparation_is_refused_unless_told(folder_corpus: Path, prepared: Path, tmp_path: Path) -> None:
    out = tmp_path / "data"
    shutil.copytree(prepared, out)
    other = options_for(folder_corpus, validation=0.2, filters=FilterOptions(min_side=5))
    with pytest.raises(DataError, match=r"another preparation \(different: filters\)"):
        prepare(other, str(out))
    assert all_files(out) == all_files(prepared)
    assert not prepare(other, str(out), overwrite=True).already_there
    assert json.loads((out / "info.json").read_text())["options"]["filters"]["min_side"] == 5
    assert [path.name for path in tmp_path.iterdir()] == ["data"]


def test_strangers_folders_are_never_replaced(folder_corpus: Path, tmp_path: Path) -> None:
    (tmp_path / "thesis.txt").write_text("three years of work")
    with pytest.raises(DataError, match="was not made by prepare_data"):
        prepare(options_for(folder_corpus), str(tmp_path), overwrite=True)
    assert (tmp_path / "thesis.txt").exists()


def test_a_full_disk_is_told_and_what_was_done_is_used_again(
    monkeypatch: pytest.MonkeyPatch, folder_corpus: Path, prepared: Path, tmp_path: Path
) -> None:
    def full(*_args) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    with monkeypatch.context() as patch:
        patch.setattr(store_writer.StoreWriter, "_write_batch", full)
        with pytest.raises(DataError, match=f"no space left on the disk of {tmp_path}/data"):
            prepare(options_for(folder_corpus, validation=0.2), str(tmp_path / "data"))
    assert not list(tmp_path.rglob("*.arrow")) and not (tmp_path / "data").exists()
    prepare(options_for(folder_corpus, validation=0.2), str(tmp_path / "data"))
    assert all_files(tmp_path / "data") == all_files(prepared)
    assert [path.name for path in tmp_path.iterdir()] == ["data"]


def test_an_interruption_leaves_what_the_next_call_goes_on_from(
    monkeypatch: pytest.MonkeyPatch, folder_corpus: Path, prepared: Path, tmp_path: Path
) -> None:
    def interrupted(*_args) -> None:
        raise KeyboardInterrupt

    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(prepare_module, "write_json", interrupted)
        prepare(options_for(folder_corpus, validation=0.2), str(tmp_path / "data"))
    assert [path.name for path in tmp_path.iterdir()] == ["data.parts"]
    with monkeypatch.context() as patch:
        patch.setattr(prepare_module, "process_units", interrupted)  # nothing is looked at again
        prepare(options_for(folder_corpus, validation=0.2), str(tmp_path / "data"))
    assert all_files(tmp_path / "data") == all_files(prepared)
    assert [path.name for path in tmp_path.iterdir()] == ["data"]


def test_what_was_begun_with_other_options_is_not_gone_on_with(
    monkeypatch: pytest.MonkeyPatch, folder_corpus: Path, prepared: Path, tmp_path: Path
) -> None:
    def interrupted(*_args) -> None:
        raise KeyboardInterrupt

    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(prepare_module, "write_json", interrupted)
        prepare(options_for(folder_corpus, validation=0.3), str(tmp_path / "data"))
    with pytest.raises(
        DataError, match=r"is part of another preparation \(different: validation\): give --overwrite True"
    ):
        prepare(options_for(folder_corpus, validation=0.2), str(tmp_path / "data"))
    prepare(options_for(folder_corpus, validation=0.2), str(tmp_path / "data"), overwrite=True)
    assert all_files(tmp_path / "data") == all_files(prepared)


def test_a_folder_of_a_former_version_is_the_same_preparation(
    folder_corpus: Path, prepared: Path, tmp_path: Path
) -> None:
    """Which knew fewer options, and kept no examples of captions."""
    out = Path(shutil.copytree(prepared, tmp_path / "data"))
    info = json.loads((out / "info.json").read_text())
    del info["caption_examples"], info["options"]["pictures"], info["options"]["files"]
    old = (
        "min_caption_chars",
        "max_caption_chars",
        "drop_boilerplate",
        "max_aspect_ratio",
        "min_side",
        "max_megapixels",
    )
    info["options"]["filters"] = {name: info["options"]["filters"][name] for name in old}
    (out / "info.json").write_text(json.dumps(info))
    assert prepare(options_for(folder_corpus, validation=0.2), str(out)).already_there
    paper = options_for(folder_corpus, validation=0.2, filters=FilterOptions(paper=True))
    with pytest.raises(DataError, match=r"another preparation \(different: filters\)"):
        prepare(paper, str(out))


def test_report_shows_counts_reasons_and_examples(tmp_path: Path, folder_corpus: Path) -> None:
    options = options_for(folder_corpus, filters=FilterOptions(min_side=41))
    with pytest.raises(DataError):
        prepare(options, str(tmp_path / "data"))
    report = prepare(
        options_for(folder_corpus, validation=0.0, filters=FilterOptions(max_aspect_ratio=1.5)), str(tmp_path / "data")
    )
    console = Console(record=True, width=120, file=io.StringIO())
    console.print(report)
    text = console.export_text()
    assert "kept: train" in text and "21" in text
    assert "dropped: aspect ratio" in text and "21.png, 22.png" in text and "26.png" not in text


def test_report_shows_captions_where_captions_are_the_reason(tmp_path: Path) -> None:
    corpus = tmp_path / "corpus"
    corpus.mkdir()
    for number in range(8):
        (corpus / f"{number}.png").write_bytes(picture_bytes(number))
        (corpus / f"{number}.txt").write_text(
            f"[b]SALE{number}[/b]" if number < 6 else f"a cat {number}\nSALE{'x' * 200}"
        )
    options = options_for(corpus, validation=0.0, filters=FilterOptions(min_caption_words=2))
    report = prepare(options, str(tmp_path / "data"))
    again = prepare(options, str(tmp_path / "data"))
    assert (
        report.caption_examples
        == again.caption_examples
        == {reasons.TOO_FEW_WORDS: [f"[b]SALE{n}[/b]" for n in range(5)]}
    )
    assert (report.dropped[reasons.TOO_FEW_WORDS].count, report.captions_dropped) == (6, {reasons.TOO_FEW_WORDS: 2})
    console = Console(record=True, width=60, file=io.StringIO())
    console.print(report)
    text = console.export_text()
    assert "dropped: too few" in text and "[b]SALE4[/b]" in text and "SALE5" not in text


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"corpus": "twemoji", "source": "x"}, "embedded"),
        ({"corpus": "folder"}, "needs source"),
        ({"corpus": "webdataset", "source": "x", "image_column": "y"}, "leave out image_column"),
        ({"corpus": "wit", "source": "x"}, "needs images"),
        (
            {"corpus": "folder", "source": "x", "pictures": "y"},
            "--pictures belongs to the corpora conceptual, wit, yfcc",
        ),
        ({"corpus": "yfcc", "source": "x", "pictures": "y", "caption_column": "z"}, "has columns of its own"),
        ({"validation": 1.0}, "validation"),
        ({"shrink": 0}, "shrink"),
    ],
)
def test_options_that_cannot_work(fields: dict, message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        PrepareOptions(**fields)


def test_corpus_has_to_be_given(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="corpus is missing"):
        prepare(PrepareOptions(), str(tmp_path / "data"))
