"""Which task trains which stage, from which configuration."""

from __future__ import annotations

from typing import Any

from dalle_ds.config import ClipRun, DecoderRun, DvaeRun, LatentPriorRun, PriorRun, Run, TransformerRun, UpsamplerRun
from dalle_ds.tasks.base import Task
from dalle_ds.tasks.clip import ClipTask
from dalle_ds.tasks.decoder import DecoderTask
from dalle_ds.tasks.dvae import DvaeTask
from dalle_ds.tasks.latent_prior import LatentPriorTask
from dalle_ds.tasks.prior import PriorTask
from dalle_ds.tasks.transformer import TransformerTask
from dalle_ds.tasks.upsampler import UpsamplerTask

STAGES: dict[str, tuple[type[Run], type[Task[Any]]]] = {
    "dvae": (DvaeRun, DvaeTask),
    "transformer": (TransformerRun, TransformerTask),
    "clip": (ClipRun, ClipTask),
    "prior": (PriorRun, PriorTask),
    "latent_prior": (LatentPriorRun, LatentPriorTask),
    "decoder": (DecoderRun, DecoderTask),
    "upsampler": (UpsamplerRun, UpsamplerTask),
}
UPSAMPLERS = ("upsampler_1", "upsampler_2")
SECTIONS = {**{stage: stage for stage in STAGES if stage != "upsampler"}, **dict.fromkeys(UPSAMPLERS, "upsampler")}
"""Sections of a preset, and the stage that each is of."""
