"""Exact sparse attention on the CPU that computes only blocks of scores that its mask allows (DALL·E App. B.1).

Text keys and image keys are attended to apart. All queries meet all text keys, which is one dense causal rectangle.
Codes meet codes in blocks: `block` consecutive codes (in raster order, or column by column for the column kind) meet the
strips of keys that any of them may attend to, 64 keys in place of 1,024 for the row kind at a grid of 32.

It is still one softmax. Each part yields its output normalized by itself, and the logarithm of the sum it was divided by,
from which the outputs are mixed exactly. The backward pass rebuilds the probabilities of each part from the logarithm of
the whole sum; nothing of the size of the scores is kept between the passes.
"""

from __future__ import annotations

import functools
import itertools
import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.utils.flop_counter import register_flop_formula

from dalle_ds.nn.attention.masks import allowed_offsets

BLOCK = 32
"""Codes that meet their keys together. Fewer waste less of a block on forbidden pairs, more use wide arithmetic better."""

SCORES = 2**22
"""Scores of a backward pass that exist at a time."""

WORTHWHILE = 0.4
"""Blocks that hold a greater share of all pairs are not worth their bookkeeping: dense attention is faster."""
SHORT = 128
"""Up to this length they are in 16 bits, which torch's dense attention is slow in on short sequences."""


@dataclass(frozen=True)
class Blocks:
    """Which codes meet which: the same few strips of keys, seen from the start of each block."""

    by_column: bool
    """Codes are taken column by column; else in raster order."""
    width: int
    """Codes in a row of the image."""
    height: int
    """Rows of the image that hold codes."""
    size: int
    """Codes in a block."""
    strips: tuple[tuple[int, int], ...]
    """(first key relative to the block's first code, keys) of each strip; they do not overlap."""
    mask: Tensor
    """(blocks, size, keys) bool, True = may attend; no key lies before the first code."""

    @property
    def count(self) -> int:
        """Blocks."""
        return self.mask.shape[0]

    @property
    def before(self) -> int:
        """Keys before a block's first code that its strips reach back to."""
        return -self.strips[0][0]

    def split(self, codes: Tensor) -> Tensor:
        """(N, codes, D) → (N, blocks, size, D), padded with zeros where the last block is not full."""
        codes = F.pad(codes, (0, 0, 0, self.count * self.size - codes.shape[1]))
        return codes.view(len(codes), self.count, self.size, -1)

    def windows(self, keys: Tensor) -> Tensor:
        """(N, codes, D) → (N, blocks, keys, D), the keys that each block meets; zeros where there is none."""
        if self.strips == ((0, self.size),):
            return self.split(keys)
        behind = self.count * self.size - keys.shape[1]
        padded = F.pad(keys, (0, 0, self.before, behind))
        strips = [
            padded[:, self.before + start :].unfold(1, length, self.size)[:, : self.count].transpose(2, 3)
            for start, length in self.strips
        ]
        return torch.cat(strips, dim=2) if len(strips) > 1 else strips[0].contiguous()

    def fold(self, windows: Tensor) -> Tensor:
        """The transpose of `windows`: (N, blocks, keys, D) gradients → (N, blocks · size, D)."""
        (start, length), *others = self.strips
        total, depth = self.count * self.size, windows.shape[-1]
        if not others and start + length == self.size and length <= 2 * self.size:
            # Each block has its own keys and at most those of the one before: two terms, for which 16 bits suffice.
            own = windows[:, :, -self.size :]
            if start == 0:
                return own.flatten(1, 2)
            summed = own.contiguous()
            summed[:, :-1, start:] += windows[:, 1:, :-start]
            return summed.flatten(1, 2)
        dtype = torch.promote_types(windows.dtype, torch.float32)
        padded = windows.new_zeros(len(windows), self.before + total + self.size, depth, dtype=dtype)
        column = 0
        for start, length in self.strips:
            for done in range(0, length, self.size):
                width = min(self.size, length - done)
                first = self.before + start + done
                into = padded[:, first : first + total].view(len(windows), self.count, self.size, depth)
                into[:, :, :width] += windows[:, :, column : column + width]
                column += width
        return padded[:, self.before : self.before + total]


@functools.lru_cache(maxsize=64)
def blocks_of(kind: str, grid: int, kernel: int, codes: int) -> Blocks:
    """How the first `codes` codes of an image, in raster order, meet each other under an attention kind."""
    allowed = allowed_offsets(kind, grid, kernel)
    by_column = kind == "column"
    height = -(-codes // grid)
    if by_column:
        positions = torch.arange(height * grid).view(height, grid).T.flatten()
        size = height * max(1, BLOCK // height)  # whole columns
        strips = [(0, size)]
    else:
        positions = torch.arange(codes)
        size = min(BLOCK, codes)
        reached = (allowed.nonzero()[:, 0]).tolist()
        # Key at offset j from the block's start is met by query i where i − j is an allowed distance.
        met = sorted({i - distance for i in range(size) for distance in reached})
        met = [j for j in met if j > -len(positions)]
        breaks = [at for at in range(1, len(met)) if met[at] != met[at - 1] + 1]
        edges = [0, *breaks, len(met)]
        strips = [(met[a], met[b - 1] + 1 - met[a]) for a, b in itertools.pairwise(edges)]
    count = -(-len(positions) // size)
    starts = torch.arange(count) * size
    queries = starts[:, None] + torch.arange(size)
    keys = starts[:, None] + torch.cat([torch.arange(start, start + length) for start, length in strips])
    last = len(positions) - 1
    query_at = positions[queries.clamp(max=last)][:, :, None]
    key_at = positions[keys.clamp(0, last)][:, None, :]
    distance = query_at - key_at
    mask = allowed[distance.clamp(min=0)] & (distance >= 0) & (keys >= 0)[:, None, :] & (keys <= last)[:, None, :]
    # Queries beyond the last code are dropped; they attend to something so that no softmax is empty.
    mask |= (queries > last)[:, :, None]
    return Blocks(by_column, grid, height, size, tuple(strips), mask)


def block_pairs(kind: str, text_len: int, grid: int, kernel: int, length: int) -> int:
    """Query-key pairs whose scores `blockwise_attention` computes for a sequence of `length` positions."""
    return length * text_len + blocks_of(kind, grid, kernel, length - text_len).mask.numel()


def is_worthwhile(kind: str, text_len: int, grid: int, kernel: int, length: int, dtype: torch.dtype) -> bool:
    """Whether `blockwise_attention` is faster than dense attention under a mask."""
    if length <= SHORT and dtype.itemsize == 2:
        return True
    return block_pairs(kind, text_len, grid, kernel, length) <= WORTHWHILE * length**2


def blockwise_attention(
    qkv: Tensor, keep: Tensor | None, *, kind: str, text_len: int, grid: int, kernel: int
) -> Tensor:
    """Attention of a whole sequence to itself under one of the sparse kinds.

    Args:
        qkv: (B, T + codes, 3, heads, D) queries, keys and values, on the CPU.
        keep: (B, T) bool, text keys that may be attended to; None allows all. Position 0 must be kept.
        kind, text_len, grid, kernel: as `attention_mask` takes them.

    Returns:
        (B, T + codes, heads · D).
    """
    if qkv.stride(-1) != 1:
        qkv = qkv.contiguous()  # the fused operator takes no other, and does not say so
    return torch.ops.dalle_ds.blockwise_attention(qkv, keep, kind, text_len, grid, kernel)[0].flatten(2)


# An operator of its own, so that checkpointing policies, flop counters and compilers see one thing.
@torch.library.custom_op("dalle_ds::blockwise_attention", mutates_args=(), device_types="cpu")
def _forward(
    qkv: Tensor, keep: Tensor | None, kind: str, text_len: int, grid: int, kernel: int
) -> tuple[Tensor, Tensor]:
    """(B, n, heads, D) output, and (B, heads, n) logarithms of the sums of exponentials, in fp32 or better."""
    batch, length, _, heads, depth = qkv.shape
    blocks = blocks_of(kind, grid, kernel, length - text_len)
    queries, keys, values = qkv.permute(2, 0, 3, 1, 4).unbind(0)  # each (B, heads, n, D)
    bias = None if keep is None else _text_bias(keep, length, qkv.dtype)
    text, total = _attend(queries, keys[:, :, :text_len], values[:, :, :text_len], bias)
    local, local_total = _attend(
        blocks.split(_ordered(queries[:, :, text_len:], blocks)),
        blocks.windows(_ordered(keys[:, :, text_len:], blocks)),
        blocks.windows(_ordered(values[:, :, text_len:], blocks)),
        torch.zeros(blocks.mask.shape, dtype=qkv.dtype).masked_fill_(~blocks.mask, float("-inf"))[None],
    )
    codes = (batch, heads, length - text_len)
    local = _raster(local.flatten(1, 2), blocks, codes)
    local_total = _raster(local_total.flatten(1, 2)[..., None], blocks, codes)[..., 0]

    out = torch.empty(batch, length, heads, depth, dtype=qkv.dtype)
    by_head = out.transpose(1, 2)
    by_head[:, :, :text_len] = text[:, :, :text_len]
    text_total = total[:, :, text_len:]
    # The share of the codes' keys in the sum of exponentials that both parts have in common.
    share = torch.sigmoid(local_total - text_total)[..., None]
    by_head[:, :, text_len:] = torch.lerp(text[:, :, text_len:].to(share.dtype), local.to(share.dtype), share)
    total[:, :, text_len:] = torch.logaddexp(text_total, local_total)
    return out, total


@torch.library.custom_op("dalle_ds::blockwise_attention_backward", mutates_args=(), device_types="cpu")
def _backward(
    gradient: Tensor,
    qkv: Tensor,
    keep: Tensor | None,
    out: Tensor,
    total: Tensor,
    kind: str,
    text_len: int,
    grid: int,
    kernel: int,
) -> Tensor:
    """Gradient of qkv from that of the output; the other arguments are those of the forward operator and its results."""
    batch, length, _, heads, depth = qkv.shape
    blocks = blocks_of(kind, grid, kernel, length - text_len)
    dtype = qkv.dtype
    if dtype == torch.float16:
        # Its five bits of exponent have no room for what follows; and fp32 is the faster on CPUs.
        gradient, qkv, out = gradient.float(), qkv.float(), out.float()
    inner = (gradient.to(total.dtype) * out).sum(-1).transpose(1, 2)
    # What is subtracted from every score rides along in its matrix product, as columns that the keys multiply by 1: so it
    # is subtracted before the product is rounded to 16 bits, and costs no pass over the scores. Probabilities are made 16
    # times as great as they are, which puts the logarithms of 1 and of 1/256 equally near to 0, where 16 bits are dense.
    scale, gain = depth**-0.5, 16.0
    queries = _with_columns(qkv[:, :, 0], (math.log(gain) - total) / scale)
    gradients = _with_columns(gradient, -inner)
    keys, values = (_with_ones(qkv[:, :, part], queries.shape[-1]) for part in (1, 2))

    dropped = None if keep is None else ~keep.repeat_interleave(heads, dim=0)[:, None, None]
    d_queries, d_text_keys, d_text_values = _score_gradients(
        queries[:, None],
        keys[:, None, :text_len],
        values[:, None, :text_len],
        gradients[:, None],
        depth,
        functools.partial(_mask_text, dropped=dropped),
    )
    d_local_queries, d_local_keys, d_local_values = _score_gradients(
        blocks.split(_ordered(queries[:, text_len:], blocks)),
        blocks.windows(_ordered(keys[:, text_len:], blocks)),
        blocks.windows(_ordered(values[:, text_len:], blocks)),
        blocks.split(_ordered(gradients[:, text_len:], blocks)),
        depth,
        functools.partial(_mask_blocks, blocks=blocks),
    )
    codes = (batch, heads, length - text_len)
    d_queries = d_queries.view(batch, heads, length, depth)
    d_queries[:, :, text_len:] += _raster(d_local_queries.flatten(1, 2), blocks, codes)
    result = torch.empty_like(qkv)
    by_head = result.permute(2, 0, 3, 1, 4)
    torch.mul(d_queries, scale / gain, out=by_head[0])
    for into, of_text, of_codes, factor in (
        (1, d_text_keys, d_local_keys, scale / gain),
        (2, d_text_values, d_local_values, 1 / gain),
    ):
        torch.mul(of_text.view(batch, heads, text_len, depth), factor, out=by_head[into, :, :, :text_len])
        by_head[into, :, :, text_len:] = _raster(blocks.fold(of_codes).mul_(factor), blocks, codes)
    return result.to(dtype)


def _save(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor]) -> None:
    qkv, keep, *ctx.pattern = inputs
    ctx.save_for_backward(qkv, keep, *output)


def _differentiate(ctx: Any, gradient: Tensor, _: Tensor) -> tuple[Tensor | None, ...]:
    qkv, keep, out, total = ctx.saved_tensors
    operator = torch.ops.dalle_ds.blockwise_attention_backward
    return operator(gradient, qkv, keep, out, total, *ctx.pattern), None, None, None, None, None


torch.library.register_autograd("dalle_ds::blockwise_attention", _differentiate, setup_context=_save)


@torch.library.register_fake("dalle_ds::blockwise_attention")
def _shapes(
    qkv: Tensor, keep: Tensor | None, kind: str, text_len: int, grid: int, kernel: int
) -> tuple[Tensor, Tensor]:
    batch, length, _, heads, depth = qkv.shape
    dtype = torch.promote_types(qkv.dtype, torch.float32)
    return qkv.new_empty(batch, length, heads, depth), qkv.new_empty(batch, length, heads, dtype=dtype).transpose(1, 2)


@torch.library.register_fake("dalle_ds::blockwise_attention_backward")
def _backward_shape(gradient: Tensor, qkv: Tensor, *_: Any) -> Tensor:
    return torch.empty_like(qkv)


@register_flop_formula(torch.ops.dalle_ds.blockwise_attention)
def _flops(
    qkv: tuple[int, ...],
    keep: tuple[int, ...] | None,
    kind: str,
    text_len: int,
    grid: int,
    kernel: int,
    *_: Any,
    **__: Any,
) -> int:
    batch, length, heads, depth = qkv[0], qkv[1], qkv[3], qkv[4]
    return 2 * 2 * batch * heads * depth * block_pairs(kind, text_len, grid, kernel, length)


@register_flop_formula(torch.ops.dalle_ds.blockwise_attention_backward)
def _backward_flops(gradient: tuple[int, ...], qkv: tuple[int, ...], *arguments: Any, **options: Any) -> int:
    # Five products over the scores, of which the first makes them again; the forward pass has two.
    keep, _, _, *pattern = arguments
    return _flops(qkv, keep, *pattern) * 5 // 2


def _attend(queries: Tensor, keys: Tensor, values: Tensor, bias: Tensor | None) -> tuple[Tensor, Tensor]:
    """(output, logarithm of the sum of exponentials) of fused attention, causal where there is no bias."""
    attend = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu
    return attend(queries, keys, values, is_causal=bias is None, attn_mask=bias)


def _score_gradients(
    queries: Tensor,
    keys: Tensor,
    values: Tensor,
    gradients: Tensor,
    depth: int,
    mask: Callable[[Tensor, slice], None],
) -> tuple[Tensor, Tensor, Tensor]:
    """Gradients of queries, keys and values, from operands with their extra columns: (N, blocks, n, D + c) each.

    Those of queries and keys are still to be multiplied by the scale of the scores. Of the N, as many are taken at a time as
    have `SCORES` scores together.

    Args:
        mask: puts −∞ into the scores of forbidden pairs, given as (some of N, blocks, n, keys) and which of N these are.
    """
    count, blocks, rows, _ = queries.shape
    columns = keys.shape[2]
    d_queries, d_keys, d_values = (
        part.new_empty(count * blocks, part.shape[2], depth) for part in (queries, keys, values)
    )
    at_once = max(1, SCORES // (blocks * rows * columns))
    space = queries.new_empty(2, min(at_once, count) * blocks, rows, columns)
    for first in range(0, count, at_once):
        some = slice(first, first + at_once)
        query, key, value, gradient = (part[some].flatten(0, 1) for part in (queries, keys, values, gradients))
        probabilities, d_scores = space[:, : len(query)].unbind(0)
        where = slice(first * blocks, first * blocks + len(query))
        # Scaled as they are added up: scaled queries would be rounded once more, in another way than forward.
        torch.baddbmm(probabilities, query, key.transpose(1, 2), beta=0, alpha=depth**-0.5, out=probabilities)
        mask(probabilities.view(-1, blocks, rows, columns), some)
        probabilities.exp_()
        torch.bmm(probabilities.transpose(1, 2), gradient[..., :depth], out=d_values[where])
        torch.bmm(gradient, value.transpose(1, 2), out=d_scores)
        d_scores *= probabilities
        torch.bmm(d_scores, key[..., :depth], out=d_queries[where])
        torch.bmm(d_scores.transpose(1, 2), query[..., :depth], out=d_keys[where])
    shape = (count, blocks, -1, depth)
    return d_queries.view(shape), d_keys.view(shape), d_values.view(shape)


def _mask_text(scores: Tensor, some: slice, dropped: Tensor | None) -> None:
    text_len = scores.shape[3]
    ahead = torch.ones(text_len, text_len, dtype=torch.bool).triu(1)
    scores[:, :, :text_len].masked_fill_(ahead, float("-inf"))
    if dropped is not None:
        scores.masked_fill_(dropped[some], float("-inf"))


def _mask_blocks(scores: Tensor, some: slice, blocks: Blocks) -> None:
    scores.masked_fill_(~blocks.mask, float("-inf"))


def _text_bias(keep: Tensor, length: int, dtype: torch.dtype) -> Tensor:
    """(B, 1, n, T) added to the scores of text keys."""
    allowed = torch.ones(length, keep.shape[1], dtype=torch.bool).tril() & keep[:, None]
    return torch.zeros(allowed.shape, dtype=dtype).masked_fill_(~allowed, float("-inf"))[:, None]


def _with_columns(rows: Tensor, column: Tensor) -> Tensor:
    """(B, n, heads, D) and (B, heads, n) → (B · heads, n, D + c): rows; the column, in as many terms as it needs."""
    batch, length, heads, depth = rows.shape
    terms = [column.to(rows.dtype)]
    if rows.dtype != column.dtype:
        for _ in range(2):
            column = column - terms[-1]
            terms.append(column.to(rows.dtype))
    widened = rows.new_empty(batch, heads, length, depth + len(terms))
    widened[..., :depth] = rows.transpose(1, 2)
    for index, term in enumerate(terms):
        widened[..., depth + index] = term
    return widened.flatten(0, 1)


def _with_ones(rows: Tensor, depth: int) -> Tensor:
    """(B, n, heads, D) → (B · heads, n, depth), filled up with ones."""
    return F.pad(rows.transpose(1, 2), (0, depth - rows.shape[-1]), value=1.0).flatten(0, 1)


def _ordered(codes: Tensor, blocks: Blocks) -> Tensor:
    """(…, codes, D) in raster order → (N, codes, D) in the order of the blocks."""
    codes = codes.reshape(-1, *codes.shape[-2:])
    if not blocks.by_column:
        return codes
    codes = F.pad(codes, (0, 0, 0, blocks.width * blocks.height - codes.shape[1]))
    return codes.view(len(codes), blocks.height, blocks.width, -1).transpose(1, 2).flatten(1, 2)


def _raster(ordered: Tensor, blocks: Blocks, shape: tuple[int, int, int]) -> Tensor:
    """The inverse of `_ordered`: (N, codes or more, D) → (*shape, D)."""
    if blocks.by_column:
        ordered = ordered[:, : blocks.width * blocks.height].view(len(ordered), blocks.width, blocks.height, -1)
        ordered = ordered.transpose(1, 2).flatten(1, 2)
    return ordered[:, : shape[2]].view(*shape, -1)
