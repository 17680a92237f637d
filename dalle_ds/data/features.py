"""What a model computes of every image once, and is read instead of the image: codes of a dVAE, embeddings of a CLIP.

A cache is a folder of Arrow files for each split, SPLIT/data-*.arrow (`store`), and a manifest KIND.json, written last. Each
image has one view or several; row · views + view is the place of a view's vector. Numbers are little-endian.
"""

from __future__ import annotations

import hashlib
import json
import math
import os
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar

import numpy as np
import numpy.typing as npt
import torch
import xxhash
from torch import Tensor
from torch.utils.data import DataLoader, Dataset

from dalle_ds.data.augment import augment_for_transformer, useful_short_side
from dalle_ds.data.dataset import PairDataset, read_info
from dalle_ds.data.faults import DAMAGED_FILE, NO_FEATURES, READ_ERROR, Fault, RowError
from dalle_ds.data.images import center_crop_resize
from dalle_ds.data.order import hash_integers
from dalle_ds.data.store import DataFile, FileSnapshot, Store, check_same, vector_check, vector_schema
from dalle_ds.data.store_writer import StoreWriter
from dalle_ds.data.workers import keep_sigchld_handler, next_batch
from dalle_ds.errors import ConfigError, DataError
from dalle_ds.files import built_beside, disk_full_is_a_data_error, only_process, remove_leftovers, write_json
from dalle_ds.parsing import parse_json

if TYPE_CHECKING:
    from typing_extensions import Self

FORMAT_VERSION = 3
_NPY_VERSION = 2
DTYPES = ("<u2", "<u4", "<f2", "<f4")

Encode = Callable[[Tensor], Tensor]
"""(B, 3, R, R) uint8 on the CPU → (B, …) numbers on any device."""


class Views(Dataset[tuple[Tensor, bool]]):
    """All views of an image: ((views, 3, R, R) uint8, whether the image could be read).

    Args:
        dataset: rows.
        image_size: R.
        random_views: how many augmented views (DALL·E Listing 2) of each; None takes the central one.
        seed: of the augmented ones.
    """

    def __init__(self, dataset: PairDataset, image_size: int, random_views: int | None, seed: int) -> None:
        self._dataset = dataset
        self._image_size = image_size
        self._random_views = random_views
        self._seed = seed
        self.views = random_views or 1
        """Views of each image."""

    def __len__(self) -> int:
        return len(self._dataset)

    def __getitem__(self, row: int) -> tuple[Tensor, bool]:
        size = self._image_size
        try:
            pixels = self._dataset.image(row, useful_short_side(size))
        except DataError:
            return torch.zeros(self.views, 3, size, size, dtype=torch.uint8), False
        if self._random_views is None:
            views = [center_crop_resize(pixels, size)]
        else:
            views = [augment_for_transformer(pixels, size, self._rng(row, view)) for view in range(self.views)]
        return torch.from_numpy(np.stack(views)).permute(0, 3, 1, 2), True

    def _rng(self, row: int, view: int) -> np.random.Generator:
        return np.random.default_rng(hash_integers(self._seed, row, view))


def collate(rows: list[tuple[Tensor, bool]]) -> tuple[Tensor, npt.NDArray[np.bool_]]:
    """((rows, views, 3, R, R) uint8, (rows,) whether the image could be read)."""
    return torch.stack([views for views, _ in rows]), np.array([readable for _, readable in rows])


@dataclass(frozen=True)
class FeatureReport:
    """What was cached."""

    name: str
    folder: str
    rows: dict[str, int]
    """Split → rows."""
    unreadable: dict[str, int]
    """Split → rows whose image could not be read; they have no features, and loaders put other rows in their place."""
    already_there: bool = False
    """The folder held this very cache, and was left as it is."""

    def __str__(self) -> str:
        rows = ", ".join(f"{count:,} {split}" for split, count in self.rows.items())
        lost = sum(self.unreadable.values())
        done = f"{self.name} were there already" if self.already_there else f"{self.name} cached"
        return f"{self.folder}: {done}: {rows}" + (f"; {lost:,} images could not be read" if lost else "")


class FeatureCache:
    """Cached features of one split. Instances are small, also when sent to loader workers. A subclass names a kind."""

    name: ClassVar[str]
    """Of folders and manifests: "codes"."""
    model: ClassVar[str]
    """The manifest's name for the fingerprint of the model: "dvae_fingerprint"."""
    option: ClassVar[str]
    """Command-line option that makes a cache: "--cache_codes DVAE"."""
    out_option: ClassVar[str]
    """Command-line option for a folder to keep it in: "--codes_out"."""

    def __init__(self, folder: Path, split: str, manifest: dict[str, Any]) -> None:
        """Use `open`, `find` or `read`. Raises KeyError, TypeError or ValueError where the manifest is damaged."""
        self._folder = folder
        self._split = split
        self._manifest = manifest
        self._rows: int = manifest["rows"][split]
        self.views: int = manifest["views"] if split == "train" else 1
        """Views of each image."""
        self.shape: tuple[int, ...]
        """Of the numbers that are cached of a view."""
        self._dtype, self.shape = _numbers_of(manifest)
        unreadable = manifest["unreadable"][split]
        counts = (*self.shape, self.views, self._rows + 1, unreadable + 1)
        if any(type(count) is not int or not 0 < count < 2**48 for count in counts):
            raise ValueError("impossible sizes")
        width = math.prod(self.shape) * self._dtype.itemsize
        self.store: Store | _NpyFiles
        if manifest["format_version"] == _NPY_VERSION:
            self.store = _NpyFiles(folder, split, self._rows * self.views, width, manifest["files"])
        else:
            self.store = Store(folder / split, [DataFile(**entry) for entry in manifest["files"][split]], width)
        if len(self.store) != self._rows * self.views:
            raise ValueError("its files have other rows")
        lost = (Fault(fault.reason, fault.where, -(-fault.rows // self.views)) for fault in self.store.faults)
        none = (Fault(NO_FEATURES, f"{folder} {split}", unreadable),) if unreadable else ()
        self.faults: tuple[Fault, ...] = (*lost, *none)
        """Files that were missing or of the wrong size when this was made, and images that could not be read before."""
        self.fingerprint = hashlib.sha256(json.dumps(manifest, sort_keys=True).encode()).hexdigest()
        """Names the cache: its data, model, views, seed and contents."""

    @classmethod
    def write(
        cls,
        encode: Encode,
        data_dir: str | Path,
        *,
        fingerprint: str,
        image_size: int,
        dtype: str,
        views: int = 8,
        seed: int = 0,
        batch_size: int = 64,
        workers: int = 0,
        overwrite: bool = False,
        elsewhere: str | Path | None = None,
    ) -> FeatureReport:
        """Encode every image of a prepared folder, the training split in several augmented views, others in the central one.

        Args:
            encode: the model.
            data_dir: what `prepare` made.
            fingerprint: tells this model from others, in hexadecimal.
            image_size: R, side of the views.
            dtype: of the numbers that are kept, one of DTYPES.
            views: of each training image.
            seed: of the training views.
            batch_size: images per call of `encode`, rounded to whole rows.
            workers: processes that decode and augment; the result does not depend on it.
            overwrite: replace a cache of the same model with other views, seed or size.
            elsewhere: where to keep the caches of any number of prepared folders; None keeps each with its data.

        Raises:
            ConfigError: views or batch_size is not positive.
            DataError: no prepared folder, another cache of this model is there, the disk is full, a worker was killed, or
                another process makes this cache.
        """
        if views <= 0 or batch_size <= 0:
            raise ConfigError(f"views and batch_size must be greater than 0, found {views} and {batch_size}")
        data = Path(data_dir)
        info = read_info(data)
        folder = cls._folder_of(data, fingerprint, elsewhere)
        identity = {
            "data_fingerprint": info["fingerprint"],
            cls.model: fingerprint,
            "image_size": image_size,
            "views": views,
            "seed": seed,
        }
        with only_process(folder, f".{folder.name}.lock"):
            if (folder / f"{cls.name}.json").is_file() and not overwrite:
                return cls._existing_report(folder, identity)
            remove_leftovers(folder.parent, folder.name)
            shapes, unreadable, files = [], {}, {}
            with disk_full_is_a_data_error(folder, cls.out_option), built_beside(folder) as partial:
                for split in info["splits"]:
                    images = Views(PairDataset.open(data, split), image_size, views if split == "train" else None, seed)
                    rows_per_batch = max(1, batch_size // images.views)
                    batches = DataLoader(images, batch_size=rows_per_batch, num_workers=workers, collate_fn=collate)
                    shape, unreadable[split], files[split] = _write_split(encode, batches, partial / split, dtype)
                    shapes.append(shape)
                manifest = {
                    "format_version": FORMAT_VERSION,
                    **identity,
                    "shape": next(shape for shape in shapes if shape),
                    "dtype": dtype,
                    "rows": info["splits"],
                    "unreadable": unreadable,
                    "files": {split: [vars(file) for file in entries] for split, entries in files.items()},
                }
                write_json(partial / f"{cls.name}.json", manifest)
            return FeatureReport(cls.name, str(folder), info["splits"], unreadable)

    @classmethod
    def find(
        cls, data_dir: str | Path, fingerprint: str, split: str, elsewhere: str | Path | None = None
    ) -> Self | None:
        """The cache of this model's features, or None where there is none; `elsewhere` as in `write`.

        Raises:
            DataError: there is one, but made from other data, of another format, without this split, or no file of it can be
                read.
        """
        data = Path(data_dir)
        folder = cls._folder_of(data, fingerprint, elsewhere)
        return cls.read(folder, split, data, fingerprint) if (folder / f"{cls.name}.json").is_file() else None

    @classmethod
    def open(cls, data_dir: str | Path, fingerprint: str, split: str, elsewhere: str | Path | None = None) -> Self:
        """Like `find`, but there has to be one.

        Raises:
            DataError: see `find`; or there is none.
        """
        cache = cls.find(data_dir, fingerprint, split, elsewhere)
        if cache is None:
            raise DataError(
                f"{cls._folder_of(Path(data_dir), fingerprint, elsewhere)} does not exist: make it with "
                f"launchers/prepare_data.py --out {data_dir} {cls.option}"
                f"{f' {cls.out_option} {elsewhere}' if elsewhere else ''}"
            )
        return cache

    @classmethod
    def read(cls, folder: Path, split: str, data: Path, fingerprint: str | None = None) -> Self:
        """The cache in `folder`, whichever model made it if none is given; raises as `find`."""
        manifest, info, path = cls._read_manifest(folder), read_info(data), folder / f"{cls.name}.json"
        for field, wanted in (
            ("format_version", _readable_version(manifest)),
            ("data_fingerprint", info["fingerprint"]),
            (cls.model, fingerprint or manifest.get(cls.model)),
            ("rows", info["splits"]),
        ):
            if manifest.get(field) != wanted:
                raise DataError(f"{path} has {field} {manifest.get(field)!r}, not {wanted!r}: {cls._again()}")
        if split not in info["splits"]:
            raise DataError(f"{folder} has no split {split!r}: it has {', '.join(info['splits'])}")
        try:
            cache = cls(folder, split, manifest)
        except (KeyError, TypeError, AttributeError, ValueError, OverflowError) as error:
            raise DataError(f"{path} is damaged ({error}): {cls._again()}") from error
        lost = cache.store.faults
        if lost and sum(fault.rows for fault in lost) >= len(cache.store):
            raise DataError(
                f"no {cls.name} of {split} can be read: {lost[0].where} is a {lost[0].reason}: {cls._again()}"
            )
        return cache

    def __len__(self) -> int:
        return self._rows

    def features(self, row: int, view: int) -> npt.NDArray[Any]:
        """The numbers of one view of a row's image, of shape `shape`, not to be written to.

        Raises:
            RowError: the image could not be read when the cache was made, or the numbers are not what was written.
        """
        if not 0 <= view < self.views:
            raise IndexError(f"view {view} of {self.views}")
        stored = self.store.vector(row * self.views + view)
        if stored is None:
            where = f"{self._folder} {self._split} row {row}"
            raise RowError(f"{where} has no {self.name}: its image could not be read", NO_FEATURES, where)
        return np.frombuffer(stored, self._dtype).reshape(self.shape)

    def check_unchanged(self) -> None:
        """See that the files are those that were opened; quick, as `PairDataset.check_unchanged`.

        Raises:
            DataChangedError: the features were cached again, or a file has other contents.
        """
        check_same(
            self._folder,
            lambda: self._read_manifest(self._folder),
            self._manifest,
            f"the {self.name} in {self._folder} were cached again since they were opened",
        )
        self.store.snapshot.check()

    @classmethod
    def _folder_of(cls, data: Path, fingerprint: str, elsewhere: str | Path | None) -> Path:
        if not elsewhere:
            return data / cls.name / fingerprint[:16]
        return Path(elsewhere) / f"{read_info(data)['fingerprint'][:16]}-{fingerprint[:16]}"

    @classmethod
    def _read_manifest(cls, folder: Path) -> dict[str, Any]:
        path = folder / f"{cls.name}.json"
        try:
            return dict(parse_json(path.read_bytes()))
        except (OSError, ValueError, TypeError) as error:
            raise DataError(f"{path} cannot be read: {cls._again()}") from error

    @classmethod
    def _existing_report(cls, folder: Path, identity: dict[str, Any]) -> FeatureReport:
        manifest = cls._read_manifest(folder)
        identity = {**identity, "format_version": _readable_version(manifest)}
        differing = sorted(name for name in identity if manifest.get(name) != identity[name])
        if differing:
            raise DataError(
                f"{folder} holds other {cls.name} of this model (different: {', '.join(differing)}): give --overwrite True"
            )
        return FeatureReport(cls.name, str(folder), manifest["rows"], manifest["unreadable"], already_there=True)

    @classmethod
    def _again(cls) -> str:
        return f"cache the {cls.name} again with --overwrite True"


def _write_split(
    encode: Encode, batches: DataLoader, folder: Path, dtype: str
) -> tuple[tuple[int, ...], int, list[DataFile]]:
    """Write one split in order: shape of its vectors, () for a split without rows; number of unreadable rows; files."""
    writer: StoreWriter | None = None
    shape: tuple[int, ...] = ()
    unreadable = place = 0
    loaded = keep_sigchld_handler(lambda: iter(batches))
    for _ in range(len(batches)):
        views, readable = next_batch(loaded)
        features = encode(views.flatten(0, 1)).cpu().numpy()
        vectors, shape = features.astype(dtype), features.shape[1:]
        assert vectors.dtype.kind == "f" or np.array_equal(vectors, features), "numbers that the type cannot hold"
        writer = writer or StoreWriter(folder, vector_schema(vectors[0].nbytes))
        for vector, is_readable in zip(vectors, np.repeat(readable, views.shape[1]), strict=True):
            content = vector.tobytes()
            check = vector_check(content, place) if is_readable else 0
            writer.add({"vector": content, "check": check}, len(content))
            place += 1
        unreadable += int((~readable).sum())
    return shape, unreadable, (writer or StoreWriter(folder, vector_schema(1))).close()


def _readable_version(manifest: dict[str, Any]) -> int:
    return _NPY_VERSION if manifest.get("format_version") == _NPY_VERSION else FORMAT_VERSION


def _numbers_of(manifest: dict[str, Any]) -> tuple[np.dtype, tuple[int, ...]]:
    """Type and shape of what is cached of a view."""
    if manifest["format_version"] == _NPY_VERSION:
        return np.dtype("<u2" if manifest["vocab_size"] <= 2**16 else "<u4"), tuple(manifest["grid"])
    if manifest["dtype"] not in DTYPES:
        raise ValueError("unknown type of numbers")
    return np.dtype(manifest["dtype"]), tuple(manifest["shape"])


class _NpyFiles:
    """What caches of format 2 have in the place of a `Store`: SPLIT.npy, and SPLIT.checks.npy with the XXH32 of each vector,
    1 in place of 0, which says that there is none. The data is what lies at their ends; headers are not believed."""

    def __init__(self, folder: Path, split: str, rows: int, width: int, written: dict[str, Any]) -> None:
        self.folder = folder
        names = (f"{split}.npy", f"{split}.checks.npy")
        self.files = tuple(DataFile(name, rows, **written[name]) for name in names)
        self._widths = (width, 4)
        self._offsets = [file.bytes - rows * size for file, size in zip(self.files, self._widths, strict=True)]
        if min(self._offsets) < 0:
            raise ValueError("no codes of its shape are in its files")
        self._handles: list[Any] = []
        self.snapshot = FileSnapshot(folder, self.files)
        self.faults = tuple(self.snapshot.faults)

    def __len__(self) -> int:
        return self.files[0].rows

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "_handles": []}

    def vector(self, row: int) -> bytes | None:
        """See `Store.vector`."""
        if not 0 <= row < len(self):
            raise IndexError(f"row {row} of {len(self)}")
        vector, stored = self._read(0, row), self._read(1, row)
        check = int.from_bytes(stored, "little")
        if check and check != (xxhash.xxh32_intdigest(vector) or 1):
            path = str(self.folder / self.files[0].file)
            raise RowError(f"{path} row {row} is damaged", DAMAGED_FILE, path)
        return vector if check else None

    def _read(self, which: int, row: int) -> bytes:
        path, size = self.folder / self.files[which].file, self._widths[which]
        try:
            self._handles = self._handles or [(self.folder / file.file).open("rb", buffering=0) for file in self.files]
            data = os.pread(self._handles[which].fileno(), size, self._offsets[which] + row * size)
        except OSError as error:
            raise RowError(f"{path} cannot be read: {error.strerror}", READ_ERROR, str(path)) from error
        if len(data) != size:
            raise RowError(f"{path} was cut off", DAMAGED_FILE, str(path))
        return data
