"""Preparations that are killed go on where they were, and end in the same bytes; Ray does what one process does."""

from __future__ import annotations

import json
import multiprocessing
import random
import socket
import sys
from multiprocessing.connection import Connection
from pathlib import Path

import pytest

from dalle_ds.data import prepare as prepare_module
from dalle_ds.data.corpora import Unit
from dalle_ds.data.filters import FilterOptions
from dalle_ds.data.prepare import NothingKept, PrepareOptions, prepare, prepare_part
from dalle_ds.data.prepare_on_ray import prepare_on_ray, start_ray
from dalle_ds.errors import ConfigError, DataError
from dalle_ds.files import built_beside, remove_leftovers
from tests.data.conftest import picture_bytes, wait_before_rows
from tests.data.test_prepare import all_files

ROOT = Path(__file__).resolve().parents[2]
FILTERS = FilterOptions(min_caption_words=4, max_hash_distance=0, max_caption_copies=2)


@pytest.fixture(scope="module")
def corpus(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("corpus")
    for number in range(120):
        (folder / f"{number:03d}.png").write_bytes(picture_bytes(number % 100, (90 if number % 11 == 5 else 40, 40)))
        caption = ["an image of a house", f"this is image number {number}", "three short words"][number % 3]
        (folder / f"{number:03d}.txt").write_text(f"{caption}\nanother caption of number {number}")
    return folder


@pytest.fixture(scope="module")
def options(corpus: Path) -> PrepareOptions:
    return PrepareOptions(corpus="folder", source=str(corpus), validation=0.2, filters=FILTERS)


@pytest.fixture(scope="module")
def whole(options: PrepareOptions, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """What comes out where nothing is killed."""
    out = tmp_path_factory.mktemp("whole") / "out"
    report = prepare(options, str(out))
    assert len(report.dropped) >= 2 and report.captions_dropped
    return out


def step_by_step(steps: Connection, source: str, out: str) -> None:
    """A preparation that waits for a word before each row that it writes, to a part or to the result."""
    wait_before_rows(steps)
    prepare(PrepareOptions(corpus="folder", source=source, validation=0.2, filters=FILTERS), out, parts=6)


def test_killed_at_random_and_started_again_the_bytes_are_the_same(corpus: Path, whole: Path, tmp_path: Path) -> None:
    """In the midst of the first parts, of later ones, and twice while the parts are put together."""
    chance = random.Random(0)
    out = tmp_path / "out"
    processes = multiprocessing.get_context("forkserver")
    done = []
    for least, most in ((21, 40), (41, 60), (120, 150), (1, 50)):
        steps, far_end = processes.Pipe()
        child = processes.Process(target=step_by_step, args=(far_end, str(corpus), str(out)))
        child.start()
        far_end.close()
        for _ in range(chance.randint(least, most)):
            assert steps.recv() == "row"
            steps.send("go")
        child.kill()
        child.join()
        done.append(len(list(tmp_path.glob("out.parts/0*-of-00006/part.json"))))
        assert len(list(tmp_path.rglob(".0*.partial-*"))) <= 1
    assert 0 < done[0] < done[1] < done[2] == done[3] == 6
    assert not out.exists()
    prepare(PrepareOptions(corpus="folder", source=str(corpus), validation=0.2, filters=FILTERS), str(out))
    assert all_files(out) == all_files(whole)
    assert list(tmp_path.iterdir()) == [out], "what killed processes left would fill the disk"


@pytest.mark.parametrize("rows", [1, 150])
def test_of_two_preparations_at_once_the_second_is_told_of_the_first(corpus: Path, tmp_path: Path, rows: int) -> None:
    """While pairs are looked at, and while they are put together; once the first is gone, nothing is in the way."""
    steps, far_end = multiprocessing.get_context("forkserver").Pipe()
    out = tmp_path / "out"
    first = multiprocessing.get_context("forkserver").Process(
        target=step_by_step, args=(far_end, str(corpus), str(out))
    )
    first.start()
    far_end.close()
    for _ in range(rows):
        assert steps.recv() == "row"
        steps.send("go")
    assert steps.recv() == "row"
    options = PrepareOptions(corpus="folder", source=str(corpus), validation=0.2, filters=FILTERS)
    with pytest.raises(DataError) as told:
        prepare(options, str(out))
    for word in (str(out), f"process {first.pid} on {socket.gethostname()}", "since 2"):
        assert word in str(told.value)
    first.kill()
    first.join()
    prepare(options, str(out))
    assert list(tmp_path.iterdir()) == [out]


def test_what_is_done_is_not_looked_at_again(
    monkeypatch: pytest.MonkeyPatch, options: PrepareOptions, whole: Path, tmp_path: Path
) -> None:
    read: list[str] = []
    units = prepare_module._corpus(options).units

    def counted(limit: int):
        def corpus():
            for unit in units():

                def pairs(unit: Unit = unit):
                    read.append(unit.name)
                    if len(read) == limit:
                        raise KeyboardInterrupt
                    yield from unit.read()

                yield Unit(unit.name, pairs)

        return lambda _: prepare_module.Corpus(corpus)

    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(prepare_module, "_corpus", counted(65))
        prepare(options, str(tmp_path / "out"), parts=6)
    assert len(list(tmp_path.rglob("part.json"))) == 3
    read.clear()
    with monkeypatch.context() as patch:
        patch.setattr(prepare_module, "_corpus", counted(0))
        prepare(options, str(tmp_path / "out"))
    assert read == [f"{number:03d}.png" for number in range(60, 120)]
    assert all_files(tmp_path / "out") == all_files(whole)


@pytest.mark.parametrize("change", ["renamed", "shortened"])
def test_a_corpus_that_changes_in_between_is_noticed(
    monkeypatch: pytest.MonkeyPatch, options: PrepareOptions, tmp_path: Path, change: str
) -> None:
    units = list(prepare_module._corpus(options).units())

    def interrupted():
        raise KeyboardInterrupt
        yield

    begun = [*units[:50], Unit(units[50].name, interrupted), *units[51:]]
    other = [Unit("000.jpeg", units[0].read), *units[1:]] if change == "renamed" else units[:30]
    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(prepare_module, "_corpus", lambda _: prepare_module.Corpus(lambda: iter(begun)))
        prepare(options, str(tmp_path / "out"), parts=6)
    with monkeypatch.context() as patch:
        patch.setattr(prepare_module, "_corpus", lambda _: prepare_module.Corpus(lambda: iter(other)))
        with pytest.raises(DataError, match=r"the corpus has changed since .*00000-of-00006 was prepared"):
            prepare(options, str(tmp_path / "out"))
        prepare(options, str(tmp_path / "out"), overwrite=True)
    assert [path.name for path in tmp_path.iterdir()] == ["out"]


def test_two_jobs_that_do_the_same_part_do_not_spoil_it(
    monkeypatch: pytest.MonkeyPatch, options: PrepareOptions, whole: Path, tmp_path: Path
) -> None:
    """One that was thought dead ends in the midst of another's work."""
    process, calls = prepare_module.process_units, []

    def overtaken(*arguments):
        for number, item in enumerate(process(*arguments)):
            calls.append(number)
            if len(calls) == 40:
                prepare_part(options, str(tmp_path / "out"), 0, 2)
            yield item

    with monkeypatch.context() as patch:
        patch.setattr(prepare_module, "process_units", overtaken)
        prepare_part(options, str(tmp_path / "out"), 0, 2)
    prepare(options, str(tmp_path / "out"))
    assert all_files(tmp_path / "out") == all_files(whole)


def test_what_a_former_version_began_is_told_and_begun_anew(
    options: PrepareOptions, whole: Path, tmp_path: Path
) -> None:
    out, part = tmp_path / "out", tmp_path / "out.parts" / "00000-of-00001"
    (part.parent / ".00000-of-00001.work" / "segment-0000000000").mkdir(parents=True)
    part.mkdir()
    (part / "part.json").write_text(json.dumps({"format_version": 3, "shard": 0, "shards": 1}))
    with pytest.raises(DataError, match=f"{part} has part format 3"):
        prepare(options, str(out))
    (part / "part.json").unlink()
    part.rmdir()
    prepare(options, str(out))
    assert all_files(out) == all_files(whole) and list(tmp_path.iterdir()) == [out]


@pytest.mark.slow
def test_ray_on_two_workers_does_what_one_process_does(
    monkeypatch: pytest.MonkeyPatch, options: PrepareOptions, corpus: Path, whole: Path, tmp_path: Path
) -> None:
    """And tells mistakes as they are; and what it does in one folder, paths that begin there mean."""
    import ray

    home = tmp_path / "home"
    home.mkdir()
    monkeypatch.setenv("HOME", str(home))
    monkeypatch.setenv("PYTHONPATH", str(ROOT))
    for name in ("RAY_ADDRESS", "RAY_AUTH_TOKEN", "RAY_USAGE_STATS_ENABLED"):
        monkeypatch.setenv(name, "")  # so that what is set here is undone
        monkeypatch.delenv(name)
    start_ray(2)
    try:
        report = prepare_on_ray(options, str(tmp_path / "out"))
        assert all_files(tmp_path / "out") == all_files(whole) and not report.already_there
        assert prepare_on_ray(options, str(tmp_path / "out")).already_there
        monkeypatch.chdir(corpus.parent)
        relative = PrepareOptions(corpus="folder", source=corpus.name, validation=0.2, filters=FILTERS)
        assert prepare_on_ray(relative, str(tmp_path / "relative"), 3).fingerprint == report.fingerprint
        missing = PrepareOptions(corpus="folder", source="nowhere")
        with pytest.raises(DataError, match=r"^source nowhere does not exist$"):
            prepare_on_ray(missing, str(tmp_path / "no"))
    finally:
        ray.shutdown()
    manifest = json.loads((tmp_path / "out" / "info.json").read_text())
    assert not list(home.iterdir())
    assert manifest["fingerprint"] == report.fingerprint and not (tmp_path / "out.parts").exists()


def test_ray_that_is_not_installed_is_named(monkeypatch: pytest.MonkeyPatch, options: PrepareOptions) -> None:
    monkeypatch.setitem(sys.modules, "ray", None)
    with pytest.raises(ConfigError, match=r"pip install dalle-ds\[ray\]"):
        prepare_on_ray(options, "out")


def test_filters_that_leave_nothing_leave_no_parts(corpus: Path, tmp_path: Path) -> None:
    none = PrepareOptions(corpus="folder", source=str(corpus), filters=FilterOptions(min_caption_words=99))
    with pytest.raises(NothingKept, match=r"no pair that can be kept: dropped too few words \(120\)"):
        prepare(none, str(tmp_path / "out"))
    assert not list(tmp_path.iterdir())


def test_only_what_killed_processes_left_is_removed(tmp_path: Path) -> None:
    """What is still built is not; nor what is to become something else, nor a file."""
    for name in (".out.partial-dead", ".out.removed-long", ".other.partial-dead", "out.partial-x"):
        (tmp_path / name / "inside").mkdir(parents=True)
    (tmp_path / ".out.partial-7").write_text("a file that is written")
    with built_beside(tmp_path / "out") as alive:
        remove_leftovers(tmp_path, "out")
        found = {path.name for path in tmp_path.iterdir()}
        assert found == {alive.name, ".other.partial-dead", "out.partial-x", ".out.partial-7"}
        remove_leftovers(tmp_path)
    assert {path.name for path in tmp_path.iterdir()} == {"out", "out.partial-x", ".out.partial-7"}
