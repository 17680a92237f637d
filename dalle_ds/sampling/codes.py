"""Drawing image codes for captions, and the likelihood of codes under captions.

A picture is a function of (seed, its number, its caption): its random numbers are drawn ahead on the CPU, and nothing
that it shares a batch with may reach it. The second part needs care. A matrix multiplication with 1 row and one with 8
add up in different orders, the logits differ in their last bits, and sooner or later a code falls on the other side of
an edge. So the transformer always decodes `ROWS` rows, or a multiple of it, and rows without a picture are computed and
dropped. All batch sizes up to `ROWS` are thereby one and the same computation. Beyond that the multiples have to give
the same bits: measured so on CPUs with one to four threads, unknown elsewhere.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from dalle_ds.config import PADDING
from dalle_ds.errors import ConfigError, DataError
from dalle_ds.models.cache import KVCache
from dalle_ds.models.dalle import Dalle
from dalle_ds.sampling.draw import Sampling, candidate_uniforms, draw, guide

ROWS = 8
"""Sequences per decoding step are rounded up to a multiple of this."""


@dataclass(frozen=True)
class Progress:
    """Pictures in the making, given out whenever a row of codes of them is complete."""

    pictures: tuple[tuple[int, int], ...]
    """(caption, candidate) indices of each."""
    codes: Tensor
    """(pictures, codes so far) int64."""


class _Prefixes:
    """Captions run through the transformer, one at a time: each once for as long as consecutive batches ask for it."""

    def __init__(self, model: Dalle) -> None:
        self.model = model
        self.kept: dict[tuple[int, ...], tuple[KVCache, Tensor]] = {}

    def batch(self, captions: Sequence[tuple[int, ...]]) -> tuple[KVCache, Tensor]:
        """A cache that starts with `captions`, and (captions, image_vocab) logits of code 0."""
        self.kept = {caption: self.kept.get(caption) or self._prefill(caption) for caption in dict.fromkeys(captions)}
        cache = self.model.new_cache(len(captions))
        for row, caption in enumerate(captions):
            cache.load_row(row, self.kept[caption][0])
        return cache, torch.cat([self.kept[caption][1] for caption in captions])

    def _prefill(self, caption: tuple[int, ...]) -> tuple[KVCache, Tensor]:
        cache = self.model.new_cache(1, capacity=self.model.config.text_len + 1)
        text = torch.tensor([caption], device=cache.layers[0].keys.device)
        return cache, self.model.prefill(text, cache)


@torch.no_grad()
def sample_codes(
    model: Dalle,
    text: Tensor,
    *,
    num: int = 1,
    sampling: Sampling | None = None,
    seed: int = 0,
    batch_size: int = ROWS,
    on_row: Callable[[Progress], None] | None = None,
) -> Tensor:
    """Draw the codes of `num` pictures for every caption.

    Args:
        text: (B, T) int64, −1 where padded; never modified.
        sampling: temperature and the like; None draws from the model's distribution as it is.
        seed: picture i of a caption depends on the seed, i and the caption's tokens only.
        batch_size: pictures drawn at once; rounded up to a multiple of 8 rows of memory and arithmetic.
        on_row: called whenever a row of codes of the pictures in the making is complete.

    Returns:
        (B, num, W²) int64 on the CPU.

    Raises:
        ConfigError: num or batch_size below 1.
        DataError: text of the wrong shape, dtype or range.
    """
    sampling = sampling if sampling is not None else Sampling()
    for name, value in (("num", num), ("batch_size", batch_size)):
        if value < 1:
            raise ConfigError(f"{name} must be at least 1, found {value}")
    if text.dim() != 2 or text.shape[1] != model.config.text_len:
        raise DataError(f"text must have shape (B, {model.config.text_len}), found {tuple(text.shape)}")
    captions = [tuple(row) for row in text.tolist()]
    pictures = [(caption, candidate) for caption in range(len(captions)) for candidate in range(num)]
    conditional = _Prefixes(model)
    unconditional = _Prefixes(model) if sampling.guidance != 1 else None
    rows = -(-batch_size // ROWS) * ROWS
    drawn = [torch.empty(0, model.config.image_len, dtype=torch.int64)]
    for start in range(0, len(pictures), batch_size):
        batch = tuple(pictures[start : start + batch_size])
        filled = [*batch, *[batch[0]] * (rows - len(batch))]
        streams = [conditional.batch([captions[caption] for caption, _ in filled])]
        if unconditional is not None:
            streams.append(unconditional.batch([(PADDING,) * text.shape[1]] * rows))
        uniforms = torch.stack(
            [candidate_uniforms(captions[caption], seed, number, model.config.image_len) for caption, number in filled]
        )
        drawn.append(_draw_batch(model, streams, uniforms, sampling, batch, on_row))
    return torch.cat(drawn).view(len(captions), num, model.config.image_len)


def _draw_batch(
    model: Dalle,
    streams: list[tuple[KVCache, Tensor]],
    uniforms: Tensor,
    sampling: Sampling,
    pictures: tuple[tuple[int, int], ...],
    on_row: Callable[[Progress], None] | None,
) -> Tensor:
    """Codes (pictures, W²) of one batch.

    Args:
        streams: cache and logits of code 0 under the captions, and with guidance another pair under the empty caption.
        uniforms: (rows, W²); rows beyond the pictures are computed and dropped.
    """
    config = model.config
    logits = [first for _, first in streams]
    uniforms = uniforms.to(logits[0].device)
    codes = torch.empty(uniforms.shape, dtype=torch.int64, device=uniforms.device)
    for step in range(config.image_len):
        if step > 0:
            logits = [model.decode(codes[:, step - 1], step - 1, cache) for cache, _ in streams]
        mixed = logits[0] if len(logits) == 1 else guide(logits[0], logits[1], sampling.guidance)
        codes[:, step] = draw(mixed, uniforms[:, step], sampling)
        if on_row is not None and (step + 1) % config.grid == 0:
            on_row(Progress(pictures, codes[: len(pictures), : step + 1].cpu()))
    return codes[: len(pictures)].cpu()


@torch.no_grad()
def score(model: Dalle, text: Tensor, codes: Tensor) -> Tensor:
    """log p(codes | text) of every row, in nats per picture.

    Args:
        text: (B, T) int64, −1 where padded.
        codes: (B, W²) int64.

    Returns:
        (B,) float64.
    """
    log_probabilities = model(text, codes).image_logits.double().log_softmax(dim=-1)
    return log_probabilities.gather(-1, codes[..., None])[..., 0].sum(dim=-1)
