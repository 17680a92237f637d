"""Exact sparse attention on CUDA by FlexAttention, which skips blocks of scores that no pair is allowed in (DALL·E App. B.1).

Positions are laid out so that what a query may attend to lies in few blocks: text first, then codes in raster order, where
the row and conv kinds are bands along the diagonal; or column by column for the column kind, where a query meets no image
block but those of its own column. Text keys of image queries fill whole blocks, which are computed without any mask.

Every shape is tried out once, forward and backward, against plain attention before it is used: the kernels are compiled
for it, which may fail in many ways on machines and versions of torch that nobody has seen yet.
"""

from __future__ import annotations

import contextlib
import copy
import functools
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
import torch.nn.functional as F
from torch import Tensor

from dalle_ds.nn.attention.masks import attention_mask

if TYPE_CHECKING:
    from torch.nn.attention.flex_attention import BlockMask

BLOCK = 128
"""Queries, and keys, in a block. Every kernel that torch picks divides it; sequences are padded to a multiple of it."""

SHAPES = 64
"""Shapes and kinds that kernels are compiled for, each in most of a minute."""

TOLERANCE = 0.02
"""How far a trial's result may be off in relation to its norm: a few roundings to bf16, or to TF32 where that is on."""

MaskMod = Callable[[Tensor, Tensor, Tensor, Tensor], Tensor]


class Refused(Exception):
    """FlexAttention cannot compute this here; the message says why, as the end of a sentence."""


@dataclass(frozen=True)
class Layout:
    """The order of positions and who may attend to whom in it; the fields are the arguments of `attention_mask`."""

    kind: str
    text_len: int
    grid: int
    kernel: int

    @property
    def length(self) -> int:
        """Positions of a whole sequence, up to a multiple of the block."""
        return -(-(self.text_len + self.grid**2) // BLOCK) * BLOCK

    def arrange(self, sequence: Tensor) -> Tensor:
        """(B, n, …), text and the first codes in raster order → (B, length, …), zeros where there is nothing.

        Whatever is added comes after all that could attend to it, so no mask need know of it.
        """
        if self.kind == "column":
            text, codes = sequence[:, : self.text_len], sequence[:, self.text_len :]
            codes = _padded(codes, self.grid**2).unflatten(1, (self.grid, self.grid))
            sequence = torch.cat([text, codes.transpose(1, 2).flatten(1, 2)], dim=1)
        return _padded(sequence, self.length)

    def restore(self, arranged: Tensor, length: int) -> Tensor:
        """The inverse of `arrange`: (B, length, …) → (B, n, …)."""
        if self.kind == "column":
            text, codes = arranged[:, : self.text_len], arranged[:, self.text_len : self.text_len + self.grid**2]
            codes = codes.unflatten(1, (self.grid, self.grid)).transpose(1, 2).flatten(1, 2)
            arranged = torch.cat([text, codes], dim=1)
        return arranged[:, :length]

    def mask_mod(self) -> MaskMod:
        """FlexAttention's mask over arranged positions: (batch, head, query, key) integers → bool."""
        text_len, grid, reach = self.text_len, self.grid, self.kernel // 2

        def row(query: Tensor, key: Tensor) -> Tensor:
            return query - key <= grid

        def column(query: Tensor, key: Tensor) -> Tensor:
            return (query - text_len) // grid == (key - text_len) // grid

        def conv(query: Tensor, key: Tensor) -> Tensor:
            # Of the kernel's rows that start no later than the distance, the farthest one has it if any has.
            distance = query - key
            rows_up = torch.clamp((distance + reach) // grid, max=reach)
            return distance - rows_up * grid <= reach

        near = {"row": row, "column": column, "conv": conv}[self.kind]

        def allowed(batch: Tensor, head: Tensor, query: Tensor, key: Tensor) -> Tensor:
            return (query >= key) & ((key < text_len) | near(query, key))

        return allowed


def flex_attention(qkv: Tensor, keep: Tensor | None, *, kind: str, text_len: int, grid: int, kernel: int) -> Tensor:
    """Attention of a whole sequence to itself under one of the sparse kinds.

    Args:
        qkv: (B, T + codes, 3, heads, D) queries, keys and values.
        keep: (B, T) bool, text keys that may be attended to; None allows all. Position 0 must be kept.
        kind, text_len, grid, kernel: as `attention_mask` takes them.

    Returns:
        (B, T + codes, heads · D).

    Raises:
        Refused: the shape, dtype, device or installation is none that FlexAttention can serve.
    """
    layout = Layout(kind, text_len, grid, kernel)
    length = qkv.shape[1]
    qkv = _padded(qkv, text_len + grid**2)  # one kernel for all parts of an image
    differentiated = torch.is_grad_enabled() and qkv.requires_grad
    refusal = _refusal(layout, qkv.shape, qkv.dtype, qkv.device, keep is not None, differentiated)
    if refusal is not None:
        raise Refused(refusal)
    with torch.set_grad_enabled(differentiated):  # as in the trial, or it would be compiled once more
        return _attend(qkv, keep, layout)[:, :length]


@functools.lru_cache(maxsize=64)
def block_mask(layout: Layout, padded: bool, device: torch.device) -> BlockMask:
    """Blocks of pairs to compute: in part under the mask, or in full where it allows every pair of the block.

    Args:
        padded: whether some text keys may be forbidden. No block with text keys is then taken to be full, though the
            mask does not yet say which keys are; see `_with_keep`.
    """
    from torch.nn.attention.flex_attention import BlockMask

    at = torch.arange(layout.length)
    nowhere = torch.zeros((), dtype=torch.int64)
    allowed = layout.mask_mod()(nowhere, nowhere, at[:, None], at[None, :])
    blocks = allowed.unflatten(0, (-1, BLOCK)).unflatten(2, (-1, BLOCK)).transpose(1, 2).flatten(2)
    full = blocks.all(dim=2)
    if padded:
        full[:, : -(-layout.text_len // BLOCK)] = False
    partial = blocks.any(dim=2) & ~full
    return BlockMask.from_kv_blocks(
        *_ordered(partial, device), *_ordered(full, device), BLOCK_SIZE=BLOCK, mask_mod=layout.mask_mod()
    )


def flex_pairs(layout: Layout, padded: bool) -> int:
    """Query-key pairs whose scores the kernels compute for a whole sequence."""
    mask = block_mask(layout, padded, torch.device("cpu"))
    blocks = mask.kv_num_blocks.sum()
    if mask.full_kv_num_blocks is not None:
        blocks = blocks + mask.full_kv_num_blocks.sum()
    return int(blocks) * BLOCK**2


def _ordered(blocks: Tensor, device: torch.device) -> tuple[Tensor, Tensor]:
    """(query blocks, key blocks) bool → how many are set in each row, and which, before those that are not."""
    indices = blocks.int().argsort(dim=1, descending=True, stable=True)
    counts = blocks.sum(dim=1)
    return counts[None, None].to(device, torch.int32), indices[None, None].to(device, torch.int32)


def _with_keep(mask: BlockMask, keep: Tensor) -> BlockMask:
    """The same blocks with some text keys forbidden."""
    pattern, last = mask.mask_mod, keep.shape[1] - 1

    def allowed(batch: Tensor, head: Tensor, query: Tensor, key: Tensor) -> Tensor:
        return pattern(batch, head, query, key) & ((key > last) | keep[batch, torch.clamp(key, max=last)])

    mask = copy.copy(mask)
    mask.mask_mod = allowed
    return mask


def _attend(qkv: Tensor, keep: Tensor | None, layout: Layout) -> Tensor:
    mask = block_mask(layout, keep is not None, qkv.device)
    if keep is not None:
        mask = _with_keep(mask, keep)
    with torch._dynamo.config.patch(cache_size_limit=SHAPES):
        return _compiled()(qkv.contiguous(), mask, layout)


@functools.cache
def _compiled() -> Callable[[Tensor, BlockMask, Layout], Tensor]:
    """`_compute`, compiled when first called; shapes are known when it is, which the fastest kernels need."""
    return torch.compile(_compute, dynamic=False, fullgraph=True)


def _compute(qkv: Tensor, mask: BlockMask, layout: Layout) -> Tensor:
    from torch.nn.attention import flex_attention as flex

    # Where compilation is skipped without an error, torch would compute and keep all scores.
    if not torch.compiler.is_compiling():
        raise Refused("torch.compile is off, or steps aside for a dispatch mode")
    queries, keys, values = layout.arrange(qkv).permute(2, 0, 3, 1, 4).unbind(0)  # each (B, heads, length, D)
    attended: Any = flex.flex_attention(queries, keys, values, block_mask=mask)
    return layout.restore(attended.transpose(1, 2), qkv.shape[1]).flatten(2)


def _padded(sequence: Tensor, length: int) -> Tensor:
    """(B, n, …) → (B, length, …)"""
    return F.pad(sequence, (0, 0) * (sequence.dim() - 2) + (0, length - sequence.shape[1]))


@functools.cache
def _refusal(
    layout: Layout, shape: torch.Size, dtype: torch.dtype, device: torch.device, padded: bool, differentiated: bool
) -> str | None:
    """Why FlexAttention cannot compute attention of this shape; None if it can."""
    if dtype not in (torch.float32, torch.bfloat16, torch.float16):
        return f"it takes no {str(dtype).removeprefix('torch.')}"
    if shape[-1] < 16:
        return f"it takes heads of 16 numbers or more, found {shape[-1]}"
    # In a thread of its own, where activation checkpointing and other modes of the caller see nothing of the trial.
    with ThreadPoolExecutor(max_workers=1) as thread:
        return thread.submit(_trial, layout, shape, dtype, device, padded, differentiated).result()


def _trial(
    layout: Layout, shape: torch.Size, dtype: torch.dtype, device: torch.device, padded: bool, differentiated: bool
) -> str | None:
    """Attend once among random numbers, and compare the outermost heads of the outermost sequences with dense attention."""
    with torch.cuda.device(device) if device.type == "cuda" else contextlib.nullcontext():
        generator = torch.Generator(device).manual_seed(0)
        qkv = torch.randn(shape, generator=generator, device=device).to(dtype)
        keep = None
        if padded:
            keep = torch.rand(shape[0], layout.text_len, generator=generator, device=device) < 0.5
            keep[:, 0] = True
        try:
            found = _result_and_gradient(lambda qkv: _attend(qkv, keep, layout), qkv, differentiated)
        except torch.OutOfMemoryError:
            raise
        except Refused as refusal:
            return str(refusal)
        except Exception as error:  # whatever a compiler can fail with
            cause: BaseException = error
            while cause.__cause__ is not None:
                cause = cause.__cause__
            return f"it failed with {type(cause).__name__}: {str(cause).strip().partition(chr(10))[0]}"
        found[0] = found[0].unflatten(2, shape[3:])
        for sequence, head in {(0, 0), (shape[0] - 1, shape[3] - 1)}:
            expected = _result_and_gradient(
                functools.partial(_dense, layout=layout, keep=None if keep is None else keep[sequence]),
                qkv[sequence, :, :, head].float(),
                differentiated,
            )
            for ours, theirs in zip(found, expected, strict=True):
                difference = ours[sequence, ..., head, :].float() - theirs
                off = float(torch.linalg.vector_norm(difference) / torch.linalg.vector_norm(theirs))
                if not off < TOLERANCE:  # NaN is off too
                    return f"its result was off by {off:.1%} when it was tried out"
    return None


def _dense(qkv: Tensor, layout: Layout, keep: Tensor | None) -> Tensor:
    """(n, 3, D) of one head of one sequence → (n, D), under a dense mask."""
    mask = attention_mask(layout.kind, layout.text_len, layout.grid, layout.kernel).to(qkv.device)
    if keep is not None:
        mask[:, : layout.text_len] &= keep
    queries, keys, values = qkv[None, None].unbind(3)
    return F.scaled_dot_product_attention(queries, keys, values, attn_mask=mask)[0, 0]


def _result_and_gradient(attend: Callable[[Tensor], Tensor], qkv: Tensor, differentiated: bool) -> list[Tensor]:
    """What `attend` returns, and the gradient of its square if it is asked for."""
    with torch.set_grad_enabled(differentiated):
        qkv = qkv.detach().requires_grad_(differentiated)
        out = attend(qkv)
        found = [out.detach()]
        if differentiated:
            found.append(torch.autograd.grad(out.float().square().sum(), qkv)[0])
    return found
