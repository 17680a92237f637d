"""The sparse kinds of attention beside dense attention: time, memory, and FLOPs against the machine's matrix products.

python benchmarks/attention.py --json attention.json
python benchmarks/attention.py --device cuda --dtype bf16 --preset dalle-12b --batch 8

Each kind is computed by our kernel for the device, and by PyTorch's attention under the kind's dense mask, which gives the
same result. `full` is PyTorch's causal attention: what the other kinds have to beat to be worth their masks.
"""

from __future__ import annotations

import json
import tempfile
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path
from typing import Any, Literal

import torch
from measure import (
    RATE_SECONDS,
    ShapeOptions,
    check_flags,
    median_seconds,
    read_bandwidth,
    shape,
    synchronize,
    with_precision,
)
from rich import print
from rich.box import SIMPLE_HEAD
from rich.table import Table
from torch import Tensor

from dalle_ds.allocator import keep_freed_memory
from dalle_ds.cli import parse_options, run_launcher
from dalle_ds.config import DalleConfig
from dalle_ds.models.flops import BACKWARD_PRODUCTS
from dalle_ds.nn.attention import attention_mask
from dalle_ds.nn.attention.blockwise import block_pairs, blockwise_attention
from dalle_ds.nn.attention.flex import Layout, Refused, flex_attention, flex_pairs
from dalle_ds.nn.attention.pattern import KERNELS, dense_attention
from dalle_ds.precision.choice import DTYPES, matmul_rate


@dataclass(frozen=True)
class Options:
    """Measure attention, forward and backward."""

    preset: str | None = None
    """Preset whose text, grid, heads and kernel are measured; those flags are then left alone."""
    text_len: int = 256
    """Text positions."""
    grids: tuple[int, ...] = (32, 64)
    """Image codes along each side, one measurement for each."""
    heads: int = 8
    """Attention heads."""
    head_size: int = 64
    """Width of a head."""
    kernel: int = 11
    """Side of the conv kind's kernel; odd."""
    batch: int = 2
    """Sequences."""
    dtype: Literal["auto", "fp32", "bf16"] = "auto"
    """Arithmetic; auto takes what the device computes fastest."""
    device: Literal["cpu", "cuda"] = "cpu"
    """Where to compute."""
    repeats: int = 5
    """Calls measured, after two that are not; figures are medians."""
    json: str | None = None
    """File that the figures are written to."""


@dataclass(frozen=True)
class Figures:
    """One kind, computed in one way."""

    sequence: int
    kind: str
    computed_by: str
    forward_seconds: float
    """Without gradients."""
    seconds: float
    """Forward and backward."""
    peak_memory_bytes: int
    """Of forward and backward together, results and gradients included, the inputs not."""
    needed_flops: int
    """Forward and backward, for the pairs that the mask allows."""
    executed_flops: int
    """Forward and backward, for all pairs that are computed."""
    fraction_of_matmul: float
    """Executed FLOP/s beside those of a plain matrix product."""
    needed_fraction_of_matmul: float
    """Needed FLOP/s beside those of a plain matrix product."""


def shapes(options: Options) -> Iterator[DalleConfig]:
    """A transformer of one layer for each sequence to measure."""
    if options.preset is not None:
        yield shape(ShapeOptions(preset=options.preset))
        return
    for grid in options.grids:
        width = options.heads * options.head_size
        fields = {"text_len": options.text_len, "grid": grid, "heads": options.heads, "kernel": options.kernel}
        yield DalleConfig(width=width, depth=1, **fields)


def ways(kind: str, config: DalleConfig, device: torch.device) -> Iterator[tuple[str, Callable[[Tensor], Tensor], int]]:
    """(name, function of qkv, query-key pairs that it computes) of each way to compute a kind."""
    pattern = {"kind": kind, "text_len": config.text_len, "grid": config.grid, "kernel": config.kernel}
    if kind == "full":
        yield "causal", dense_attention, config.total_len * (config.total_len + 1) // 2
        return
    if KERNELS[device.type] == "blockwise":
        pairs = block_pairs(**pattern, length=config.total_len)
        yield "blockwise", partial(blockwise_attention, keep=None, **pattern), pairs
    else:
        yield "flex", partial(flex_attention, keep=None, **pattern), flex_pairs(Layout(**pattern), False)
    yield "masked", partial(dense_attention, mask=attention_mask(**pattern).to(device)), config.total_len**2


def extra_memory(function: Callable[[], Any], device: torch.device) -> int:
    """Most bytes of tensors that a call has at a time, beyond those that exist before it."""
    if device.type == "cuda":
        synchronize(device)
        before = torch.cuda.memory_allocated(device)
        torch.cuda.reset_peak_memory_stats(device)
        function()
        synchronize(device)
        return torch.cuda.max_memory_allocated(device) - before
    with torch.profiler.profile(profile_memory=True) as profile:
        function()
    with tempfile.TemporaryDirectory() as folder:
        trace = Path(folder) / "trace.json"
        profile.export_chrome_trace(str(trace))
        events = json.loads(trace.read_text())["traceEvents"]
    held = most = 0
    for event in sorted((event for event in events if event.get("name") == "[memory]"), key=lambda event: event["ts"]):
        held += event["args"]["Bytes"]
        most = max(most, held)
    return most


def measure(options: Options, rate: float) -> Iterator[Figures]:
    """The figures, one after another, given the FLOP/s of matrix products."""
    device = torch.device(options.device)
    for config in shapes(options):
        length, depth = config.total_len, config.width // config.heads
        torch.manual_seed(0)
        qkv = torch.randn(options.batch, length, 3, config.heads, depth, device=device).to(DTYPES[options.dtype])
        gradient = torch.randn(options.batch, length, config.width, device=device).to(qkv.dtype)
        for kind in ("row", "column", "conv", "full"):
            allowed = int(attention_mask(kind, config.text_len, config.grid, config.kernel).sum())
            for name, attend, pairs in ways(kind, config, device):
                forward = partial(_forward, attend, qkv)
                both = partial(_forward_backward, attend, qkv, gradient)
                try:
                    forward_seconds = median_seconds(forward, options.repeats, device)
                    seconds = median_seconds(both, options.repeats, device)
                except Refused as refusal:
                    print(f"{kind}, {name}: {refusal}")
                    continue
                product = 2 * options.batch * config.width  # FLOPs per pair
                needed = 6 * product * allowed
                executed = (2 + BACKWARD_PRODUCTS[name]) * product * pairs
                yield Figures(
                    sequence=length,
                    kind=kind,
                    computed_by=name,
                    forward_seconds=forward_seconds,
                    seconds=seconds,
                    peak_memory_bytes=extra_memory(both, device),
                    needed_flops=needed,
                    executed_flops=executed,
                    fraction_of_matmul=executed / seconds / rate,
                    needed_fraction_of_matmul=needed / seconds / rate,
                )


def _forward(attend: Callable[[Tensor], Tensor], qkv: Tensor) -> None:
    with torch.no_grad():
        attend(qkv)


def _forward_backward(attend: Callable[[Tensor], Tensor], qkv: Tensor, gradient: Tensor) -> None:
    qkv = qkv.detach().requires_grad_()
    torch.autograd.grad(attend(qkv), qkv, gradient)


def show(rows: list[Figures], title: str) -> None:
    """A table on the screen."""
    columns = ("n", "kind", "kernel", "fwd ms", "+ bwd ms", "MB", "GFLOP", "needed", "of matmul")
    table = Table(*columns, title=title, box=SIMPLE_HEAD, padding=(0, 1, 0, 0))
    for row in rows:
        milliseconds = (f"{1e3 * seconds:.1f}" for seconds in (row.forward_seconds, row.seconds))
        gigaflops = (f"{flops / 1e9:.1f}" for flops in (row.executed_flops, row.needed_flops))
        memory, fraction = f"{row.peak_memory_bytes / 1e6:.0f}", f"{row.fraction_of_matmul:.0%}"
        table.add_row(str(row.sequence), row.kind, row.computed_by, *milliseconds, memory, *gigaflops, fraction)
    print(table)


def main() -> None:
    """Measure, show, write."""
    options = parse_options(Options)
    device = torch.device(options.device)
    check_flags(options, "batch", "repeats", "heads", "head_size")
    if device.type == "cpu":
        keep_freed_memory()
    options = with_precision(options)
    rate = matmul_rate(DTYPES[options.dtype], device, RATE_SECONDS)
    bandwidth = read_bandwidth(device)
    rows = list(measure(options, rate))
    rates = f"matrix products at {rate / 1e9:,.0f} GFLOP/s, memory read at {bandwidth / 1e9:,.0f} GB/s"
    show(rows, f"{options.device}, {options.dtype}, batch {options.batch}, {rates}")
    if options.json is not None:
        figures = {
            "matmul_flops_per_second": rate,
            "read_bytes_per_second": bandwidth,
            "rows": [asdict(row) for row in rows],
        }
        Path(options.json).write_text(json.dumps(figures, indent=2) + "\n")


if __name__ == "__main__":
    run_launcher(main)
