"""The checkpoints of a run: complete or absent, told from damaged ones to the last bit, kept or removed."""

from __future__ import annotations

import json
import threading
from collections.abc import Callable
from pathlib import Path

import pytest
import torch

from dalle_ds.errors import CheckpointError
from dalle_ds.optim import AdamW, WeightAverage
from dalle_ds.parallel import Mesh
from dalle_ds.training.checkpoints.content import TrainedTensors, load_state
from dalle_ds.training.checkpoints.manifest import (
    CheckpointFolder,
    Manifest,
    choose_checkpoint,
    faults_found_by_all,
    faults_of,
    require_whole,
)
from dalle_ds.training.checkpoints.saver import AsyncCheckpointer
from dalle_ds.training.checkpoints.storage import ParamShard
from dalle_ds.training.checkpoints.writing import Plan
from dalle_ds.training.zero_state import MasterWeights
from tests.training.by_hand import save_checkpoint

ALONE = Mesh(rank=0, world_size=1, device=torch.device("cpu"))
FILES = ("manifest.json", "state.json", "tensors/index.json", "tensors/rank-0.safetensors")


def state(step: int) -> dict[str, object]:
    return {"step": step, "identity": {}, "layout": {}, "learning_rate": None, "scales": None, "guard": None}


class Weights(MasterWeights):
    """Of a model of one tensor, without an engine."""

    def __init__(self, value: float) -> None:
        self.shards = [torch.full((3,), float(value))]
        self.param_shards = [ParamShard("w", (3,), 0, 3, 0, 0)]
        self.published = False

    @property
    def group_of(self) -> list[int]:  # type: ignore[override]
        return [0] * len(self.shards)

    def publish(self) -> None:
        self.published = True


def save(folder: Path, step: int, keep: int = 2, **changes: object) -> Path:
    weights = Weights(step)
    optimizer, average = AdamW(weights.shards), WeightAverage(weights.shards, 0.9)
    moments = optimizer.begin(weights.shards[0], "fp32", step=step, index=7, ceiling=0.5)
    moments["exp_avg"].fill_(-step)
    moments["exp_avg_sq"].fill_(step / 2)
    trained = TrainedTensors(weights, optimizer, average)
    return save_checkpoint(folder, step, state(step) | changes, trained, ALONE, keep=keep)


def test_the_newest_complete_checkpoint_counts_and_old_ones_go(tmp_path: Path) -> None:
    for step in (2, 10, 9):
        save(tmp_path, step)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["latest", "step-10", "step-9"]
    assert (tmp_path / "latest").read_text() == "step-10\n"
    newest = CheckpointFolder(tmp_path).newest()
    assert newest is not None and newest.name == "step-10"
    weights = Weights(0.0)
    optimizer, average = AdamW(weights.shards, lr=0.5), WeightAverage(weights.shards, 0.9)
    TrainedTensors(weights, optimizer, average).load(newest, ALONE)
    assert weights.shards[0].tolist() == average.averages[0].tolist() == [10] * 3
    assert weights.published
    found = optimizer.state[weights.shards[0]]
    assert found["exp_avg"].tolist() == [-10] * 3 and found["exp_avg_sq"].tolist() == [5] * 3
    assert (float(found["step"]), found["index"], found["ceiling"]) == (10, 7, 0.5)
    assert optimizer.param_groups[0]["lr"] == 0.5
    assert load_state(newest) == state(10) | {"format": 3}


def test_a_checkpoint_written_amid_bad_updates_is_gone_past_and_removed(tmp_path: Path) -> None:
    for step, bad in ((1, 0), (2, 0), (3, 1)):
        save(tmp_path, step, keep=3, guard={"bad_in_a_row": bad, "losses": []})
    assert CheckpointFolder(tmp_path).newest() == tmp_path / "step-3"
    folder = CheckpointFolder(tmp_path)
    assert folder.newest_good(ALONE) == tmp_path / "step-2"
    folder.drop_after(2)
    assert folder.newest() == tmp_path / "step-2" and (tmp_path / "step-1").is_dir()
    assert (tmp_path / "latest").read_text() == "step-2\n"
    assert CheckpointFolder(tmp_path / "nothing").newest_good(ALONE) is None


def test_the_newest_good_checkpoints_and_the_first_beyond_each_multiple_are_kept(tmp_path: Path) -> None:
    for step, bad in ((2, 0), (4, 0), (5, 0), (6, 0), (7, 0), (8, 1), (9, 2)):
        save(tmp_path, step, keep=9, guard={"bad_in_a_row": bad, "losses": []})
    folder = CheckpointFolder(tmp_path)
    folder.prune(1, 3)  # 4 is the first from 3 on
    assert [path.name for path in folder.all()] == ["step-4", "step-6", "step-7", "step-8", "step-9"]
    folder.prune(1, 3)
    assert [path.name for path in folder.all()] == ["step-4", "step-6", "step-7", "step-8", "step-9"]
    (tmp_path / "step-7" / "tensors" / "rank-0.safetensors").write_bytes(b"")
    folder.prune(1)  # a damaged one is no reason to remove a good one
    assert [path.name for path in folder.all()] == ["step-6", "step-7", "step-8", "step-9"]


@pytest.mark.parametrize(
    "place", ["dalle_ds.training.checkpoints.writing.os.fsync", "dalle_ds.training.checkpoints.manifest.sync_folder"]
)
def test_a_full_disk_leaves_nothing_half_written_and_is_told(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, place: str
) -> None:
    save(tmp_path, 1)

    def no_space(_: object) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(place, no_space)
    with pytest.raises(CheckpointError, match=r"step 2 could not be written to .*MiB free.*No space left"):
        save(tmp_path, 2)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["latest", "step-1"]
    assert (tmp_path / "latest").read_text() == "step-1\n"


def test_all_files_are_forced_to_the_disk_before_the_name_is_there(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    forced: list[set[str]] = []
    monkeypatch.setattr(
        "dalle_ds.training.checkpoints.manifest.sync_folder",
        lambda folder: forced.append({path.name for path in folder.rglob("*") if path.is_file()}),
    )
    final = save(tmp_path, 1)
    assert forced == [{path.name for path in final.rglob("*") if path.is_file()}]
    assert "manifest.json" in forced[0]


def test_an_unfinished_checkpoint_is_not_taken(tmp_path: Path) -> None:
    save(tmp_path, 1)
    (tmp_path / "partial-step-2" / "tensors").mkdir(parents=True)
    (tmp_path / "step-3").mkdir()  # no state: the renaming of something incomplete by hand
    newest = CheckpointFolder(tmp_path).newest()
    assert newest is not None and newest.name == "step-1"
    assert CheckpointFolder(tmp_path / "nowhere").newest() is None
    (tmp_path / "removed-step-0").mkdir()
    CheckpointFolder(tmp_path).clear()
    assert sorted(path.name for path in tmp_path.iterdir()) == ["latest", "step-1", "step-3"]


def test_a_broken_checkpoint_is_named(tmp_path: Path) -> None:
    final = save(tmp_path, 1)
    weights = Weights(0)
    file = final / "tensors" / "rank-0.safetensors"
    content = file.read_bytes()
    for harm, words in (
        (file.unlink, "broken or missing file"),
        (lambda: file.write_bytes(content[:-9]), "is cut off"),
    ):
        harm()
        with pytest.raises(
            CheckpointError, match=rf"step-1 cannot be loaded: .*{words}.*; delete it to resume from an older"
        ):
            TrainedTensors(weights, AdamW(weights.shards)).load(final, ALONE)
    written = json.loads((final / "state.json").read_text())
    for broken, words in (
        ("{", "cannot be read"),
        ("{}", "it has no identity, layout, learning_rate, step"),
        ("[]", "it has no"),
        (json.dumps(written | {"format": 2}), "was written by another version of dalle_ds"),
        (
            json.dumps({k: v for k, v in written.items() if k != "format"}),
            "was written by an earlier version of dalle_ds",
        ),
    ):
        (final / "state.json").write_text(broken)
        with pytest.raises(CheckpointError, match=words):
            load_state(final)


def test_a_checkpoint_of_another_model_or_other_moments_is_refused(tmp_path: Path) -> None:
    final = save(tmp_path, 1)
    weights = Weights(0)
    with pytest.raises(CheckpointError, match=r"moments are fp32.*optim\.moments"):
        TrainedTensors(weights, AdamW(weights.shards, moments="16-bit")).load(final, ALONE)
    for shard, words in (
        (ParamShard("w", (1, 3), 0, 3, 0, 0), r"the model's w has shape \(1, 3\), and its has shape \(3,\)"),
        (ParamShard("v", (3,), 0, 3, 0, 0), r"the model's v has shape \(3,\), and it has none"),
    ):
        weights.param_shards = [shard]
        with pytest.raises(CheckpointError, match=words):
            TrainedTensors(weights, AdamW(weights.shards)).load(final, ALONE)
    weights.param_shards = Weights(0).param_shards
    unaveraged = save_checkpoint(tmp_path, 2, state(2), TrainedTensors(weights, AdamW(weights.shards)), ALONE, keep=2)
    with pytest.raises(CheckpointError, match=r"average/w of 3 × 1 is needed, and .* has none"):
        TrainedTensors(weights, AdamW(weights.shards), WeightAverage(weights.shards, 0.9)).load(unaveraged, ALONE)


def test_a_shard_that_was_not_updated_yet_is_begun_anew_by_its_first_update(tmp_path: Path) -> None:
    weights = Weights(0)
    final = save_checkpoint(tmp_path, 1, state(1), TrainedTensors(weights, AdamW(weights.shards)), ALONE, keep=2)
    optimizer = AdamW(weights.shards)
    optimizer.begin(weights.shards[0], "fp32", step=9, index=0, ceiling=1.0)
    TrainedTensors(weights, optimizer).load(final, ALONE)
    assert not optimizer.state.get(weights.shards[0])


def test_a_parameter_that_was_never_updated_may_share_a_shard_with_one_that_was(tmp_path: Path) -> None:
    apart, together = Weights(0), Weights(0)
    apart.shards = [torch.ones(2), torch.full((1,), 2.0)]
    apart.param_shards = [ParamShard("a", (2,), 0, 2, 0, 0), ParamShard("b", (1,), 0, 1, 1, 0)]
    optimizer = AdamW(apart.shards)
    optimizer.begin(apart.shards[0], "fp32", step=4, index=0, ceiling=1.0)["exp_avg"].fill_(3.0)
    final = save_checkpoint(tmp_path, 4, state(4), TrainedTensors(apart, optimizer), ALONE, keep=2)
    together.param_shards = [ParamShard("b", (1,), 0, 1, 0, 0), ParamShard("a", (2,), 0, 2, 0, 1)]
    optimizer = AdamW(together.shards)
    TrainedTensors(together, optimizer).load(final, ALONE)
    assert together.shards[0].tolist() == [2, 1, 1]
    found = optimizer.state[together.shards[0]]
    assert found["exp_avg"].tolist() == [0, 3, 3] and float(found["step"]) == 4


# --- damage

FAULTS: dict[str, Callable[[Path, int], object]] = {
    "truncated": lambda file, place: file.write_bytes(file.read_bytes()[:place]),
    "zeroed": lambda file, _: file.write_bytes(bytes(file.stat().st_size)),
    "flipped": lambda file, place: file.write_bytes(flipped(file.read_bytes(), place)),
    "deleted": lambda file, _: file.unlink(),
}


def flipped(content: bytes, place: int, bit: int = 0) -> bytes:
    return content[:place] + bytes([content[place] ^ 1 << bit]) + content[place + 1 :]


@pytest.mark.parametrize("fault", FAULTS)
@pytest.mark.parametrize("name", FILES)
def test_a_damaged_file_is_found_and_the_checkpoint_before_is_taken(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], name: str, fault: str
) -> None:
    for step in (1, 2):
        save(tmp_path, step)
    file = tmp_path / "step-2" / name
    FAULTS[fault](file, file.stat().st_size // 2)
    folder = CheckpointFolder(tmp_path)
    assert folder.newest_good(ALONE) == tmp_path / "step-1"
    with pytest.raises(CheckpointError, match=rf"step-2 is damaged: .*{file.name}"):
        require_whole(tmp_path / "step-2")
    assert choose_checkpoint(folder, ALONE) == tmp_path / "step-1"
    told = capsys.readouterr().out.splitlines()
    assert len(told) == 1 and told[0].startswith("step-2 is damaged and was renamed to damaged-step-2: ")
    assert str(file) in told[0]
    assert (tmp_path / "latest").read_text() == "step-1\n"
    # Nobody resumes it any more, and the next good one ends it.
    assert [path.name for path in folder.all()] == ["step-1"]
    assert choose_checkpoint(folder, ALONE) == tmp_path / "step-1"
    save(tmp_path, 3)
    assert not folder.damaged()


def test_every_single_bit_counts(tmp_path: Path) -> None:
    checkpoint = save(tmp_path, 1)
    tried = 0
    for name in FILES:
        file = checkpoint / name
        content = file.read_bytes()
        for place in range(0, len(content), max(1, len(content) // 97)):
            file.write_bytes(flipped(content, place, place % 8))
            assert faults_of(checkpoint), (name, place)
            tried += 1
        file.write_bytes(content)
    assert tried > 300 and not faults_of(checkpoint)


def test_a_checkpoint_under_another_name_and_a_manifest_that_leads_elsewhere_are_refused(tmp_path: Path) -> None:
    checkpoint = save(tmp_path, 1)
    checkpoint.rename(tmp_path / "step-5")
    assert faults_of(tmp_path / "step-5") == [f"{tmp_path / 'step-5'} has been renamed: its manifest is of step 1"]
    manifest = Manifest.read(tmp_path / "step-5")
    record = manifest.files["state.json"]
    for name in ("../step-1/state.json", "/etc/passwd"):
        Manifest(5, {**manifest.files, name: record}).write(tmp_path / "step-5")
        assert "is not as it was written" in faults_of(tmp_path / "step-5")[0]


def test_a_run_of_which_all_checkpoints_are_damaged_does_not_begin_again(tmp_path: Path) -> None:
    for step in (1, 2):
        (save(tmp_path, step) / "state.json").unlink()
    folder = CheckpointFolder(tmp_path)
    for _ in range(2):  # not even when it is tried again
        with pytest.raises(
            CheckpointError, match=r"all checkpoints .* \(damaged-step-1, damaged-step-2\): put a good copy"
        ):
            choose_checkpoint(folder, ALONE)


def test_a_checkpoint_that_is_gone_is_told(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    for step in (1, 2):
        checkpoint = save(tmp_path, step)
    checkpoint.rename(tmp_path.parent / "moved")
    assert choose_checkpoint(CheckpointFolder(tmp_path), ALONE) == tmp_path / "step-1"
    assert "had a checkpoint step-2, which is gone: the newest there is step-1" in capsys.readouterr().out


def test_a_checkpoint_of_an_earlier_version_is_not_taken_for_a_damaged_one(tmp_path: Path) -> None:
    checkpoint = save(tmp_path, 1)
    (checkpoint / "manifest.json").unlink()
    (checkpoint / "state.json").write_text(json.dumps(state(1) | {"format": 2}))
    with pytest.raises(CheckpointError, match="was written by another version of dalle_ds"):
        choose_checkpoint(CheckpointFolder(tmp_path), ALONE)
    assert checkpoint.is_dir()


def test_a_disk_that_cannot_be_read_now_says_nothing_of_a_checkpoint(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for step in (1, 2):
        save(tmp_path, step)

    def fails(_: Path) -> str:
        raise OSError(5, "Input/output error")

    folder = CheckpointFolder(tmp_path)
    with monkeypatch.context() as broken:
        broken.setattr("dalle_ds.training.checkpoints.manifest.digest_of", fails)
        for look in (lambda: choose_checkpoint(folder, ALONE), lambda: folder.newest_good(ALONE)):
            with pytest.raises(
                CheckpointError, match=r"step-2 cannot be read on .*Input/output error.*: it must lie where"
            ):
                look()
    assert choose_checkpoint(folder, ALONE) == tmp_path / "step-2"


def test_a_process_that_does_not_see_what_the_main_one_sees_says_so(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    save(tmp_path, 2)
    told = Manifest.read(tmp_path / "step-2"), []

    class Elsewhere(Mesh):
        """Rank 1, on a machine without the folder."""

        def decide(self, choose: Callable[[], object]) -> object:
            return told

        def gather_objects(self, value: object) -> list[object]:
            return [[], value]

    elsewhere = Elsewhere(rank=1, world_size=2, device=torch.device("cpu"))
    assert faults_found_by_all(tmp_path / "step-2", elsewhere) == []
    (tmp_path / "step-2").rename(tmp_path / "unmounted")
    with pytest.raises(
        CheckpointError, match=r"step-2 cannot be read on .*No such file.*: it must lie where all processes"
    ):
        faults_found_by_all(tmp_path / "step-2", elsewhere)


def test_a_checkpoint_of_a_later_version_is_not_taken_for_a_damaged_one(tmp_path: Path) -> None:
    checkpoint = save(tmp_path, 1)
    manifest = Manifest.read(checkpoint)
    Manifest(1, manifest.files, format=4).write(checkpoint)
    with pytest.raises(CheckpointError, match="was written by another version of dalle_ds"):
        choose_checkpoint(CheckpointFolder(tmp_path), ALONE)
    assert checkpoint.is_dir()


def test_a_kill_between_two_renames_loses_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    save(tmp_path, 3)
    rename = Path.rename

    def killed(self: Path, target: Path) -> Path:
        if self.name.startswith("partial-"):
            raise KeyboardInterrupt
        return rename(self, target)

    with monkeypatch.context() as context, pytest.raises(KeyboardInterrupt):
        context.setattr(Path, "rename", killed)
        save(tmp_path, 3)
    folder = CheckpointFolder(tmp_path)
    assert folder.newest() is None
    folder.clear()
    assert choose_checkpoint(folder, ALONE) == tmp_path / "step-3"
    assert sorted(path.name for path in tmp_path.iterdir()) == ["latest", "step-3"]


def test_what_must_go_and_does_not_is_an_error(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for step in (1, 2):
        save(tmp_path, step)

    def read_only(self: Path, target: Path) -> Path:
        raise OSError(30, "Read-only file system")

    monkeypatch.setattr(Path, "rename", read_only)
    with pytest.raises(CheckpointError, match=r"step-2 cannot be removed: remove it, and start the run again"):
        CheckpointFolder(tmp_path).drop_after(1)


# --- writing beside training


class Slow:
    """A disk that writes when it is told to, and fails if it is told so."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch, where: str) -> None:
        self.may_go_on = threading.Event()
        self.fails = False
        owner, name = (Plan, "write") if where == "tensors" else (CheckpointFolder, "complete")
        original = getattr(owner, name)

        def write(*arguments: object) -> object:
            assert self.may_go_on.wait(10)
            if self.fails:
                raise OSError(28, "No space left on device")
            return original(*arguments)

        monkeypatch.setattr(owner, name, write)


def advance(saver: AsyncCheckpointer) -> object:
    return saver.advance(*saver.progress())


def wait_for(saver: AsyncCheckpointer) -> None:
    for _ in range(1000):
        if saver.progress() != (0, 0):
            return
        threading.Event().wait(0.01)
    raise AssertionError("nothing was written")


@pytest.mark.parametrize("where", ["tensors", "rest"])
@pytest.mark.parametrize("fails", [False, True])
def test_training_goes_on_while_a_slow_disk_writes_what_was_there_before(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, where: str, fails: bool
) -> None:
    save(tmp_path, 1)
    disk = Slow(monkeypatch, where)
    disk.fails = fails
    weights = Weights(5)
    saver = AsyncCheckpointer(CheckpointFolder(tmp_path), TrainedTensors(weights, AdamW(weights.shards)), ALONE, keep=2)
    saver.begin(5, state(5))
    weights.shards[0].fill_(9)  # training goes on
    if where == "rest":
        wait_for(saver)
        assert advance(saver) is None
    assert saver.busy and saver.progress() == (0, 0) and advance(saver) is None
    assert [path.name for path in CheckpointFolder(tmp_path).all()] == ["step-1"]
    disk.may_go_on.set()
    saved = saver.finish()
    assert saved is not None and saved.step == 5 and not saver.busy and saver.finish() is None
    names = sorted(path.name for path in tmp_path.iterdir())
    if fails:
        assert names == ["latest", "step-1"] and saved.failure is not None and "No space left" in saved.failure
    else:
        assert names == ["latest", "step-1", "step-5"] and saved.failure is None
        TrainedTensors(weights, AdamW(weights.shards)).load(tmp_path / "step-5", ALONE)
        assert weights.shards[0].tolist() == [5, 5, 5]
    # The same saver, whose memory is used again, writes the next one.
    disk.fails = False
    weights.shards[0].fill_(6)
    saver.begin(6, state(6))
    saver.finish()
    TrainedTensors(weights, AdamW(weights.shards)).load(tmp_path / "step-6", ALONE)
    assert weights.shards[0].tolist() == [6, 6, 6]


def test_a_checkpoint_that_has_no_room_is_not_begun(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    save(tmp_path, 1)
    usage = type("Usage", (), {"free": 11})
    monkeypatch.setattr("dalle_ds.training.checkpoints.saver.shutil.disk_usage", lambda _: usage)
    with pytest.raises(CheckpointError, match=r"step 2 could not be written .* MiB needed"):
        save(tmp_path, 2)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["latest", "step-1"]


def test_what_must_be_there_before_a_checkpoint_is_waited_for(tmp_path: Path) -> None:
    def cannot() -> None:
        raise OSError(28, "No space left on device")

    weights = Weights(0)
    folder = CheckpointFolder(tmp_path)
    saver = AsyncCheckpointer(
        folder, TrainedTensors(weights, AdamW(weights.shards)), ALONE, keep=2, before_completing=cannot
    )
    saver.begin(1, state(1))
    saved = saver.finish()
    assert saved is not None and saved.failure is not None and not folder.all()
