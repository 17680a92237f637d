"""What steps of few rows are computed with: weights made ready once for many of them, and a CUDA graph that holds a step.

Such a step reads every weight once and multiplies few rows with it, so it runs at the speed of memory, if nothing else gets in
its way. On a CPU, a matrix product of few rows first rearranges its weight, in every call; on a GPU, launching takes longer
than computing.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from dalle_ds.models.dalle import AttentionBlock, MlpBlock
from dalle_ds.nn.attention.decoding import ROWS, ROWS_ALIKE
from dalle_ds.nn.layers import Linear, RowParallelLinear, Unembedding

Layer = Callable[[Tensor], Tensor]


class InferenceLayer(NamedTuple):
    """One attention layer and its MLP."""

    attention_norm: Layer
    qkv: Layer
    out: Layer
    mlp_norm: Layer
    up: Layer
    """With GELU."""
    down: Layer

    @classmethod
    def of(
        cls, attention: AttentionBlock, mlp: MlpBlock, norm: Callable[..., Layer], linear: Callable[..., Layer]
    ) -> InferenceLayer:
        """What `norm` and `linear` make of both blocks' layers; `linear` as `ready_linear`."""
        return cls(
            norm(attention.norm),
            linear(attention.attention.qkv),
            linear(attention.attention.out),
            norm(mlp.norm),
            linear(mlp.up, gelu=True),
            linear(mlp.down),
        )


def ready_norm(norm: nn.LayerNorm) -> Layer:
    """The norm, its gain and bias in fp32."""
    shape, gain, bias, eps = norm.normalized_shape, norm.weight.float(), norm.bias.float(), norm.eps
    return lambda x: torch.layer_norm(x, shape, gain, bias, eps)


def ready_linear(linear: Linear, *, gelu: bool = False, packed: bool = True) -> Layer:
    """The linear layer for (rows, inputs), and GELU after it.

    Args:
        packed: as CPUs multiply it with `ROWS` rows and more. With fewer they read it as it is, at the speed of memory.
    """
    weight, bias = linear.matrix.detach(), linear.bias.detach()
    if isinstance(linear, RowParallelLinear) and linear.tensor.size > 1:
        share = _product(weight, None, gelu=False, packed=packed)
        return lambda x: linear.tensor.sum_(share(x)).add_(bias)
    product = _product(weight, bias, gelu=gelu, packed=packed)
    if isinstance(linear, Unembedding):
        return lambda x: linear.tensor.gather(product(x))
    return product


def _product(weight: Tensor, bias: Tensor | None, *, gelu: bool, packed: bool) -> Layer:
    if weight.device.type == "cpu":
        if packed:
            return PackedLinear(weight, bias, gelu=gelu)
        weight = weight.contiguous()  # of few rows, products with a transposed weight take twice as long
    transposed = weight.t()  # once, since even a view takes time in a step
    if bias is None:
        return lambda x: torch.mm(x, transposed)
    if not gelu:
        return lambda x: torch.addmm(bias, x, transposed)
    activation = _gelu_of_few if weight.device.type == "cpu" else F.gelu
    return lambda x: activation(torch.addmm(bias, x, transposed))


def _gelu_of_few(x: Tensor) -> Tensor:
    """GELU in five operators, which together start sooner than the one that goes through oneDNN (40 µs)."""
    return torch.addcmul(x, x, torch.erf(x * 2**-0.5)).mul_(0.5)


class PackedLinear:
    """A linear layer on the CPU, its weight in the layout that the matrix product works in.

    Without oneDNN's operators for that, it is an ordinary one.

    Args:
        gelu: whether GELU follows.
    """

    def __init__(self, weight: Tensor, bias: Tensor | None, *, gelu: bool = False) -> None:
        self.bias = bias
        self.gelu = gelu
        packed = _packed(weight)
        self.weight = weight if packed is None else packed
        self.packed = packed is not None
        self.rows_at_once = ROWS_ALIKE[weight.dtype] if self.packed else ROWS

    def __call__(self, x: Tensor) -> Tensor:
        """(rows, inputs) → (rows, outputs)."""
        if self.rows_at_once is None or len(x) <= self.rows_at_once:
            return self._multiply(x)
        return torch.cat([self._multiply(some) for some in x.split(self.rows_at_once)])

    def _multiply(self, x: Tensor) -> Tensor:
        if self.packed:
            # The last argument names the kind of GELU: none is the exact one.
            activation = "gelu" if self.gelu else "none"
            return torch.ops.mkldnn._linear_pointwise.default(x, self.weight, self.bias, activation, [], "none")
        x = F.linear(x, self.weight, self.bias)
        return F.gelu(x) if self.gelu else x


def _packed(weight: Tensor) -> Tensor | None:
    """The weight in oneDNN's own layout; None where this machine or this PyTorch cannot."""
    if weight.dtype not in ROWS_ALIKE or not torch.backends.mkldnn.is_available():
        return None
    try:
        packed = torch.ops.mkldnn._reorder_linear_weight(weight, ROWS)
        torch.ops.mkldnn._linear_pointwise(weight.new_zeros(ROWS, weight.shape[1]), packed, None, "none", [], "none")
    except (AttributeError, RuntimeError):
        return None
    return packed


class StepGraph:
    """A step held in a CUDA graph: one launch in place of some twenty for each layer.

    Always called with the same function, and shapes, of the same weights and cache, whose tensors the graph reads and writes
    where they lie. Where a step cannot be held, steps are computed one by one, with one warning.
    """

    def __init__(self, device: torch.device) -> None:
        self.device = device
        self.inputs: tuple[Tensor, ...] | None = None
        self.output: Tensor | None = None

    def __call__(self, compute: Callable[..., Tensor], *inputs: Tensor) -> Tensor:
        """compute(*inputs); the function itself is not kept."""
        first = self.inputs is None
        if self.inputs is None:
            self.inputs = tuple(torch.empty_like(tensor, device=self.device) for tensor in inputs)
        for own, given in zip(self.inputs, inputs, strict=True):
            own.copy_(given)
        with torch.cuda.device(self.device):
            if first:
                self._capture(compute, self.inputs)
            if self.output is None:
                return compute(*self.inputs)
            self.graph.replay()
            return self.output.clone()

    def _capture(self, compute: Callable[..., Tensor], inputs: tuple[Tensor, ...]) -> None:
        # What is computed to warm up, and while the graph is taken, writes to the cache; the first replay writes over it what
        # belongs there, since it is for the same step.
        side = torch.cuda.Stream()
        side.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(side):
            compute(*inputs)
        torch.cuda.current_stream().wait_stream(side)
        self.graph = torch.cuda.CUDAGraph()
        try:
            # Other threads of the process may go on to allocate memory meanwhile.
            with torch.cuda.graph(self.graph, capture_error_mode="thread_local"):
                self.output = compute(*inputs)
        except RuntimeError as error:
            self.output = None
            warnings.warn(f"steps go on without a CUDA graph, more slowly: {error}", stacklevel=2)
