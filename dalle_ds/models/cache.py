"""The key-value cache of incremental decoding: static buffers that hold of each layer what its attention kind needs.

Text keys and values lie there once for each distinct prompt, whatever the number of images drawn from it.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from dalle_ds.config import DalleConfig
from dalle_ds.nn.attention.decoding import Groups, Slots, slots_of
from dalle_ds.nn.attention.masks import configured_kinds


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


def bytes_per_row(config: DalleConfig, dtype: torch.dtype) -> dict[str, int]:
    """Bytes of a cache that each row takes, by attention kind, over all layers of the kind."""
    return {
        kind: layers * 2 * slots_of(kind, config.grid, config.kernel).count * config.width * dtype.itemsize
        for kind, layers in Counter(configured_kinds(config)).items()
    }


def bytes_read_per_row(config: DalleConfig, dtype: torch.dtype, position: int) -> dict[str, int]:
    """Bytes of a row's codes that the step at image position `position` reads, its own included, by attention kind."""
    return {
        kind: layers * 2 * slots_of(kind, config.grid, config.kernel).reads[position] * config.width * dtype.itemsize
        for kind, layers in Counter(configured_kinds(config)).items()
    }
