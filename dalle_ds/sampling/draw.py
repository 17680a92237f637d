"""From logits to the next code: guidance, temperature, top-k, top-p, and one draw from what is left."""

from __future__ import annotations

import hashlib
import math
from dataclasses import dataclass

import torch
from torch import Tensor

from dalle_ds.errors import ConfigError


@dataclass(frozen=True)
class Sampling:
    """How codes are drawn. The defaults draw from the model's distribution as it is (DALL·E §2.6)."""

    temperature: float = 1.0
    """The logits are divided by it; 0 takes the likeliest code always."""
    top_k: int | None = None
    """Draw among the k likeliest codes only."""
    top_p: float | None = None
    """Draw among the fewest likeliest codes that have this probability together, after temperature and top_k."""
    guidance: float = 1.0
    """Classifier-free guidance g: logits = unconditional + g · (conditional − unconditional). 1 is off."""

    def __post_init__(self) -> None:
        if not (math.isfinite(self.temperature) and self.temperature >= 0):
            raise ConfigError(f"temperature must be 0 (the likeliest code always) or greater, found {self.temperature}")
        if self.top_k is not None and self.top_k < 1:
            raise ConfigError(f"top_k must be at least 1, or left out to allow every code, found {self.top_k}")
        if self.top_p is not None and not 0 < self.top_p <= 1:
            raise ConfigError(f"top_p must lie in (0, 1], or be left out to allow every code, found {self.top_p}")
        if not (math.isfinite(self.guidance) and self.guidance >= 0):
            raise ConfigError(f"guidance must be 0 (ignore the prompt), 1 (off) or greater, found {self.guidance}")


def guide(conditional: Tensor, unconditional: Tensor, guidance: float) -> Tensor:
    """Logits of classifier-free guidance, of the shape of both arguments."""
    return unconditional + guidance * (conditional - unconditional)


def keep_top_k(logits: Tensor, top_k: int) -> Tensor:
    """(B, V) logits with all but the `top_k` greatest of each row at −∞; ties with the last of them stay."""
    smallest_kept = logits.topk(min(top_k, logits.shape[-1])).values[:, -1:]
    return logits.masked_fill(logits < smallest_kept, float("-inf"))


def keep_top_p(logits: Tensor, top_p: float) -> Tensor:
    """(B, V) logits with all at −∞ but the fewest greatest of each row whose probabilities sum to `top_p` or more."""
    descending, order = logits.sort(dim=-1, descending=True, stable=True)
    probabilities = descending.softmax(dim=-1)
    before = probabilities.cumsum(dim=-1) - probabilities  # 0 for the greatest, which therefore stays
    dropped = before >= top_p
    return logits.masked_fill(torch.zeros_like(dropped).scatter(-1, order, dropped), float("-inf"))


def draw(logits: Tensor, uniforms: Tensor, sampling: Sampling) -> Tensor:
    """One code per row, decided by the row's logits and its uniform number alone.

    Args:
        logits: (B, V) fp32 or fp64, after guidance; where they are NaN, any code may come out.
        uniforms: (B,) float64 in [0, 1).

    Returns:
        (B,) int64.
    """
    if sampling.temperature < torch.finfo(logits.dtype).tiny:  # 0, or would be taken for it
        return logits.argmax(dim=-1)
    if sampling.temperature != 1:
        # The greatest becomes 0, so that a low temperature does not make it infinite.
        logits = (logits - logits.amax(dim=-1, keepdim=True)) / sampling.temperature
    if sampling.top_k is not None:
        logits = keep_top_k(logits, sampling.top_k)
    if sampling.top_p is not None:
        logits = keep_top_p(logits, sampling.top_p)
    cumulative = logits.softmax(dim=-1).cumsum(dim=-1, dtype=torch.float64)
    total = cumulative[:, -1:]
    # Below the total even where the product rounds up to it, so that the code found has a probability above 0.
    target = torch.minimum(uniforms[:, None] * total, torch.nextafter(total, torch.zeros_like(total)))
    return torch.searchsorted(cumulative, target, right=True)[:, 0].clamp(max=logits.shape[-1] - 1)


def candidate_uniforms(tokens: tuple[int, ...], seed: int, candidate: int, count: int) -> Tensor:
    """The uniform numbers that decide image `candidate` of a caption under `seed`: (count,) float64 on the CPU."""
    digest = hashlib.sha256(repr((seed, candidate, tokens)).encode()).digest()
    generator = torch.Generator().manual_seed(int.from_bytes(digest[:8], "little") >> 1)
    return torch.rand(count, dtype=torch.float64, generator=generator)
