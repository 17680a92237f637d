"""Readers: what they yield, in what order, and what they say of what is broken."""

from __future__ import annotations

import csv
import errno
import io
import json
import tarfile
from collections import Counter
from pathlib import Path
from typing import Any

import datasets
import pytest
import webdataset

from dalle_ds.data import reasons
from dalle_ds.data.corpora import Broken, RawPair, read_folder, read_hf, read_twemoji, read_webdataset
from dalle_ds.data.prepare import PrepareOptions, prepare
from dalle_ds.errors import DataError
from tests.data.conftest import picture_bytes

RED, BLUE = picture_bytes(1), picture_bytes(2)


def summary(items) -> list[tuple]:
    """(name, captions) of pairs and (name, reason) of what is broken."""
    return [(item.name, item.captions if isinstance(item, RawPair) else item.reason) for item in items]


# --- Twemoji --------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def twemoji() -> list[RawPair]:
    return list(read_twemoji())


def test_twemoji_has_its_known_size(twemoji: list[RawPair]) -> None:
    assert len(twemoji) == 3953
    assert len({pair.captions[0] for pair in twemoji}) == 3953
    assert len({pair.group for pair in twemoji}) == 1931


@pytest.mark.parametrize(
    ("name", "caption", "group", "variant"),
    [
        # captions as Unicode's emoji-test.txt and CLDR have them, "flag: X" as "flag of X"
        ("1f600", "grinning face", "1f600", ""),
        ("1f9ce-1f3ff-200d-2640-fe0f", "woman kneeling: dark skin tone", "1f9ce-200d-2640", "1f3ff"),
        ("1f468-1f3fb-200d-1f9b0", "man: light skin tone, red hair", "1f468-200d-1f9b0", "1f3fb"),
        ("1f468-200d-1f9b0", "man: red hair", "1f468-200d-1f9b0", ""),
        ("1f471-1f3fd-200d-2640-fe0f", "woman: medium skin tone, blond hair", "1f471-200d-2640", "1f3fd"),
        ("1f46a", "family", "1f46a", ""),
        ("1f468-200d-1f469-200d-1f466", "family: man, woman, boy", "1f468-200d-1f469-200d-1f466", ""),
        (
            "1f469-1f3fb-200d-2764-fe0f-200d-1f48b-200d-1f468-1f3fc",
            "kiss: woman, man, light skin tone, medium-light skin tone",
            "1f469-200d-2764-200d-1f48b-200d-1f468",
            "1f3fb-1f3fc",
        ),
        ("1f48f-1f3fe", "kiss: medium-dark skin tone", "1f48f", "1f3fe"),
        ("1f48b", "kiss mark", "1f48b", ""),
        ("31-20e3", "keycap: 1", "31-20e3", ""),
        ("1f1f2-1f1ec", "flag of Madagascar", "1f1f2-1f1ec", ""),
        ("1f3f4-e0067-e0062-e0065-e006e-e0067-e007f", "flag of England", None, ""),
        ("1f3f4-200d-2620-fe0f", "pirate flag", "1f3f4-200d-2620", ""),
        ("1f3ff", "dark skin tone", "swatch", ""),
    ],
)
def test_twemoji_captions_are_cldr_names(
    twemoji: list[RawPair], name: str, caption: str, group: str | None, variant: str
) -> None:
    pair = next(pair for pair in twemoji if pair.name == name)
    assert pair.captions == [caption]
    assert pair.variant == variant
    assert group is None or pair.group == group


def test_twemoji_groups_are_the_tones_of_one_emoji(twemoji: list[RawPair]) -> None:
    sizes = Counter(pair.group for pair in twemoji if pair.variant)
    assert set(sizes.values()) <= {5, 20, 25, 26}  # one person; two people, without or with equal tones
    assert all(len({pair.variant for pair in twemoji if pair.group == group}) > 1 for group in list(sizes)[:20])


# --- folders --------------------------------------------------------------------------------------------------------


def test_folder_with_text_files(tmp_path: Path) -> None:
    (tmp_path / "sub").mkdir()
    (tmp_path / "b.jpg").write_bytes(RED)
    (tmp_path / "b.txt").write_text("one\ntwo\n", encoding="utf-8")
    (tmp_path / "sub" / "a.PNG").write_bytes(BLUE)
    (tmp_path / "sub" / "a.txt").write_text("grün 猫", encoding="utf-8")
    (tmp_path / "c.png").write_bytes(RED)
    (tmp_path / "d.png").write_bytes(RED)
    (tmp_path / "d.txt").write_bytes(b"\xff\xfe\xff not UTF-8")
    (tmp_path / "notes.md").write_text("not an image")
    items = list(read_folder(str(tmp_path)))
    assert summary(items) == [
        ("b.jpg", ["one", "two"]),
        ("c.png", reasons.NO_CAPTION),
        ("d.png", reasons.ENCODING),
        ("notes.md", reasons.OTHER),
        ("sub/a.PNG", ["grün 猫"]),
    ]
    assert items[0].image == RED
    assert items[0].group != items[4].group


def test_equal_pictures_are_one_group(tmp_path: Path) -> None:
    for name, image in (("a", RED), ("b", BLUE), ("c", RED)):
        (tmp_path / f"{name}.png").write_bytes(image)
        (tmp_path / f"{name}.txt").write_text(name)
    a, b, c = read_folder(str(tmp_path))
    assert a.group == c.group != b.group


@pytest.mark.parametrize("columns", [("image", "caption"), ("file_name", "text")])
def test_folder_with_csv(tmp_path: Path, columns: tuple[str, str]) -> None:
    (tmp_path / "a.png").write_bytes(RED)
    with (tmp_path / "table.csv").open("w", newline="", encoding="utf-8") as file:
        writer = csv.writer(file)
        writer.writerows(
            [columns, ("a.png", 'quoted, "twice"\nlong ' + "x" * 200_000), ("gone.png", "gone"), ("", "no")]
        )
    (pair, *broken) = read_folder(str(tmp_path))
    assert pair.image == RED and pair.captions[0].startswith('quoted, "twice"\nlong xxx')
    gone, nameless = ("gone.png (table.csv line 4)", "table.csv line 5")
    assert summary(broken) == [(gone, reasons.NO_IMAGE), (nameless, reasons.NO_IMAGE)]


def test_folder_with_jsonl(tmp_path: Path) -> None:
    (tmp_path / "a.png").write_bytes(RED)
    rows = [{"pic": "a.png", "says": ["x", "y"]}, {"pic": "a.png", "says": "z"}, {"pic": "a.png", "says": None}]
    (tmp_path / "t.jsonl").write_text("\n".join([*map(json.dumps, rows), "{broken", "[1]", ""]))
    assert summary(read_folder(str(tmp_path), "pic", "says")) == [
        ("a.png", ["x", "y"]),
        ("a.png", ["z"]),
        ("a.png (t.jsonl line 3)", reasons.NO_CAPTION),
        ("t.jsonl line 4", reasons.BROKEN_JSON),
        ("t.jsonl line 5", reasons.BROKEN_JSON),
    ]


@pytest.mark.parametrize("table", ["a.csv", "a.jsonl"])
def test_a_table_that_the_disk_does_not_deliver_is_named(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, table: str
) -> None:
    """And not the folder that is written meanwhile."""
    (tmp_path / table).write_text("file_name,caption\na.png,b\n")
    opened = Path.open

    def unreadable(path: Path, *arguments: Any, **options: Any) -> Any:
        if path.name == table:
            raise OSError(errno.EIO, "Input/output error")
        return opened(path, *arguments, **options)

    monkeypatch.setattr(Path, "open", unreadable)
    with pytest.raises(DataError, match=rf"^{tmp_path / table} cannot be read: Input/output error$"):
        prepare(PrepareOptions(corpus="folder", source=str(tmp_path)), str(tmp_path / "out"))


def test_a_caption_that_cannot_be_looked_at_costs_its_pair(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("a", "b"):
        (tmp_path / f"{name}.png").write_bytes(RED)
        (tmp_path / f"{name}.txt").write_text("caption")
    exists = Path.exists

    def unreadable(path: Path) -> bool:
        if path.name == "a.txt":
            raise OSError(errno.EIO, "Input/output error")
        return exists(path)

    monkeypatch.setattr(Path, "exists", unreadable)
    assert summary(read_folder(str(tmp_path))) == [("a.png", reasons.UNREADABLE), ("b.png", ["caption"])]


def test_folder_mistakes_name_what_was_found(tmp_path: Path) -> None:
    with pytest.raises(DataError, match="does not exist"):
        list(read_folder(str(tmp_path / "nowhere")))
    with pytest.raises(DataError, match="has no images"):
        list(read_folder(str(tmp_path)))
    with pytest.raises(DataError, match=r"has no .csv, .tsv or .jsonl table"):
        list(read_folder(str(tmp_path), image_column="image"))
    (tmp_path / "t.csv").write_text("path,words\na.png,hello\n")
    with pytest.raises(DataError, match=r"has no column 'image' or 'file_name': it has path, words; .*--image_column"):
        list(read_folder(str(tmp_path)))
    with pytest.raises(DataError, match=r"has no column 'wrods': it has path, words; .*--caption_column"):
        list(read_folder(str(tmp_path), "path", "wrods"))
    (tmp_path / "u.jsonl").write_text("")
    with pytest.raises(DataError, match=r"several tables \(t.csv, u.jsonl\)"):
        list(read_folder(str(tmp_path)))
    with pytest.raises(DataError, match="is not a folder"):
        list(read_folder(str(tmp_path / "t.csv")))


# --- WebDataset -----------------------------------------------------------------------------------------------------


def write_tar(path: Path, samples: list[dict]) -> None:
    with webdataset.TarWriter(str(path)) as writer:
        for sample in samples:
            writer.write(sample)


def test_webdataset_as_its_own_writer_makes_it(tmp_path: Path) -> None:
    write_tar(
        tmp_path / "b.tar",
        [
            {"__key__": "k0", "png": RED, "txt": "first"},
            {"__key__": "dir/k1", "jpg": BLUE, "json": {"caption": "second"}},
            {"__key__": "k2", "png": RED, "txt": "txt counts", "json": {"caption": "not this"}},
            {"__key__": "k3", "png": RED, "json": {"other": 1}},
            {"__key__": "k4", "txt": "no image"},
        ],
    )
    write_tar(tmp_path / "a.tar", [{"__key__": "z", "png": RED, "txt": "before"}])
    assert summary(read_webdataset(str(tmp_path))) == [
        ("a.tar/z", ["before"]),
        ("b.tar/k0", ["first"]),
        ("b.tar/dir/k1", ["second"]),
        ("b.tar/k2", ["txt counts"]),
        ("b.tar/k2.json", reasons.CAPTION_UNUSED),
        ("b.tar/k3", reasons.NO_CAPTION),
        ("b.tar/k4", reasons.NO_IMAGE),
    ]
    assert ("b.tar/k2", reasons.NO_CAPTION) in summary(read_webdataset(str(tmp_path / "b.tar"), "other"))


@pytest.mark.parametrize("compressed", [False, True])
def test_truncated_tar_yields_what_came_before(tmp_path: Path, compressed: bool) -> None:
    path = tmp_path / "t.tar"
    with tarfile.open(path, "w:gz" if compressed else "w") as tar:
        for number in range(10):
            for suffix, data in (("png", picture_bytes(number, (64, 64))), ("txt", b"caption")):
                info = tarfile.TarInfo(f"{number}.{suffix}")
                info.size = len(data)
                tar.addfile(info, io.BytesIO(data))
    whole = list(read_webdataset(str(path)))
    assert len(whole) == 10
    data = path.read_bytes()
    path.write_bytes(data[: len(data) // 2])
    *before, last = read_webdataset(str(path))
    assert isinstance(last, Broken) and last.reason == reasons.TRUNCATED
    assert last.name in ("t.tar", f"t.tar/{len(before)}"), "the sample that is lost with the end"
    assert 2 <= len(before) < 10
    assert before == whole[: len(before)]


def test_not_a_tar(tmp_path: Path) -> None:
    (tmp_path / "t.tar").write_bytes(b"no tar at all" * 100)
    assert list(read_webdataset(str(tmp_path))) == [Broken("t.tar", reasons.NO_ARCHIVE)]
    with pytest.raises(DataError, match=r"has no \.tar files"):
        (tmp_path / "t.tar").unlink()
        list(read_webdataset(str(tmp_path)))


# --- Hugging Face ---------------------------------------------------------------------------------------------------


@pytest.fixture
def hf_rows() -> datasets.Dataset:
    features = datasets.Features({"image": datasets.Image(), "text": datasets.Value("string")})
    rows = {"image": [{"bytes": RED, "path": None}, {"bytes": BLUE, "path": "x.png"}], "text": ["red", "blue"]}
    return datasets.Dataset.from_dict(rows, features=features)


def test_hf_save_to_disk(tmp_path: Path, hf_rows: datasets.Dataset) -> None:
    hf_rows.save_to_disk(str(tmp_path / "one"))
    pairs = list(read_hf(str(tmp_path / "one")))
    assert [(pair.image, pair.captions) for pair in pairs] == [(RED, ["red"]), (BLUE, ["blue"])]
    datasets.DatasetDict(train=hf_rows, test=hf_rows).save_to_disk(str(tmp_path / "dict"))
    names = [pair.name for pair in read_hf(str(tmp_path / "dict"))]
    assert names == ["train row 0", "train row 1", "test row 0", "test row 1"]


def test_hf_parquet_with_bytes_paths_and_lists(tmp_path: Path, hf_rows: datasets.Dataset) -> None:
    (tmp_path / "image").mkdir()
    hf_rows.to_parquet(str(tmp_path / "image" / "a.parquet"))
    assert [pair.image for pair in read_hf(str(tmp_path / "image"))] == [RED, BLUE]
    (tmp_path / "bytes").mkdir()
    datasets.Dataset.from_dict({"jpg": [RED], "c": [["x", "y"]]}).to_parquet(str(tmp_path / "bytes" / "a.parquet"))
    assert [pair.captions for pair in read_hf(str(tmp_path / "bytes"), "jpg", "c")] == [["x", "y"]]
    (tmp_path / "paths").mkdir()
    (tmp_path / "paths" / "p.png").write_bytes(BLUE)
    table = datasets.Dataset.from_dict({"image": ["p.png", "q.png", None], "text": ["p", "q", "r"]})
    table.to_parquet(str(tmp_path / "paths" / "a.parquet"))
    pair, *broken = read_hf(str(tmp_path / "paths"))
    assert pair.image == BLUE
    assert [item.reason for item in broken] == [reasons.NO_IMAGE] * 2 + [reasons.OTHER], "the image is no table"


def test_hf_mistakes(tmp_path: Path, hf_rows: datasets.Dataset) -> None:
    with pytest.raises(DataError, match="holds no dataset"):
        list(read_hf(str(tmp_path)))
    hf_rows.save_to_disk(str(tmp_path / "one"))
    (broken,) = read_hf(str(tmp_path / "one"), image_column="picture")
    assert isinstance(broken, Broken) and (broken.reason, broken.count) == (reasons.NO_COLUMN, 2)
    assert all(word in broken.name for word in ("'picture'", "it has image, text", "--image_column"))
    (tmp_path / "one" / "state.json").write_text('{"_data_files": [{}]}')
    with pytest.raises(DataError, match="one cannot be opened as a saved dataset"):
        list(read_hf(str(tmp_path / "one")))
