"""benchmarks/comm.py: what is counted is what the paper's formula and the planner say."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from tests.processes import run_ranks

pytestmark = pytest.mark.launch

WIDTH, RANK = 124, 28
"""The ratio of the paper's largest model: 896 / 3968."""


def count(folder: Path, processes: int, *options: str) -> dict[str, Any]:
    """Figures of the benchmark."""
    shape = ["--width", str(WIDTH), "--depth", "2", "--rank", str(RANK), "--text_vocab", "64", "--image_vocab", "64"]
    arguments = [*shape, *options, "--json", folder / "figures.json"]
    done = run_ranks("benchmarks/comm.py", *arguments, processes=processes)
    assert done.returncode == 0, done.stdout + done.stderr
    assert "compression at rank 28" in done.stdout
    return json.loads((folder / "figures.json").read_text())


def crossing(shards: int) -> float:
    """The part that crosses, r (m + 2) / (2 d m)."""
    return RANK * (shards + 2) / (2 * WIDTH * shards)


def check(figures: dict[str, Any], shards: int) -> None:
    for kind in ("plain", "powersgd"):
        measured, predicted = figures[kind]["measured"], figures[kind]["predicted"]
        for axis in ("shard", "replica"):
            if predicted[axis]:
                assert predicted[axis] == pytest.approx(measured[axis], rel=0.01), (kind, axis)
        assert measured["all"] < 1000 and measured["tensor"] == 0
    # Two blocks of 12 d² parameters, of which a process has a part; with two replicas, all of it leaves once.
    assert figures["powersgd"]["compressed_numel"] == 2 * 12 * WIDTH**2 // shards
    saved = figures["plain"]["measured"]["replica"] - figures["powersgd"]["measured"]["replica"]
    assert figures["compression"]["measured"] == pytest.approx(saved / (4 * 2 * 12 * WIDTH**2 / shards))


@pytest.mark.slow
def test_two_replicas_of_two(tmp_path: Path) -> None:
    figures = count(tmp_path, 4, "--replicas", "2")
    check(figures, shards=2)
    assert figures["compression"]["measured"] == pytest.approx(1 - crossing(2), abs=0.02)
    assert figures["compression"]["predicted"] == pytest.approx(1 - crossing(2))


def test_two_replicas_of_one_in_16_bits(tmp_path: Path) -> None:
    figures = count(tmp_path, 2, "--replicas", "2", "--transport", "1-6-9")
    assert figures["plain"]["measured"]["shard"] == 0
    assert figures["compression"]["measured"] == pytest.approx(1 - crossing(1) / 2, abs=0.02)
    assert figures["compression"]["predicted"] == pytest.approx(1 - crossing(1) / 2)
