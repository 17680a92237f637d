"""Whether all processes see one folder, and how fast they write there all together, as for a checkpoint."""

from __future__ import annotations

import hashlib
import os
import secrets
import shutil
import time
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from dalle_ds.errors import CheckpointError
from dalle_ds.parallel import Mesh

SEEN_WITHIN = 10.0
"""Seconds that a file of another machine may take to be seen."""
LEFT_BEHIND = 3600.0
"""Seconds after which the files of a check that was killed are removed: none takes so long."""
MEGABYTE = 10**6


@dataclass(frozen=True)
class Disk:
    """A folder, as one process sees it."""

    write: float
    """Bytes per second, forced to the disk, while all processes write."""
    read: float
    """Bytes per second of a file that another process wrote, while all read."""
    free: int
    """Bytes that can still be written."""
    trouble: str | None = None
    """What went wrong, in words."""


def measure_disk(folder: Path, mesh: Mesh, megabytes: int) -> Disk:
    """Write a file, and read the next rank's. Leaves nothing behind. Collective.

    Args:
        folder: of runs; made where it does not exist.
        megabytes: size of each process's file.

    Raises:
        CheckpointError: the main process cannot write there.
    """
    name = f".doctor-{mesh.decide(lambda: _make(folder))}"
    scratch = folder / name
    write = read = 0.0
    free, trouble = 0, None
    try:
        free = shutil.disk_usage(folder).free
        scratch.mkdir(
            exist_ok=True
        )  # where the folder is another one than the main process's, too: the reader will tell
        write = megabytes * MEGABYTE / _write(scratch / str(mesh.rank), _content(mesh.rank, megabytes))
    except OSError as error:
        trouble = f"{error.filename or folder} cannot be written: {error.strerror}"
    mesh.barrier()
    neighbour = (mesh.rank + 1) % mesh.world_size
    try:
        if trouble is None:
            read, trouble = _read(scratch / str(neighbour), neighbour, megabytes)
    except OSError as error:
        trouble = f"{error.filename or folder} cannot be read: {error.strerror}"
    mesh.barrier()
    shutil.rmtree(scratch, ignore_errors=True)
    return Disk(write, read, free, trouble)


def _make(folder: Path) -> str:
    token = secrets.token_hex(4)
    try:
        folder.mkdir(parents=True, exist_ok=True)
        for old in folder.glob(".doctor-*"):
            with suppress(OSError):  # another check may have been faster
                if time.time() - old.stat().st_mtime > LEFT_BEHIND:
                    shutil.rmtree(old, ignore_errors=True)
        (folder / f".doctor-{token}").mkdir()
    except OSError as error:
        raise CheckpointError(
            f"{folder} cannot be written: {error.strerror}; name a folder where runs can be"
        ) from error
    return token


def _content(rank: int, megabytes: int) -> bytes:
    """The file of a rank: nothing that a disk could compress."""
    return np.random.default_rng(rank).bytes(megabytes * MEGABYTE)


def _write(path: Path, content: bytes) -> float:
    began = time.perf_counter()
    with path.open("wb") as handle:
        handle.write(content)
        handle.flush()
        os.fsync(handle.fileno())
        # So that the reader, where it is on this machine, has it from the disk and not from memory.
        os.posix_fadvise(handle.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)
    return time.perf_counter() - began


def _read(path: Path, rank: int, megabytes: int) -> tuple[float, str | None]:
    """Bytes per second, and what is wrong with the file of another rank."""
    size = megabytes * MEGABYTE
    end = time.monotonic() + SEEN_WITHIN
    while not path.exists() or path.stat().st_size < size:
        if time.monotonic() > end:
            return 0.0, f"does not see a file that rank {rank} wrote in {path.parent.parent}: the folder is not shared"
        time.sleep(0.1)
    began = time.perf_counter()
    found = path.read_bytes()
    seconds = time.perf_counter() - began
    if hashlib.sha256(found).digest() != hashlib.sha256(_content(rank, megabytes)).digest():
        return 0.0, f"reads something else than rank {rank} wrote in {path.parent.parent}"
    return size / seconds, None
