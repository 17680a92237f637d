"""Optimizer settings of the papers: parameter groups, schedules, iterate averaging."""

from dalle_ds.optim.adamw import AdamW
from dalle_ds.optim.averaging import WeightAverage
from dalle_ds.optim.groups import adapter_groups, decay_groups, resblock_groups
from dalle_ds.optim.schedules import LearningRate, gumbel_temperature, kl_weight

__all__ = [
    "AdamW",
    "LearningRate",
    "WeightAverage",
    "adapter_groups",
    "decay_groups",
    "gumbel_temperature",
    "kl_weight",
    "resblock_groups",
]
