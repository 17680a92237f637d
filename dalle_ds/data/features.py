"""What caches of codes and of embeddings have in common: what a model makes of prepared data, computed once.

A cache is `DATA/NAME/<first 16 digits of the model's fingerprint>/`, or for data that cannot be written a folder of the
fingerprints of data and model elsewhere. It has Arrow files of vectors (`store`), and NAME.json, written last. Of the training
split it may have several views of each image; row · views + view is the place of a view. Numbers are little-endian.
"""

from __future__ import annotations

import hashlib
import json
from abc import ABC, abstractmethod
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar, Protocol, TypeVar

from dalle_ds.data.dataset import read_info
from dalle_ds.data.faults import NO_FEATURES, Fault, RowError
from dalle_ds.data.snapshot import DataFile, FileSnapshot, check_same
from dalle_ds.errors import DataError
from dalle_ds.parsing import parse_json

Cache = TypeVar("Cache", bound="FeatureCache")


@dataclass(frozen=True)
class CacheReport:
    """What was cached."""

    kind: str
    """"codes" or "embeddings"."""
    folder: str
    rows: dict[str, int]
    """Split → rows."""
    unreadable: dict[str, int]
    """Split → rows that could not be read; nothing is cached of them, and loaders put other rows in their place."""
    already_there: bool = False
    """The folder held this very cache, and was left as it is."""

    def __str__(self) -> str:
        rows = ", ".join(f"{count:,} {split}" for split, count in self.rows.items())
        lost = sum(self.unreadable.values())
        done = "were there already" if self.already_there else "cached"
        return f"{self.folder}: {self.kind} {done}: {rows}" + (f"; {lost:,} rows could not be read" if lost else "")


@dataclass(frozen=True)
class Kind:
    """A kind of cache."""

    name: str
    """What is cached: "codes", "embeddings"."""
    model: str
    """What makes it: "dvae", "clip"."""
    versions: tuple[int, ...]
    """Formats that can be read; the first is written."""

    @property
    def manifest(self) -> str:
        """Name of the manifest."""
        return f"{self.name}.json"

    @property
    def again(self) -> str:
        """What helps where a cache is damaged."""
        return f"cache the {self.name} again with --overwrite True"

    def folder(self, data: Path, fingerprint: str, elsewhere: str | Path | None = None) -> Path:
        """Where the cache of the model of this fingerprint is."""
        if not elsewhere:
            return data / self.name / fingerprint[:16]
        return Path(elsewhere) / f"{read_info(data)['fingerprint'][:16]}-{fingerprint[:16]}"

    def read_manifest(self, folder: Path) -> dict[str, Any]:
        """The manifest of a cache; DataError where it cannot be read."""
        path = folder / self.manifest
        try:
            return dict(parse_json(path.read_bytes()))
        except (OSError, ValueError, TypeError) as error:
            raise DataError(f"{path} cannot be read: {self.again}") from error

    def readable_version(self, manifest: dict[str, Any]) -> int:
        """The version that a manifest should have."""
        found = manifest.get("format_version")
        return next((version for version in self.versions if version == found), self.versions[0])

    def existing(self, folder: Path, identity: dict[str, Any]) -> CacheReport | None:
        """The report of a cache that is there, None where there is none; DataError where `identity` is not its own."""
        if not (folder / self.manifest).is_file():
            return None
        manifest = self.read_manifest(folder)
        identity = {**identity, "format_version": self.readable_version(manifest)}
        differing = sorted(name for name in identity if manifest.get(name) != identity[name])
        if differing:
            raise DataError(
                f"{folder} holds other {self.name} of this model (different: {', '.join(differing)}): "
                "give --overwrite True"
            )
        return CacheReport(self.name, str(folder), manifest["rows"], manifest["unreadable"], already_there=True)


class Vectors(Protocol):
    """What a cache reads from: `store.Store`, or files of a former format."""

    folder: Path
    files: tuple[DataFile, ...]
    snapshot: FileSnapshot
    faults: tuple[Fault, ...]

    def __len__(self) -> int: ...


class FeatureCache(ABC):
    """A cache of one split. Instances are small, also when sent to loader workers."""

    kind: ClassVar[Kind]

    def __init__(self, folder: Path, split: str, manifest: dict[str, Any]) -> None:
        """Use `open`, `find` or `read`. Raises KeyError, TypeError or ValueError where the manifest is damaged."""
        self._folder = folder
        self._split = split
        self._manifest = manifest
        self._rows: int = manifest["rows"][split]
        self.views: int = manifest["views"] if split == "train" else 1
        """Views of each image."""
        unreadable = manifest["unreadable"][split]
        check_counts(self.views, self._rows + 1, unreadable + 1)
        self.stores = self._stores(manifest)
        """What its vectors are read from."""
        lost = max((self._lost(store) for store in self.stores), key=lambda faults: sum(fault.rows for fault in faults))
        none = [Fault(NO_FEATURES, f"{folder} {split}", unreadable)] if unreadable else []
        self.faults: tuple[Fault, ...] = (*lost, *none)
        """Files that were missing or of the wrong size when this was made, and rows that could not be read before."""
        self.fingerprint = hashlib.sha256(json.dumps(manifest, sort_keys=True).encode()).hexdigest()
        """Names the cache: its data, model, views, seed and contents."""

    @abstractmethod
    def _stores(self, manifest: dict[str, Any]) -> tuple[Vectors, ...]:
        """Open the vectors; raises as `__init__`."""

    @abstractmethod
    def read_row(self, row: int) -> None:
        """Read all that is cached of a row; RowError where something is not what was written."""

    def _lost(self, store: Vectors) -> list[Fault]:
        """Faults of the files of a store, in rows of the split."""
        return [
            Fault(fault.reason, fault.where, -(-fault.rows * self._rows // max(1, len(store))))
            for fault in store.faults
        ]

    @classmethod
    def find(
        cls: type[Cache], data_dir: str | Path, fingerprint: str, split: str, elsewhere: str | Path | None = None
    ) -> Cache | None:
        """The cache of what the model of this fingerprint makes, or None where there is none.

        Raises:
            DataError: there is one, but made from other data, of another format, without this split, or no file of it can be
                read.
        """
        data = Path(data_dir)
        folder = cls.kind.folder(data, fingerprint, elsewhere)
        return cls.read(folder, split, data, fingerprint) if (folder / cls.kind.manifest).is_file() else None

    @classmethod
    def open(
        cls: type[Cache], data_dir: str | Path, fingerprint: str, split: str, elsewhere: str | Path | None = None
    ) -> Cache:
        """Like `find`, but a `DataError` where there is none."""
        cache = cls.find(data_dir, fingerprint, split, elsewhere)
        if cache is None:
            kind = cls.kind
            raise DataError(
                f"{kind.folder(Path(data_dir), fingerprint, elsewhere)} does not exist: make it with "
                f"launchers/prepare_data.py --out {data_dir} --cache_{kind.name} {kind.model.upper()}"
                f"{f' --{kind.name}_out {elsewhere}' if elsewhere else ''}"
            )
        return cache

    @classmethod
    def read(cls: type[Cache], folder: Path, split: str, data: Path, fingerprint: str | None = None) -> Cache:
        """The cache in `folder`, whichever model made it if none is given; raises as `find`."""
        kind, info = cls.kind, read_info(data)
        manifest, path, by = kind.read_manifest(folder), folder / kind.manifest, f"{kind.model}_fingerprint"
        for field, wanted in (
            ("format_version", kind.readable_version(manifest)),
            ("data_fingerprint", info["fingerprint"]),
            (by, fingerprint or manifest.get(by)),
            ("rows", info["splits"]),
        ):
            if manifest.get(field) != wanted:
                raise DataError(f"{path} has {field} {manifest.get(field)!r}, not {wanted!r}: {kind.again}")
        if split not in info["splits"]:
            raise DataError(f"{folder} has no split {split!r}: it has {', '.join(info['splits'])}")
        try:
            cache = cls(folder, split, manifest)
        except (KeyError, TypeError, AttributeError, ValueError, OverflowError) as error:
            raise DataError(f"{path} is damaged ({error}): {kind.again}") from error
        for store in cache.stores:
            lost = store.faults
            if lost and sum(fault.rows for fault in lost) >= len(store):
                raise DataError(
                    f"no {kind.name} of {split} can be read: {lost[0].where} is a {lost[0].reason}: {kind.again}"
                )
        return cache

    def __len__(self) -> int:
        return self._rows

    @property
    def files(self) -> Iterator[tuple[Path, DataFile]]:
        """Folders and files that it reads."""
        return ((store.folder, file) for store in self.stores for file in store.files)

    def check_unchanged(self) -> None:
        """See that the files are those that were opened, as `PairDataset.check_unchanged` does."""
        check_same(
            self._folder,
            lambda: self.kind.read_manifest(self._folder),
            self._manifest,
            f"the {self.kind.name} in {self._folder} were cached again since they were opened",
        )
        for store in self.stores:
            store.snapshot.check()

    def _view(self, row: int, view: int) -> int:
        """The place of a view."""
        if not 0 <= view < self.views:
            raise IndexError(f"view {view} of {self.views}")
        return row * self.views + view

    def _none(self, row: int, what: str = "image") -> RowError:
        where = f"{self._folder} {self._split} row {row}"
        return RowError(f"{where} has no {self.kind.name}: its {what} could not be read", NO_FEATURES, where)


def check_counts(*counts: Any) -> None:
    """ValueError for what a manifest cannot have where it tells how many of something there are."""
    if any(type(count) is not int or not 0 < count < 2**48 for count in counts):
        raise ValueError("impossible sizes")
