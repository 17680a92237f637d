"""From a prepared folder to arrays, with and without cached codes."""

from __future__ import annotations

import errno
import itertools
import json
import os
import pickle
import shutil
import signal
from pathlib import Path

import numpy as np
import pyarrow as pa
import pytest
import torch
import xxhash

from dalle_ds.config import DiscreteVAEConfig
from dalle_ds.data import BatchLoader, CodesCache, DvaeSamples, PairDataset, TextImageSamples, store_writer
from dalle_ds.data.augment import augment_for_transformer
from dalle_ds.data.codes import cache_codes
from dalle_ds.data.faults import DAMAGED_FILE, MISSING_FILE, NO_FEATURES, TRUNCATED_FILE, RowError
from dalle_ds.data.images import center_crop_resize
from dalle_ds.data.order import hash_integers
from dalle_ds.errors import ConfigError, DataChangedError, DataError

FINGERPRINT = "0123456789abcdef" * 4
SIZE = 16


class Letters:
    """A tokenizer whose tokens are code points; dropout drops letters."""

    def encode(self, text, *, dropout=0.0, rng=None, max_tokens=None) -> list[int]:
        return [ord(letter) for letter in text if not dropout or rng.random() >= dropout][:max_tokens]


class CornerCodes:
    """A dVAE of factor 8 whose code is the red value of each cell's first pixel."""

    config = DiscreteVAEConfig(image_size=SIZE, vocab_size=256)
    fingerprint = FINGERPRINT

    def to(self, device: torch.device) -> CornerCodes:
        return self

    def encode(self, images: torch.Tensor) -> torch.Tensor:
        assert images.dtype == torch.float32 and images.min() >= 0 and images.max() <= 1
        return (images[:, 0, ::8, ::8] * 255).round().long()


def corner_codes(pixels: np.ndarray) -> list[int]:
    return pixels[::8, ::8, 0].reshape(-1).tolist()


@pytest.fixture
def train(prepared: Path) -> PairDataset:
    return PairDataset.open(prepared, "train")


def broken_row(dataset: PairDataset, row: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """From here on, the image of a row is bytes that are none."""
    value = PairDataset._value

    def damaged(self: PairDataset, asked: int, column: str):
        return (
            b"damaged" if (asked, column, self.split) == (row, "image", dataset.split) else value(self, asked, column)
        )

    monkeypatch.setattr(PairDataset, "_value", damaged)


# --- datasets -------------------------------------------------------------------------------------------------------


def test_dataset_mistakes(prepared: Path, tmp_path: Path) -> None:
    with pytest.raises(DataError, match=r"does not exist: make it with launchers/prepare_data.py"):
        PairDataset.open(tmp_path / "nowhere", "train")
    with pytest.raises(DataError, match=r"is not a prepared data folder: no readable info\.json"):
        PairDataset.open(tmp_path, "train")
    with pytest.raises(DataError, match="has no split 'test': it has train, validation"):
        PairDataset.open(prepared, "test")
    damaged = tmp_path / "damaged"
    shutil.copytree(prepared, damaged)
    next((damaged / "train").glob("*.arrow")).write_bytes(b"")
    with pytest.raises(DataError, match="train"):
        PairDataset.open(damaged, "train")
    info = json.loads((damaged / "info.json").read_text())
    (damaged / "info.json").write_text(json.dumps({**info, "format_version": 99}))
    with pytest.raises(DataError, match="has data format 99"):
        PairDataset.open(damaged, "train")


def test_dataset_survives_pickling_small(train: PairDataset) -> None:
    data = pickle.dumps(train)
    assert len(data) < 2000
    assert np.array_equal(pickle.loads(data).image(3), train.image(3))


def test_dataset_names_the_row_it_cannot_decode(train: PairDataset, monkeypatch: pytest.MonkeyPatch) -> None:
    broken_row(train, 2, monkeypatch)
    with pytest.raises(DataError, match=rf"train row 2 \({train.name(2)}\): image cannot be decoded"):
        train.image(2)
    with pytest.raises(IndexError):
        train.image(len(train))


# --- samples --------------------------------------------------------------------------------------------------------


def test_dvae_samples(train: PairDataset) -> None:
    samples = DvaeSamples(train, SIZE, train=True)
    first, second = (samples.sample(0, np.random.default_rng(seed))["image"] for seed in (0, 1))
    assert first.shape == (3, SIZE, SIZE) and first.dtype == np.uint8
    assert not np.array_equal(first, second)
    central = DvaeSamples(train, SIZE, train=False).sample(0, np.random.default_rng(0))["image"]
    assert np.array_equal(central, center_crop_resize(train.image(0), SIZE).transpose(2, 0, 1))


@pytest.mark.parametrize("fits", [True, False])
def test_images_of_a_small_split_are_decoded_once(
    train: PairDataset, fits: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    decoded: list[int] = []
    picture = PairDataset.image
    monkeypatch.setattr(PairDataset, "image", lambda self, row, *a: (decoded.append(row), picture(self, row, *a))[1])
    bytes_needed = len(train) * train.image(0).nbytes
    monkeypatch.setattr("dalle_ds.data.samples.KEPT_BYTES", bytes_needed if fits else bytes_needed - 1)
    decoded.clear()
    samples, fresh = (DvaeSamples(train, SIZE, train=True) for _ in range(2))
    views = [samples.sample(0, np.random.default_rng(seed))["image"] for seed in range(3)]
    assert decoded == [0] * (1 if fits else 3)
    again = [fresh.sample(0, np.random.default_rng(seed))["image"] for seed in (2, 1, 0)]
    assert all(np.array_equal(view, other) for view, other in zip(views, again[::-1], strict=True))


def text_samples(dataset: PairDataset, **changes) -> TextImageSamples:
    options = {"text_len": 12, "image_size": SIZE, "train": True, **changes}
    return TextImageSamples(dataset, Letters(), **options)


def texts(samples: TextImageSamples, count: int) -> set[str]:
    drawn = (samples.sample(0, np.random.default_rng(seed))["text"] for seed in range(count))
    return {"".join(chr(token) for token in text if token >= 0) for text in drawn}


def test_captions_are_chosen_padded_and_cut(train: PairDataset) -> None:
    both = {caption[:12] for caption in train.captions(0)}
    assert len(both) == 2
    assert texts(text_samples(train), 20) == both
    assert texts(text_samples(train, train=False), 20) == {train.captions(0)[0][:12]}
    text = text_samples(train, train=False, text_len=40).sample(0, np.random.default_rng(0))["text"]
    length = len(train.captions(0)[0])
    assert text.dtype == np.int64 and text.shape == (40,)
    assert (text[:length] >= 0).all() and (text[length:] == -1).all()


def test_dropouts_act_in_training_only(train: PairDataset) -> None:
    samples = text_samples(train, caption_dropout=0.3)
    empty = [(samples.sample(0, np.random.default_rng(seed))["text"] == -1).all() for seed in range(400)]
    assert 0.2 < np.mean(empty) < 0.4
    assert len(texts(text_samples(train, bpe_dropout=0.2), 30)) > 10
    assert len(texts(text_samples(train, train=False, caption_dropout=0.5, bpe_dropout=0.5), 30)) == 1


def test_live_pictures_are_the_transformers_views(train: PairDataset) -> None:
    image = text_samples(train).sample(0, np.random.default_rng(0))["image"]
    assert image.shape == (3, SIZE, SIZE) and image.dtype == np.uint8
    central = text_samples(train, train=False).sample(0, np.random.default_rng(0))["image"]
    assert np.array_equal(central, center_crop_resize(train.image(0), SIZE).transpose(2, 0, 1))


# --- codes ----------------------------------------------------------------------------------------------------------


@pytest.fixture
def data(prepared: Path, tmp_path: Path) -> Path:
    """A copy of the prepared folder to cache codes in."""
    shutil.copytree(prepared, tmp_path / "data")
    return tmp_path / "data"


@pytest.mark.parametrize(("batch_size", "workers"), [(64, 0), (5, 0), (7, 2)])
def test_cached_codes_are_those_of_the_views(data: Path, batch_size: int, workers: int) -> None:
    report = cache_codes(CornerCodes(), data, views=3, seed=9, batch_size=batch_size, workers=workers)
    assert report.unreadable == {"train": 0, "validation": 0} and not report.already_there
    train, cache = PairDataset.open(data, "train"), CodesCache.open(data, FINGERPRINT, "train")
    assert (len(cache), cache.views, cache.grid) == (len(train), 3, (2, 2))
    for row, view in itertools.product((0, 7, len(train) - 1), range(3)):
        rng = np.random.default_rng(hash_integers(9, row, view))
        expected = corner_codes(augment_for_transformer(train.image(row), SIZE, rng))
        codes = cache.codes(row, view)
        assert codes.dtype == np.int64 and codes.tolist() == expected
    validation, cache = PairDataset.open(data, "validation"), CodesCache.open(data, FINGERPRINT, "validation")
    assert cache.views == 1
    for row in range(len(validation)):
        assert cache.codes(row, 0).tolist() == corner_codes(center_crop_resize(validation.image(row), SIZE))


def test_codes_kept_elsewhere_are_the_same_and_as_well_checked(data: Path, tmp_path: Path) -> None:
    """Of data that cannot be written; one folder has those of several corpora."""
    codes, before = tmp_path / "codes", sorted(data.rglob("*"))
    cache_codes(CornerCodes(), data, views=2, codes_dir=codes)
    assert sorted(data.rglob("*")) == before
    other = Path(shutil.copytree(data, tmp_path / "other"))
    info = (other / "info.json").read_text()
    (other / "info.json").write_text(info.replace('"fingerprint": "', '"fingerprint": "f'))
    assert CodesCache.find(other, FINGERPRINT, "train", codes) is None
    assert CodesCache.find(data, "f" + FINGERPRINT, "train", codes) is None
    assert not cache_codes(CornerCodes(), other, views=2, codes_dir=codes).already_there
    cache_codes(CornerCodes(), data, views=2)
    found, inside = CodesCache.open(data, FINGERPRINT, "train", codes), CodesCache.open(data, FINGERPRINT, "train")
    assert all(np.array_equal(found.codes(row, 1), inside.codes(row, 1)) for row in range(len(found)))
    assert found.fingerprint == inside.fingerprint
    of_data, of_other = sorted(codes.iterdir(), key=lambda path: path.name.startswith("f"))
    shutil.rmtree(of_data)
    of_other.rename(of_data)
    with pytest.raises(DataError, match="data_fingerprint"):
        CodesCache.open(data, FINGERPRINT, "train", codes)


def test_data_that_cannot_be_written_names_the_option_for_elsewhere(data: Path) -> None:
    (data / "codes").write_text("no folder can be made here")
    with pytest.raises(DataError, match="--codes_out"):
        cache_codes(CornerCodes(), data, views=2)


def test_samples_draw_cached_views(data: Path) -> None:
    cache_codes(CornerCodes(), data, views=3)
    train, cache = PairDataset.open(data, "train"), CodesCache.open(data, FINGERPRINT, "train")
    samples = text_samples(train, codes=cache)
    views = {tuple(cache.codes(4, view)) for view in range(3)}
    assert len(views) == 3
    assert {tuple(samples.sample(4, np.random.default_rng(seed))["codes"]) for seed in range(30)} == views
    samples = text_samples(train, codes=cache, train=False)
    assert {tuple(samples.sample(4, np.random.default_rng(seed))["codes"]) for seed in range(9)} == {
        tuple(cache.codes(4, 0))
    }
    batch = next(iter(BatchLoader(samples, seed=0, batch_size=8, micro_batch=4, rank=0, world_size=1, workers=1)))
    assert batch["codes"].shape == (4, 4) and batch["codes"].dtype == torch.int64
    assert batch["text"].shape == (4, 12) and "image" not in batch


def test_unreadable_pictures_have_no_codes_and_are_replaced(data: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    train = PairDataset.open(data, "train")
    broken_row(train, 5, monkeypatch)
    report = cache_codes(CornerCodes(), data, views=2)
    assert report.unreadable == {"train": 1, "validation": 0}
    cache = CodesCache.open(data, FINGERPRINT, "train")
    with pytest.raises(DataError, match="train row 5 has no codes"):
        cache.codes(5, 0)
    cache.codes(4, 0), cache.codes(6, 1)
    samples = text_samples(train, codes=cache)
    epoch = BatchLoader(samples, seed=0, batch_size=len(train), micro_batch=1, rank=0, world_size=1)
    assert sum(int(batch["skipped"]) for batch in itertools.islice(epoch, len(train))) == 1


@pytest.mark.parametrize(("vocab_size", "dtype"), [(65_536, "<u2"), (65_537, "<u4")])
def test_codes_are_stored_as_narrow_as_the_vocabulary_allows(data: Path, vocab_size: int, dtype: str) -> None:
    class Last(CornerCodes):
        config = DiscreteVAEConfig(image_size=SIZE, vocab_size=vocab_size)

        def encode(self, images: torch.Tensor) -> torch.Tensor:
            return torch.full((len(images), 2, 2), vocab_size - 1)

    cache_codes(Last(), data, views=2)
    with pa.ipc.open_stream(next(data.glob("codes/*/train/*.arrow"))) as batches:
        rows = batches.read_all().to_pylist()
    assert len(rows) == 2 * len(PairDataset.open(data, "train"))
    assert np.frombuffer(rows[1]["vector"], dtype).tolist() == [vocab_size - 1] * 4
    assert CodesCache.open(data, FINGERPRINT, "train").codes(0, 1).tolist() == [vocab_size - 1] * 4


def test_finding_a_cache(data: Path) -> None:
    assert CodesCache.find(data, FINGERPRINT, "train") is None
    with pytest.raises(DataError, match=r"does not exist: make it with .*--cache_codes"):
        CodesCache.open(data, FINGERPRINT, "train")
    cache_codes(CornerCodes(), data, views=2)
    assert CodesCache.find(data, "f" * 64, "train") is None
    with pytest.raises(DataError, match="dvae_fingerprint"):  # equal first digits do not make it the same dVAE
        CodesCache.find(data, FINGERPRINT[:-1] + "0", "train")
    with pytest.raises(DataError, match="has no split 'compositional'"):
        CodesCache.find(data, FINGERPRINT, "compositional")
    found = CodesCache.find(data, FINGERPRINT, "train")
    assert found is not None
    codes = found.codes(1, 1)
    sent = pickle.dumps(found)
    assert len(sent) < 3000  # the codes themselves are not sent along
    assert np.array_equal(pickle.loads(sent).codes(1, 1), codes)


def test_codes_of_other_data_are_refused(data: Path) -> None:
    cache_codes(CornerCodes(), data, views=2)
    info = json.loads((data / "info.json").read_text())
    (data / "info.json").write_text(json.dumps({**info, "fingerprint": "other"}))
    with pytest.raises(DataError, match=r"has data_fingerprint .* not 'other'"):
        CodesCache.find(data, FINGERPRINT, "train")


def test_the_same_cache_is_left_alone_and_another_refused(data: Path) -> None:
    cache_codes(CornerCodes(), data, views=2)
    stamps = [path.stat().st_mtime_ns for path in data.glob("codes/*/train/*")]
    assert cache_codes(CornerCodes(), data, views=2).already_there
    assert [path.stat().st_mtime_ns for path in data.glob("codes/*/train/*")] == stamps
    with pytest.raises(DataError, match=r"holds other codes of this model \(different: seed, views\)"):
        cache_codes(CornerCodes(), data, views=3, seed=1)
    manifest = next(data.glob("codes/*/codes.json"))
    manifest.write_text(manifest.read_text().replace('"format_version": 3', '"format_version": 1'))
    with pytest.raises(DataError, match=r"\(different: format_version\)"):
        cache_codes(CornerCodes(), data, views=2)
    with pytest.raises(DataError, match=r"has format_version 1, not 3"):
        CodesCache.find(data, FINGERPRINT, "train")
    cache_codes(CornerCodes(), data, views=3, seed=1, overwrite=True)
    assert CodesCache.open(data, FINGERPRINT, "train").views == 3
    assert [path.name for path in (data / "codes").iterdir()] == [FINGERPRINT[:16]]
    with pytest.raises(ConfigError, match="views"):
        cache_codes(CornerCodes(), data, views=0)


def test_a_full_disk_leaves_no_cache(data: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(*_args) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(store_writer.StoreWriter, "_write_batch", full)
    with pytest.raises(DataError, match="no space left"):
        cache_codes(CornerCodes(), data, views=2)
    assert CodesCache.find(data, FINGERPRINT, "train") is None
    assert list((data / "codes").iterdir()) == []


# --- damaged codes --------------------------------------------------------------------------------------------------


@pytest.fixture
def cached(data: Path) -> Path:
    """The folder of the codes of `data`."""
    cache_codes(CornerCodes(), data, views=3)
    return data / "codes" / FINGERPRINT[:16]


def all_codes(data: Path) -> list[list[int] | None]:
    """The codes of each view of each training row, None where they cannot be read."""
    cache = CodesCache.open(data, FINGERPRINT, "train")
    found: list[list[int] | None] = []
    for row, view in itertools.product(range(len(cache)), range(3)):
        try:
            found.append(cache.codes(row, view).tolist())
        except DataError:
            found.append(None)
    return found


def test_damaged_codes_are_never_taken_for_codes(data: Path, cached: Path) -> None:
    """A flipped bit in a vector or its check costs that view alone; elsewhere, it may cost the file, or nothing."""
    right = all_codes(data)
    (path,) = (cached / "train").glob("*.arrow")
    content = path.read_bytes()
    vectors = np.array([code for view in right for code in view or ()], dtype="<u2").tobytes()
    of_vectors = range(content.index(vectors), content.index(vectors) + len(vectors))
    for position in range(0, len(content), 3):
        damaged = bytearray(content)
        damaged[position] ^= 0x40
        path.write_bytes(damaged)
        try:
            found = all_codes(data)
        except DataError:
            found = [None] * len(right)
        assert all(value in (None, expected) for value, expected in zip(found, right, strict=True))
        if position in of_vectors:
            assert found.count(None) == 1
    assert len(content) > 800
    path.write_bytes(content)
    assert all_codes(data) == right


def test_codes_in_the_place_of_others_are_noticed(data: Path, cached: Path) -> None:
    """Their checks move with them, so that nothing else would tell."""
    (path,) = (cached / "train").glob("*.arrow")
    with pa.ipc.open_stream(path.read_bytes()) as batches:
        (batch,) = batches
    order = [1, 0, *range(2, len(batch))]
    with pa.OSFile(str(path), "wb") as file, pa.ipc.new_stream(file, batch.schema) as stream:
        stream.write_batch(batch.take(order))
    assert [place for place, codes in enumerate(all_codes(data)) if codes is None] == [0, 1]


@pytest.mark.parametrize(
    "damage",
    [
        {"rows": {"train": 23, "validation": 6}},
        {"views": 2},
        {"views": True},
        {"shape": [2, 2, 0]},
        {"shape": [2**31, 2**31]},
        {"shape": [-2, -2]},
        {"shape": 4},
        {"dtype": "O"},
        {"dtype": "<u4"},
        {"unreadable": {}},
        {"unreadable": {"train": -1}},
        {"files": {"train": [{"file": "x"}]}},
        {"files": {"train": []}},
    ],
)
def test_nothing_of_a_manifest_is_believed(data: Path, cached: Path, damage: dict) -> None:
    manifest = json.loads((cached / "codes.json").read_text())
    (cached / "codes.json").write_text(json.dumps(manifest | damage))
    with pytest.raises(DataError):
        CodesCache.open(data, FINGERPRINT, "train").codes(0, 0)


def test_files_of_codes_that_are_lost_cost_their_rows(data: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(store_writer, "_FILE_BYTES", 500)
    monkeypatch.setattr(store_writer, "_BATCH_ROWS", 10)
    cache_codes(CornerCodes(), data, views=3)
    right = all_codes(data)
    files = sorted((data / "codes" / FINGERPRINT[:16] / "train").glob("*.arrow"))
    assert len(files) > 3
    opened = CodesCache.open(data, FINGERPRINT, "train")
    opened.codes(0, 0)
    with files[0].open("r+b") as file:
        file.truncate(130)
    with pytest.raises(RowError) as caught:
        opened.codes(0, 0)
    assert (caught.value.reason, caught.value.where) == (TRUNCATED_FILE, str(files[0]))
    files[1].unlink()
    cache = CodesCache.open(data, FINGERPRINT, "train")
    assert [(fault.reason, fault.where) for fault in cache.faults] == [
        (TRUNCATED_FILE, str(files[0])),
        (MISSING_FILE, str(files[1])),
    ]
    found = all_codes(data)
    assert all(value in (None, expected) for value, expected in zip(found, right, strict=True))
    assert 0 < found.count(None) < len(found) / 2
    for path in files[2:]:
        path.unlink()
    with pytest.raises(DataError, match="again with --overwrite True"):
        CodesCache.find(data, FINGERPRINT, "train")


def store_as_npy(cached: Path, views: int) -> None:
    """Rewrite a cache as former versions wrote it."""
    manifest = json.loads((cached / "codes.json").read_text())
    files = {}
    for split, rows in manifest["rows"].items():
        with pa.ipc.open_stream(next((cached / split).glob("*.arrow"))) as batches:
            vectors = batches.read_all().to_pydict()["vector"]
        shape = (rows, views if split == "train" else 1, 4)
        np.save(cached / f"{split}.npy", np.frombuffer(b"".join(vectors), "<u2").reshape(shape))
        checks = [0 if vector == bytes(8) else xxhash.xxh32_intdigest(vector) or 1 for vector in vectors]
        np.save(cached / f"{split}.checks.npy", np.array(checks, "<u4").reshape(shape[:2]))
        shutil.rmtree(cached / split)
        for path in (cached / f"{split}.npy", cached / f"{split}.checks.npy"):
            files[path.name] = {"bytes": path.stat().st_size, "xxh3_128": xxhash.xxh3_128_hexdigest(path.read_bytes())}
    del manifest["shape"], manifest["dtype"]
    former = {"format_version": 2, "grid": [2, 2], "vocab_size": 256, "files": files}
    (cached / "codes.json").write_text(json.dumps(manifest | former))


def test_codes_of_a_former_version_are_read(data: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    broken_row(PairDataset.open(data, "train"), 5, monkeypatch)
    cache_codes(CornerCodes(), data, views=3)
    right, cached = all_codes(data), data / "codes" / FINGERPRINT[:16]
    store_as_npy(cached, 3)
    assert all_codes(data) == right
    with pytest.raises(RowError) as none:
        CodesCache.open(data, FINGERPRINT, "train").codes(5, 0)
    assert none.value.reason == NO_FEATURES
    assert cache_codes(CornerCodes(), data, views=3).already_there
    opened = pickle.loads(pickle.dumps(CodesCache.open(data, FINGERPRINT, "train")))
    opened.check_unchanged()
    content = bytearray((cached / "train.npy").read_bytes())
    content[-1] ^= 1
    (cached / "train.npy").write_bytes(content)
    os.utime(cached / "train.npy", (1, 1))
    with pytest.raises(RowError) as damaged:
        opened.codes(len(opened) - 1, 2)
    assert damaged.value.reason == DAMAGED_FILE and all_codes(data)[:-1] == right[:-1]
    with pytest.raises(DataChangedError):
        opened.check_unchanged()
    (cached / "train.checks.npy").unlink()
    with pytest.raises(DataError, match=r"train\.checks\.npy"):
        CodesCache.open(data, FINGERPRINT, "train")


def test_pictures_without_codes_are_known_from_the_start(data: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    train = PairDataset.open(data, "train")
    broken_row(train, 5, monkeypatch)
    cache_codes(CornerCodes(), data, views=2)
    samples = text_samples(train, codes=CodesCache.open(data, FINGERPRINT, "train"))
    assert [fault.rows for fault in samples.faults] == [1]
    assert text_samples(train).faults == ()


def test_codes_cached_again_under_a_run_are_noticed(data: Path, cached: Path) -> None:
    samples = text_samples(PairDataset.open(data, "train"), codes=CodesCache.open(data, FINGERPRINT, "train"))
    samples.check_unchanged()
    cache_codes(CornerCodes(), data, views=3, seed=1, overwrite=True)
    with pytest.raises(DataChangedError, match="were cached again since they were opened"):
        samples.check_unchanged()
    shutil.rmtree(cached)
    with pytest.raises(DataChangedError, match=r"codes\.json cannot be read"):
        samples.check_unchanged()


@pytest.mark.parametrize("manifest", ["info.json", "codes.json"])
def test_a_disk_that_does_not_answer_for_a_while_is_no_change(
    data: Path, cached: Path, monkeypatch: pytest.MonkeyPatch, manifest: str
) -> None:
    samples = text_samples(PairDataset.open(data, "train"), codes=CodesCache.open(data, FINGERPRINT, "train"))
    read = Path.read_bytes

    def unreadable(path: Path) -> bytes:
        if path.name == manifest:
            raise OSError(errno.EIO, "Input/output error")
        return read(path)

    with monkeypatch.context() as patch:
        patch.setattr(Path, "read_bytes", unreadable)
        samples.check_unchanged()
    samples.check_unchanged()
    next(path for path in (data / manifest, cached / manifest) if path.exists()).unlink()
    with pytest.raises(DataChangedError, match="has changed since it was opened"):
        samples.check_unchanged()


def test_a_folder_that_cannot_be_looked_at_is_an_error_that_names_it(
    data: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def unreadable(path: Path) -> bool:
        raise PermissionError(errno.EACCES, "Permission denied")

    train = PairDataset.open(data, "train")
    monkeypatch.setattr(Path, "is_dir", unreadable)
    with pytest.raises(DataError, match=r"no readable info\.json \(.*Permission denied"):
        PairDataset.open(data, "train")
    train.check_unchanged()


def test_a_killed_process_that_decodes_for_the_cache_is_an_error_that_names_it(
    data: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    me, picture = os.getpid(), PairDataset.image

    def deadly(self: PairDataset, row: int, short_side: int | None = None) -> np.ndarray:
        if row == 7 and os.getpid() != me:
            os.kill(os.getpid(), signal.SIGKILL)
        return picture(self, row, short_side)

    monkeypatch.setattr(PairDataset, "image", deadly)
    with pytest.raises(DataError, match=r"^loader process \d+ was killed \(SIGKILL\), most likely for lack of memory"):
        cache_codes(CornerCodes(), data, views=2, batch_size=4, workers=2)
    assert CodesCache.find(data, FINGERPRINT, "train") is None
