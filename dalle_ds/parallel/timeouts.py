"""How long processes wait for each other, and what it means that one waited in vain.

A process that waits too long raises an error (gloo), or is ended by a thread of NCCL's, which prints the operation. Either
ends the run (`watch.py`).
"""

from __future__ import annotations

import datetime
import re
import traceback
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch.distributed import distributed_c10d

from dalle_ds.errors import TrainingError

_TIMED_OUT = re.compile(r"Timed out waiting (\d+)ms|timed out|(?:wait|operation) timeout", re.IGNORECASE)
_LIBRARIES = ("/torch/", "/deepspeed/")


class CollectiveError(TrainingError):
    """An operation of several processes that one of them did not come to in time."""


def set_timeout(seconds: float) -> None:
    """Set how long operations that begin from now on may wait, in every process group this process belongs to."""
    for group in _own_groups():
        distributed_c10d._set_pg_timeout(datetime.timedelta(seconds=seconds), group)


@contextmanager
def patience(seconds: float) -> Iterator[None]:
    """Let operations wait for so long, where they wait less otherwise, until all processes have left the block. Collective."""
    before = {group: _timeout(group) for group in _own_groups()}
    wanted = datetime.timedelta(seconds=seconds)
    for group, timeout in before.items():
        distributed_c10d._set_pg_timeout(max(wanted, timeout), group)
    try:
        yield
        if before:
            dist.barrier()  # else whoever is done first would wait for the others with little patience
    finally:
        for group, timeout in before.items():
            distributed_c10d._set_pg_timeout(timeout, group)


def is_about_communication(error: BaseException | None) -> bool:
    """Whether an error, or what it came from, is a collective's, such as that a connection was closed by the other side."""
    return _cause(error) is not None


def timed_out(error: BaseException | None) -> CollectiveError | None:
    """What to say of an error that comes from an operation that waited in vain; None for other errors."""
    cause = _cause(error)
    found = _TIMED_OUT.search(str(cause)) if cause is not None else None
    if cause is None or found is None:
        return None
    frames = traceback.extract_tb(cause.__traceback__)
    inside = [frame.name for frame in frames if frame.filename == distributed_c10d.__file__]
    operation = inside[-1] if inside else "an operation of several processes"
    ours = [frame for frame in frames if not any(part in frame.filename for part in _LIBRARIES)]
    place = f" ({Path(ours[-1].filename).name}:{ours[-1].lineno}, {ours[-1].name})" if ours else ""
    limit = f" within {int(found[1]) / 60_000:.3g} min" if found[1] else ""
    return CollectiveError(f"{operation}{place} did not end{limit}")


def _cause(error: BaseException | None) -> BaseException | None:
    """The error that communication raised, if any."""
    while error is not None:
        # gloo raises errors of no type of their own, most of which begin with the place in its source.
        says_so = isinstance(error, RuntimeError) and ("/gloo/" in str(error) or "pair closure" in str(error))
        if says_so or isinstance(error, dist.DistError):
            return error
        error = error.__cause__ or error.__context__
    return None


def _own_groups() -> list[Any]:
    """Groups of several processes, DeepSpeed's own included."""
    if not dist.is_initialized():
        return []
    groups = list(distributed_c10d._world.pg_map)
    return [group for group in groups if group.size() > 1]


def _timeout(group: Any) -> datetime.timedelta:
    backends = [group._get_backend(torch.device(kind.type)) for kind in group._device_types]
    return max(backend.options._timeout for backend in backends)
