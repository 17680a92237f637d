"""Rows into Arrow files, one at a time: what `store` reads."""

from __future__ import annotations

import io
import os
from pathlib import Path
from typing import Any

import pyarrow as pa
import xxhash

from dalle_ds.data.snapshot import DataFile
from dalle_ds.data.store import vector_check

_FILE_BYTES = 512 * 2**20
_BATCH_BYTES = 16 * 2**20
_BATCH_ROWS = 1000


class StoreWriter:
    """Writes rows to files of about 512 MiB, holding at most 16 MiB or 1,000 rows.

    Args:
        folder: of the files; it may have others.
        name: what theirs begin with.
    """

    def __init__(self, folder: Path, schema: pa.Schema, name: str = "data") -> None:
        folder.mkdir(parents=True, exist_ok=True)
        self._folder = folder
        self._name = name
        self._schema = schema
        self._batch: list[dict[str, Any]] = []
        self._batch_bytes = 0
        self._files: list[DataFile] = []
        self._file_rows = 0
        self._file: _DigestedFile | None = None
        self._writer: pa.RecordBatchStreamWriter | None = None

    def add(self, row: dict[str, Any], size: int) -> None:
        """Append a row of about `size` bytes."""
        self._batch.append(row)
        self._batch_bytes += size
        if self._batch_bytes >= _BATCH_BYTES or len(self._batch) >= _BATCH_ROWS:
            self._write_batch()

    def add_vector(self, vector: bytes, seed: int, *, readable: bool = True) -> None:
        """Append a row of `vector_schema`.

        Args:
            seed: of its check: the row, or what else its reader will tell it by.
            readable: False says that there is no such vector.
        """
        self.add({"vector": vector, "check": vector_check(vector, seed) if readable else 0}, len(vector))

    def close(self) -> list[DataFile]:
        """Finish the last file and force all to the disk; there is always one, if without rows."""
        if self._batch or not (self._files or self._writer):
            self._write_batch()
        self._close_file()
        return self._files

    def _write_batch(self) -> None:
        if self._file is None:
            self._file = _DigestedFile(self._folder / f"{self._name}-{len(self._files):05d}.arrow")
            self._writer = pa.ipc.new_stream(self._file, self._schema)
        columns = {name: [row[name] for row in self._batch] for name in self._schema.names}
        assert self._writer is not None
        self._writer.write_batch(pa.RecordBatch.from_pydict(columns, schema=self._schema))
        self._file_rows += len(self._batch)
        self._batch, self._batch_bytes = [], 0
        if self._file.tell() >= _FILE_BYTES:
            self._close_file()

    def _close_file(self) -> None:
        if self._writer is None or self._file is None:
            return
        self._writer.close()
        file, self._file, self._writer = self._file, None, None
        size = file.tell()
        os.fsync(file.fileno())
        file.close()
        self._files.append(DataFile(Path(file.name).name, self._file_rows, size, file.digest.hexdigest()))
        self._file_rows = 0


class _DigestedFile(io.FileIO):
    """A file to write that knows the digest of what was written, not of what the disk made of it."""

    def __init__(self, path: Path) -> None:
        super().__init__(path, "wb")
        self.digest = xxhash.xxh3_128()

    def write(self, data: Any) -> int:
        written, view = 0, memoryview(data).cast("B")
        while written < len(view):
            written += super().write(view[written:]) or 0
        self.digest.update(view)
        return written
