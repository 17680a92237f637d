"""The files of a run directory: metrics, what was left out, checkpoints."""

from __future__ import annotations

import contextlib
import io
import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from dalle_ds.config import DvaeRun
from dalle_ds.evaluation.curves import NUMERICS, curves_figure, panels_of, read_metrics
from dalle_ds.parallel import Mesh
from dalle_ds.resilience.rollback import Rollbacks
from dalle_ds.training.checkpoints.content import load_state
from dalle_ds.training.checkpoints.manifest import (
    CheckpointFolder,
    Manifest,
    choose_checkpoint,
    faults_of,
    record_of,
    require_whole,
)
from dalle_ds.training.checkpoints.storage import Index, LocalShards, TensorSlice
from dalle_ds.training.run_directory import RunDirectory
from tests.fuzz.harness import survives
from tests.fuzz.strategies import damaged_bytes, damaged_json, damaged_tree, values
from tests.training.by_hand import write_checkpoint

ALONE = Mesh(rank=0, world_size=1, device=torch.device("cpu"))
RECORDS = [
    {
        "step": step,
        "loss": 1 / step,
        "grad_norm": 1.5,
        "lr": 1e-3,
        "gradient_scale/0": 8192.0,
        "gradient_scale/1": 4096.0,
    }
    for step in range(1, 5)
]


def lines_of_records() -> st.SearchStrategy[bytes]:
    whole = "".join(json.dumps(record) + "\n" for record in RECORDS).encode()
    record = damaged_tree(RECORDS[0]).map(json.dumps)
    return damaged_bytes(whole) | st.lists(record | values().map(json.dumps), max_size=4).map(
        lambda each: "\n".join(each).encode()
    )


@given(content=lines_of_records())
@settings(max_examples=max(15, settings().max_examples // 4))  # drawing takes a tenth of a second
def test_metrics(content: bytes, tmp_path_factory: pytest.TempPathFactory) -> None:
    folder = tmp_path_factory.getbasetemp() / "fuzzed-metrics"
    shutil.rmtree(folder, ignore_errors=True)
    directory = RunDirectory(folder, "dvae", DvaeRun())
    folder.mkdir()
    directory.metrics_file.write_bytes(content)
    panels = survives("metrics.jsonl", lambda: panels_of(read_metrics(folder), NUMERICS))
    survives("metrics.jsonl", lambda: curves_figure(panels))
    survives("metrics.jsonl", lambda: directory.drop_metrics_after(2))
    assert all(json.loads(line)["step"] <= 2 for line in directory.metrics_file.read_text().splitlines())


@given(content=damaged_json([{"from_update": 9, "to_update": 4, "skip_from": 4, "skip_to": 9}]))
def test_rollbacks(content: bytes, tmp_path_factory: pytest.TempPathFactory) -> None:
    file = tmp_path_factory.getbasetemp() / "fuzzed-rollbacks.json"
    file.write_bytes(content)
    survives("rollbacks.json", lambda: Rollbacks.read(file))


@given(content=damaged_json({"step": 4}), name=st.sampled_from(["export/step.json", "identity.json", "wandb_id.json"]))
def test_notes(content: bytes, name: str, tmp_path_factory: pytest.TempPathFactory) -> None:
    folder = tmp_path_factory.getbasetemp() / "fuzzed-notes"
    shutil.rmtree(folder, ignore_errors=True)
    directory = RunDirectory(folder, "dvae", DvaeRun())
    (folder / "export").mkdir(parents=True)
    (folder / name).write_bytes(content)
    survives("notes of runs", directory.exported_step)
    survives("notes of runs", directory.wandb_id)
    survives("notes of runs", directory.identity)


STATE = {
    "step": 7,
    "identity": {"data": "1"},
    "layout": {},
    "learning_rate": None,
    "scales": None,
    "guard": {"bad_in_a_row": 0},
}


def write(folder: Path, step: int) -> Path:
    parts = {name: torch.full((3, 4), float(step)) for name in ("weight/a", "weight/b", "exp_avg/a")}
    pieces = {name: LocalShards((3, 4), [(TensorSlice(0, 0, 3, 4), part)]) for name, part in parts.items()}
    parameters = {
        name: {"shape": [3, 4], "moments": "fp32", "step": step, "ceiling": 0.0, "index": 0} for name in ("a", "b")
    }
    return write_checkpoint(folder, {**STATE, "step": step}, pieces, parameters)


@pytest.fixture(scope="module")
def checkpoints(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Two good ones, of updates 6 and 7."""
    folder = tmp_path_factory.mktemp("whole") / "checkpoints"
    folder.mkdir()
    write(folder, 6)
    write(folder, 7)
    return folder


FILES = ["manifest.json", "state.json", "tensors/index.json", "tensors/rank-0.safetensors"]


@given(data=st.data(), name=st.sampled_from(FILES))
def test_damage_to_a_checkpoint_is_always_found(
    data: st.DataObject, name: str, checkpoints: Path, tmp_path_factory: pytest.TempPathFactory
) -> None:
    """And the one before is taken."""
    folder = tmp_path_factory.getbasetemp() / "fuzzed-checkpoints"
    shutil.rmtree(folder, ignore_errors=True)
    shutil.copytree(checkpoints, folder)
    file = folder / "step-7" / name
    whole = file.read_bytes()
    content = data.draw(damaged_bytes(whole))
    file.write_bytes(content)

    def look() -> Path | None:
        with contextlib.redirect_stdout(io.StringIO()):
            return choose_checkpoint(CheckpointFolder(folder), ALONE)

    assert bool(survives("checkpoints, damaged", lambda: faults_of(folder / "step-7"))) == (content != whole)
    survives("checkpoints, damaged", lambda: require_whole(folder / "step-7"))
    chosen = survives("checkpoints, damaged", look)
    assert chosen == folder / ("step-7" if content == whole else "step-6")


def forged(folder: Path) -> None:
    """A manifest that agrees with what is there."""
    names = [
        path.relative_to(folder).as_posix()
        for path in folder.rglob("*")
        if path.is_file() and path.name != "manifest.json"
    ]
    Manifest(7, {name: record_of(folder / name) for name in names}).write(folder)


@given(data=st.data(), name=st.sampled_from(FILES[1:3]))
def test_other_contents_under_a_manifest_that_agrees(
    data: st.DataObject, name: str, checkpoints: Path, tmp_path_factory: pytest.TempPathFactory
) -> None:
    folder = tmp_path_factory.getbasetemp() / "forged-checkpoint"
    shutil.rmtree(folder, ignore_errors=True)
    shutil.copytree(checkpoints, folder)
    checkpoint = folder / "step-7"
    tree = json.loads((checkpoint / name).read_text())
    (checkpoint / name).write_bytes(data.draw(damaged_json(tree)))
    forged(checkpoint)
    assert faults_of(checkpoint) == []

    def read() -> Any:
        state = load_state(checkpoint)
        index = Index(checkpoint / "tensors")
        return state, [index.tensor(tensor) for tensor in index.tensors]

    survives("checkpoints, forged", read)
