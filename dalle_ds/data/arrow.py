"""Writing a split as Arrow shards, one row at a time, in the layout that `datasets.load_from_disk` opens.

`Dataset.save_to_disk` needs the rows to be in a dataset already, which would write a corpus twice; this writes it once.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, BinaryIO

import datasets
import pyarrow as pa

from dalle_ds.files import write_json

FEATURES = datasets.Features(
    {
        "image": datasets.Value("binary"),
        "captions": datasets.List(datasets.Value("string")),
        "name": datasets.Value("string"),
        "group": datasets.Value("string"),
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


class SplitWriter:
    """Writes pairs to `folder` in shards of about 512 MiB, holding at most 16 MiB or 1,000 pairs."""

    def __init__(self, folder: Path) -> None:
        folder.mkdir(parents=True)
        self._folder = folder
        self._digest = hashlib.sha256()
        self._batch: list[StoredPair] = []
        self._batch_bytes = 0
        self._shards: list[str] = []
        self._file: BinaryIO | None = None
        self._writer: pa.RecordBatchStreamWriter | None = None
        self.rows = 0

    def add(self, pair: StoredPair) -> None:
        """Append a pair."""
        for part in (pair.image, *(text.encode() for text in (*pair.captions, pair.name, pair.group))):
            self._digest.update(len(part).to_bytes(8, "big"))
            self._digest.update(part)
        self._batch.append(pair)
        self._batch_bytes += len(pair.image)
        self.rows += 1
        if self._batch_bytes >= _BATCH_BYTES or len(self._batch) >= _BATCH_ROWS:
            self._write_batch()

    def close(self) -> str:
        """Finish the last shard and the files that describe the split.

        Returns:
            SHA-256 of all rows in order, in hexadecimal.
        """
        if self._batch or not self._shards:  # a split without rows is one shard without rows
            self._write_batch()
        self._close_shard()
        datasets.DatasetInfo(features=FEATURES).write_to_directory(str(self._folder))
        state: dict[str, Any] = {
            "_data_files": [{"filename": name} for name in self._shards],
            "_fingerprint": self._digest.hexdigest()[:16],
            "_format_columns": None,
            "_format_kwargs": {},
            "_format_type": None,
            "_output_all_columns": False,
            "_split": self._folder.name,
        }
        write_json(self._folder / "state.json", state)
        return self._digest.hexdigest()

    def _write_batch(self) -> None:
        if self._writer is None:
            self._shards.append(f"data-{len(self._shards):05d}.arrow")
            self._file = (self._folder / self._shards[-1]).open("wb")
            self._writer = pa.ipc.new_stream(self._file, FEATURES.arrow_schema)
        columns = {name: [getattr(pair, name) for pair in self._batch] for name in FEATURES}
        self._writer.write_batch(pa.RecordBatch.from_pydict(columns, schema=FEATURES.arrow_schema))
        self._batch, self._batch_bytes = [], 0
        assert self._file is not None
        if self._file.tell() >= _SHARD_BYTES:
            self._close_shard()

    def _close_shard(self) -> None:
        if self._writer is not None and self._file is not None:
            self._writer.close()
            self._file.close()
        self._writer = self._file = None


def read_rows(folder: Path) -> Iterator[StoredPair]:
    """The rows of a closed split, in order, a batch in memory at a time."""
    for shard in sorted(folder.glob("data-*.arrow")):
        with pa.memory_map(str(shard)) as source, pa.ipc.open_stream(source) as batches:
            for batch in batches:
                for row in batch.to_pylist():
                    yield StoredPair(row["image"], row["captions"], row["name"], row["group"])
