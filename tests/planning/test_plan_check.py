"""The formulas against real engines on two processes, within a tenth."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from tests.processes import run_ranks

pytestmark = [pytest.mark.launch, pytest.mark.slow]


def test_formulas_hold_in_engines_of_every_kind(tmp_path: Path) -> None:
    """All stages; ZeRO 0 to 3, precisions, moments, accumulation; tensor groups, pipelines, replicas, PowerSGD."""
    figures = tmp_path / "figures.json"
    arguments = ["--few", "True", "--parts", "engines", "parallel", "--json", figures]
    done = run_ranks("benchmarks/plan_check.py", *arguments, processes=2)
    assert done.returncode == 0, done.stdout[-5000:] + done.stderr[-5000:]
    checks = json.loads(figures.read_text())
    assert len({check["setting"] for check in checks}) == 16
    for check in checks:
        assert abs(check["error"]) < 0.1, check
        if check["what"] in (
            "held between updates",
            "of that, weights",
            "of that, Adam's moments",
            "sent in an update",
        ):
            assert abs(check["error"]) < 0.02, check
