"""Image codes computed once: a transformer that reads them needs neither pictures nor a dVAE while it trains.

`DATA/codes/<first 16 digits of the dVAE's fingerprint>/` holds for each split `SPLIT.npy`, (rows, views, h·w) unsigned,
`SPLIT.readable.npy`, (rows,) bool, and `codes.json`, written last. The training split has several views of each
picture, augmented as DALL·E Listing 2 does; other splits have the central one.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor
from torch.utils.data import DataLoader, Dataset

from dalle_ds.config import DiscreteVAEConfig
from dalle_ds.data.augment import augment_for_transformer, useful_short_side
from dalle_ds.data.dataset import PairDataset
from dalle_ds.data.disk import disk_full_is_a_data_error
from dalle_ds.data.images import center_crop_resize
from dalle_ds.data.order import hash_integers
from dalle_ds.data.prepare import read_info
from dalle_ds.errors import CheckpointError, ConfigError, DataError
from dalle_ds.files import built_beside, write_json

FORMAT_VERSION = 1

Encode = Callable[[Tensor], Tensor]
"""(B, 3, R, R) uint8 on the CPU → (B, h, w) integer codes on any device."""


@dataclass(frozen=True)
class CodesReport:
    """What was cached."""

    folder: str
    rows: dict[str, int]
    """Split → rows."""
    unreadable: dict[str, int]
    """Split → rows whose picture could not be read; they have no codes, and loaders put other rows in their place."""
    already_there: bool = False
    """The folder held this very cache, and was left as it is."""

    def __str__(self) -> str:
        rows = ", ".join(f"{count:,} {split}" for split, count in self.rows.items())
        lost = sum(self.unreadable.values())
        done = "codes were there already" if self.already_there else "codes cached"
        return f"{self.folder}: {done}: {rows}" + (f"; {lost:,} pictures could not be read" if lost else "")


def write_codes(
    encode: Encode,
    data_dir: str | Path,
    *,
    dvae_fingerprint: str,
    image_size: int,
    vocab_size: int,
    views: int = 8,
    seed: int = 0,
    batch_size: int = 64,
    workers: int = 0,
    overwrite: bool = False,
) -> CodesReport:
    """Encode every picture of a prepared folder and keep the codes there.

    Args:
        encode: the dVAE's encoder.
        data_dir: what `prepare` made.
        dvae_fingerprint: tells this dVAE from others, in hexadecimal.
        image_size: R, side of the views.
        vocab_size: codes are less than this.
        views: of each training picture.
        seed: of the training views.
        batch_size: pictures per call of `encode`, rounded to whole rows.
        workers: processes that decode and augment; the codes do not depend on it.
        overwrite: replace a cache of the same dVAE with other views, seed or size.

    Raises:
        ConfigError: views or batch_size is not positive.
        DataError: no prepared folder, another cache of this dVAE is there, or the disk is full.
    """
    if views <= 0 or batch_size <= 0:
        raise ConfigError(f"views and batch_size must be greater than 0, found {views} and {batch_size}")
    data = Path(data_dir)
    info = read_info(data)
    folder = _cache_folder(data, dvae_fingerprint)
    identity = {
        "format_version": FORMAT_VERSION,
        "data_fingerprint": info["fingerprint"],
        "dvae_fingerprint": dvae_fingerprint,
        "image_size": image_size,
        "views": views,
        "seed": seed,
    }
    if (folder / "codes.json").is_file() and not overwrite:
        return _existing_report(folder, identity)
    grids: dict[str, list[int]] = {}
    unreadable: dict[str, int] = {}
    with disk_full_is_a_data_error(folder), built_beside(folder) as partial:
        for split in info["splits"]:
            pictures = _Views(PairDataset.open(data, split), image_size, views if split == "train" else None, seed)
            rows_per_batch = max(1, batch_size // pictures.views)
            batches = DataLoader(pictures, batch_size=rows_per_batch, num_workers=workers, collate_fn=_collate)
            grids[split], unreadable[split] = _write_split(encode, batches, partial / split, len(pictures), vocab_size)
        filled = [grid for grid in grids.values() if grid]
        manifest = {**identity, "grid": filled[0], "rows": info["splits"], "unreadable": unreadable}
        write_json(partial / "codes.json", manifest)
    return CodesReport(str(folder), info["splits"], unreadable)


class ImageCodec(Protocol):
    """The part of `dalle_ds.models.DiscreteVAE` that is used here."""

    config: DiscreteVAEConfig

    @property
    def fingerprint(self) -> str:
        """Hexadecimal; tells this dVAE from others."""

    def to(self, device: torch.device) -> object:
        """Move the weights."""

    def encode(self, images: Tensor) -> Tensor:
        """(B, 3, R, R) in [0, 1] → (B, h, w) int64."""


def cache_codes(
    dvae: ImageCodec,
    data_dir: str | Path,
    *,
    views: int = 8,
    seed: int = 0,
    batch_size: int = 64,
    workers: int = 0,
    overwrite: bool = False,
) -> CodesReport:
    """`write_codes` with a dVAE, which is moved to the GPU if there is one."""
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    dvae.to(device)

    @torch.inference_mode()
    def encode(pictures: Tensor) -> Tensor:
        return dvae.encode(pictures.to(device).float() / 255)

    return write_codes(
        encode,
        data_dir,
        dvae_fingerprint=dvae.fingerprint,
        image_size=dvae.config.image_size,
        vocab_size=dvae.config.vocab_size,
        views=views,
        seed=seed,
        batch_size=batch_size,
        workers=workers,
        overwrite=overwrite,
    )


class CodesCache:
    """Cached codes of one split. Each process maps the files for itself, so that instances can be sent to workers."""

    def __init__(self, folder: Path, split: str, manifest: dict[str, Any]) -> None:
        """Use `CodesCache.open` or `find`."""
        self._folder = folder
        self._split = split
        self._arrays: tuple[npt.NDArray[np.unsignedinteger], npt.NDArray[np.bool_]] | None = None
        self.views: int = manifest["views"] if split == "train" else 1
        """Views of each picture."""
        self.grid: tuple[int, int] = tuple(manifest["grid"])
        """(h, w) of the codes."""
        self._rows: int = manifest["rows"][split]
        self.fingerprint = hashlib.sha256(json.dumps(manifest, sort_keys=True).encode()).hexdigest()
        """Names the cache: its data, dVAE, views and seed."""

    @classmethod
    def find(cls, data_dir: str | Path, dvae_fingerprint: str, split: str) -> CodesCache | None:
        """The cache of this dVAE's codes, or None where there is none.

        Raises:
            DataError: there is one, but made from other data, of another format, or without this split.
        """
        data = Path(data_dir)
        folder = _cache_folder(data, dvae_fingerprint)
        if not (folder / "codes.json").is_file():
            return None
        manifest = _read_manifest(folder)
        for field, wanted in (
            ("format_version", FORMAT_VERSION),
            ("data_fingerprint", read_info(data)["fingerprint"]),
            ("dvae_fingerprint", dvae_fingerprint),
        ):
            if manifest.get(field) != wanted:
                raise DataError(
                    f"{folder / 'codes.json'} has {field} {manifest.get(field)!r}, not {wanted!r}: "
                    "cache the codes again with --overwrite True"
                )
        if split not in manifest["rows"]:
            raise DataError(f"{folder} has no split {split!r}: it has {', '.join(manifest['rows'])}")
        return cls(folder, split, manifest)

    @classmethod
    def open(cls, data_dir: str | Path, dvae_fingerprint: str, split: str) -> CodesCache:
        """Like `find`, but there has to be one.

        Raises:
            DataError: see `find`; or there is none.
        """
        cache = cls.find(data_dir, dvae_fingerprint, split)
        if cache is None:
            raise DataError(
                f"{_cache_folder(Path(data_dir), dvae_fingerprint)} does not exist: make it with "
                f"launchers/prepare_data.py --out {data_dir} --cache_codes DVAE"
            )
        return cache

    def __len__(self) -> int:
        return self._rows

    def codes(self, row: int, view: int) -> npt.NDArray[np.int64]:
        """(h·w,) codes of one view of a row's picture.

        Raises:
            DataError: the picture could not be read when the cache was made.
        """
        if self._arrays is None:
            self._arrays = self._map(f"{self._split}.npy"), self._map(f"{self._split}.readable.npy")
        codes, readable = self._arrays
        if not readable[row]:
            raise DataError(f"{self._folder} {self._split} row {row} has no codes: its picture could not be read")
        return codes[row, view].astype(np.int64)

    def _map(self, name: str) -> npt.NDArray:
        try:
            return np.load(self._folder / name, mmap_mode="r")
        except (OSError, ValueError) as error:
            raise CheckpointError(
                f"{self._folder / name} is missing or cut off: cache the codes again with --overwrite True"
            ) from error

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "_arrays": None}


# --- writing --------------------------------------------------------------------------------------------------------


class _Views(Dataset[tuple[Tensor, bool]]):
    """All views of a row: ((views, 3, R, R) uint8, whether the picture could be read)."""

    def __init__(self, dataset: PairDataset, image_size: int, random_views: int | None, seed: int) -> None:
        self._dataset = dataset
        self._image_size = image_size
        self._random_views = random_views
        self._seed = seed
        self.views = random_views or 1

    def __len__(self) -> int:
        return len(self._dataset)

    def __getitem__(self, row: int) -> tuple[Tensor, bool]:
        size = self._image_size
        try:
            pixels = self._dataset.picture(row, useful_short_side(size))
        except DataError:
            return torch.zeros(self.views, 3, size, size, dtype=torch.uint8), False
        if self._random_views is None:
            views = [center_crop_resize(pixels, size)]
        else:
            views = [augment_for_transformer(pixels, size, self._rng(row, view)) for view in range(self.views)]
        return torch.from_numpy(np.stack(views)).permute(0, 3, 1, 2), True

    def _rng(self, row: int, view: int) -> np.random.Generator:
        return np.random.default_rng(hash_integers(self._seed, row, view))


def _collate(rows: list[tuple[Tensor, bool]]) -> tuple[Tensor, npt.NDArray[np.bool_]]:
    return torch.stack([views for views, _ in rows]), np.array([readable for _, readable in rows])


def _write_split(
    encode: Encode,
    batches: DataLoader,
    stem: Path,
    rows: int,
    vocab_size: int,
) -> tuple[list[int], int]:
    """Write one split in order; returns its grid (empty for a split without rows) and the number of unreadable rows."""
    readable_rows: list[npt.NDArray[np.bool_]] = []
    grid: list[int] = []
    kind = np.uint16 if vocab_size <= 2**16 else np.uint32
    # Appended to a plain file: a full disk is an OSError here, and the end of the process in a memory map.
    with stem.with_name(f"{stem.name}.npy").open("wb") as file:
        for codes, readable in _encoded(encode, batches):
            if not grid:
                grid = list(codes.shape[2:])
                _write_header(file, kind, (rows, codes.shape[1], grid[0] * grid[1]))
            assert codes.min() >= 0 and codes.max() < vocab_size, "codes outside the dVAE's vocabulary"
            file.write(codes.astype(kind).tobytes())
            readable_rows.append(readable)
        if not grid:
            _write_header(file, kind, (0, 1, 0))
    readable = np.concatenate(readable_rows) if readable_rows else np.zeros(0, dtype=bool)
    np.save(stem.with_name(f"{stem.name}.readable.npy"), readable)
    return grid, int((~readable).sum())


def _encoded(encode: Encode, batches: DataLoader) -> Iterator[tuple[npt.NDArray[np.int64], npt.NDArray[np.bool_]]]:
    """((rows, views, h, w) codes, (rows,) readable) of every batch."""
    for views, readable in batches:
        codes = encode(views.flatten(0, 1)).cpu().numpy()
        yield codes.reshape(views.shape[0], views.shape[1], *codes.shape[1:]), readable


def _write_header(file: Any, kind: type[np.unsignedinteger], shape: tuple[int, ...]) -> None:
    header = {"descr": np.lib.format.dtype_to_descr(np.dtype(kind)), "fortran_order": False, "shape": shape}
    np.lib.format.write_array_header_1_0(file, header)


def _existing_report(folder: Path, identity: dict[str, Any]) -> CodesReport:
    manifest = _read_manifest(folder)
    differing = sorted(name for name in identity if manifest.get(name) != identity[name])
    if differing:
        raise DataError(
            f"{folder} holds other codes of this dVAE (different: {', '.join(differing)}): give --overwrite True"
        )
    return CodesReport(str(folder), manifest["rows"], manifest["unreadable"], already_there=True)


def _read_manifest(folder: Path) -> dict[str, Any]:
    try:
        return dict(json.loads((folder / "codes.json").read_text(encoding="utf-8")))
    except (OSError, ValueError, TypeError) as error:
        raise DataError(
            f"{folder / 'codes.json'} cannot be read: cache the codes again with --overwrite True"
        ) from error


def _cache_folder(data: Path, dvae_fingerprint: str) -> Path:
    return data / "codes" / dvae_fingerprint[:16]
