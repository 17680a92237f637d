"""Cached embeddings are those of the CLIP, whatever was killed or shared on the way, or they are errors."""

from __future__ import annotations

import errno
import json
import multiprocessing
import pickle
import random
import shutil
import threading
from collections.abc import Callable
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from dalle_ds.data import PairDataset, embedding_parts, store_writer
from dalle_ds.data.augment import clip_center_view, clip_random_view
from dalle_ds.data.command import Preparation
from dalle_ds.data.embeddings import EmbeddingCache, cache_embeddings
from dalle_ds.data.faults import DAMAGED_FILE, MISSING_FILE, NO_FEATURES, TRUNCATED_FILE, RowError
from dalle_ds.data.order import hash_integers
from dalle_ds.errors import CheckpointError, ConfigError, DataChangedError, DataError
from dalle_ds.models import Clip
from dalle_ds.parallel import Mesh
from tests.data.conftest import TINY_CLIP, wait_before_rows
from tests.data.test_prepare import all_files
from tests.data.test_samples import broken_row
from tests.processes import run_ranks

SIZE, ROWS_OF_PART = 32, 7


@pytest.fixture(autouse=True)
def small_parts(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(embedding_parts, "PART_ROWS", ROWS_OF_PART)


@pytest.fixture
def copy(prepared: Path, tmp_path: Path) -> Path:
    """A copy of the prepared folder to cache embeddings in."""
    return Path(shutil.copytree(prepared, tmp_path / "data"))


@pytest.fixture(scope="module")
def whole(prepared: Path, clip: Clip, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Data with embeddings of two views that nothing disturbed."""
    folder = Path(shutil.copytree(prepared, tmp_path_factory.mktemp("whole") / "data"))
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(embedding_parts, "PART_ROWS", ROWS_OF_PART)
        cache_embeddings(clip, folder, views=2, seed=3, batch_size=5)
    return folder


@pytest.fixture
def cached(whole: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(whole, tmp_path / "cached"))


def opened(data: Path, clip: Clip, split: str = "train") -> EmbeddingCache:
    return EmbeddingCache.open(data, clip.fingerprint, split)


def pixels(*views: np.ndarray) -> Tensor:
    return torch.from_numpy(np.stack(views)).permute(0, 3, 1, 2).float() / 255


@pytest.mark.parametrize(("batch_size", "workers"), [(64, 0), (5, 2)])
def test_embeddings_are_those_of_the_views_and_of_the_captions(
    copy: Path, clip: Clip, batch_size: int, workers: int
) -> None:
    states = batch_size == 5
    how: dict[str, Any] = {"views": 3, "seed": 9, "batch_size": batch_size, "workers": workers, "text_states": states}
    report = cache_embeddings(clip, copy, **how)
    assert report.unreadable == {"train": 0, "validation": 0} and not report.already_there
    for split, views in (("train", 3), ("validation", 1)):
        dataset, cache = PairDataset.open(copy, split), opened(copy, clip, split)
        assert (len(cache), cache.views, cache.dim) == (len(dataset), views, 6)
        assert cache.text_width == states * TINY_CLIP.text_width
        for row in range(len(dataset)):
            image = dataset.image(row)
            rngs = [np.random.default_rng(hash_integers(9, row, view)) for view in range(1, views)]
            expected = [clip_center_view(image, SIZE), *(clip_random_view(image, SIZE, rng, 0.9) for rng in rngs)]
            found = np.stack([cache.image(row, view) for view in range(views)])
            np.testing.assert_allclose(found, clip.embed_images(pixels(*expected)), atol=1e-6)
            captions = dataset.captions(row)
            found = np.stack([cache.text(row, caption) for caption in range(len(captions))])
            np.testing.assert_allclose(found, clip.embed_texts(captions), atol=1e-6)
            assert found.dtype == np.float32 and np.allclose(np.linalg.norm(found, axis=1), 1, atol=1e-6)
        for wrong in (-1, len(captions)):
            with pytest.raises(IndexError):
                cache.text(0, wrong)
        with pytest.raises(IndexError):
            cache.image(0, views)


def test_rows_have_as_many_texts_as_captions(copy: Path, clip: Clip, monkeypatch: pytest.MonkeyPatch) -> None:
    """One to four, so that places of texts are no multiples of rows; more than a batch in all."""
    value = PairDataset._value

    def several(self: PairDataset, row: int, column: str) -> Any:
        return [f"{row} {n}" for n in range(1 + row % 4)] if column == "captions" else value(self, row, column)

    monkeypatch.setattr(PairDataset, "_value", several)
    cache_embeddings(clip, copy, batch_size=4, text_states=True)
    cache = opened(copy, clip)
    for row in range(len(cache)):
        captions = [f"{row} {n}" for n in range(1 + row % 4)]
        found = np.stack([cache.text(row, caption) for caption in range(len(captions))])
        np.testing.assert_allclose(found, clip.embed_texts(captions), atol=1e-6)
        for caption, (states, padded) in enumerate(zip(*clip.text_states(captions), strict=True)):
            np.testing.assert_allclose(cache.states(row, caption), states[~padded], atol=1e-5)


def test_moments_are_those_of_all_training_images_in_float64(whole: Path, clip: Clip) -> None:
    cache = opened(whole, clip)
    rows = np.stack([cache.image(row, view) for row in range(len(cache)) for view in range(2)]).astype(np.float64)
    for found in (cache.moments, opened(whole, clip, "validation").moments):
        assert int(found.count) == len(rows)
        np.testing.assert_allclose(found.mean, rows.mean(0), atol=1e-12)
        np.testing.assert_allclose(found.std, rows.std(0), rtol=1e-6)
        assert found.norm == pytest.approx(np.linalg.norm(rows, axis=1).mean(), rel=1e-12)
        values, directions = found.components()
        np.testing.assert_allclose(values, np.linalg.eigvalsh(np.cov(rows.T, bias=True))[::-1], rtol=1e-6, atol=1e-12)
        assert torch.allclose(directions @ directions.T, torch.eye(6, dtype=torch.float64))


# --- parts ----------------------------------------------------------------------------------------------------------


def step_by_step(steps: Connection, clip: Clip, data: Path) -> None:
    """A cache that waits for a word before each row that it writes."""
    wait_before_rows(steps)
    cache_embeddings(clip, data, views=2, seed=3, batch_size=5)


def started(clip: Clip, data: Path, rows: int) -> tuple[Any, Connection]:
    """A process that is about to write a row."""
    processes = multiprocessing.get_context("fork")  # has imported all that it needs, as a loader's workers have
    steps, far_end = processes.Pipe()
    child = processes.Process(target=step_by_step, args=(far_end, clip, data))
    child.start()
    far_end.close()
    for _ in range(rows):
        assert steps.recv() == "row"
        steps.send("go")
    assert steps.recv() == "row"
    return child, steps


def test_killed_at_random_and_started_again_the_bytes_are_the_same(
    copy: Path, clip: Clip, whole: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A part of seven rows has 35 vectors; what was done is not done again."""
    chance, done = random.Random(0), []
    for least, most in ((40, 60), (36, 60), (1, 34)):
        child, _steps = started(clip, copy, chance.randint(least, most))
        if not done:
            with pytest.raises(DataError, match=f"is being made by process {child.pid}"):
                cache_embeddings(clip, copy, views=2, seed=3, batch_size=5)
        child.kill()
        child.join()
        done.append(len(list(copy.glob("embeddings/*.parts/train-*.json"))))
    assert done == [1, 2, 2]
    assert EmbeddingCache.find(copy, clip.fingerprint, "train") is None
    written = []
    write = embedding_parts.Work.write
    monkeypatch.setattr(embedding_parts.Work, "write", lambda *args: (written.append(args[1].name), write(*args)))
    cache_embeddings(clip, copy, views=2, seed=3, batch_size=5)
    assert written == ["train-00002", "train-00003", "validation-00000"]
    assert all_files(copy) == all_files(whole)


class Ranks:
    """Meshes of threads."""

    def __init__(self, world_size: int) -> None:
        self._barrier = threading.Barrier(world_size, timeout=60)
        self._told: Any = None
        self.world_size = world_size

    def work(self, make: Callable[[Any], Any]) -> list[Any]:
        """What `make` returns for each rank's mesh, or the error that it raises."""
        found: list[Any] = [None] * self.world_size

        def one(rank: int) -> None:
            try:
                found[rank] = make(_Rank(self, rank))
            except Exception as error:
                found[rank] = error

        threads = [threading.Thread(target=one, args=(rank,)) for rank in range(self.world_size)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        return found


class _Rank(Mesh):
    def __init__(self, ranks: Ranks, rank: int) -> None:
        super().__init__(rank, ranks.world_size, torch.device("cpu"))
        object.__setattr__(self, "_ranks", ranks)

    def barrier(self) -> None:
        self._ranks._barrier.wait()  # type: ignore[attr-defined]

    def decide(self, choose: Callable[[], Any]) -> Any:
        ranks = self._ranks  # type: ignore[attr-defined]
        if self.is_main:
            try:
                ranks._told = choose(), None
            except DataError as error:
                ranks._told = None, error
        self.barrier()
        value, error = ranks._told
        self.barrier()
        if error is not None:
            raise error
        return value


@pytest.mark.parametrize("world_size", [2, 3])
def test_any_number_of_processes_writes_the_same_bytes(
    copy: Path, clip: Clip, whole: Path, world_size: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Of those parts that one killed process has left, if they are two."""
    if world_size == 2:
        child, _steps = started(clip, copy, 40)
        child.kill()
        child.join()
    written: list[tuple[str, str]] = []
    write = embedding_parts.Work.write
    monkeypatch.setattr(
        embedding_parts.Work,
        "write",
        lambda *args: (written.append((threading.current_thread().name, args[1].name)), write(*args)),
    )
    reports = Ranks(world_size).work(
        lambda mesh: cache_embeddings(clip, copy, views=2, seed=3, batch_size=5, mesh=mesh)
    )
    assert all(report == reports[0] and not report.already_there for report in reports)
    assert len({thread for thread, _ in written}) == world_size
    assert len(written) == len({part for _, part in written}) == 5 - (world_size == 2)
    assert all_files(copy) == all_files(whole)


@pytest.mark.launch
def test_the_command_on_two_processes(copy: Path, clip_export: Path, clip: Clip, whole: Path) -> None:
    """With parts of the size that they have by default: each process has a split."""
    arguments = ("--out", copy, "--cache_embeddings", clip_export, "--views", 2, "--seed", 3)
    done = run_ranks("launchers/prepare_data.py", *arguments, processes=2)
    assert done.returncode == 0, done.stderr
    assert done.stdout.count("embeddings cached: 24 train, 6 validation") == 1
    one, other = opened(copy, clip), opened(whole, clip)
    np.testing.assert_allclose(one.moments.products, other.moments.products, rtol=1e-5)
    assert [path.name for path in (copy / "embeddings").iterdir()] == [clip.fingerprint[:16]]


def test_what_processes_cannot_share_is_told(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("WORLD_SIZE", "2")
    with pytest.raises(ConfigError, match="several processes can share --cache_embeddings alone"):
        Preparation(out="data", cache_codes="dvae", cache_embeddings="clip").check()


def test_what_was_begun_otherwise_is_never_taken(
    copy: Path, clip: Clip, whole: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Parts with other views, or that the disk has lost."""
    write = embedding_parts.Work.write

    def interrupted(*arguments: Any) -> None:
        if arguments[1].number == 3:
            raise KeyboardInterrupt
        write(*arguments)

    for views in (1, 2):
        with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
            patch.setattr(embedding_parts.Work, "write", interrupted)
            cache_embeddings(clip, copy, views=views, seed=3, batch_size=5)
    (parts,) = (copy / "embeddings").glob("*.parts")
    assert sorted(path.name for path in parts.glob("*-*.json")) == [f"train-0000{number}.json" for number in range(3)]
    (parts / "train-00000.safetensors").write_bytes(b"damaged")
    (parts / "files" / "train" / "texts" / "00001-00000.arrow").unlink()
    (parts / "train-00002.json").write_text("{}")
    cache_embeddings(clip, copy, views=2, seed=3, batch_size=5)
    assert all_files(copy) == all_files(whole)


def test_a_full_disk_is_told_and_gone_on_from(
    copy: Path, clip: Clip, whole: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def full(*_args: Any) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    with monkeypatch.context() as patch, pytest.raises(DataError, match="no space left"):
        patch.setattr(store_writer.StoreWriter, "_write_batch", full)
        cache_embeddings(clip, copy, views=2, seed=3, batch_size=5)
    assert EmbeddingCache.find(copy, clip.fingerprint, "train") is None
    cache_embeddings(clip, copy, views=2, seed=3, batch_size=5)
    assert all_files(copy) == all_files(whole)


def test_a_cache_with_states_is_one_without(cached: Path, clip: Clip) -> None:
    with pytest.raises(DataError, match="text_width"):
        cache_embeddings(clip, cached, views=2, seed=3, text_states=True)
    cache_embeddings(clip, cached, views=2, seed=3, text_states=True, overwrite=True)
    assert cache_embeddings(clip, cached, views=2, seed=3).already_there


def test_the_same_cache_is_left_alone_and_another_refused(cached: Path, clip: Clip) -> None:
    before = all_files(cached)
    assert cache_embeddings(clip, cached, views=2, seed=3).already_there
    with pytest.raises(DataError, match=r"holds other embeddings of this model \(different: seed, views\)"):
        cache_embeddings(clip, cached)
    assert all_files(cached) == before
    cache = opened(cached, clip)
    cache.check_unchanged()
    cache_embeddings(clip, cached, overwrite=True)
    with pytest.raises(DataChangedError, match="were cached again since they were opened"):
        cache.check_unchanged()
    assert opened(cached, clip).views == 1


# --- what cannot be read --------------------------------------------------------------------------------------------


def test_rows_that_could_not_be_read_have_no_embeddings(
    copy: Path, clip: Clip, whole: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Neither do their images count in the moments; what could be read of them is there."""
    broken_row(PairDataset.open(copy, "train"), 5, monkeypatch)
    value = PairDataset._value

    def without_captions(self: PairDataset, row: int, column: str) -> Any:
        if (row, column, self.split) == (8, "captions", "train"):
            raise RowError("damaged", DAMAGED_FILE)
        return value(self, row, column)

    monkeypatch.setattr(PairDataset, "_value", without_captions)
    assert cache_embeddings(clip, copy, views=2, seed=3, batch_size=5).unreadable == {"train": 2, "validation": 0}
    cache, other = opened(copy, clip), opened(whole, clip)
    for read in (lambda: cache.image(5, 0), lambda: cache.text(8, 0)):
        with pytest.raises(RowError, match="has no embeddings") as none:
            read()
        assert none.value.reason == NO_FEATURES
    assert [fault.rows for fault in cache.faults] == [2]
    assert int(cache.moments.count) == int(other.moments.count) - 2
    for row, caption in ((5, 1), (7, 0), (9, 1), (23, 1)):
        np.testing.assert_allclose(cache.text(row, caption), other.text(row, caption), atol=1e-6)
    assert np.array_equal(cache.image(8, 1), other.image(8, 1))


def readable(cache: EmbeddingCache) -> list[bool]:
    found = []
    for row in range(len(cache)):
        try:
            cache.read_row(row)
            found.append(True)
        except RowError:
            found.append(False)
    return found


@pytest.mark.parametrize("column", ["images", "texts", "captions"])
def test_lost_files_cost_the_rows_of_their_part(cached: Path, clip: Clip, column: str) -> None:
    folder = cached / "embeddings" / clip.fingerprint[:16] / "train" / column
    cut, gone = (folder / f"0000{part}-00000.arrow" for part in (1, 3))
    cut.write_bytes(cut.read_bytes()[:-1])
    gone.unlink()
    cache = opened(cached, clip)
    assert [(fault.reason, fault.rows) for fault in cache.faults] == [(TRUNCATED_FILE, 7), (MISSING_FILE, 3)]
    assert readable(cache) == [row // 7 not in (1, 3) for row in range(24)]
    for path in folder.iterdir():
        path.unlink()
    with pytest.raises(DataError, match=r"no embeddings of train can be read.*again with --overwrite True"):
        opened(cached, clip)


def test_damaged_vectors_are_never_taken_for_embeddings(cached: Path, clip: Clip) -> None:
    cache = opened(cached, clip)
    right = [[cache.image(row, 1), cache.text(row, 0), cache.text(row, 1)] for row in range(7)]
    lost = 0
    for path in (cached / "embeddings" / clip.fingerprint[:16] / "train").glob("*/00000-*.arrow"):
        content = path.read_bytes()
        for position in range(0, len(content), 29):
            path.write_bytes(content[:position] + bytes([content[position] ^ 0x40]) + content[position + 1 :])
            cache = opened(cached, clip)
            for row, expected in enumerate(right):
                try:
                    found = [cache.image(row, 1), cache.text(row, 0), cache.text(row, 1)]
                except RowError:
                    lost += 1
                else:
                    assert all(map(np.array_equal, found, expected))
        path.write_bytes(content)
    assert lost > 10


def test_nothing_of_a_manifest_is_believed(cached: Path, clip: Clip) -> None:
    path = cached / "embeddings" / clip.fingerprint[:16] / "embeddings.json"
    manifest = json.loads(path.read_text())
    texts, files = manifest["texts"], manifest["files"]
    for damage in (
        {"views": 3},
        {"embed_dim": 7},
        {"embed_dim": "6"},
        {"part_rows": {"train": 0, "validation": 7}},
        {"part_rows": {"train": 5, "validation": 7}},
        {"texts": {**texts, "train": texts["train"][:-1]}},
        {"texts": {**texts, "train": [*texts["train"][:-1], "6"]}},
        {"texts": {**texts, "train": [15, 13, *texts["train"][2:]]}},
        {"files": {**files, "captions": {}}},
        {"files": {**files, "texts": {"train": [{"file": "../x"}]}}},
        {"moments": None},
        {"unreadable": {}},
        {"format_version": 2},
    ):
        path.write_text(json.dumps(manifest | damage))
        with pytest.raises(DataError, match=r"again with --overwrite True|is not what was written"):
            for row in range(24):
                opened(cached, clip).read_row(row)


def test_moments_that_are_not_what_was_written(cached: Path, clip: Clip) -> None:
    path = cached / "embeddings" / clip.fingerprint[:16] / "moments.safetensors"
    content = path.read_bytes()
    for damaged in (content[:-1], content[:-1] + bytes([content[-1] ^ 1]), b""):
        path.write_bytes(damaged)
        with pytest.raises(DataError, match=r"moments\.safetensors cannot be read.*--overwrite True"):
            _ = opened(cached, clip).moments


def test_embeddings_of_other_data_or_of_another_clip_are_not_found(
    cached: Path, clip: Clip, monkeypatch: pytest.MonkeyPatch
) -> None:
    with pytest.raises(DataError, match=r"does not exist: make it with .*--cache_embeddings CLIP"):
        EmbeddingCache.open(cached, "f" * 64, "train")
    with pytest.raises(DataError, match="clip_fingerprint"):  # equal first digits do not make it the same CLIP
        EmbeddingCache.find(cached, clip.fingerprint[:-1] + "x", "train")
    with pytest.raises(DataError, match="has no split 'compositional'"):
        opened(cached, clip, "compositional")
    info = json.loads((cached / "info.json").read_text())
    (cached / "info.json").write_text(json.dumps({**info, "fingerprint": "other"}))
    with pytest.raises(DataError, match=r"has data_fingerprint .* not 'other'"):
        opened(cached, clip)


def test_data_that_changes_meanwhile_is_noticed(copy: Path, clip: Clip, monkeypatch: pytest.MonkeyPatch) -> None:
    embed = Clip.embed_images

    def prepared_again(*arguments: Any) -> Tensor:
        info = json.loads((copy / "info.json").read_text())
        (copy / "info.json").write_text(json.dumps({**info, "fingerprint": "other"}))
        return embed(*arguments)

    monkeypatch.setattr(Clip, "embed_images", prepared_again)
    with pytest.raises(DataChangedError, match="was prepared again"):
        cache_embeddings(clip, copy)
    assert not list(copy.glob("embeddings/*.parts/*-*.json"))


def test_instances_are_small_where_they_are_sent_to(cached: Path, clip: Clip) -> None:
    cache = opened(cached, clip)
    expected = cache.text(3, 1)
    sent = pickle.dumps(cache)
    assert len(sent) < 6000
    received = pickle.loads(sent)
    assert np.array_equal(received.text(3, 1), expected) and received.fingerprint == cache.fingerprint


def test_models_that_cannot_embed_are_told(copy: Path, clip_export: Path, clip: Clip) -> None:
    with pytest.raises(ConfigError, match="has no tokenizer"):
        cache_embeddings(Clip(TINY_CLIP), copy)
    with pytest.raises(ConfigError, match="views"):
        cache_embeddings(clip, copy, views=0)
    diverged = Clip.from_pretrained(clip_export)
    with torch.no_grad():
        diverged.visual_projection.weight.fill_(torch.nan)
    with pytest.raises(CheckpointError, match="not numbers"):
        cache_embeddings(diverged, copy)
