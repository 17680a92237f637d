"""The benchmarks' own arithmetic, with a clock whose times are known."""

from __future__ import annotations

import itertools
import sys
from collections.abc import Iterator
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from tests.conftest import ROOT

CPU = torch.device("cpu")


@pytest.fixture
def benchmarks(monkeypatch: pytest.MonkeyPatch) -> Iterator[Any]:
    """The scripts as modules, as they see each other."""
    monkeypatch.syspath_prepend(str(ROOT / "benchmarks"))
    names = ("measure", "baselines", "train_step", "generate")
    for name in names:
        monkeypatch.delitem(sys.modules, name, raising=False)
    yield SimpleNamespace(**{name: __import__(name) for name in names})
    for name in names:
        sys.modules.pop(name, None)


def clock(*durations: float) -> Iterator[float]:
    """What a clock says before and after each of several calls."""
    times = itertools.accumulate(itertools.chain.from_iterable((1.0, duration) for duration in durations))
    return iter(list(times))


def ticking(module: Any, monkeypatch: pytest.MonkeyPatch, *durations: float) -> None:
    ticks = clock(*durations)
    monkeypatch.setattr(module, "time", SimpleNamespace(perf_counter=lambda: next(ticks)))


def test_the_median_leaves_warm_up_out(benchmarks: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    ticking(benchmarks.measure, monkeypatch, 3.0, 1.0, 9.0)
    calls: list[int] = []
    assert benchmarks.measure.median_seconds(lambda: calls.append(1), 3, CPU, warmup=2) == 3.0
    assert len(calls) == 5


def test_rates_are_the_best_seen(benchmarks: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    ticking(benchmarks.measure, monkeypatch, *[4.0] * 6, 2.0)
    assert benchmarks.measure.read_bandwidth(CPU) == 4 * 2**27 / 2.0


def small(module: Any, **changes: Any) -> Any:
    shape = {
        "width": 32,
        "depth": 2,
        "heads": 2,
        "text_len": 8,
        "grid": 4,
        "text_vocab": 30,
        "image_vocab": 20,
        "dtype": "fp32",
    }
    return module.Options(**{**shape, **changes})


def test_a_step_is_the_median_of_those_after_two(benchmarks: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    module = benchmarks.train_step
    steps: list[int] = []
    monkeypatch.setattr(module, "plain_step", lambda *_: lambda: steps.append(1))
    monkeypatch.setattr(module, "matmul_rate", lambda *_: 1e9)
    monkeypatch.setattr(module, "read_bandwidth", lambda *_: 1e9)
    monkeypatch.setattr(module, "keep_freed_memory", lambda: True)
    ticking(module, monkeypatch, 50.0, 40.0, 3.0, 1.0, 9.0)
    figures = module.measure(small(module, steps=3, dtype="fp32"))
    assert figures["step_seconds"] == 3.0
    assert figures["fraction_of_matmul"] == pytest.approx(figures["flops_per_step"] / 3.0 / 1e9)
    assert len(steps) == 5


@pytest.mark.parametrize("model", ["ours", "dense"])
@pytest.mark.parametrize("dtype", ["fp32", "bf16"])
def test_a_step_moves_every_weight(benchmarks: Any, model: str, dtype: str, monkeypatch: pytest.MonkeyPatch) -> None:
    module = benchmarks.train_step
    made: list[torch.nn.Module] = []
    groups = module.decay_groups
    monkeypatch.setattr(module, "decay_groups", lambda model, decay: made.append(model) or groups(model, decay))
    options = small(module, model=model, dtype=dtype, batch=8)
    step = module.plain_step(module.shape(options), options, CPU)
    before = [parameter.detach().clone() for parameter in made[0].parameters()]
    for _ in range(20):  # bf16 weights move only when their fp32 ones have gone far enough
        step()
    moved = [not torch.equal(old, new) for old, new in zip(before, made[0].parameters(), strict=True)]
    assert sum(moved) >= 0.9 * len(moved)  # those of padding have no gradient here


def test_blocks_alone_count_no_heads(benchmarks: Any) -> None:
    module = benchmarks.train_step
    whole, blocks = (
        module.count(options, module.shape(options), CPU)
        for options in (small(module), small(module, blocks_only=True))
    )
    heads = 2 * 3 * 2 * 32 * (8 * 30 + 16 * 20)
    for name, flops in whole.items():
        assert flops - blocks[name] == heads


def test_decoding_times_are_medians_after_warm_up(benchmarks: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    """Of a step with its draw, and of the draw: three readings of the clock for each."""
    module = benchmarks.generate
    options = small(module)
    model = module.Dalle(module.shape(options))
    durations = [(90.0, 90.0)] * module.WARMUP + [(5.0, 1.0), (2.0, 3.0), (4.0, 2.0)]
    ticks = iter(list(itertools.accumulate(t for pair in durations for t in (1.0, *pair))))
    monkeypatch.setattr(module, "time", SimpleNamespace(perf_counter=lambda: next(ticks)))
    assert module.decode(model, [0], 1, 3) == (6.0, 2.0)


def test_documented_commands_are_understood(benchmarks: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    """Those at the top of each script, whose options are parsed and no more."""
    for name in ("train_step", "generate"):
        module = getattr(benchmarks, name)
        commands = [line for line in module.__doc__.splitlines() if line.startswith("python ")]
        assert commands
        for command in commands:
            monkeypatch.setattr(sys, "argv", command.partition("#")[0].split()[1:])
            assert isinstance(module.parse_options(module.Options), module.Options)
