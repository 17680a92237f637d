"""Copies, found on the disk, against what a person would write with a set and two loops."""

from __future__ import annotations

import io
import json
import shutil
from collections import Counter
from collections.abc import Callable
from pathlib import Path

import imagehash
import numpy as np
import pytest
import torch
from PIL import Image, ImageEnhance
from safetensors.torch import load_file, save_file

from dalle_ds.config import ClipConfig
from dalle_ds.data import dedup, reasons
from dalle_ds.data.dedup import close_embeddings, close_hashes, embedded, find_copies, image_model, perceptual_hash
from dalle_ds.data.filters import FilterOptions
from dalle_ds.data.prepare import PrepareOptions, merge_parts, prepare, prepare_part
from dalle_ds.data.processing import Caption, ProcessedPair
from dalle_ds.errors import ConfigError, DataError
from dalle_ds.models.pretrained import WEIGHTS_NAME
from tests.data.test_prepare import all_files

Edit = Callable[[Image.Image], Image.Image]


def first_come(alike: Callable[[int, int], bool], count: int) -> set[int]:
    """Those that are like an earlier one that is kept itself."""
    dropped: set[int] = set()
    for later in range(count):
        if any(alike(later, earlier) for earlier in range(later) if earlier not in dropped):
            dropped.add(later)
    return dropped


@pytest.mark.parametrize("divisions", [1, 7])
def test_pairs_and_captions_against_a_set_and_a_counter(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, divisions: int
) -> None:
    monkeypatch.setattr(dedup, "_BUFFERED", 50)
    monkeypatch.setattr(dedup, "_DIVISIONS", divisions)
    monkeypatch.setattr(dedup, "_CHUNK", 64)
    rng = np.random.default_rng(divisions)
    items = []
    for number in range(600):
        captions = [
            Caption(f"{'A' if rng.random() < 0.5 else 'a'} caption {rng.integers(40)}", problem, False)
            for problem in rng.choice(np.array([None, "bad"]), size=rng.integers(0, 4), p=[0.8, 0.2])
        ]
        problem = "broken" if rng.random() < 0.1 else None
        items.append(ProcessedPair(number, str(number), problem, captions, f"{rng.integers(30):064x}"))
    found, _ = find_copies(items, FilterOptions(max_caption_copies=3), tmp_path / "scratch")

    pairs: set[tuple[str, str]] = set()
    texts: Counter[str] = Counter()
    expected: list[str | None] = []
    for item in items:
        for caption in item.captions:
            reason = None
            if item.problem is None and caption.problem is None:
                if (item.picture, caption.text) in pairs:
                    reason = reasons.DUPLICATE
                elif texts[caption.text.lower()] >= 3:
                    reason = reasons.SAME_CAPTION
                else:
                    texts[caption.text.lower()] += 1
                pairs.add((item.picture, caption.text))
            expected.append(reason)
    assert [dedup.REASONS.get(int(code)) for code in found] == expected
    assert {reasons.DUPLICATE, reasons.SAME_CAPTION, None} == set(expected)


@pytest.mark.parametrize("distance", [0, 1, 3, 6, 10])
def test_hashes_against_two_loops(monkeypatch: pytest.MonkeyPatch, distance: int) -> None:
    monkeypatch.setattr(dedup, "_BLOCK", 16)
    rng = np.random.default_rng(distance)
    values = [int(value) for value in rng.integers(0, 2**63, 60)]
    for _ in range(240):  # copies of copies, up to eight bits away, which makes chains
        flips = rng.choice(64, size=rng.integers(0, 9), replace=False)
        values.append(values[rng.integers(len(values))] ^ sum(1 << int(flip) for flip in flips))
    rng.shuffle(values)
    dropped = close_hashes(np.array(values, dtype=np.uint64), distance)
    expected = first_come(lambda a, b: (values[a] ^ values[b]).bit_count() <= distance, len(values))
    assert dropped.tolist() == sorted(expected) and 20 < len(expected) < 290


def test_embeddings_against_two_loops(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(dedup, "_BLOCK", 32)
    rng = np.random.default_rng(0)
    centres = rng.normal(size=(40, 16))
    vectors = centres[rng.integers(40, size=200)] + rng.normal(size=(200, 16)) * rng.choice([0.05, 0.4], size=(200, 1))
    vectors = (vectors / np.linalg.norm(vectors, axis=1, keepdims=True)).astype(np.float16)
    rows = np.sort(rng.choice(200, 150, replace=False))
    exact = vectors[rows].astype(np.float64)
    expected = first_come(lambda a, b: bool(exact[a] @ exact[b] >= 0.95), len(rows))
    assert close_embeddings(vectors, rows, 0.95).tolist() == rows[sorted(expected)].tolist()
    assert 20 < len(expected) < 130


def photograph(seed: int) -> Image.Image:
    """Something with large and small structure, as photographs have."""
    rng = np.random.default_rng(seed)
    coarse = Image.fromarray(rng.integers(0, 256, (5, 5, 3), dtype=np.uint8)).resize((96, 96), Image.Resampling.BICUBIC)
    fine = Image.fromarray(rng.integers(0, 256, (24, 24, 3), dtype=np.uint8)).resize((96, 96))
    return Image.blend(coarse, fine, 0.2)


def encoded(image: Image.Image, format: str = "PNG", **save: int) -> bytes:
    buffer = io.BytesIO()
    image.save(buffer, format=format, **save)
    return buffer.getvalue()


EDITS: dict[str, Edit] = {
    "smaller": lambda image: image.resize((48, 48), Image.Resampling.LANCZOS),
    "brighter": lambda image: ImageEnhance.Brightness(image).enhance(1.1),
    "jpeg": lambda image: Image.open(io.BytesIO(encoded(image, "JPEG", quality=40))),
}


def test_hashes_are_those_of_imagehash_and_find_edited_pictures() -> None:
    originals = [photograph(seed) for seed in range(12)]
    pictures = originals + [edit(image) for image in originals for edit in EDITS.values()]
    hashes = [perceptual_hash(np.asarray(image.convert("RGB"))) for image in pictures]
    assert hashes[0] == str(imagehash.phash(originals[0]))
    dropped = close_hashes(np.array([int(value, 16) for value in hashes], dtype=np.uint64), 6)
    assert dropped.tolist() == list(range(12, 48))


@pytest.fixture(scope="module")
def copied_corpus(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Twenty images; of the first six an edited copy each, under other captions; and two images with one caption."""
    folder = tmp_path_factory.mktemp("copied")
    for number in range(20):
        (folder / f"{number:02d}.png").write_bytes(encoded(photograph(number)))
        (folder / f"{number:02d}.txt").write_text(f"image {min(number, 18)}")
    for number in range(6):
        edit = list(EDITS.values())[number % 3]
        (folder / f"copy{number}.png").write_bytes(encoded(edit(photograph(number))))
        (folder / f"copy{number}.txt").write_text(f"copy {number}")
    return folder


@pytest.fixture(scope="module")
def clip(tmp_path_factory: pytest.TempPathFactory) -> str:
    """One that has not learnt anything: a random projection of pixels, which is enough to tell copies."""
    from dalle_ds.models import Clip

    torch.manual_seed(0)
    folder = tmp_path_factory.mktemp("clip") / "export"
    shape = ClipConfig(
        embed_dim=64,
        image_size=32,
        patch_size=8,
        vision_width=64,
        vision_depth=1,
        vision_heads=1,
        text_width=16,
        text_depth=1,
        text_heads=1,
        text_len=8,
        text_vocab=16,
        start_token=14,
        end_token=15,
    )
    Clip(shape).save_pretrained(folder)
    return str(folder)


COPIES = [f"copy{number}.png" for number in range(5)]


def test_like_pictures_are_dropped_alike_in_one_go_and_in_parts(copied_corpus: Path, tmp_path: Path) -> None:
    filters = FilterOptions(max_hash_distance=6, max_caption_copies=1)
    options = PrepareOptions(corpus="folder", source=str(copied_corpus), validation=0.2, filters=filters)
    report = prepare(options, str(tmp_path / "whole"), workers=2)
    assert report.dropped[reasons.LIKE_IMAGE].count == 6 and report.dropped[reasons.LIKE_IMAGE].examples == COPIES
    assert report.dropped[reasons.SAME_CAPTION].examples == ["19.png"]
    assert report.caption_examples == {reasons.SAME_CAPTION: ["image 18"]}
    assert sum(report.kept.values()) == 19
    for shard in range(3):
        prepare_part(options, str(tmp_path / "parts"), shard, 3)
    merge_parts(str(tmp_path / "parts"))
    assert all_files(tmp_path / "parts") == all_files(tmp_path / "whole")


def test_close_pictures_are_dropped_alike_in_one_go_and_in_parts(clip: str, tmp_path: Path) -> None:
    corpus = tmp_path / "corpus"
    corpus.mkdir()
    for number in range(20):
        (corpus / f"{number:02d}.png").write_bytes(encoded(photograph(number)))
        (corpus / f"{number:02d}.txt").write_text(f"image {number}")
        if number < 6:  # the same pixels in another file
            (corpus / f"copy{number}.bmp").write_bytes(encoded(photograph(number), "BMP"))
            (corpus / f"copy{number}.txt").write_text(f"copy {number}")
    filters = FilterOptions(duplicate_model=clip, duplicate_cosine=0.9996)  # embeddings of a random model are all alike
    options = PrepareOptions(corpus="folder", source=str(corpus), filters=filters)
    report = prepare(options, str(tmp_path / "whole"))
    assert report.dropped[reasons.CLOSE_IMAGE].examples == [f"copy{number}.bmp" for number in range(5)]
    assert report.dropped[reasons.CLOSE_IMAGE].count == 6 and sum(report.kept.values()) == 20
    for shard in range(3):
        prepare_part(options, str(tmp_path / "parts"), shard, 3)
    merge_parts(str(tmp_path / "parts"))
    assert all_files(tmp_path / "parts") == all_files(tmp_path / "whole")


def test_embeddings_do_not_depend_on_who_is_beside_them(copied_corpus: Path, clip: str) -> None:
    model = image_model(clip)
    items = [
        ProcessedPair(0, path.name, None, [], image=b"" if number % 5 == 2 else path.read_bytes())
        for number, path in enumerate((sorted(copied_corpus.glob("*.png")) * 2)[:36])
    ]
    together = list(embedded(items, model))
    alone = [next(iter(embedded([item], model))) for item in items[::6]]
    assert together[::6] == alone
    assert [bool(item.embedding) for item in together] == [bool(item.image) for item in items]


def test_a_model_of_another_kind_is_refused(dvae_export: Path) -> None:
    with pytest.raises(ConfigError, match="is a dvae: give a CLIP"):
        image_model(str(dvae_export))


def test_another_model_under_the_same_name_is_another_preparation(
    copied_corpus: Path, clip: str, tmp_path: Path
) -> None:
    model = tmp_path / "clip"
    shutil.copytree(clip, model)
    filters = FilterOptions(duplicate_model=str(model), duplicate_cosine=1.0)
    options = PrepareOptions(corpus="folder", source=str(copied_corpus), filters=filters)
    prepare(options, str(tmp_path / "data"))
    assert prepare(options, str(tmp_path / "data")).already_there
    weights = load_file(model / WEIGHTS_NAME)
    save_file({name: weight + 1 for name, weight in weights.items()}, model / WEIGHTS_NAME)
    with pytest.raises(DataError, match=r"another preparation \(different: files\)"):
        prepare(options, str(tmp_path / "data"))


def test_a_preparation_of_when_there_were_more_filters_is_the_same_if_they_were_not_used(
    copied_corpus: Path, tmp_path: Path
) -> None:
    options = PrepareOptions(corpus="folder", source=str(copied_corpus))
    prepare(options, str(tmp_path / "data"))
    info = json.loads((tmp_path / "data" / "info.json").read_text())
    for block, there in ((None, True), ("words.txt", False)):
        info["options"]["filters"]["block"] = block
        (tmp_path / "data" / "info.json").write_text(json.dumps(info))
        if there:
            assert prepare(options, str(tmp_path / "data")).already_there
        else:
            with pytest.raises(DataError, match=r"another preparation \(different: filters\)"):
                prepare(options, str(tmp_path / "data"))
