"""Nothing in a source disappears: found = kept + dropped, by reason and with examples; what belongs to no pair is told; what
is kept has the bytes and the words of the source. One table of faults over all readers, prepared whole and in parts."""

from __future__ import annotations

import bz2
import csv
import gzip
import io
import json
import lzma
import os
import tarfile
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import datasets
import pyarrow as pa
import pyarrow.parquet
import pytest

from dalle_ds.data import reasons
from dalle_ds.data.corpora import read_folder, read_webdataset
from dalle_ds.data.corpora.joined import WIT_COLUMNS
from dalle_ds.data.dataset import PairDataset
from dalle_ds.data.images import image_suffixes
from dalle_ds.data.prepare import NothingKept, PrepareOptions, merge_parts, prepare, prepare_part
from dalle_ds.data.report import Dropped, PreparationReport
from dalle_ds.errors import DataError
from dalle_ds.evaluation.sets import ImageFolder
from tests.data.conftest import picture_bytes

PNG = [picture_bytes(number) for number in range(8)]
MAC = b"\0\5\x16\7" + bytes(60)
Members = Iterable[tuple[str, bytes]]


def tar(members: Members, form: int = tarfile.USTAR_FORMAT) -> bytes:
    buffer = io.BytesIO()
    with tarfile.open(fileobj=buffer, mode="w", format=form) as archive:
        for name, data in members:
            info = tarfile.TarInfo(name)
            info.size = len(data)
            archive.addfile(info, io.BytesIO(data))
    return buffer.getvalue()


def samples(
    count: int, name: Callable[[int], str] = str, suffix: str = "png", text: str = "txt"
) -> list[tuple[str, bytes]]:
    """Members of samples "caption 0", …"""
    return [
        member
        for number in range(count)
        for member in (
            (f"{name(number)}.{suffix}", PNG[number]),
            (f"{name(number)}.{text}", f"caption {number}".encode()),
        )
    ]


def cut_between_members(count: int) -> bytes:
    whole = tar(samples(5))
    with tarfile.open(fileobj=io.BytesIO(whole)) as archive:
        members = list(archive)
    return whole[: members[2 * count].offset]


def put(files_of: dict[str, bytes | str]) -> Callable[[Path], None]:
    """Writes files into a folder."""

    def build(folder: Path) -> None:
        for name, content in files_of.items():
            path = folder / name
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_bytes(content.encode() if isinstance(content, str) else content)

    return build


def pictures(count: int, **more: bytes | str) -> dict[str, bytes | str]:
    return {**{f"{number}.png": PNG[number] for number in range(count)}, **more}


def table(text: str | bytes, count: int = 3, name: str = "a.csv") -> Callable[[Path], None]:
    """A table with `count` images beside it."""
    return put({**pictures(count), name: text})


def texts(count: int) -> dict[str, bytes | str]:
    return {f"{number}.txt": f"caption {number}" for number in range(count)}


def linked(folder: Path) -> None:
    put({**pictures(2), **texts(2)})(folder)
    outside = folder.with_name("outside")
    put({"2.png": PNG[2], "2.txt": "caption 2"})(outside)
    (folder / "link").symlink_to(outside)
    put({"sub/3.png": PNG[3], "sub/3.txt": "caption 3"})(outside)
    (folder / "link to a part").symlink_to(outside / "sub")
    (folder / "table.csv").symlink_to("nowhere")
    (outside / "back").symlink_to(folder)
    (outside / "itself").symlink_to(outside)
    (folder / "nothing.png").symlink_to("nowhere")
    (folder / "nothing.txt").write_text("caption")


def linked_table(folder: Path) -> None:
    put({"sub/0.png": PNG[0], "a.jsonl": JSONL.split("\n")[0].replace("0.png", "link/0.png")})(folder)
    (folder / "link").symlink_to("sub")


def latin_1(folder: Path) -> None:
    texts = pa.array([b"caption 0", "caf\xe9".encode("latin-1"), b"caption 2"], pa.binary()).view(pa.string())
    pa.parquet.write_table(pa.table({"image": PNG[:3], "text": texts}), folder / "a.parquet")


def damaged_arrow(folder: Path) -> None:
    """A damaged batch, and a batch with a caption that is not UTF-8."""
    with pa.ipc.new_file(folder / "a.arrow", pa.schema({"image": pa.binary(), "text": pa.string()})) as writer:
        for number in range(3):
            writer.write_batch(pa.record_batch({"image": PNG[number:][:1], "text": captions(number)}))
    content = (folder / "a.arrow").read_bytes()
    place = content.index(PNG[1]) - 100
    (folder / "a.arrow").write_bytes(content[:place] + b"\xff" * 40 + content[place + 40 :])


def parquet(columns: dict[str, list[Any]], name: str = "a.parquet", more: dict[str, bytes | str] | None = None):
    def build(folder: Path) -> None:
        put(more or {})(folder)
        pa.parquet.write_table(pa.table(columns), folder / name, row_group_size=2)

    return build


def damaged_parquet(folder: Path) -> None:
    parquet({"image": PNG[:6], "text": [f"caption {number}" for number in range(6)]})(folder)
    path = folder / "a.parquet"
    place = pa.parquet.ParquetFile(path).metadata.row_group(1).column(0).data_page_offset
    content = bytearray(path.read_bytes())
    content[place : place + 40] = bytes(40)
    path.write_bytes(content)
    put({"b.parquet": b"PAR1 no more"})(folder)


def splits(folder: Path) -> None:
    def split(**columns: Any) -> datasets.Dataset:
        return datasets.Dataset.from_dict(columns)

    good = split(image=[PNG[0], None, b""], text=["caption 0", "b", "c"])
    datasets.DatasetDict(train=good, other=split(words=["x", "y"])).save_to_disk(str(folder))


def coco(folder: Path) -> None:
    images = [{"id": number, "file_name": f"{number}.png"} for number in range(4)]
    images += [{"id": 0, "file_name": "same.png"}, {"id": 9}, "no object"]  # type: ignore[list-item]
    annotations = [{"image_id": number, "caption": f"caption {number}"} for number in (0, 1, 3)]
    annotations += [
        {"image_id": 1, "caption": None},
        {"image_id": 2, "caption": 5},
        {"image_id": "\ud800", "caption": "x"},
        {},
    ]
    content = json.dumps({"images": images, "annotations": annotations})
    put(
        {
            "annotations/captions_val.json": content,
            "val/same.png": PNG[6],
            **{f"val/{number}.png": PNG[number] for number in (0, 1, 2, 7)},
        }
    )(folder)


def cub(folder: Path) -> None:
    names = {number: f"a/{number}.png" for number in range(1, 5)}
    put(
        {
            "images.txt": "".join(f"{number} {name}\n" for number, name in names.items()) + "nothing\n1 a/9.png\n",
            "train_test_split.txt": "1 0\n2 0\n3 1\n",
            "text_c10/a/1.txt": "caption 1\n",
            "text_c10/a/2.txt": "caf\xe9\n".encode("latin-1"),
            "text_c10/a/7.txt": "of no image",
            **{f"images/a/{number}.png": PNG[number] for number in (1, 2, 3, 7)},
        }
    )(folder)


def url(number: int) -> str:
    return f"http://x/{number}.png"


def downloaded(folder: Path, numbers: Iterable[int], more: Members = ()) -> None:
    about = [(number, json.dumps({"url": url(number)}).encode()) for number in numbers]
    members = [m for number, text in about for m in ((f"{number}.png", PNG[number]), (f"{number}.json", text))]
    put({"pictures/0.tar": tar([*members, *more])})(folder)


def joined(lines: bytes, numbers: Iterable[int], more: Members = (), **others: bytes) -> Callable[[Path], None]:
    def build(folder: Path) -> None:
        put({"table/a.tsv": lines, **{f"table/{name.replace('_', '.')}": data for name, data in others.items()}})(
            folder
        )
        downloaded(folder, numbers, more)

    return build


def pictures_inside(folder: Path) -> None:
    joined("".join(f"caption {number}\t{url(number)}\n" for number in range(2)).encode(), (0, 1), readme_md=b"x")(
        folder
    )
    (folder / "pictures").rename(folder / "table" / "pictures")
    (folder / "pictures").symlink_to("table/pictures")


def wit_lines() -> bytes:
    def line(*captions: str) -> str:
        buffer = io.StringIO()
        for number, caption in enumerate(captions):
            values = {"language": "en", "image_url": url(number), "caption_reference_description": caption}
            csv.DictWriter(buffer, WIT_COLUMNS, delimiter="\t", restval="x", lineterminator="\n").writerow(values)
        return buffer.getvalue()

    heading = "\t".join(WIT_COLUMNS) + "\n"
    lines = (heading + line("caption 0", "open", "caption\n2")).split("\n")
    lines[2] = lines[2].replace("open", '"open')
    return "\n".join(lines).encode()


def yfcc_lines() -> bytes:
    def line(number: int, title: str) -> str:
        row = ["x"] * 23
        row[6], row[7], row[14], row[22] = title, "", url(number), "0"
        return "\t".join(row)

    return "\n".join([line(0, "caption+0"), line(1, "caf%E9"), line(2, "<b>I %3C3 5 > 4"), "a\tb"]).encode()


def downloads_as_files(folder: Path) -> None:
    put(
        {
            "table/a.tsv": "".join(f"caption {number}\t{url(number)}\n" for number in range(4)),
            **{f"pictures/0/{number}.png": PNG[number] for number in (0, 1, 3)},
            "pictures/0/0.json": json.dumps({"url": url(0)}),
            "pictures/0/1.json": "{",
            "pictures/0/0.webp": PNG[4],
            "pictures/info.json": "{}",
            "pictures/0/2.json": json.dumps({"url": url(2)}),
            "pictures/0/0.txt": "not this one",
            "pictures/0_stats.json": "{}",
        }
    )(folder)


@dataclass
class Case:
    """A source, and what must be told of it."""

    corpus: str
    build: Callable[[Path], None]
    kept: list[str]
    dropped: dict[str, int] = field(default_factory=dict)
    unpaired: dict[str, int] = field(default_factory=dict)
    source: str = "."
    lost: dict[str, int] = field(default_factory=dict)
    """Captions of kept pairs."""
    column: str | None = None


def captions(*numbers: int) -> list[str]:
    return [f"caption {number}" for number in numbers]


JSONL = "".join(json.dumps({"file_name": f"{number}.png", "text": f"caption {number}"}) + "\n" for number in range(3))
CSV = "file_name,text\n0.png,caption 0\n1.png,caption 1\n"
UNLISTED = {reasons.NOT_LISTED: 1}
IMAGE: Callable[[int], str] = "image".format
JSON = [json.dumps({"text": f"caption {number}"}).encode() for number in range(3)]
FLIPPED = gzip.compress(tar(samples(3)), 0).replace(b"caption 2", b"option 2!")

CASES = {
    # --- folders with texts beside images
    "folder: each without the other": Case(
        "folder", put({**pictures(2), **texts(1), "2.txt": "x"}), captions(0), {reasons.NO_CAPTION: 1, reasons.NO_IMAGE: 1}
    ),
    "folder: letter case and dots": Case(
        "folder",
        put({"a.b.PNG": PNG[0], "a.b.TXT": "caption 0", "c.JFIF": PNG[1], "c.txt": "caption 1", "c.TXT": "other"}),
        captions(0, 1),
        unpaired={reasons.CAPTION_UNUSED: 1},
    ),
    "folder: encodings": Case(
        "folder",
        put(
            {
                **pictures(5),
                "0.txt": b"\xef\xbb\xbfcaption 0",
                "1.txt": "caption 1".encode("utf-16"),
                "2.txt": "caf\xe9".encode("latin-1"),
                "3.txt": "caption".encode("utf-16-le"),
                "4.txt": "caption\x854".encode(),
            }
        ),
        [*captions(0, 1), "caption 4"],
        {reasons.ENCODING: 2},
    ),
    "folder: other files": Case(
        "folder",
        put(
            {
                **pictures(1),
                **texts(1),
                "._0.png": MAC,
                "._0.txt": MAC,
                "__MACOSX/0.png": MAC,
                ".DS_Store": MAC,
                "more.zip": b"PK",
                "more.tar": b"",
                "readme.md": "x",
                "sub/metadata.csv": CSV,
                "paper.pdf": b"x",
                "a.heic": b"x",
                "a.txt": "caption",
                "empty.png": b"",
                "empty.txt": "caption",
            }
        ),
        captions(0),
        {reasons.FORMAT: 1, reasons.EMPTY_FILE: 1},
        {reasons.SYSTEM: 4, reasons.ARCHIVE: 2, reasons.OTHER: 2, reasons.TABLE_BELOW: 1},
    ),
    "folder: links": Case(
        "folder", linked, captions(0, 1, 2, 3), {reasons.LINK_TO_NOTHING: 1}, {reasons.LOOP: 3, reasons.LINK_TO_NOTHING: 1}
    ),
    # --- tables
    "csv: open quote": Case(
        "folder",
        table(f'{CSV}2.png,"open\n3.png,caption 3\n4.png,5" disk\n', 5),
        [*captions(0, 1, 3), '5" disk'],
        {reasons.OPEN_QUOTE: 1},
        UNLISTED,
    ),
    "csv: a quote that closes by chance": Case(
        "folder",
        table('file_name,text\n0.png,"open\n1.png,caption 1\n2.png,the 5"\n'),
        ["caption 1", 'the 5"'],
        {reasons.OPEN_QUOTE: 1},
        UNLISTED,
    ),
    "csv: a quote that is open to the end": Case(
        "folder", table(f'{CSV}2.png,"open\n'), captions(0, 1), {reasons.OPEN_QUOTE: 1}, UNLISTED
    ),
    "csv: a quote that closes by chance, short and long rows": Case(
        "folder",
        table('file_name,text,more\n0.png,"open\n1.png,caption 1\n2.png,caption 2,x,y\n3.png,the 5"\n', 4),
        ["caption 1", 'the 5"'],
        {reasons.OPEN_QUOTE: 1, reasons.FIELDS: 1},
        {reasons.NOT_LISTED: 2},
    ),
    "csv: a caption of several lines": Case(
        "folder", table(f'file_name,text\n0.png,"see\n{"long " * 80}, and\n9.png"\n1.png,caption 1\n', 2),
        [f'see {"long " * 79}long , and 9.png', "caption 1"],
    ),
    "csv: a heading without an end": Case("folder", table(CSV.replace("\n", f",{'x' * 140_000}\n", 1), 2), captions(0, 1)),
    "csv: quotes as they should be": Case(
        "folder",
        table('"file_name", "text"\n"0.png","a, ""b""\nand, c"\n1.png, "caption 1"\n2.png, "a, b"\n'),
        ['a, "b" and, c', "caption 1", "a, b"],
    ),
    "csv: more fields, fewer fields, empty lines": Case(
        "folder",
        table("file_name,text\n\n0.png,a cat, sitting\n1.png\n2.png,caption 2\n0.png,a cat,\n"),
        captions(2),
        {reasons.FIELDS: 2, reasons.NO_CAPTION: 1},
        UNLISTED,
    ),
    "csv: semicolons": Case("folder", table(CSV.replace(",", ";"), 2), captions(0, 1)),
    "csv: pipes": Case("folder", table(CSV.replace(",", "|"), 2), captions(0, 1)),
    "tsv": Case("folder", table(CSV.replace(",", "\t"), 2, "a.tsv"), captions(0, 1)),
    "csv: UTF-16": Case("folder", table(CSV.encode("utf-16"), 2), captions(0, 1)),
    "csv: byte order mark": Case("folder", table(b"\xef\xbb\xbf" + CSV.encode(), 2), captions(0, 1)),
    "csv: Latin-1 and NUL": Case(
        "folder",
        table(CSV.encode() + "2.png,caf\xe9\n3.png,nu\0l\n".encode("latin-1"), 4),
        captions(0, 1),
        {reasons.ENCODING: 2},
        {reasons.NOT_LISTED: 2},
    ),
    "csv: names that lead nowhere": Case(
        "folder",
        table(f"{CSV}sub,x\n0.png/x,x\n../no.png,x\n,x\n", 2),
        captions(0, 1),
        {reasons.NO_IMAGE: 4},
    ),
    "jsonl: rows of every kind": Case(
        "folder",
        table(
            JSONL + '{"file_name": "3.png"}\n{"text": "x"}\n[1]\n{broken\n{"file_name": "3.png", "text": null}\n'
            '{"file_name": "\\ud800.png", "text": "x"}\n'
            '{"file_name": "3.png", "text": 5}\n{"file_name": "3.png", "text": ["caption 3", 5, "\\ud800"]}\n',
            4,
            "a.jsonl",
        ),
        captions(0, 1, 2, 3),
        {reasons.NO_CAPTION: 2, reasons.NO_IMAGE: 1, reasons.BROKEN_JSON: 2, reasons.NOT_TEXT: 1, reasons.UNREADABLE: 1},
        lost={reasons.NOT_TEXT: 1, reasons.ENCODING: 1},
    ),
    "jsonl: names through a link": Case("folder", linked_table, captions(0), unpaired={reasons.LOOP: 1}),
    # --- WebDataset
    "tar: one name": Case("webdataset", put({"0.tar": tar(samples(5, IMAGE))}), captions(0, 1, 2, 3, 4)),
    "tar: one name, images first": Case(
        "webdataset",
        put({"0.tar": tar([*sorted(samples(2, IMAGE), key=lambda member: member[0]), *samples(4)[6:]])}),
        captions(3),
        {reasons.ANOTHER_IMAGE: 1, reasons.AMBIGUOUS: 1},
        {reasons.CAPTION_UNUSED: 1},
    ),
    "tar: one name, texts before and behind": Case(
        "webdataset",
        put(
            {
                "0.tar": tar([*samples(1, IMAGE), ("image.json", JSON[1]), *samples(2, IMAGE)[2:]]),
                "1.tar": tar([("2.png", PNG[2]), ("2.json", JSON[2])]),
            }
        ),
        captions(2),
        {reasons.AMBIGUOUS: 1, reasons.NO_CAPTION: 1},
        {reasons.CAPTION_UNUSED: 2},
        column="text",
    ),
    "tar: one name, one order": Case(
        "webdataset",
        put({"0.tar": tar([m for n in range(3) for m in (*samples(3, IMAGE)[2 * n :][:2], ("image.json", JSON[n]))])}),
        captions(1, 2),
        {reasons.AMBIGUOUS: 1},
        {reasons.CAPTION_UNUSED: 3},
        column="text",
    ),
    "tar: cut behind a member": Case(
        "webdataset", put({"0.tar": cut_between_members(3)}), captions(0, 1, 2), {reasons.TRUNCATED: 1}
    ),
    "tar: cut between image and text": Case(
        "webdataset",
        put({"0.tar": tar(samples(2)[:3]).rstrip(b"\0") + bytes(512 - len(tar(samples(2)[:3]).rstrip(b"\0")) % 512)}),
        captions(0), {reasons.TRUNCATED: 1}
    ),
    "tar: no end marker": Case(
        "webdataset", put({"0.tar": tar(samples(3)).rstrip(b"\0")[:-9] + b"caption 2" + bytes(503)}),
        captions(0, 1, 2), {reasons.TRUNCATED: 1}
    ),
    "tar: cut within a member": Case(
        "webdataset", put({"0.tar": cut_between_members(4)[:-100]}), captions(0, 1, 2), {reasons.TRUNCATED: 1}
    ),
    "tar: packed, two in one file, none, another format": Case(
        "webdataset",
        put(
            {
                "0.TAR.gz": gzip.compress(tar(samples(1)) + tar(samples(2)[2:])),
                "1.tar": b"no archive" * 99,
                "2.tar": tar([]),
                "3.tar": tar(samples(3)[4:]) + b"behind the end",
                "0.zip": b"PK",
                "0_stats.json": "{}",
            }
        ),
        captions(0, 1, 2),
        {reasons.NO_ARCHIVE: 1, reasons.BEHIND_THE_END: 1},
        {reasons.NOTHING_IN_IT: 1, reasons.ARCHIVE: 1, reasons.OTHER: 1},
    ),
    "tar: of a Mac": Case(
        "webdataset",
        put({"0.tar": tar([m for name, data in samples(3) for m in ((f"./._{name}", MAC), (f"./{name}", data))])}),
        captions(0, 1, 2),
        unpaired={reasons.SYSTEM: 6},
    ),
    "tar: other members": Case(
        "webdataset",
        put(
            {
                "0.tar": tar(
                    [
                        *[(f"0.{suffix}", b"x") for suffix in ("cls", "json", "seg.png", "tar")],
                        *samples(1),
                        *samples(2, suffix="AVIF", text="TXT")[2:],
                        ("2.jpg", PNG[2]),
                        ("2.png", PNG[3]),
                        ("2.txt", b"caption 2"),
                        ("3.heic", b"x"),
                        ("3.txt", b"x"),
                        *samples(2, "v{}.0".format),
                        ("6.png", PNG[6]),
                        ("6.json", b"{"),
                        ("7.png", b""),
                        ("7.txt", b"x"),
                    ]
                )
            }
        ),
        captions(0, 1, 2),
        {
            reasons.ANOTHER_IMAGE: 1,
            reasons.FORMAT: 1,
            reasons.SEVERAL_DOTS: 2,
            reasons.BROKEN_JSON: 1,
            reasons.EMPTY_FILE: 1,
        },
        {reasons.OTHER: 1, reasons.ARCHIVE: 1, reasons.CAPTION_UNUSED: 1, reasons.SEVERAL_DOTS: 3},
    ),
    "tar: packed part by part": Case(
        "webdataset",
        put(
            {
                f"{number}.tar": b"".join(pack(part) for part in (whole[:700], whole[700:]))
                for number, pack in enumerate((gzip.compress, bz2.compress, lzma.compress))
                for whole in [tar(samples(3)[2 * number:][:2])]
            }
        ),
        captions(0, 1, 2),
    ),
    "tar: packed, with a wrong checksum, without one, with something behind it": Case(
        "webdataset",
        put(
            {
                "0.tar.gz": FLIPPED,
                "1.tar.gz": gzip.compress(tar(samples(4)[6:]))[:-8],
                "2.tar.gz": gzip.compress(tar(samples(5)[8:])[:-512]) + b"xx",
            }
        ),
        [*captions(0, 1, 3, 4), "option 2!"],
        {reasons.BEHIND_THE_END: 3},
    ),
    "tar: JSON in Latin-1": Case(
        "webdataset", put({"0.tar": tar([*samples(1), ("1.png", PNG[1]), ("1.json", '{"text": "\xe9"}'.encode("latin-1"))])}),
        captions(0), {reasons.ENCODING: 1}
    ),
    # --- Hugging Face
    "parquet and arrow: a caption in Latin-1": Case("hf", latin_1, captions(0, 2), {reasons.ENCODING: 1}),
    "arrow: a batch that is damaged": Case("hf", damaged_arrow, captions(0, 2), {reasons.UNREADABLE: 1}),
    "parquet: nulls, numbers, paths": Case(
        "hf",
        parquet(
            {
                "image": [
                    {"bytes": PNG[0], "path": "gone.png"}, None, {"bytes": None, "path": "1.png"}, {"bytes": b"", "path": None}
                ],
                "text": ["caption 0", "x", "caption 1", "x"],
            },
            more={"1.png": PNG[1], "old.arrow": b"x"},
        ),
        captions(0, 1),
        {reasons.NO_IMAGE: 1, reasons.EMPTY_FILE: 1},
        {reasons.OTHER: 2},
    ),
    "parquet: captions that are none": Case(
        "hf",
        parquet({"image": PNG[:2], "text": [["caption 0", None], None]}, "A.PARQUET"),
        captions(0),
        {reasons.NO_CAPTION: 1},
        lost={reasons.NO_CAPTION: 1},
    ),
    "parquet: damaged": Case("hf", damaged_parquet, captions(0, 1, 4, 5), {reasons.UNREADABLE: 3}),
    "saved dataset": Case(
        "hf", splits, captions(0), {reasons.NO_IMAGE: 1, reasons.EMPTY_FILE: 1, reasons.NO_COLUMN: 2}
    ),
    # --- those with tables of their own
    "coco": Case(
        "coco",
        coco,
        captions(0, 1),
        {reasons.NO_IMAGE: 2, reasons.NOT_TEXT: 1, reasons.SAME_ID: 1, reasons.UNREADABLE: 2, reasons.NO_CAPTION: 1},
        UNLISTED,
        lost={reasons.NO_CAPTION: 1},
    ),
    "cub": Case(
        "cub",
        cub,
        captions(1),
        {reasons.ENCODING: 1, reasons.NOT_LISTED: 1, reasons.BAD_LINE: 2},
        {reasons.NOT_LISTED: 1, reasons.OTHER_PART: 1, reasons.OTHER: 1},
    ),
    "conceptual": Case(
        "conceptual",
        joined(
            b"\xef\xbb\xbfcaption 0\t%b\ncaf\xe9\t%b\nno address\n\n%b\ta cat\tsleeping\n"
            % tuple(url(number).encode() for number in (0, 1, 4)),
            (0, 1, 2, 5),
            [("3.png", PNG[3]), ("._3.png", MAC), ("0.txt", b"x")],
            b_tsv_gz=b"x",
            **{"sub/c_tsv": f"caption 5\t{url(5)}\n".encode()},
        ),
        captions(0, 5),
        {reasons.ENCODING: 1, reasons.NOT_LISTED: 1, reasons.NO_URL: 1, reasons.NO_IMAGE: 1},
        {reasons.NO_URL: 1, reasons.FIELDS: 1, reasons.SYSTEM: 1, reasons.ARCHIVE: 1, reasons.CAPTION_UNUSED: 1},
        "table",
    ),
    "conceptual: images in the folder of the table": Case(
        "conceptual", pictures_inside, captions(0, 1), unpaired={reasons.OTHER: 1}, source="table"
    ),
    "wit": Case(
        "wit",
        joined(wit_lines(), (0, 1, 2)),
        ["caption 0", "caption 2"],
        {reasons.NOT_LISTED: 1},
        {reasons.OPEN_QUOTE: 1},
        "table",
    ),
    "yfcc": Case(
        "yfcc",
        joined(yfcc_lines(), (0, 1, 2)),
        ["caption 0", "I <3 5 > 4"],
        {reasons.ENCODING: 1},
        {reasons.FIELDS: 1},
        "table",
    ),
    "downloads as files": Case(
        "conceptual",
        downloads_as_files,
        captions(0),
        {reasons.BROKEN_JSON: 1, reasons.NO_IMAGE: 1, reasons.NO_URL: 1, reasons.ANOTHER_IMAGE: 1},
        {reasons.OTHER: 3},
        "table",
    ),
}  # fmt: skip


def options_of(case: Case, folder: Path) -> PrepareOptions:
    pictures_at = str(folder / "pictures") if case.source == "table" else ""
    return PrepareOptions(
        corpus=case.corpus,
        source=str(folder / case.source),
        pictures=pictures_at,
        caption_column=case.column,
        validation=0.0,  # type: ignore[arg-type]
    )


def counts(entries: dict[str, Dropped]) -> dict[str, int]:
    return {reason: entry.count for reason, entry in entries.items()}


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    (tmp_path / "source").mkdir()
    return tmp_path / "source"


@pytest.mark.parametrize("name", CASES)
def test_found_is_kept_and_dropped(folder: Path, tmp_path: Path, name: str) -> None:
    case = CASES[name]
    case.build(folder)
    report = prepare(options_of(case, folder), str(tmp_path / "whole"))
    dataset = PairDataset.open(tmp_path / "whole", "train")
    assert sorted(text for row in range(len(dataset)) for text in dataset.captions(row)) == sorted(case.kept)
    for row in range(len(dataset)):
        number = dataset.captions(row)[0].removeprefix("caption ")
        assert not number.isdecimal() or dataset.encoded(row) == PNG[int(number)], "a caption of another image"
    assert counts(report.dropped) == case.dropped and counts(report.unpaired) == case.unpaired
    assert report.captions_dropped == case.lost
    assert report.read == len(dataset) + sum(case.dropped.values())
    assert all(entry.examples for entry in (*report.dropped.values(), *report.unpaired.values()))
    assert all(report.caption_examples[reason] for reason in case.lost)
    parts = [prepare_part(options_of(case, folder), str(tmp_path / "parts"), part, 2) for part in (1, 0)]
    assert sum(part.pairs for part in parts) == report.read  # type: ignore[union-attr]
    merged = merge_parts(str(tmp_path / "parts"))
    assert (merged.dropped, merged.unpaired, merged.fingerprint) == (
        report.dropped,
        report.unpaired,
        report.fingerprint,
    )
    again = prepare(options_of(case, folder), str(tmp_path / "whole"))
    assert (again.already_there, again.unpaired) == (True, report.unpaired)


def test_what_is_told_survives_an_interruption_and_workers(
    folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from dalle_ds.data import processing

    case = CASES["folder: other files"]
    case.build(folder)
    whole = prepare(options_of(case, folder), str(tmp_path / "whole"), workers=2)
    process, left = processing.process_pair, iter(range(9))

    def interrupted(*arguments: Any, **options: Any) -> Any:
        if next(left, None) is None:
            raise KeyboardInterrupt
        return process(*arguments, **options)

    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(processing, "process_pair", interrupted)
        prepare(options_of(case, folder), str(tmp_path / "out"), parts=5)
    report = prepare(options_of(case, folder), str(tmp_path / "out"))
    assert (report.dropped, report.unpaired, report.fingerprint) == (whole.dropped, whole.unpaired, whole.fingerprint)


def test_a_hundred_thousand_members_of_no_pair_are_a_few_entries(folder: Path, tmp_path: Path) -> None:
    put({"0.tar": tar([*samples(1), *((f"{number}.cls", b"") for number in range(3000))])})(folder)
    done = prepare_part(PrepareOptions(corpus="webdataset", source=str(folder)), str(tmp_path / "out"), 0, 1)
    entries = sum(file["rows"] for file in json.loads((Path(done.folder) / "part.json").read_text())["files"])  # type: ignore[union-attr]
    report = merge_parts(str(tmp_path / "out"))
    assert (
        report.unpaired[reasons.OTHER] == Dropped(3000, [f"0.tar/{number}.cls" for number in range(5)]) and entries < 10
    )


@pytest.mark.parametrize("suffix", image_suffixes())
def test_every_suffix_that_the_decoder_reads_is_read(folder: Path, suffix: str) -> None:
    """By a folder, a tar and an evaluation, in any letter case."""
    number = image_suffixes().index(suffix)
    name = f"a{suffix.upper() if number % 2 else suffix}"
    put({name: PNG[0], "a.txt": "caption", "b.png": PNG[1], "../0.tar": tar([(name, PNG[0]), ("a.txt", b"caption")])})(
        folder
    )
    for corpus in (read_folder(str(folder)), read_webdataset(str(folder.with_name("0.tar")))):
        assert next(iter(corpus)).captions == ["caption"]  # type: ignore[union-attr]
    assert [path.name for path in ImageFolder(folder).paths] == [name, "b.png"]


def test_an_evaluation_tells_what_it_leaves_out(folder: Path) -> None:
    put({**pictures(2), "._0.png": MAC, "notes.md": "x", "a.heic": b"x", "sub.png/2.png": PNG[2]})(folder)
    found = ImageFolder(folder)
    assert [path.name for path in found.paths] == ["0.png", "1.png", "2.png"]
    assert len(found.notes) == 4
    for reason in (reasons.SYSTEM, reasons.OTHER, reasons.FORMAT, reasons.NOT_A_FILE):
        assert any(f"left out 1: {reason}, such as" in note for note in found.notes)
    assert all(any(name in note for note in found.notes) for name in ("._0.png", "notes.md", "a.heic", "sub.png"))


def test_a_folder_that_cannot_be_read_is_told(folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    put({**pictures(1), **texts(1), "closed/1.png": PNG[1]})(folder)
    scan = os.scandir

    def closed(path: Any) -> Any:
        if str(path).endswith("closed"):
            raise PermissionError(13, "Permission denied", str(path))
        return scan(path)

    monkeypatch.setattr(os, "scandir", closed)
    report = prepare(PrepareOptions(corpus="folder", source=str(folder), validation=0.0), str(tmp_path / "out"))
    assert report.unpaired == {reasons.NO_ENTRY: Dropped(1, ["closed"])} and report.kept["train"] == 1


EMPTY_TABLE = "file_name,text\n"


@pytest.mark.parametrize(
    ("corpus", "build", "told"),
    [
        ("folder", table("image,caption\nprefix/0.png,x\n", 1), ["no image (1)", "prefix/0.png", "line 2"]),
        ("folder", table(EMPTY_TABLE, 1), [reasons.NOTHING_IN_IT, "a.csv", "not in the table (1)", "0.png"]),
        ("folder", table("", 0), [reasons.NOTHING_IN_IT, "a.csv"]),
        (
            "folder",
            put({"i/0.png": PNG[0], "c/0.txt": "x"}),
            ["no image (1)", "c/0.txt", "no caption (1)", "i/0.png"],
        ),
        ("folder", put({**pictures(1), "a.json1": "x"}), ["a.json1", ".jsonl", "NAME.txt"]),
        ("webdataset", put({"0.tar": tar([])}), [reasons.NOTHING_IN_IT, "0.tar"]),
        ("webdataset", put({"0.tar": b""}), ["0.tar"]),
        ("hf", parquet({"image": [], "text": []}), [reasons.NOTHING_IN_IT, "a.parquet"]),
        (
            "hf",
            parquet({"image": PNG[:2], "words": ["a", "b"]}),
            [f"{reasons.NO_COLUMN} (2)", "words", "--caption_column"],
        ),
        ("folder", put({"0.png": b"x", "0.txt": "y"}), [f"{reasons.UNDECODABLE} (1)", "0.png"]),
        ("folder", put({**pictures(1), "0.txt": " "}), [f"{reasons.EMPTY} (1)", "0.png"]),
    ],
)
def test_where_nothing_is_kept_the_error_has_counts_and_examples(
    folder: Path, tmp_path: Path, corpus: Any, build: Callable[[Path], None], told: list[str]
) -> None:
    build(folder)
    with pytest.raises(NothingKept) as error:
        prepare(PrepareOptions(corpus=corpus, source=str(folder)), str(tmp_path / "out"))
    assert all(word in str(error.value) for word in told), str(error.value)


@pytest.mark.parametrize(
    ("text", "told"),
    [
        ("file_name,text,text\n0.png,a,b\n", ["'text'", "twice"]),
        (CSV.encode("utf-16-le"), ["heading", "a.csv", reasons.ENCODING]),
        ("0.png,a cat\n", ["a.csv", "0.png", "--image_column"]),
    ],
)
def test_a_table_that_is_wrong_as_a_whole_is_named(folder: Path, tmp_path: Path, text: Any, told: list[str]) -> None:
    table(text)(folder)
    with pytest.raises(DataError) as error:
        prepare(PrepareOptions(corpus="folder", source=str(folder)), str(tmp_path / "out"))
    assert all(word in str(error.value) for word in told), str(error.value)


def test_a_home_that_cannot_be_written_to_costs_nothing(
    folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Files are read without the cache of `datasets`, which lies there."""
    parquet({"image": PNG[:3], "text": captions(0, 1, 2)})(folder)
    arrow = pa.table({"image": PNG[3:5], "text": captions(3, 4)})
    for name, write in (("file", pa.ipc.new_file), ("stream", pa.ipc.new_stream)):
        (folder.with_name(name)).mkdir()
        with write(str(folder.with_name(name) / "a.arrow"), arrow.schema) as writer:
            writer.write_table(arrow)
    monkeypatch.setattr(datasets, "load_dataset", None)
    for source, kept in (("source", 3), ("file", 2), ("stream", 2)):
        options = PrepareOptions(corpus="hf", source=str(folder.with_name(source)), validation=0.0)
        assert prepare(options, str(tmp_path / f"{source}.out")).kept["train"] == kept


def test_the_report_shows_what_was_found_and_what_belongs_to_no_pair() -> None:
    from rich.console import Console

    report = PreparationReport("x", kept={"train": 7})
    report.drop("a reason", "one", 2)
    report.drop("another", "[two]", 3, unpaired=True)
    console = Console(record=True, width=100, file=io.StringIO())
    console.print(report)
    lines = [line.split("│")[1:4] for line in console.export_text().splitlines() if "│" in line]
    cells = [[cell.strip() for cell in line] for line in lines]
    assert ["found", "9", ""] in cells and ["belongs to no pair: another", "3", "[two]"] in cells
