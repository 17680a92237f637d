"""benchmarks/train_step.py runs as its users run it, and its figures hang together."""

from __future__ import annotations

import json
import subprocess
from pathlib import Path

import pytest

from tests.processes import run_ranks

SHAPE = {
    "width": 64,
    "depth": 4,
    "heads": 2,
    "text_len": 16,
    "grid": 8,
    "text_vocab": 100,
    "image_vocab": 80,
    "steps": 3,
}


def run(*arguments: str) -> subprocess.CompletedProcess[str]:
    shape = [word for name, value in SHAPE.items() for word in (f"--{name}", str(value))]
    return run_ranks("benchmarks/train_step.py", *shape, *arguments)


@pytest.mark.parametrize(
    "arguments",
    [
        ("--dtype", "bf16"),
        ("--dtype", "fp32", "--activation_checkpointing", "full", "--batch", "3"),
        pytest.param(("--dtype", "fp32", "--model", "dense"), marks=pytest.mark.slow),
        pytest.param(("--dtype", "bf16", "--blocks_only", "True"), marks=pytest.mark.slow),
        pytest.param(("--deepspeed_config", "ds_configs/zero1_bf16.json"), marks=pytest.mark.slow),
    ],
    ids=" ".join,
)
def test_figures(arguments: tuple[str, ...], tmp_path: Path) -> None:
    done = run(*arguments, "--json", str(tmp_path / "step.json"))
    assert done.returncode == 0, done.stderr
    figures = json.loads((tmp_path / "step.json").read_text())
    batch = 3 if "--batch" in arguments else 2
    assert figures["tokens_per_second"] == pytest.approx(batch * (16 + 64) / figures["step_seconds"])
    rate = figures["flops_per_step"] / figures["step_seconds"]
    assert figures["fraction_of_matmul"] == pytest.approx(rate / figures["matmul_flops_per_second"])
    assert 0 < figures["needed_flops_per_step"] < figures["flops_per_step"]
    assert figures["peak_memory_bytes"] > 1e8
    assert "step_seconds" in done.stdout


@pytest.mark.parametrize(
    ("arguments", "named"),
    [
        (("--dtype", "fp32", "--deepspeed_config", "ds_configs/zero1_bf16.json"), "trains in bf16"),
        (("--preset", "tiny"), "tiny"),
        (("--steps", "0"), "--steps must be at least 1"),
        (("--model", "dense", "--blocks_only", "True"), "--model dense"),
        (("--json", "no/such/folder/step.json"), "no/such/folder"),
    ],
)
def test_mistakes_are_named(arguments: tuple[str, ...], named: str) -> None:
    done = run(*arguments)
    assert done.returncode != 0
    assert named in done.stderr
    assert "Traceback" not in done.stderr
