"""Attention of one code at a time to its prompt's text and to the earlier codes that its kind allows, and the cache of both.

The cache is static buffers that hold of each layer what its attention kind needs (`Slots`); text keys and values lie there
once for each distinct prompt, whatever the number of images drawn from it. A step reads it through a `Window`, of which there
are two: `Runs`, slices of exactly what is allowed, for the CPU; and `Table`, where the position is a tensor and every
shape is the same in every step, so that a CUDA graph can hold the step.
"""

from __future__ import annotations

import functools
import itertools
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from dalle_ds.config import DalleConfig
from dalle_ds.nn.attention.masks import allowed_offsets, configured_kinds

ROWS = 4
"""Rows of a matrix product are filled up to a multiple of this: with fewer, the same row may come out differently."""
ROWS_ALIKE: dict[torch.dtype, int | None] = {torch.float32: None, torch.bfloat16: 32}
"""Most rows with which they come out as with `ROWS`, by dtype, measured on CPUs with and without AMX; None is any number."""
ROWS_IN_FP32 = 32
"""Rows whose 16-bit keys and values are converted at a time on a CPU."""


@dataclass(frozen=True)
class Slots:
    """Where a layer keeps the keys of image positions, and which of them each position reads.

    Image positions are counted in raster order from 0, whose input is the start of the image. `row`, `conv` and `full` keep
    as many of the last positions as may still be attended to, in a ring; `column` keeps all, column by column.
    """

    count: int
    """Positions held at a time."""
    written: tuple[int, ...]
    """The slot of each position."""
    runs: tuple[tuple[slice, ...], ...]
    """The slots that each position reads, its own among them, as runs of neighbours."""

    @functools.cached_property
    def reads(self) -> tuple[int, ...]:
        """How many slots each position reads."""
        return tuple(sum(run.stop - run.start for run in runs) for runs in self.runs)


@functools.lru_cache(maxsize=64)
def slots_of(kind: str, grid: int, kernel: int) -> Slots:
    """The slots of one attention kind; arguments as `attention_mask` takes them."""
    offsets = allowed_offsets(kind, grid, kernel).nonzero()[:, 0]
    positions = torch.arange(grid**2)
    count = grid**2 if kind == "column" else int(offsets[-1]) + 1
    written = positions % grid * grid + positions // grid if kind == "column" else positions % count
    return Slots(
        count,
        tuple(written.tolist()),
        tuple(_runs(written[position - offsets[offsets <= position]]) for position in range(grid**2)),
    )


def _runs(slots: Tensor) -> tuple[slice, ...]:
    slots = slots.sort().values
    breaks = ((slots.diff() != 1).nonzero()[:, 0] + 1).tolist()
    edges = [0, *breaks, len(slots)]
    return tuple(slice(int(slots[a]), int(slots[b - 1]) + 1) for a, b in itertools.pairwise(edges))


class Runs:
    """The window of a position that is known on the CPU: nothing else is read, and only where there are gaps is it copied.

    Keys and values lie in one tensor (2, rows, heads, slots, D).
    """

    bias: Tensor | None = None
    """(keys,) added to the scores of what is read; None adds nothing."""

    def __init__(self, slots: Slots, position: int) -> None:
        self.slot = slots.written[position]
        self.runs = slots.runs[position]

    def write(self, codes: Tensor, new: Tensor) -> None:
        """Put (2, rows, heads, D) into the position's slot."""
        codes.select(3, self.slot).copy_(new)

    def read(self, codes: Tensor) -> Tensor:
        """(2, rows, heads, keys, D), the keys and values that the position attends to."""
        parts = [codes.narrow(3, run.start, run.stop - run.start) for run in self.runs]
        return parts[0] if len(parts) == 1 else torch.cat(parts, dim=3)


class Table:
    """`Runs` of a position that is a tensor of shape (1,), by way of tables on its device.

    All positions read the same number of slots; those beyond what is allowed are masked, so they must hold finite numbers.
    """

    def __init__(self, tables: SlotTables, position: Tensor) -> None:
        self.slot = tables.written.index_select(0, position)
        self.slots = None if tables.read is None else tables.read.index_select(0, position)[0]
        self.bias: Tensor | None = tables.bias.index_select(0, position)[0]

    def write(self, codes: Tensor, new: Tensor) -> None:
        """As `Runs`."""
        codes.index_copy_(3, self.slot, new[:, :, :, None])

    def read(self, codes: Tensor) -> Tensor:
        """As `Runs`."""
        return codes if self.slots is None else codes.index_select(3, self.slots)


Window = Runs | Table
"""What one position writes to a layer's keys and values, and what it reads of them."""


class SlotTables:
    """`Slots` as tensors on a device: `written` (W²,), `read` (W², n) or None where every slot is read, `bias` (W², n)."""

    def __init__(self, slots: Slots, device: torch.device) -> None:
        most = max(slots.reads)
        everything = most == slots.count
        read = torch.zeros(len(slots.runs), most, dtype=torch.int64)
        bias = torch.full(read.shape, float("-inf"))
        for position, runs in enumerate(slots.runs):
            of_position = torch.cat([torch.arange(run.start, run.stop) for run in runs])
            read[position, : len(of_position)] = of_position
            bias[position, of_position if everything else slice(len(of_position))] = 0
        self.written = torch.tensor(slots.written, device=device)
        self.read = None if everything else read.to(device)
        self.bias = bias.to(device)


class Groups:
    """Which prompt each row of a batch continues.

    Rows of one prompt meet its text together, which reads the text's keys once for all of them. Each prompt gets the same
    number of rows, a multiple of `ROWS`; where it has not as many, some rows are computed twice.

    Args:
        prompt_of_row: (rows,), each in [0, prompts).
    """

    def __init__(self, prompt_of_row: tuple[int, ...], device: torch.device) -> None:
        self.count = max(prompt_of_row) + 1
        members: list[list[int]] = [[] for _ in range(self.count)]
        for row, prompt in enumerate(prompt_of_row):
            members[prompt].append(row)
        assert all(members), f"every prompt needs a row, found {prompt_of_row}"
        self._spread: Tensor | None = None
        size = -(-max(map(len, members)) // ROWS) * ROWS
        spread = [row for rows in members for row in [*rows, *[rows[0]] * (size - len(rows))]]
        if spread != list(range(len(prompt_of_row))):
            self._spread = torch.tensor(spread, device=device)
            first = {row: lane for lane, row in reversed(list(enumerate(spread)))}
            self._back = torch.tensor([first[row] for row in range(len(prompt_of_row))], device=device)

    def attend(self, queries: Tensor, text: Tensor, bias: Tensor | None) -> tuple[Tensor, Tensor]:
        """Attend to the text of each row's prompt: (rows, heads, D) output, (rows, heads) logarithms of what it sums.

        Args:
            queries: (rows, heads, D).
            text, bias: as `attend_to_cache` takes them.
        """
        if self._spread is not None:
            queries = queries.index_select(0, self._spread)
        rows, heads, depth = queries.shape
        grouped = queries.view(self.count, rows // self.count, heads, depth).transpose(1, 2)
        at_once = ROWS_ALIKE.get(queries.dtype, ROWS) if queries.device.type == "cpu" else None
        if at_once is None or grouped.shape[2] <= at_once:
            attended, total = _attend(grouped, text[0], text[1], bias)
        else:
            parts = [_attend(some, text[0], text[1], bias) for some in grouped.split(at_once, dim=2)]
            attended, total = (torch.cat(each, dim=2) for each in zip(*parts, strict=True))
        attended, total = attended.transpose(1, 2).flatten(0, 1), total.transpose(1, 2).flatten(0, 1)
        if self._spread is not None:
            return attended.index_select(0, self._back), total.index_select(0, self._back)
        return attended, total


def attend_to_cache(
    qkv: Tensor, text: Tensor, codes: Tensor, window: Window, groups: Groups, text_bias: Tensor | None
) -> Tensor:
    """Attend from one new position of every row, whose own key and value are put into `codes` first.

    Text and codes are attended to apart, and their outputs are mixed by the sums of exponentials that each was divided by:
    one softmax over both.

    Args:
        qkv: (rows, 3, heads, D), of the new position.
        text: (2, prompts, heads, T, D) keys and values of the prompts.
        codes: (2, rows, heads, slots, D) keys and values of earlier codes; changed.
        window: what the position writes and reads.
        text_bias: (prompts, 1, 1, T) added to the scores of text keys, or None.

    Returns:
        (rows, heads · D), in the dtype of qkv.
    """
    by_part = qkv.transpose(0, 1)
    window.write(codes, by_part[1:])
    of_text, text_total = groups.attend(by_part[0], text, text_bias)
    of_codes, codes_total = _attend_to_codes(by_part[0], codes, window)
    share = torch.sigmoid(codes_total - text_total)[..., None]
    return torch.lerp(of_text.float(), of_codes.float(), share).flatten(1).to(qkv.dtype)


def _attend_to_codes(queries: Tensor, codes: Tensor, window: Window) -> tuple[Tensor, Tensor]:
    """(rows, heads, D) queries, each to its row's codes: (rows, heads, D) output, (rows, heads) logarithms of what it sums."""
    if queries.device.type != "cpu" or queries.dtype.itemsize > 2:
        keys, values = window.read(codes)
        attended, total = _attend(queries[:, :, None], keys, values, window.bias)
        return attended[:, :, 0], total[:, :, 0]
    # One query a head is no matrix product: torch's attention takes three times as long in 16 bits as in 32, conversion
    # included, if what is converted stays in the cache.
    attended, total = torch.empty(queries.shape), torch.empty(queries.shape[:2])
    for first in range(0, len(queries), ROWS_IN_FP32):
        some = slice(first, first + ROWS_IN_FP32)
        keys, values = window.read(codes[:, some]).float()
        of_some, total_of_some = _attend(queries[some, :, None].float(), keys, values, window.bias)
        attended[some], total[some] = of_some[:, :, 0], total_of_some[:, :, 0]
    return attended, total


def _attend(queries: Tensor, keys: Tensor, values: Tensor, bias: Tensor | None) -> tuple[Tensor, Tensor]:
    """Attention in fp32 of (N, heads, n, D) queries to (N, heads, m, D): output, and (N, heads, n) log Σ exp of scores."""
    if queries.device.type == "cpu":
        if bias is not None:
            bias = bias.to(queries.dtype).expand(*queries.shape[:3], -1)
        attend = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu.default
        return attend(queries, keys, values, attn_mask=bias)
    return _attend_plainly(queries, keys, values, bias)


def _attend_plainly(queries: Tensor, keys: Tensor, values: Tensor, bias: Tensor | None) -> tuple[Tensor, Tensor]:
    """`_attend` in operations that a CUDA graph holds and that return log Σ exp on every device."""
    scores = _products(queries, keys) * queries.shape[-1] ** -0.5
    if bias is not None:
        scores = scores + bias
    total = scores.logsumexp(dim=-1)
    return (scores - total[..., None]).exp().to(values.dtype) @ values, total


def _products(queries: Tensor, keys: Tensor) -> Tensor:
    """(N, heads, n, m) fp32 products of (N, heads, n, D) and (N, heads, m, D): 16 bits are too few for scores."""
    if queries.device.type == "cuda" and queries.dtype.itemsize == 2 and "dtype" in torch.ops.aten.bmm.overloads():
        factors = queries.flatten(0, 1), keys.flatten(0, 1).transpose(1, 2)
        return torch.bmm(*factors, out_dtype=torch.float32).unflatten(0, queries.shape[:2])
    return queries.float() @ keys.float().transpose(-1, -2)


# --- the cache


@dataclass(frozen=True)
class LayerCache:
    """Keys and values (the first axis) of one layer."""

    slots: Slots
    """Which image position lies where in `codes`."""
    text: Tensor
    """(2, prompts, heads, T, D)."""
    codes: Tensor
    """(2, rows, heads, slots, D)."""

    def load(self, qkv: Tensor, text_len: int, prompt_of_row: Tensor) -> None:
        """Take over keys and values of whole sequences, one for each prompt.

        Args:
            qkv: (prompts, T + n, 3, heads, D), of all text positions and image positions 0 … n − 1.
            prompt_of_row: (rows,) int64.
        """
        both = qkv[:, :, 1:].permute(2, 0, 3, 1, 4)  # (2, prompts, heads, T + n, D)
        self.text.copy_(both[:, :, :, :text_len])
        slots = self._slots_of_last(both.shape[3] - text_len)
        last = both[:, :, :, both.shape[3] - len(slots) :].to(self.codes.dtype)
        self.codes.index_copy_(3, slots, last.index_select(1, prompt_of_row.to(last.device)))

    def load_prompt(self, prompt: int, rows: Sequence[int], prefix: LayerCache, positions: int) -> None:
        """Take over the one prompt of `prefix`, with its first image positions, for `rows` that continue it."""
        self.text[:, prompt] = prefix.text[:, 0]
        slots = self._slots_of_last(positions)
        codes = prefix.codes[:, 0].index_select(2, slots)
        for row in rows:
            self.codes[:, row].index_copy_(2, slots, codes)

    def _slots_of_last(self, positions: int) -> Tensor:
        """Slots of as many of the first `positions` image positions as are still held, in their order."""
        held = self.slots.written[max(0, positions - self.slots.count) : positions]
        return torch.tensor(held, device=self.codes.device)


class KVCache:
    """Keys and values of every layer, for rows that continue prompts.

    Args:
        config: shape of the model.
        prompt_of_row: the prompt that each row continues; prompts are numbered from 0, and each has a row.
        dtype: of keys and values.
        devices: where each layer's lie.
        heads: those that are computed here; None for all of the model's.
    """

    def __init__(
        self,
        config: DalleConfig,
        prompt_of_row: Sequence[int],
        dtype: torch.dtype,
        devices: Sequence[torch.device],
        heads: int | None = None,
    ) -> None:
        self.config = config
        self.prompt_of_row = tuple(prompt_of_row)
        self.prompts = max(self.prompt_of_row) + 1
        self.groups = {device: Groups(self.prompt_of_row, device) for device in set(devices)}
        self.kinds = configured_kinds(config)
        self.positions = 0
        """Image positions that have been filled by a prompt."""
        self.kept: Tensor | None = None
        """(prompts, T) bool, the text positions that may be attended to; None where all may."""
        self.text_bias: dict[torch.device, Tensor] = {}
        """(prompts, 1, 1, T) 0 or −∞ on each device, where padding may be masked; always the same tensors, as the rest is."""
        if config.mask_padding:
            self.text_bias = {
                device: torch.zeros(self.prompts, 1, 1, config.text_len, device=device) for device in self.groups
            }
        heads, rows = heads or config.heads, len(self.prompt_of_row)
        depth = config.width // config.heads
        self.layers = []
        for kind, device in zip(self.kinds, devices, strict=True):
            slots = slots_of(kind, config.grid, config.kernel)
            # Zeros, because a masked slot is still multiplied by 0.
            text = torch.zeros(2, self.prompts, heads, config.text_len, depth, dtype=dtype, device=device)
            codes = torch.zeros(2, rows, heads, slots.count, depth, dtype=dtype, device=device)
            self.layers.append(LayerCache(slots, text, codes))

    @property
    def rows(self) -> int:
        """Sequences that it holds."""
        return len(self.prompt_of_row)

    @property
    def nbytes(self) -> int:
        """Bytes of its buffers."""
        return sum(layer.text.nbytes + layer.codes.nbytes for layer in self.layers)

    def keep(self, kept: Tensor | None) -> None:
        """Attend to the text positions (prompts, T) only that are True; None allows all."""
        self.kept = kept
        for bias in self.text_bias.values():
            bias.zero_()
            if kept is not None:
                bias.masked_fill_(~kept[:, None, None].to(bias.device), float("-inf"))

    def load(self, prefixes: Sequence[KVCache]) -> None:
        """Start anew from prompts that were run through the model one at a time.

        Args:
            prefixes: one for each prompt, each with one row.
        """
        assert len(prefixes) == self.prompts, f"{self.prompts} prompts are needed, found {len(prefixes)}"
        assert len({prefix.positions for prefix in prefixes}) == 1, "prompts must be continued from the same position"
        self.positions = prefixes[0].positions
        kept = [prefix.kept for prefix in prefixes if prefix.kept is not None]
        self.keep(torch.cat(kept) if kept else None)
        for prompt, prefix in enumerate(prefixes):
            rows = [row for row, of_row in enumerate(self.prompt_of_row) if of_row == prompt]
            for ours, theirs in zip(self.layers, prefix.layers, strict=True):
                ours.load_prompt(prompt, rows, theirs, self.positions)


def bytes_per_prompt(config: DalleConfig, dtype: torch.dtype) -> int:
    """Bytes of a cache that each distinct prompt takes, all of which every step reads."""
    return 2 * config.depth * config.text_len * config.width * dtype.itemsize


def bytes_per_row(config: DalleConfig, dtype: torch.dtype, read_at: int | None = None) -> dict[str, int]:
    """Bytes of a cache that each row takes, by attention kind, over all layers of the kind.

    Args:
        read_at: count only what the step at this image position reads, its own code included.
    """
    found = {}
    for kind, layers in Counter(configured_kinds(config)).items():
        slots = slots_of(kind, config.grid, config.kernel)
        count = slots.count if read_at is None else slots.reads[read_at]
        found[kind] = layers * 2 * count * config.width * dtype.itemsize
    return found
