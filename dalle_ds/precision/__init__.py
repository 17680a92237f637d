"""Numerics of 16-bit training: per-resblock gradient scales, 16-bit arithmetic inside a block, 16-bit storage formats."""

from dalle_ds.precision.gradient_scaling import (
    BranchPrecision,
    GradientScales,
    branch_bias,
    branch_linear,
    enter_branch,
    join_branch,
)

__all__ = ["BranchPrecision", "GradientScales", "branch_bias", "branch_linear", "enter_branch", "join_branch"]
