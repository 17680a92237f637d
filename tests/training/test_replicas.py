"""Gradients of replicas become their mean behind every kind of engine; one launch of two replicas of two processes."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import pytest
import torch

from tests.processes import run_ranks
from tests.training.replicas_worker import CASES

pytestmark = pytest.mark.launch

WORKER = Path(__file__).with_name("replicas_worker.py")
PLAIN = [name for name, options in CASES.items() if "powersgd" not in options]
FULL = [name for name in CASES if name.startswith("full rank")]
LOW = [name for name in CASES if name.startswith("low rank")]


@pytest.fixture(scope="module")
def found(tmp_path_factory: pytest.TempPathFactory) -> list[dict[str, Any]]:
    """What each of four processes found."""
    folder = tmp_path_factory.mktemp("replicas")
    done = run_ranks(WORKER, folder, processes=4)
    assert done.returncode == 0, done.stdout[-6000:] + done.stderr[-6000:]
    return [torch.load(folder / f"rank-{rank}.pt", weights_only=False) for rank in range(4)]


@pytest.mark.parametrize("case", PLAIN)
def test_gradients_become_the_mean(found: list[dict[str, Any]], case: str) -> None:
    for rank in found:
        # In bf16 without ZeRO, gradients are bf16 themselves.
        assert max(rank[case]["distances"]) < (3e-3 if case == "zero0 bf16" else 1e-6)
        assert rank[case]["errors"] == {} and rank[case]["description"] == [
            "gradients are averaged over 2 replicas in fp32"
        ]


@pytest.mark.parametrize("case", FULL)
def test_at_full_rank_compression_loses_nothing(found: list[dict[str, Any]], case: str) -> None:
    for rank in found:
        assert max(rank[case]["distances"]) < 1e-5
        assert len(rank[case]["errors"]) == 8


@pytest.mark.parametrize("case", list(CASES))
def test_replicas_have_the_same_bits_and_know_their_norms(found: list[dict[str, Any]], case: str) -> None:
    for rank in found:
        assert rank[case]["alike"]
        assert rank[case]["squares"] == pytest.approx(rank[case]["expected squares"], rel=1e-5)


@pytest.mark.parametrize("case", LOW)
def test_matrices_of_blocks_are_compressed_and_nothing_else(found: list[dict[str, Any]], case: str) -> None:
    for rank in found:
        report = rank[case]
        for name, distance in zip(report["names"], report["distances"], strict=True):
            if name.startswith("block") and "matrices" in name:
                assert 0.01 < distance < 0.8
            else:
                assert distance < 1e-6
        # Of four processes two hold each whole matrix; a block has qkv, out, up and down.
        sizes = {"attention.qkv": 3 * 32 * 32, "attention.out": 32 * 32, "up": 4 * 32 * 32, "down": 4 * 32 * 32}
        assert len(report["errors"]) == 8
        for name, (shape, norm) in report["errors"].items():
            _, _, rest = name.split(".", 2)
            assert shape == (sizes[rest.removesuffix(".weight")] // 2,) and norm > 0
    # The paper's rank for a width of 32 is 8.5: 8, of which each process has 4.
    (said,) = found[0][case]["description"]
    wide, square, long = 3 * 4 * (16 + 32), 4 * (16 + 32), 2 * 4 * (64 + 32)
    assert said == (
        "gradients are averaged over 2 replicas, those of 8 matrices by PowerSGD of rank 8: "
        f"{(wide + square + long) / (12 * 32 * 32 / 2):.1%} of their numbers cross"
    )


@pytest.mark.parametrize("case", LOW)
def test_processes_that_hold_different_parts_project_them_differently(found: list[dict[str, Any]], case: str) -> None:
    by_place = {rank[case]["place"]: rank["from the same"][case] for rank in found}
    assert by_place[0, 0, 0] == by_place[1, 0, 0]
    other = (0, 1, 0) if case == "low rank" else (0, 0, 1)
    for name, one, another in zip(found[0][case]["names"], by_place[0, 0, 0], by_place[other], strict=True):
        is_compressed = name.startswith("block") and "matrices" in name
        assert (one != another) == is_compressed, name


def test_what_has_no_whole_rows_crosses_as_it_is(found: list[dict[str, Any]]) -> None:
    for rank in found:
        assert max(rank["odd rows"]["distances"]) < 1e-5
        assert sorted(rank["odd rows"]["errors"]) == ["blocks.1.down.weight", "blocks.1.up.weight"]
        said = rank["odd rows"]["description"]
        assert len(said) == 2 and said[1] == (
            "not compressed: blocks.0.attention.qkv.weight, whose 99 rows do not make 2 shards of 3 matrices; "
            "blocks.0.attention.out.weight, whose 33 rows do not make 2 shards"
        )


def test_what_cannot_be_compressed_is_refused(found: list[dict[str, Any]]) -> None:
    for rank in found:
        refused = rank["refused"]
        assert "ZeRO-2" in refused["stage"] and '"zero_optimization.stage" to 3' in refused["stage"]
        assert "powersgd.rank=7" in refused["rank"] and "multiple of 2" in refused["rank"]
        assert "residual blocks" in refused["blocks"]


def test_what_is_not_finite_on_one_replica_breaks_its_block_on_all(found: list[dict[str, Any]]) -> None:
    names = found[0]["low rank"]["names"]
    for case in range(2):
        for rank in found:
            good, bad, next_ = rank["not finite"][case]
            shard = rank["low rank"]["place"][1]
            # Each process has its own NaN: the worker puts it where both shards have their fifth element.
            broken = [name for name, square in zip(names, bad, strict=True) if not math.isfinite(square)]
            assert broken == ["block 1 matrices"], (case, shard)
            assert all(map(math.isfinite, good)) and all(map(math.isfinite, next_))


def test_error_buffers_hold_what_was_left_out(found: list[dict[str, Any]]) -> None:
    for rank in found:
        # Ĝ is an orthogonal projection: what is left and what crosses make a right angle.
        assert rank["kept"]["in buffers"] == pytest.approx(rank["kept"]["left"], rel=1e-4)
        assert rank["kept"]["put back"] < 1e-6


def test_replicas_begin_with_the_weights_of_the_first(found: list[dict[str, Any]]) -> None:
    for layout, (right, _) in found[0]["start"].items():
        for rank in found:
            before, after = rank["start"][layout]
            assert after == right, layout
            assert (before == right) == (rank["low rank"]["place"][0] == 0), layout
