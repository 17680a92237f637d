"""benchmarks/gradient_scaling.py at a tiny shape: its figures, and that the units of its blocks change nothing in fp32."""

from __future__ import annotations

import json
import subprocess
from pathlib import Path

import pytest
import torch

from tests.conftest import ROOT
from tests.processes import run_ranks

SHAPE = {"depth": 6, "batch": 16, "rise": 3, "steps": 4, "settle": 34, "first_unit": -17, "last_unit": 15}


@pytest.fixture
def benchmark(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.syspath_prepend(str(ROOT / "benchmarks"))
    import gradient_scaling

    return gradient_scaling


def run(*arguments: str) -> subprocess.CompletedProcess[str]:
    shape = [word for name, value in SHAPE.items() for word in (f"--{name}", str(value))]
    return run_ranks("benchmarks/gradient_scaling.py", *shape, *arguments)


def test_figures(tmp_path: Path) -> None:
    out, plot = tmp_path / "scaling.json", tmp_path / "scaling.png"
    done = run("--json", str(out), "--plot", str(plot))
    assert done.returncode == 0, done.stderr
    assert plot.read_bytes().startswith(b"\x89PNG")
    figures = json.loads(out.read_text())
    assert set(figures) == {"options", "units", "runs", "fixed"}
    assert list(figures["runs"]) == ["fp32", "one scale", "block scales"]
    for name, found in figures["runs"].items():
        assert name in done.stdout
        assert len(found["losses"]) == SHAPE["steps"]
        assert all(len(found[kind]) == 2 * SHAPE["depth"] for kind in ("activation_zeros", "weight_zeros", "norms"))
    fp32, one, each = figures["runs"].values()
    assert fp32["scales_log2"] == []
    for scaled in (one, each):
        assert len(scaled["scales_log2"]) == SHAPE["settle"] + SHAPE["steps"]
    assert {len(set(row)) for row in one["scales_log2"]} == {1}
    assert each["scales_log2"][-1][-1] > each["scales_log2"][-1][0]
    # One scale that the first blocks can bear leaves much less of the last blocks' gradients.
    assert fp32["late_activation_zeros"] == 0
    assert one["late_activation_zeros"] > each["late_activation_zeros"] + 0.2
    assert each["late_activation_zeros"] < 0.05
    assert each["largest_deviation"] < 0.01
    overflowing = [row["overflowing_first"] for row in figures["fixed"]]
    assert overflowing == sorted(overflowing)
    assert overflowing[0] == 0 and overflowing[-1] == 1


def test_units_change_no_bit_in_fp32(benchmark) -> None:
    options = benchmark.Options(**SHAPE)
    assert benchmark.units(options)[0] != benchmark.units(options)[-1]
    losses, norms = [], []
    for with_units in (False, True):
        model = benchmark.build(options, with_units)
        data = benchmark.Data(options)
        optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3)
        probe = benchmark.Probe(model)
        passes = []
        for number in range(3):
            passes.append(probe.run(*data.batch(number), None))
            optimizer.step()
        losses.append([made.loss for made in passes])
        norms.append(passes[-1].norms)
    assert losses[0] == losses[1]
    natural = [norm * p for norm, p in zip(norms[1], benchmark.units(options), strict=True)]
    assert natural == pytest.approx(norms[0], rel=1e-5)


def test_the_loss_scale_follows_that_of_torch(benchmark) -> None:
    ours = benchmark.LossScale(3, torch.device("cpu"))
    theirs = torch.amp.GradScaler("cpu")
    weight = torch.nn.Parameter(torch.zeros(1))
    optimizer = torch.optim.SGD([weight], lr=0.0)
    for update in range(2_010):
        overflows = update in (0, 3, 4)
        theirs.scale(weight.sum() * (float("inf") if overflows else 1.0)).backward()
        theirs.step(optimizer)
        theirs.update()
        optimizer.zero_grad()
        ours.update([1] if overflows else [], applied=not overflows)
        assert ours.scales == [theirs.get_scale()] * 3
    assert ours.scales[0] == 2.0**14


@pytest.mark.parametrize("flag", ["--plot", "--json"])
def test_a_file_in_a_missing_folder_is_refused_before_training(flag: str) -> None:
    done = run(flag, "missing/file.png")
    assert done.returncode == 1
    assert done.stderr.strip().splitlines()[-1].startswith(f"error: {flag} must be a")
