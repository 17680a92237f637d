"""Typed configuration of every stage: dataclasses whose field docstrings are both documentation and command-line help.

A run's configuration is a preset (`dalle_ds/presets/NAME.yaml`, one file per size, one section per stage) with any field
overridden on the command line (`--model.width 512`). Checks that need one section only live in its `__post_init__`; checks
across sections live in the run's.
"""

from dalle_ds.config.models import (
    ATTENTION_KINDS,
    PADDING,
    ClipConfig,
    DalleConfig,
    DiscreteVAEConfig,
    VqganConfig,
)
from dalle_ds.config.parallel import ParallelConfig, PowerSGDConfig
from dalle_ds.config.plain import differences, from_dict, load_preset, preset_names, to_dict
from dalle_ds.config.runs import (
    ClipRun,
    DecoderRun,
    DvaeRun,
    LatentPriorRun,
    PriorRun,
    Run,
    TransformerRun,
    UpsamplerRun,
)
from dalle_ds.config.training import (
    Checkpointing,
    ClipObjective,
    DvaeObjective,
    GuardConfig,
    LoaderConfig,
    LoraConfig,
    OptimConfig,
    Precision,
    RecomputingTrainConfig,
    ReportConfig,
    ScalingConfig,
    SharpnessConfig,
    TrainConfig,
    TransformerLoaderConfig,
)
from dalle_ds.config.unclip import (
    DecoderConfig,
    DecoderObjective,
    ImageSampling,
    LatentPriorConfig,
    LatentPriorObjective,
    PriorConfig,
    PriorObjective,
    UnetConfig,
    UpsamplerConfig,
    UpsamplerObjective,
)

__all__ = [
    "ATTENTION_KINDS",
    "PADDING",
    "Checkpointing",
    "ClipConfig",
    "ClipObjective",
    "ClipRun",
    "DalleConfig",
    "DecoderConfig",
    "DecoderObjective",
    "DecoderRun",
    "DiscreteVAEConfig",
    "DvaeObjective",
    "DvaeRun",
    "GuardConfig",
    "ImageSampling",
    "LatentPriorConfig",
    "LatentPriorObjective",
    "LatentPriorRun",
    "LoaderConfig",
    "LoraConfig",
    "OptimConfig",
    "ParallelConfig",
    "PowerSGDConfig",
    "Precision",
    "PriorConfig",
    "PriorObjective",
    "PriorRun",
    "RecomputingTrainConfig",
    "ReportConfig",
    "Run",
    "ScalingConfig",
    "SharpnessConfig",
    "TrainConfig",
    "TransformerLoaderConfig",
    "TransformerRun",
    "UnetConfig",
    "UpsamplerConfig",
    "UpsamplerObjective",
    "UpsamplerRun",
    "VqganConfig",
    "differences",
    "from_dict",
    "load_preset",
    "preset_names",
    "to_dict",
]
