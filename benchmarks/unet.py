"""The decoder, at the settings of peers: a training step, and sampling with guidance.

python benchmarks/unet.py --json unet.json
python benchmarks/unet.py --channels 64 --multiples 1 2 4 8 --attention 8
python benchmarks/unet.py --device cuda --dtype bf16 --preset unclip --batch 32 --sampled 8
"""

from __future__ import annotations

import json
import statistics
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import torch
from measure import RATE_SECONDS, check_flags, peak_memory, seconds
from rich import print

from dalle_ds.allocator import keep_freed_memory
from dalle_ds.cli import parse_options
from dalle_ds.config import DecoderConfig, DecoderRun, ImageSampling, load_preset
from dalle_ds.diffusion import guide, hybrid_loss, noise_schedule
from dalle_ds.models.decoder import Condition, UnclipDecoder
from dalle_ds.models.prior import Caption
from dalle_ds.precision.choice import DTYPES, matmul_rate
from dalle_ds.sampling.image_diffusion import DiffusionFacts, denoise_images


@dataclass(frozen=True)
class Options:
    """Measure the decoder."""

    preset: str | None = None
    """Preset whose decoder is measured; the flags of shape are then left alone."""
    channels: int = 64
    """Channels at full resolution."""
    multiples: tuple[int, ...] = (1, 2, 3, 4)
    """Channels at each resolution."""
    depth: int = 1
    """Residual blocks at each resolution."""
    attention: tuple[int, ...] = (32, 16, 8)
    """Sides of resolutions with attention."""
    image_size: int = 64
    """Side of images."""
    embed_dim: int = 512
    """Dimensions of CLIP's embeddings and of its text states."""
    context_width: int = 128
    """Width of the context."""
    text_len: int = 77
    """Text states of a caption."""
    batch: int = 8
    """Images of a training step."""
    sampled: int = 4
    """Images that are sampled at a time."""
    steps: int = 25
    """Steps of a sample."""
    repeats: int = 3
    """Calls that a median is taken of."""
    dtype: Literal["fp32", "bf16"] = "fp32"
    """Arithmetic."""
    checkpointing: Literal["none", "full"] = "none"
    """As `train.activation_checkpointing`."""
    device: Literal["cpu", "cuda"] = "cpu"
    """Where to compute."""
    json: str | None = None
    """File that the figures are written to."""


def main() -> None:
    """Measure, show, write."""
    options = parse_options(Options)
    check_flags(options, "batch", "sampled", "steps", "repeats")
    if options.device == "cpu":
        keep_freed_memory()
    figures = measure(options)
    for name, value in figures.items():
        print(f"{name:32} {value:,.4g}")
    if options.json is not None:
        Path(options.json).write_text(json.dumps(figures, indent=2) + "\n")


def measure(options: Options) -> dict[str, Any]:
    """All figures, by name; the machine's rate is measured in the same run."""
    torch.manual_seed(0)
    device, dtype = torch.device(options.device), DTYPES[options.dtype]
    with torch.device(device):
        model = UnclipDecoder(config_of(options), checkpointing=options.checkpointing).to(dtype)
    figures: dict[str, Any] = {"parameters": sum(p.numel() for p in model.parameters())}
    figures["training_step_seconds"] = training_step(model, options, device)
    figures["images_per_second"] = options.batch / figures["training_step_seconds"]
    figures["training_peak_memory_bytes"] = peak_memory(device)
    model.eval().zero_grad()
    figures["sampling_seconds"] = sampling(model, options, device)
    figures["seconds_per_image"] = figures["sampling_seconds"] / options.sampled
    figures["matmul_flops_per_second"] = matmul_rate(dtype, device, RATE_SECONDS)
    figures["peak_memory_bytes"] = peak_memory(device)
    return figures


def config_of(options: Options) -> DecoderConfig:
    """Of the flags, or of a preset."""
    if options.preset is not None:
        return load_preset(options.preset, "decoder", DecoderRun).model
    return DecoderConfig(
        options.image_size,
        options.channels,
        options.depth,
        options.multiples,
        0.0,
        attention=options.attention,
        embed_dim=options.embed_dim,
        text="clip_states",
        context_width=options.context_width,
        text_heads=1,
        text_len=options.text_len,
        text_width=options.embed_dim,
    )


def inputs(config: DecoderConfig, rows: int, device: torch.device) -> tuple[torch.Tensor, Caption]:
    """Embeddings and captions at random."""
    embedding = torch.randn(rows, config.embed_dim, device=device)
    if config.text == "clip_states":
        return embedding, Caption(torch.randn(rows, config.text_len, config.text_width, device=device), embedding)
    return embedding, Caption(torch.randint(config.text_vocab, (rows, config.text_len), device=device), embedding)


def training_step(model: UnclipDecoder, options: Options, device: torch.device) -> float:
    """Seconds of a forward and a backward pass and an update by fused AdamW."""
    config, schedule = model.config, noise_schedule("cosine")
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-4, fused=True)
    embedding, caption = inputs(config, options.batch, device)
    image = torch.rand(options.batch, 3, config.image_size, config.image_size, device=device) * 2 - 1

    def step() -> None:
        steps, noise = torch.randint(1000, (options.batch,), device=device), torch.randn_like(image)
        output = model(schedule.add_noise(image, noise, steps), steps, embedding, caption)
        errors, bits = hybrid_loss(schedule, "epsilon", output, image, noise, steps, 256)
        (errors + bits).mean().backward()
        optimizer.step()
        optimizer.zero_grad()

    step()
    return statistics.median(seconds(step, options.repeats, device, warmup=1))


def sampling(model: UnclipDecoder, options: Options, device: torch.device) -> float:
    """Seconds of `sampled` images, under guidance."""
    size = model.config.image_size
    facts = DiffusionFacts("cosine", 1000, "epsilon", ImageSampling(steps=str(options.steps)))

    def sample() -> None:
        with torch.no_grad():
            embedding, caption = inputs(model.config, 2 * options.sampled, device)
            condition: Condition = model.condition(embedding, caption)

            def predict(x: torch.Tensor, timestep: int) -> torch.Tensor:
                both = torch.cat([x, x])
                output = model.denoise(both, torch.full((len(both),), timestep, device=device), condition)
                conditional, null = output.chunk(2)
                return guide(conditional, null, 2.0, channels=3)

            generators = [torch.Generator().manual_seed(number) for number in range(options.sampled)]
            denoise_images(predict, (3, size, size), generators, facts, facts.sampling, device)

    return statistics.median(seconds(sample, max(1, options.repeats // 3), device, warmup=0))


if __name__ == "__main__":
    main()
