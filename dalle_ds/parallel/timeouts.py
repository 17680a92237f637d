"""How long collectives wait for other processes.

One that waits longer raises an error (gloo), or has its process ended by a thread of NCCL's. Either ends the run (`Watch`).
"""

from __future__ import annotations

import datetime
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
import torch.distributed as dist
from torch.distributed import distributed_c10d


def set_timeout(seconds: float) -> None:
    """Set how long collectives that begin from now on may wait, in every process group this process belongs to."""
    for group in _own_groups():
        distributed_c10d._set_pg_timeout(datetime.timedelta(seconds=seconds), group)


@contextmanager
def extended_timeout(seconds: float) -> Iterator[None]:
    """Let collectives wait for at least so long, until all processes have left the block. Collective."""
    before = {group: _timeout(group) for group in _own_groups()}
    wanted = datetime.timedelta(seconds=seconds)
    for group, timeout in before.items():
        distributed_c10d._set_pg_timeout(max(wanted, timeout), group)
    try:
        yield
        if before:
            dist.barrier()  # else whoever is done first would wait for the others with the shorter timeout
    finally:
        for group, timeout in before.items():
            distributed_c10d._set_pg_timeout(timeout, group)


def _own_groups() -> list[Any]:
    """Groups of several processes, DeepSpeed's own included."""
    if not dist.is_initialized():
        return []
    groups = list(distributed_c10d._world.pg_map)
    return [group for group in groups if group.size() > 1]


def _timeout(group: Any) -> datetime.timedelta:
    backends = [group._get_backend(torch.device(kind.type)) for kind in group._device_types]
    return max(backend.options._timeout for backend in backends)
