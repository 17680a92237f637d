"""Cross-entropy straight from hidden states, so that the logits of a whole batch never exist at once."""

from __future__ import annotations

import contextlib
import threading
from collections.abc import Iterator
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from dalle_ds.config import PADDING
from dalle_ds.meta_device import device_type
from dalle_ds.parallel import WHOLE, TensorGroup

CHUNK = 2**22
"""Logits that exist at a time: 16 MiB of them in fp32."""
CHUNK_ON_GPU = 2**25
"""The same there, where small products would wait for the memory that their sum lies in."""
COMPACTED = ("cpu",)
"""Types of device on which rows without a target are left out; on others they are computed and masked."""
VOCABULARY = 2**11
"""Tokens of the vocabulary whose weights are converted at a time."""


def linear_cross_entropy(
    hidden: Tensor, weight: Tensor, bias: Tensor, targets: Tensor, tensor: TensorGroup = WHOLE
) -> Tensor:
    """Sum of cross-entropies of `targets` under the logits hidden · weightᵀ + bias.

    The logits are fp32, whatever the weights. Where the weights are 16-bit, so are the factors of the products, which are
    added up in fp32. Gradients are made in the forward pass, while the logits are at hand: nothing is computed twice.

    Args:
        hidden: (n, width) fp32.
        weight: (vocabulary, width); bias: (vocabulary,).
        targets: (n,) int64; `PADDING` is left out.
        tensor: the group that divides the vocabulary. Each process gives its rows of the weight and gets the whole sum; the
            gradient of `hidden` is then its share of one (`TensorGroup.copy_to_tensor_region` adds them up).

    Returns:
        () fp32, in nats; it can be differentiated once.
    """
    return _LinearCrossEntropy.apply(hidden, weight, bias, targets, tensor, torch.is_grad_enabled())


class _LinearCrossEntropy(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        hidden: Tensor,
        weight: Tensor,
        bias: Tensor,
        targets: Tensor,
        tensor: TensorGroup,
        differentiated: bool,
    ) -> Tensor:
        counted = targets != PADDING
        used = None
        device = device_type(hidden)
        if device in COMPACTED:
            # Padding takes no arithmetic. A GPU would have to wait here to learn how many rows are left.
            used = torch.arange(len(targets), device="meta") if hidden.is_meta else counted.nonzero()[:, 0]
            hidden_used, targets, counted = hidden[used], targets[used], counted[used]
        else:
            hidden_used = hidden
        factors = hidden_used.to(weight.dtype)
        of_hidden, of_weight, of_bias = (differentiated and needed for needed in ctx.needs_input_grad[:3])
        d_hidden = torch.empty_like(factors) if of_hidden else None
        d_weight = torch.zeros_like(weight, dtype=torch.float32) if of_weight else None
        d_bias = torch.zeros_like(bias, dtype=torch.float32) if of_bias else None
        total = torch.zeros((), dtype=torch.float32, device=hidden.device)
        rows = max(1, (CHUNK if device == "cpu" else CHUNK_ON_GPU) // len(weight))
        for start in range(0, len(factors), rows):
            some = slice(start, start + rows)
            at = targets[some].clamp(min=0)[:, None]
            logits = _logits(hidden_used[some], weight, bias)
            if tensor.size == 1:
                logs = logits.log_softmax(dim=-1)
                of_target = logs.gather(1, at)
            else:
                logs, of_target, at, elsewhere = _shared_log_softmax(logits, at, tensor)
            total -= of_target[:, 0].masked_fill(~counted[some], 0.0).sum()
            if not (of_hidden or of_weight or of_bias):
                continue
            d_logits = logs.exp_()
            d_target = of_target.expm1()
            if tensor.size > 1:
                d_target = torch.where(elsewhere, d_logits.gather(1, at), d_target)
            d_logits.scatter_(1, at, d_target)
            if used is None:
                d_logits.masked_fill_(~counted[some, None], 0.0)
            if d_bias is not None:
                d_bias += d_logits.sum(0)
            d_logits = d_logits.to(weight.dtype)
            if d_hidden is not None:
                torch.mm(d_logits, weight, out=d_hidden[some])
            if d_weight is not None:
                d_weight += d_logits.t() @ factors[some]
        ctx.save_for_backward(d_hidden, d_weight, d_bias, used)
        ctx.shape, ctx.dtype, ctx.weight_dtype = hidden.shape, hidden.dtype, weight.dtype
        return total

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor | None, ...]:
        if torch.is_grad_enabled():
            raise RuntimeError("linear_cross_entropy has no second derivative: leave out create_graph")
        d_used, d_weight, d_bias, used = ctx.saved_tensors
        d_hidden = None
        if d_used is not None:
            d_hidden = d_used.to(ctx.dtype, copy=True).mul_(gradient)
            if used is not None:
                d_hidden = d_hidden.new_zeros(ctx.shape).index_copy_(0, used, d_hidden)
        # Sums over the batch become 16-bit only once the caller's 1 / count has made them small enough.
        d_weight, d_bias = (
            None if part is None else torch.mul(part, gradient, out=torch.empty_like(part, dtype=ctx.weight_dtype))
            for part in (d_weight, d_bias)
        )
        return d_hidden, d_weight, d_bias, None, None, None


def _shared_log_softmax(logits: Tensor, targets: Tensor, tensor: TensorGroup) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Logarithms of probabilities over a divided vocabulary.

    Args:
        logits: (n, tokens of this process) fp32, which is used up.
        targets: (n, 1) int64, tokens of the whole vocabulary.

    Returns:
        (n, tokens of this process) logarithms; (n, 1) those of the targets, from whichever process has them; (n, 1) where a
        target lies on this process, and (n, 1) bool whether it lies on another.
    """
    logits.sub_(tensor.max_(logits.amax(dim=-1, keepdim=True)))
    local = targets - tensor.rank * logits.shape[1]
    elsewhere = (local < 0) | (local >= logits.shape[1])
    local = local.masked_fill(elsewhere, 0)
    of_target = logits.gather(1, local).masked_fill(elsewhere, 0.0)
    both = tensor.sum_(torch.cat([logits.exp().sum(dim=-1, keepdim=True), of_target], dim=1))
    log_sum = both[:, :1].log()
    return logits.sub_(log_sum), both[:, 1:] - log_sum, local, elsewhere


def _logits(hidden: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
    """(rows, vocabulary) fp32."""
    if weight.dtype == torch.float32:
        return F.linear(hidden, weight, bias)
    if device_type(hidden) == "cuda" and "dtype" in torch.ops.aten.mm.overloads():
        return torch.mm(hidden.to(weight.dtype), weight.t(), out_dtype=torch.float32).add_(bias)
    logits = hidden.new_empty(len(hidden), len(weight))
    # Piece by piece, so that no fp32 copy of the whole weight exists.
    with _products_in(weight.dtype):
        for first in range(0, len(weight), VOCABULARY):
            piece = slice(first, first + VOCABULARY)
            torch.mm(hidden, weight[piece].float().t(), out=logits[:, piece])
    return logits.add_(bias)


_SETTING = threading.Lock()


@contextlib.contextmanager
def _products_in(dtype: torch.dtype) -> Iterator[None]:
    """fp32 matrix products from factors rounded to `dtype`, on CPUs that can.

    The setting is the whole process's. Losses made in several threads take turns; what else a thread multiplies in fp32 in
    that moment is rounded too.
    """
    matmul = getattr(torch.backends.mkldnn, "matmul", None)
    if dtype != torch.bfloat16 or matmul is None:
        yield
        return
    with _SETTING:
        kept = matmul.fp32_precision
        matmul.fp32_precision = "bf16"
        try:
            yield
        finally:
            matmul.fp32_precision = kept
