"""Whether files are still those that were written: by size and time, and where the time differs, by digest."""

from __future__ import annotations

from pathlib import Path

from dalle_ds.data.shards import Stamp, digest_of, stamp_of
from dalle_ds.errors import DataChangedError, DataError


class Stamps:
    """Sizes and times of files at one time.

    Args:
        stamps: as `stamp_of` has them. Files that could not be looked at then are not looked at later.
        written: (bytes, XXH3-128 in hexadecimal) of the same files when they were made.
    """

    def __init__(self, stamps: dict[Path, Stamp | OSError], written: dict[Path, tuple[int, str]]) -> None:
        self._stamps = {path: stamp for path, stamp in stamps.items() if not isinstance(stamp, OSError)}
        self._written = written

    def check(self) -> None:
        """See that each file that is still there is the same, or is again what was written.

        One that is cut off is lost, like one that is gone: what reads of it finds that out.

        Raises:
            DataChangedError: one has grown, or has another time and other contents.
        """
        for path, then in self._stamps.items():
            now = stamp_of(path)
            if isinstance(now, OSError) or now == then:
                continue
            size, digest = self._written[path]
            if now[0] < size:
                continue
            if now[0] > size:
                raise DataChangedError(_sentence(path, f"it has {now[0]:,} bytes, and had {size:,}"))
            try:
                same = digest_of(path) == digest
            except OSError:
                continue
            if not same:
                raise DataChangedError(_sentence(path, "its contents are other ones"))
            self._stamps[path] = now  # copied, touched or put back, but the same


def may_pass(error: DataError) -> bool:
    """Whether an error of reading a manifest is one of the disk or network, which says nothing of what is stored there."""
    cause = error.__cause__
    return isinstance(cause, OSError) and not isinstance(cause, FileNotFoundError)


def _sentence(path: Path, what: str) -> str:
    return f"{path} has changed since it was opened ({what}): put back what was there, or begin a new run in another --run_dir"
