"""The process's own memory."""

from __future__ import annotations

import ctypes
import sys

_TRIM_THRESHOLD, _TOP_PAD, _MMAP_MAX = -1, -2, -4  # glibc's malloc.h


def keep_freed_memory() -> bool:
    """Have the C library keep freed memory for the next allocation, instead of handing it back to the system.

    By default glibc maps every large tensor anew, and the system fills its pages with zeros one fault at a time: a
    quarter of a training step on a CPU. The process's memory then stays at its peak. Does nothing elsewhere.

    Returns:
        Whether the C library took the settings.
    """
    if not sys.platform.startswith("linux"):
        return False
    mallopt = getattr(ctypes.CDLL(None), "mallopt", None)
    if mallopt is None:
        return False
    settings = ((_MMAP_MAX, 0), (_TRIM_THRESHOLD, 2**31 - 1), (_TOP_PAD, 2**26))
    taken = [mallopt(name, value) == 1 for name, value in settings]
    return all(taken)
