"""The search for validation images that are in the training data: planted copies are found, and nothing else is lost."""

from __future__ import annotations

import json
import re
import shutil
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import imagehash
import numpy as np
import pytest
import torch
import torch.nn.functional as F
from PIL import Image
from torch import Tensor

from dalle_ds.data import PairDataset
from dalle_ds.data.faults import RowError
from dalle_ds.data.prepare import PrepareOptions, prepare
from dalle_ds.errors import CheckpointError, ConfigError, DataError
from dalle_ds.evaluation import embeddings as embeddings_module
from dalle_ds.evaluation.embeddings import PERCEPTUAL_HASHES, Embeddings, embed_split, hash_bits, nearest
from dalle_ds.evaluation.overlap import OverlapOptions, find_overlap, thumbnail_uri
from dalle_ds.evaluation.sets import without_overlap
from dalle_ds.models import Clip

SIDE = 16
PLANTED = {0: 11, 3: 4, 6: 30}
"""Validation row → the training row that it copies."""
HOSTILE = "</script><script>alert(1)</script> & <b>bold</b>"


class Pixels:
    """An embedder that any test can foresee: the image's pixels, less their mean, at length 1."""

    def __init__(self, name: str = "pixels") -> None:
        self.image_size, self.embed_dim = SIDE, 3 * SIDE**2
        self.fingerprint = name
        self.seen = 0

    def embed(self, images: Tensor) -> Tensor:
        self.seen += len(images)
        flat = images.flatten(1)
        return F.normalize(flat - flat.mean(dim=1, keepdim=True) + 1e-6, dim=1)


def noise(seed: int) -> Image.Image:
    """An image of large random squares: unlike any other, and like itself when compressed."""
    small = np.random.default_rng(seed).integers(0, 256, (6, 6, 3), dtype=np.uint8)
    return Image.fromarray(small).resize((48, 48), Image.Resampling.NEAREST)


def prepared(folder: Path, pictures: dict[str, Image.Image], captions: dict[str, str] | None = None) -> Path:
    """A prepared folder all of whose images are in "train", in this order."""
    source = folder / "source"
    source.mkdir(parents=True)
    for name, picture in pictures.items():
        picture.save(source / f"{name}.png")
        (source / f"{name}.txt").write_text((captions or {}).get(name, f"coloured squares, pattern {name}"))
    options = PrepareOptions(corpus="folder", source=str(source), validation=0.0)
    prepare(options, str(folder / "data"), workers=1, overwrite=False)
    return folder / "data"


@pytest.fixture(scope="module")
def sets(tmp_path_factory: pytest.TempPathFactory) -> SimpleNamespace:
    """40 training images, 8 to look up, of which three are compressed copies; rows are in the order of names."""
    folder = tmp_path_factory.mktemp("overlap")
    train = prepared(folder / "a", {f"{number:03}": noise(number) for number in range(40)})
    copies: dict[str, Image.Image] = {}
    for row in range(8):
        picture = noise(PLANTED.get(row, 1000 + row))
        if row in PLANTED:
            picture.save(folder / "copy.jpg", quality=60)
            picture = Image.open(folder / "copy.jpg")
        copies[f"{row:03}"] = picture
    validation = prepared(folder / "b", copies, {"003": HOSTILE})
    rows = {name: row_numbers(data) for name, data in (("train", train), ("validation", validation))}
    planted = {rows["validation"][copy]: rows["train"][of] for copy, of in PLANTED.items()}
    return SimpleNamespace(train=train, validation=validation, planted=planted, hostile=rows["validation"][3])


def row_numbers(data: Path) -> dict[int, int]:
    """Number in the name → row of the prepared split, which is shuffled."""
    dataset = PairDataset.open(data, "train")
    return {int(re.findall(r"\d{3}", dataset.name(row))[-1]): row for row in range(len(dataset))}


def options(sets: SimpleNamespace, out: Path, **changes: Any) -> OverlapOptions:
    values = {
        "train": str(sets.train),
        "validation": str(sets.validation),
        "split": "train",
        "out": str(out),
    }
    return OverlapOptions(**(values | changes))


def page_content(path: Path) -> Any:
    found = re.findall(r'<script type="application/json" id="content">(.*?)</script>', path.read_text(), re.DOTALL)
    assert len(found) == 1
    return json.loads(found[0])


def test_planted_copies_are_found_and_nothing_else(sets: SimpleNamespace, tmp_path: Path) -> None:
    said: list[str] = []
    found = find_overlap(options(sets, tmp_path, threshold=0.9), Pixels(), said.append)
    assert found.at_or_above(0.9) == sorted(sets.planted)
    assert {int(r): int(n) for r, n in zip(found.rows, found.nearest, strict=True) if r in sets.planted} == sets.planted
    overlap = json.loads((tmp_path / "overlap.json").read_text())
    validation = PairDataset.open(sets.validation, "train")
    assert overlap["rows"] == sorted(sets.planted) and overlap["threshold"] == 0.9
    assert (overlap["split"], overlap["fingerprint"], overlap["of"]) == ("train", validation.fingerprint, 8)
    kept = without_overlap(tmp_path / "overlap.json", validation)  # what launchers/evaluate.py does with the file
    assert kept.tolist() == [row not in sets.planted for row in range(8)]
    lines = [json.loads(line) for line in (tmp_path / "neighbours.jsonl").read_text().splitlines()]
    assert [line["similarity"] for line in lines] == sorted((line["similarity"] for line in lines), reverse=True)
    assert {line["row"]: line["nearest"] for line in lines[:3]} == sets.planted
    assert sorted(line["row"] for line in lines) == list(range(8))
    assert {line["row"]: line["caption"] for line in lines}[sets.hostile] == validation.captions(sets.hostile)[0]
    assert any("3 rows (37.5%) at or above 0.9" in line for line in said)


def test_cosines_of_perceptual_hashes_count_the_bits_that_differ() -> None:
    pictures = [noise(1), noise(2), noise(1).rotate(3)]
    stacked = torch.stack([torch.from_numpy(np.array(picture)) for picture in pictures]).permute(0, 3, 1, 2) / 255
    vectors = hash_bits(stacked).double()
    hashes = [imagehash.phash(picture) for picture in pictures]
    expected = [[1 - (one - other) / 32 for other in hashes] for one in hashes]
    np.testing.assert_allclose(vectors @ vectors.T, expected, atol=1e-6)


def test_without_a_model_perceptual_hashes_find_compressed_copies(sets: SimpleNamespace, tmp_path: Path) -> None:
    found = find_overlap(options(sets, tmp_path, threshold=0.6), say=lambda line: None)
    assert found.at_or_above(0.6) == sorted(sets.planted)
    assert json.loads((tmp_path / "overlap.json").read_text())["detector"] == PERCEPTUAL_HASHES.fingerprint


def test_a_clip_finds_them(sets: SimpleNamespace, clip_exports: tuple[Path, Path], tmp_path: Path) -> None:
    """One that was never trained: its embeddings are close to each other, and those of copies are closest."""
    clip = Clip.from_pretrained(clip_exports[0])
    found = find_overlap(options(sets, tmp_path, clip=str(clip_exports[0])), say=lambda line: None)
    nearest_of = dict(zip(found.rows.tolist(), found.nearest.tolist(), strict=True))
    assert {row: nearest_of[row] for row in sets.planted} == sets.planted
    picture = Image.fromarray(PairDataset.open(sets.validation, "train").image(2))
    vectors = np.fromfile(tmp_path / "embeddings" / "validation" / "vectors.f32", dtype="<f4")
    np.testing.assert_allclose(vectors.reshape(8, -1)[2], clip.embed_images([picture])[0], atol=0.01)  # 8 bits a colour


def test_without_a_threshold_there_is_only_the_page(sets: SimpleNamespace, tmp_path: Path) -> None:
    find_overlap(options(sets, tmp_path, pairs=4), Pixels(), lambda line: None)
    assert {path.name for path in tmp_path.iterdir()} == {"embeddings", "neighbours.jsonl", "pairs.html"}
    content = page_content(tmp_path / "pairs.html")
    assert len(content["pairs"]) == 4 and len(content["rows"]) == 8
    shown = [pair["similarity"] for pair in content["pairs"]]
    assert shown == sorted(shown, reverse=True)
    # Half of them the closest; the others reach down to the least similar.
    assert shown[:2] == sorted(content["similarity"], reverse=True)[:2] and shown[-1] == min(content["similarity"])


def test_a_cosine_at_the_threshold_is_above_it(sets: SimpleNamespace, tmp_path: Path) -> None:
    found = find_overlap(options(sets, tmp_path), Pixels(), lambda line: None)
    row, cosine = int(found.rows[3]), float(found.similarity[3])
    assert row in found.at_or_above(cosine) and row not in found.at_or_above(cosine + 1e-6)


def test_the_page_shows_pairs_near_the_threshold(sets: SimpleNamespace, tmp_path: Path) -> None:
    found = find_overlap(options(sets, tmp_path), Pixels(), lambda line: None)
    near = np.argsort(-found.similarity)[[4, 5]]  # neither the most nor the least similar of 8
    threshold = float(found.similarity[near].mean())
    find_overlap(options(sets, tmp_path, pairs=3, threshold=threshold), Pixels(), lambda line: None)
    content = page_content(tmp_path / "pairs.html")
    assert content["threshold"] == threshold
    assert {pair["row"] for pair in content["pairs"]} >= set(found.rows[near].tolist())


def test_the_page_stands_alone_and_captions_are_text(sets: SimpleNamespace, tmp_path: Path) -> None:
    find_overlap(options(sets, tmp_path, threshold=0.9), Pixels(), lambda line: None)
    text = (tmp_path / "pairs.html").read_text()
    assert "alert(1)" in text and "<script>alert" not in text and "<b>bold" not in text
    assert not re.findall(r'(?:src|href)="(?!data:)', text) and not re.findall("https?:", text)
    assert "default-src 'none'" in text  # nor does a browser fetch or send anything
    content = page_content(tmp_path / "pairs.html")
    captions = {pair["row"]: pair["caption"] for pair in content["pairs"]}
    assert captions[sets.hostile] == PairDataset.open(sets.validation, "train").captions(sets.hostile)[0]
    assert all(uri.startswith("data:image/") for pair in content["pairs"] for uri in pair["pictures"])


@pytest.mark.skipif(shutil.which("node") is None, reason="runs the page's script in Node")
def test_the_page_counts_and_saves_as_the_launcher_does(sets: SimpleNamespace, tmp_path: Path) -> None:
    find_overlap(options(sets, tmp_path, threshold=0.9), Pixels(), lambda line: None)
    content = page_content(tmp_path / "pairs.html")
    first, second, *_, last = content["pairs"]
    marks = {first["row"]: "same", last["row"]: "same", second["row"]: "different"}
    script = re.findall(r'<script>\n"use strict";(.*?)</script>', (tmp_path / "pairs.html").read_text(), re.DOTALL)[0]
    (tmp_path / "given.json").write_text(json.dumps({"content": content, "marks": marks}))
    program = f"""{script}
    const given = JSON.parse(require("fs").readFileSync({json.dumps(str(tmp_path / "given.json"))}, "utf8"));
    const others = {{...given.content, about: {{...given.content.about, train: {{split: "train", fingerprint: "other"}}}}}};
    console.log(JSON.stringify({{judged: judge(given.content, given.marks, 0.9),
      keys: [keyOf(given.content), keyOf(given.content), keyOf(others)], at: share(given.content, {second["similarity"]}),
      safe: safeThreshold(given.content, given.marks), saved: choice(given.content, given.marks, 0.9)}}));"""
    done = subprocess.run(["node", "-e", program], capture_output=True, text=True, check=True)
    result = json.loads(done.stdout)
    assert result["judged"] == {"same": 2, "different": 1, "missed": 1, "falseAlarms": 1}
    assert result["safe"] == last["similarity"]
    assert second["row"] in result["at"]
    assert result["keys"][0] == result["keys"][1] != result["keys"][2]  # marks are not those of other training images
    overlap = json.loads((tmp_path / "overlap.json").read_text())
    assert {name: value for name, value in result["saved"].items() if name != "marks"} == overlap


def test_pictures_that_cannot_be_read_are_left_out(
    sets: SimpleNamespace, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    copy = min(sets.planted)
    lost = {str(sets.validation): {copy}, str(sets.train): {sets.planted[row] for row in sets.planted if row != copy}}
    picture = PairDataset.image

    def broken(self: PairDataset, row: int, short_side: int | None = None) -> Any:
        if row in lost[str(self.data_dir)]:
            raise RowError("broken")
        return picture(self, row, short_side)

    monkeypatch.setattr(PairDataset, "image", broken)
    said: list[str] = []
    for kind in ("torch", "flat"):
        found = find_overlap(options(sets, tmp_path, threshold=0.9, index=kind), Pixels(), said.append)
        assert found.unreadable.tolist() == [copy] and len(found.rows) == 7 and found.training_unreadable == 2
        assert found.at_or_above(0.9) == []
        assert not set(found.nearest) & lost[str(sets.train)]
    assert any("1 validation and 2 training images" in line for line in said)
    assert json.loads((tmp_path / "overlap.json").read_text())["unreadable"] == [copy]
    # What is left keeps its own neighbours.
    lost[str(sets.train)] = set()
    found = find_overlap(options(sets, tmp_path / "whole_train", threshold=0.9), Pixels(), said.append)
    rest = [row for row in sorted(sets.planted) if row != copy]
    assert found.at_or_above(0.9) == rest
    nearest_of = dict(zip(found.rows.tolist(), found.nearest.tolist(), strict=True))
    assert [nearest_of[row] for row in rest] == [sets.planted[row] for row in rest]


def test_both_sets_must_differ(data: Path, sets: SimpleNamespace, tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="its own duplicate"):
        find_overlap(options(sets, tmp_path, validation=None), Pixels())
    values = {"train": str(data), "out": str(tmp_path)}
    assert len(find_overlap(OverlapOptions(**values), Pixels(), lambda line: None).rows) > 0
    with pytest.raises(ConfigError, match="threshold"):
        OverlapOptions(**values, threshold=2.0)


# --- embeddings -----------------------------------------------------------------------------------------------------


def test_embedding_goes_on_where_it_was_stopped(
    sets: SimpleNamespace, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(embeddings_module, "_SAVED_ROWS", 8)
    dataset = PairDataset.open(sets.train, "train")
    whole = embed_split(Pixels(), dataset, tmp_path / "whole", batch_size=4)

    class Stopped(Pixels):
        def embed(self, images: Tensor) -> Tensor:
            if self.seen >= 20:
                raise KeyboardInterrupt
            return super().embed(images)

    with pytest.raises(KeyboardInterrupt):
        embed_split(Stopped(), dataset, tmp_path / "parts", batch_size=4)
    assert (tmp_path / "parts" / "vectors.f32").stat().st_size > 16 * 4 * 3 * SIDE**2  # more than is known to be good
    rest = Pixels()
    parts = embed_split(rest, dataset, tmp_path / "parts", batch_size=4)
    assert rest.seen == 40 - 16
    assert np.array_equal(parts.vectors, whole.vectors) and parts.readable.all() and len(parts.readable) == 40
    again = Pixels()
    embed_split(again, dataset, tmp_path / "parts")
    assert again.seen == 0
    for row in (0, 17, 39):
        pixels = torch.from_numpy(embeddings_module.Views(dataset, SIDE, None, 0)[row][0].numpy()).float() / 255
        np.testing.assert_allclose(parts.vectors[row], Pixels().embed(pixels)[0], atol=1e-6)


def test_embeddings_of_something_else_are_refused(sets: SimpleNamespace, tmp_path: Path) -> None:
    train, validation = (PairDataset.open(data, "train") for data in (sets.train, sets.validation))
    embed_split(Pixels(), train, tmp_path)
    with pytest.raises(DataError, match="of another detector: remove that folder"):
        embed_split(Pixels("other"), train, tmp_path)
    with pytest.raises(DataError, match="of another data, rows"):
        embed_split(Pixels(), validation, tmp_path)


@pytest.mark.parametrize(
    ("name", "content"),
    [("vectors.f32", b"12"), ("readable.u8", b""), ("progress.json", b"{"), ("progress.json", b'["done"]')],
)
def test_damaged_embeddings_are_refused(name: str, content: bytes, sets: SimpleNamespace, tmp_path: Path) -> None:
    dataset = PairDataset.open(sets.validation, "train")
    embed_split(Pixels(), dataset, tmp_path)
    (tmp_path / name).write_bytes(content)
    with pytest.raises(DataError, match="remove that folder"):
        embed_split(Pixels(), dataset, tmp_path)


def test_two_searches_do_not_embed_into_one_folder(sets: SimpleNamespace, tmp_path: Path) -> None:
    dataset = PairDataset.open(sets.train, "train")

    folder = tmp_path / "train"
    hold = (
        "import sys, pathlib, dalle_ds.files\n"
        "with dalle_ds.files.only_process(pathlib.Path(sys.argv[1]), '.train.lock'): print('held', flush=True); input()"
    )
    with subprocess.Popen([sys.executable, "-c", hold, folder], text=True, stdin=-1, stdout=-1) as other:
        assert other.stdout.readline() == "held\n"
        with pytest.raises(DataError, match=f"is being made by process {other.pid}"):
            embed_split(Pixels(), dataset, folder)
        other.communicate("\n")
    assert embed_split(Pixels(), dataset, folder).readable.all()


def test_a_detector_that_diverged_is_told(sets: SimpleNamespace, tmp_path: Path) -> None:
    class Diverged(Pixels):
        def embed(self, images: Tensor) -> Tensor:
            return super().embed(images) * float("nan")

    with pytest.raises(CheckpointError, match="not numbers"):
        find_overlap(options(sets, tmp_path, threshold=0.9), Diverged(), lambda line: None)
    assert not (tmp_path / "overlap.json").exists()
    # Nothing of it is kept.
    assert len(find_overlap(options(sets, tmp_path), Pixels(), lambda line: None).rows) == 8


# --- neighbours -----------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def vectors() -> tuple[np.ndarray, Embeddings]:
    rng = np.random.default_rng(0)
    base, queries = rng.normal(size=(1000, 24)), rng.normal(size=(90, 24))
    base, queries = (rows / np.linalg.norm(rows, axis=1, keepdims=True) for rows in (base, queries))
    readable = rng.random(1000) > 0.2
    base[~readable] = 0
    return queries.astype(np.float32), Embeddings(base.astype(np.float32), readable)


@pytest.mark.parametrize("kind", ["torch", "flat", "ivf", "auto"])
def test_every_index_finds_what_comparing_all_finds(
    kind: Any, vectors: tuple[np.ndarray, Embeddings], monkeypatch: pytest.MonkeyPatch
) -> None:
    queries, base = vectors
    monkeypatch.setattr(embeddings_module, "BLOCK", 128)
    monkeypatch.setattr(embeddings_module, "_QUERIES", 40)
    cosines = queries.astype(np.float64) @ base.vectors.T.astype(np.float64)
    cosines[:, ~base.readable] = -9
    found, rows = nearest(queries, base, kind=kind, lists=8, probes=8)
    assert np.array_equal(rows, cosines.argmax(axis=1))
    np.testing.assert_allclose(found, cosines.max(axis=1), atol=1e-6)


def test_an_index_of_lists_may_miss_some_but_never_invents(vectors: tuple[np.ndarray, Embeddings]) -> None:
    queries, base = vectors
    exact, _ = nearest(queries, base, kind="torch")
    found, rows = nearest(queries, base, kind="ivf", lists=12, probes=3)
    np.testing.assert_allclose(found, (queries * base.vectors[rows]).sum(axis=1), atol=1e-6)
    assert base.readable[rows].all() and (found <= exact + 1e-6).all()
    assert 0.4 < (found >= exact - 1e-6).mean() < 1


def test_without_faiss_the_rest_works(vectors: tuple[np.ndarray, Embeddings], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "faiss", None)
    queries, base = vectors
    assert np.array_equal(nearest(queries, base)[1], nearest(queries, base, kind="torch")[1])
    for kind in ("flat", "ivf"):
        with pytest.raises(ConfigError, match=r"dalle-ds\[overlap\]"):
            nearest(queries, base, kind=kind)  # type: ignore[arg-type]


def test_nothing_to_look_up_and_nothing_to_find(vectors: tuple[np.ndarray, Embeddings]) -> None:
    queries, base = vectors
    empty = Embeddings(base.vectors, np.zeros(1000, dtype=bool))
    for kind in ("torch", "flat", "ivf"):
        assert len(nearest(queries[:0], base, kind=kind)[0]) == 0  # type: ignore[arg-type]
        cosines, rows = nearest(queries, empty, kind=kind)  # type: ignore[arg-type]
        assert (cosines == -1).all() and (rows == -1).all()


def test_large_images_shrink_on_the_page() -> None:
    pixels = np.random.default_rng(0).integers(0, 256, (600, 900, 3), dtype=np.uint8)
    assert len(thumbnail_uri(SimpleNamespace(image=lambda row: pixels), 0)) < 100_000
