"""What a computation would hold, compute and exchange, traced on torch's "meta" device, where tensors have no memory."""

from __future__ import annotations

import weakref
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field, fields
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.autograd.graph import get_gradient_edge
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from torch.utils.flop_counter import flop_registry

from dalle_ds.meta_device import PLANNED_DEVICE
from dalle_ds.models.dalle import ResidualBlock

_FUSED = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu
"""Attention that keeps no scores, and has shapes for "meta" tensors; those of CUDA keep as much."""
BACKWARD_PRODUCTS = 5
"""Matrix products over the scores in its backward pass, of which one makes them again; forward there are two."""


class Exchange(NamedTuple):
    """A kind of collective."""

    axis: str
    operation: str
    processes: int


@dataclass(frozen=True)
class Work:
    """What is computed and exchanged."""

    flops: Counter[torch.dtype] = field(default_factory=Counter)  # by the type of the factors
    exchanged: Counter[Exchange] = field(default_factory=Counter)  # bytes
    exchanges: Counter[Exchange] = field(default_factory=Counter)  # how often

    def add(self, other: Work, times: int) -> None:
        """Take in other work, so many times."""
        for entry in fields(self):
            getattr(self, entry.name).update({key: times * n for key, n in getattr(other, entry.name).items()})


class Trace(TorchDispatchMode):
    """Counts all that is done with "meta" tensors while it is on."""

    def __init__(self) -> None:
        super().__init__()
        self.live = 0  # bytes of the tensors that were made meanwhile, and still exist
        self.peak = 0  # the most of them at a time; to be set to `live` where counting begins anew
        self.work = Work()
        self._known: dict[int, weakref.ref[Any]] = {}

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        if func is torch.ops.dalle_ds.exchange.default:
            whole, operation, axis, processes = args
            kind = Exchange(axis, operation, processes)
            self.work.exchanged[kind] += whole.nbytes
            self.work.exchanges[kind] += 1
            return None
        inputs = _tensors((args, kwargs))
        for tensor in inputs:
            self._note(tensor, counted=False)  # what is new here existed before
        result = func(*args, **kwargs)
        # What comes from another device is a constant, and made once for all layers: masks.
        is_made = not inputs or any(tensor.is_meta for tensor in inputs)
        for tensor in _tensors(result):
            self._note(tensor, counted=is_made and tensor.is_meta)
        self.peak = max(self.peak, self.live)
        formula = _FLOPS.get(func._overloadpacket) or flop_registry.get(func._overloadpacket)
        if formula is not None:
            self.work.flops[_computed_in(inputs[0].dtype)] += formula(*args, **kwargs, out_val=result)
        return result

    def _note(self, tensor: Tensor, *, counted: bool) -> None:
        storage = tensor.untyped_storage()
        key, size = storage._cdata, storage.nbytes() if counted else 0
        if key in self._known:
            return

        def free(_: Any) -> None:
            del self._known[key]
            self.live -= size

        self._known[key] = weakref.ref(storage, free)
        self.live += size


def _tensors(nested: Any) -> list[Tensor]:
    return [leaf for leaf in tree_leaves(nested) if isinstance(leaf, Tensor)]


def _computed_in(dtype: torch.dtype) -> torch.dtype:
    """CPUs are told to round factors of fp32 products in some places."""
    matmul = getattr(torch.backends.mkldnn, "matmul", None)
    rounded = dtype == torch.float32 and matmul is not None and matmul.fp32_precision == "bf16"
    return torch.bfloat16 if rounded else dtype


def _attention_flops(query: Tensor, key: Tensor, *_: Any, **__: Any) -> int:
    *batch, length, depth = query.shape
    return 2 * 2 * int(torch.Size(batch).numel()) * length * key.shape[2] * depth


# Beside those of `flop_registry`, which operators of our own join as they are imported.
_FLOPS: dict[Any, Callable[..., int]] = {
    _FUSED: _attention_flops,
    torch.ops.aten._scaled_dot_product_flash_attention_for_cpu_backward: (
        lambda _, query, key, *rest, **options: _attention_flops(query, key) * BACKWARD_PRODUCTS // 2
    ),
}


class _OnMeta(TorchFunctionMode):
    """Leaves weights undrawn, and takes fused attention, which torch would not on "meta"."""

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        if getattr(func, "__module__", None) == nn.init.__name__:
            return args[0] if args else kwargs["tensor"]
        if func is F.scaled_dot_product_attention:
            return _attention(*args, **kwargs)
        return func(*args, **kwargs)


def _attention(
    query: Tensor, key: Tensor, value: Tensor, attn_mask: Tensor | None = None, *_: Any, **options: Any
) -> Tensor:
    if attn_mask is not None and attn_mask.dtype == torch.bool:
        attn_mask = attn_mask.to(query.dtype)  # as torch does
    found: Tensor = _FUSED(query, key, value, attn_mask=attn_mask, scale=options.get("scale"))[0]
    return found


@contextmanager
def on_meta(device: str) -> Iterator[None]:
    """Let "meta" tensors stand for those of a type of device, "cuda" or "cpu"."""
    token = PLANNED_DEVICE.set(device)
    try:
        with _OnMeta():
            yield
    finally:
        PLANNED_DEVICE.reset(token)


@dataclass(frozen=True)
class Pass:
    """A forward and a backward pass of one layer and one micro-batch; bytes beside its inputs and weights."""

    kept: int  # from the forward to the backward pass, the outputs included
    forward: int  # the most in the forward pass
    backward: int  # the most in the backward pass, its weights' gradients one at a time included
    work: Work  # of both passes, with what is computed again
    outputs: tuple[Tensor, ...]
    gathered_again: tuple[int, ...] = ()  # sizes of weights that ZeRO-3 gathers to compute blocks again


def traced(function: Callable[..., Any], inputs: Sequence[Tensor], module: nn.Module, *, backward: bool = True) -> Pass:
    """Trace function(*inputs), which returns a tensor or a tuple of tensors, and its backward pass.

    To be called within `on_meta`. Gradients of weights go as soon as they are there.

    Args:
        inputs: those that ask for gradients get them.
        module: has the weights.
        backward: False runs it without gradients.
    """
    trace = Trace()
    leaves = [tensor.detach().requires_grad_(backward and tensor.requires_grad) for tensor in inputs]
    handles = [weight.register_post_accumulate_grad_hook(_drop_gradient) for weight in module.parameters()]
    gathered_again: list[int] = []

    def note(part: nn.Module, *_: Any) -> None:
        gathered_again.extend(weight.numel() for weight in part.parameters(recurse=False))

    try:
        with trace, torch.set_grad_enabled(backward):
            outputs = function(*leaves)
        outputs = outputs if isinstance(outputs, tuple) else (outputs,)
        kept, forward, trace.peak = trace.live, trace.peak, trace.live
        shapes = tuple(torch.empty_like(output, requires_grad=output.requires_grad) for output in outputs)
        edges = [get_gradient_edge(output) for output in outputs if output.requires_grad]
        del outputs  # the next layer has kept what it needs of them, and is through
        if edges:
            handles += [part.register_forward_hook(note) for part in _gathered_alone(module)]
            with trace:
                torch.autograd.backward(edges, [torch.empty_like(shape) for shape in shapes if shape.requires_grad])
    finally:
        for handle in handles:
            handle.remove()
    return Pass(kept, forward, trace.peak, trace.work, shapes, tuple(gathered_again))


def _gathered_alone(module: nn.Module) -> Iterator[nn.Module]:
    """The parts whose weights DeepSpeed frees when they are through, also where they are run again: the backward pass gathers
    them once more. Not the last that is run again, which is left as soon as it has what is needed, and comes to no hook; and
    not those of a `ResidualBlock`, which looks at its weights before its layers do, and so keeps them until it is through."""
    held = {id(part) for block in module.modules() if isinstance(block, ResidualBlock) for part in block.modules()}
    return (part for part in module.modules() if id(part) not in held)


def _drop_gradient(parameter: Tensor) -> None:
    parameter.grad = None
