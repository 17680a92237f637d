"""A full disk is the user's to mend."""

from __future__ import annotations

import errno
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from dalle_ds.errors import DataError


@contextmanager
def disk_full_is_a_data_error(folder: Path) -> Iterator[None]:
    """Turns "no space left on device" into a `DataError` that names `folder`."""
    try:
        yield
    except OSError as error:
        if error.errno in (errno.ENOSPC, errno.EDQUOT):
            raise DataError(f"no space left on the disk of {folder}: free some, or write to another disk") from error
        raise
