"""Operations counted from shapes, against torch's own counter on the running model."""

from __future__ import annotations

import dataclasses

import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode

from dalle_ds.config import DalleConfig
from dalle_ds.models.dalle import Dalle
from dalle_ds.models.decoding import DecodingWeights, new_cache, prefill
from dalle_ds.models.flops import decoding_flops, executed_flops, executed_pairs, model_flops
from dalle_ds.nn.attention import attention_mask, blockwise, configured_kinds, decoding

CONFIG = DalleConfig(width=48, depth=4, heads=3, text_len=4, grid=12, text_vocab=50, image_vocab=30, kernel=3)


def counted(config: DalleConfig, checkpointing: str, padded: int = 0) -> int:
    """What torch counts in a forward and a backward pass of one sequence, padded by as many tokens."""
    torch.manual_seed(0)
    model = Dalle(config, checkpointing=checkpointing)
    text = torch.randint(0, 50, (1, config.text_len))
    text[:, config.text_len - padded :] = -1
    with FlopCounterMode(display=False) as counter:
        model(text, torch.randint(0, 30, (1, config.image_len)), logits=False).loss.backward()
    return counter.get_total_flops()


@pytest.mark.parametrize("checkpointing", ["none", "selective", "full"])
def test_executed_flops_are_what_torch_counts(checkpointing: str) -> None:
    assert executed_flops(CONFIG, checkpointing).total == counted(CONFIG, checkpointing)


def test_padding_takes_no_logits() -> None:
    assert executed_flops(CONFIG, text_tokens=1).total == counted(CONFIG, "none", padded=3)


@pytest.mark.parametrize("kind", ["row", "column", "conv"])
def test_attention_executes_the_products_that_it_reports(kind: str) -> None:
    """The products inside the operator's backward pass, which is made of matrix products that torch counts."""
    qkv = torch.randn(2, CONFIG.total_len, 3, 3, 16)
    arguments = (kind, CONFIG.text_len, CONFIG.grid, CONFIG.kernel)
    assert blockwise.is_worthwhile(*arguments, CONFIG.total_len, qkv.dtype)
    out, total = blockwise._forward._init_fn(qkv, None, *arguments)
    with FlopCounterMode(display=False) as counter:
        blockwise._backward._init_fn(torch.randn_like(out), qkv, None, out, total, *arguments)
    # Two of the five have a column more than the head size, which is not counted.
    assert counter.get_total_flops() == 2 * 2 * 3 * (5 * 16 + 2) * executed_pairs(kind, CONFIG)[1]


@torch.no_grad()
def test_decoding_flops_are_what_torch_counts(monkeypatch: pytest.MonkeyPatch) -> None:
    """With attention made of matrix products, which torch counts; in fused form it does not on CPUs."""
    monkeypatch.setattr(decoding, "_attend", decoding._attend_plainly)
    model = Dalle(CONFIG).eval()
    cache, weights = new_cache(model, [0] * 4), DecodingWeights(model, reused=False)
    prefill(model, torch.zeros(1, CONFIG.text_len, dtype=torch.int64), cache)
    for step in (0, 20, 142):
        with FlopCounterMode(display=False) as counter:
            weights.step_of_number(torch.zeros(4, dtype=torch.int64), step, cache)
        assert counter.get_total_flops() == 4 * decoding_flops(CONFIG, step + 1)


def test_kernels_of_a_gpu_are_counted_as_theirs() -> None:
    """Flex in blocks of 128, with nine products; what is too short for it, or full and padded, in a square."""
    long = dataclasses.replace(CONFIG, text_len=256, grid=32, kernel=11, attention=("row", "column", "conv", "full"))
    kinds = {kind: executed_pairs(kind, long, torch.bfloat16, "cuda") for kind in long.attention}
    # Ten blocks of queries: one and two of text, then two each; and of codes the own, and the one before, or two before.
    assert kinds["row"] == ("flex", (1 + 2 + 8 * 2 + 8 + 7) * 128**2)
    assert kinds["column"] == ("flex", (1 + 2 + 8 * 2 + 8) * 128**2)
    assert kinds["conv"] == ("flex", (1 + 2 + 8 * 2 + 8 + 7 + 6) * 128**2)
    assert kinds["full"] == ("causal", 1280 * 1281 // 2)
    assert executed_pairs("full", dataclasses.replace(long, mask_padding=True)) == ("masked", 1280**2)
    assert executed_pairs("row", CONFIG, device="cuda") == ("masked", CONFIG.total_len**2)
    attention = executed_flops(long, dtype=torch.bfloat16, device="cuda").attention
    pairs = {kernel: sum(n for name, n in kinds.values() if name == kernel) for kernel in ("flex", "causal")}
    assert attention == 2 * CONFIG.width * (9 * pairs["flex"] + 7 * pairs["causal"])


def test_needed_flops_are_those_of_the_allowed_pairs() -> None:
    flops = model_flops(CONFIG)
    pairs = sum(int(attention_mask(kind, 4, 12, 3).sum()) for kind in configured_kinds(CONFIG))
    assert flops.attention == 3 * 2 * 2 * CONFIG.width * pairs
    matrices = [p for name, p in Dalle(CONFIG).named_parameters() if name.startswith("blocks") and p.dim() == 2]
    assert flops.projections == 6 * CONFIG.total_len * sum(p.numel() for p in matrices)
    assert flops.heads == 6 * CONFIG.width * (4 * 50 + 144 * 30)
    assert flops.total < executed_flops(CONFIG).total


@pytest.mark.parametrize("grid", [32, 64])
def test_work_grows_with_the_allowed_pairs(grid: int) -> None:
    """Blocks hold at most twice the row and column pairs that are allowed, and little more than four times the conv pairs."""
    config = dataclasses.replace(CONFIG, text_len=256, grid=grid, kernel=11)
    for kind, most in (("row", 2.0), ("column", 2.1), ("conv", 4.3)):
        allowed = int(attention_mask(kind, 1, grid)[1:, 1:].sum())
        in_blocks = executed_pairs(kind, config)[1] - config.total_len * config.text_len
        assert in_blocks <= most * allowed
