"""Sources made to harm: bombs, archives that point elsewhere, files that never end, captions without an end."""

from __future__ import annotations

import gzip
import io
import json
import lzma
import os
import subprocess
import sys
import tarfile
from pathlib import Path

import numpy as np
import pytest

from dalle_ds.data.corpora import Broken, RawPair, files, read_folder, read_webdataset
from dalle_ds.data.dataset import PairDataset
from dalle_ds.data.images import decode_image
from dalle_ds.data.prepare import PrepareOptions, prepare
from dalle_ds.errors import DataError
from tests.data.conftest import picture_bytes

ROOT = Path(__file__).resolve().parents[2]
PNG = picture_bytes(0)


def reasons(pairs) -> list[str]:
    return [pair.reason if isinstance(pair, Broken) else pair.captions[0] for pair in pairs]


# --- bombs ----------------------------------------------------------------------------------------------------------


@pytest.mark.slow
def test_bombs_are_refused_without_the_memory_they_ask_for(tmp_path: Path) -> None:
    result = subprocess.run(
        [sys.executable, "-m", "tests.data.bombs", str(tmp_path)],
        cwd=ROOT, capture_output=True, text=True, timeout=120, check=False,
    )  # fmt: skip
    assert result.returncode == 0, result.stderr[-2000:]
    told = json.loads(result.stdout)
    found = told["found"]
    harmless = {"png with more than its pixels": "(4, 4, 3)"}  # what follows the pixels is not read
    tars = {
        "a huge image in a tar": "['truncated archive']",
        "a huge caption in a tar": "['truncated archive']",
        "a huge name in a tar": "['truncated archive']",
        "a huge pax header in a tar": "['truncated archive']",
        "something huge that is no sample": "['file that is not read', 'truncated archive']",
        "many members of a sample that are not used": "['file that is not read', 'truncated archive']",
        "a hundred thousand members": "['truncated archive']",
        "a table of bombs": "['broken JSON', 'line too long', 'broken JSON', 'kept']",
    }
    assert found.items() >= (harmless | tars).items()
    pictures = found.keys() - harmless.keys() - tars.keys()
    assert len(pictures) == 11 and all(found[name].startswith("DataError: image ") for name in pictures)
    assert told["grown_mib"] < 80, "each asks for 96 MiB to 10 GB"


def test_formats_that_start_other_programs_are_no_pictures() -> None:
    for content in (
        b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 9 9\n%%EndComments\n",
        b"%PDF-1.4\n",
        b"8BPS" + bytes(99),
    ):
        with pytest.raises(DataError, match="none of the known formats"):
            decode_image(content)


# --- archives -------------------------------------------------------------------------------------------------------


def member(name: str, kind: bytes, target: str = "", size: int = 0) -> tarfile.TarInfo:
    info = tarfile.TarInfo(name)
    info.type, info.linkname, info.size = kind, target, size
    return info


def test_archives_are_read_and_never_unpacked(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Names that lead outside, links, devices and pipes: nothing is made, nothing else is opened."""
    inside = tmp_path / "inside"
    inside.mkdir()
    monkeypatch.chdir(inside)
    secret = tmp_path / "secret.txt"
    secret.write_text("a secret")
    with tarfile.open(tmp_path / "evil.tar", "w") as tar:
        for name in ("../../outside", "/tmp/absolute", "good"):
            for suffix, content in ((".png", PNG), (".txt", f"an image named {name}".encode())):
                tar.addfile(member(name + suffix, tarfile.REGTYPE, size=len(content)), io.BytesIO(content))
        for name, kind, target in (
            ("link", tarfile.SYMTYPE, str(secret)),
            ("hard", tarfile.LNKTYPE, str(secret)),
            ("device", tarfile.CHRTYPE, ""),
            ("disk", tarfile.BLKTYPE, ""),
            ("pipe", tarfile.FIFOTYPE, ""),
            ("folder", tarfile.DIRTYPE, ""),
        ):
            tar.addfile(member(f"{name}.png", tarfile.REGTYPE, size=len(PNG)), io.BytesIO(PNG))
            tar.addfile(member(f"{name}.txt", kind, target))
    before = sorted(str(path) for path in tmp_path.rglob("*"))
    found = reasons(read_webdataset(str(tmp_path / "evil.tar")))
    assert found[:3] == ["an image named ../../outside", "an image named /tmp/absolute", "an image named good"]
    assert sorted(found[3:]) == ["no caption"] * 6 + ["not a regular file"] * 5, "links and devices are told"
    assert sorted(str(path) for path in tmp_path.rglob("*")) == before
    assert not Path("/tmp/absolute.png").exists()


@pytest.mark.parametrize("wrap", [bytes, gzip.compress, lzma.compress], ids=["tar", "gz", "xz"])
def test_damage_anywhere_in_an_archive_is_counted_and_never_crashes(tmp_path: Path, wrap) -> None:
    buffer = io.BytesIO()
    with tarfile.open(fileobj=buffer, mode="w", format=tarfile.PAX_FORMAT) as tar:
        for number in range(4):
            for suffix, content in ((".png", PNG), (".txt", f"caption {number} ü".encode())):
                info = member(f"sample{number}ü{suffix}", tarfile.REGTYPE, size=len(content))
                tar.addfile(info, io.BytesIO(content))
    whole, path, rng = wrap(buffer.getvalue()), tmp_path / "a.tar", np.random.default_rng(0)
    path.write_bytes(whole)
    assert reasons(read_webdataset(str(path))) == [f"caption {number} ü" for number in range(4)]
    lost = 0
    for _ in range(150):
        damaged = bytearray(whole)
        damaged[int(rng.integers(len(whole)))] ^= int(rng.integers(1, 256))
        path.write_bytes(damaged)
        found = list(read_webdataset(str(path)))
        lost += len([pair for pair in found if isinstance(pair, RawPair)]) < 4
        if len(found) < 3:
            assert any(isinstance(pair, Broken) for pair in found), "rows are lost and nothing is said"
    assert lost > 10


def test_a_damaged_header_is_not_the_end_of_the_archive(tmp_path: Path) -> None:
    """tarfile stops there as if all was read."""
    path = tmp_path / "a.tar"
    with tarfile.open(path, "w") as tar:
        for number in range(3):
            for suffix, content in ((".png", PNG), (".txt", b"caption")):
                tar.addfile(member(f"{number}{suffix}", tarfile.REGTYPE, size=len(content)), io.BytesIO(content))
    content = bytearray(path.read_bytes())
    content[content.index(b"2.png") + 150] ^= 1  # its checksum
    path.write_bytes(content)
    # tarfile does not tell where the sample before it ends.
    assert reasons(read_webdataset(str(path))) == ["caption", "truncated archive"]


# --- files ----------------------------------------------------------------------------------------------------------


def test_only_regular_files_are_opened(tmp_path: Path) -> None:
    """A pipe would be waited for, and a device read, for ever."""
    os.mkfifo(tmp_path / "pipe.png")
    (tmp_path / "device.png").symlink_to("/dev/zero")
    (tmp_path / "folder.png").mkdir()
    (tmp_path / "linked.png").symlink_to(tmp_path / "good.png")
    (tmp_path / "good.png").write_bytes(PNG)
    (tmp_path / "dangling.png").symlink_to(tmp_path / "nothing")
    for path in list(tmp_path.glob("*.png")):
        path.with_suffix(".txt").write_text(path.stem)
    os.mkfifo(tmp_path / "text.fifo")
    (tmp_path / "words.png").write_bytes(PNG)
    (tmp_path / "words.txt").symlink_to(tmp_path / "text.fifo")
    found = {pair.name: reasons([pair])[0] for pair in read_folder(str(tmp_path))}
    assert found == {
        "pipe.png": "not a regular file", "device.png": "not a regular file", "folder.png": "not a regular file",
        "linked.png": "linked", "good.png": "good", "dangling.png": "link to nothing", "words.png": "not a regular file",
        "text.fifo": "file that is not read",
    }  # fmt: skip
    names = ["pipe.png", "/dev/zero", "good.png", "good\0.png", "/dev/stdin"]
    table = [json.dumps({"file_name": name, "caption": "from a table"}) for name in names]
    (tmp_path / "a.jsonl").write_text("\n".join(table))
    assert reasons(read_folder(str(tmp_path)))[: len(names)] == [
        "not a regular file", "not a regular file", "from a table", "unreadable source", "not a regular file",
    ]  # fmt: skip


def test_files_that_are_too_big(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(files, "MAX_IMAGE_BYTES", len(PNG))
    monkeypatch.setattr(files, "MAX_TEXT_BYTES", 20)
    for name, picture, text in (
        ("a", PNG, "twenty letters long!"), ("b", PNG + b"1", "x"), ("c", PNG, "twenty letters long!!"),
    ):  # fmt: skip
        (tmp_path / f"{name}.png").write_bytes(picture)
        (tmp_path / f"{name}.txt").write_text(text)
    with tarfile.open(tmp_path / "a.tar", "w", format=tarfile.GNU_FORMAT) as tar:
        for path in sorted(tmp_path.glob("*.[pt][nx]*")):
            tar.add(path, path.name)
    expected = ["twenty letters long!", "file too big", "file too big"]
    assert reasons(read_webdataset(str(tmp_path / "a.tar"))) == expected
    assert reasons(read_folder(str(tmp_path))) == [expected[0], "archive that is not opened", *expected[1:]]


# --- captions -------------------------------------------------------------------------------------------------------


def test_captions_without_an_end(tmp_path: Path) -> None:
    """Cut like other long ones, in no more time than a short one takes; lines that are no captions are counted."""
    corpus = tmp_path / "corpus"
    corpus.mkdir()
    (corpus / "a.png").write_bytes(PNG)
    words = "word " * 200_000
    (corpus / "a.jsonl").write_text(
        "\n".join(
            [
                json.dumps({"file_name": "a.png", "caption": words}),
                json.dumps({"file_name": "a.png", "caption": "\u0301" * 300_000}, ensure_ascii=False),
                json.dumps({"file_name": "a.png", "caption": words * 2}),
                json.dumps({"file_name": "a.png", "caption": "short"}),
            ]
        )
    )
    options = PrepareOptions(corpus="folder", source=str(corpus), validation=0.0)
    report = prepare(options, str(tmp_path / "out"))
    dataset = PairDataset.open(tmp_path / "out", "train")
    lengths = [len(dataset.captions(row)[0]) for row in range(len(dataset))]
    assert (lengths, report.captions_cut) == ([999, 1000, 5], 2)
    assert {reason: entry.count for reason, entry in report.dropped.items()} == {"line too long": 1}


def test_a_table_goes_on_after_a_field_without_an_end(tmp_path: Path) -> None:
    (tmp_path / "a.png").write_bytes(PNG)
    lines = ["file_name,caption", "a.png,first", 'a.png,"' + "x" * 2_000_000 + '"', "a.png,last", 'a.png,"never closed']
    (tmp_path / "a.csv").write_text("\n".join([*lines, *["more and more and more"] * 60_000]))
    found = reasons(read_folder(str(tmp_path)))
    assert found[:4] == ["first", "line too long", "last", "open or misplaced quote"]
    assert found[4:] == ["no image"] * 60_000, "what the open quote swallowed are rows by themselves"


def test_json_that_no_parser_likes(tmp_path: Path) -> None:
    with tarfile.open(tmp_path / "a.tar", "w") as tar:
        for number, text in enumerate(
            ("[" * 100_000, '{"text": ' + "1" * 10_000 + "}", '{"text": "good"}', "{", '"\\ud800"')
        ):
            for suffix, content in ((".png", PNG), (".json", text.encode())):
                tar.addfile(member(f"{number}{suffix}", tarfile.REGTYPE, size=len(content)), io.BytesIO(content))
    found = reasons(read_webdataset(str(tmp_path)))
    assert found == ["broken JSON", "broken JSON", "good", "broken JSON", "no caption"]


def test_damage_in_a_saved_dataset_is_counted_and_never_crashes(tmp_path: Path) -> None:
    """Arrow follows offsets without looking: read in a process of its own."""
    script = (
        "import sys, datasets, numpy as np\n"
        "from pathlib import Path\n"
        "from dalle_ds.data.corpora import RawPair, read_hf\n"
        "from dalle_ds.errors import DataError\n"
        f"place = Path({str(tmp_path / 'hf')!r})\n"
        "rows = {'image': [b'picture %d' % n for n in range(9)], 'text': [f'caption {n}' for n in range(9)]}\n"
        "datasets.Dataset.from_dict(rows).save_to_disk(str(place))\n"
        "shard = next(place.glob('*.arrow'))\n"
        "whole, offsets = shard.read_bytes(), np.arange(10, dtype=np.int32) * 9\n"
        "at = whole.index(offsets.tobytes())\n"
        "kept = []\n"
        "for position in range(at, at + 40):\n"
        "    damaged = bytearray(whole); damaged[position] ^= 0x70; shard.unlink(); shard.write_bytes(damaged)\n"
        "    kept.append(sum(isinstance(pair, RawPair) for pair in read_hf(str(place))))\n"
        "print(len(kept), min(kept) < 9)\n"
    )
    result = subprocess.run([sys.executable, "-c", script], cwd=ROOT, capture_output=True, text=True, check=False)
    assert (result.returncode, result.stdout) == (0, "40 True\n"), result.stderr[-2000:]
