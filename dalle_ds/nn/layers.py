"""Leaf layers of the transformer, each of which draws its own initial weights in its constructor.

That place is not a matter of taste: under ZeRO-3 a parameter is split over the processes as soon as the constructor of
its module returns, so nothing can initialize a finished model. All draws come from torch's global generator, which the
trainer seeds.

Layers that a `TensorGroup` divides draw the whole of their weights and keep this process's piece: a model starts from the
same weights whatever the group's size.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.autograd.function import once_differentiable
from torch.utils.checkpoint import checkpoint

from dalle_ds.nn.cross_entropy import linear_cross_entropy
from dalle_ds.parallel import WHOLE, Split, TensorGroup
from dalle_ds.precision import BranchPrecision, branch_bias, branch_linear


class Linear(nn.Linear):
    """A linear layer with weights from a normal distribution of standard deviation scale / sqrt(3 · inputs), biases 0.

    At GPT-2's width of 768 that is GPT-2's 0.02; at others it keeps the size of the outputs.
    """

    precision: BranchPrecision | None = None
    """How to compute inside a residual block with a gradient scale; None computes in the dtype of the weights."""

    def __init__(self, inputs: int, outputs: int, *, scale: float = 1.0) -> None:
        super().__init__(inputs, outputs)
        nn.init.normal_(self.weight, std=scale * (3 * inputs) ** -0.5)
        nn.init.zeros_(self.bias)

    @property
    def matrix(self) -> Tensor:
        """The weight as (outputs, inputs)."""
        return self.weight

    def forward(self, input: Tensor) -> Tensor:
        """(…, inputs) → (…, outputs)."""
        if self.precision is not None:
            return branch_linear(input, self.weight, self.bias, self.precision)
        return F.linear(input, self.weight, self.bias)


class ColumnParallelLinear(Linear):
    """A linear layer whose outputs are divided among a tensor group.

    Args:
        fused: matrices of equal size that the weight consists of, one above the other: 3 for queries, keys and values. Each is
            divided by itself.
    """

    def __init__(self, inputs: int, outputs: int, tensor: TensorGroup = WHOLE, *, fused: int = 1) -> None:
        super().__init__(inputs, outputs)
        self.weight = tensor.divide(self.weight, Split(0, fused))
        self.bias = tensor.divide(self.bias, Split(0, fused))
        self.weight.fused = fused  # type: ignore[attr-defined]
        self.out_features = outputs // tensor.size


class RowParallelLinear(Linear):
    """A linear layer whose inputs are divided among a tensor group; its outputs are added up (`reduce_from_tensor_region`).

    Args:
        scale: of the initial weights.
        input_major: the weight is stored as (inputs, outputs). ZeRO-3, and with it PowerSGD, cuts a weight along its first
            axis, for which the paper takes the inputs in the second layer of an MLP (DALL·E Table 2).
    """

    def __init__(
        self, inputs: int, outputs: int, tensor: TensorGroup = WHOLE, *, scale: float = 1.0, input_major: bool = False
    ) -> None:
        super().__init__(inputs, outputs, scale=scale)
        self.tensor = tensor
        self.input_major = input_major
        if input_major:
            self.weight = nn.Parameter(self.weight.detach().t().contiguous())
        self.weight = tensor.divide(self.weight, Split(0 if input_major else 1))
        self.in_features = inputs // tensor.size

    @property
    def matrix(self) -> Tensor:
        """The weight as (outputs, inputs)."""
        return self.weight.t() if self.input_major else self.weight

    def forward(self, input: Tensor) -> Tensor:
        """(B, n, inputs of this process) → (B, n, outputs), or this process's positions of it."""
        if self.tensor.size == 1:
            return self._multiply(input, self.bias)
        share = self.tensor.reduce_from_tensor_region(self._multiply(input, None))
        # Once, not on every process before the sum.
        bias = self.tensor.shared(self.bias)
        return share + bias if self.precision is None else branch_bias(share, bias, self.precision)

    def _multiply(self, input: Tensor, bias: Tensor | None) -> Tensor:
        if self.precision is not None:
            return branch_linear(input, self.weight, bias, self.precision, input_major=self.input_major)
        if not self.input_major:
            return F.linear(input, self.weight, bias)
        # The weight itself, not a view of it, is what autograd keeps: ZeRO-3 can take it away meanwhile.
        rows = input.flatten(0, -2)
        product = torch.mm(rows, self.weight) if bias is None else torch.addmm(bias, rows, self.weight)
        return product.view(*input.shape[:-1], product.shape[-1])


class Unembedding(Linear):
    """Logits of a vocabulary, fp32 whatever the dtype of the weights (DALL·E App. D, guideline 2).

    The vocabulary is divided among a tensor group, all of whose processes have the hidden states and get all logits.

    Args:
        reach: as `make_neighbours_alike` takes it.
    """

    def __init__(self, inputs: int, outputs: int, tensor: TensorGroup = WHOLE, *, reach: float = 0.0) -> None:
        super().__init__(inputs, outputs)
        make_neighbours_alike(self.weight, reach)
        self.tensor = tensor
        self.weight = tensor.divide(self.weight, Split(0))
        self.bias = tensor.divide(self.bias, Split(0))

    def forward(self, input: Tensor, targets: Tensor | None = None) -> Tensor:
        """(…, inputs) → (…, outputs), multiplied out in fp32; given targets (…), their `linear_cross_entropy` instead."""
        with _without_autocast(input.device.type):  # would make logits 16-bit
            if targets is not None:
                return linear_cross_entropy(
                    input.flatten(0, -2), self.weight, self.bias, targets.flatten(), self.tensor
                )
            return self.tensor.gather(F.linear(input.float(), self.weight.float(), self.bias.float()))


def recomputed(function: Callable[..., Tensor], *inputs: Any) -> Tensor:
    """function(*inputs), of which only the inputs are kept for the backward pass.

    That repeats the function up to the last value that it needs: where a function ends with a matrix product, that product
    is not repeated.
    """
    # What is dropped depends on no random state that would have to be restored.
    return checkpoint(function, *inputs, use_reentrant=False, preserve_rng_state=False)


def _without_autocast(device: str) -> contextlib.AbstractContextManager[object]:
    if torch.amp.is_autocast_available(device) and torch.is_autocast_enabled(device):
        return torch.autocast(device, enabled=False)
    return contextlib.nullcontext()


class Embedding(nn.Embedding):
    """An embedding table with weights from a normal distribution of standard deviation 0.02, as in GPT-2."""

    def __init__(self, count: int, width: int) -> None:
        super().__init__(count, width)
        nn.init.normal_(self.weight, std=0.02)


class VocabParallelEmbedding(Embedding):
    """An embedding table whose rows are divided among a tensor group, all of whose processes get whole vectors.

    Args:
        reach: as `make_neighbours_alike` takes it.
    """

    def __init__(self, count: int, width: int, tensor: TensorGroup = WHOLE, *, reach: float = 0.0) -> None:
        super().__init__(count, width)
        make_neighbours_alike(self.weight, reach)
        self.tensor = tensor
        self.weight = tensor.divide(self.weight, Split(0))

    def forward(self, input: Tensor) -> Tensor:
        """(…) int64 in [0, count) → (…, width)."""
        if self.tensor.size == 1:
            return super().forward(input)
        rows = self.num_embeddings // self.tensor.size
        local = input - self.tensor.rank * rows
        elsewhere = (local < 0) | (local >= rows)
        found = F.embedding(local.masked_fill(elsewhere, 0), self.weight)
        return self.tensor.reduce(found.masked_fill(elsewhere[..., None], 0.0))


@torch.no_grad()
def make_neighbours_alike(weight: Tensor, reach: float) -> None:
    """Mix random rows, in place, so that those of values with an order begin alike where these are near: the correlation of
    rows a and b becomes exp(−(a − b)² / 2 reach²). 0 leaves them."""
    if not reach or weight.is_meta:
        return
    # By NumPy, since within ZeRO-3's construction torch makes no tensors of float64.
    places = np.arange(len(weight))
    covariance = np.exp(-0.5 * ((places[:, None] - places) / reach) ** 2)
    factor = np.linalg.cholesky(covariance + 1e-4 * np.eye(len(weight)))
    weight.copy_(torch.from_numpy(factor @ weight.double().cpu().numpy()))


class LayerNorm(nn.LayerNorm):
    """Layer normalization of the fp32 residual stream, whatever the dtype of its gain and bias.

    Args:
        tensor: the group that divides the positions of the stream, if `sequence` is set.
    """

    def __init__(self, width: int, tensor: TensorGroup = WHOLE) -> None:
        super().__init__(width)
        self.tensor = tensor

    def forward(self, input: Tensor) -> Tensor:
        """Normalize the last axis of `input`, fp32 → fp32."""
        gain, bias = self.tensor.shared(self.weight), self.tensor.shared(self.bias)
        return F.layer_norm(input, self.normalized_shape, gain.float(), bias.float(), self.eps)


_ODD = 0x9E3779B97F4A7C15
"""Spreads the numbers of blocks over 64 bits."""


def dropout(x: Tensor, seeds: Tensor, block: int, rate: float, tensor: TensorGroup) -> Tensor:
    """`x` with elements set to 0 at random, and the rest divided by 1 − rate.

    What is dropped of a sample depends on its seed and the block alone. Noise drawn from one stream per process would change
    with the number of processes and the micro-batch; and the processes of a tensor group, which all hold the same
    residual stream, or positions of the same one, would each drop something else of it. Nothing is kept for the backward
    pass, nor must a random state be restored where activations are computed again.

    Args:
        x: (B, n, width), a branch's output, or this process's positions of it.
        seeds: (B,) int64.
        block: the residual block's number.
        rate: in [0, 1).
        tensor: the group that may divide positions.

    Returns:
        The same shape and dtype.
    """
    return _Dropout.apply(x, seeds, block, rate, tensor)


def seeds_on_host(seeds: Tensor | None, rate: float) -> Tensor | None:
    """Seeds as `dropout` reads them, on the CPU: moved once, not in every block. None where nothing is dropped."""
    if seeds is None or not rate:
        return None
    return seeds if seeds.is_meta else seeds.cpu()


class _Dropout(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, seeds: Tensor, block: int, rate: float, tensor: TensorGroup) -> Tensor:
        ctx.save_for_backward(seeds)
        ctx.settings = block, rate, tensor
        return _dropped(x, seeds, block, rate, tensor)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor | None, ...]:
        (seeds,) = ctx.saved_tensors
        return _dropped(gradient, seeds, *ctx.settings), None, None, None, None


def _dropped(x: Tensor, seeds: Tensor, block: int, rate: float, tensor: TensorGroup) -> Tensor:
    if x.is_meta:
        return torch.empty_like(x)
    divided = tensor.sequence and tensor.size > 1
    own = slice(tensor.rank * x.shape[1], (tensor.rank + 1) * x.shape[1]) if divided else slice(None)
    noise = torch.empty(x.shape[1] * (tensor.size if divided else 1), x.shape[2], device=x.device)
    generator = torch.Generator(device=x.device)
    out = torch.empty_like(x)
    for row, into, seed in zip(x, out, seeds.tolist(), strict=True):
        generator.manual_seed((seed ^ (block + 1) * _ODD) % 2**63)
        torch.mul(row, noise.bernoulli_(1 - rate, generator=generator)[own].to(x.dtype), out=into)
    return out.mul_(1 / (1 - rate))
