"""What cannot be written or read is the user's to mend."""

from __future__ import annotations

import errno
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from dalle_ds.errors import DataError


@contextmanager
def disk_full_is_a_data_error(folder: Path, option: str = "") -> Iterator[None]:
    """Turns a failure to write, a full disk above all, into a `DataError` that names `folder`, and the option for another."""
    try:
        yield
    except OSError as error:
        if error.errno in (errno.ENOSPC, errno.EDQUOT):
            raise DataError(f"no space left on the disk of {folder}: free some, or write to another disk") from error
        other = f"name another folder{f' with {option}' if option else ''}"
        raise DataError(f"{folder} cannot be written ({error.strerror or error}): {other}") from error


@contextmanager
def unreadable_is_a_data_error(path: Path) -> Iterator[None]:
    """Turns a failure to read into a `DataError` that names `path`, whatever is being written meanwhile."""
    try:
        yield
    except OSError as error:
        raise DataError(f"{path} cannot be read: {error.strerror or error}") from error
