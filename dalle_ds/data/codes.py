"""Image codes computed once: a transformer that reads them needs neither images nor a dVAE while it trains.

A cache is `DATA/codes/<first 16 digits of the dVAE's fingerprint>/`, or for data that cannot be written a folder of the
fingerprints of data and dVAE elsewhere. It has Arrow files for each split, SPLIT/data-*.arrow (`store`), and codes.json,
written last. The training split has several views of each image, augmented as DALL·E Listing 2 does; other splits have the
central one. Row · views + view is the place of a view's codes. Numbers are little-endian.
"""

from __future__ import annotations

import hashlib
import json
import math
import os
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

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
from dalle_ds.data.snapshot import DataFile, FileSnapshot, check_same
from dalle_ds.data.store import Store, vector_check, vector_schema
from dalle_ds.data.store_writer import StoreWriter
from dalle_ds.data.workers import keep_sigchld_handler, next_batch
from dalle_ds.errors import ConfigError, DataError
from dalle_ds.files import built_beside, disk_full_is_a_data_error, only_process, remove_leftovers, write_json
from dalle_ds.parsing import parse_json

if TYPE_CHECKING:
    from dalle_ds.models import DiscreteVAE

FORMAT_VERSION = 3
_NPY_VERSION = 2
_MANIFEST = "codes.json"
_AGAIN = "cache the codes again with --overwrite True"


class Views(Dataset[tuple[Tensor, bool]]):
    """All views of an image: ((views, 3, R, R) uint8, whether the image could be read), R being `image_size`.

    Views are the central one, or so many `random_views` as in DALL·E Listing 2, augmented by `seed`.
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
            seeds = (hash_integers(self._seed, row, view) for view in range(self.views))
            views = [augment_for_transformer(pixels, size, np.random.default_rng(seed)) for seed in seeds]
        return torch.from_numpy(np.stack(views)).permute(0, 3, 1, 2), True


def collate(rows: list[tuple[Tensor, bool]]) -> tuple[Tensor, npt.NDArray[np.bool_]]:
    """((rows, views, 3, R, R) uint8, (rows,) whether the image could be read)."""
    return torch.stack([views for views, _ in rows]), np.array([readable for _, readable in rows])


@dataclass(frozen=True)
class CodesReport:
    """What was cached."""

    folder: str
    rows: dict[str, int]
    """Split → rows."""
    unreadable: dict[str, int]
    """Split → rows whose image could not be read; they have no codes, and loaders put other rows in their place."""
    already_there: bool = False
    """The folder held this very cache, and was left as it is."""

    def __str__(self) -> str:
        rows = ", ".join(f"{count:,} {split}" for split, count in self.rows.items())
        lost = sum(self.unreadable.values())
        done = "codes were there already" if self.already_there else "codes cached"
        return f"{self.folder}: {done}: {rows}" + (f"; {lost:,} images could not be read" if lost else "")


def cache_codes(
    dvae: DiscreteVAE,
    data_dir: str | Path,
    *,
    views: int = 8,
    seed: int = 0,
    batch_size: int = 64,
    workers: int = 0,
    overwrite: bool = False,
    codes_dir: str | Path | None = None,
) -> CodesReport:
    """Encode every image of a prepared folder, the training split in several augmented views, others in the central one.

    Args:
        dvae: is moved to the GPU if there is one.
        data_dir: what `prepare` made.
        views: of each training image.
        seed: of the training views.
        batch_size: images encoded at a time, rounded to whole rows.
        workers: processes that decode and augment; the result does not depend on it.
        overwrite: replace a cache of the same dVAE with other views or another seed.
        codes_dir: where to keep the caches of any number of prepared folders; None keeps each with its data.

    Raises:
        ConfigError: views or batch_size is not positive.
        DataError: no prepared folder, another cache of this dVAE is there, the disk is full, a worker was killed, or another
            process makes this cache.
    """
    if views <= 0 or batch_size <= 0:
        raise ConfigError(f"views and batch_size must be greater than 0, found {views} and {batch_size}")
    data, size = Path(data_dir), dvae.config.image_size
    info = read_info(data)
    folder = _folder_of(data, dvae.fingerprint, codes_dir)
    identity = {
        "data_fingerprint": info["fingerprint"],
        "dvae_fingerprint": dvae.fingerprint,
        "image_size": size,
        "views": views,
        "seed": seed,
    }
    with only_process(folder, f".{folder.name}.lock"):
        if (folder / _MANIFEST).is_file() and not overwrite:
            return _existing_report(folder, identity)
        remove_leftovers(folder.parent, folder.name)
        dvae.to(torch.device("cuda" if torch.cuda.is_available() else "cpu"))
        unreadable, files = {}, {}
        with disk_full_is_a_data_error(folder, "--codes_out"), built_beside(folder) as partial:
            for split in info["splits"]:
                images = Views(PairDataset.open(data, split), size, views if split == "train" else None, seed)
                rows_per_batch = max(1, batch_size // images.views)
                batches = DataLoader(images, batch_size=rows_per_batch, num_workers=workers, collate_fn=collate)
                unreadable[split], written = _write_split(dvae, batches, partial / split)
                files[split] = [vars(file) for file in written]
            manifest = {
                "format_version": FORMAT_VERSION,
                **identity,
                "shape": [size // dvae.config.factor] * 2,
                "dtype": _code_dtype(dvae.config.vocab_size),
                "rows": info["splits"],
                "unreadable": unreadable,
                "files": files,
            }
            write_json(partial / _MANIFEST, manifest)
        return CodesReport(str(folder), info["splits"], unreadable)


@torch.inference_mode()
def _write_split(dvae: DiscreteVAE, batches: DataLoader, folder: Path) -> tuple[int, list[DataFile]]:
    """Write one split in order: number of unreadable rows, and files."""
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    vocab, dtype = dvae.config.vocab_size, np.dtype(_code_dtype(dvae.config.vocab_size))
    width = (dvae.config.image_size // dvae.config.factor) ** 2 * dtype.itemsize
    writer = StoreWriter(folder, vector_schema(width if len(batches) else 1))
    unreadable = place = 0
    loaded = keep_sigchld_handler(lambda: iter(batches))
    for _ in range(len(batches)):
        views, readable = next_batch(loaded)
        codes = dvae.encode(views.flatten(0, 1).to(device).float() / 255)
        assert codes.min() >= 0 and codes.max() < vocab, "codes outside the dVAE's vocabulary"
        vectors = codes.cpu().numpy().astype(dtype)
        for vector, is_readable in zip(vectors, np.repeat(readable, views.shape[1]), strict=True):
            content = vector.tobytes()
            check = vector_check(content, place) if is_readable else 0
            writer.add({"vector": content, "check": check}, len(content))
            place += 1
        unreadable += int((~readable).sum())
    return unreadable, writer.close()


def _code_dtype(vocab_size: int) -> str:
    """As narrow a type as holds codes below `vocab_size`."""
    return "<u2" if vocab_size <= 2**16 else "<u4"


class CodesCache:
    """Cached codes of one split. Instances are small, also when sent to loader workers."""

    def __init__(self, folder: Path, split: str, manifest: dict[str, Any]) -> None:
        """Use `open`, `find` or `read`. Raises KeyError, TypeError or ValueError where the manifest is damaged."""
        self._folder = folder
        self._split = split
        self._manifest = manifest
        self._rows: int = manifest["rows"][split]
        self.views: int = manifest["views"] if split == "train" else 1
        """Views of each image."""
        is_former = manifest["format_version"] == _NPY_VERSION
        self._dtype = _code_dtype(manifest["vocab_size"]) if is_former else manifest["dtype"]
        self.grid: tuple[int, ...] = tuple(manifest["grid" if is_former else "shape"])
        """(h, w) of the codes."""
        unreadable = manifest["unreadable"][split]
        counts = (*self.grid, self.views, self._rows + 1, unreadable + 1)
        if self._dtype not in ("<u2", "<u4") or any(type(n) is not int or not 0 < n < 2**48 for n in counts):
            raise ValueError("impossible sizes")
        width = math.prod(self.grid) * np.dtype(self._dtype).itemsize
        self.store: Store | _NpyFiles
        if is_former:
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
        """Names the cache: its data, dVAE, views, seed and contents."""

    @classmethod
    def find(
        cls, data_dir: str | Path, fingerprint: str, split: str, codes_dir: str | Path | None = None
    ) -> CodesCache | None:
        """The cache of the codes of the dVAE of this fingerprint, or None where there is none.

        Raises:
            DataError: there is one, but made from other data, of another format, without this split, or no file of it can be
                read.
        """
        data = Path(data_dir)
        folder = _folder_of(data, fingerprint, codes_dir)
        return cls.read(folder, split, data, fingerprint) if (folder / _MANIFEST).is_file() else None

    @classmethod
    def open(
        cls, data_dir: str | Path, fingerprint: str, split: str, codes_dir: str | Path | None = None
    ) -> CodesCache:
        """Like `find`, but a `DataError` where there is none."""
        cache = cls.find(data_dir, fingerprint, split, codes_dir)
        if cache is None:
            raise DataError(
                f"{_folder_of(Path(data_dir), fingerprint, codes_dir)} does not exist: make it with "
                f"launchers/prepare_data.py --out {data_dir} --cache_codes DVAE"
                f"{f' --codes_out {codes_dir}' if codes_dir else ''}"
            )
        return cache

    @classmethod
    def read(cls, folder: Path, split: str, data: Path, fingerprint: str | None = None) -> CodesCache:
        """The cache in `folder`, whichever dVAE made it if none is given; raises as `find`."""
        manifest, info, path = _read_manifest(folder), read_info(data), folder / _MANIFEST
        for field, wanted in (
            ("format_version", _readable_version(manifest)),
            ("data_fingerprint", info["fingerprint"]),
            ("dvae_fingerprint", fingerprint or manifest.get("dvae_fingerprint")),
            ("rows", info["splits"]),
        ):
            if manifest.get(field) != wanted:
                raise DataError(f"{path} has {field} {manifest.get(field)!r}, not {wanted!r}: {_AGAIN}")
        if split not in info["splits"]:
            raise DataError(f"{folder} has no split {split!r}: it has {', '.join(info['splits'])}")
        try:
            cache = cls(folder, split, manifest)
        except (KeyError, TypeError, AttributeError, ValueError, OverflowError) as error:
            raise DataError(f"{path} is damaged ({error}): {_AGAIN}") from error
        lost = cache.store.faults
        if lost and sum(fault.rows for fault in lost) >= len(cache.store):
            raise DataError(f"no codes of {split} can be read: {lost[0].where} is a {lost[0].reason}: {_AGAIN}")
        return cache

    def __len__(self) -> int:
        return self._rows

    def codes(self, row: int, view: int) -> npt.NDArray[np.int64]:
        """(h·w,) codes of one view of a row's image; `RowError` where it could not be read when the cache was made, or where
        they are not what was written."""
        if not 0 <= view < self.views:
            raise IndexError(f"view {view} of {self.views}")
        stored = self.store.vector(row * self.views + view)
        if stored is None:
            where = f"{self._folder} {self._split} row {row}"
            raise RowError(f"{where} has no codes: its image could not be read", NO_FEATURES, where)
        return np.frombuffer(stored, self._dtype).astype(np.int64)

    def check_unchanged(self) -> None:
        """See that the files are those that were opened, as `PairDataset.check_unchanged` does."""
        check_same(
            self._folder,
            lambda: _read_manifest(self._folder),
            self._manifest,
            f"the codes in {self._folder} were cached again since they were opened",
        )
        self.store.snapshot.check()


def _folder_of(data: Path, fingerprint: str, codes_dir: str | Path | None) -> Path:
    if not codes_dir:
        return data / "codes" / fingerprint[:16]
    return Path(codes_dir) / f"{read_info(data)['fingerprint'][:16]}-{fingerprint[:16]}"


def _read_manifest(folder: Path) -> dict[str, Any]:
    path = folder / _MANIFEST
    try:
        return dict(parse_json(path.read_bytes()))
    except (OSError, ValueError, TypeError) as error:
        raise DataError(f"{path} cannot be read: {_AGAIN}") from error


def _existing_report(folder: Path, identity: dict[str, Any]) -> CodesReport:
    manifest = _read_manifest(folder)
    identity = {**identity, "format_version": _readable_version(manifest)}
    differing = sorted(name for name in identity if manifest.get(name) != identity[name])
    if differing:
        raise DataError(
            f"{folder} holds other codes of this model (different: {', '.join(differing)}): give --overwrite True"
        )
    return CodesReport(str(folder), manifest["rows"], manifest["unreadable"], already_there=True)


def _readable_version(manifest: dict[str, Any]) -> int:
    return _NPY_VERSION if manifest.get("format_version") == _NPY_VERSION else FORMAT_VERSION


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
        vector, check = self._read(0, row), int.from_bytes(self._read(1, row), "little")
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
