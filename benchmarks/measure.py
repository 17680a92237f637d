"""What the benchmarks measure with: the machine's own rates, time and memory, and the shapes that they share."""

from __future__ import annotations

import resource
import statistics
import time
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch

from dalle_ds.config import DalleConfig, TransformerRun, load_preset
from dalle_ds.errors import ConfigError
from dalle_ds.parallel import Mesh
from dalle_ds.precision.choice import choose_precision

RATE_SECONDS = 2.0
"""How long a rate is measured that figures are held against."""


@dataclass(frozen=True)
class ShapeOptions:
    """Shape of a transformer: a preset's, or the one that the flags give."""

    preset: str | None = None
    """Preset whose transformer is measured; the flags of shape are then left alone."""
    width: int = 512
    """d_model."""
    depth: int = 8
    """Attention layers, each followed by an MLP."""
    heads: int = 8
    """Attention heads."""
    text_len: int = 256
    """Text positions."""
    grid: int = 32
    """Image codes along each side."""
    text_vocab: int = 16384
    """Text vocabulary."""
    image_vocab: int = 8192
    """Image vocabulary."""


def shape(options: ShapeOptions) -> DalleConfig:
    """The transformer that `options` describe."""
    if options.preset is not None:
        return load_preset(options.preset, "transformer", TransformerRun).model
    fields = ("width", "depth", "heads", "text_len", "grid", "text_vocab", "image_vocab")
    return DalleConfig(**{name: getattr(options, name) for name in fields})


def check_flags(options: Any, *counts: str) -> None:
    """Refuse, before anything is measured, what would fail after it.

    Args:
        options: with `device`, `json`, and the fields named `counts`.

    Raises:
        ConfigError: names the flag.
    """
    for name in counts:
        if getattr(options, name) < 1:
            raise ConfigError(f"--{name} must be at least 1, found {getattr(options, name)}")
    if options.device == "cuda" and not torch.cuda.is_available():
        raise ConfigError("--device cuda was asked for, but PyTorch finds no GPU here: use --device cpu")
    if options.json is not None and (Path(options.json).is_dir() or not Path(options.json).parent.is_dir()):
        raise ConfigError(f"--json must be a file in a folder that exists, found {options.json}")


def synchronize(device: torch.device) -> None:
    """Wait for what the device was told to do."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def median_seconds(function: Callable[[], Any], repeats: int, device: torch.device, warmup: int = 2) -> float:
    """Median time of a call, in seconds."""
    return statistics.median(seconds(function, repeats, device, warmup))


def seconds(function: Callable[[], Any], repeats: int, device: torch.device, warmup: int = 2) -> list[float]:
    """Times of `repeats` calls, after some that are not counted."""
    for _ in range(warmup):
        function()
    taken = []
    for _ in range(repeats):
        synchronize(device)
        start = time.perf_counter()
        function()
        synchronize(device)
        taken.append(time.perf_counter() - start)
    return taken


def with_precision(options: Any) -> Any:
    """The options with a precision for `dtype`, where it is "auto"; `device` is what they compute on."""
    return replace(options, dtype=choose_precision(options.dtype, Mesh(0, 1, torch.device(options.device))))


def read_bandwidth(device: torch.device) -> float:
    """Most bytes per second at which memory is read, from an array too large for any cache."""
    numbers = torch.ones(2**30 if device.type == "cuda" else 2**27, device=device)
    return numbers.nbytes / min(seconds(numbers.sum, 7, device))


def forget_peak_memory(device: torch.device) -> None:
    """Let `peak_memory` count from here on, where that can be done: on a GPU."""
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats(device)


def peak_memory(device: torch.device) -> int:
    """Most bytes in use so far: on a GPU those of tensors, on a CPU those of the whole process."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device)
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
