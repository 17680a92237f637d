"""A block of code under a limit of memory: what would allocate much more ends in a MemoryError, not in a slow machine."""

from __future__ import annotations

import resource
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

_PAGES = Path("/proc/self/statm")


@contextmanager
def limited_memory(extra_bytes: int = 2**29) -> Iterator[None]:
    """No more than `extra_bytes` of addresses beyond what the process has already. On Linux; elsewhere there is no limit."""
    if not _PAGES.exists():
        yield
        return
    soft, hard = resource.getrlimit(resource.RLIMIT_AS)
    pages = int(_PAGES.read_text().split()[0])
    resource.setrlimit(resource.RLIMIT_AS, (pages * resource.getpagesize() + extra_bytes, hard))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_AS, (soft, hard))
