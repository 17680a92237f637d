"""Random access to the rows of a prepared split."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

from dalle_ds.data.images import Pixels, decode_image
from dalle_ds.data.prepare import read_info
from dalle_ds.errors import DataError

if TYPE_CHECKING:
    import pyarrow as pa


class PairDataset:
    """One split of a prepared folder: pictures with their captions by row.

    The rows stay in files that are mapped into memory: instances are small, also when sent to loader workers.
    """

    def __init__(self, data_dir: Path, split: str, info: dict[str, Any]) -> None:
        """Use `PairDataset.open`."""
        self.data_dir = data_dir
        self.split = split
        self.fingerprint: str = info["fingerprint"]
        """SHA-256 of the whole prepared folder, all splits."""
        self._rows: int = info["splits"][split]
        self._max_pixels = int(info["options"]["filters"]["max_megapixels"] * 1e6)
        self._table: pa.Table | None = None

    @classmethod
    def open(cls, data_dir: str | Path, split: str) -> PairDataset:
        """Open a split ("train", "validation", "compositional") of a folder that `prepare` made.

        Raises:
            DataError: no such folder or split, or not a prepared folder.
        """
        folder = Path(data_dir)
        info = read_info(folder)
        if split not in info["splits"]:
            raise DataError(f"{folder} has no split {split!r}: it has {', '.join(info['splits'])}")
        dataset = cls(folder, split, info)
        found = len(dataset._opened())
        if found != len(dataset):
            raise DataError(f"{folder / split} has {found} rows where info.json says {len(dataset)}: prepare it again")
        return dataset

    def __len__(self) -> int:
        return self._rows

    def picture(self, row: int, short_side: int | None = None) -> Pixels:
        """The picture of a row.

        Args:
            short_side: see `decode_image`; big JPEGs decode faster when no more than this is needed.

        Returns:
            (H, W, 3), 0 to 255.

        Raises:
            DataError: it cannot be decoded.
        """
        image = self._value(row, "image")
        try:
            return decode_image(image, max_pixels=self._max_pixels, short_side=short_side)
        except DataError as error:
            raise DataError(f"{self.data_dir / self.split} row {row} ({self.name(row)}): {error}") from error

    def captions(self, row: int) -> list[str]:
        """The captions of a row, at least one."""
        return self._value(row, "captions")

    def name(self, row: int) -> str:
        """Where the row came from, for people."""
        return self._value(row, "name")

    def _value(self, row: int, column: str) -> Any:
        if not 0 <= row < self._rows:
            raise IndexError(f"row {row} of {self._rows}")
        return self._opened().fast_slice(row, 1).column(column)[0].as_py()

    def _opened(self) -> Any:
        if self._table is None:
            import datasets

            try:
                self._table = datasets.load_from_disk(str(self.data_dir / self.split)).data
            except (OSError, ValueError) as error:
                raise DataError(f"{self.data_dir / self.split} cannot be opened: {error}") from error
        return self._table
