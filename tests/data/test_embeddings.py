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
from dataclasses import replace
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from dalle_ds.data import PairDataset, embeddings, store_writer
from dalle_ds.data.augment import clip_center_view, clip_random_view
from dalle_ds.data.embeddings import EmbeddingCache, cache_embeddings
from dalle_ds.data.faults import DAMAGED_FILE, MISSING_FILE, NO_FEATURES, TRUNCATED_FILE, RowError
from dalle_ds.data.order import hash_integers
from dalle_ds.errors import CheckpointError, ConfigError, DataChangedError, DataError
from dalle_ds.models import Clip
from dalle_ds.parallel import Mesh
from dalle_ds.text.clip_tokenizer import ClipTokenizer
from tests.clip_shapes import CLIP_SHAPES
from tests.data.test_prepare import all_files
from tests.data.test_samples import broken_row
from tests.processes import run_ranks

SIZE, ROWS_OF_PART = 32, 7
SHAPE = replace(
    CLIP_SHAPES["toy"],
    embed_dim=6,
    vision_width=16,
    vision_depth=1,
    text_width=16,
    text_depth=1,
    text_len=12,
    text_vocab=402,
)


@pytest.fixture(autouse=True)
def small_parts(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(embeddings, "PART_ROWS", ROWS_OF_PART)


@pytest.fixture(scope="module")
def export(tokenizer_file: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    torch.manual_seed(0)
    folder = tmp_path_factory.mktemp("clip") / "export"
    tokenizer = ClipTokenizer.load(tokenizer_file, start=SHAPE.start, end=SHAPE.end)
    Clip(SHAPE, tokenizer=tokenizer).save_pretrained(folder)
    return folder


@pytest.fixture(scope="module")
def clip(export: Path) -> Clip:
    return Clip.from_pretrained(export)


@pytest.fixture
def copy(prepared: Path, tmp_path: Path) -> Path:
    """A copy of the prepared folder to cache embeddings in."""
    return Path(shutil.copytree(prepared, tmp_path / "data"))


@pytest.fixture(scope="module")
def whole(prepared: Path, clip: Clip, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Data with embeddings of two views that nothing disturbed."""
    folder = Path(shutil.copytree(prepared, tmp_path_factory.mktemp("whole") / "data"))
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(embeddings, "PART_ROWS", ROWS_OF_PART)
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
    report = cache_embeddings(clip, copy, views=3, seed=9, batch_size=batch_size, workers=workers)
    assert report.unreadable == {"train": 0, "validation": 0} and not report.already_there
    for split, views in (("train", 3), ("validation", 1)):
        dataset, cache = PairDataset.open(copy, split), opened(copy, clip, split)
        assert (len(cache), cache.views, cache.dim) == (len(dataset), views, 6)
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
        for wrong in (lambda: cache.image(0, views), lambda: cache.text(0, len(captions)), lambda: cache.text(0, -1)):
            with pytest.raises(IndexError):
                wrong()


def test_rows_have_as_many_texts_as_captions(copy: Path, clip: Clip, monkeypatch: pytest.MonkeyPatch) -> None:
    """One to four, so that places of texts are no multiples of rows; more than a batch in all."""
    value = PairDataset._value

    def several(self: PairDataset, row: int, column: str) -> Any:
        return [f"{row} {n}" for n in range(1 + row % 4)] if column == "captions" else value(self, row, column)

    monkeypatch.setattr(PairDataset, "_value", several)
    cache_embeddings(clip, copy, batch_size=4)
    cache = opened(copy, clip)
    for row in range(len(cache)):
        captions = [f"{row} {n}" for n in range(1 + row % 4)]
        found = np.stack([cache.text(row, caption) for caption in range(len(captions))])
        np.testing.assert_allclose(found, clip.embed_texts(captions), atol=1e-6)


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


def step_by_step(steps: Connection, export: str, data: str) -> None:
    """A cache that waits for a word before each row that it writes."""
    embeddings.PART_ROWS = ROWS_OF_PART
    torch.set_num_threads(1)
    add = store_writer.StoreWriter.add

    def awaited(writer: store_writer.StoreWriter, row: dict[str, Any], size: int) -> None:
        steps.send("row")
        steps.recv()
        add(writer, row, size)

    store_writer.StoreWriter.add = awaited  # type: ignore[method-assign]
    cache_embeddings(Clip.from_pretrained(export), data, views=2, seed=3, batch_size=5)


def started(export: Path, data: Path, rows: int) -> Any:
    """A process that is about to write a row."""
    steps, far_end = multiprocessing.get_context("forkserver").Pipe()
    child = multiprocessing.get_context("forkserver").Process(
        target=step_by_step, args=(far_end, str(export), str(data))
    )
    child.start()
    far_end.close()
    for _ in range(rows):
        assert steps.recv() == "row"
        steps.send("go")
    assert steps.recv() == "row"
    return child, steps


def test_killed_at_random_and_started_again_the_bytes_are_the_same(
    copy: Path, export: Path, clip: Clip, whole: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A part of seven rows has 35 vectors; what was done is not done again."""
    chance, done = random.Random(0), []
    for least, most in ((40, 60), (36, 60), (1, 34)):
        child, _steps = started(export, copy, chance.randint(least, most))
        if not done:
            with pytest.raises(DataError, match=f"is being made by process {child.pid}"):
                cache_embeddings(clip, copy, views=2, seed=3, batch_size=5)
        child.kill()
        child.join()
        done.append(len(list(copy.glob("embeddings/*.parts/train-*.json"))))
    assert done == [1, 2, 2]
    assert EmbeddingCache.find(copy, clip.fingerprint, "train") is None
    written = []
    write = embeddings._Work.write
    monkeypatch.setattr(embeddings._Work, "write", lambda *args: (written.append(args[1].name), write(*args)))
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
    copy: Path, export: Path, clip: Clip, whole: Path, world_size: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Of those parts that one killed process has left, if they are two."""
    if world_size == 2:
        child, _steps = started(export, copy, 40)
        child.kill()
        child.join()
    written: list[tuple[str, str]] = []
    write = embeddings._Work.write
    monkeypatch.setattr(
        embeddings._Work,
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
