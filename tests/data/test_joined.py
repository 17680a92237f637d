"""Tables of captions joined with images as img2dataset leaves them: Conceptual Captions, WIT, YFCC100M."""

from __future__ import annotations

import csv
import io
import json
import tarfile
from pathlib import Path
from urllib.parse import quote_plus

import pyarrow as pa
import pyarrow.parquet
import pytest

from dalle_ds.data import reasons
from dalle_ds.data.corpora import Corpus, RawPair, Unpaired, files, joined, read_conceptual, read_wit, read_yfcc
from dalle_ds.data.corpora.joined import CaptionTable, plain_rows
from dalle_ds.data.prepare import PrepareOptions, merge_parts, prepare, prepare_part
from dalle_ds.errors import DataError
from tests.data.conftest import picture_bytes
from tests.data.test_prepare import all_files

FORMATS = ("webdataset", "files", "parquet")


def url_of(number: int) -> str:
    return f"http://pictures.example/{number}.jpg?size=1&name=a b"


def download(folder: Path, form: str, numbers: list[int], per_shard: int = 4) -> str:
    """What img2dataset writes of these URLs in one of its output formats; the image of number 3 cannot be had."""
    folder.mkdir()
    for shard in range(0, len(numbers), per_shard):
        name = f"{shard // per_shard:05d}"
        rows = []
        for place, number in enumerate(numbers[shard : shard + per_shard]):
            status = "failed_to_download" if number == 3 else "success"
            about = {"url": url_of(number), "key": f"{name}{place:04d}", "status": status, "caption": "not this one"}
            rows.append((about, None if number == 3 else picture_bytes(number, format="JPEG")))
        write_shard(folder, form, name, rows)
        (folder / f"{name}_stats.json").write_text(json.dumps({"count": len(rows)}))
    return str(folder)


def write_shard(folder: Path, form: str, name: str, rows: list[tuple[dict[str, str], bytes | None]]) -> None:
    columns = {key: [about[key] for about, _ in rows] for key in rows[0][0]}
    if form == "parquet":
        columns["jpg"] = [image for _, image in rows]  # type: ignore[misc]
    pa.parquet.write_table(pa.table(columns), folder / f"{name}.parquet")
    files = {
        f"{about['key']}{suffix}": data
        for about, image in rows
        if image is not None
        for suffix, data in ((".jpg", image), (".txt", b"not this one"), (".json", json.dumps(about).encode()))
    }
    if form == "files":
        (folder / name).mkdir()
        for file, data in files.items():
            (folder / name / file).write_bytes(data)
    elif form == "webdataset":
        with tarfile.open(folder / f"{name}.tar", "w") as tar:
            for file, data in files.items():
                info = tarfile.TarInfo(file)
                info.size = len(data)
                tar.addfile(info, io.BytesIO(data))


def found(corpus: Corpus) -> dict[str, list[str] | str]:
    """Name without the shard's → captions, or the reason for which there are none, of all but what belongs to no pair."""
    items = {item.name.split("/")[-1]: item for item in corpus if not isinstance(item, Unpaired)}
    return {name: item.captions if isinstance(item, RawPair) else item.reason for name, item in items.items()}


@pytest.fixture
def conceptual(tmp_path: Path) -> str:
    """Six rows; the image of 1 stands there twice, that of 5 not at all."""
    rows = [("a cat", 0), ('the "best" dog', 1), ("a dog again", 1), ("unavailable", 3), ("猫が座る", 2), ("  ", 4)]
    path = tmp_path / "Train_GCC-training.tsv"
    path.write_text("".join(f"{caption}\t{url_of(number)}\n" for caption, number in rows), encoding="utf-8")
    return str(path)


@pytest.mark.parametrize("form", FORMATS)
def test_conceptual_captions_in_every_format_of_downloads(tmp_path: Path, conceptual: str, form: str) -> None:
    pictures = download(tmp_path / form, form, [2, 0, 1, 3, 4, 5])
    items = {item.name.split("/")[-1]: item for item in read_conceptual(conceptual, pictures)}
    captions = found(read_conceptual(conceptual, pictures))
    if form == "parquet":
        assert captions.pop("000000003") == reasons.NO_IMAGE
    assert captions == {
        "000000000": ["猫が座る"],
        "000000001": ["a cat"],
        "000000002": ['the "best" dog', "a dog again"],
        "000010000": ["  "],
        "000010001": reasons.NOT_LISTED,
    }
    cat = items["000000001"]
    assert isinstance(cat, RawPair) and cat.image == picture_bytes(0, format="JPEG")


def test_conceptual_12m_has_its_columns_the_other_way_around(tmp_path: Path) -> None:
    table = tmp_path / "cc12m.tsv"
    table.write_text(f"{url_of(0)}\ta cat\n{url_of(1)}\ta dog\n")
    pictures = download(tmp_path / "pictures", "webdataset", [1, 0])
    assert list(found(read_conceptual(str(table), pictures)).values()) == [["a dog"], ["a cat"]]


def test_wit_takes_english_reference_captions(tmp_path: Path) -> None:
    def row(language: str, number: int, reference: str, alternative: str = "") -> dict[str, str]:
        texts = {"caption_reference_description": reference, "caption_alt_text_description": alternative}
        return {"language": language, "image_url": url_of(number), **texts}

    rows = [
        row("en", 0, 'A quote ", a tab\tand\nan end of line'),
        row("de", 0, "Ein Anführungszeichen"),
        row("en", 0, "From another article"),
        row("en", 0, "From another article"),
        row("fr", 1, "Seulement en français"),
        row("en", 2, "", "an alternative"),
    ]
    folder = tmp_path / "wit"
    folder.mkdir()
    for name, part in (("a.tsv", rows[:3]), ("b.tsv", rows[3:])):
        with (folder / name).open("w", newline="", encoding="utf-8") as file:
            writer = csv.DictWriter(file, joined.WIT_COLUMNS, delimiter="\t", restval="x")
            writer.writeheader()
            writer.writerows(part)
    pictures = download(tmp_path / "pictures", "webdataset", [0, 1, 2, 4])
    assert list(found(read_wit(str(folder), pictures)).values()) == [
        ['A quote ", a tab\tand\nan end of line', "From another article", "From another article"],
        reasons.NO_CAPTION,
        reasons.NO_CAPTION,
        reasons.NOT_LISTED,
    ]
    alternative = found(read_wit(str(folder), pictures, "caption_alt_text_description"))
    assert list(alternative.values())[2] == ["an alternative"]
    with pytest.raises(DataError, match="WIT has no column 'caption'"):
        read_wit(str(folder), pictures, "caption")


@pytest.mark.parametrize("columns", [23, 25])
def test_yfcc_takes_titles_and_descriptions_of_photographs(tmp_path: Path, columns: int) -> None:
    def line(number: int, title: str, description: str, marker: str = "0") -> str:
        fields = ["x"] * 23
        fields[6], fields[7], fields[14], fields[22] = (
            quote_plus(title),
            quote_plus(description),
            url_of(number),
            marker,
        )
        return "\t".join(["7", "hash"][: columns - 23] + fields)

    table = tmp_path / "yfcc100m_dataset"
    lines = [
        line(0, "Crème brûlée, 100%", '<a href="http://x">My</a> holiday &amp; more\nthan that'),
        line(1, "", "only a description"),
        line(2, "a video", "moving", marker="1"),
        line(4, " ", ""),
        "a line of another kind",
    ]
    table.write_text("\n".join(lines) + "\n")
    pictures = download(tmp_path / "pictures", "files", [0, 1, 2, 4])
    assert list(found(read_yfcc(str(table), pictures)).values()) == [
        ["Crème brûlée, 100%", "My  holiday & more\nthan that"],
        ["only a description"],
        reasons.NO_CAPTION,
        reasons.NO_CAPTION,
    ]


def test_joined_corpora_in_parts_are_the_preparation_byte_for_byte(tmp_path: Path) -> None:
    table = tmp_path / "table.tsv"
    table.write_text("".join(f"image number {number}\t{url_of(number)}\n" for number in range(24)))
    pictures = download(tmp_path / "pictures", "webdataset", list(range(28)))
    options = PrepareOptions(corpus="conceptual", source=str(table), pictures=pictures, validation=0.2)
    report = prepare(options, str(tmp_path / "whole"))
    assert sum(report.kept.values()) == 23 and report.dropped[reasons.NOT_LISTED].count == 4
    for shard in (2, 0, 1):
        prepare_part(options, str(tmp_path / "parts"), shard, 3)
    merge_parts(str(tmp_path / "parts"))
    assert all_files(tmp_path / "parts") == all_files(tmp_path / "whole")


def captions_in(table: Path, text: str) -> CaptionTable:
    """A table of URLs with captions."""
    table.write_text(text)
    return CaptionTable(str(table), plain_rows, lambda row: row[0], lambda row: row[1:])


def test_an_index_of_many_urls_finds_each_and_no_other(tmp_path: Path) -> None:
    captions = captions_in(tmp_path / "a.tsv", "".join(f"http://{n % 700}\t{n}\n" for n in range(1000))).captions
    assert all(captions(f"http://{n}") == [str(n), str(n + 700)][: 1 + (n < 300)] for n in range(700))
    assert captions("http://700") is None
    assert captions_in(tmp_path / "b.tsv", "").captions("http://0") is None


def test_urls_of_the_same_hash_are_told_apart(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr(joined, "_key", lambda url: 7)
    text = "http://a\tA\nhttp://b\tB\n" + "x" * (files.MAX_TEXT_BYTES + 5) + "\nhttp://c\tC\n"
    table = captions_in(tmp_path / "table.tsv", text)
    assert [table.captions(f"http://{name}") for name in "abcd"] == [["A"], ["B"], ["C"], None]


def test_mistakes_name_what_was_found(tmp_path: Path, conceptual: str) -> None:
    with pytest.raises(DataError, match=r"--pictures .*nowhere is not a folder"):
        read_conceptual(conceptual, str(tmp_path / "nowhere"))
    (tmp_path / "empty").mkdir()
    with pytest.raises(DataError, match="has no images of img2dataset"):
        read_conceptual(conceptual, str(tmp_path / "empty"))
    with pytest.raises(DataError, match=r"source .*no\.tsv does not exist"):
        read_conceptual(str(tmp_path / "no.tsv"), str(tmp_path))
    with pytest.raises(DataError, match=r"has no \.tsv files$"):
        read_conceptual(str(tmp_path / "empty"), str(tmp_path))
    (tmp_path / "empty" / "wit.tsv.gz").write_bytes(b"")
    with pytest.raises(DataError, match=r"has no \.tsv files: unpack wit\.tsv\.gz"):
        read_wit(str(tmp_path / "empty"), str(tmp_path))
    with pytest.raises(DataError, match="is packed, so that no row can be read by itself"):
        read_wit(str(tmp_path / "empty" / "wit.tsv.gz"), str(tmp_path))


@pytest.mark.parametrize("form", FORMATS)
def test_damaged_downloads_are_counted(tmp_path: Path, conceptual: str, form: str) -> None:
    pictures = Path(download(tmp_path / form, form, [0, 1, 2, 4], per_shard=2))
    victim = {"webdataset": "00000.tar", "files": "00000/000000000.json", "parquet": "00000.parquet"}[form]
    path = pictures / victim
    path.write_bytes(path.read_bytes()[: 1000 if form == "webdataset" else 20])
    items = [item for item in read_conceptual(conceptual, str(pictures)) if not isinstance(item, Unpaired)]
    reason = {"webdataset": reasons.TRUNCATED, "files": reasons.BROKEN_JSON, "parquet": reasons.UNREADABLE}[form]
    assert [item.reason for item in items if not isinstance(item, RawPair)] == [reason]
    assert sum(isinstance(item, RawPair) for item in items) == (3 if form == "files" else 2)


@pytest.mark.parametrize("form", FORMATS)
def test_downloads_that_are_too_big_are_counted(
    tmp_path: Path, conceptual: str, form: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(files, "MAX_IMAGE_BYTES", len(picture_bytes(1, format="JPEG")) - 1)
    too_big = found(read_conceptual(conceptual, download(tmp_path / form, form, [1])))
    assert too_big == {"000000000": reasons.TOO_BIG}
