"""Shards that are missing, cut off, damaged or exchanged: what is lost, what is said, and what ends a run."""

from __future__ import annotations

import errno
import json
import os
import re
import shutil
import subprocess
import sys
from itertools import islice
from pathlib import Path

import numpy as np
import pytest
import xxhash

from dalle_ds.config import LoaderConfig
from dalle_ds.data import BatchLoader, DvaeSamples, PairDataset, store_writer
from dalle_ds.data import store as store_module
from dalle_ds.data.faults import DAMAGED_FILE, MISSING_FILE, TRUNCATED_FILE, BadSampleBudget, Fault, FaultLog, RowError
from dalle_ds.data.prepare import PrepareOptions, prepare
from dalle_ds.errors import ConfigError, DataChangedError, DataError
from dalle_ds.files import digest_of
from tests.data.conftest import picture_bytes
from tests.data.flip_worker import rows_of

ROOT = Path(__file__).resolve().parents[2]


@pytest.fixture(scope="module")
def in_files(folder_corpus: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Thirty pairs in six files or so, of several record batches each."""
    out = tmp_path_factory.mktemp("in_files") / "data"
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(store_writer, "_FILE_BYTES", 20_000)
        patch.setattr(store_writer, "_BATCH_ROWS", 2)
        prepare(PrepareOptions(corpus="folder", source=str(folder_corpus), validation=0.0), str(out))
    return out


@pytest.fixture
def data(in_files: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(in_files, tmp_path / "data"))


def files_of(data: Path, split: str = "train") -> list[dict]:
    return json.loads((data / "info.json").read_text())["shards"][split]


def rows_of_file(data: Path, number: int) -> set[int]:
    """The row numbers of a file."""
    files = files_of(data)
    first = sum(entry["rows"] for entry in files[:number])
    return set(range(first, first + files[number]["rows"]))


def test_info_tells_rows_size_and_digest_of_every_file(in_files: Path) -> None:
    files = files_of(in_files)
    assert len(files) >= 4 and sum(entry["rows"] for entry in files) == 30
    for entry in files:
        path = in_files / "train" / entry["file"]
        assert (entry["bytes"], entry["xxh3_128"]) == (path.stat().st_size, digest_of(path))
        assert entry["xxh3_128"] == xxhash.xxh3_128_hexdigest(path.read_bytes())


@pytest.mark.parametrize(
    ("damage", "reason"),
    [("missing", MISSING_FILE), ("truncated", TRUNCATED_FILE), ("empty", TRUNCATED_FILE), ("folder", None)],
)
def test_a_lost_file_costs_its_rows_and_moves_no_others(data: Path, damage: str, reason: str | None) -> None:
    whole = rows_of(data, "train")
    path = data / "train" / files_of(data)[1]["file"]
    content = path.read_bytes()
    path.unlink()
    if damage == "truncated":
        path.write_bytes(content[:-100])
    elif damage == "empty":
        path.write_bytes(b"")
    elif damage == "folder":
        path.mkdir()
    lost = rows_of_file(data, 1)
    dataset = PairDataset.open(data, "train")
    assert len(dataset) == 30
    assert [(fault.where, fault.rows) for fault in dataset.faults] == [(str(path), len(lost))]
    assert reason is None or dataset.faults[0].reason == reason
    found = rows_of(data, "train")
    assert {row for row, value in enumerate(found) if value is None} == lost
    assert all(value == whole[row] for row, value in enumerate(found) if row not in lost)
    with pytest.raises(RowError, match=str(path)):
        dataset.captions(min(lost))
    if damage == "missing":  # as after a mishap of the network
        path.write_bytes(content)
        assert dataset.captions(min(lost)) == whole[min(lost)][1]


def test_nothing_of_a_split_left_is_an_error_at_once(data: Path) -> None:
    for entry in files_of(data):
        (data / "train" / entry["file"]).unlink()
    with pytest.raises(DataError, match=r"no file of .*train can be read: .*data-00000.arrow is a missing file"):
        PairDataset.open(data, "train")


@pytest.mark.parametrize("change", [{"shards": {"train": [{"file": "x"}]}}, {"shards": {}}, {"shards": 3}])
def test_a_damaged_manifest_is_said_to_be_one(data: Path, change: dict) -> None:
    info = json.loads((data / "info.json").read_text())
    (data / "info.json").write_text(json.dumps({**info, **change}))
    with pytest.raises(DataError, match=r"info\.json is damaged"):
        PairDataset.open(data, "train")


def test_damage_of_one_record_batch_costs_that_batch(data: Path) -> None:
    whole = rows_of(data, "train")
    path = data / "train" / files_of(data)[0]["file"]
    content = path.read_bytes()
    place = content.index(whole[0][0][:64])  # the images of the first batch; before them lie their offsets
    path.write_bytes(content[: place - 8] + b"\xff" * 8 + content[place:])
    found = rows_of(data, "train")
    assert found[:2] == [None, None] and found[2:] == whole[2:]
    with pytest.raises(RowError, match="has a damaged part of 2 rows") as caught:
        PairDataset.open(data, "train").name(0)
    assert caught.value.reason == DAMAGED_FILE


def test_no_flipped_bit_crashes_loops_or_is_taken_for_data(tmp_path: Path) -> None:
    corpus, out = tmp_path / "corpus", tmp_path / "data"
    corpus.mkdir()
    for number in range(6):
        (corpus / f"{number}.png").write_bytes(picture_bytes(number, (6, 6)))
        (corpus / f"{number}.txt").write_text(f"caption {number}\nanother of {number}\n")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(store_writer, "_BATCH_ROWS", 3)
        prepare(PrepareOptions(corpus="folder", source=str(corpus), validation=0.0), str(out))
    command = [sys.executable, "-m", "tests.data.flip_worker", str(out), "train", "data-00000.arrow", "3"]
    result = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=60, check=False)
    assert result.returncode == 0, f"status {result.returncode}: {result.stderr[-2000:]}"
    counts = json.loads(result.stdout)
    assert counts["positions"] > 800
    assert counts["wrong"] == 0, "a row was read that is not the one that was prepared"
    assert counts["refused"] > counts["positions"] / 2
    assert counts["right"] > counts["positions"], "damage costs no more than it must"


def test_a_file_cut_off_while_in_use_is_an_error_and_not_the_end(data: Path) -> None:
    """In a memory map, what is no longer there would be SIGBUS."""
    script = (
        "import sys; from dalle_ds.data import PairDataset; from dalle_ds.data.faults import RowError\n"
        f"data = PairDataset.open({str(data)!r}, 'train'); data.captions(0), data.encoded(0)\n"
        f"open({str(data / 'train' / files_of(data)[0]['file'])!r}, 'r+b').truncate(512)\n"
        "for read in (data.captions, data.encoded, data.image):\n"
        "    try: read(1)\n"
        "    except RowError as error: print(error.reason)\n"
    )
    result = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, timeout=60, check=False)
    assert (result.returncode, result.stdout.splitlines()) == (0, [TRUNCATED_FILE] * 3), result.stderr


def test_a_page_that_the_disk_does_not_deliver_is_an_error(data: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    dataset = PairDataset.open(data, "train")
    dataset.encoded(0)

    def broken(*_args) -> bytes:
        raise OSError(5, "Input/output error")

    monkeypatch.setattr(store_module.os, "pread", broken)
    for row in (0, len(dataset) - 1):  # one of an open file, one of another
        with pytest.raises(RowError, match=r"cannot be read at byte [\d,]+: Input/output error"):
            dataset.encoded(row)


def test_few_files_are_open_at_a_time(data: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(store_module, "_MOST_OPEN", 2)
    monkeypatch.setattr(store_module, "_MOST_BATCHES", 1)
    before = len(os.listdir("/proc/self/fd"))  # noqa: PTH208
    dataset = PairDataset.open(data, "train")
    order = np.random.default_rng(0).permutation(30).tolist()
    assert [dataset.name(row) for row in order * 2] == [f"{row:02d}.png" for row in order * 2]
    assert len(os.listdir("/proc/self/fd")) - before <= 4  # noqa: PTH208


@pytest.mark.parametrize("code", [errno.EMFILE, errno.ENFILE, errno.ENOMEM])
def test_files_are_closed_for_others_where_files_or_maps_run_out(
    data: Path, monkeypatch: pytest.MonkeyPatch, code: int
) -> None:
    dataset = PairDataset.open(data, "train")
    mapped = store_module.mmap.mmap

    def scarce(*arguments, **options):
        if len(dataset._store._opened) >= 2:
            raise OSError(code, os.strerror(code))
        return mapped(*arguments, **options)

    monkeypatch.setattr(store_module.mmap, "mmap", scarce)
    assert [dataset.name(row) for row in range(30)] == [f"{row:02d}.png" for row in range(30)]

    def none_left(*arguments, **options):
        raise OSError(code, os.strerror(code))

    monkeypatch.setattr(store_module.mmap, "mmap", none_left)
    with pytest.raises(RowError, match="cannot be read: "):
        dataset.name(0)


# --- when it is too much --------------------------------------------------------------------------------------------


def rows_until_raised(limit: float, share: float, seed: int, updates: int = 500, batch: int = 64) -> int | None:
    """Rows tried before a run ends whose rows are unreadable with probability `share`."""
    rng = np.random.default_rng(seed)
    unreadable = BadSampleBudget(limit, FaultLog(), "data")
    for update in range(updates):
        try:
            unreadable.observe(batch, int(rng.binomial(batch, share)))
        except DataError:
            return (update + 1) * batch
    return None


def test_a_share_above_the_limit_ends_the_run_soon_and_one_below_it_never() -> None:
    assert all(rows_until_raised(0.1, 0.08, seed) is None for seed in range(40))
    assert all(rows_until_raised(0.1, 0.05, seed) is None for seed in range(40))
    late = [rows_until_raised(0.1, 0.13, seed) for seed in range(40)]
    assert all(rows is not None and rows <= 20_000 for rows in late)
    assert all(rows_until_raised(0.1, 0.1, seed, updates=2000) is None for seed in range(20)), "at the limit is allowed"
    assert {rows_until_raised(0.1, 0.5, seed) for seed in range(40)} == {128}  # the first update after 100 rows
    assert rows_until_raised(1.0, 1.0, 0) is None
    assert rows_until_raised(0.0, 0.0, 0) is None


def test_the_window_forgets() -> None:
    """Ten thousand good rows do not hide that all are bad now, nor does an old fault weigh for ever."""
    unreadable = BadSampleBudget(0.1, FaultLog(), "data")
    for _ in range(1000):
        unreadable.observe(100, 0)
    assert 10_000 <= unreadable.tried < 10_100
    with pytest.raises(DataError, match=r"^1,200 of the last 10,000 rows tried could not be read, 12\.0%, "):
        for update in range(12):
            assert update <= 11, "a tenth, and five standard deviations"
            unreadable.observe(100, 100)
    again = BadSampleBudget(0.1, FaultLog(), "data")
    for _ in range(100):
        again.observe(1000, 95)
        again.observe(1000, 0)
    assert again.failed <= 95 * 6


def test_no_tolerance_ends_at_the_first() -> None:
    unreadable = BadSampleBudget(0.0, FaultLog(), "data")
    unreadable.observe(8, 0)
    with pytest.raises(DataError, match=r"1 of the last 17 rows tried .* more than loader.max_unreadable=0 allows"):
        unreadable.observe(9, 1)


def test_the_message_names_counts_limit_commonest_reason_and_an_example() -> None:
    log = FaultLog()
    for row in range(30):
        log.add(RowError(f"data/train row {row}: image cannot be decoded", "undecodable image", f"row {row}"))
    for row in range(60):
        log.add(RowError(f"data/train/data-00003.arrow is missing, row {row}", MISSING_FILE, "data-00003.arrow"))
    with pytest.raises(DataError) as caught:
        BadSampleBudget(0.1, log, "my_data").observe(400, 90)
    assert str(caught.value) == (
        "90 of the last 400 rows tried could not be read, 22.5%, which is more than loader.max_unreadable=0.1 allows; most "
        "often: missing file (60 times), such as data-00003.arrow. Look at all of the data with python "
        "launchers/doctor.py data my_data, and put back what is missing, or raise the limit"
    )
    news = log.news()
    assert len([line for line in news if "undecodable" not in line and "is missing" in line]) == 1, "a file once"
    assert len(news) == 1 + 20, "and of images the first twenty"
    assert log.news() == []


def test_files_known_to_be_missing_count_before_the_first_update(data: Path) -> None:
    files = files_of(data)
    for entry in files[: len(files) // 2]:
        (data / "train" / entry["file"]).unlink()
    samples = DvaeSamples(PairDataset.open(data, "train"), 16, train=True)
    lost = sum(entry["rows"] for entry in files[: len(files) // 2])
    with pytest.raises(DataError, match=rf"^{lost} of 30 rows cannot be read, .*: missing file .*data-00000.arrow\. "):
        BadSampleBudget(0.1, FaultLog(), str(data)).check_known(samples.faults, len(samples))
    BadSampleBudget(0.9, FaultLog(), str(data)).check_known(samples.faults, len(samples))
    BadSampleBudget(0.0, FaultLog(), str(data)).check_known([], 30)
    with pytest.raises(DataError, match="max_unreadable=0 "):
        BadSampleBudget(0.0, FaultLog(), "data").check_known([Fault(MISSING_FILE, "x", 1)], 30)


@pytest.mark.parametrize("workers", [0, 2])
def test_the_loader_goes_round_lost_files_and_tells_which(data: Path, workers: int) -> None:
    path = data / "train" / files_of(data)[2]["file"]
    path.unlink()
    lost = rows_of_file(data, 2)
    samples = DvaeSamples(PairDataset.open(data, "train"), 16, train=True)
    loader = BatchLoader(samples, seed=0, batch_size=30, micro_batch=10, rank=0, world_size=1, workers=workers)
    epoch = list(islice(loader, 3))
    assert [len(batch["image"]) for batch in epoch] == [10, 10, 10]
    assert sum(int((batch["skipped"] > 0).sum()) for batch in epoch) == len(lost)
    common = re.fullmatch(rf"most often: {MISSING_FILE} \((\d+) times\), such as {path}", loader.faults.commonest())
    assert common and int(common[1]) >= len(lost)
    assert loader.faults.news() == [f"unreadable: {path} is missing"]
    again = BatchLoader(samples, seed=0, batch_size=30, micro_batch=10, rank=0, world_size=1, workers=workers)
    BadSampleBudget(0.9, again.faults, str(data)).check_known(samples.faults, len(samples))
    list(islice(again, 3))
    assert again.faults.news() == [], "what was told at the start is told once"


@pytest.mark.parametrize("value", [-0.1, 1.1, float("nan")])
def test_the_limit_is_a_share(value: float) -> None:
    with pytest.raises(ConfigError, match=r"loader.max_unreadable must lie in \[0, 1\]"):
        LoaderConfig(max_unreadable=value)
    assert (LoaderConfig(max_unreadable=1.0).max_unreadable, LoaderConfig().max_unreadable) == (1.0, 0.1)


# --- data that changes ----------------------------------------------------------------------------------------------


def test_data_that_stays_is_found_unchanged(data: Path) -> None:
    samples = DvaeSamples(PairDataset.open(data, "train"), 16, train=True)
    samples.check_unchanged()
    path = data / "train" / files_of(data)[0]["file"]
    os.utime(path, (1, 1))  # copied elsewhere and back, say
    samples.check_unchanged()
    path.unlink()  # lost: its rows count as unreadable, which has a limit of its own
    samples.check_unchanged()


def test_a_file_cut_off_during_the_run_is_lost_and_not_changed(data: Path) -> None:
    dataset = PairDataset.open(data, "train")
    path = data / "train" / files_of(data)[1]["file"]
    with path.open("r+b") as file:
        file.truncate(100)
    dataset.check_unchanged()
    with pytest.raises(RowError, match="100 bytes instead of"):
        dataset.name(min(rows_of_file(data, 1)))


def test_a_file_that_is_put_back_is_no_change(data: Path) -> None:
    path = data / "train" / files_of(data)[1]["file"]
    whole = path.read_bytes()
    path.write_bytes(whole[:100])
    dataset = PairDataset.open(data, "train")
    path.write_bytes(whole[:200])  # half-way
    dataset.check_unchanged()
    path.write_bytes(whole)
    dataset.check_unchanged()
    path.write_bytes(bytes(len(whole)))
    with pytest.raises(DataChangedError, match="its contents are other ones"):
        dataset.check_unchanged()


def test_another_preparation_is_noticed(data: Path, folder_corpus: Path) -> None:
    dataset = PairDataset.open(data, "train")
    options = PrepareOptions(corpus="folder", source=str(folder_corpus), validation=0.5)
    prepare(options, str(data), overwrite=True)
    with pytest.raises(DataChangedError, match=r"was prepared again since it was opened"):
        dataset.check_unchanged()
    shutil.rmtree(data)
    with pytest.raises(DataChangedError, match=r"has changed since it was opened: .* does not exist"):
        dataset.check_unchanged()


@pytest.mark.parametrize("longer", [0, 1])
def test_exchanged_files_are_noticed(data: Path, longer: int) -> None:
    dataset = PairDataset.open(data, "train")
    path = data / "train" / files_of(data)[1]["file"]
    path.write_bytes(b"x" * (path.stat().st_size + longer))
    os.utime(path, (1, 1))
    what = "it has [0-9,]+ bytes, and had [0-9,]+" if longer else "its contents are other ones"
    with pytest.raises(DataChangedError, match=rf"{path} has changed since it was opened \({what}\)"):
        dataset.check_unchanged()
