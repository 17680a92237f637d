"""Dealing the rows of a set out to processes, and collecting what they found, so that every row counts exactly once.

Rows go out in chunks of a fixed size, chunk i to process i mod P. What shares a batch is therefore the same for any number of
processes, and so are the bits of each row's results on CPUs.
"""

from __future__ import annotations

import time
from collections.abc import Iterator

import torch
from torch import Tensor

from dalle_ds.parallel import Mesh

CHUNK = 16
"""Rows in a chunk."""
TELL_SECONDS = 30.0
"""Time between two lines that say how far it is."""


def dealt(rows: int, mesh: Mesh, what: str = "", chunk: int = CHUNK) -> Iterator[list[int]]:
    """This process's chunks of the rows 0 … rows − 1.

    Args:
        what: what is done with them, for a line about every half minute from the main process; "" says nothing.
    """
    started = told = time.monotonic()
    for start in range(mesh.rank * chunk, rows, mesh.world_size * chunk):
        yield list(range(start, min(rows, start + chunk)))
        now = time.monotonic()
        if what and mesh.is_main and now - told > TELL_SECONDS:
            told = now
            print(f"{what}: {min(rows, start + chunk):,} of {rows:,} after {now - started:.0f} s", flush=True)


class Collected:
    """One value per row, filled in by whichever process has the row.

    Args:
        rows: how many there are.
        shape: of a value.
        dtype: of a value; sums of it with zeros must be exact.
    """

    def __init__(self, rows: int, shape: tuple[int, ...] = (), dtype: torch.dtype = torch.float64) -> None:
        self._values = torch.zeros(rows, *shape, dtype=dtype)
        self._filled = torch.zeros(rows, dtype=torch.int64)

    def put(self, rows: list[int], values: Tensor) -> None:
        """The values (len(rows), *shape) of some rows."""
        index = torch.tensor(rows, dtype=torch.int64)
        self._values[index] = values.detach().cpu().to(self._values.dtype)
        self._filled[index] += 1

    def everything(self, mesh: Mesh) -> Tensor:
        """(rows, *shape) on the CPU, on all processes. Collective."""
        filled = mesh.sum(self._filled, "world").cpu()
        assert bool((filled == 1).all()), "every row is one process's, once"
        return mesh.sum(self._values, "world").cpu()
