"""Several corpora in one order: exact shares, every row once an epoch, the same wherever and however it is read."""

from __future__ import annotations

import dataclasses
import itertools
import json
import shutil
from collections import Counter
from pathlib import Path

import numpy as np
import pytest

from dalle_ds.config import ClipConfig, ClipRun, DvaeRun, TransformerLoaderConfig, TransformerRun, to_dict
from dalle_ds.data import BatchLoader, CodesCache, Mixture, PairDataset, evaluation_batches
from dalle_ds.data.codes import cache_codes
from dalle_ds.data.order import rows_of, turns_of
from dalle_ds.data.prepare import PrepareOptions, prepare
from dalle_ds.errors import CheckpointError, ConfigError, DataError
from dalle_ds.models import DiscreteVAE
from dalle_ds.resilience.rollback import Rollback, Rollbacks
from dalle_ds.tasks.clip import ClipTask
from dalle_ds.tasks.dvae import DvaeTask
from dalle_ds.tasks.transformer import TransformerTask
from dalle_ds.training.batches import Batches
from dalle_ds.training.run_directory import RunDirectory
from tests.conftest import TINY_DALLE, TINY_DVAE
from tests.data.test_loader import Rows, loader, steps
from tests.training.test_layouts import deepspeed_json, launch, metrics


def block_of(weights: tuple[int, ...]) -> int:
    """How many positions it takes until the order of turns has given every corpus its share."""
    return -(-256 // sum(weights)) * sum(weights)


@pytest.mark.parametrize("weights", [(1, 1), (2, 1), (1, 1, 1), (7, 3), (5, 1, 300)])
def test_shares_are_exact_in_every_block(weights: tuple[int, ...]) -> None:
    length = block_of(weights)
    corpora, _ = turns_of(np.arange(5 * length), 3, weights)
    blocks = corpora.reshape(5, length)
    for block in blocks:
        counts = np.bincount(block, minlength=len(weights))
        assert counts.tolist() == [length * weight // sum(weights) for weight in weights]
    assert not any((first == second).all() for first, second in itertools.pairwise(blocks)), (
        "blocks have their own orders"
    )
    assert (turns_of(np.arange(length), 4, weights)[0] != blocks[0]).any(), "and seeds"


def test_every_position_is_of_a_corpus_with_the_probability_of_its_weight() -> None:
    seeds = 800
    positions = np.array([0, 1, 100, 255])
    first = np.stack([turns_of(positions, seed, (2, 1))[0] == 0 for seed in range(seeds)])
    deviation = (2 / 9 / seeds) ** 0.5
    assert np.abs(first.mean(axis=0) - 2 / 3).max() < 4 * deviation
    pairs = first[:, 0] & first[:, 1]
    assert abs(pairs.mean() - 4 / 9) < 4 * (20 / 81 / seeds) ** 0.5 + 1 / 256, "neighbours do not know of each other"


@pytest.mark.parametrize("weights", [(1, 1), (2, 1), (7, 3)])
def test_draws_of_a_corpus_are_counted_in_order_from_any_position(weights: tuple[int, ...]) -> None:
    corpora, draws = turns_of(np.arange(3_000), 9, weights)
    for number in range(len(weights)):
        assert draws[corpora == number].tolist() == list(range((corpora == number).sum()))
    here = np.random.default_rng(0).permutation(3_000)[:500]
    again = turns_of(here, 9, weights)
    assert np.array_equal(again[0], corpora[here]) and np.array_equal(again[1], draws[here])
    late, count = turns_of(np.array([10**15]), 9, weights)
    assert abs(count[0] - 10**15 * weights[late[0]] / sum(weights)) < 256


def test_the_order_of_turns_is_the_same_for_ever() -> None:
    # Runs that resume rest on it.
    corpora, draws = turns_of(np.arange(10**6, 10**6 + 12), 0, (2, 1))
    assert corpora.tolist() == [0, 0, 0, 1, 1, 0, 1, 0, 0, 0, 0, 1]
    assert draws[corpora == 1].tolist() == [333_333, 333_334, 333_335, 333_336]


def test_only_the_ratio_of_weights_matters() -> None:
    expected = turns_of(np.arange(1_000), 1, (2, 1))
    assert all(map(np.array_equal, expected, turns_of(np.arange(1_000), 1, (200_000, 100_000))))


def mixed(weights: tuple[int, ...] = (), bad: frozenset[int] = frozenset()) -> Mixture:
    return Mixture([Rows(40), Rows(25, bad)], weights)


def test_each_corpus_is_gone_through_in_epochs_of_its_own() -> None:
    rows = mixed((2, 1)).rows_at(np.arange(3_000), 5)
    first, second = rows[rows < 40], rows[rows >= 40] - 40
    assert first.tolist() == rows_of(np.arange(len(first)), 5, 40).tolist(), "as in a run on the first alone"
    for found, length in ((first, 40), (second, 25)):
        epochs = found[: len(found) // length * length].reshape(-1, length)
        assert len(epochs) > 20
        assert all(np.array_equal(np.sort(epoch), np.arange(length)) for epoch in epochs)
        assert not any((one == other).all() for one, other in itertools.pairwise(epochs))
    twins = Mixture([Rows(40), Rows(40)]).rows_at(np.arange(2_560), 5)
    one, other = twins[twins < 40], twins[twins >= 40] - 40
    assert (one == other).mean() < 0.1, "corpora of one length do not go hand in hand"


def test_rows_are_of_each_corpus_in_proportion_to_its_weight() -> None:
    mixture = Mixture([Rows(40), Rows(7)], (3, 1))
    rows = mixture.rows_at(np.arange(4_000), seed=1)
    assert (rows >= 40).sum() == pytest.approx(1_000, abs=20)
    assert mixture.shares == [0.75, 0.25]


def test_one_corpus_has_the_order_it_always_had() -> None:
    positions = np.random.default_rng(1).integers(0, 10**12, 1_000)
    assert np.array_equal(Mixture([Rows(30)]).rows_at(positions, 5), rows_of(positions, 5, 30))
    assert steps(Mixture([Rows(30, frozenset({3, 4}))]), 6) == steps(Rows(30, frozenset({3, 4})), 6)


@pytest.mark.parametrize(
    ("world_size", "micro_batch", "workers"), [(1, 3, 0), (2, 6, 0), (3, 2, 0), (4, 3, 0), (2, 3, 2)]
)
def test_a_steps_samples_do_not_depend_on_how_it_is_divided(world_size: int, micro_batch: int, workers: int) -> None:
    samples = mixed((2, 1), bad=frozenset({3, 4}))
    divided = steps(samples, 30, world_size=world_size, micro_batch=micro_batch, workers=workers)
    assert [sorted(step) for step in divided] == [sorted(step) for step in steps(samples, 30)]


def test_a_run_may_resume_at_any_step() -> None:
    samples = mixed((7, 3), bad=frozenset({3}))
    whole = steps(samples, 60, micro_batch=4)
    for start in (1, 20, 21, 22, 43, 59):  # blocks of 260 samples end within steps 21 and 43
        assert steps(samples, 60 - start, start_step=start, micro_batch=4) == whole[start:]


def test_what_a_run_leaves_out_when_it_goes_back_is_left_out_of_all_corpora() -> None:
    samples = mixed((2, 1))
    whole = steps(samples, 40)
    rollbacks = Rollbacks((Rollback(from_update=25, to_update=20, skip_from=20, skip_to=25),))
    for update in (19, 20, 30):
        place = rollbacks.data_step(update)
        assert place == (update if update < 20 else update + 5)
        assert steps(samples, 1, start_step=place) == whole[place : place + 1]


def test_another_row_of_the_same_corpus_stands_in_for_one_that_cannot_be_read() -> None:
    bad = frozenset(range(20))  # of the second corpus's 25

    class Told(Rows):
        def sample(self, row: int, rng: np.random.Generator) -> dict:
            return {**super().sample(row, rng), "corpus": self.length}

    samples = Mixture([Told(40), Told(25, bad)])
    batches = list(itertools.islice(loader(samples, batch_size=256, micro_batch=256), 4))
    assert sum(int(batch["skipped"].sum()) for batch in batches) > 400
    for batch in batches:
        assert Counter(batch["corpus"].tolist()) == {40: 128, 25: 128}


def test_evaluation_takes_rows_of_all_corpora() -> None:
    samples = Mixture([Rows(40), Rows(0), Rows(20)])
    (batch,) = evaluation_batches(samples, 6, rank=0, world_size=1, rows=6)
    assert batch["row"].tolist() == [0, 10, 20, 30, 0, 10]
    rng = np.random.default_rng(0)
    assert [mixed().sample(row, rng)["row"] for row in range(65)] == [*range(40), *range(25)]


# --- prepared folders -----------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def more_data(corpus: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Thirty of the corpus's images, prepared by themselves."""
    folder = tmp_path_factory.mktemp("more")
    (folder / "corpus").mkdir()
    for file in sorted(corpus.iterdir())[:60]:
        shutil.copy(file, folder / "corpus")
    prepare(PrepareOptions(corpus="folder", source=str(folder / "corpus"), validation=0.3), str(folder / "data"))
    return folder / "data"


@pytest.fixture
def runs(
    data: Path, more_data: Path, dvae_export: Path, tokenizer_file: Path
) -> list[DvaeRun | TransformerRun | ClipRun]:
    both = {"data": (str(data), str(more_data)), "data_weights": (1, 2)}
    clip = ClipConfig(
        image_size=16, patch_size=8, vision_width=16, vision_depth=1, vision_heads=2, text_len=8, text_vocab=402,
        text_width=16, text_depth=1, text_heads=2, embed_dim=8,
    )  # fmt: skip
    return [
        DvaeRun(**both, model=TINY_DVAE),
        TransformerRun(**both, dvae=str(dvae_export), tokenizer=str(tokenizer_file), model=TINY_DALLE),
        ClipRun(**both, tokenizer=str(tokenizer_file), model=clip),
    ]


TASKS = {DvaeRun: DvaeTask, TransformerRun: TransformerTask, ClipRun: ClipTask}


def test_every_stage_trains_on_several_corpora(runs: list, data: Path, more_data: Path) -> None:
    folders = (data, more_data)
    fingerprints = [PairDataset.open(folder, "train").fingerprint for folder in folders]
    for run in runs:
        task = TASKS[type(run)](run)
        for split in ("train", "validation"):
            samples = task.samples(split)
            assert isinstance(samples, Mixture)
            assert list(map(len, samples.corpora)) == [len(PairDataset.open(folder, split)) for folder in folders]
        train = task.samples("train")
        assert train.shares == [1 / 3, 2 / 3]
        batch = next(iter(BatchLoader(train, seed=0, batch_size=4, micro_batch=4, rank=0, world_size=1)))
        assert len(batch["key"]) == 4
        # What a resumed run must find again names each folder; another order of them, or one alone, is told from it.
        identity = task.identity()
        assert [identity["data 1"], identity["data 2"]] == fingerprints
        swapped = TASKS[type(run)](dataclasses.replace(run, data=run.data[::-1])).identity()
        assert identity["data 1"] != swapped["data 1"]
        alone = TASKS[type(run)](dataclasses.replace(run, data=run.data[0], data_weights=())).identity()
        assert alone["data"] == fingerprints[0] != identity["data"]
        assert "data 1" not in alone


def test_a_resumed_run_keeps_its_weights(runs: list, tmp_path: Path) -> None:
    run = runs[0]
    directory = RunDirectory(tmp_path / "run", "dvae", run)
    directory.claim()
    directory.write_config({})
    directory.release()
    moved = dataclasses.replace(run, data=("elsewhere", "more"))
    RunDirectory(tmp_path / "run", "dvae", moved)  # fingerprints tell whether it is the same
    with pytest.raises(CheckpointError, match="data_weights"):
        RunDirectory(tmp_path / "run", "dvae", dataclasses.replace(run, data_weights=(2, 1)))


def test_a_corpus_is_not_taken_twice(runs: list, more_data: Path, tmp_path: Path) -> None:
    copy = shutil.copytree(more_data, tmp_path / "copy")
    for folders in ((str(more_data), str(more_data)), (str(more_data), str(copy))):
        with pytest.raises(ConfigError, match="--data names") as told:
            DvaeTask(dataclasses.replace(runs[0], data=folders)).identity()
        assert folders[1] in str(told.value)


def test_a_corpus_without_training_rows_is_named(runs: list, monkeypatch: pytest.MonkeyPatch, more_data: Path) -> None:
    class Empty(DvaeTask):
        def corpus_samples(self, folder: str, split: str) -> Rows:
            return Rows(0 if folder == str(more_data) else 5)

    assert len(Empty(runs[0]).samples("validation")) == 5
    with pytest.raises(DataError, match=str(more_data)):
        Empty(runs[0]).samples("train")


def test_a_changed_corpus_is_noticed(runs: list, data: Path, more_data: Path, tmp_path: Path) -> None:
    folders = [Path(shutil.copytree(folder, tmp_path / folder.parent.name)) for folder in (data, more_data)]
    for changed in folders:
        samples = DvaeTask(dataclasses.replace(runs[0], data=tuple(map(str, folders)))).samples("train")
        samples.check_unchanged()
        before = (changed / "info.json").read_text()
        (changed / "info.json").write_text(json.dumps({**json.loads(before), "fingerprint": "0" * 64}))
        with pytest.raises(DataError, match=changed.name):
            samples.check_unchanged()
        (changed / "info.json").write_text(before)


def test_codes_are_cached_ones_where_all_corpora_have_them(
    runs: list, data: Path, more_data: Path, tmp_path: Path
) -> None:
    folders = [Path(shutil.copytree(folder, tmp_path / folder.parent.name)) for folder in (data, more_data)]
    run = dataclasses.replace(runs[1], data=tuple(map(str, folders)))
    dvae = DiscreteVAE.from_pretrained(run.dvae)
    cached = dataclasses.replace(run, loader=TransformerLoaderConfig(codes="cached"))
    cache_codes(dvae, folders[0], views=2)
    task = TransformerTask(run)
    assert task.codes_source == "live" and task.identity()["codes"] == "live"
    (line,) = (line for line in task.describe() if line.startswith("image codes"))
    assert str(folders[1]) in line and str(folders[0]) not in line
    with pytest.raises(ConfigError, match="loader") as told:
        TransformerTask(cached).samples("train")
    assert str(folders[1]) in str(told.value) and str(folders[0]) not in str(told.value)
    cache_codes(dvae, folders[1], views=1)
    for again in (run, cached):
        task = TransformerTask(again)
        assert task.codes_source == "cached"
        rng = np.random.default_rng(0)
        samples = task.samples("validation")
        last = len(samples) - 1
        codes = CodesCache.open(folders[1], dvae.fingerprint, "validation")
        assert np.array_equal(samples.sample(last, rng)["codes"], codes.codes(len(codes) - 1, 0))
        names = [name for name in task.identity() if name.startswith("codes")]
        assert len({task.identity()[name] for name in names}) == 3


def test_the_start_of_a_run_tells_of_each_corpus(runs: list, data: Path, more_data: Path) -> None:
    run = runs[0]
    lines = Batches(DvaeTask(run), run, 4, mesh=None).describe()
    assert len(lines) == 2
    rows = [len(PairDataset.open(folder, "train")) for folder in (data, more_data)]
    for line, folder, share, count in zip(lines, (data, more_data), ("33.3%", "66.7%"), rows, strict=True):
        assert str(folder) in line and share in line and f"{count:,} training rows" in line
    alone = dataclasses.replace(run, data=str(data), data_weights=())
    assert Batches(DvaeTask(alone), alone, 4, mesh=None).describe() == []


@pytest.mark.slow
def test_a_run_on_two_corpora_resumes_bit_for_bit(data: Path, more_data: Path, tmp_path: Path) -> None:
    def job(name: str, steps: int) -> dict:
        run = {
            "data": [str(data), str(more_data)],
            "data_weights": [1, 2],
            "run_dir": str(tmp_path / name),
            "steps": steps,
            "save_every": 2,
            "optim": {"lr": 1e-2, "warmup_steps": 1, "schedule": "constant"},
            "loader": {"workers": 0},
            "report": {"log_every": 1, "validate_every": 0, "preview_every": 0},
            "train": {"batch_size": 8},
            "model": to_dict(TINY_DVAE),
        }
        return {"name": name, "stage": "dvae", "run": run, "deepspeed": deepspeed_json(1)}

    told = launch([job("straight", 6), job("resumed", 3), job("resumed", 6)], 1, tmp_path)
    assert "resumed from" in told and str(more_data) in told
    expected, found = metrics(tmp_path / "straight"), metrics(tmp_path / "resumed")
    assert found == expected and sorted(found) == list(range(1, 7))
