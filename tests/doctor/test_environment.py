"""`launchers/doctor.py env`: what a bug report needs, whatever is missing."""

from __future__ import annotations

import runpy
import sys
from importlib import metadata

import pytest
import torch

from dalle_ds.doctor import environment
from dalle_ds.precision import choice
from tests.conftest import ROOT


def doctor(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> str:
    """What it prints."""
    monkeypatch.setattr(sys, "argv", ["doctor.py", "env"])
    runpy.run_path(str(ROOT / "launchers" / "doctor.py"), run_name="__main__")
    return capsys.readouterr().out


def test_it_tells_versions_rates_and_what_auto_chooses(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    threads = torch.get_num_threads()
    monkeypatch.setattr(
        choice, "matmul_rate", lambda dtype, device, seconds=0.0: 9e8 if dtype != torch.float32 else 22e9
    )
    choice._rate.cache_clear()
    found = doctor(monkeypatch, capsys)
    choice._rate.cache_clear()
    assert torch.get_num_threads() == threads
    for word in (torch.__version__, metadata.version("deepspeed"), "22 GFLOP/s in fp32", "0.9 GFLOP/s in bf16"):
        assert word in found
    assert "precision fp32" in found and "memory" in found and "GB free" in found


def test_it_works_without_what_is_missing(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    for package in ("torch", "datasets", "deepspeed", "PIL", "numpy"):
        monkeypatch.setitem(sys.modules, package, None)
    monkeypatch.setattr(environment, "version_of", lambda name: None)
    found = doctor(monkeypatch, capsys)
    assert "deepspeed missing" in found and "cannot be imported" in found
    assert "dalle-ds[large]" in found and "accelerate" in found


def test_extras_are_read_from_the_packages_own_requirements() -> None:
    requires = ["torch>=2", "surely-absent[data]>=1; extra == 'ray'", 'rich; extra == "eval"', "x; extra == 'dev'"]
    assert environment.missing_of_extras(requires) == {"ray": ["surely-absent"], "eval": []}
