"""Files that are whole or absent: written beside, forced to the disk, renamed."""

from __future__ import annotations

import os
import shutil
from pathlib import Path


def write_bytes(path: Path, content: bytes) -> None:
    """Write a file whole or not at all; OSError where that fails."""
    beside = path.with_name(f".{path.name}.partial-{os.getpid()}")
    try:
        with beside.open("wb") as handle:
            handle.write(content)
            handle.flush()
            os.fsync(handle.fileno())
        beside.replace(path)
    except OSError:
        beside.unlink(missing_ok=True)
        raise


def write_text(path: Path, text: str) -> None:
    """`write_bytes` of UTF-8 text."""
    write_bytes(path, text.encode())


def replace_folder(new: Path, path: Path) -> None:
    """Put the complete folder `new` in the place of `path`; whoever looks finds the old one or the new one, whole."""
    sync_folder(new)
    if path.exists():
        old = path.parent / f".{path.name}.old-{os.getpid()}"
        path.rename(old)
        new.rename(path)
        shutil.rmtree(old, ignore_errors=True)
    else:
        path.parent.mkdir(parents=True, exist_ok=True)
        new.rename(path)


def sync_folder(folder: Path) -> None:
    """Force every file below `folder` to the disk, so that a rename never makes a half-written one look complete."""
    for file in sorted(folder.rglob("*")):
        if file.is_file():
            with file.open("rb") as handle:
                os.fsync(handle.fileno())
