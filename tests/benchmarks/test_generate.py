"""benchmarks/generate.py runs as its users run it, and its figures hang together."""

from __future__ import annotations

import json
import subprocess
from pathlib import Path

import pytest

from tests.processes import run_ranks

SHAPE = {
    "width": 32,
    "depth": 4,
    "heads": 2,
    "text_len": 8,
    "grid": 4,
    "text_vocab": 50,
    "image_vocab": 64,
    "tokens": 5,
}


def run(*arguments: str) -> subprocess.CompletedProcess[str]:
    shape = [word for name, value in SHAPE.items() for word in (f"--{name}", str(value))]
    return run_ranks("benchmarks/generate.py", *shape, *arguments)


@pytest.mark.parametrize("dtype", ["fp32", "bf16"])
def test_figures(dtype: str, tmp_path: Path) -> None:
    path = tmp_path / "generate.json"
    done = run("--dtype", dtype, "--batch", "6", "--prompts", "2", "--no_cache_tokens", "1", "--json", str(path))
    assert done.returncode == 0, done.stderr
    figures = json.loads(path.read_text())
    assert all(name[:20] in done.stdout for name in figures)
    parts = [value for name, value in figures.items() if name.startswith("bytes_per_step_")]
    assert sum(parts) == pytest.approx(figures["bytes_per_step"])
    itemsize = 4 if dtype == "fp32" else 2
    assert figures["bytes_per_step_text"] == 2 * 2 * 4 * 8 * 32 * itemsize
    bound = figures["bytes_per_step"] / figures["bandwidth_bytes_per_second"]
    assert figures["fraction_of_bandwidth"] == pytest.approx(bound / figures["seconds_per_token"])
    products = 2 * 12 * (4 * 12 * 32**2 + 32 * 64)
    assert (
        products + 12 * 4 * (4 * 8 * 32) < figures["flops_per_step"] < 1.5 * products
    )  # and attention, to text at least
    assert figures["tokens_per_second"] == pytest.approx(12 / figures["seconds_per_token"])
    assert figures["peak_memory_bytes"] > 10**8
    assert figures["seconds_per_token_without_cache"] > 0


def test_mistakes_are_named() -> None:
    done = run("--batch", "0")
    assert done.returncode == 1
    assert "batch must be at least 1, found 0" in done.stderr
