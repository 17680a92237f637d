"""The diffusion prior beside `diffusers`' PriorTransformer of the same size, in turn: a training step, and sampling.

python benchmarks/prior.py --json prior.json
python benchmarks/prior.py --text_len 256 --captions 1        # as the paper: a longer prefix to compute once
python benchmarks/prior.py --device cuda --dtype bf16 --width 2048 --depth 24 --heads 32 --embed_dim 1024 --peer False
"""

from __future__ import annotations

import json
import statistics
import time
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any, Literal

import torch
from measure import RATE_SECONDS, check_flags, peak_memory, seconds
from rich import print
from rich.table import Table
from torch import Tensor, nn

from dalle_ds.allocator import keep_freed_memory
from dalle_ds.cli import parse_options
from dalle_ds.config import PriorConfig
from dalle_ds.diffusion import noise_schedule, step_grid
from dalle_ds.errors import ConfigError
from dalle_ds.models.prior import Caption, DiffusionPrior
from dalle_ds.models.prior_sampling import DenoisingWeights
from dalle_ds.nn.attention.decoding import ROWS
from dalle_ds.precision.choice import DTYPES, matmul_rate
from dalle_ds.sampling.prior import PriorSampling, denoise

SCALE = 17.2
"""Of the embeddings (unCLIP App. C)."""


@dataclass(frozen=True)
class Options:
    """Measure the diffusion prior."""

    width: int = 512
    """Width of the residual stream."""
    depth: int = 6
    """Layers."""
    heads: int = 8
    """Attention heads."""
    text_len: int = 77
    """Text states of a caption."""
    embed_dim: int = 512
    """Dimensions of CLIP's embeddings and of its text states."""
    batch: int = 64
    """Captions of a training step."""
    draws: int = 8
    """Noised embeddings for each caption of a training step, besides one."""
    steps: int = 64
    """Denoising steps of a sample."""
    captions: tuple[int, ...] = (1, 16)
    """Captions that are sampled at a time."""
    repeats: int = 3
    """Calls that a median is taken of."""
    dtype: Literal["fp32", "bf16"] = "fp32"
    """Arithmetic of the blocks."""
    device: Literal["cpu", "cuda"] = "cpu"
    """Where to compute."""
    peer: bool = True
    """Whether `diffusers`' prior is measured as well."""
    json: str | None = None
    """File that the figures are written to."""


def main() -> None:
    """Measure, show, write."""
    options = parse_options(Options)
    check_flags(options, "batch", "draws", "steps", "repeats")
    if options.device == "cpu":
        keep_freed_memory()
    figures = measure(options)
    table = Table(title=f"{options.dtype}, {options.device}, {torch.get_num_threads()} threads")
    for column in ("figure", "here", "peer", "times"):
        table.add_column(column, justify="left" if column == "figure" else "right")
    for name, value in figures.items():
        if not name.startswith(("peer_", "times_")):
            rest = [figures.get(prefix + name) for prefix in ("peer_", "times_")]
            table.add_row(name, *("" if number is None else f"{number:,.4g}" for number in (value, *rest)))
    print(table)
    if options.json is not None:
        Path(options.json).write_text(json.dumps(figures, indent=2) + "\n")


def measure(options: Options) -> dict[str, Any]:
    """All figures, by name; the peer's and how many times better ours are with `peer_` and `times_` before it. The machine's
    rate is measured in the same run."""
    torch.manual_seed(0)
    device, dtype = torch.device(options.device), DTYPES[options.dtype]
    config = PriorConfig(
        width=options.width,
        depth=options.depth,
        heads=options.heads,
        text_len=options.text_len,
        embed_dim=options.embed_dim,
        text="clip_states",
        text_width=options.embed_dim,
    )
    prior = DiffusionPrior(config).to(device, dtype)
    peer = peer_prior(options).to(device, dtype) if options.peer else None
    models = [prior] if peer is None else [prior, peer]
    figures: dict[str, Any] = {}
    put(figures, "parameters", [sum(p.numel() for p in model.parameters()) for model in models])
    peer_step = None if peer is None else training_step(peer, theirs(peer, options))
    for draws in (1, options.draws):
        taken = in_turn(options, training_step(prior, ours(prior, options, draws)), peer_step)
        put(figures, f"training_step_seconds_{draws}_draws", taken)
        rates = [options.batch * number / second for number, second in zip((draws, 1), taken, strict=False)]
        put(figures, f"noised_embeddings_per_second_{draws}_draws", rates, more_is_better=True)
    for model in models:
        model.eval()
    weights = DenoisingWeights(prior)
    for rows in (1, ROWS):
        start = time.perf_counter()
        weights.layers(rows)
        figures[f"making_weights_ready_seconds_{rows}_rows"] = time.perf_counter() - start
    for count in options.captions:
        for guidance in (1.0, 2.0):
            own = partial(sample, weights, options, count, guidance)
            other = None if peer is None else partial(peer_sample, peer, options, count, guidance)
            put(figures, f"sampling_seconds_{count}_captions_guidance_{guidance:g}", in_turn(options, own, other))
    figures["matmul_flops_per_second"] = matmul_rate(dtype, device, RATE_SECONDS)
    figures["peak_memory_bytes"] = peak_memory(device)
    return figures


def put(figures: dict[str, Any], name: str, values: list[float], *, more_is_better: bool = False) -> None:
    """Ours, and the peer's if there is one."""
    figures |= dict(zip((name, f"peer_{name}"), values, strict=False))
    if len(values) == 2:
        figures[f"times_{name}"] = values[0] / values[1] if more_is_better else values[1] / values[0]


def in_turn(options: Options, *calls: Callable[[], None] | None) -> list[float]:
    """Median seconds of each call, one round after the other."""
    device, made = torch.device(options.device), [call for call in calls if call is not None]
    rounds = [[seconds(call, 1, device, warmup=not n)[0] for call in made] for n in range(options.repeats)]
    return [statistics.median(taken) for taken in zip(*rounds, strict=True)]


def training_step(model: nn.Module, loss: Callable[[], Tensor]) -> Callable[[], None]:
    """Forward, backward and AdamW."""
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-4, fused=True)

    def step() -> None:
        loss().backward()
        optimizer.step()
        optimizer.zero_grad()

    return step


def conditions(options: Options, count: int) -> tuple[Tensor, Tensor, Tensor]:
    """Text embeddings, image embeddings and text states of made-up captions."""
    device = torch.device(options.device)
    text, image = (torch.nn.functional.normalize(torch.randn(count, options.embed_dim), dim=1) for _ in range(2))
    states = torch.randn(count, options.text_len, options.embed_dim)
    return text.to(device), image.to(device), states.to(device)


def ours(prior: DiffusionPrior, options: Options, draws: int) -> Callable[[], Tensor]:
    text, image, states = conditions(options, options.batch)
    schedule = noise_schedule("cosine")
    x0 = (SCALE * image)[:, None].expand(-1, draws, -1)

    def loss() -> Tensor:
        times = torch.randint(1000, x0.shape[:2], device=x0.device)
        noised = schedule.add_noise(x0.flatten(0, 1), torch.randn_like(x0).flatten(0, 1), times.flatten())
        predicted = prior(Caption(states, SCALE * text), noised.view_as(x0), times)
        return (predicted - x0).square().mean()

    return loss


def sample(weights: DenoisingWeights, options: Options, count: int, guidance: float) -> None:
    text, _, states = conditions(options, count)
    noise = torch.randn(count, 1, options.steps + 1, options.embed_dim)
    sampling = PriorSampling(method="ddpm", steps=str(options.steps), guidance=guidance)
    assert len(step_grid(sampling.steps, 1000)) == options.steps
    denoise(weights.prior, Caption(states, SCALE * text), noise, noise_schedule("cosine"), sampling, weights=weights)


def peer_prior(options: Options) -> Any:
    try:
        from diffusers import PriorTransformer
    except ImportError as error:
        raise ConfigError("the peer is diffusers' prior: pip install diffusers, or give --peer False") from error
    return PriorTransformer(
        num_attention_heads=options.heads,
        attention_head_dim=options.width // options.heads,
        num_layers=options.depth,
        embedding_dim=options.embed_dim,
        num_embeddings=options.text_len,
    )


def peer_scheduler() -> Any:
    from diffusers import DDPMScheduler

    return DDPMScheduler(
        1000,
        beta_schedule="squaredcos_cap_v2",
        prediction_type="sample",
        clip_sample=False,
        timestep_spacing="linspace",
    )


def theirs(peer: Any, options: Options) -> Callable[[], Tensor]:
    text, image, states = conditions(options, options.batch)
    scheduler, mask = (
        peer_scheduler(),
        torch.ones(options.batch, options.text_len, dtype=torch.bool, device=text.device),
    )
    dtype = next(peer.parameters()).dtype

    def loss() -> Tensor:
        x0 = SCALE * image
        times = torch.randint(1000, (len(x0),), device=x0.device)
        noised = scheduler.add_noise(x0, torch.randn_like(x0), times)
        out = peer(noised.to(dtype), times, text.to(dtype), states.to(dtype), mask).predicted_image_embedding
        return (out.float() - x0).square().mean()

    return loss


@torch.no_grad()
def peer_sample(peer: Any, options: Options, count: int, guidance: float) -> None:
    """As its own pipeline samples: both passes of guidance in one batch."""
    text, _, states = conditions(options, count)
    dtype, copies = next(peer.parameters()).dtype, 1 if guidance == 1 else 2
    text, states = text.repeat(copies, 1).to(dtype), states.repeat(copies, 1, 1).to(dtype)
    mask = torch.ones(len(text), options.text_len, dtype=torch.bool, device=text.device)
    scheduler, x = peer_scheduler(), torch.randn(count, options.embed_dim, device=text.device, dtype=dtype)
    scheduler.set_timesteps(options.steps)
    for timestep in scheduler.timesteps:
        predicted = peer(x.repeat(copies, 1), timestep, text, states, mask).predicted_image_embedding
        if guidance != 1:
            conditional, null = predicted.chunk(2)
            predicted = null + guidance * (conditional - null)
        x = scheduler.step(predicted, timestep, x).prev_sample


if __name__ == "__main__":
    main()
