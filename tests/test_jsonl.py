"""Files of JSON lines on disks that are full, and that are well again."""

from __future__ import annotations

import errno
import json
import math
import os
from pathlib import Path

import pytest

from dalle_ds.jsonl import LineFile, read_records


class Disk:
    """Takes `room` bytes more, then none."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch, room: int) -> None:
        self.room = room
        self.write = os.write
        monkeypatch.setattr("dalle_ds.jsonl.os.write", self._write)

    def _write(self, file: int, content: bytes) -> int:
        if content and self.room <= 0:
            raise OSError(errno.ENOSPC, "No space left on device")
        written = self.write(file, content[: self.room])
        self.room -= written
        return written


def steps(path: Path) -> list[int]:
    lines = [json.loads(line) for line in path.read_text().splitlines()]  # every one of them is whole
    return [line["step"] for line in lines]


def test_lines_wait_while_the_disk_is_full_and_none_is_half_there(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = tmp_path / "lines.jsonl"
    lines = LineFile(path)
    disk = Disk(monkeypatch, 40)  # two lines and a half
    failures = [lines.append({"step": step, "a": 1}) for step in range(1, 6)]
    assert [failure is None for failure in failures] == [True, True, False, False, False]
    assert steps(path) == [1, 2]
    with pytest.raises(OSError, match="No space left"):
        lines.sync()
    disk.room = 10_000
    assert lines.append({"step": 6}) is None
    assert steps(path) == [1, 2, 3, 4, 5, 6]
    lines.sync()
    assert lines.close() == 0


def test_lines_that_could_never_be_written_are_counted(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    lines = LineFile(tmp_path / "lines.jsonl")
    Disk(monkeypatch, 0)
    for step in range(3):
        lines.append({"step": step})
    assert lines.close() == 3 and not (tmp_path / "lines.jsonl").read_bytes()


def test_a_file_that_was_replaced_is_gone_on_with(tmp_path: Path) -> None:
    path = tmp_path / "lines.jsonl"
    lines = LineFile(path)
    for step in (1, 2, 3):
        lines.append({"step": step})
    (tmp_path / "other").write_text('{"step": 1}\n')
    (tmp_path / "other").replace(path)
    lines.reopen()
    lines.append({"step": 2})
    assert steps(path) == [1, 2]
    lines.close()


def test_numbers_that_are_none_are_null(tmp_path: Path) -> None:
    lines = LineFile(tmp_path / "lines.jsonl")
    lines.append({"step": 1, "loss": math.nan, "norm": math.inf, "rate": 0.5})
    lines.close()
    assert list(read_records(tmp_path / "lines.jsonl")) == [{"step": 1, "loss": None, "norm": None, "rate": 0.5}]
