"""Optimizer settings of the papers: parameter groups, schedules, iterate averaging."""

from dalle_ds.optim.averaging import WeightAverage
from dalle_ds.optim.groups import decay_groups
from dalle_ds.optim.schedules import LearningRate, half_cosine

__all__ = ["LearningRate", "WeightAverage", "decay_groups", "half_cosine"]
