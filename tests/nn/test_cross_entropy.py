"""Chunked cross-entropy against torch's own on whole logits in float64."""

from __future__ import annotations

from concurrent.futures import ThreadPoolExecutor

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.flop_counter import FlopCounterMode

from dalle_ds.nn import cross_entropy
from dalle_ds.nn.cross_entropy import linear_cross_entropy
from dalle_ds.nn.layers import Unembedding


def operands(rows: int, vocab: int, dtype: torch.dtype, scale: float = 0.3) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    generator = torch.Generator().manual_seed(rows)
    hidden = torch.randn(rows, 64, generator=generator)
    weight = (torch.randn(vocab, 64, generator=generator) * scale).to(dtype)
    bias = torch.randn(vocab, generator=generator).to(dtype)
    targets = torch.randint(0, vocab, (rows,), generator=generator)
    targets[::3] = -1
    return hidden.requires_grad_(), weight.requires_grad_(), bias.requires_grad_(), targets


def exact(hidden: Tensor, weight: Tensor, bias: Tensor, targets: Tensor) -> Tensor:
    logits = hidden.double() @ weight.double().T + bias.double()
    return F.cross_entropy(logits, targets, ignore_index=-1, reduction="sum")


@pytest.mark.parametrize(("rows", "vocab"), [(1, 2), (5, 11), (300, 9000), (70, 4097)])
def test_fp32_is_exact(rows: int, vocab: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(cross_entropy, "CHUNK", 40_000)  # many chunks, the last not full
    *leaves, targets = operands(rows, vocab, torch.float32)
    loss, expected = linear_cross_entropy(*leaves, targets), exact(*leaves, targets)
    torch.testing.assert_close(loss.double(), expected, rtol=1e-6, atol=1e-6)
    found = torch.autograd.grad(loss * 0.3, leaves)
    for ours, theirs in zip(found, torch.autograd.grad(expected * 0.3, leaves), strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("scale", [0.03, 0.3, 1.0])
def test_bf16_weights_cost_little_precision(scale: float) -> None:
    """Logits keep fp32: their loss and gradients are nearer to the exact ones than those of 16-bit logits."""
    hidden, weight, bias, targets = operands(512, 3000, torch.bfloat16, scale)
    expected = exact(hidden, weight, bias, targets)
    usual = F.cross_entropy(
        F.linear(hidden.bfloat16(), weight, bias).float(), targets, ignore_index=-1, reduction="sum"
    )
    loss = linear_cross_entropy(hidden, weight, bias, targets)
    assert abs(loss.item() - expected.item()) < 2e-3 * expected.item()
    leaves = (hidden, weight)
    errors = []
    for one in (loss, usual):
        pairs = zip(
            torch.autograd.grad(one, leaves), torch.autograd.grad(expected, leaves, retain_graph=True), strict=True
        )
        errors.append([float((ours.double() - theirs).norm() / theirs.double().norm()) for ours, theirs in pairs])
    for ours, theirs in zip(*errors, strict=True):
        assert ours < 0.02
        assert ours < 1.1 * theirs
    # Logits in 16 bits would be off by 2^-9 of their size.
    assert abs(loss.item() - expected.item()) < 0.5 * abs(usual.item() - expected.item()) + 1e-4 * expected.item()


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_head_gradients_are_rounded_once(dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch) -> None:
    """In many chunks, and divided by the number of rows: rows that agree would overflow fp16 before that."""
    monkeypatch.setattr(cross_entropy, "CHUNK", 2**18)
    hidden, weight, bias, targets = operands(70_000, 50, dtype, scale=0.0)
    targets = torch.zeros_like(targets)
    found = torch.autograd.grad(linear_cross_entropy(hidden, weight, bias, targets) / 70_000, (weight, bias))
    exact_ones = torch.autograd.grad(exact(hidden, weight, bias, targets) / 70_000, (weight, bias))
    for ours, theirs in zip(found, exact_ones, strict=True):
        assert ours.dtype == dtype
        torch.testing.assert_close(ours, theirs, rtol=4 * torch.finfo(dtype).eps, atol=2e-4)


@pytest.mark.parametrize("rows", [300, 301])
def test_masked_rows_are_as_good_as_absent_ones(rows: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """How padding is left out on a GPU."""
    *leaves, targets = operands(rows, 900, torch.float32)
    expected = exact(*leaves, targets)
    monkeypatch.setattr(cross_entropy, "COMPACTED", ())
    monkeypatch.setattr(cross_entropy, "CHUNK", 40_000)
    loss = linear_cross_entropy(*leaves, targets)
    torch.testing.assert_close(loss.double(), expected, rtol=1e-6, atol=1e-6)
    for ours, theirs in zip(torch.autograd.grad(loss, leaves), torch.autograd.grad(expected, leaves), strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-4, atol=1e-5)


def test_second_derivatives_are_refused() -> None:
    *leaves, targets = operands(9, 30, torch.float32)
    loss = linear_cross_entropy(*leaves, targets)
    with pytest.raises(RuntimeError, match="second derivative"):
        torch.autograd.grad(loss, leaves, create_graph=True)


@pytest.mark.parametrize("targets", [True, False])
def test_autocast_leaves_logits_alone(targets: bool) -> None:
    head, hidden = Unembedding(64, 50), torch.randn(20, 64)
    arguments = (hidden, torch.arange(20)) if targets else (hidden,)
    expected = head(*arguments)
    with torch.autocast("cpu", torch.bfloat16):
        found = head(*arguments)
    assert found.dtype == torch.float32
    assert torch.equal(found, expected)


def products(*leaves_and_targets: Tensor) -> float:
    """How many times as many FLOPs as the logits take."""
    hidden, weight, _, targets = leaves_and_targets
    with FlopCounterMode(display=False) as counter:
        linear_cross_entropy(*leaves_and_targets)
    return counter.get_total_flops() / (2 * hidden.shape[1] * len(weight) * int((targets >= 0).sum()))


def test_no_gradient_is_made_where_none_is_wanted() -> None:
    *leaves, targets = operands(20, 50, torch.float32)
    assert products(*leaves, targets) == 3
    for context in (torch.no_grad(), torch.inference_mode()):
        with context:
            assert products(*leaves, targets) == 1
    hidden, weight, bias = leaves
    frozen = weight.detach(), bias.detach()
    assert products(hidden, *frozen, targets) == 2
    expected = torch.autograd.grad(exact(*leaves, targets), hidden)[0]
    found = torch.autograd.grad(linear_cross_entropy(hidden, *frozen, targets), hidden)[0]
    torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-5)


def test_the_process_keeps_its_precision_of_products() -> None:
    """Also with several threads, each of which changes it for a moment."""
    matmul = torch.backends.mkldnn.matmul
    before = matmul.fp32_precision
    *leaves, targets = operands(64, 3000, torch.bfloat16)
    with ThreadPoolExecutor(4) as threads:
        list(threads.map(lambda _: linear_cross_entropy(*leaves, targets), range(40)))
    assert matmul.fp32_precision == before


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_padding_alone_has_no_loss_and_no_gradient(dtype: torch.dtype) -> None:
    *leaves, targets = operands(6, 11, dtype)
    loss = linear_cross_entropy(*leaves, torch.full_like(targets, -1))
    assert loss.item() == 0
    assert all(gradient.abs().max() == 0 for gradient in torch.autograd.grad(loss, leaves))


def test_a_certain_and_wrong_model_has_a_finite_loss() -> None:
    hidden, weight, bias, targets = operands(9, 30, torch.float32, scale=200.0)
    loss = linear_cross_entropy(hidden, weight, bias, targets)
    assert torch.isfinite(loss)
    assert all(torch.isfinite(gradient).all() for gradient in torch.autograd.grad(loss, (hidden, weight, bias)))


class _Largest(TorchDispatchMode):
    elements = 0

    def __torch_dispatch__(self, func: object, types: object, args: tuple = (), kwargs: dict | None = None) -> object:
        result = func(*args, **(kwargs or {}))
        if isinstance(result, Tensor):
            self.elements = max(self.elements, result.numel())
        return result


def test_whole_logits_never_exist(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(cross_entropy, "CHUNK", 2**15)
    *leaves, targets = operands(900, 1000, torch.float32)
    with _Largest() as largest:
        linear_cross_entropy(*leaves, targets).backward()
    assert largest.elements <= max(2**15, 1000 * 64)
    assert largest.elements < 900 * 1000 // 10
