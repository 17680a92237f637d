"""Dropout that belongs to samples: what it drops, what it depends on, and what it does not."""

from __future__ import annotations

import dataclasses
from itertools import pairwise

import pytest
import torch

from dalle_ds.errors import ConfigError
from dalle_ds.models import Dalle
from dalle_ds.nn.layers import dropout
from dalle_ds.parallel import WHOLE, TensorGroup
from tests.conftest import TINY_DALLE

KEYS = torch.tensor([3, 2**62 + 5, 7])


def test_it_drops_the_share_that_was_asked_for_and_keeps_the_mean() -> None:
    x = torch.ones(3, 200, 300)
    out = dropout(x, KEYS, 4, 0.3, WHOLE)
    assert out.unique().tolist() == pytest.approx([0.0, 1 / 0.7])
    assert (out == 0).float().mean().item() == pytest.approx(0.3, abs=0.005)
    assert out.mean().item() == pytest.approx(1.0, abs=0.01)
    assert torch.equal(x, torch.ones_like(x))


def test_it_depends_on_the_key_and_the_block_alone() -> None:
    x = torch.randn(3, 20, 30)
    out = dropout(x, KEYS, 4, 0.5, WHOLE)
    torch.manual_seed(99)
    assert torch.equal(dropout(x.flip(0), KEYS.flip(0), 4, 0.5, WHOLE), out.flip(0))
    assert torch.equal(dropout(x[1:2], KEYS[1:2], 4, 0.5, WHOLE), out[1:2])
    patterns = [out[0] == 0, out[1] == 0, dropout(x, KEYS, 5, 0.5, WHOLE)[0] == 0]
    assert all(0.4 < float((a ^ b).float().mean()) < 0.6 for a, b in pairwise(patterns))


def test_processes_that_divide_positions_drop_what_one_would() -> None:
    x = torch.randn(3, 20, 30)
    parts = [
        dropout(piece, KEYS, 4, 0.5, TensorGroup(rank, 4, sequence=True)) for rank, piece in enumerate(x.chunk(4, 1))
    ]
    assert torch.equal(torch.cat(parts, 1), dropout(x, KEYS, 4, 0.5, WHOLE))
    assert torch.equal(dropout(x, KEYS, 4, 0.5, TensorGroup(1, 4)), dropout(x, KEYS, 4, 0.5, WHOLE))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_its_gradient_is_dropped_alike(dtype: torch.dtype) -> None:
    x = torch.randn(3, 20, 30, dtype=dtype, requires_grad=True)
    out = dropout(x, KEYS, 4, 0.5, WHOLE)
    out.backward(torch.ones_like(out))
    assert x.grad is not None and out.dtype == dtype
    torch.testing.assert_close(x.grad * x.detach(), out.detach())


def test_the_model_drops_in_training_only_and_only_where_there_are_keys() -> None:
    torch.manual_seed(0)
    model = Dalle(dataclasses.replace(TINY_DALLE, dropout=0.4))
    text = torch.randint(0, TINY_DALLE.text_vocab, (3, TINY_DALLE.text_len))
    codes = torch.randint(0, TINY_DALLE.image_vocab, (3, TINY_DALLE.image_len))
    plain = model(text, codes).loss
    assert not torch.equal(model(text, codes, dropout_seeds=KEYS).loss, plain)
    assert torch.equal(model.eval()(text, codes, dropout_seeds=KEYS).loss, plain)


def test_a_share_beyond_one_is_refused() -> None:
    with pytest.raises(ConfigError, match=r"model\.dropout must lie in \[0, 1\)"):
        dataclasses.replace(TINY_DALLE, dropout=1.0)
