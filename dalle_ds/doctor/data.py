"""Whether prepared data is what preparation wrote: every byte by its digest, and images by decoding them."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Annotated

import tyro
from rich.console import Console, Group, RenderableType
from rich.progress import track
from rich.table import Table

from dalle_ds.data.codes import CodesCache
from dalle_ds.data.dataset import PairDataset, read_info
from dalle_ds.data.embeddings import EmbeddingCache
from dalle_ds.data.features import FeatureCache
from dalle_ds.data.snapshot import DataFile, size_problem
from dalle_ds.errors import ConfigError, DataError
from dalle_ds.files import digest_of

_SHOWN = 20


@dataclass(frozen=True)
class DataOptions:
    """Read all of a prepared data folder and what is cached there, verify digests, decode images; status 1 where something
    is damaged."""

    path: Annotated[tyro.conf.Positional[str], tyro.conf.arg(metavar="DIR")]
    """A folder that prepare_data.py made."""
    all: bool = False
    """Decode every image instead of a sample."""
    pictures: int = 1_000
    """Images of each split that are decoded, spread evenly over it."""
    codes: str | None = None
    """Folder that prepare_data.py --codes_out made: codes of this data there are read, too."""

    def __post_init__(self) -> None:
        if self.pictures < 0:
            raise ConfigError(f"images must not be negative, found {self.pictures}")


@dataclass
class Counts:
    """What was found of one split, or of what is cached of one."""

    name: str
    rows: int = 0
    unreadable: int = 0  # rows that cannot be read
    files: int = 0  # whose digest is right
    bytes: int = 0  # of those
    decoded: int = 0  # images that were decoded without an error


@dataclass
class DataInspection:
    """A prepared folder, looked at."""

    path: Path
    fingerprint: str
    counts: list[Counts] = field(default_factory=list)
    faults: list[str] = field(default_factory=list)
    """What is wrong with it, a sentence each."""

    def report(self) -> RenderableType:
        """For a terminal."""
        table = Table(title=f"{self.path} (fingerprint {self.fingerprint[:16]}…)", title_justify="left")
        for number, column in enumerate(("", "rows", "unreadable", "files", "GB read", "images decoded")):
            table.add_column(column, justify="right" if number else "left")
        for entry in self.counts:
            sizes = f"{entry.bytes / 1e9:.3f}"
            counts = f"{entry.rows:,}", f"{entry.unreadable:,}", f"{entry.files:,}"
            table.add_row(entry.name, *counts, sizes, f"{entry.decoded:,}")
        shown = [f"DAMAGED: {fault}" for fault in self.faults[:_SHOWN]]
        if len(self.faults) > _SHOWN:
            shown.append(f"… and {len(self.faults) - _SHOWN:,} more")
        return Group(table, *(shown or ["All of it is what was written."]))


def inspect_data(options: DataOptions) -> DataInspection:
    """Read everything.

    Raises:
        DataError: there is no prepared folder, or its manifest is damaged.
    """
    folder = Path(options.path)
    info = read_info(folder)
    inspection = DataInspection(folder, info["fingerprint"])
    for split in info["splits"]:
        counts = Counts(split)
        inspection.counts.append(counts)
        inspection.faults += _inspect_split(folder, split, info["splits"][split], options, counts)
    elsewhere = Path(options.codes).glob(f"{info['fingerprint'][:16]}-*/codes.json") if options.codes else ()
    for kind, others in ((CodesCache, elsewhere), (EmbeddingCache, ())):
        inside = (folder / kind.kind.name).glob(f"*/{kind.kind.manifest}")
        for manifest in sorted([*inside, *others]):
            inspection.faults += _inspect_cache(kind, folder, manifest.parent, info, inspection.counts)
    return inspection


def _inspect_split(folder: Path, split: str, rows: int, options: DataOptions, counts: Counts) -> Iterator[str]:
    try:
        dataset = PairDataset.open(folder, split)
    except DataError as error:
        counts.rows = counts.unreadable = rows
        yield str(error)
        return
    counts.rows = len(dataset)
    first = 0
    for file in _progress(dataset.files, f"{split}: reading"):
        what = _damage_of(folder / split, file, counts)
        if what is not None:
            lost = sum(not _readable(dataset, row) for row in range(first, first + file.rows))
            counts.unreadable += lost
            yield f"{what}; {lost:,} of its {file.rows:,} rows cannot be read"
        first += file.rows
    wanted = len(dataset) if options.all else min(options.pictures, len(dataset))
    for number in _progress(range(wanted), f"{split}: decoding"):
        row = number * len(dataset) // wanted
        if _readable(dataset, row):  # those that are not are counted already
            try:
                dataset.image(row)
                counts.decoded += 1
            except DataError as error:
                counts.unreadable += 1
                yield str(error)


def _inspect_cache(
    kind: type[FeatureCache], folder: Path, cached: Path, info: dict, all_counts: list[Counts]
) -> Iterator[str]:
    for split in info["splits"]:
        counts = Counts(f"{kind.kind.name}/{cached.name}: {split}")
        all_counts.append(counts)
        try:
            cache = kind.read(cached, split, folder)
        except DataError as error:
            yield str(error)
            continue
        counts.rows = len(cache)
        counts.unreadable = sum(fault.rows for fault in cache.faults)
        damage = [_damage_of(*file, counts) for file in cache.files]
        yield from (f"{what}: {kind.kind.again}" for what in damage if what is not None)
        if any(damage):
            counts.unreadable = sum(not _is_cached(cache, row) for row in range(len(cache)))


def _damage_of(folder: Path, file: DataFile, counts: Counts) -> str | None:
    """What is wrong with a file, or None; a sound one is counted."""
    path = folder / file.file
    problem = size_problem(path, file.bytes)
    if problem is not None:
        return problem[1]
    try:
        found = digest_of(path)
    except OSError as error:
        return f"{path} cannot be read: {error.strerror}"
    if found != file.xxh3_128:
        return f"{path} is damaged (digest {found[:12]}… instead of {file.xxh3_128[:12]}…)"
    counts.files += 1
    counts.bytes += file.bytes
    return None


def _readable(dataset: PairDataset, row: int) -> bool:
    try:
        dataset.encoded(row)
        dataset.captions(row)
    except DataError:
        return False
    return True


def _is_cached(cache: FeatureCache, row: int) -> bool:
    try:
        cache.read_row(row)
    except DataError:
        return False
    return True


def _progress(items: Sequence, what: str) -> Iterator:
    console = Console(stderr=True)
    yield from track(items, what, console=console, transient=True, disable=not console.is_terminal)
