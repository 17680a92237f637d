"""benchmarks/precision.py counts what tensors and collectives really take."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from tests.processes import run_ranks

pytestmark = [pytest.mark.launch, pytest.mark.slow]


def test_bytes_per_parameter(tmp_path: Path) -> None:
    small = ["--width", "64", "--depth", "4", "--batch", "4", "--updates", "5", "--stages", "3"]
    done = run_ranks("benchmarks/precision.py", *small, "--json", tmp_path / "figures.json", processes=2)
    assert done.returncode == 0, done.stdout + done.stderr
    figures = json.loads((tmp_path / "figures.json").read_text())
    fp32, fp16 = figures["zero3, fp32"], figures["zero3, fp16 blocks"]
    lean = figures["zero3, fp16 blocks, 16-bit moments"]
    # Weights, gradients and two moments in fp32, and DeepSpeed's buffers: at most two of them on each process.
    assert 16 <= fp32["held"] < 19.5
    assert fp32["held"] == pytest.approx(fp16["held"], abs=0.01), "fp16 blocks keep no other copy of the weights"
    assert fp16["held"] - lean["held"] == pytest.approx(4, abs=0.4), "all but islands have moments of half the size"
    assert fp16["gathered"] == pytest.approx(fp32["gathered"] / 2, rel=0.1) and fp32["gathered"] >= 8
    assert fp16["reduced"] == fp32["reduced"] == pytest.approx(4, rel=0.01)
    assert all(1 < each["loss"] < 5 for each in figures.values())
