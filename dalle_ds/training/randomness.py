"""Random numbers that a resumed run draws again: every update begins with seeds of its own."""

from __future__ import annotations

import hashlib
import random

import numpy as np
import torch
from torch import Tensor


def seed_update(seed: int, step: int, index: int) -> None:
    """Seed all global generators (Python, NumPy, PyTorch on the CPU and this process's GPU) for an update of one process.

    What is drawn in an update then depends on nothing that came before it, and there are no generators to be saved. `index` is
    the process's place among those that see different data; parts of one model draw alike.
    """
    digest = hashlib.blake2b(f"{seed}/{step}/{index}".encode(), digest_size=8).digest()
    number = int.from_bytes(digest, "little") >> 1
    random.seed(number)
    np.random.seed(number % 2**32)  # noqa: NPY002 (the generator that libraries draw from)
    torch.default_generator.manual_seed(number)
    if torch.cuda.is_initialized():
        torch.cuda.manual_seed(number)


def generator_states() -> tuple[Tensor, Tensor | None]:
    """Where PyTorch's global generators are, on the CPU and this process's GPU."""
    return torch.get_rng_state(), torch.cuda.get_rng_state() if torch.cuda.is_initialized() else None


def draw_again_from(states: tuple[Tensor, Tensor | None]) -> None:
    """Draw again what was drawn from then on."""
    cpu, gpu = states
    torch.set_rng_state(cpu)
    if gpu is not None:
        torch.cuda.set_rng_state(gpu)
