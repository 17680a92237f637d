"""Whether files are still those that they were: by size and time, and where only the time differs, by digest."""

from __future__ import annotations

from pathlib import Path

from dalle_ds.data.shards import Stamp, digest_of, stamp_of
from dalle_ds.errors import DataChangedError


class Stamps:
    """Sizes and times of files at one time.

    Args:
        stamps: as `stamp_of` has them. Files that could not be looked at then are not looked at later.
        digests: XXH3-128 of the same files, in hexadecimal.
    """

    def __init__(self, stamps: dict[Path, Stamp | OSError], digests: dict[Path, str]) -> None:
        self._stamps = {path: stamp for path, stamp in stamps.items() if not isinstance(stamp, OSError)}
        self._digests = digests

    def check(self) -> None:
        """See that each file that is still there is the same.

        Raises:
            DataChangedError: one has another size, or another time and other contents.
        """
        for path, then in self._stamps.items():
            now = stamp_of(path)
            if isinstance(now, OSError) or now == then:
                continue
            if now[0] != then[0]:
                raise DataChangedError(_sentence(path, f"it has {now[0]:,} bytes, and had {then[0]:,}"))
            try:
                same = digest_of(path) == self._digests[path]
            except OSError:
                continue
            if not same:
                raise DataChangedError(_sentence(path, "its contents are other ones"))
            self._stamps[path] = now  # copied or touched, but the same


def _sentence(path: Path, what: str) -> str:
    return f"{path} has changed since it was opened ({what}): put back what was there, or begin a new run in another --run_dir"
