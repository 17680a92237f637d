"""The 16-bit branch of a residual block against autograd in fp32 and float64."""

from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor, nn

from dalle_ds.config import DalleConfig, ScalingConfig
from dalle_ds.models import Dalle
from dalle_ds.precision import BranchPrecision, GradientScales, branch_linear, enter_branch, join_branch

CONFIG = DalleConfig(
    width=32,
    depth=3,
    heads=2,
    text_len=6,
    grid=4,
    text_vocab=40,
    image_vocab=50,
    attention=("row", "column", "conv"),
)
FREE = {"min_log2": -40.0, "max_log2": 60.0}


def precision(dtype: torch.dtype, log2: float) -> BranchPrecision:
    return BranchPrecision(dtype, torch.tensor([2.0**log2]))


def step(dtype: torch.dtype | None, log2: float = 0.0, checkpointing: str = "none") -> tuple[float, dict[str, Tensor]]:
    """Loss and gradients of a small transformer."""
    torch.manual_seed(0)
    model = Dalle(CONFIG, checkpointing=checkpointing)
    if dtype is not None:
        scales = GradientScales(ScalingConfig(initial_log2=log2, **FREE), len(model.blocks), 1)
        for number, block in enumerate(model.blocks):
            block.use(scales.precision(number, dtype))
    text, codes = torch.randint(0, 40, (3, 6)), torch.randint(0, 50, (3, 16))
    loss = model(text, codes, logits=False).loss
    loss.backward()
    return loss.item(), {name: parameter.grad for name, parameter in model.named_parameters()}


def norm(gradients: dict[str, Tensor]) -> float:
    return math.sqrt(sum(float(gradient.double().square().sum()) for gradient in gradients.values()))


@pytest.mark.parametrize("checkpointing", ["none", "selective", "full"])
@pytest.mark.parametrize("log2", [0, 3, 7, 10])
def test_in_fp32_a_scale_changes_nothing(log2: int, checkpointing: str) -> None:
    plain, expected = step(None)
    loss, found = step(torch.float32, log2, checkpointing)
    assert loss == pytest.approx(plain, rel=1e-6)
    assert norm(found) == pytest.approx(norm(expected), rel=1e-6)
    for name, gradient in expected.items():
        assert torch.allclose(found[name], gradient, rtol=1e-6, atol=1e-9), name


@pytest.mark.parametrize("log2", [0, 3, 7, 10])
def test_in_fp16_a_scale_changes_rounding_only(log2: int) -> None:
    plain, expected = step(None)
    loss, found = step(torch.float16, log2)
    unscaled_loss, unscaled = step(torch.float16, 0)
    assert loss == unscaled_loss
    assert loss == pytest.approx(plain, rel=1e-3) and loss != plain
    assert norm(found) == pytest.approx(norm(unscaled), rel=1e-3)
    for name, gradient in expected.items():
        assert found[name].dtype == torch.float32
        assert (found[name] - gradient).norm() <= 5e-3 * gradient.norm(), name


def test_a_scale_saves_gradients_that_fp16_would_lose() -> None:
    x = torch.randn(8, 4)
    layer = nn.Linear(4, 4)

    def gradient(log2: float) -> Tensor:
        layer.zero_grad()
        inside = precision(torch.float16, log2)
        out = join_branch(x, branch_linear(enter_branch(x, inside), layer.weight, layer.bias, inside), inside)
        (out * 1e-9).sum().backward()
        assert layer.weight.grad is not None
        return layer.weight.grad.clone()

    assert gradient(0).count_nonzero() == 0
    assert gradient(24) == pytest.approx(torch.full((4, 4), 1e-9) * x.sum(0), rel=1e-2, abs=1e-11)


@pytest.mark.parametrize("values", [(math.nan, math.inf, -math.inf, 1.0), (math.inf, 1.0), (-math.inf, 1.0)])
def test_inf_and_nan_stay_in_their_block(values: tuple[float, ...]) -> None:
    """They reach the block's own weights, nothing before it, and nothing on the identity path."""
    torch.manual_seed(0)
    model = Dalle(CONFIG)
    scales = GradientScales(ScalingConfig(**FREE), len(model.blocks), 1)
    for number, block in enumerate(model.blocks):
        block.use(scales.precision(number, torch.float16))
    poison = torch.tensor(values)
    broken = 3
    model.blocks[broken].down.register_forward_hook(
        lambda _module, _inputs, output: (
            output.register_hook(
                lambda gradient: gradient + poison.repeat(output.shape[-1] // len(poison)).to(gradient.dtype)
            )
            and None
        )
    )
    model(torch.randint(0, 40, (2, 6)), torch.randint(0, 50, (2, 16)), logits=False).loss.backward()
    nonfinite = {name for name, p in model.named_parameters() if not bool(p.grad.isfinite().all())}
    assert f"blocks.{broken}.down.weight" in nonfinite
    assert all(name.startswith(f"blocks.{broken}.") for name in nonfinite)
    assert not any("norm" in name for name in nonfinite)
    assert all(bool(p.grad.count_nonzero()) for p in model.blocks[0].parameters()), "the identity path goes on"


@pytest.mark.parametrize("poison", [math.nan, math.inf, -math.inf])
@pytest.mark.parametrize("dtype", [torch.float16, torch.float32])
def test_what_is_not_finite_leaves_a_branch_as_nothing(dtype: torch.dtype, poison: float) -> None:
    """And not as the greatest number of the type, which would move all blocks before it (DALL·E Fig. 4)."""
    x = torch.zeros(4, requires_grad=True)
    enter_branch(x, precision(dtype, 3)).backward(torch.tensor([poison, 2.0, poison, -4.0], dtype=dtype))
    assert x.grad is not None and x.grad.tolist() == [0.0, 0.25, 0.0, -0.5]


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32])
def test_linear_against_float64(dtype: torch.dtype) -> None:
    torch.manual_seed(1)
    x, weight, bias = torch.randn(2, 5, 6), torch.randn(3, 6), torch.randn(3)
    inside = precision(dtype, 5)
    leaves = [tensor.clone().requires_grad_() for tensor in (x, weight, bias)]
    out = branch_linear(leaves[0].to(dtype), leaves[1], leaves[2], inside)
    assert out.dtype == dtype
    upstream = torch.randn(2, 5, 3)
    (out * (upstream * 32).to(dtype)).sum().backward()
    doubles = [tensor.double().requires_grad_() for tensor in (x, weight, bias)]
    expected = nn.functional.linear(*doubles)
    (expected * upstream.double()).sum().backward()
    tolerance = 8 * torch.finfo(dtype).eps
    assert (out.double() - expected).abs().max() < tolerance * expected.abs().max()
    assert (leaves[0].grad.double() / 32 - doubles[0].grad).abs().max() < tolerance * doubles[0].grad.abs().max()
    for leaf, double in zip(leaves[1:], doubles[1:], strict=True):
        assert leaf.grad.dtype == torch.float32
        assert (leaf.grad.double() - double.grad).abs().max() < tolerance * double.grad.abs().max()


def test_no_16_bit_copy_of_a_weight_is_kept_for_the_backward_pass() -> None:
    """Under ZeRO-3 such copies would be a whole model."""
    kept: list[Tensor] = []
    weight, bias = nn.Parameter(torch.randn(64, 32)), nn.Parameter(torch.zeros(64))
    with torch.autograd.graph.saved_tensors_hooks(lambda t: kept.append(t) or t, lambda t: t):
        branch_linear(torch.randn(4, 32).half().requires_grad_(), weight, bias, precision(torch.float16, 0))
    assert sorted(t.data_ptr() == weight.data_ptr() for t in kept) == [False, True]
    assert sum(t.numel() for t in kept if t.dtype == torch.float16) == 4 * 32


def test_callers_tensors_are_not_changed() -> None:
    x, branch = torch.randn(3, 4, requires_grad=True), torch.randn(3, 4).half().requires_grad_()
    before = x.detach().clone()
    upstream = torch.full((3, 4), math.inf)
    kept = upstream.clone()
    inside = precision(torch.float16, 3)
    join_branch(enter_branch(x, precision(torch.float32, 1)), branch, inside).backward(upstream)
    assert torch.equal(x, before) and torch.equal(upstream, kept)
