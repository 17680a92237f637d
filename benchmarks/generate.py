"""How fast image codes are drawn, beside what reading memory and multiplying matrices allow on the same machine.

python benchmarks/generate.py --batch 32 --dtype bf16 --json generate.json
python benchmarks/generate.py --batch 512 --dtype bf16 --tokens 8      # in batches that fit, as images are drawn
python benchmarks/generate.py --batch 1 --no_cache_tokens 3             # beside computing the whole sequence for each code
python benchmarks/generate.py --device cuda --preset dalle-12b --dtype bf16 --batch 64
"""

from __future__ import annotations

import json
import statistics
import time
from collections import Counter
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import torch
from measure import (
    RATE_SECONDS,
    ShapeOptions,
    check_flags,
    forget_peak_memory,
    median_seconds,
    peak_memory,
    read_bandwidth,
    shape,
    synchronize,
    with_precision,
)
from rich import print
from rich.table import Table

from dalle_ds.allocator import keep_freed_memory
from dalle_ds.cli import parse_options, run_launcher
from dalle_ds.config import DalleConfig
from dalle_ds.errors import ConfigError
from dalle_ds.models.dalle import Dalle
from dalle_ds.models.decoding import DecodingWeights, bytes_per_step, new_cache, prefill
from dalle_ds.models.flops import decoding_flops
from dalle_ds.nn.attention.decoding import ROWS
from dalle_ds.precision.choice import DTYPES, matmul_rate
from dalle_ds.sampling.codes import Sampling, even_batches, images_at_once, sample

WARMUP = 3
"""Steps before those that are measured."""


@dataclass(frozen=True)
class Options(ShapeOptions):
    """Measure the drawing of image codes."""

    batch: int = 1
    """Images of each prompt."""
    prompts: int = 1
    """Distinct prompts."""
    tokens: int = 64
    """Codes measured, spread evenly over the image."""
    dtype: Literal["auto", "fp32", "bf16"] = "auto"
    """Of the blocks' weights; auto takes what the device computes fastest."""
    device: Literal["cpu", "cuda"] = "cpu"
    """Where to compute."""
    no_cache_tokens: int = 0
    """Codes that are also drawn without a cache, for comparison."""
    json: str | None = None
    """File that the figures are written to."""


def main() -> None:
    """Measure, show, write."""
    options = parse_options(Options)
    check_flags(options, "batch", "prompts", "tokens")
    if options.no_cache_tokens < 0:
        raise ConfigError(f"--no_cache_tokens must be 0 or more, found {options.no_cache_tokens}")
    if options.device == "cpu":
        keep_freed_memory()
    options = with_precision(options)
    figures = measure(options)
    table = Table("figure", "value", title=f"{options.dtype}, {options.device}, bound by {figures['bound']}")
    for name, value in figures.items():
        table.add_row(name, f"{value:,.4g}" if isinstance(value, float) else str(value))
    print(table)
    if options.json is not None:
        Path(options.json).write_text(json.dumps(figures, indent=2) + "\n")


@torch.no_grad()
def measure(options: Options) -> dict[str, Any]:
    """All figures, by name; the machine's rates are measured in the same run."""
    device, dtype, config = torch.device(options.device), DTYPES[options.dtype], shape(options)
    if config.image_len < 2:
        raise ConfigError("an image of one code takes no step of decoding: set grid to 2 or more")
    torch.manual_seed(0)
    torch.set_default_dtype(dtype)  # so that no fp32 model exists before
    with device:
        model = Dalle(config).eval()
    torch.set_default_dtype(torch.float32)
    forget_peak_memory(device)
    prompts = [picture // options.batch for picture in range(options.batch * options.prompts)]
    # As `sample_codes` does, in batches that fit.
    size = even_batches(len(prompts), images_at_once(model, options.batch, guided=False))
    batches = [prompts[start : start + size] for start in range(0, len(prompts), size)]
    measured = [decode(model, batch, size, options.tokens) for batch in batches]
    seconds, drawing = (sum(each) for each in zip(*measured, strict=True))
    # Of decoding: the machine's own rates take memory too.
    peak = peak_memory(device)
    bandwidth, rate = read_bandwidth(device), matmul_rate(dtype, device, RATE_SECONDS)
    rows = [filled(size)] * len(batches)
    read = read_by_step(config, dtype, rows, [len(set(batch)) for batch in batches], options.tokens)
    measured_at = positions(config, options.tokens)
    flops = sum(rows) * sum(decoding_flops(config, position) for position in measured_at) / len(measured_at)
    by_memory, by_arithmetic = sum(read.values()) / bandwidth, flops / rate
    figures: dict[str, Any] = {
        "seconds_per_token": seconds,
        "seconds_per_token_in_draw": drawing,
        "tokens_per_second": len(prompts) / seconds,
        "tokens_measured": len(measured_at),
        "batches": len(batches),
        "bytes_per_step": sum(read.values()),
        **{f"bytes_per_step_{name}": count for name, count in read.items()},
        "bandwidth_bytes_per_second": bandwidth,
        "seconds_bound_by_bandwidth": by_memory,
        "fraction_of_bandwidth": by_memory / seconds,
        "flops_per_step": flops,
        "matmul_flops_per_second": rate,
        "seconds_bound_by_arithmetic": by_arithmetic,
        "bound": "bandwidth" if by_memory > by_arithmetic else "arithmetic",
        "fraction_of_bound": max(by_memory, by_arithmetic) / seconds,
        "peak_memory_bytes": peak,
    }
    if options.no_cache_tokens > 0:
        without = decode_without_cache(model, len(prompts), options.no_cache_tokens)
        figures |= {"seconds_per_token_without_cache": without, "times_faster_than_without_cache": without / seconds}
    return figures


def positions(config: DalleConfig, tokens: int) -> list[int]:
    """Image positions of the measured steps, spread evenly over the image."""
    count = min(tokens, config.image_len - 1)
    return [1 + index * (config.image_len - 1) // count for index in range(count)]


def filled(pictures: int) -> int:
    """Rows of a step, those that only fill up included."""
    return -(-pictures // ROWS) * ROWS


def read_by_step(
    config: DalleConfig, dtype: torch.dtype, rows: list[int], prompts: list[int], tokens: int
) -> dict[str, float]:
    """Bytes that a step of all batches has to read, by what is read; the mean over the measured positions."""
    total: Counter[str] = Counter()
    measured = positions(config, tokens)
    for batch_rows, batch_prompts in zip(rows, prompts, strict=True):
        for position in measured:
            total.update(bytes_per_step(config, dtype, rows=batch_rows, prompts=batch_prompts, position=position))
    return {name: count / len(measured) for name, count in total.items()}


def decode(model: Dalle, prompts: list[int], size: int, tokens: int) -> tuple[float, float]:
    """Median seconds of a step with its draw, and of the draw alone.

    A step takes as long whatever was decoded before it, so those between the measured ones are left out.

    Args:
        prompts: the prompt of each image.
        size: images that there is room for.
    """
    config, device = model.config, model.image_head.weight.device
    weights = DecodingWeights(model)
    numbers = {prompt: number for number, prompt in enumerate(dict.fromkeys(prompts))}
    cache = new_cache(model, [numbers[prompt] for prompt in prompts] + [0] * (filled(size) - len(prompts)))
    text = torch.randint(0, config.text_vocab, (1, config.text_len), device=device)
    prefix = new_cache(model, 1)
    prefill(model, text, prefix)
    cache.load([prefix] * len(numbers))
    codes = torch.zeros(cache.rows, dtype=torch.int64, device=device)
    uniforms = torch.rand(len(prompts), dtype=torch.float64, device=device)
    measured = positions(config, tokens)
    taken, drawing = [], []
    for position in measured[:1] * WARMUP + measured:
        synchronize(device)
        start = time.perf_counter()
        logits = weights.step(codes, position - 1, cache)
        synchronize(device)
        between = time.perf_counter()
        codes[: len(prompts)] = sample(logits[: len(prompts)], uniforms, Sampling())
        synchronize(device)
        end = time.perf_counter()
        taken.append(end - start)
        drawing.append(end - between)
    return statistics.median(taken[WARMUP:]), statistics.median(drawing[WARMUP:])


def decode_without_cache(model: Dalle, pictures: int, tokens: int) -> float:
    """Median seconds of a step that computes the whole sequence anew, as far as the middle of the image."""
    config, device = model.config, model.image_head.weight.device
    text = torch.randint(0, config.text_vocab, (pictures, config.text_len), device=device)
    codes = torch.zeros(pictures, config.image_len // 2, dtype=torch.int64, device=device)
    cache = new_cache(model, pictures)
    return median_seconds(lambda: prefill(model, text, cache, codes), tokens, device, warmup=1)


if __name__ == "__main__":
    run_launcher(main)
