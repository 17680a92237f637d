"""Cross-entropy straight from hidden states, so that the logits of a whole batch never exist at once."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.autograd.function import once_differentiable

from dalle_ds.config import PADDING

CHUNK = 2**22
"""Logits that exist at a time: 16 MiB of them in fp32."""
VOCABULARY = 2**11
"""Tokens of the vocabulary whose weights are converted at a time."""


def linear_cross_entropy(hidden: Tensor, weight: Tensor, bias: Tensor, targets: Tensor) -> Tensor:
    """Sum of cross-entropies of `targets` under the logits hidden · weightᵀ + bias.

    The logits are fp32, whatever the weights. Where the weights are 16-bit, so are the factors of the products, which are
    added up in fp32. Gradients are made in the forward pass, while the logits are at hand: nothing is computed twice.

    Args:
        hidden: (n, width) fp32.
        weight: (vocabulary, width); bias: (vocabulary,).
        targets: (n,) int64; `PADDING` is left out.

    Returns:
        () fp32, in nats.
    """
    return _LinearCrossEntropy.apply(hidden, weight, bias, targets)


class _LinearCrossEntropy(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, hidden: Tensor, weight: Tensor, bias: Tensor, targets: Tensor) -> Tensor:
        counted = targets != PADDING
        used = None
        if hidden.device.type == "cpu":
            # Padding takes no arithmetic. A GPU would have to wait here to learn how many rows are left.
            used = counted.nonzero()[:, 0]
            hidden_used, targets, counted = hidden[used], targets[used], counted[used]
        else:
            hidden_used = hidden
        factors = hidden_used.to(weight.dtype)
        wants_gradients = any(ctx.needs_input_grad)
        d_hidden = torch.empty_like(factors)
        d_weight, d_bias = (torch.zeros_like(part, dtype=torch.float32) for part in (weight, bias))
        total = d_bias.new_zeros(())
        rows = max(1, CHUNK // len(weight))
        for start in range(0, len(factors), rows):
            some = slice(start, start + rows)
            at = targets[some].clamp(min=0)[:, None]
            logs = _logits(hidden_used[some], weight, bias).log_softmax(dim=-1)
            of_target = logs.gather(1, at)
            total -= of_target[:, 0].masked_fill(~counted[some], 0.0).sum()
            if not wants_gradients:
                continue
            d_logits = logs.exp_().scatter_(1, at, of_target.expm1())
            if used is None:
                d_logits.masked_fill_(~counted[some, None], 0.0)
            d_bias += d_logits.sum(0)
            d_logits = d_logits.to(weight.dtype)
            torch.mm(d_logits, weight, out=d_hidden[some])
            d_weight += d_logits.t() @ factors[some]
        ctx.save_for_backward(d_hidden, d_weight.to(weight.dtype), d_bias.to(bias.dtype), used)
        ctx.shape, ctx.dtype = hidden.shape, hidden.dtype
        return total

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor | None, ...]:
        d_used, d_weight, d_bias, used = ctx.saved_tensors
        d_hidden = d_used.to(ctx.dtype, copy=True).mul_(gradient)
        if used is not None:
            d_hidden = d_hidden.new_zeros(ctx.shape).index_copy_(0, used, d_hidden)
        return d_hidden, d_weight * gradient, d_bias * gradient, None


def _logits(hidden: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
    """(rows, vocabulary) fp32."""
    if weight.dtype == torch.float32:
        return F.linear(hidden, weight, bias)
    if hidden.device.type == "cuda" and "dtype" in torch.ops.aten.mm.overloads():
        return torch.mm(hidden.to(weight.dtype), weight.t(), out_dtype=torch.float32).add_(bias)
    logits = hidden.new_empty(len(hidden), len(weight))
    # Piece by piece, so that no fp32 copy of the whole weight exists.
    with _products_in(weight.dtype):
        for first in range(0, len(weight), VOCABULARY):
            piece = slice(first, first + VOCABULARY)
            torch.mm(hidden, weight[piece].float().t(), out=logits[:, piece])
    return logits.add_(bias)


@contextlib.contextmanager
def _products_in(dtype: torch.dtype) -> Iterator[None]:
    """fp32 matrix products from factors rounded to `dtype`, on CPUs that can."""
    matmul = getattr(torch.backends.mkldnn, "matmul", None)
    if dtype != torch.bfloat16 or matmul is None:
        yield
        return
    kept = matmul.fp32_precision
    matmul.fp32_precision = "bf16"
    try:
        yield
    finally:
        matmul.fp32_precision = kept
