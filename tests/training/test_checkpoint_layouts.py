"""A checkpoint belongs to the model: whatever processes, ZeRO stages and offload wrote it, others go on from it.

Three launches: two processes write checkpoints of engines of every kind; two and one go on from them.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from tests.conftest import EVERYTHING
from tests.processes import run_ranks
from tests.training.checkpoint_worker import LAYOUTS

pytestmark = pytest.mark.launch

WORKER = Path(__file__).with_name("checkpoint_worker.py")


def family(kind: str) -> list[str]:
    return [name for name in LAYOUTS if name.startswith(kind)]


def beyond(name: str, steps: int) -> str:
    """Another layout in which the same is learned, if `steps` is none of their number."""
    names = family(name.split("-")[0])
    return names[(names.index(name) + steps) % len(names)]


MOVING = [*family("fp32"), *family("bf16"), *family("codes")] if EVERYTHING else []  # see test_checkpoint_runs.py
SAME = [(name, name) for name in LAYOUTS]
MOVED = [(name, beyond(name, 1)) for name in MOVING]
ALONE = [(name, beyond(name, 3)) for name in MOVING]


def launch(processes: int, mode: str, folder: Path, pairs: list[tuple[str, str]]) -> dict[str, Any]:
    file = folder / f"{mode}-{processes}.json"
    file.write_text(json.dumps(pairs))
    done = run_ranks(WORKER, mode, folder, file, processes=processes)
    assert done.returncode == 0, done.stdout[-4000:] + done.stderr[-6000:]
    return json.loads(file.read_text())


class Runs:
    def __init__(self, folder: Path) -> None:
        self.straight = launch(2, "write", folder, [])
        self.two = launch(2, "read", folder, SAME + MOVED)
        self.one = launch(1, "read", folder, ALONE) if ALONE else {}


@pytest.fixture(scope="module")
def runs(tmp_path_factory: pytest.TempPathFactory) -> Runs:
    return Runs(tmp_path_factory.mktemp("checkpoints"))


@pytest.mark.parametrize("name", LAYOUTS)
def test_in_the_same_layout_a_run_goes_on_bit_for_bit(runs: Runs, name: str) -> None:
    straight = runs.straight[name]
    assert runs.two[f"{name} → {name}"] == straight
    assert runs.straight[f"{name} again"] == straight, "an engine that had gone on was not put back"


def tolerance(name: str) -> float:
    """Gradients are summed in another order, of bf16 numbers in bf16."""
    return 2e-3 if name.startswith("bf16") else 1e-5


@pytest.mark.parametrize(("name", "other"), MOVED)
def test_another_layout_goes_on_with_the_same_losses(runs: Runs, name: str, other: str) -> None:
    found = runs.two[f"{name} → {other}"]["losses"]
    assert found == pytest.approx(runs.straight[name]["losses"], abs=tolerance(name))


@pytest.mark.parametrize(("name", "other"), ALONE)
def test_one_process_goes_on_from_two(runs: Runs, name: str, other: str) -> None:
    found = runs.one[f"{name} → {other}"]["losses"]
    assert found == pytest.approx(runs.straight[name]["losses"], abs=tolerance(name))


def test_what_is_compared_depends_on_what_was_loaded(runs: Runs) -> None:
    """Equal results prove nothing if they are so whatever a checkpoint holds."""
    digests = [runs.straight[name]["weights"] for name in ("fp32-1", "codes-1", "noise-1", "noise-3")]
    assert len(set(digests)) == len(digests)
    losses = runs.straight["fp32-1"]["losses"]
    assert abs(losses[1] - losses[0]) > 1e-3
    assert runs.straight["fp32-1"]["average"] != runs.straight["fp32-1"]["weights"]
