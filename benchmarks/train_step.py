"""One training step of the transformer, beside what the machine could do: time, FLOP/s, memory.

python benchmarks/train_step.py --dtype bf16 --json step.json
python benchmarks/train_step.py --dtype bf16 --model dense          # the same shape without this project
python benchmarks/train_step.py --deepspeed_config ds_configs/zero1_bf16.json
python benchmarks/train_step.py --device cuda --width 3968 --heads 62 --depth 16 --batch 8 --blocks_only True
"""

from __future__ import annotations

import json
import statistics
import time
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Literal

import torch
from baselines import DallePytorch, DenseTransformer
from engines import build_step
from measure import (
    RATE_SECONDS,
    ShapeOptions,
    check_flags,
    forget_peak_memory,
    peak_memory,
    read_bandwidth,
    shape,
    synchronize,
    with_precision,
)
from rich import print
from rich.table import Table
from torch import Tensor, nn

from dalle_ds.allocator import keep_freed_memory
from dalle_ds.cli import parse_options, run_launcher
from dalle_ds.config import Checkpointing, DalleConfig, OptimConfig, RecomputingTrainConfig, TransformerRun
from dalle_ds.errors import ConfigError
from dalle_ds.models.dalle import Dalle
from dalle_ds.models.flops import executed_flops, model_flops
from dalle_ds.optim import decay_groups
from dalle_ds.precision.choice import DTYPES, matmul_rate


@dataclass(frozen=True)
class Options(ShapeOptions):
    """Measure a training step: forward pass, backward pass, optimizer."""

    batch: int = 2
    """Sequences per step."""
    dtype: Literal["auto", "fp32", "bf16", "fp16"] = "auto"
    """Arithmetic; auto takes the JSON's, or what the device computes fastest. In bf16 our weights are bf16 beside fp32 ones
    that the optimizer updates; the baselines use autocast."""
    steps: int = 5
    """Steps measured, after two that are not."""
    device: Literal["cpu", "cuda"] = "cpu"
    """Where to compute."""
    activation_checkpointing: Checkpointing = "selective"
    """What is computed again in the backward pass instead of being kept."""
    model: Literal["ours", "dense", "dalle_pytorch"] = "ours"
    """`dense`: a plain causal transformer of the same shape; `dalle_pytorch`: that package, where it is installed."""
    keep_freed_memory: bool | None = None
    """Whether freed memory is kept (`dalle_ds.allocator`); None is as users have it: our training does, baselines do not."""
    deepspeed_config: str | None = None
    """Measure a DeepSpeed engine with this JSON, as training uses it, instead of a plain loop."""
    blocks_only: bool = False
    """Measure the residual blocks alone: no embeddings, no logits, no optimizer."""
    json: str | None = None
    """File that the figures are written to."""


Step = Callable[[], Any]


def blocks_step(config: DalleConfig, options: Options, device: torch.device) -> Step:
    """Forward and backward pass of the residual blocks."""
    model = Dalle(config, checkpointing=options.activation_checkpointing).to(device, DTYPES[options.dtype])
    inputs = torch.randn(options.batch, config.total_len, config.width, device=device, requires_grad=True)

    def step() -> None:
        model.residual_blocks(inputs).sum().backward()
        model.zero_grad()
        inputs.grad = None

    return step


def plain_step(config: DalleConfig, options: Options, device: torch.device) -> Step:
    """A step with no framework: the model, autograd and PyTorch's fused AdamW."""
    dtype = DTYPES[options.dtype]
    if options.model == "ours":
        model: nn.Module = Dalle(config, checkpointing=options.activation_checkpointing).to(device, dtype)
    else:
        model = {"dense": DenseTransformer, "dalle_pytorch": DallePytorch}[options.model](config).to(device)
    groups = decay_groups(model, OptimConfig().weight_decay)
    # Weights of 16 bits are too coarse for small updates: the optimizer works on fp32 ones, as DeepSpeed's does.
    masters: dict[nn.Parameter, Tensor] = {}
    for group in groups:
        for index, parameter in enumerate(group["params"]):
            if parameter.dtype != torch.float32:
                masters[parameter] = parameter.detach().float()
                group["params"][index] = masters[parameter]
    optimizer = torch.optim.AdamW(groups, lr=1e-4, betas=(0.9, 0.96), fused=True)
    text, codes = batch(config, options.batch, device)
    autocast = options.model != "ours" and dtype != torch.float32

    def step() -> None:
        with torch.autocast(device.type, dtype, enabled=autocast):
            loss = model(text, codes, logits=False).loss if options.model == "ours" else model(text, codes)
        loss.backward()
        for parameter, master in masters.items():
            master.grad, parameter.grad = parameter.grad.float(), None
        optimizer.step()
        optimizer.zero_grad()
        with torch.no_grad():
            if masters:
                torch._foreach_copy_(list(masters), list(masters.values()))

    return step


def engine_step(config: DalleConfig, options: Options, json_path: str) -> Step:
    """A step of the engine that training uses, gradient clipping included."""
    from dalle_ds.config.deepspeed import is_auto, load_deepspeed_json, resolve
    from dalle_ds.config.deepspeed import with_precision as with_precision_of
    from dalle_ds.parallel import Mesh

    mesh = Mesh.start(options.device)
    run = TransformerRun(
        model=config,
        train=RecomputingTrainConfig(
            batch_size=options.batch * mesh.world_size, activation_checkpointing=options.activation_checkpointing
        ),
    )
    json_config = load_deepspeed_json(json_path)
    if is_auto(json_config, run):
        json_config = with_precision_of(json_config, options.dtype)
    precision = resolve(json_config, run, mesh.world_size).precision
    if precision != options.dtype:
        raise ConfigError(f"--dtype {options.dtype}, but {json_path} trains in {precision}")
    _, train_step = build_step(run, json_config, mesh)
    text, codes = batch(config, options.batch, mesh.device)
    return lambda: train_step.run([{"text": text, "codes": codes}], 0, 1e-4)


def batch(config: DalleConfig, size: int, device: torch.device) -> tuple[Tensor, Tensor]:
    """Random captions without padding, and codes."""
    text = torch.randint(0, config.text_vocab, (size, config.text_len), device=device)
    return text, torch.randint(0, config.image_vocab, (size, config.image_len), device=device)


def settled(options: Options) -> Options:
    """The options with the arithmetic that "auto" stands for."""
    from dalle_ds.config.deepspeed import is_auto, load_deepspeed_json, resolve

    if options.dtype == "auto" and options.deepspeed_config is not None:
        run, json_config = TransformerRun(), load_deepspeed_json(options.deepspeed_config)
        if not is_auto(json_config, run):
            return replace(options, dtype=resolve(json_config, run, 1).precision)
    return with_precision(options)


def check(options: Options) -> None:
    """Refuse what cannot be measured together.

    Raises:
        ConfigError: says what to leave out.
    """
    check_flags(options, "batch", "steps")
    if options.model != "ours" and (options.blocks_only or options.deepspeed_config is not None):
        raise ConfigError(f"--model {options.model} is measured in a plain loop only: leave out the other options")
    if options.dtype == "fp16" and (options.deepspeed_config is None or options.device == "cpu"):
        raise ConfigError("--dtype fp16 is measured on GPUs and in engines: add --device cuda --deepspeed_config FILE")
    if options.blocks_only and options.deepspeed_config is not None:
        raise ConfigError("--blocks_only measures no engine: leave out --deepspeed_config")


def measure(options: Options) -> dict[str, float]:
    """Figures by name."""
    check(options)
    device = torch.device(options.device)
    if device.type == "cpu":
        kept = options.keep_freed_memory
        if kept or (kept is None and options.model == "ours"):
            keep_freed_memory()
    config = shape(options)
    torch.manual_seed(0)
    if options.blocks_only:
        step = blocks_step(config, options, device)
    elif options.deepspeed_config is not None:
        step = engine_step(config, options, options.deepspeed_config)
    else:
        step = plain_step(config, options, device)
    forget_peak_memory(device)
    seconds = []
    for index in range(2 + options.steps):
        synchronize(device)
        start = time.perf_counter()
        step()
        synchronize(device)
        if index >= 2:
            seconds.append(time.perf_counter() - start)
    memory = peak_memory(device)
    median = statistics.median(seconds)
    rate, bandwidth = matmul_rate(DTYPES[options.dtype], device, RATE_SECONDS), read_bandwidth(device)
    figures = {
        "step_seconds": median,
        "tokens_per_second": options.batch * config.total_len / median,
        "matmul_flops_per_second": rate,
        "read_bytes_per_second": bandwidth,
        "peak_memory_bytes": memory,
    }
    counted = count(options, config, device)
    figures |= counted
    for name, flops in counted.items():
        figures[name.replace("flops_per_step", "fraction_of_matmul")] = flops / median / rate
    return figures


def count(options: Options, config: DalleConfig, device: torch.device) -> dict[str, float]:
    """FLOPs of a step from shapes: those executed, and those that the model needs, the base of the MFU."""
    if options.model == "dalle_pytorch":
        return {}
    if options.model == "dense":
        config = replace(config, attention=("full",) * config.depth)
    needed = model_flops(config)
    checkpointing = options.activation_checkpointing if options.model == "ours" else "none"
    executed = executed_flops(config, checkpointing, dtype=DTYPES[options.dtype], device=device.type)
    parts = {"flops_per_step": executed, "needed_flops_per_step": needed}
    return {
        name: options.batch * (flops.total - (flops.heads if options.blocks_only else 0))
        for name, flops in parts.items()
    }


def main() -> None:
    """Measure, show, write."""
    options = settled(parse_options(Options))
    figures = measure(options)
    table = Table("figure", "value", title=f"{options.model}, {options.dtype}, batch {options.batch}, {options.device}")
    for name, value in figures.items():
        table.add_row(name, f"{value:,.4g}")
    print(table)
    if options.json is not None:
        Path(options.json).write_text(json.dumps(figures, indent=2) + "\n")


if __name__ == "__main__":
    run_launcher(main)
