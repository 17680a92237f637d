"""The figures of benchmarks/attention.py at a tiny shape: all there, and the counts right."""

from __future__ import annotations

import json
import subprocess
from pathlib import Path

import pytest
import torch
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode

from dalle_ds.nn.attention import attention_mask
from tests.conftest import ROOT
from tests.processes import run_ranks


@pytest.fixture
def benchmark(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.syspath_prepend(str(ROOT / "benchmarks"))
    import attention

    return attention


def run(*flags: str) -> subprocess.CompletedProcess:
    return run_ranks("benchmarks/attention.py", *flags)


def test_table_and_json(tmp_path: Path) -> None:
    out = tmp_path / "figures.json"
    shape = {"text_len": 16, "heads": 2, "head_size": 16, "kernel": 3, "batch": 1, "repeats": 1}
    flags = [word for name, value in shape.items() for word in (f"--{name}", str(value))]
    done = run(*flags, "--grids", "4", "6", "--json", str(out))
    assert done.returncode == 0, done.stderr
    figures = json.loads(out.read_text())
    assert figures["matmul_flops_per_second"] > 0
    found = [(row["sequence"], row["kind"], row["computed_by"]) for row in figures["rows"]]
    sparse = [(kind, way) for kind in ("row", "column", "conv") for way in ("blockwise", "masked")]
    assert found == [(n, *pair) for n in (32, 52) for pair in [*sparse, ("full", "causal")]]
    for row in figures["rows"]:
        assert row["sequence"] in (32, 52)
        side = {32: 4, 52: 6}[row["sequence"]]
        allowed = int(attention_mask(row["kind"], 16, side, 3).sum())
        # Six products of a row of 16 with a column of 16, for each of two heads and each allowed pair.
        assert row["needed_flops"] == 6 * 2 * 16 * 2 * allowed
        assert row["executed_flops"] > row["needed_flops"]
        assert row["forward_seconds"] > 0
        assert 0 < row["needed_fraction_of_matmul"] < row["fraction_of_matmul"]
        assert f"{row['sequence']}" in done.stdout and row["kind"] in done.stdout


def test_a_preset_gives_the_shape(benchmark) -> None:
    (config,) = benchmark.shapes(benchmark.Options(preset="dalle-12b"))
    assert (config.total_len, config.width // config.heads) == (1280, 64)


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
def test_a_missing_gpu_is_told_in_one_line() -> None:
    done = run("--device", "cuda")
    assert done.returncode == 1
    assert done.stderr.strip().splitlines()[-1].startswith("error: --device cuda")


def test_extra_memory_is_that_of_tensors(benchmark) -> None:
    def allocate() -> None:
        first = torch.zeros(3 * 2**20, dtype=torch.uint8)
        del first
        _ = torch.zeros(5 * 2**20, dtype=torch.uint8)
        _ = torch.zeros(2 * 2**20, dtype=torch.uint8)  # beside the one before, until it takes its name

    measured = benchmark.extra_memory(allocate, torch.device("cpu"))
    assert 7 * 2**20 <= measured < 7.1 * 2**20


def test_flops_are_those_that_torch_counts(benchmark) -> None:
    """Six products of all pairs, where the scores are kept for the backward pass."""
    config = next(benchmark.shapes(benchmark.Options(text_len=16, grids=(4,), heads=2, head_size=16)))
    _, (name, attend, pairs) = benchmark.ways("row", config, torch.device("cpu"))
    assert (name, pairs) == ("masked", config.total_len**2)
    qkv, gradient = torch.randn(3, config.total_len, 3, 2, 16), torch.randn(3, config.total_len, 32)
    with sdpa_kernel(SDPBackend.MATH), FlopCounterMode(display=False) as counter:
        benchmark._forward_backward(attend, qkv, gradient)
    assert counter.get_total_flops() == 6 * (2 * 3 * config.width) * pairs


@pytest.mark.slow  # compiles, where there is a compiler
def test_what_flex_refuses_is_left_out(benchmark, monkeypatch: pytest.MonkeyPatch, capsys) -> None:
    """On a CPU it has no backward pass."""
    monkeypatch.setitem(benchmark.KERNELS, "cpu", "flex")
    options = benchmark.Options(text_len=16, grids=(4,), heads=2, head_size=16, batch=1, repeats=1, dtype="fp32")
    config = next(benchmark.shapes(options))
    name, _, pairs = next(benchmark.ways("row", config, torch.device("cpu")))
    assert (name, pairs) == ("flex", 128**2)
    rows = list(benchmark.measure(options, rate=1e9))
    assert [row.computed_by for row in rows] == ["masked", "masked", "masked", "causal"]
    assert capsys.readouterr().out.count("backward on CPU") == 3
