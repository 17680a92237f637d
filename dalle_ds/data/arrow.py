"""Writing a split as Arrow shards, one row at a time, in the layout that `datasets.load_from_disk` opens.

`Dataset.save_to_disk` needs the rows to be in a dataset already, which would write a corpus twice; this writes it once.
"""

from __future__ import annotations

import hashlib
import io
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import datasets
import pyarrow as pa
import xxhash

from dalle_ds.data.shards import Shard, checksum
from dalle_ds.files import write_json

FEATURES = datasets.Features(
    {
        "image": datasets.Value("binary"),
        "captions": datasets.List(datasets.Value("string")),
        "name": datasets.Value("string"),
        "group": datasets.Value("string"),
        "image_check": datasets.Value("uint64"),
        "text_check": datasets.Value("uint64"),
    }
)
_SHARD_BYTES = 512 * 2**20
_BATCH_BYTES = 16 * 2**20
_BATCH_ROWS = 1000


@dataclass(frozen=True)
class StoredPair:
    """One row of a prepared split."""

    image: bytes
    """The encoded picture."""
    captions: list[str]
    """At least one, cleaned."""
    name: str
    group: str


class ShardWriter:
    """Writes rows to `folder` in shards of about 512 MiB, holding at most 16 MiB or 1,000 rows.

    Args:
        folder: made here.
        schema: of the rows.
    """

    def __init__(self, folder: Path, schema: pa.Schema) -> None:
        folder.mkdir(parents=True)
        self._folder = folder
        self._schema = schema
        self._batch: list[dict[str, Any]] = []
        self._batch_bytes = 0
        self._shards: list[Shard] = []
        self._shard_rows = 0
        self._file: _DigestedFile | None = None
        self._writer: pa.RecordBatchStreamWriter | None = None

    def add(self, row: dict[str, Any], size: int) -> None:
        """Append a row of about `size` bytes."""
        self._batch.append(row)
        self._batch_bytes += size
        if self._batch_bytes >= _BATCH_BYTES or len(self._batch) >= _BATCH_ROWS:
            self._write_batch()

    def close(self) -> list[Shard]:
        """Finish the last shard; there is always one, if without rows."""
        if self._batch or not (self._shards or self._writer):
            self._write_batch()
        self._close_shard()
        return self._shards

    def _write_batch(self) -> None:
        if self._file is None:
            self._file = _DigestedFile(self._folder / f"data-{len(self._shards):05d}.arrow")
            self._writer = pa.ipc.new_stream(self._file, self._schema)
        columns = {name: [row[name] for row in self._batch] for name in self._schema.names}
        assert self._writer is not None
        self._writer.write_batch(pa.RecordBatch.from_pydict(columns, schema=self._schema))
        self._shard_rows += len(self._batch)
        self._batch, self._batch_bytes = [], 0
        if self._file.tell() >= _SHARD_BYTES:
            self._close_shard()

    def _close_shard(self) -> None:
        if self._writer is None or self._file is None:
            return
        self._writer.close()
        file, self._file, self._writer = self._file, None, None
        size = file.tell()
        file.close()
        self._shards.append(Shard(Path(file.name).name, self._shard_rows, size, file.digest.hexdigest()))
        self._shard_rows = 0


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


class SplitWriter:
    """Writes pairs to `folder`, so that `datasets.load_from_disk` opens it."""

    def __init__(self, folder: Path) -> None:
        self._folder = folder
        self._digest = hashlib.sha256()
        self._writer = ShardWriter(folder, FEATURES.arrow_schema)
        self.rows = 0
        self.shards: list[Shard] = []
        """What was written, once closed."""

    def add(self, pair: StoredPair) -> None:
        """Append a pair."""
        stored = [pair.image, *(text.encode() for text in (*pair.captions, pair.name, pair.group))]
        for part in stored:
            self._digest.update(len(part).to_bytes(8, "big"))
            self._digest.update(part)
        checks = {
            "image_check": checksum(pair.image),
            "text_check": checksum(*pair.captions, pair.name, pair.group),
        }
        self._writer.add(vars(pair) | checks, sum(map(len, stored)))
        self.rows += 1

    def close(self) -> str:
        """Finish the last shard and the files that describe the split.

        Returns:
            SHA-256 of all rows in order, in hexadecimal.
        """
        self.shards = self._writer.close()
        datasets.DatasetInfo(features=FEATURES).write_to_directory(str(self._folder))
        state: dict[str, Any] = {
            "_data_files": [{"filename": shard.file} for shard in self.shards],
            "_fingerprint": self._digest.hexdigest()[:16],
            "_format_columns": None,
            "_format_kwargs": {},
            "_format_type": None,
            "_output_all_columns": False,
            "_split": self._folder.name,
        }
        write_json(self._folder / "state.json", state)
        return self._digest.hexdigest()


def read_rows(folder: Path) -> Iterator[StoredPair]:
    """The rows of a closed split, in order, a batch in memory at a time."""
    for shard in sorted(folder.glob("data-*.arrow")):
        with pa.memory_map(str(shard)) as source, pa.ipc.open_stream(source) as batches:
            for batch in batches:
                for row in batch.to_pylist():
                    yield StoredPair(row["image"], row["captions"], row["name"], row["group"])
