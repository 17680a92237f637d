"""Whether files are still those that they were: by size and time, and where only the time differs, by digest."""

from __future__ import annotations

from pathlib import Path

from dalle_ds.data.shards import digest_of
from dalle_ds.errors import DataChangedError

Stamp = tuple[int, int]  # bytes, nanoseconds since the epoch


class Stamps:
    """Sizes and times of files at the time when this is made.

    Args:
        files: path → XXH3-128 in hexadecimal. Files that are missing now are not looked at later.
    """

    def __init__(self, files: dict[Path, str]) -> None:
        self._files = files
        self._stamps = {path: _stamp(path) for path in files}

    def check(self) -> None:
        """See that each file that is still there is the same.

        Raises:
            DataChangedError: one has another size, or another time and other contents.
        """
        for path, digest in self._files.items():
            then, now = self._stamps[path], _stamp(path)
            if now is None or then is None or now == then:
                continue
            if now[0] != then[0]:
                raise DataChangedError(_sentence(path, f"it has {now[0]:,} bytes, and had {then[0]:,}"))
            try:
                same = digest_of(path) == digest
            except OSError:
                continue
            if not same:
                raise DataChangedError(_sentence(path, "its contents are other ones"))
            self._stamps[path] = now  # copied or touched, but the same


def _sentence(path: Path, what: str) -> str:
    return f"{path} has changed since it was opened ({what}): put back what was there, or begin a new run in another --run_dir"


def _stamp(path: Path) -> Stamp | None:
    try:
        found = path.stat()
    except OSError:
        return None
    return found.st_size, found.st_mtime_ns
