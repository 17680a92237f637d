"""FlexAttention's masks, blocks and layouts against the dense mask, and what happens where it cannot be used.

There is no GPU here: its kernels are replaced by torch's own unfused mathematics, behind the same graph and mask.
"""

from __future__ import annotations

import random
import warnings
from collections.abc import Iterator
from functools import partial

import pytest
import torch
import torch.nn.attention.flex_attention as torch_flex
from torch import Tensor
from torch._dynamo.testing import CompileCounterWithBackend
from torch.utils.checkpoint import (
    CheckpointPolicy,
    checkpoint,
    create_selective_checkpoint_contexts,
    noop_context_fn,
)
from torch.utils.flop_counter import FlopCounterMode

from dalle_ds.nn.attention import AttentionPattern, attention_mask, flex, pattern
from dalle_ds.nn.attention.flex import BLOCK, Layout, Refused, block_mask
from dalle_ds.nn.attention.pattern import dense_attention

SPARSE_KINDS = ("row", "column", "conv")


def random_layout(kind: str, seed: int) -> Layout:
    rng = random.Random(f"{kind} {seed}")
    grid = rng.randint(1, 20)
    return Layout(kind, rng.choice((1, rng.randint(1, 40), 128, 130)), grid, rng.choice((1, 3, 5, 11, 2 * grid + 3)))


LAYOUTS = [random_layout(kind, seed) for kind in SPARSE_KINDS for seed in range(30)]
PAPER = [Layout(kind, 256, 32, 11) for kind in SPARSE_KINDS]


def positions(layout: Layout) -> Tensor:
    """Which position of the sequence each arranged one holds."""
    length = layout.text_len + layout.grid**2
    return layout.arrange(torch.arange(1, length + 1)[None])[0] - 1  # −1 where padded


def torchs_blocks(layout: Layout) -> tuple[Tensor, Tensor]:
    """(partial, full) blocks as torch finds them."""
    mask = torch_flex.create_block_mask(layout.mask_mod(), None, None, layout.length, layout.length, "cpu", BLOCK)
    return dense_blocks(mask)


def dense_blocks(mask: torch_flex.BlockMask) -> tuple[Tensor, Tensor]:
    """(partial, full), each (query blocks, key blocks) bool."""
    found = []
    for counts, indices in ((mask.kv_num_blocks, mask.kv_indices), (mask.full_kv_num_blocks, mask.full_kv_indices)):
        blocks = torch.zeros(indices.shape[-2:], dtype=torch.bool)
        for row, (count, columns) in enumerate(zip(counts[0, 0], indices[0, 0], strict=True)):
            blocks[row, columns[:count].long()] = True
        found.append(blocks)
    return found[0], found[1]


@pytest.mark.parametrize("layout", LAYOUTS + PAPER, ids=str)
def test_mask_is_the_dense_mask_in_another_order(layout: Layout) -> None:
    at = positions(layout)
    real = at >= 0
    found = torch_flex.create_mask(layout.mask_mod(), None, None, layout.length, layout.length, "cpu")[0, 0]
    expected = attention_mask(layout.kind, layout.text_len, layout.grid, layout.kernel)
    assert torch.equal(found[real][:, real], expected[at[real]][:, at[real]])
    assert not found[real][:, ~real].any()
    assert found.any(dim=1).all()  # no softmax is empty


@pytest.mark.parametrize("layout", LAYOUTS, ids=str)
def test_arranging_is_undone(layout: Layout) -> None:
    whole = layout.text_len + layout.grid**2
    for length in {layout.text_len, (layout.text_len + whole) // 2, whole}:
        sequence = torch.randn(2, length, 3)
        arranged = layout.arrange(sequence)
        assert arranged.shape == (2, layout.length, 3)
        assert torch.equal(layout.restore(arranged, length), sequence)


@pytest.mark.parametrize("layout", LAYOUTS[::3] + PAPER, ids=str)
def test_blocks_are_those_that_torch_finds(layout: Layout) -> None:
    partial, full = torchs_blocks(layout)
    found = dense_blocks(block_mask(layout, False, torch.device("cpu")))
    assert torch.equal(found[0], partial)
    assert torch.equal(found[1], full)
    # With padding the same blocks are visited; none that has a text key goes without the mask.
    padded_partial, padded_full = dense_blocks(block_mask(layout, True, torch.device("cpu")))
    text_blocks = -(-layout.text_len // BLOCK)
    assert torch.equal(padded_partial | padded_full, partial | full)
    assert not padded_full[:, :text_blocks].any()
    assert torch.equal(padded_full[:, text_blocks:], full[:, text_blocks:])


@pytest.mark.parametrize("layout", PAPER, ids=str)
def test_text_keys_of_the_papers_codes_need_no_mask(layout: Layout) -> None:
    partial, full = dense_blocks(block_mask(layout, False, torch.device("cpu")))
    assert full[2:, :2].all()
    # A band of rows, or of columns of 32, stays beside the diagonal.
    widest = {"row": 2, "column": 1, "conv": 3}[layout.kind]
    assert (partial | full)[2:, 2:].sum(dim=1).max() == widest


@pytest.fixture
def on_cpu(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """FlexAttention traced as for a GPU, and computed without kernels."""
    monkeypatch.setattr(
        torch_flex, "_validate_device", lambda *tensors: None
    )  # it has no kernel for the CPU's gradients
    monkeypatch.setitem(pattern.KERNELS, "cpu", "flex")
    monkeypatch.setattr(pattern, "SHORTEST_FLEX", 1)
    compiled = torch.compile(flex._compute, dynamic=False, fullgraph=True, backend="aot_eager")
    monkeypatch.setattr(flex, "_compiled", lambda: compiled)
    caches = (flex._refusal, pattern._warn_once)
    for cache in caches:
        cache.cache_clear()
    yield
    for cache in caches:
        cache.cache_clear()
    torch._dynamo.reset()


def attend(layout: Layout, qkv: Tensor, keep: Tensor | None) -> Tensor:
    return AttentionPattern(layout.kind, layout.text_len, layout.grid, layout.kernel)(qkv, keep)


def expected(layout: Layout, qkv: Tensor, keep: Tensor | None) -> Tensor:
    length = qkv.shape[1]
    mask = attention_mask(layout.kind, layout.text_len, layout.grid, layout.kernel)[:length, :length]
    mask = mask.repeat(len(qkv), 1, 1, 1)
    if keep is not None:
        mask[..., : layout.text_len] &= keep[:, None, None]
    return dense_attention(qkv, mask)


def some_inputs(layout: Layout, codes: int, padded: bool, dtype: torch.dtype = torch.float32, depth: int = 16):
    generator = torch.Generator().manual_seed(0)
    qkv = torch.randn(2, layout.text_len + codes, 3, 2, depth, generator=generator).to(dtype)
    keep = None
    if padded:
        keep = torch.rand(2, layout.text_len, generator=generator) < 0.5
        keep[:, 0] = True
    return qkv, keep


@pytest.mark.parametrize(
    ("layout", "codes", "padded"),
    [
        (Layout("row", 20, 12, 11), 144, False),
        (Layout("column", 130, 12, 11), 144, True),
        (Layout("column", 20, 7, 11), 31, False),
        (Layout("conv", 128, 16, 5), 256, True),
    ],
    ids=str,
)
def test_flex_is_dense_attention(on_cpu: None, layout: Layout, codes: int, padded: bool) -> None:
    """Forward and backward, with whole images and parts of them, with and without padding masked."""
    qkv, keep = some_inputs(layout, codes, padded)
    found, reference = qkv.clone().requires_grad_(), qkv.clone().requires_grad_()
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        out = attend(layout, found, keep)
    dense = expected(layout, reference, keep)
    torch.testing.assert_close(out, dense, atol=1e-5, rtol=1e-5)
    gradient = torch.randn(out.shape, generator=torch.Generator().manual_seed(1))
    out.backward(gradient)
    dense.backward(gradient)
    torch.testing.assert_close(found.grad, reference.grad, atol=1e-4, rtol=1e-4)


def test_another_padding_compiles_nothing_anew(on_cpu: None, monkeypatch: pytest.MonkeyPatch) -> None:
    counter = CompileCounterWithBackend("aot_eager")
    compiled = torch.compile(flex._compute, dynamic=False, fullgraph=True, backend=counter)
    monkeypatch.setattr(flex, "_compiled", lambda: compiled)
    layout = Layout("row", 20, 12, 11)
    qkv, keep = some_inputs(layout, 144, padded=True)
    for other in (keep, keep.roll(1, dims=0), torch.ones_like(keep)):
        torch.testing.assert_close(attend(layout, qkv, other), expected(layout, qkv, other), atol=1e-5, rtol=1e-5)
    assert counter.frame_count == 1


def recompute_everything(*arguments, **named) -> CheckpointPolicy:
    return CheckpointPolicy.PREFER_RECOMPUTE


@pytest.mark.parametrize(
    "contexts", [noop_context_fn, partial(create_selective_checkpoint_contexts, recompute_everything)]
)
def test_checkpointing_changes_nothing(on_cpu: None, contexts) -> None:
    """The trial of a shape happens inside the checkpointed region and leaves no trace there."""
    layout = Layout("column", 20, 12, 11)
    qkv, _ = some_inputs(layout, 144, padded=False)
    found, reference = qkv.clone().requires_grad_(), qkv.clone().requires_grad_()
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        out = checkpoint(lambda x: attend(layout, x * 1.0, None), found, use_reentrant=False, context_fn=contexts)
        out.square().sum().backward()
    expected(layout, reference, None).square().sum().backward()
    torch.testing.assert_close(found.grad, reference.grad, atol=1e-4, rtol=1e-4)


def test_a_trial_leaves_random_numbers_alone(on_cpu: None) -> None:
    layout = Layout("row", 20, 12, 11)
    inputs = some_inputs(layout, 144, padded=True)
    before = torch.get_rng_state()
    attend(layout, *inputs)
    assert torch.equal(torch.get_rng_state(), before)


def fails(*arguments) -> Tensor:
    raise RuntimeError("Cannot find a working triton installation\nand much more")


def is_wrong(qkv: Tensor, mask: torch_flex.BlockMask, layout: Layout) -> Tensor:
    return dense_attention(qkv)  # all codes, not the kind's


def is_wrong_later(qkv: Tensor, mask: torch_flex.BlockMask, layout: Layout) -> Tensor:
    """The first sequence's padding is taken for that of all."""
    dense = attention_mask(layout.kind, layout.text_len, layout.grid, layout.kernel)
    everywhere = torch.arange(len(dense))
    allowed = mask.mask_mod(torch.tensor(0), torch.tensor(0), everywhere[:, None], everywhere[None, :])
    return dense_attention(qkv, dense & allowed)


class FailsInBackward(torch.autograd.Function):
    @staticmethod
    def forward(ctx, qkv: Tensor) -> Tensor:
        return qkv[:, :, 0].flatten(2)

    @staticmethod
    def backward(ctx, gradient: Tensor) -> Tensor:
        raise RuntimeError("out of resource: shared memory")


@pytest.mark.parametrize(
    ("kernel", "dtype", "depth", "reason"),
    [
        (fails, torch.float32, 16, "Cannot find a working triton installation$"),
        (is_wrong, torch.float32, 16, "off by"),
        (is_wrong_later, torch.float32, 16, "off by"),
        (lambda qkv, mask, layout: FailsInBackward.apply(qkv), torch.float32, 16, "shared memory"),
        (flex._compute, torch.float32, 16, "torch.compile is off"),
        (None, torch.float64, 16, "float64"),
        (None, torch.float32, 8, "found 8"),
    ],
)
def test_where_flex_cannot_the_result_is_exact_and_one_warning_says_why(
    on_cpu: None, monkeypatch: pytest.MonkeyPatch, kernel, dtype: torch.dtype, depth: int, reason: str
) -> None:
    if kernel is not None:
        monkeypatch.setattr(flex, "_compiled", lambda: kernel)
    layout = Layout("conv", 20, 12, 3)
    qkv, keep = some_inputs(layout, 144, padded=True, dtype=dtype, depth=depth)
    reference = qkv.clone().requires_grad_()
    expected(layout, reference, keep).square().sum().backward()
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        for _ in range(3):
            found = qkv.clone().requires_grad_()
            attend(layout, found, keep).square().sum().backward()
            torch.testing.assert_close(found.grad, reference.grad)
    with pytest.raises(RuntimeWarning, match=reason):
        (warning,) = caught
        raise RuntimeWarning(str(warning.message))


def test_running_out_of_memory_is_no_reason_for_more_of_it(on_cpu: None, monkeypatch: pytest.MonkeyPatch) -> None:
    def out_of_memory(*arguments) -> Tensor:
        raise torch.OutOfMemoryError("CUDA out of memory")

    monkeypatch.setattr(flex, "_compiled", lambda: out_of_memory)
    layout = Layout("row", 20, 12, 11)
    with pytest.raises(torch.OutOfMemoryError):
        attend(layout, *some_inputs(layout, 144, padded=False))


def test_too_many_shapes_are_refused(on_cpu: None, monkeypatch: pytest.MonkeyPatch) -> None:
    """Torch would otherwise go on without kernels, and without a word."""
    monkeypatch.setattr(flex, "SHAPES", 1)
    layout = Layout("row", 20, 12, 11)
    qkv, _ = some_inputs(layout, 144, padded=False)
    attend(layout, qkv, None)
    with pytest.warns(UserWarning, match="recompile limit"):
        out = attend(layout, qkv[:1], None)
    torch.testing.assert_close(out, expected(layout, qkv[:1], None))


def test_where_compilers_step_aside_flex_does_not_go_on_without(on_cpu: None) -> None:
    """Torch runs what was compiled as plain Python there, which would compute and keep all scores."""
    layout = Layout("column", 20, 12, 11)
    qkv, keep = some_inputs(layout, 144, padded=True)
    with FlopCounterMode(display=False), pytest.warns(UserWarning, match="steps aside"):
        out = attend(layout, qkv, keep)
    torch.testing.assert_close(out, expected(layout, qkv, keep))


def test_refusal_is_flexs_own(on_cpu: None) -> None:
    layout = Layout("row", 20, 12, 11)
    qkv, keep = some_inputs(layout, 144, padded=False, dtype=torch.float64)
    with pytest.raises(Refused, match="float64"):
        flex.flex_attention(qkv, keep, kind="row", text_len=20, grid=12, kernel=11)
