"""Every number of the paper's presets, and of the defaults that are the papers', with the section that it is from."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from dalle_ds.config import (
    ClipRun,
    DalleConfig,
    DecoderConfig,
    DecoderRun,
    DiscreteVAEConfig,
    DvaeObjective,
    DvaeRun,
    LatentPriorConfig,
    LatentPriorRun,
    OptimConfig,
    PowerSGDConfig,
    PriorConfig,
    PriorRun,
    ScalingConfig,
    TransformerLoaderConfig,
    TransformerRun,
    UpsamplerConfig,
    UpsamplerRun,
    load_preset,
    to_dict,
)
from dalle_ds.config.plain import PRESET_DIR, flatten
from dalle_ds.data.filters import FilterOptions
from dalle_ds.models import Dalle, DiscreteVAE
from dalle_ds.models.clip import INITIAL_SCALE, LARGEST_SCALE
from dalle_ds.models.dvae import map_pixels
from dalle_ds.parallel.powersgd import paper_rank
from dalle_ds.parsing import parse_yaml
from dalle_ds.text.tokenizer import TokenizerConfig
from tests.clip_shapes import CLIP_SHAPES

PRESETS = ("dalle-1b", "dalle-3b", "dalle-6b", "dalle-12b")
KINDS: dict[str, Any] = {"tokenizer": TokenizerConfig, "dvae": DvaeRun, "transformer": TransformerRun, "clip": ClipRun}
OURS = ("save_every", "report.log_every", "report.validate_every", "report.preview_every")
"""What a preset may set besides, since it changes no weight."""

# (stage, field, value, where a paper says so). DALL·E is arXiv 2102.12092, unCLIP 2204.06125, CLIP 2103.00020.
EVERYWHERE: list[tuple[str, str, Any, str]] = [
    ("tokenizer", "vocab_size", 16_384, "DALL·E §2.2"),
    ("dvae", "steps", 3_000_000, "DALL·E App. A.2"),
    ("dvae", "train.batch_size", 512, "DALL·E App. A.2"),
    ("dvae", "train.average_decay", 0.999, "DALL·E App. A.2"),
    ("dvae", "train.average_every", 1, "DALL·E App. A.2"),
    ("dvae", "model.image_size", 256, "DALL·E §2"),
    ("dvae", "model.groups", 4, "DALL·E App. A.1"),
    ("dvae", "model.blocks_per_group", 2, "DALL·E App. A.1"),
    ("dvae", "model.encoder_width", 256, "DALL·E App. A.1"),
    ("dvae", "model.decoder_width", 256, "DALL·E App. A.1"),
    ("dvae", "model.decoder_input", 128, "DALL·E App. A.1"),
    ("dvae", "model.vocab_size", 8192, "DALL·E §2"),
    ("dvae", "model.min_log_scale", None, "DALL·E App. A.3 has none"),
    ("dvae", "objective.kl_weight", 6.6, "DALL·E §2.1"),
    ("dvae", "objective.kl_warmup_steps", 5_000, "DALL·E App. A.2"),
    ("dvae", "objective.temperature_start", 1.0, "DALL·E App. A.2"),
    ("dvae", "objective.temperature_end", 1 / 16, "DALL·E §2.1, App. A.2"),
    ("dvae", "objective.temperature_steps", 150_000, "DALL·E App. A.2"),
    ("dvae", "optim.lr", 1e-4, "DALL·E App. A.2"),
    ("dvae", "optim.final_lr", 1.25e-6, "DALL·E App. A.2"),
    ("dvae", "optim.schedule", "cosine", "DALL·E App. A.2"),
    ("dvae", "optim.decay_steps", 1_200_000, "DALL·E App. A.2"),
    ("dvae", "optim.warmup_steps", 0, "DALL·E App. A.2 has none"),
    ("dvae", "optim.beta1", 0.9, "DALL·E App. A.2"),
    ("dvae", "optim.beta2", 0.999, "DALL·E App. A.2"),
    ("dvae", "optim.eps", 1e-8, "DALL·E App. A.2"),
    ("dvae", "optim.weight_decay", 1e-4, "DALL·E App. A.2"),
    ("dvae", "optim.clip", None, "DALL·E App. A.2 has none"),
    ("dvae", "optim.second_moment_clip", None, "DALL·E App. A.2 has none"),
    ("dvae", "optim.moments", "fp32", "DALL·E App. A.2"),
    ("transformer", "steps", 430_000, "DALL·E App. B.2"),
    ("transformer", "train.batch_size", 1024, "DALL·E App. B.2"),
    ("transformer", "train.activation_checkpointing", "full", "DALL·E §2.4"),
    ("transformer", "train.average_decay", 0.99, "DALL·E App. B.2"),
    ("transformer", "train.average_every", 25, "DALL·E App. B.2"),
    ("transformer", "train.average_device", "cpu", "DALL·E App. B.2"),
    ("transformer", "loader.bpe_dropout", 0.1, "DALL·E §2.2, App. B.2"),
    ("transformer", "loader.caption_dropout", 0.0, "DALL·E has no guidance"),
    ("transformer", "model.depth", 64, "DALL·E App. B.1"),
    ("transformer", "model.text_len", 256, "DALL·E §2.2"),
    ("transformer", "model.grid", 32, "DALL·E §2"),
    ("transformer", "model.text_vocab", 16_384, "DALL·E §2.2"),
    ("transformer", "model.image_vocab", 8192, "DALL·E §2"),
    ("transformer", "model.attention", None, "DALL·E App. B.1, whose schedule None is"),
    ("transformer", "model.kernel", 11, "DALL·E Fig. 11"),
    ("transformer", "model.mask_padding", False, "DALL·E §2.2"),
    ("transformer", "model.text_weight", 1 / 8, "DALL·E §2.2"),
    ("transformer", "model.dropout", 0.0, "DALL·E App. B names none"),
    ("transformer", "optim.lr", 4.5e-4, "DALL·E App. B.2"),
    ("transformer", "optim.beta1", 0.9, "DALL·E App. B.2"),
    ("transformer", "optim.beta2", 0.96, "DALL·E App. B.2"),
    ("transformer", "optim.eps", 1e-8, "DALL·E App. B.2"),
    ("transformer", "optim.weight_decay", 4.5e-2, "DALL·E App. B.2"),
    ("transformer", "optim.clip", 4.0, "DALL·E App. B.2"),
    ("transformer", "optim.second_moment_clip", 5.0, "DALL·E App. B.2"),
    ("transformer", "optim.moments", "16-bit", "DALL·E App. B.2, D"),
    ("transformer", "optim.schedule", "plateau", "DALL·E App. B.2"),
    ("transformer", "optim.plateau_halvings", 5, "DALL·E App. B.2"),
    ("transformer", "optim.warmup_steps", 5_000, "DALL·E App. B.2"),
    ("transformer", "scaling.initial_log2", 13.0, "DALL·E App. D"),
    ("transformer", "scaling.doubling_updates", 1_000, "DALL·E App. D"),
    ("transformer", "scaling.backoff", 2**0.5, "DALL·E App. D"),
    ("transformer", "scaling.window", 125, "DALL·E App. D"),
    ("transformer", "scaling.min_log2", 7.0, "DALL·E App. D"),
    ("transformer", "scaling.max_log2", 24.0, "DALL·E App. D"),
    ("transformer", "scaling.skip", "update", "DALL·E App. D"),
    ("clip", "steps", 32 * 400_000_000 // 32_768, "CLIP Table 18: 32 epochs of 400 M pairs"),
    ("clip", "train.batch_size", 32_768, "CLIP Table 18"),
    ("clip", "train.micro_batch", 64, "unCLIP App. C"),
    ("clip", "train.activation_checkpointing", "full", "CLIP §2.5"),
    ("clip", "train.average_decay", None, "CLIP has none"),
    ("clip", "objective.min_crop", 1.0, "CLIP §2.3"),
    ("clip", "objective.mirror", False, "CLIP §2.3"),
    ("clip", "model.text_len", 77, "CLIP §2.4"),
    ("clip", "model.text_vocab", 49_408, "CLIP Table 18"),
    ("clip", "optim.beta1", 0.9, "CLIP Table 18"),
    ("clip", "optim.beta2", 0.98, "CLIP Table 18"),
    ("clip", "optim.eps", 1e-6, "CLIP Table 18"),
    ("clip", "optim.weight_decay", 0.2, "CLIP Table 18"),
    ("clip", "optim.clip", None, "CLIP §2.5 has none"),
    ("clip", "optim.second_moment_clip", None, "CLIP §2.5 has none"),
    ("clip", "optim.schedule", "cosine", "CLIP §2.5"),
    ("clip", "optim.warmup_steps", 2_000, "CLIP Table 18"),
    ("clip", "optim.decay_steps", 390_625, "CLIP §2.5: over the whole training"),
    ("clip", "optim.final_lr", 0.0, "CLIP §2.5"),
]
SIZES: dict[str, list[tuple[str, str, Any, str]]] = {
    "dalle-1b": [
        ("transformer", "model.width", 1216, "DALL·E §2.3, up to 1.2 B parameters"),
        ("transformer", "model.heads", 19, "DALL·E App. B.1, 64 each"),
        ("clip", "optim.lr", 5e-4, "CLIP Table 20"),
        ("clip", "sharpness.rho", None, "CLIP has none"),
    ],
    "dalle-3b": [
        ("transformer", "model.width", 1920, "DALL·E Table 1"),
        ("transformer", "model.heads", 30, "DALL·E App. B.1, 64 each"),
        ("clip", "optim.lr", 4e-4, "CLIP Table 20"),
        ("clip", "sharpness.rho", None, "CLIP has none"),
    ],
    "dalle-6b": [
        ("transformer", "model.width", 2688, "DALL·E Table 1"),
        ("transformer", "model.heads", 42, "DALL·E App. B.1, 64 each"),
        ("clip", "optim.lr", 4e-4, "CLIP Table 20"),
        ("clip", "sharpness.rho", None, "CLIP has none"),
    ],
    "dalle-12b": [
        ("transformer", "model.width", 3968, "DALL·E Fig. 10"),
        ("transformer", "model.heads", 62, "DALL·E App. B.1"),
        ("clip", "optim.lr", 3e-4, "unCLIP App. C"),
        ("clip", "sharpness.rho", 0.1, "unCLIP App. C"),
        ("clip", "sharpness.pairs", 64, "unCLIP App. C"),
    ],
}
# Embedding, images and patches; width, depth and heads of the image tower; of the text tower.
CLIPS = {
    "dalle-1b": ("ViT-B/16", (512, 224, 16, 768, 12, 12, 512, 12, 8), "CLIP Table 20"),
    "dalle-3b": ("ViT-L/14", (768, 224, 14, 1024, 24, 16, 768, 12, 12), "CLIP Table 20"),
    "dalle-6b": ("ViT-L/14", (768, 224, 14, 1024, 24, 16, 768, 12, 12), "CLIP Table 20"),
    "dalle-12b": ("unclip-H/16", (1024, 256, 16, 1280, 32, 20, 1024, 24, 16), "unCLIP App. C; heads of 64"),
    "unclip": ("unclip-H/16", (1024, 256, 16, 1280, 32, 20, 1024, 24, 16), "unCLIP App. C; heads of 64"),
}
SHAPE = ("embed_dim", "image_size", "patch_size", "vision_width", "vision_depth", "vision_heads",
         "text_width", "text_depth", "text_heads")  # fmt: skip
DEFAULTS: list[tuple[Any, str, Any, str]] = [
    (DvaeObjective(), "kl_weight", 6.6, "DALL·E §2.1"),
    (DvaeObjective(), "kl_warmup_steps", 5_000, "DALL·E App. A.2"),
    (DvaeObjective(), "temperature_start", 1.0, "DALL·E App. A.2"),
    (DvaeObjective(), "temperature_end", 1 / 16, "DALL·E §2.1"),
    (DvaeObjective(), "temperature_steps", 150_000, "DALL·E App. A.2"),
    (OptimConfig(), "lr", 4.5e-4, "DALL·E App. B.2"),
    (OptimConfig(), "beta1", 0.9, "DALL·E App. B.2"),
    (OptimConfig(), "beta2", 0.96, "DALL·E App. B.2"),
    (OptimConfig(), "eps", 1e-8, "DALL·E App. B.2"),
    (OptimConfig(), "weight_decay", 4.5e-2, "DALL·E App. B.2"),
    (OptimConfig(), "clip", 4.0, "DALL·E App. B.2"),
    (OptimConfig(), "second_moment_clip", 5.0, "DALL·E App. B.2"),
    (OptimConfig(), "warmup_steps", 5_000, "DALL·E App. B.2"),
    (OptimConfig(), "plateau_halvings", 5, "DALL·E App. B.2"),
    (ScalingConfig(), "initial_log2", 13.0, "DALL·E App. D"),
    (ScalingConfig(), "doubling_updates", 1_000, "DALL·E App. D"),
    (ScalingConfig(), "backoff", 2**0.5, "DALL·E App. D"),
    (ScalingConfig(), "window", 125, "DALL·E App. D"),
    (ScalingConfig(), "min_log2", 7.0, "DALL·E App. D"),
    (ScalingConfig(), "max_log2", 24.0, "DALL·E App. D"),
    (ScalingConfig(), "skip", "update", "DALL·E App. D"),
    (TransformerLoaderConfig(), "bpe_dropout", 0.1, "DALL·E App. B.2"),
    (PowerSGDConfig(), "epsilon", 1e-6, "DALL·E App. E.2"),
    (DalleConfig(), "text_weight", 1 / 8, "DALL·E §2.2"),
    (DalleConfig(), "kernel", 11, "DALL·E Fig. 11"),
    (FilterOptions(paper=True), "max_aspect_ratio", 2.0, "DALL·E App. C"),
    (FilterOptions(paper=True), "drop_boilerplate", True, "DALL·E App. C"),
]


UNCLIP: list[tuple[str, str, Any, str]] = [
    ("tokenizer", "vocab_size", 16_384, "DALL·E §2.2; unCLIP names none"),
    *(row for row in (*EVERYWHERE, *SIZES["dalle-12b"]) if row[0] == "clip"),
    ("prior", "steps", 600_000, "unCLIP Table 3"),
    ("prior", "train.batch_size", 4096, "unCLIP Table 3"),
    ("prior", "train.average_decay", 0.9999, "unCLIP Table 3"),
    ("prior", "model.width", 2048, "unCLIP Table 3"),
    ("prior", "model.depth", 24, "unCLIP Table 3"),
    ("prior", "model.heads", 32, "unCLIP Table 3"),
    ("prior", "model.text_len", 256, "unCLIP Table 3"),
    ("prior", "model.embed_dim", 1024, "unCLIP §2.2"),
    ("prior", "model.text", "tokens", "unCLIP Table 3, whose 24 blocks read the text"),
    ("prior", "model.text_vocab", 16_384, "DALL·E §2.2; unCLIP names none"),
    ("prior", "objective.schedule", "cosine", "unCLIP Table 3"),
    ("prior", "objective.timesteps", 1_000, "unCLIP Table 3"),
    ("prior", "objective.analytic_steps", "64", "unCLIP Table 3"),
    ("prior", "objective.draws_per_row", 1, "unCLIP §2.2"),
    ("prior", "objective.text_drop", 0.1, "unCLIP §2.2"),
    ("prior", "objective.embeddings", "constant", "unCLIP App. C"),
    ("prior", "objective.scale", 17.2, "unCLIP App. C"),
    ("prior", "optim.lr", 1.1e-4, "unCLIP Table 3"),
    ("prior", "optim.beta1", 0.9, "unCLIP Table 3"),
    ("prior", "optim.beta2", 0.96, "unCLIP Table 3"),
    ("prior", "optim.eps", 1e-6, "unCLIP Table 3"),
    ("prior", "optim.weight_decay", 6.0e-2, "unCLIP Table 3"),
    ("latent_prior", "steps", 1_000_000, "unCLIP Table 3"),
    ("latent_prior", "train.batch_size", 4096, "unCLIP Table 3"),
    ("latent_prior", "train.average_decay", 0.999, "unCLIP Table 3"),
    ("latent_prior", "model.text_width", 2048, "unCLIP Table 3"),
    ("latent_prior", "model.text_depth", 24, "unCLIP Table 3"),
    ("latent_prior", "model.text_heads", 32, "unCLIP Table 3"),
    ("latent_prior", "model.text_len", 256, "unCLIP Table 3"),
    ("latent_prior", "model.text_vocab", 16_384, "DALL·E §2.2; unCLIP names none"),
    ("latent_prior", "model.width", 1664, "unCLIP Table 3"),
    ("latent_prior", "model.depth", 24, "unCLIP Table 3"),
    ("latent_prior", "model.heads", 26, "unCLIP Table 3"),
    ("latent_prior", "model.embed_dim", 1024, "unCLIP §2.2"),
    ("latent_prior", "model.components", 319, "unCLIP §2.2"),
    ("latent_prior", "model.buckets", 1024, "unCLIP §2.2"),
    ("latent_prior", "objective.text_drop", 0.1, "unCLIP §2.2"),
    ("latent_prior", "optim.lr", 1.6e-4, "unCLIP Table 3"),
    ("latent_prior", "optim.beta1", 0.9, "unCLIP Table 3"),
    ("latent_prior", "optim.beta2", 0.91, "unCLIP Table 3"),
    ("latent_prior", "optim.eps", 1e-10, "unCLIP Table 3"),
    ("latent_prior", "optim.weight_decay", 4.0e-2, "unCLIP Table 3"),
    ("decoder", "steps", 800_000, "unCLIP Table 3"),
    ("decoder", "train.batch_size", 2048, "unCLIP Table 3"),
    ("decoder", "model.image_size", 64, "unCLIP Table 3"),
    ("decoder", "model.channels", 512, "unCLIP Table 3"),
    ("decoder", "model.depth", 3, "unCLIP Table 3"),
    ("decoder", "model.multiples", [1, 2, 3, 4], "unCLIP Table 3"),
    ("decoder", "model.dropout", 0.1, "unCLIP Table 3"),
    ("decoder", "model.attention", [32, 16, 8], "unCLIP Table 3"),
    ("decoder", "model.head_channels", 64, "unCLIP Table 3"),
    ("decoder", "model.embed_dim", 1024, "unCLIP §2.2"),
    ("decoder", "model.image_tokens", 4, "unCLIP §2.1"),
    ("decoder", "model.text", "tokens", "unCLIP App. C"),
    ("decoder", "model.context_width", 2048, "unCLIP Table 3"),
    ("decoder", "model.text_len", 256, "unCLIP Table 3"),
    ("decoder", "model.text_vocab", 16_384, "DALL·E §2.2; unCLIP names none"),
    ("decoder", "model.text_depth", 24, "unCLIP Table 3"),
    ("decoder", "model.text_heads", 32, "unCLIP Table 3"),
    ("decoder", "objective.embedding_drop", 0.1, "unCLIP §2.1"),
    ("decoder", "objective.text_drop", 0.5, "unCLIP §2.1"),
    ("decoder", "sampling.method", "ddpm", "unCLIP Table 3: variance learned"),
    ("decoder", "sampling.steps", "250", "unCLIP Table 3"),
    ("decoder", "sampling.guidance", 1.25, "unCLIP Table 2"),
    ("upsampler_1", "steps", 1_000_000, "unCLIP Table 3"),
    ("upsampler_1", "train.batch_size", 1024, "unCLIP Table 3"),
    ("upsampler_1", "model.image_size", 256, "unCLIP Table 3"),
    ("upsampler_1", "model.low_size", 64, "unCLIP Table 3"),
    ("upsampler_1", "model.channels", 320, "unCLIP Table 3"),
    ("upsampler_1", "model.depth", 3, "unCLIP Table 3"),
    ("upsampler_1", "model.multiples", [1, 2, 3, 4], "unCLIP Table 3"),
    ("upsampler_1", "model.dropout", 0.1, "unCLIP Table 3"),
    ("upsampler_1", "objective.degradation", "blur", "unCLIP §2.1"),
    ("upsampler_1", "sampling.steps", "27", "unCLIP Table 3"),
    ("upsampler_2", "steps", 1_000_000, "unCLIP Table 3"),
    ("upsampler_2", "train.batch_size", 512, "unCLIP Table 3"),
    ("upsampler_2", "model.image_size", 1024, "unCLIP Table 3"),
    ("upsampler_2", "model.low_size", 256, "unCLIP Table 3"),
    ("upsampler_2", "model.channels", 192, "unCLIP Table 3"),
    ("upsampler_2", "model.depth", 2, "unCLIP Table 3"),
    ("upsampler_2", "model.multiples", [1, 1, 2, 2, 4, 4], "unCLIP Table 3"),
    ("upsampler_2", "model.dropout", 0.0, "unCLIP Table 3 names none"),
    ("upsampler_2", "objective.degradation", "bsr", "unCLIP §2.1"),
    ("upsampler_2", "sampling.steps", "15", "unCLIP Table 3"),
    *(
        (stage, name, value, "unCLIP Table 3")
        for stage, schedule, lr in (
            ("decoder", "cosine", 1.2e-4),
            ("upsampler_1", "cosine", 1.2e-4),
            ("upsampler_2", "linear", 1e-4),
        )
        for name, value in (
            ("train.average_decay", 0.9999),
            ("objective.schedule", schedule),
            ("objective.timesteps", 1_000),
            ("optim.lr", lr),
            ("optim.beta1", 0.9),
            ("optim.beta2", 0.999),
            ("optim.eps", 1e-8),
            ("optim.weight_decay", 0.0),
        )
    ),
    *((stage, "objective.crop", 0.25, "unCLIP Table 3") for stage in ("upsampler_1", "upsampler_2")),
    *((stage, "sampling.method", "ddim", "unCLIP Table 3") for stage in ("upsampler_1", "upsampler_2")),
    *(
        (stage, name, value, "GLIDE §4; Nichol and Dhariwal 2021")
        for stage in ("decoder", "upsampler_1", "upsampler_2")
        for name, value in (("model.learned_variance", True), ("objective.predicts", "epsilon"))
    ),
    *(
        (stage, f"optim.{field}", value, "unCLIP names none")
        for stage in ("prior", "latent_prior", "decoder", "upsampler_1", "upsampler_2")
        for field, value in (
            ("clip", None),
            ("second_moment_clip", None),
            ("schedule", "constant"),
            ("warmup_steps", 2_000),
        )
    ),
]


def kinds(preset: str) -> dict[str, Any]:
    """Stage → what configures it."""
    if preset != "unclip":
        return KINDS
    stages = {"clip": ClipRun, "prior": PriorRun, "latent_prior": LatentPriorRun, "decoder": DecoderRun}
    return {"tokenizer": TokenizerConfig, **stages, "upsampler_1": UpsamplerRun, "upsampler_2": UpsamplerRun}


def rows(preset: str) -> list[tuple[str, str, Any, str]]:
    """All that is known of a preset."""
    _, shape, source = CLIPS[preset]
    towers = [("clip", f"model.{field}", value, source) for field, value in zip(SHAPE, shape, strict=True)]
    return [*(UNCLIP if preset == "unclip" else [*EVERYWHERE, *SIZES[preset]]), *towers]


@pytest.mark.parametrize("preset", [*PRESETS, "unclip"])
def test_every_number_is_the_papers(preset: str) -> None:
    found = {stage: dict(flatten(to_dict(load_preset(preset, stage, kind)))) for stage, kind in kinds(preset).items()}
    wrong = [
        f"{stage}.{field} is {found[stage][field]!r}, {value!r} in {source}"
        for stage, field, value, source in rows(preset)
        if found[stage][field] != value
    ]
    assert wrong == []


@pytest.mark.parametrize("preset", [*PRESETS, "unclip"])
def test_nothing_that_a_preset_sets_is_left_out_of_the_table(preset: str) -> None:
    pinned = {f"{stage}.{field}" for stage, field, _, _ in rows(preset)}
    sections = parse_yaml((PRESET_DIR / f"{preset}.yaml").read_text())
    assert sections.keys() == kinds(preset).keys()
    stated = {f"{stage}.{field}" for stage, values in sections.items() for field in dict(flatten(values))}
    assert {name for name in stated - pinned if name.partition(".")[2] not in OURS} == set()


@pytest.mark.parametrize(("config", "field", "value", "source"), DEFAULTS)
def test_defaults_are_the_papers(config: Any, field: str, value: Any, source: str) -> None:
    assert getattr(config, field) == value, source


@pytest.mark.parametrize("preset", PRESETS)
def test_shapes_are_those_that_have_the_papers_sizes(preset: str) -> None:
    run = load_preset(preset, "transformer", TransformerRun)
    assert run.model.total_len == 1280 and run.model.width == 64 * run.model.heads
    with torch.device("meta"):
        model = Dalle(run.model)
    blocks = sum(parameter.numel() for parameter in model.blocks.parameters())
    sizes = {"dalle-3b": 2.8e9, "dalle-6b": 5.6e9, "dalle-12b": 12.0e9}  # DALL·E Table 1
    if preset in sizes:
        assert blocks == pytest.approx(sizes[preset], rel=0.02)
    else:  # DALL·E §2.3: up to 1.2 B
        assert 1.19e9 < sum(parameter.numel() for parameter in model.parameters()) <= 1.2e9
    assert load_preset(preset, "clip", ClipRun).model == CLIP_SHAPES[CLIPS[preset][0]]


def test_what_no_setting_says() -> None:
    assert DiscreteVAEConfig() == load_preset("dalle-12b", "dvae", DvaeRun).model
    assert DalleConfig() == load_preset("dalle-12b", "transformer", TransformerRun).model
    assert PriorConfig() == load_preset("unclip", "prior", PriorRun).model
    assert LatentPriorConfig() == load_preset("unclip", "latent_prior", LatentPriorRun).model
    assert DecoderConfig() == load_preset("unclip", "decoder", DecoderRun).model
    assert UpsamplerConfig() == load_preset("unclip", "upsampler_1", UpsamplerRun).model
    with torch.device("meta"):
        vae = DiscreteVAE(DiscreteVAEConfig())
    assert {module.gain for module in vae.modules() if hasattr(module, "gain")} == {1 / 64}  # the released model
    assert sum(parameter.numel() for parameter in vae.parameters()) == 53_786_240 + 43_829_766  # the released model
    pixels = map_pixels(torch.tensor([0.0, 1.0]))
    torch.testing.assert_close(pixels, torch.tensor([0.1, 0.9]))  # DALL·E App. A.3
    assert [paper_rank(width) for width in (1920, 2688, 3968)] == [512, 640, 896]  # DALL·E Table 1
    assert (INITIAL_SCALE, LARGEST_SCALE) == (1 / 0.07, 100.0)  # CLIP §2.5
