"""Rows into Arrow files, one at a time: what `store` reads."""

from __future__ import annotations

import io
from pathlib import Path
from typing import Any

import pyarrow as pa
import xxhash

from dalle_ds.data.snapshot import DataFile

_FILE_BYTES = 512 * 2**20
_BATCH_BYTES = 16 * 2**20
_BATCH_ROWS = 1000


class StoreWriter:
    """Writes rows to a new `folder` in files of about 512 MiB, holding at most 16 MiB or 1,000 rows."""

    def __init__(self, folder: Path, schema: pa.Schema) -> None:
        folder.mkdir(parents=True)
        self._folder = folder
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

    def close(self) -> list[DataFile]:
        """Finish the last file; there is always one, if without rows."""
        if self._batch or not (self._files or self._writer):
            self._write_batch()
        self._close_file()
        return self._files

    def _write_batch(self) -> None:
        if self._file is None:
            self._file = _DigestedFile(self._folder / f"data-{len(self._files):05d}.arrow")
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
