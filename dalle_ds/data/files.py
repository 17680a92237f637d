"""Folders that appear whole or not at all: written beside their place, then renamed."""

from __future__ import annotations

import errno
import json
import os
import shutil
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from dalle_ds.errors import DataError


@contextmanager
def built_beside(folder: Path) -> Iterator[Path]:
    """A temporary folder beside `folder` that takes its name when the block ends well, and is removed when it does not.

    A folder of that name is replaced; callers check beforehand that it may be.

    Raises:
        DataError: the disk is full.
    """
    folder.parent.mkdir(parents=True, exist_ok=True)
    partial = Path(tempfile.mkdtemp(prefix=f"{folder.name}.partial-", dir=folder.parent))
    try:
        with disk_full_is_a_data_error(folder):
            partial.chmod(0o777 & ~_umask())  # mkdtemp makes folders that only their owner may read
            yield partial
            _replace(partial, folder)
    finally:
        shutil.rmtree(partial, ignore_errors=True)


@contextmanager
def disk_full_is_a_data_error(folder: Path) -> Iterator[None]:
    """Turns "no space left on device" into a `DataError` that names `folder`."""
    try:
        yield
    except OSError as error:
        if error.errno in (errno.ENOSPC, errno.EDQUOT):
            raise DataError(f"no space left on the disk of {folder}: free some, or write to another disk") from error
        raise


def write_json(path: Path, content: dict[str, Any]) -> None:
    """Write JSON and wait until it is on the disk: manifests are written last and vouch for the files beside them."""
    with path.open("w", encoding="utf-8") as file:
        json.dump(content, file, indent=2, ensure_ascii=False)
        file.write("\n")
        file.flush()
        os.fsync(file.fileno())


def _replace(partial: Path, folder: Path) -> None:
    if not folder.exists():
        partial.rename(folder)
        return
    old = Path(tempfile.mkdtemp(prefix=f"{folder.name}.old-", dir=folder.parent))
    folder.rename(old / folder.name)
    partial.rename(folder)
    shutil.rmtree(old)


def _umask() -> int:
    mask = os.umask(0)
    os.umask(mask)
    return mask
