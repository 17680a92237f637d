"""Operations counted from shapes, against torch's own counter on the running model."""

from __future__ import annotations

import dataclasses

import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode

from dalle_ds.config import DalleConfig
from dalle_ds.models.attention import attention_mask, blockwise, configured_kinds
from dalle_ds.models.dalle import Dalle
from dalle_ds.models.flops import executed_flops, executed_pairs, model_flops

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
    assert counter.get_total_flops() == 2 * 2 * 3 * (5 * 16 + 2) * executed_pairs(kind, CONFIG)


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
        in_blocks = executed_pairs(kind, config) - config.total_len * config.text_len
        assert in_blocks <= most * allowed
