"""Image codes computed once: a transformer that reads them needs neither pictures nor a dVAE while it trains.

`DATA/codes/<first 16 digits of the dVAE's fingerprint>/`, or for data that cannot be written a folder of the fingerprints of
data and dVAE elsewhere, holds for each split `SPLIT.npy`, (rows, views, h·w) unsigned,
`SPLIT.checks.npy`, (rows, views) uint32, and `codes.json`, written last. The training split has several views of each
picture, augmented as DALL·E Listing 2 does; other splits have the central one. A check is the XXH32 of a view's codes,
with 1 in place of 0; it is 0 where the picture could not be read.
"""

from __future__ import annotations

import hashlib
import json
import math
import os
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, BinaryIO, Protocol

import numpy as np
import numpy.typing as npt
import torch
import xxhash
from torch import Tensor
from torch.utils.data import DataLoader

from dalle_ds.config import DiscreteVAEConfig
from dalle_ds.data.dataset import PairDataset
from dalle_ds.data.disk import disk_full_is_a_data_error
from dalle_ds.data.faults import DAMAGED_CODES, NO_CODES, READ_ERROR, Fault, RowError
from dalle_ds.data.prepare import read_info
from dalle_ds.data.shards import check_size, digest_of, stamp_of
from dalle_ds.data.stamps import Stamps, may_pass
from dalle_ds.data.views import Views, collate
from dalle_ds.data.workers import take, without_surprises
from dalle_ds.errors import ConfigError, DataChangedError, DataError
from dalle_ds.files import built_beside, only_process, write_json
from dalle_ds.parsing import parse_json

FORMAT_VERSION = 2
_CHECK = np.dtype("<u4")
_AGAIN = "cache the codes again with --overwrite True"

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
    codes_dir: str | Path | None = None,
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
        codes_dir: where to keep the codes, of any number of prepared folders; None takes `data_dir`/codes.

    Raises:
        ConfigError: views or batch_size is not positive.
        DataError: no prepared folder, another cache of this dVAE is there, the disk is full, a worker was killed, or another
            process caches these codes.
    """
    if views <= 0 or batch_size <= 0:
        raise ConfigError(f"views and batch_size must be greater than 0, found {views} and {batch_size}")
    data = Path(data_dir)
    info = read_info(data)
    folder = _cache_folder(data, dvae_fingerprint, codes_dir)
    identity = {
        "format_version": FORMAT_VERSION,
        "data_fingerprint": info["fingerprint"],
        "dvae_fingerprint": dvae_fingerprint,
        "image_size": image_size,
        "views": views,
        "seed": seed,
    }
    with only_process(folder, f".{folder.name}.lock"):
        if (folder / "codes.json").is_file() and not overwrite:
            return _existing_report(folder, identity)
        grids: dict[str, list[int]] = {}
        unreadable: dict[str, int] = {}
        with disk_full_is_a_data_error(folder, "--codes_out"), built_beside(folder) as partial:
            for split in info["splits"]:
                pictures = Views(PairDataset.open(data, split), image_size, views if split == "train" else None, seed)
                rows_per_batch = max(1, batch_size // pictures.views)
                batches = DataLoader(pictures, batch_size=rows_per_batch, num_workers=workers, collate_fn=collate)
                grids[split], unreadable[split] = _write_split(
                    encode, batches, partial / split, len(pictures), vocab_size
                )
            filled = [grid for grid in grids.values() if grid]
            manifest = {
                **identity,
                "grid": filled[0],
                "vocab_size": vocab_size,
                "rows": info["splits"],
                "unreadable": unreadable,
                "files": {
                    path.name: {"bytes": path.stat().st_size, "xxh3_128": digest_of(path)}
                    for path in sorted(partial.glob("*.npy"))
                },
            }
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
    codes_dir: str | Path | None = None,
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
        codes_dir=codes_dir,
    )


class CodesCache:
    """Cached codes of one split. Each process opens the files for itself, so that instances can be sent to workers."""

    def __init__(self, folder: Path, split: str, manifest: dict[str, Any]) -> None:
        """Use `CodesCache.open` or `find`."""
        self._folder = folder
        self._split = split
        self._manifest = manifest
        self._files: tuple[BinaryIO, BinaryIO] | None = None
        self.views: int = manifest["views"] if split == "train" else 1
        """Views of each picture."""
        self.grid: tuple[int, int] = tuple(manifest["grid"])
        """(h, w) of the codes."""
        self._rows: int = manifest["rows"][split]
        self._kind = _kind_of(manifest["vocab_size"])
        self.files: dict[Path, tuple[int, str]] = {
            folder / name: (manifest["files"][name]["bytes"], manifest["files"][name]["xxh3_128"])
            for name in self._names()
        }
        """Path → (bytes, XXH3-128) as written."""
        # The headers of the files are not believed; the data is what lies at their ends.
        sizes = zip(self.files.values(), self._data_bytes(), strict=True)
        self._offsets = [size - of_data for (size, _), of_data in sizes]
        counts = (*self.grid, self.views)
        if self._rows < 0 or any(type(count) is not int or count < 1 for count in counts) or min(self._offsets) < 0:
            raise DataError(f"{folder / 'codes.json'} is damaged: no codes of its shape are in its files; {_AGAIN}")
        self._stamps = Stamps({path: stamp_of(path) for path in self.files}, self.files)
        unreadable = manifest["unreadable"][split]
        self.faults: tuple[Fault, ...] = (Fault(NO_CODES, f"{folder} {split}", unreadable),) if unreadable else ()
        """Rows whose pictures could not be read when the cache was made."""
        self.fingerprint = hashlib.sha256(json.dumps(manifest, sort_keys=True).encode()).hexdigest()
        """Names the cache: its data, dVAE, views, seed and contents."""

    @classmethod
    def find(
        cls, data_dir: str | Path, dvae_fingerprint: str, split: str, codes_dir: str | Path | None = None
    ) -> CodesCache | None:
        """The cache of this dVAE's codes, or None where there is none; `codes_dir` as in `write_codes`.

        Raises:
            DataError: there is one, but made from other data, of another format, without this split, or a file of it is
                missing or cut off.
        """
        data = Path(data_dir)
        folder = _cache_folder(data, dvae_fingerprint, codes_dir)
        if not (folder / "codes.json").is_file():
            return None
        return cls.read(folder, split, data, dvae_fingerprint)

    @classmethod
    def read(cls, folder: Path, split: str, data: Path, dvae_fingerprint: str | None = None) -> CodesCache:
        """The cache in `folder`, whichever dVAE made it if none is given; raises as `find`."""
        manifest, info = _read_manifest(folder), read_info(data)
        for field, wanted in (
            ("format_version", FORMAT_VERSION),
            ("data_fingerprint", info["fingerprint"]),
            ("dvae_fingerprint", dvae_fingerprint or manifest.get("dvae_fingerprint")),
            # Counted from the ends of the files, other numbers of rows would give each row the codes of another.
            ("rows", info["splits"]),
        ):
            if manifest.get(field) != wanted:
                raise DataError(
                    f"{folder / 'codes.json'} has {field} {manifest.get(field)!r}, not {wanted!r}: {_AGAIN}"
                )
        try:
            if split not in manifest["rows"]:
                raise DataError(f"{folder} has no split {split!r}: it has {', '.join(manifest['rows'])}")
            cache = cls(folder, split, manifest)
        except (KeyError, TypeError, AttributeError) as error:
            raise DataError(f"{folder / 'codes.json'} is damaged: {_AGAIN}") from error
        for path, (size, _) in cache.files.items():
            fault = check_size(path, size)
            if fault is not None:
                raise DataError(f"{fault[1]}: {_AGAIN}")
        return cache

    @classmethod
    def open(
        cls, data_dir: str | Path, dvae_fingerprint: str, split: str, codes_dir: str | Path | None = None
    ) -> CodesCache:
        """Like `find`, but there has to be one.

        Raises:
            DataError: see `find`; or there is none.
        """
        cache = cls.find(data_dir, dvae_fingerprint, split, codes_dir)
        if cache is None:
            raise DataError(
                f"{_cache_folder(Path(data_dir), dvae_fingerprint, codes_dir)} does not exist: make it with "
                f"launchers/prepare_data.py --out {data_dir} --cache_codes DVAE"
                f"{f' --codes_out {codes_dir}' if codes_dir else ''}"
            )
        return cache

    def __len__(self) -> int:
        return self._rows

    def codes(self, row: int, view: int) -> npt.NDArray[np.int64]:
        """(h·w,) codes of one view of a row's picture.

        Raises:
            RowError: the picture could not be read when the cache was made, or the codes are not what was written.
        """
        if not (0 <= row < self._rows and 0 <= view < self.views):
            raise IndexError(f"row {row} of {self._rows}, view {view} of {self.views}")
        number = row * self.views + view
        where = f"{self._folder / self._split}.npy"
        check = int(np.frombuffer(self._read(1, number, _CHECK.itemsize), _CHECK)[0])
        if check == 0:
            raise RowError(
                f"{self._folder} {self._split} row {row} has no codes: its picture could not be read",
                NO_CODES,
                f"{self._folder} {self._split} row {row}",
            )
        stored = self._read(0, number, math.prod(self.grid) * self._kind.itemsize)
        if check != _check(stored):
            raise RowError(f"{where} row {row} is damaged: {_AGAIN}", DAMAGED_CODES, where)
        return np.frombuffer(stored, self._kind).astype(np.int64)

    def check_unchanged(self) -> None:
        """See that the files are those that were opened; quick, as `PairDataset.check_unchanged`.

        Raises:
            DataChangedError: the codes were cached again, or a file has other contents.
        """
        try:
            same = _read_manifest(self._folder) == self._manifest
        except DataError as error:
            if may_pass(error):
                return
            raise DataChangedError(f"{self._folder} has changed since it was opened: {error}") from error
        if not same:
            raise DataChangedError(
                f"the codes in {self._folder} were cached again since they were opened: begin a new run in another --run_dir"
            )
        self._stamps.check()

    def _names(self) -> tuple[str, str]:
        return f"{self._split}.npy", f"{self._split}.checks.npy"

    def _data_bytes(self) -> tuple[int, int]:
        views = self._rows * self.views
        return views * math.prod(self.grid) * self._kind.itemsize, views * _CHECK.itemsize

    def _read(self, which: int, number: int, size: int) -> bytes:
        """Item `number` of codes (0) or checks (1). Not through a map: what a disk cannot deliver is an error here."""
        name = self._names()[which]
        try:
            if self._files is None:
                codes, checks = ((self._folder / name).open("rb", buffering=0) for name in self._names())
                self._files = codes, checks
            data = os.pread(self._files[which].fileno(), size, self._offsets[which] + number * size)
        except OSError as error:
            path = str(self._folder / name)
            raise RowError(f"{path} cannot be read: {error.strerror}", READ_ERROR, path) from error
        if len(data) != size:
            raise RowError(f"{self._folder / name} was cut off: {_AGAIN}", DAMAGED_CODES, str(self._folder / name))
        return data

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "_files": None}


# --- writing --------------------------------------------------------------------------------------------------------


def _write_split(
    encode: Encode,
    batches: DataLoader,
    stem: Path,
    rows: int,
    vocab_size: int,
) -> tuple[list[int], int]:
    """Write one split in order; returns its grid (empty for a split without rows) and the number of unreadable rows."""
    checks: list[npt.NDArray[np.uint32]] = []
    views = 1
    grid: list[int] = []
    kind = _kind_of(vocab_size)
    # Appended to a plain file: a full disk is an OSError here, and the end of the process in a memory map.
    with stem.with_name(f"{stem.name}.npy").open("wb") as file:
        for codes, readable in _encoded(encode, batches):
            if not grid:
                views, grid = codes.shape[1], list(codes.shape[2:])
                _write_header(file, kind, (rows, views, grid[0] * grid[1]))
            assert codes.min() >= 0 and codes.max() < vocab_size, "codes outside the dVAE's vocabulary"
            for row, is_readable in zip(codes.astype(kind), readable, strict=True):
                file.write(row.tobytes())
                checks.append(np.array([_check(view.tobytes()) if is_readable else 0 for view in row], dtype=_CHECK))
        if not grid:
            _write_header(file, kind, (0, 1, 0))
    table = np.stack(checks) if checks else np.zeros((0, views), dtype=_CHECK)
    np.save(stem.with_name(f"{stem.name}.checks.npy"), table)
    return grid, int((table[:, 0] == 0).sum())


def _encoded(encode: Encode, batches: DataLoader) -> Iterator[tuple[npt.NDArray[np.int64], npt.NDArray[np.bool_]]]:
    """((rows, views, h, w) codes, (rows,) readable) of every batch."""
    loaded = without_surprises(lambda: iter(batches))
    for _ in range(len(batches)):
        views, readable = take(loaded)
        codes = encode(views.flatten(0, 1)).cpu().numpy()
        yield codes.reshape(views.shape[0], views.shape[1], *codes.shape[1:]), readable


def _check(view: bytes) -> int:
    return xxhash.xxh32_intdigest(view) or 1


def _kind_of(vocab_size: int) -> np.dtype:
    return np.dtype("<u2" if vocab_size <= 2**16 else "<u4")


def _write_header(file: BinaryIO, kind: np.dtype, shape: tuple[int, ...]) -> None:
    header = {"descr": np.lib.format.dtype_to_descr(kind), "fortran_order": False, "shape": shape}
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
        return dict(parse_json((folder / "codes.json").read_bytes()))
    except (OSError, ValueError, TypeError) as error:
        raise DataError(f"{folder / 'codes.json'} cannot be read: {_AGAIN}") from error


def _cache_folder(data: Path, dvae_fingerprint: str, codes_dir: str | Path | None) -> Path:
    if not codes_dir:
        return data / "codes" / dvae_fingerprint[:16]
    return Path(codes_dir) / f"{read_info(data)['fingerprint'][:16]}-{dvae_fingerprint[:16]}"
