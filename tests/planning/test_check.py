"""What is said before training, and what is refused."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from dalle_ds.config import ClipRun, DvaeRun, Run, TransformerRun, load_preset
from dalle_ds.config.deepspeed import resolve
from dalle_ds.errors import ConfigError
from dalle_ds.parallel import Mesh
from dalle_ds.planning import check
from dalle_ds.planning.check import check_plan, host_memory
from dalle_ds.planning.layout import Layout
from dalle_ds.planning.memory import stage_memory
from dalle_ds.planning.model import stages_of
from dalle_ds.tasks import Task
from dalle_ds.tasks.stages import STAGES

RUN = load_preset("medium", "transformer", TransformerRun)
JSON = {"bf16": {"enabled": True}, "zero_optimization": {"stage": 1}}


def task_of(run: Run) -> Task[Any]:
    return next(task for kind, task in STAGES.values() if kind is type(run)).planned(run)


def told(
    run: Run, free: int, monkeypatch: pytest.MonkeyPatch, device: str = "cpu", host_free: int = 10**12
) -> list[str]:
    """What the user is told where so many bytes are free."""
    monkeypatch.setattr(check, "_free", lambda device: (free, free if device.type == "cpu" else host_free))
    lines: list[str] = []
    check_plan(task_of(run), resolve(JSON, run, 1), Mesh(0, 1, torch.device(device)), lines.append)
    return lines


def needed(run: Run, device: str = "cpu", **changes: Any) -> int:
    layout = replace(Layout.of(run, resolve(JSON, run, 1), 1), **changes)
    return stage_memory(stages_of(task_of(run), layout, device)[0], layout, device).peak


def test_what_fits_is_told_in_one_line(monkeypatch: pytest.MonkeyPatch) -> None:
    (line,) = told(RUN, 200 * 10**9, monkeypatch)
    assert line.startswith("plan: ") and " of 200.0 GB per process (activations " in line and "\n" not in line
    assert "may not fit" not in line


def test_what_cannot_fit_is_refused_with_bytes_by_kind_and_what_to_do(monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(ConfigError) as refused:
        told(RUN, 10**9, monkeypatch)
    message = str(refused.value)
    for words in (
        "does not fit",
        "of 1.0 GB",
        "activations: ",
        "Adam's moments: ",
        "gradients: ",
        "halve train.micro_batch",
    ):
        assert words in message
    assert "--report.plan_check warn" in message
    assert "main memory" not in message, "there is no other memory on a CPU"
    with pytest.raises(ConfigError, match="offload the optimizer to main memory"):
        told(RUN, 10**9, monkeypatch, "cuda")


def test_nothing_within_the_formulas_error_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    need = needed(RUN)
    (line,) = told(RUN, int(need * 0.9), monkeypatch)
    assert "may not fit" in line
    assert "may not fit" not in told(RUN, need + 1, monkeypatch)[0]
    with pytest.raises(ConfigError):
        told(RUN, int(need * 0.84), monkeypatch)


def test_warn_tells_and_off_does_not(monkeypatch: pytest.MonkeyPatch) -> None:
    warned = replace(RUN, report=replace(RUN.report, plan_check="warn"))
    assert "may not fit" in told(warned, 10**9, monkeypatch)[0]
    assert told(replace(RUN, report=replace(RUN.report, plan_check="off")), 10**9, monkeypatch) == []


def test_a_gpus_main_memory_counts_by_itself(monkeypatch: pytest.MonkeyPatch) -> None:
    run = replace(RUN, train=replace(RUN.train, average_device="cpu"))
    (line,) = told(run, 10**12, monkeypatch, "cuda")
    assert " per GPU (" in line and "in main memory" in line
    with pytest.raises(ConfigError, match="in main memory"):
        told(run, 10**12, monkeypatch, "cuda", host_free=10**8)


@pytest.mark.parametrize(("stage", "kind"), [("dvae", DvaeRun), ("clip", ClipRun)])
def test_other_stages_are_planned_too(stage: str, kind: type[Run], monkeypatch: pytest.MonkeyPatch) -> None:
    run = load_preset("toy", stage, kind)
    assert told(run, 10**12, monkeypatch)[0].startswith("plan: ")
    with pytest.raises(ConfigError, match="does not fit"):
        told(run, 10**6, monkeypatch)


def test_what_cannot_be_traced_is_told_and_not_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(*_: Any) -> None:
        raise NotImplementedError("aten::new_operator has no meta kernel")

    monkeypatch.setattr(check, "stages_of", fail)
    assert told(RUN, 1, monkeypatch) == ["no plan of memory: aten::new_operator has no meta kernel"]


@pytest.mark.parametrize(
    ("files", "left"),
    [
        ({}, 5000),
        ({"memory.max": "4000\n", "memory.current": "1000\n"}, 3000),
        ({"memory.max": "max\n", "memory.current": "1000\n"}, 5000),
        ({"memory/memory.limit_in_bytes": "9000\n", "memory/memory.usage_in_bytes": "1000\n"}, 5000),
    ],
)
def test_main_memory_is_that_of_the_container(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, files: dict[str, str], left: int
) -> None:
    monkeypatch.setattr(check.psutil, "virtual_memory", lambda: SimpleNamespace(available=5000))
    for name, text in files.items():
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).write_text(text)
    assert host_memory(tmp_path) == left


def test_this_machine_has_main_memory() -> None:
    assert 10**8 < host_memory() < 2**60
