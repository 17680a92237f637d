"""Blockwise attention against dense masked attention in float64, over random shapes and at the paper's."""

from __future__ import annotations

import random
import zlib
from dataclasses import dataclass

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from dalle_ds.nn.attention import attention_mask, blockwise
from dalle_ds.nn.attention.blockwise import blockwise_attention

SPARSE_KINDS = ("row", "column", "conv")


@dataclass(frozen=True)
class Case:
    """One shape; `codes` may stop before the image is full."""

    kind: str
    text_len: int
    grid: int
    kernel: int
    codes: int
    batch: int = 1
    heads: int = 1
    depth: int = 16
    padded: bool = False

    def inputs(self, dtype: torch.dtype, scale: float = 1.0) -> tuple[Tensor, Tensor | None, Tensor]:
        """qkv, keep, and the gradient of a loss with respect to the output."""
        generator = torch.Generator().manual_seed(zlib.crc32(repr(self).encode()))
        length = self.text_len + self.codes
        qkv = torch.randn(self.batch, length, 3, self.heads, self.depth, generator=generator, dtype=torch.float64)
        qkv[:, :, :2] *= scale
        gradient = torch.randn(self.batch, length, self.heads * self.depth, generator=generator, dtype=torch.float64)
        keep = None
        if self.padded:
            keep = torch.rand(self.batch, self.text_len, generator=generator) < 0.6
            keep[:, 0] = True
        return qkv.to(dtype), keep, gradient.to(dtype)

    def mask(self, keep: Tensor | None) -> Tensor:
        """(B, 1, n, n)"""
        length = self.text_len + self.codes
        mask = attention_mask(self.kind, self.text_len, self.grid, self.kernel)[:length, :length]
        mask = mask.repeat(self.batch, 1, 1, 1)
        if keep is not None:
            mask[..., : self.text_len] &= keep[:, None, None]
        return mask

    def blockwise(self, qkv: Tensor, keep: Tensor | None) -> Tensor:
        return blockwise_attention(
            qkv, keep, kind=self.kind, text_len=self.text_len, grid=self.grid, kernel=self.kernel
        )

    def reference(self, qkv: Tensor, keep: Tensor | None) -> Tensor:
        """Softmax of all scores, the forbidden ones at −∞."""
        queries, keys, values = qkv.unbind(2)
        scores = torch.einsum("bqhd,bkhd->bhqk", queries, keys) * self.depth**-0.5
        probabilities = scores.masked_fill(~self.mask(keep), float("-inf")).softmax(dim=-1)
        return torch.einsum("bhqk,bkhd->bqhd", probabilities, values).flatten(2)

    def torchs_own(self, qkv: Tensor, keep: Tensor | None) -> Tensor:
        queries, keys, values = (part.transpose(1, 2) for part in qkv.unbind(2))
        attended = F.scaled_dot_product_attention(queries, keys, values, attn_mask=self.mask(keep))
        return attended.transpose(1, 2).flatten(2)


def differentiate(attend, qkv: Tensor, keep: Tensor | None, gradient: Tensor) -> tuple[Tensor, Tensor]:
    """(output, gradient of qkv)."""
    qkv = qkv.clone().requires_grad_()
    out = attend(qkv, keep)
    return out.detach(), torch.autograd.grad(out, qkv, gradient)[0]


def random_case(kind: str, seed: int) -> Case:
    rng = random.Random(f"{kind} {seed}")
    grid = rng.randint(1, 12)
    return Case(
        kind=kind,
        text_len=rng.randint(1, 40),
        grid=grid,
        kernel=rng.choice((1, 3, 5, 11, 2 * grid + 3)),
        codes=rng.choice((grid**2, rng.randint(1, grid**2))),
        batch=rng.randint(1, 3),
        heads=rng.randint(1, 4),
        depth=rng.choice((8, 12, 16, 24, 32, 40, 64, 72, 80)),
        padded=rng.random() < 0.5,
    )


PAPER = [
    Case(kind, text_len=256, grid=32, kernel=11, codes=codes, batch=2, heads=2, depth=64, padded=padded)
    for kind in SPARSE_KINDS
    for codes, padded in ((1024, False), (1024, True), (519, False))
]
RANDOM = [random_case(kind, seed) for kind in SPARSE_KINDS for seed in range(60)]
TINY = [
    Case(kind, text_len=3, grid=4, kernel=kernel, codes=codes, batch=2, heads=2, depth=5, padded=padded)
    for kind, kernel in (("row", 3), ("column", 3), ("conv", 3), ("conv", 11))
    for codes in (16, 11, 2)
    for padded in (False, True)
]


@pytest.mark.parametrize("case", RANDOM + PAPER, ids=str)
def test_equals_dense_attention(case: Case) -> None:
    qkv, keep, gradient = case.inputs(torch.float32)
    out, d_qkv = differentiate(case.blockwise, qkv, keep, gradient)
    expected, d_expected = differentiate(case.reference, qkv.double(), keep, gradient.double())
    torch.testing.assert_close(out.double(), expected, atol=1e-5, rtol=1e-5)
    torch.testing.assert_close(d_qkv.double(), d_expected, atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize("case", RANDOM[::4], ids=str)
def test_float64_is_exact(case: Case) -> None:
    inputs = case.inputs(torch.float64)
    out, d_qkv = differentiate(case.blockwise, *inputs)
    expected, d_expected = differentiate(case.reference, *inputs)
    torch.testing.assert_close(out, expected, atol=1e-10, rtol=1e-10)
    torch.testing.assert_close(d_qkv, d_expected, atol=1e-10, rtol=1e-10)


@pytest.mark.parametrize("kind", SPARSE_KINDS)
def test_gradient_is_that_of_finite_differences(kind: str) -> None:
    case = Case(kind, text_len=3, grid=3, kernel=3, codes=7, heads=2, depth=2, padded=True)
    qkv, keep, _ = case.inputs(torch.float64)
    assert torch.autograd.gradcheck(lambda x: case.blockwise(x, keep), qkv.requires_grad_(), fast_mode=False)


@pytest.mark.parametrize("padded", [False, True])
@pytest.mark.parametrize("kind", SPARSE_KINDS)
def test_bf16_is_as_accurate_as_torchs_own(kind: str, padded: bool) -> None:
    case = Case(kind, text_len=256, grid=32, kernel=11, codes=1024, batch=1, heads=4, depth=64, padded=padded)
    qkv, keep, gradient = case.inputs(torch.bfloat16)
    exact = differentiate(case.reference, qkv.double(), keep, gradient.double())
    ours = differentiate(case.blockwise, qkv, keep, gradient)
    theirs = differentiate(case.torchs_own, qkv, keep, gradient)
    for found, other, expected in zip(ours, theirs, exact, strict=True):
        assert found.dtype == torch.bfloat16
        for bound, measure in ((1.5, torch.linalg.vector_norm), (2.0, lambda error: error.abs().max())):
            assert measure(found.double() - expected) <= bound * measure(other.double() - expected)


@pytest.mark.parametrize("scale", [3.0, 10.0, 100.0])
@pytest.mark.parametrize("depth", [32, 48, 64, 128])
@pytest.mark.parametrize("kind", SPARSE_KINDS)
def test_bf16_gradients_of_confident_attention(kind: str, depth: int, scale: float) -> None:
    """Where scores are large, a probability that is made again is only right if its score is made as it was forward."""
    case = Case(kind, text_len=64, grid=16, kernel=11, codes=256, batch=1, heads=2, depth=depth, padded=True)
    qkv, keep, gradient = case.inputs(torch.bfloat16, scale=scale)
    _, exact = differentiate(case.reference, qkv.double(), keep, gradient.double())
    _, ours = differentiate(case.blockwise, qkv, keep, gradient)
    _, theirs = differentiate(case.torchs_own, qkv, keep, gradient)
    # Where one key has all of the attention, gradients of queries and keys cancel to nothing, and what is left is rounding.
    rounding = torch.finfo(torch.bfloat16).eps ** 2 * torch.linalg.vector_norm(gradient.double())
    for part in range(3):
        size = torch.linalg.vector_norm(exact[:, :, part])
        off, torchs = (torch.linalg.vector_norm((it - exact)[:, :, part]) for it in (ours, theirs))
        assert off < 1.5 * torchs + 0.01 * size + rounding


@pytest.mark.parametrize("scale", [1.0, 30.0])
@pytest.mark.parametrize("kind", SPARSE_KINDS)
def test_fp16_holds_whatever_fits_into_it(kind: str, scale: float) -> None:
    """Gradients in the thousands, as gradient scaling makes them."""
    case = Case(kind, text_len=64, grid=16, kernel=11, codes=256, batch=1, heads=2, depth=64, padded=True)
    qkv, keep, gradient = case.inputs(torch.float16, scale=scale)
    gradient = gradient * 1000
    _, exact = differentiate(case.reference, qkv.double(), keep, gradient.double())
    _, ours = differentiate(case.blockwise, qkv, keep, gradient)
    fits = exact.abs() < 6e4
    assert fits.double().mean() > 0.9
    off = torch.linalg.vector_norm((ours - exact)[fits])
    assert off < 0.01 * torch.linalg.vector_norm(exact[fits])


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("case", [case for case in PAPER if case.codes == 1024], ids=str)
def test_large_scores_stay_finite(case: Case, dtype: torch.dtype) -> None:
    """Queries and keys 30 times the usual: scores in the thousands, where one key takes all."""
    qkv, keep, gradient = case.inputs(dtype, scale=30.0)
    out, d_qkv = differentiate(case.blockwise, qkv, keep, gradient)
    assert out.isfinite().all()
    assert d_qkv.isfinite().all()
    expected, _ = differentiate(case.reference, qkv.double(), keep, gradient.double())
    if dtype == torch.float32:
        torch.testing.assert_close(out.double(), expected, atol=1e-2, rtol=1e-2)


@pytest.mark.parametrize("case", TINY, ids=str)
def test_gradient_reaches_what_the_mask_allows_and_nothing_else(case: Case) -> None:
    qkv, keep, _ = case.inputs(torch.float32)
    qkv.requires_grad_()
    out = case.blockwise(qkv, keep)
    mask = case.mask(keep)[:, 0]
    for query in range(out.shape[1]):
        (gradient,) = torch.autograd.grad(out[:, query].square().sum(), qkv, retain_graph=True)
        d_queries, d_keys, d_values = (part.abs().amax(dim=(2, 3)) for part in gradient.unbind(2))
        allowed = mask[:, query]
        assert torch.equal(d_values > 0, allowed)
        assert not d_keys[~allowed].any()
        assert not d_queries[:, torch.arange(out.shape[1]) != query].any()
        # A key that is alone has all of the softmax, whatever its score.
        several = allowed.sum(dim=-1) > 1
        assert d_keys[several][allowed[several]].all()
        assert d_queries[several, query].all()


@pytest.mark.parametrize("kind", SPARSE_KINDS)
def test_a_padding_keys_content_does_not_matter(kind: str) -> None:
    case = Case(kind, text_len=9, grid=5, kernel=3, codes=25, batch=2, heads=2, padded=True)
    qkv, keep, gradient = case.inputs(torch.float32)
    out, d_qkv = differentiate(case.blockwise, qkv, keep, gradient)
    other = qkv.clone()
    other[:, : case.text_len, 1:][~keep] = 7.0
    changed, d_changed = differentiate(case.blockwise, other, keep, gradient)
    torch.testing.assert_close(changed, out, atol=1e-6, rtol=0)
    torch.testing.assert_close(d_changed, d_qkv, atol=1e-5, rtol=0)


@pytest.mark.parametrize("case", TINY + PAPER[1::3], ids=str)
def test_callers_tensors_are_unchanged(case: Case) -> None:
    inputs = case.inputs(torch.float32)
    copies = [None if tensor is None else tensor.clone() for tensor in inputs]
    qkv, keep, gradient = inputs
    qkv.requires_grad_()
    out = case.blockwise(qkv, keep)
    returned = out.detach().clone()
    out.backward(gradient)
    assert torch.equal(out, returned)
    for tensor, copy in zip(inputs, copies, strict=True):
        assert tensor is copy is None or torch.equal(tensor, copy)


@pytest.mark.parametrize("kind", SPARSE_KINDS)
def test_accepts_views(kind: str) -> None:
    """qkv as a strided view, and a gradient that is one number expanded."""
    case = Case(kind, text_len=6, grid=5, kernel=3, codes=25, batch=2, heads=2, depth=16, padded=True)
    qkv, keep, _ = case.inputs(torch.float32)
    strided = qkv.permute(0, 3, 1, 2, 4).contiguous().permute(0, 2, 3, 1, 4)
    gradient = torch.ones(()).expand(case.batch, qkv.shape[1], case.heads * case.depth)
    found = differentiate(case.blockwise, strided, keep, gradient)
    expected = differentiate(case.reference, qkv, keep, gradient)
    torch.testing.assert_close(found, expected, atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("case", TINY[::5], ids=str)
def test_the_operator_keeps_torchs_rules(case: Case) -> None:
    """Shapes without data, autograd registration and compilation, as torch itself checks them."""
    qkv, keep, _ = case.inputs(torch.float32)
    arguments = (qkv.requires_grad_(), keep, case.kind, case.text_len, case.grid, case.kernel)
    torch.library.opcheck(torch.ops.dalle_ds.blockwise_attention.default, arguments)


@pytest.mark.parametrize("kind", SPARSE_KINDS)
def test_nothing_of_the_size_of_all_scores_is_allocated(kind: str) -> None:
    """At a grid of 64, no allocation comes near one head's 4352² scores."""
    case = Case(kind, text_len=256, grid=64, kernel=11, codes=64**2, heads=4, depth=32)
    qkv, keep, gradient = case.inputs(torch.float32)
    differentiate(case.blockwise, qkv, keep, gradient)  # the pattern of blocks is cached
    with torch.profiler.profile(profile_memory=True) as profile:
        differentiate(case.blockwise, qkv, keep, gradient)
    largest = max(event.self_cpu_memory_usage for event in profile.events())
    assert qkv.nbytes <= largest < 0.5 * (256 + 64**2) ** 2 * qkv.itemsize


@pytest.mark.parametrize("scores", [1, 5000])
def test_scores_made_a_few_at_a_time_change_nothing(scores: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(blockwise, "SCORES", scores)
    for kind in ("row", "column", "conv"):
        case = Case(kind, text_len=5, grid=7, kernel=5, codes=40, batch=3, heads=2, depth=8, padded=True)
        qkv, keep, gradient = case.inputs(torch.float64)
        found = differentiate(case.blockwise, qkv, keep, gradient)
        for ours, expected in zip(found, differentiate(case.reference, qkv, keep, gradient), strict=True):
            torch.testing.assert_close(ours, expected, atol=1e-10, rtol=1e-10)


def test_a_strided_last_axis_is_taken() -> None:
    qkv = torch.randn(1, 30, 3, 8, 2).transpose(-1, -2)
    pattern = {"kind": "row", "text_len": 5, "grid": 5, "kernel": 3}
    found = blockwise.blockwise_attention(qkv, None, **pattern)
    assert torch.equal(found, blockwise.blockwise_attention(qkv.contiguous(), None, **pattern))
