"""Activations that are computed again in the backward pass instead of being kept for it."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from torch import Tensor
from torch.utils.checkpoint import checkpoint


def recomputed(function: Callable[..., Tensor], *inputs: Any) -> Tensor:
    """function(*inputs), of which only the inputs are kept.

    The backward pass repeats the function up to the last value that it needs: where a function ends with a matrix product,
    that product is not repeated.
    """
    # What is dropped depends on no random state that would have to be restored.
    return checkpoint(function, *inputs, use_reentrant=False, preserve_rng_state=False)
