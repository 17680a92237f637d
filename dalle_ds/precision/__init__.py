"""Numerics of 16-bit training: per-resblock gradient scales, 16-bit arithmetic inside a block, 16-bit storage formats."""

from dalle_ds.precision.resblock import BranchPrecision, branch_bias, branch_linear, enter_branch, join_branch
from dalle_ds.precision.scales import GradientScales

__all__ = ["BranchPrecision", "GradientScales", "branch_bias", "branch_linear", "enter_branch", "join_branch"]
