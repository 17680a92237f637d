"""Which precision a device computes fastest, measured: what `auto` chooses, and what is said of a slow one asked for."""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass
from functools import cache
from typing import TYPE_CHECKING, Any, Literal

import torch
from torch import Tensor

from dalle_ds.config import Precision

if TYPE_CHECKING:
    from dalle_ds.parallel import Mesh

DTYPES: dict[str, torch.dtype] = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}
SECONDS = 0.1
"""What measuring a precision may take; a choice is between two."""
REPEATS = 3
"""Products that are timed at once, of which the fastest counts."""
SMALLEST, LARGEST = 64, {"cpu": 2048, "cuda": 8192}
"""Rows and columns of the matrices: the smallest takes a millisecond at 0.5 GFLOP/s."""


@dataclass(frozen=True)
class Choice:
    """A precision that nobody stated."""

    precision: Precision
    why: str
    """What it was chosen by, in words."""

    def __str__(self) -> str:
        return f"precision {self.precision}: {self.why}"


def matmul_rate(dtype: torch.dtype, device: torch.device, seconds: float = SECONDS) -> float:
    """Highest FLOP/s seen of square matrix products: of small matrices first, then of ever larger ones while time lasts.

    Args:
        seconds: how long to measure; at 0.1 GFLOP/s, where the smallest product takes 5 ms, the same.
    """
    began = time.perf_counter()
    size, best = SMALLEST, 0.0
    left = right = _matrix(size, dtype, device)
    _product_seconds(left, right)  # sets up what the first product needs
    while True:
        # The best of some: others tell of whatever else the host does at the moment.
        taken = min(_product_seconds(left, right) for _ in range(REPEATS))
        best = max(best, 2 * size**3 / taken)
        remaining = seconds - (time.perf_counter() - began)
        # Of the next size, one product that sets up, those that count, and as long to make the matrix.
        if size < LARGEST[device.type] and (2 + REPEATS) * 8 * taken < remaining:
            size *= 2
            left = right = _matrix(size, dtype, device)
            _product_seconds(left, right)
        elif REPEATS * taken > remaining:
            return best


def choose(device: torch.device) -> Choice:
    """On a GPU bf16, where it has units for it; on a CPU whichever of bf16 and fp32 is faster."""
    if device.type == "cuda":
        if torch.cuda.is_bf16_supported(including_emulation=False):
            return Choice("bf16", "the GPU has units for it")
        return Choice("fp32", "the GPU has no units for bf16")
    fastest: Precision = "bf16" if _rate("bf16") > _rate("fp32") else "fp32"
    return Choice(fastest, f"measured {_measured('fp32', 'bf16')}")


def slow_warning(precision: Precision, device: torch.device) -> str | None:
    """What to tell who has asked for a 16-bit precision in which this CPU is slower than in fp32; None where it is not."""
    if device.type != "cpu" or precision == "fp32" or _rate(precision) >= _rate("fp32"):
        return None
    return f"{precision} is slow on this CPU, and fp32 would be faster: {_measured('fp32', precision)}"


def choose_precision(
    asked: str, mesh: Mesh, kept: Callable[[], Choice | None] = lambda: None
) -> Literal["fp32", "bf16"]:
    """The precision of a command that was asked for one, or for "auto". The main process decides, and tells the user of a
    choice and of a slow one. Collective.

    Args:
        kept: what "auto" was before, for a command that goes on with something; None where there is nothing.
    """
    choice = mesh.decide(lambda: kept() or choose(mesh.device)) if asked == "auto" else None
    precision: Any = asked if choice is None else choice.precision
    if mesh.is_main:
        slow = slow_warning(precision, mesh.device)
        for line in filter(None, (choice and str(choice), slow and f"warning: {slow}")):
            print(line)
    return precision


@cache
def _rate(precision: Precision) -> float:
    """FLOP/s of one of this CPU's threads, measured once in a process.

    Several threads wait for each other; on a busy machine a product of a tenth of a second's size then tells of the other
    programs. Which precision is faster is the same on one thread.
    """
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        return matmul_rate(DTYPES[precision], torch.device("cpu"))
    finally:
        torch.set_num_threads(threads)


def rate_text(precision: str, rate: float) -> str:
    """A rate in words, to three digits."""
    gigaflops = rate / 1e9
    return f"{gigaflops:,.0f} GFLOP/s in {precision}" if gigaflops >= 100 else f"{gigaflops:.3g} GFLOP/s in {precision}"


def _measured(*precisions: Precision) -> str:
    return " and ".join(rate_text(name, _rate(name)) for name in precisions) + ", on one thread"


def _matrix(size: int, dtype: torch.dtype, device: torch.device) -> Tensor:
    # Not from the generator that training uses; not zeros, whose products take GPUs less power and time.
    return torch.linspace(-1, 1, size * size, device=device).view(size, size).to(dtype)


@torch.no_grad()
def _product_seconds(left: Tensor, right: Tensor) -> float:
    """Seconds of one product."""
    if left.is_cuda:
        torch.cuda.synchronize(left.device)
    began = time.perf_counter()
    torch.matmul(left, right)
    if left.is_cuda:
        torch.cuda.synchronize(left.device)
    return time.perf_counter() - began
