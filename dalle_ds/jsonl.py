"""Files of JSON lines that survive what disks do: no line is ever half there, and none is lost while the disk is full."""

from __future__ import annotations

import json
import math
import os
import threading
from collections.abc import Iterator, Mapping
from contextlib import suppress
from pathlib import Path
from typing import Any

from dalle_ds.parsing import parse_json


class LineFile:
    """Appends to a file, one JSON object per line; may be used by several threads.

    Args:
        path: the file; made where it does not exist.

    Raises:
        OSError: it cannot be opened.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        self._lock = threading.Lock()
        self._waiting: list[bytes] = []
        self._file: int | None = None
        self._open()

    def append(self, record: Mapping[str, Any]) -> OSError | None:
        """Write a line, or keep it in memory until it can be written; returns why it cannot. Never raises an OSError.

        JSON has no NaN: a number that is not finite becomes null.
        """
        finite = {
            name: None if isinstance(value, float) and not math.isfinite(value) else value
            for name, value in record.items()
        }
        with self._lock:
            self._waiting.append(json.dumps(finite).encode() + b"\n")
            return self._write()

    def sync(self) -> None:
        """Force all lines to the disk.

        Raises:
            OSError: some are not there.
        """
        with self._lock:
            if self._file is None:
                return
            failure = self._write()
            if failure is not None:
                raise failure
            os.fsync(self._file)

    def reopen(self) -> None:
        """Go on behind the end of a file that took the place of this one; lines that wait are forgotten.

        Raises:
            OSError: it cannot be opened.
        """
        with self._lock:
            self._waiting.clear()
            if self._file is not None:
                os.close(self._file)
            self._open()

    def close(self) -> int:
        """Close the file; returns how many lines could not be written."""
        with self._lock:
            if self._file is not None:
                self._write()
                os.close(self._file)
                self._file = None
            return len(self._waiting)

    def _open(self) -> None:
        self._file = os.open(self.path, os.O_WRONLY | os.O_APPEND | os.O_CREAT, 0o666)
        self._size = os.fstat(self._file).st_size
        self._torn = False

    def _write(self) -> OSError | None:
        content = b"".join(self._waiting)
        if self._file is None or not content:
            return None
        try:
            if self._torn:
                os.ftruncate(self._file, self._size)
            self._torn = True
            written = os.write(self._file, content)
            if written < len(content):  # there is room for some of it
                written += os.write(self._file, content[written:])
            if written < len(content):
                raise OSError(f"{self.path} takes only {written} of {len(content)} bytes")
        except OSError as error:
            # Whatever is there of a line goes again, so that the next one does not follow it on its line.
            with suppress(OSError):
                os.ftruncate(self._file, self._size)
                self._torn = False
            return error
        self._torn = False
        self._size += len(content)
        self._waiting.clear()
        return None


def read_records(path: Path) -> Iterator[dict[str, Any]]:
    """Each whole line as a dict with the update as "step"; what is left of a line that was cut off is passed over."""
    for line in path.read_text(errors="replace").splitlines():
        try:
            record = parse_json(line)
        except ValueError:
            continue
        if isinstance(record, dict) and type(record.get("step")) is int and 0 <= record["step"] < 2**63:
            yield record
