"""Captions to draw, rows to leave out, and adapters of COCO and CUB, on small files in their layout."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from dalle_ds.data import PairDataset
from dalle_ds.data.corpora import Broken, RawPair, Unpaired
from dalle_ds.data.corpora.evaluation_sets import read_coco, read_cub
from dalle_ds.errors import DataError
from dalle_ds.evaluation.sets import choose_captions, to_size, without_overlap


def picture(path: Path, seed: int) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    pixels = np.random.default_rng(seed).integers(0, 256, (30, 40, 3), dtype=np.uint8)
    Image.fromarray(pixels).save(path, "JPEG")


@pytest.fixture
def coco(tmp_path: Path) -> Path:
    """Three images, of which one has no captions and one no file."""
    folder = tmp_path / "coco"
    images = [{"id": number, "file_name": f"COCO_val2014_{number:012}.jpg", "license": 1} for number in (42, 73, 9)]
    for image in images[:2]:
        picture(folder / "val2014" / image["file_name"], image["id"])
    captions = [(73, "A motorcycle parked. "), (42, "Someone on a bench."), (73, "A bike."), (9, "Nothing.")]
    annotations = [{"image_id": image, "id": number, "caption": text} for number, (image, text) in enumerate(captions)]
    (folder / "annotations").mkdir()
    content = {"info": {}, "images": images, "annotations": annotations}
    (folder / "annotations" / "captions_val2014.json").write_text(json.dumps(content))
    (folder / "annotations" / "instances_val2014.json").write_text("{}")
    return folder


def test_coco_has_all_captions_of_each_picture(coco: Path) -> None:
    pairs = list(read_coco(str(coco)))
    assert [pair.captions for pair in pairs if isinstance(pair, RawPair)] == [
        ["Someone on a bench."],
        ["A motorcycle parked. ", "A bike."],
    ]
    assert [pair for pair in pairs if isinstance(pair, Broken)] == [Broken("COCO_val2014_000000000009.jpg", "no image")]
    assert [pair.name for pair in read_coco(str(coco / "annotations" / "captions_val2014.json"))] == [
        pair.name for pair in pairs
    ]


def test_coco_of_several_parts_needs_a_choice(coco: Path) -> None:
    (coco / "annotations" / "captions_train2014.json").write_text("{}")
    with pytest.raises(DataError, match=r"captions_train2014\.json, captions_val2014\.json: name the file"):
        read_coco(str(coco))
    with pytest.raises(DataError, match=r"train2014, which does not exist"):
        read_coco(str(coco / "annotations" / "captions_train2014.json"))


@pytest.mark.parametrize(
    "content", ["", "[]", "{}", '{"images": 3, "annotations": []}', '{"images": {}, "annotations": 1}']
)
def test_damaged_annotations_are_told(coco: Path, content: str) -> None:
    (coco / "annotations" / "captions_val2014.json").write_text(content)
    with pytest.raises(DataError, match=r"captions_val2014\.json cannot be read"):
        list(read_coco(str(coco)))


def test_coco_reads_nothing_outside_of_its_folder(coco: Path) -> None:
    picture(coco / "secret.jpg", 1)
    content = {"images": [{"id": 1, "file_name": "../secret.jpg"}], "annotations": [{"image_id": 1, "caption": "a"}]}
    (coco / "annotations" / "captions_val2014.json").write_text(json.dumps(content))
    assert next(iter(read_coco(str(coco)))) == Broken("../secret.jpg", "no image")


@pytest.fixture
def cub(tmp_path: Path) -> Path:
    """Two images each of two kinds, the last one's captions missing."""
    folder = tmp_path / "CUB_200_2011"
    names = ["001.Albatross/A_1.jpg", "001.Albatross/A_2.jpg", "002.Wren/W_1.jpg", "002.Wren/W_2.jpg"]
    for number, name in enumerate(names):
        picture(folder / "images" / name, number)
    (folder / "images.txt").write_text("".join(f"{number} {name}\n" for number, name in enumerate(names, 1)))
    (folder / "train_test_split.txt").write_text("1 0\n2 1\n3 0\n4 0\n")
    for name in names[:3]:
        text = tmp_path / "text_c10" / name.replace(".jpg", ".txt")
        text.parent.mkdir(parents=True, exist_ok=True)
        text.write_text(f"a bird {name}\nthis bird is black\nthis bird is black \n\n")
    return folder


def cub_names(folder: Path) -> list[str]:
    return [pair.name for pair in read_cub(str(folder)) if not isinstance(pair, Unpaired)]


def test_cub_has_all_captions_of_its_test_part(cub: Path) -> None:
    *pairs, others = read_cub(str(cub))
    assert [pair.captions for pair in pairs if isinstance(pair, RawPair)] == [
        ["a bird 001.Albatross/A_1.jpg", "this bird is black", "this bird is black ", ""],
        ["a bird 002.Wren/W_1.jpg", "this bird is black", "this bird is black ", ""],
    ], "what is the same or empty is left out, and counted, by preparation"
    assert pairs[-1] == Broken("002.Wren/W_2.jpg", "no caption")
    assert others == Unpaired("images.txt", "of another part", 1)


def test_cub_is_divided_by_classes_where_these_are_listed(cub: Path) -> None:
    (cub.parent / "testclasses.txt").write_text("002.Wren\n")
    assert cub_names(cub) == ["002.Wren/W_1.jpg", "002.Wren/W_2.jpg"]


def test_a_copy_of_cub_with_parts_missing_is_told(cub: Path) -> None:
    (cub / "train_test_split.txt").unlink()
    with pytest.raises(DataError, match=r"train_test_split\.txt cannot be read"):
        read_cub(str(cub))
    (cub.parent / "text_c10").rename(cub.parent / "text")
    with pytest.raises(DataError, match="has no captions: unpack text_c10"):
        read_cub(str(cub))


def test_captions_are_a_choice_that_grows_and_names_their_rows(data: Path) -> None:
    dataset = PairDataset.open(data, "train")
    every = choose_captions(dataset, None, seed=3)
    assert sorted(caption.row for caption in every) == list(range(len(dataset)))  # each row has one caption of its own
    assert all(dataset.captions(caption.row) == [caption.text] for caption in every)
    assert choose_captions(dataset, 5, seed=3) == every[:5] != choose_captions(dataset, 5, seed=4)


def test_pictures_that_have_the_size_are_not_touched() -> None:
    pixels = torch.randint(0, 256, (2, 3, 8, 8), dtype=torch.uint8)
    assert to_size(pixels, 8) is pixels
    assert to_size(pixels, 5).shape == (2, 3, 5, 5)


def test_rows_to_leave_out_belong_to_the_split(data: Path, tmp_path: Path) -> None:
    dataset = PairDataset.open(data, "validation")
    path = tmp_path / "overlap.json"

    def listed(**changes: object) -> Path:
        content = {"split": "validation", "fingerprint": dataset.fingerprint, "rows": [0, 2], **changes}
        path.write_text(json.dumps(content))
        return path

    kept = without_overlap(listed(), dataset)
    assert (~kept).nonzero()[:, 0].tolist() == [0, 2]
    for changes, words in (
        ({"split": "train"}, "analyse the overlap of this one"),
        ({"fingerprint": "0"}, "analyse the overlap of this one"),
        ({"rows": [len(dataset)]}, "whole numbers below"),
        ({"rows": "0"}, "whole numbers below"),
        ({"rows": list(range(len(dataset)))}, "leaves 0 rows"),
    ):
        with pytest.raises(DataError, match=words):
            without_overlap(listed(**changes), dataset)
    path.write_text("{")
    with pytest.raises(DataError, match="cannot be read"):
        without_overlap(path, dataset)
