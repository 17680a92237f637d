"""Preparation in parts: the merged folder is the one of a preparation in one go, and nothing half-done is taken for good."""

from __future__ import annotations

import errno
import json
import os
import shutil
import subprocess
import sys
import tarfile
from pathlib import Path

import datasets
import pyarrow as pa
import pytest

from dalle_ds.data import parts, store_writer
from dalle_ds.data.corpora import Broken, Corpus, Unit, read_webdataset, twemoji
from dalle_ds.data.filters import FilterOptions
from dalle_ds.data.parts import PartReport
from dalle_ds.data.prepare import PrepareOptions, merge_parts, prepare, prepare_part
from dalle_ds.data.report import PreparationReport
from dalle_ds.errors import ConfigError, DataError
from tests.data.conftest import picture_bytes
from tests.data.test_prepare import all_files, contents

ROOT = Path(__file__).resolve().parents[2]


def fill(folder: Path, first: int, count: int) -> None:
    """Pairs of every kind: good, equal images, equal pairs, broken, without captions, cut, boilerplate."""
    for number in range(first, first + count):
        stem = folder / f"{number:03d}"
        stem.with_suffix(".png").write_bytes(
            b"broken" if number % 7 == 3 else picture_bytes(number % 9, (40, 90 if number % 5 == 4 else 40))
        )
        caption = ["an image", f"image {number}\nshot on 4 March 2012", "", "word " * 300][number % 4]
        if number % 11:
            stem.with_suffix(".txt").write_text(caption)


@pytest.fixture(scope="module")
def sources(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """A corpus of each kind with the same sort of contents."""
    place = tmp_path_factory.mktemp("sources")
    folder = place / "folder"
    folder.mkdir()
    fill(folder, 0, 44)
    tars = place / "webdataset"
    tars.mkdir()
    for number in range(5):
        samples = place / f"samples{number}"
        samples.mkdir()
        fill(samples, 10 * number, 10)
        with tarfile.open(tars / f"{number}.tar", "w") as tar:
            for path in sorted(samples.iterdir()):
                tar.add(path, path.name)
    last = tars / "3.tar"
    last.write_bytes(last.read_bytes()[:9000])
    rows = {
        "image": [path.read_bytes() for path in sorted(folder.glob("*.png"))],
        "text": [f"an image of {number % 6}" for number in range(44)],
    }
    datasets.Dataset.from_dict(rows).save_to_disk(str(place / "hf"))
    table = place / "table"
    table.mkdir()
    lines = [{"file_name": f"../folder/{number:03d}.png", "caption": f"row {number % 8}"} for number in range(50)]
    (table / "a.jsonl").write_text("\n".join([*map(json.dumps, lines), "{broken"]))
    return {"folder": folder, "webdataset": tars, "hf": place / "hf", "table": table}


def options_for(sources: dict[str, Path], kind: str, **changes) -> PrepareOptions:
    corpus = "folder" if kind == "table" else kind
    return PrepareOptions(corpus=corpus, source=str(sources[kind]), **changes)


@pytest.mark.parametrize(
    ("kind", "count"), [("folder", 3), ("folder", 1), ("webdataset", 2), ("webdataset", 7), ("hf", 4), ("table", 5)]
)
def test_merged_parts_are_the_preparation_byte_for_byte(
    sources: dict[str, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, kind: str, count: int
) -> None:
    monkeypatch.setattr(store_writer, "_BATCH_ROWS", 4)
    monkeypatch.setattr(store_writer, "_FILE_BYTES", 5000)
    options = options_for(sources, kind, validation=0.2, shrink=32)
    whole = prepare(options, str(tmp_path / "whole"))
    assert len(whole.dropped) >= 2 and sum(whole.kept.values()) > 4
    reports = [prepare_part(options, str(tmp_path / "out"), number, count) for number in reversed(range(count))]
    assert all(isinstance(report, PartReport) for report in reports)
    assert sum(report.pairs for report in reports if isinstance(report, PartReport)) == whole.read
    merged = merge_parts(str(tmp_path / "out"))
    assert all_files(tmp_path / "out") == all_files(tmp_path / "whole")
    assert (merged.fingerprint, merged.dropped) == (whole.fingerprint, whole.dropped)
    assert not (tmp_path / "out.parts").exists()


@pytest.mark.parametrize(("units", "count"), [(10, 3), (3, 5), (0, 1), (7, 7)])
def test_a_division_gives_every_unit_to_one_part_in_order(units: int, count: int) -> None:
    corpus = Corpus(lambda: (Unit.of(Broken(str(number), "x")) for number in range(units)), units_per_part=4)
    division = parts.Division.of(corpus, count)
    found = [[number for number, _ in division.units_of(corpus, [part])] for part in range(count)]
    assert [number for part in found for number in part] == list(range(units))
    assert max(map(len, found)) - min(map(len, found)) <= 1
    assert [number for number, _ in division.units_of(corpus, range(count)[1::2])] == [
        n for part in found[1::2] for n in part
    ]
    assert parts.Division.of(corpus, None).parts == max(1, -(-units // 4))


def test_files_beside_archives_are_no_share_of_the_work(sources: dict[str, Path], tmp_path: Path) -> None:
    """What img2dataset leaves beside them would otherwise be half of the jobs."""
    folder = Path(shutil.copytree(sources["webdataset"], tmp_path / "tars"))
    for number in range(20):
        (folder / f"{number}_stats.json").write_text("{}")
    corpus = read_webdataset(str(folder))
    assert [unit.name for unit in corpus.units()] == [*(f"{number}.tar" for number in range(5)), "other files"]
    assert parts.Division.of(corpus, None).parts == 6


def test_twemoji_with_its_groups_and_variants_in_parts(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    people = twemoji.emoji_images()[1300:1800]
    monkeypatch.setattr(twemoji, "emoji_images", lambda: people)
    options = PrepareOptions(corpus="twemoji", filters=FilterOptions(max_caption_chars=30))
    whole = prepare(options, str(tmp_path / "whole"))
    for number in range(2):
        prepare_part(options, str(tmp_path / "out"), number, 2)
    assert merge_parts(str(tmp_path / "out"), 2, options=options).fingerprint == whole.fingerprint
    assert min(whole.kept.values()) > 0 and "compositional" in whole.kept
    assert contents(tmp_path / "out") == contents(tmp_path / "whole")


@pytest.fixture
def two_parts(sources: dict[str, Path], tmp_path: Path) -> Path:
    """OUT with its two parts."""
    for number in range(2):
        prepare_part(options_for(sources, "folder"), str(tmp_path / "out"), number, 2)
    return tmp_path / "out"


def test_missing_parts_are_named(sources: dict[str, Path], two_parts: Path) -> None:
    with pytest.raises(
        DataError, match=r"^2 of 4 parts are missing from .*out\.parts \(2, 3\): prepare them with --part"
    ):
        prepare_part(options_for(sources, "folder"), str(two_parts), 0, 4)
        prepare_part(options_for(sources, "folder"), str(two_parts), 1, 4)
        merge_parts(str(two_parts), 4)
    with pytest.raises(DataError, match=r"has parts of several divisions \(2, 4\): say which with --parts N"):
        merge_parts(str(two_parts))
    assert merge_parts(str(two_parts), 2).kept
    with pytest.raises(DataError, match="has no parts to merge: prepare them with --part I --parts N"):
        merge_parts(str(two_parts.with_name("nothing")))


@pytest.mark.parametrize("damage", ["flipped", "truncated", "deleted", "no manifest", "broken manifest"])
def test_damaged_parts_are_not_merged(two_parts: Path, damage: str) -> None:
    part = two_parts.with_name("out.parts") / "00001-of-00002"
    path = next(part.rglob("*.arrow")) if "manifest" not in damage else part / "part.json"
    content = bytearray(path.read_bytes())
    content[len(content) // 2] ^= 1
    if damage in ("deleted", "no manifest"):
        path.unlink()
    elif damage == "broken manifest":
        path.write_text("{")
    else:
        path.write_bytes(content if damage == "flipped" else content[:-10])
    with pytest.raises(DataError, match=r"part 1 again with --overwrite|no readable part\.json"):
        merge_parts(str(two_parts))
    assert not two_parts.exists() and part.exists()


def test_a_part_under_the_name_of_another_is_not_merged(two_parts: Path) -> None:
    folder = two_parts.with_name("out.parts")
    shutil.rmtree(folder / "00001-of-00002")
    shutil.copytree(folder / "00000-of-00002", folder / "00001-of-00002")
    with pytest.raises(DataError, match=r"00001-of-00002 has the files of part 0 of 2: give it its own name"):
        merge_parts(str(two_parts))
    assert not two_parts.exists()


def test_a_part_that_a_job_is_doing_is_not_merged(two_parts: Path) -> None:
    ready, done = os.pipe(), os.pipe()
    if not (job := os.fork()):
        try:
            with parts.Parts(two_parts).only_job(1, 2):
                os.write(ready[1], b"x")
                os.read(done[0], 1)
        finally:
            os._exit(0)
    os.read(ready[0], 1)
    with pytest.raises(DataError, match=f"is being made by process {job} on"):
        merge_parts(str(two_parts))
    os.write(done[1], b"x")
    os.waitpid(job, 0)
    assert merge_parts(str(two_parts)).kept


def test_parts_of_another_division_are_left(sources: dict[str, Path], two_parts: Path) -> None:
    prepare_part(options_for(sources, "folder"), str(two_parts), 0, 4)
    merge_parts(str(two_parts), 2)
    assert [path.name for path in two_parts.with_name("out.parts").iterdir()] == ["00000-of-00004"]


def test_parts_that_the_disk_does_not_deliver_are_named(two_parts: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def unreadable(path: Path) -> str:
        raise OSError(errno.EIO, "Input/output error")

    monkeypatch.setattr(parts, "digest_of", unreadable)
    with pytest.raises(DataError, match=r"out\.parts/0000[01]-of-00002/files/.*\.arrow cannot be read: Input/output"):
        merge_parts(str(two_parts))


def test_a_merge_that_is_ended_while_it_removes_the_parts_is_done(
    two_parts: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    remove = shutil.rmtree

    def ended(folder: Path, **options: bool) -> None:
        if "parts" in folder.name and folder.exists():
            remove(folder / "00000-of-00002")
            raise KeyboardInterrupt
        remove(folder, **options)

    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(shutil, "rmtree", ended)
        merge_parts(str(two_parts))
    again = merge_parts(str(two_parts))
    assert again.already_there and [path.name for path in two_parts.parent.iterdir()] == ["out"]


def test_long_captions_fill_record_batches_as_pictures_do(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    corpus = tmp_path / "corpus"
    corpus.mkdir()
    for number in range(6):
        (corpus / f"{number}.png").write_bytes(picture_bytes(number))
        (corpus / f"{number}.txt").write_text(f"{number} " + "\n".join(f"{n} " + "word " * 150 for n in range(20)))
    monkeypatch.setattr(store_writer, "_BATCH_BYTES", 12_000)
    options = PrepareOptions(corpus="folder", source=str(corpus), validation=0.0)
    prepare_part(options, str(tmp_path / "out"), 0, 1)
    prepare(options, str(tmp_path / "whole"))
    for folder in (tmp_path / "out.parts/00000-of-00001", tmp_path / "whole/train"):
        with pa.ipc.open_stream(next(folder.rglob("data-00000.arrow"))) as batches:
            assert max(len(batch) for batch in batches) == 1


def test_parts_that_do_not_belong_together(sources: dict[str, Path], two_parts: Path) -> None:
    other = options_for(sources, "folder", validation=0.5)
    with pytest.raises(
        DataError, match=r"is part of another preparation \(different: validation\): give --overwrite True"
    ):
        prepare_part(other, str(two_parts), 1, 2)
    prepare_part(other, str(two_parts), 1, 2, overwrite=True)
    with pytest.raises(DataError, match=r"with other options than part 0 \(different: validation\)"):
        merge_parts(str(two_parts))
    with pytest.raises(DataError, match="were prepared with other options: leave --corpus"):
        prepare_part(other, str(two_parts), 0, 2, overwrite=True)
        merge_parts(str(two_parts), options=options_for(sources, "folder"))


def test_a_corpus_that_changes_between_parts_is_noticed(sources: dict[str, Path], tmp_path: Path) -> None:
    corpus = Path(shutil.copytree(sources["folder"], tmp_path / "corpus"))
    options = PrepareOptions(corpus="folder", source=str(corpus))
    prepare_part(options, str(tmp_path / "out"), 0, 2)
    (corpus / "001.png").rename(corpus / "900.png")
    prepare_part(options, str(tmp_path / "out"), 1, 2)
    with pytest.raises(DataError, match=r"the corpus was another one when .*00001-of-00002 was prepared"):
        merge_parts(str(tmp_path / "out"))


def test_what_is_done_is_not_done_again(sources: dict[str, Path], two_parts: Path) -> None:
    options = options_for(sources, "folder")
    again = prepare_part(options, str(two_parts), 1, 2)
    assert isinstance(again, PartReport) and again.already_there
    merge_parts(str(two_parts))
    before = all_files(two_parts)
    for report in (merge_parts(str(two_parts)), prepare_part(options, str(two_parts), 0, 2)):
        assert isinstance(report, PreparationReport) and report.already_there
    with pytest.raises(DataError, match=r"holds another preparation \(different: seed\)"):
        prepare_part(options_for(sources, "folder", seed=1), str(two_parts), 0, 2)
    assert all_files(two_parts) == before and not two_parts.with_name("out.parts").exists()


@pytest.mark.parametrize(("number", "count"), [(2, 2), (-1, 2), (0, 0)])
def test_parts_that_there_are_not(sources: dict[str, Path], tmp_path: Path, number: int, count: int) -> None:
    with pytest.raises(ConfigError, match=r"part must lie in \[0, parts\)"):
        prepare_part(options_for(sources, "folder"), str(tmp_path / "out"), number, count)


def test_jobs_side_by_side_one_killed_and_started_again(sources: dict[str, Path], tmp_path: Path) -> None:
    """As a job array runs it: the command, several at a time, and one that dies in the midst of its work."""
    out = tmp_path / "out"
    slow = (
        "import sys, time\n"
        "from dalle_ds.data import store_writer\n"
        "from dalle_ds.data.prepare import PrepareOptions, prepare_part\n"
        "add = store_writer.StoreWriter.add\n"
        "def slowly(*arguments):\n"
        "    add(*arguments); print('added', flush=True); time.sleep(600)\n"
        "store_writer.StoreWriter.add = slowly\n"
        f"prepare_part(PrepareOptions(corpus='folder', source={str(sources['folder'])!r}), {str(out)!r}, 0, 2)\n"
    )
    killed = subprocess.Popen([sys.executable, "-c", slow], stdout=subprocess.PIPE, text=True, cwd=ROOT)
    assert killed.stdout is not None and killed.stdout.readline() == "added\n"
    command = [sys.executable, "launchers/prepare_data.py", "--out", str(out)]
    source = ["--corpus", "folder", "--source", str(sources["folder"])]
    beside = subprocess.run(
        [*command, *source, "--part", "1", "--parts", "2"], cwd=ROOT, capture_output=True, check=False
    )
    assert beside.returncode == 0, beside.stderr
    killed.kill()
    killed.wait()
    with pytest.raises(DataError, match="1 of 2 parts are missing"):
        merge_parts(str(out))
    prepare_part(options_for(sources, "folder"), str(out), 0, 2)
    merge_parts(str(out))
    prepare(options_for(sources, "folder"), str(tmp_path / "whole"))
    assert all_files(out) == all_files(tmp_path / "whole")
    assert sorted(path.name for path in tmp_path.iterdir()) == ["out", "whole"], "and what was half done is gone"


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--part", "1"], "part needs parts"),
        (["--parts", "0"], "parts must be greater than 0"),
        (["--part", "0", "--parts", "2", "--merge", "True"], "goes neither with merge"),
        (["--part", "0", "--parts", "2", "--cache_codes", "x"], "nor with cache_codes"),
        (["--engine", "ray", "--part", "0", "--parts", "2"], "neither part nor merge"),
        (["--engine", "ray", "--merge", "True"], "neither part nor merge"),
    ],
)
def test_commands_that_cannot_be_meant(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, arguments: list[str], message: str
) -> None:
    from dalle_ds.commands import prepare_data

    source = ["--corpus", "folder", "--source", "x", "--out", str(tmp_path / "out")]
    monkeypatch.setattr(sys, "argv", ["prepare_data.py", *source, *arguments])
    with pytest.raises(ConfigError, match=message):
        prepare_data()
