"""What preparation made, read: the manifest of a folder, and the rows of a split by number."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

from dalle_ds.data.faults import BAD_IMAGE, Fault, FaultLog, RowError
from dalle_ds.data.images import Pixels, decode_image
from dalle_ds.data.snapshot import DataFile, check_same
from dalle_ds.data.store import Store
from dalle_ds.errors import DataError
from dalle_ds.parsing import parse_json

FORMAT_VERSION = 2
_AGAIN = "prepare it again with --overwrite True"
FOR_TRAINING = "prepare the corpus again with --validation 0 --overwrite True, or with more images"
"""What helps where all images of a small corpus fell into the validation split."""


class PairDataset:
    """One split of a prepared folder: images with their captions by row.

    The rows stay in files: instances are small, also when sent to loader workers. Files that are missing or damaged
    keep their row numbers, and reading one of their rows raises a `RowError`.
    """

    def __init__(self, data_dir: Path, split: str, info: dict[str, Any]) -> None:
        """Use `PairDataset.open`."""
        self.data_dir = data_dir
        self.split = split
        self.fingerprint: str = info["fingerprint"]
        """SHA-256 of the whole prepared folder, all splits."""
        self._max_pixels = int(info["options"]["filters"]["max_megapixels"] * 1e6)
        self.files = tuple(DataFile(**entry) for entry in info["shards"][split])
        """The files that have the rows, in their order."""
        self._store = Store(data_dir / split, self.files)
        self.faults: tuple[Fault, ...] = self._store.faults
        """Files that were missing or of the wrong size when the split was opened."""

    @classmethod
    def open(cls, data_dir: str | Path, split: str) -> PairDataset:
        """Open a split ("train", "validation", "compositional") of a folder that `prepare` made; `DataError` where there is
        none, or nothing of it can be read."""
        folder = Path(data_dir)
        info = read_info(folder)
        if split not in info["splits"]:
            raise DataError(f"{folder} has no split {split!r}: it has {', '.join(info['splits'])}")
        try:
            dataset = cls(folder, split, info)
            wanted = info["splits"][split]
        except (KeyError, TypeError, ValueError) as error:
            raise DataError(f"{folder}/info.json is damaged ({error}): {_AGAIN}") from error
        if len(dataset) != wanted:
            found = f"the files of {split} have {len(dataset)} rows, not {wanted}"
            raise DataError(f"{folder}/info.json is damaged: {found}: {_AGAIN}")
        if len(dataset) and sum(fault.rows for fault in dataset.faults) == len(dataset):
            first = dataset.faults[0]
            raise DataError(f"no file of {folder / split} can be read: {first.where} is a {first.reason}")
        return dataset

    def __len__(self) -> int:
        return len(self._store)

    def check_unchanged(self) -> None:
        """See that the files are those that were opened. Quick: contents are read only where a file has another time.

        A file that cannot be read any more is no change, nor is a disk that does not answer now; rows that cannot be read
        are counted where they are read.

        Raises:
            DataChangedError: the folder was prepared again, or a file has other contents.
        """
        check_same(
            self.data_dir,
            lambda: read_info(self.data_dir)["fingerprint"],
            self.fingerprint,
            f"{self.data_dir} was prepared again since it was opened",
        )
        self._store.snapshot.check()

    def image(self, row: int, short_side: int | None = None) -> Pixels:
        """The image of a row, (H, W, 3), 0 to 255; `RowError` where it cannot be read or decoded. `short_side` is a hint for
        `decode_image`."""
        image = self.encoded(row)
        try:
            return decode_image(image, max_pixels=self._max_pixels, short_side=short_side)
        except DataError as error:
            where = f"{self.data_dir / self.split} row {row} ({self.name(row)})"
            raise RowError(f"{where}: {error}", BAD_IMAGE, where) from error

    def captions(self, row: int) -> list[str]:
        """The captions of a row, at least one. Raises `RowError` where they cannot be read."""
        return self._value(row, "captions")

    def all_captions(self, faults: FaultLog) -> Iterator[str]:
        """The captions of all rows that can be read; the others are added to `faults`."""
        for row in range(len(self)):
            try:
                yield from self.captions(row)
            except RowError as error:
                faults.add(error)

    def name(self, row: int) -> str:
        """Where the row came from, for people. Raises `RowError` where it cannot be read."""
        return self._value(row, "name")

    def encoded(self, row: int) -> bytes:
        """The image of a row as it is stored. Raises `RowError` where it cannot be read."""
        return self._value(row, "image")

    def _value(self, row: int, column: str) -> Any:
        return self._store.value(row, column)


def read_info(folder: Path) -> dict[str, Any]:
    """The manifest of a prepared folder; `DataError` where it is missing, was not made by `prepare`, or has another format."""
    try:
        exists = folder.is_dir()
        info = parse_json((folder / "info.json").read_bytes()) if exists else None
    except (OSError, ValueError) as error:
        raise DataError(f"{folder} is not a prepared data folder: no readable info.json ({error})") from error
    if not exists:
        raise DataError(f"data folder {folder} does not exist: make it with launchers/prepare_data.py --out {folder}")
    if not isinstance(info, dict):
        raise DataError(f"{folder} is not a prepared data folder: its info.json is no manifest")
    if info.get("format_version") != FORMAT_VERSION:
        raise DataError(
            f"{folder} has data format {info.get('format_version')}, but this version reads {FORMAT_VERSION}: {_AGAIN}"
        )
    missing = {"fingerprint", "options", "splits", "shards"} - set(info)
    if missing:
        raise DataError(f"{folder}/info.json has no {', '.join(sorted(missing))}: {_AGAIN}")
    return info
