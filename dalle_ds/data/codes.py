"""Image codes computed once: a transformer that reads them needs neither images nor a dVAE while it trains.

A cache (`features`) has SPLIT/data-*.arrow. The training split has several views of each image, augmented as DALL·E Listing 2
does; other splits have the central one.
"""

from __future__ import annotations

import math
import os
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
from dalle_ds.data.faults import DAMAGED_FILE, READ_ERROR, RowError
from dalle_ds.data.features import CacheReport, FeatureCache, Kind, Vectors, check_counts
from dalle_ds.data.images import center_crop_resize
from dalle_ds.data.order import hash_integers
from dalle_ds.data.snapshot import DataFile, FileSnapshot
from dalle_ds.data.store import Store, vector_schema
from dalle_ds.data.store_writer import StoreWriter
from dalle_ds.data.workers import keep_sigchld_handler, next_batch
from dalle_ds.errors import ConfigError, DataError
from dalle_ds.files import built_beside, disk_full_is_a_data_error, only_process, remove_leftovers, write_json

if TYPE_CHECKING:
    from dalle_ds.models import ImageTokenizer

_NPY_VERSION = 2
KIND = Kind("codes", "dvae", (3, _NPY_VERSION))


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


def cache_codes(
    dvae: ImageTokenizer,
    data_dir: str | Path,
    *,
    views: int = 8,
    seed: int = 0,
    batch_size: int = 64,
    workers: int = 0,
    overwrite: bool = False,
    codes_dir: str | Path | None = None,
) -> CacheReport:
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
    folder = KIND.folder(data, dvae.fingerprint, codes_dir)
    identity = {
        "data_fingerprint": info["fingerprint"],
        "dvae_fingerprint": dvae.fingerprint,
        "image_size": size,
        "views": views,
        "seed": seed,
    }
    with only_process(folder, f".{folder.name}.lock"):
        existing = None if overwrite else KIND.existing(folder, identity)
        if existing is not None:
            return existing
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
                "format_version": KIND.versions[0],
                **identity,
                "shape": [size // dvae.config.factor] * 2,
                "dtype": _code_dtype(dvae.config.vocab_size),
                "rows": info["splits"],
                "unreadable": unreadable,
                "files": files,
            }
            write_json(partial / KIND.manifest, manifest)
        return CacheReport(KIND.name, str(folder), info["splits"], unreadable)


@torch.inference_mode()
def _write_split(dvae: ImageTokenizer, batches: DataLoader, folder: Path) -> tuple[int, list[DataFile]]:
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
            writer.add_vector(vector.tobytes(), place, readable=bool(is_readable))
            place += 1
        unreadable += int((~readable).sum())
    return unreadable, writer.close()


def _code_dtype(vocab_size: int) -> str:
    """As narrow a type as holds codes below `vocab_size`."""
    return "<u2" if vocab_size <= 2**16 else "<u4"


class CodesCache(FeatureCache):
    """Cached codes of one split."""

    kind = KIND

    def _stores(self, manifest: dict[str, Any]) -> tuple[Vectors, ...]:
        is_former = manifest["format_version"] == _NPY_VERSION
        self._dtype = _code_dtype(manifest["vocab_size"]) if is_former else manifest["dtype"]
        self.grid: tuple[int, ...] = tuple(manifest["grid" if is_former else "shape"])
        """(h, w) of the codes."""
        check_counts(*self.grid)
        if self._dtype not in ("<u2", "<u4"):
            raise ValueError("impossible codes")
        width = math.prod(self.grid) * np.dtype(self._dtype).itemsize
        rows, split = self._rows * self.views, self._split
        self._store: Store | _NpyFiles
        if is_former:
            self._store = _NpyFiles(self._folder, split, rows, width, manifest["files"])
        else:
            files = [DataFile(**entry) for entry in manifest["files"][split]]
            self._store = Store(self._folder / split, files, width)
        if len(self._store) != rows:
            raise ValueError("its files have other rows")
        return (self._store,)

    def codes(self, row: int, view: int) -> npt.NDArray[np.int64]:
        """(h·w,) codes of one view of a row's image; `RowError` where it could not be read when the cache was made, or where
        they are not what was written."""
        stored = self._store.vector(self._view(row, view))
        if stored is None:
            raise self._none(row)
        return np.frombuffer(stored, self._dtype).astype(np.int64)

    def read_row(self, row: int) -> None:
        for view in range(self.views):
            self.codes(row, view)


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
