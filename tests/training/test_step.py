"""One process's updates against torch's own AdamW and clipping."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from dalle_ds.config import OptimConfig, ScalingConfig
from dalle_ds.optim import AdamW
from dalle_ds.parallel import Mesh
from dalle_ds.precision import GradientScales
from dalle_ds.training.step import TrainStep, decide
from dalle_ds.training.strategies import PlainStrategy


class Engine:
    """What a `TrainStep` uses of a DeepSpeed engine of stage 0."""

    device = torch.device("cpu")

    def __init__(self, module: nn.Module, optimizer: AdamW) -> None:
        self.module, self.optimizer, self.client_optimizer = module, optimizer, optimizer

    def zero_optimization_stage(self) -> int:
        return 0

    def backward(self, loss: Tensor) -> None:
        loss.backward()

    def step(self) -> None:
        self.optimizer.step()
        self.optimizer.zero_grad()


class Square:
    """A task: mean squared error of two layers in a row."""

    def num_items(self, batch: dict[str, Tensor]) -> Tensor:
        return torch.ones(())

    def loss(self, engine: Any, batch: dict[str, Tensor], step: int) -> tuple[Tensor, dict[str, Tensor]]:
        return (engine.module(batch["x"]) - 3 * batch["x"]).square().mean() * batch["weight"], {}

    def digest(self, sums: dict[str, Tensor]) -> dict[str, float]:
        return {}


def model() -> nn.Sequential:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(4, 4), nn.Linear(4, 4))


def train_step(
    module: nn.Sequential, optim: OptimConfig, skip: str = "update", scaled: bool = False, replicas: Any = None
) -> TrainStep:
    groups = [
        {"name": str(number), "params": list(layer.parameters()), "block": number}
        for number, layer in enumerate(module)
    ]
    betas = (optim.beta1, optim.beta2)
    optimizer = AdamW(groups, betas=betas, weight_decay=0.1, second_moment_clip=optim.second_moment_clip)
    scaling = ScalingConfig(skip=skip)  # type: ignore[arg-type]
    task: Any = Square()
    return TrainStep(
        PlainStrategy(task, Engine(module, optimizer)),
        Mesh(0, 1, torch.device("cpu")),
        optim,
        scales=GradientScales(scaling, 2, 1) if scaled else None,
        replicas=replicas,
    )


def batch(update: int, weight: float = 1.0) -> list[dict[str, Tensor]]:
    return [{"x": torch.randn(8, 4, generator=torch.Generator().manual_seed(update)), "weight": torch.tensor(weight)}]


BLOCKS = [None, 0, 0, 1]


@pytest.mark.parametrize(
    ("loss", "squares", "options", "applied", "finite", "skipped", "overflowed"),
    [
        (1.0, [1, 2, 3, 4], {}, True, True, [], []),
        (math.nan, [1, 2, 3, 4], {}, False, False, [], []),
        (1.0, [1, math.nan, 3, 4], {}, False, False, [], []),
        (1.0, [1, math.nan, 3, 4], {"at_floor": lambda _block: False}, False, True, [], [0]),
        (1.0, [1, math.nan, 3, 4], {"at_floor": lambda block: block == 1}, False, True, [], [0]),
        (1.0, [1, math.nan, 3, 4], {"at_floor": lambda block: block == 0}, False, False, [], []),
        (1.0, [1, math.nan, 3, 4], {"at_floor": lambda _block: False, "skips_blocks": True}, True, True, [1, 2], [0]),
        (1.0, [math.nan, 2, 3, 4], {"at_floor": lambda _block: False, "skips_blocks": True}, False, False, [], []),
        (math.inf, [1, math.nan, 3, 4], {"at_floor": lambda _block: False, "skips_blocks": True}, False, False, [], []),
        (1.0, [1, math.inf, 3, 4], {"at_floor": lambda _block: False, "compresses": True}, False, False, [], []),
    ],
)
def test_decisions(
    loss: float,
    squares: list[float],
    options: dict[str, Any],
    applied: bool,
    finite: bool,
    skipped: list[int],
    overflowed: list[int],
) -> None:
    decision = decide(loss, squares, BLOCKS, clip=1.0, **options)
    assert (decision.applied, decision.finite) == (applied, finite)
    assert (sorted(decision.skipped_groups), sorted(decision.overflowed_blocks)) == (skipped, overflowed)
    assert decision.compression_overflows == int(bool(options.get("compresses")))
    if applied:
        norm = math.sqrt(sum(square for group, square in enumerate(squares) if group not in skipped))
        assert decision.grad_norm == norm
        assert decision.clip_factor * norm == pytest.approx(1, rel=1e-5)


def test_nothing_is_applied_where_every_group_is_left_out() -> None:
    decision = decide(1.0, [math.nan, 1.0], [0, 0], at_floor=lambda _block: False, skips_blocks=True)
    assert decision.finite and not decision.applied


@pytest.mark.parametrize("clip", [None, 0.5, 1e3])
def test_updates_are_those_of_torch_with_clipping(clip: float | None) -> None:
    ours, theirs = model(), model()
    optim = OptimConfig(clip=clip, second_moment_clip=None)
    update = train_step(ours, optim)
    reference = torch.optim.AdamW(theirs.parameters(), betas=(0.9, 0.96), weight_decay=0.1)
    for step in range(20):
        figures = update.run(batch(step), step, 1e-2).metrics
        for group in reference.param_groups:
            group["lr"] = 1e-2
        x = batch(step)[0]["x"]
        (theirs(x) - 3 * x).square().mean().backward()
        norm = torch.nn.utils.clip_grad_norm_(theirs.parameters(), clip if clip is not None else math.inf)
        assert figures["grad_norm"] == pytest.approx(float(norm), rel=1e-5)
        reference.step()
        reference.zero_grad()
    for a, b in zip(ours.parameters(), theirs.parameters(), strict=True):
        assert torch.allclose(a, b, rtol=1e-5, atol=1e-7)


def test_every_micro_batch_is_a_sign_of_life() -> None:
    """An update of many of them may take longer than what is held to be a hang."""
    module, seen, task = model(), [], Square()
    optimizer = AdamW([{"name": "all", "params": list(module.parameters()), "block": None}])
    strategy: Any = PlainStrategy(task, Engine(module, optimizer))  # type: ignore[arg-type]
    loss = task.loss
    task.loss = lambda *arguments: (seen.append("loss"), loss(*arguments))[1]  # type: ignore[method-assign]
    strategy.pulse = lambda: seen.append("pulse")
    strategy.backward([*batch(0), *batch(1), *batch(2)], 0)
    assert seen == ["pulse", "loss"] * 3


def test_the_clipped_norm_is_that_of_the_gradients_that_are_used() -> None:
    module = model()
    update = train_step(module, OptimConfig(clip=0.5))
    seen: list[float] = []
    step = update._engine.step
    update._engine.step = lambda: (
        seen.append(math.sqrt(sum(float(p.grad.square().sum()) for p in module.parameters()))),
        step(),
    )
    result = update.run(batch(0), 0, 1e-2)
    assert result.metrics["grad_norm"] > 0.5
    assert seen == pytest.approx([result.metrics["grad_norm_clipped"]], rel=1e-5)
    assert seen == pytest.approx([0.5], rel=1e-4)


def test_a_block_that_was_left_out_is_updated_again_next_time() -> None:
    module = model()
    update = train_step(module, OptimConfig(), skip="block", scaled=True)
    handle = module[0].weight.register_hook(lambda gradient: gradient * math.nan)
    before = [parameter.detach().clone() for parameter in module.parameters()]
    assert update.run(batch(0), 0, 1e-2).decision.applied
    after = [parameter.detach().clone() for parameter in module.parameters()]
    assert [torch.equal(a, b) for a, b in zip(before, after, strict=True)] == [True, True, False, False]
    handle.remove()
    assert update.run(batch(1), 1, 1e-2).decision.applied
    assert not any(torch.equal(a, b) for a, b in zip(after, module.parameters(), strict=True))


def test_a_stage_of_a_pipeline_leaves_out_the_block_that_overflowed_not_the_one_of_its_number() -> None:
    """A stage has some of the model's groups, and its first is not the model's first."""
    module = model()
    update = train_step(module, OptimConfig(), skip="block", scaled=True)
    update._layout.blocks, update._layout.numbers = [None, 0, 1], [1, 2]
    module[0].weight.register_hook(lambda gradient: gradient * math.nan)
    before = [parameter.detach().clone() for parameter in module.parameters()]
    assert update.run(batch(0), 0, 1e-2).decision.applied
    after = module.parameters()
    assert [torch.equal(a, b) for a, b in zip(before, after, strict=True)] == [True, True, False, False]


def test_second_moments_are_clipped_as_without_knowing_the_gradients_norm() -> None:
    """The clipped norm that the optimizer is told lets it leave out a clip that cannot bind, never one that does."""
    clip = 1e-4
    ours, theirs = model(), model()
    update = train_step(ours, OptimConfig(clip=0.5, second_moment_clip=clip))
    groups = [{"name": "all", "params": list(theirs.parameters()), "block": None}]
    reference = AdamW(groups, betas=(0.9, 0.96), weight_decay=0.1, second_moment_clip=clip)
    reference.param_groups[0]["lr"] = 1e-2
    for step in range(5):
        update.run(batch(step), step, 1e-2)
        x = batch(step)[0]["x"]
        (theirs(x) - 3 * x).square().mean().backward()
        torch.nn.utils.clip_grad_norm_(theirs.parameters(), 0.5)
        reference.step()
        reference.zero_grad()
    assert any(bool((state["exp_avg_sq"] == clip).any()) for state in reference.state.values())
    for a, b in zip(ours.parameters(), theirs.parameters(), strict=True):
        assert torch.allclose(a, b, rtol=1e-5, atol=1e-7)


def test_a_bad_loss_changes_neither_weights_nor_moments_nor_scales() -> None:
    module = model()
    update = train_step(module, OptimConfig(), scaled=True)
    update.run(batch(0), 0, 1e-2)
    state = {p: {n: v.clone() for n, v in s.items() if torch.is_tensor(v)} for p, s in update._optimizer.state.items()}
    before = [parameter.detach().clone() for parameter in module.parameters()]
    scales = list(update._scales.scales)
    result = update.run(batch(1, weight=math.nan), 1, 1e-2)
    assert not result.decision.applied and not result.decision.finite
    assert all(torch.equal(a, b) for a, b in zip(before, module.parameters(), strict=True))
    assert all(torch.equal(update._optimizer.state[p][n], v) for p, kept in state.items() for n, v in kept.items())
    assert update._scales.scales == scales


class Replicas:
    """Stands for a compressed reduction: says what it is told of a block's squared norm, and remembers what was given back."""

    compresses = True

    def __init__(self, module: nn.Sequential, square: float) -> None:
        self.module, self.square = module, square
        self.given_back: list[tuple[set[int], list[bool]]] = []

    def reduce(self) -> Tensor:
        norms = [sum(p.grad.square().sum() for p in layer.parameters() if p.grad is not None) for layer in self.module]
        return torch.tensor([float(norms[0]), self.square])

    def restore_error_feedback(self, groups: set[int]) -> None:
        is_there = [any(bool(p.grad.any()) for p in layer.parameters() if p.grad is not None) for layer in self.module]
        self.given_back.append((set(groups), is_there))


@pytest.mark.parametrize(("skip", "unused"), [("update", {0, 1}), ("block", {1})])
def test_gradients_that_are_not_used_are_given_back_before_they_are_cleared(skip: str, unused: set[int]) -> None:
    module = model()
    replicas = Replicas(module, math.nan)
    result = train_step(module, OptimConfig(), skip, scaled=True, replicas=replicas).run(batch(0), 0, 1e-2)
    assert result.decision.finite and result.decision.applied == (skip == "block")
    assert replicas.given_back == [(unused, [True, True])]


def test_a_factor_that_overflows_is_not_blamed_on_a_gradient_scale() -> None:
    module = model()
    update = train_step(module, OptimConfig(), scaled=True, replicas=Replicas(module, math.inf))
    result = update.run(batch(0), 0, 1e-2)
    assert not result.decision.applied and not result.decision.finite
    assert result.metrics["powersgd_overflows"] == 1
    assert result.metrics["gradient_scale/1"] == result.metrics["gradient_scale/0"] == 2**13
