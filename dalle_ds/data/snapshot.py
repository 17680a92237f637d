"""Files of a prepared folder as its manifest describes them, and whether they are still so."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from dalle_ds.data.faults import MISSING_FILE, READ_ERROR, TRUNCATED_FILE, Fault
from dalle_ds.errors import DataChangedError, DataError
from dalle_ds.files import digest_of

_PUT_BACK = "put back what was there, or begin a new run in another --run_dir"

Stamp = tuple[int, int]
"""(bytes, time of the last change in nanoseconds since the epoch) of a file."""


@dataclass(frozen=True)
class DataFile:
    """What a manifest says of a file."""

    file: str
    """Its name in the folder of the split."""
    rows: int
    bytes: int
    """Its size."""
    xxh3_128: str
    """Digest of its bytes, in hexadecimal."""

    def __post_init__(self) -> None:
        numbers = (self.rows, self.bytes)
        if not isinstance(self.file, str) or Path(self.file).name != self.file or not isinstance(self.xxh3_128, str):
            raise ValueError(f"no file of a store: {str(self.file)[:80]!r}")
        if any(type(number) is not int or number < 0 for number in numbers):
            raise ValueError(f"{self.file} has impossible sizes")


def size_problem(path: Path, size: int) -> tuple[str, str] | None:
    """(reason, sentence) for which a file that should have `size` bytes cannot be used, or None."""
    return _problem(path, size, _stamp_of(path))


def _stamp_of(path: Path) -> Stamp | OSError:
    try:
        found = path.stat()
    except OSError as error:
        return error
    return found.st_size, found.st_mtime_ns


def _problem(path: Path, size: int, stamp: Stamp | OSError) -> tuple[str, str] | None:
    if isinstance(stamp, FileNotFoundError):
        return MISSING_FILE, f"{path} is missing"
    if isinstance(stamp, OSError):
        return READ_ERROR, f"{path} cannot be read: {stamp.strerror}"
    if stamp[0] != size:
        return TRUNCATED_FILE, f"{path} has {stamp[0]:,} bytes instead of {size:,}"
    return None


class FileSnapshot:
    """Sizes and times of files when they were opened: tells later whether they are still what was written."""

    def __init__(self, folder: Path, files: Sequence[DataFile]) -> None:
        self._files = {folder / file.file: file for file in files}
        self._stamps = {path: _stamp_of(path) for path in self._files}

    @property
    def faults(self) -> Iterator[Fault]:
        """Files that were missing or of the wrong size then."""
        for path, file in self._files.items():
            problem = _problem(path, file.bytes, self._stamps[path])
            if problem is not None:
                yield Fault(problem[0], str(path), file.rows)

    def check(self) -> None:
        """See that each file that is still there is the same, or is again what was written.

        Contents are read only where the time differs. A file that is cut off is lost, like one that is gone: what reads of it
        finds that out. One that could not be looked at in the first place is not looked at now. `DataChangedError` where one
        has grown, or has another time and other contents.
        """
        for path, then in self._stamps.items():
            now, file = _stamp_of(path), self._files[path]
            if isinstance(then, OSError) or isinstance(now, OSError) or now == then or now[0] < file.bytes:
                continue
            what = f"it has {now[0]:,} bytes, and had {file.bytes:,}" if now[0] > file.bytes else None
            try:
                if what is None and digest_of(path) != file.xxh3_128:
                    what = "its contents are other ones"
            except OSError:
                continue
            if what is not None:
                raise DataChangedError(f"{path} has changed since it was opened ({what}): {_PUT_BACK}")
            self._stamps[path] = now  # copied, touched or put back, but the same


def check_same(folder: Path, read: Callable[[], Any], then: Any, otherwise: str) -> None:
    """See that `read` gives of a manifest what it gave then; `DataChangedError` that says `otherwise` where it does not, or
    that there is none. An error of the disk or network says nothing of what is there."""
    try:
        now = read()
    except DataError as error:
        cause = error.__cause__
        if isinstance(cause, OSError) and not isinstance(cause, FileNotFoundError):
            return
        raise DataChangedError(f"{folder} has changed since it was opened: {error}") from error
    if now != then:
        raise DataChangedError(f"{otherwise}: {_PUT_BACK}")
