"""Preparation shared by several jobs: part I of N examines units I, I + N, … of the corpus; merging puts them in order.

The parts of OUT lie in `OUT.parts/00000-of-00016/` until they are merged: `data-*.arrow` with what was found of each pair,
and `part.json`. A part's folder appears only when it is complete.
"""

from __future__ import annotations

import dataclasses
import heapq
import json
import re
import shutil
from collections.abc import Iterable, Iterator
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pyarrow as pa
import xxhash

from dalle_ds.data.corpora import Unit
from dalle_ds.data.disk import disk_full_is_a_data_error, unreadable_is_a_data_error
from dalle_ds.data.examine import Caption, Examined
from dalle_ds.data.shards import Shard, check_size, digest_of
from dalle_ds.errors import ConfigError, DataError
from dalle_ds.files import built_beside, write_json
from dalle_ds.parsing import parse_json

FORMAT_VERSION = 1
_SCHEMA = pa.schema({"image": pa.binary(), "entry": pa.string()})
_NAME = re.compile(r"(\d+)-of-(\d+)")


@dataclass(frozen=True)
class PartReport:
    """What became of one part."""

    folder: str
    pairs: int
    """Pairs, and what was found in the place of some."""
    already_there: bool = False

    def __str__(self) -> str:
        done = "was there already" if self.already_there else "examined"
        return f"{self.folder}: {self.pairs:,} pairs, {done}"


@dataclass(frozen=True)
class Part:
    """A complete part."""

    folder: Path
    manifest: dict[str, Any]

    def entries(self) -> Iterator[Examined]:
        """What was found, in the order of the corpus.

        Raises:
            DataError: a file is missing, damaged or cannot be read.
        """
        for shard in (Shard(**entry) for entry in self.manifest["files"]):
            path = self.folder / shard.file
            with unreadable_is_a_data_error(path):
                if check_size(path, shard.bytes) is not None or digest_of(path) != shard.xxh3_128:
                    raise DataError(
                        f"{path} is missing or damaged: prepare part {self.manifest['shard']} again with --overwrite True"
                    )
                with pa.memory_map(str(path)) as source, pa.ipc.open_stream(source) as batches:
                    for batch in batches:
                        # One row in memory, since all parts are read at a time.
                        for image, entry in zip(*batch.columns, strict=True):
                            fields = json.loads(entry.as_py())
                            captions = [Caption(*caption) for caption in fields.pop("captions")]
                            yield Examined(**fields, captions=captions, image=image.as_py())


class Share:
    """The units of part `shard` of `shards`, and what all parts must agree on. Iterated once."""

    def __init__(self, units: Iterable[Unit], shard: int, shards: int) -> None:
        self._units = units
        self._shard = shard
        self._shards = shards
        self._names = xxhash.xxh3_128()
        self.count = 0
        """Units of the whole corpus, once iterated."""

    def __iter__(self) -> Iterator[tuple[int, Unit]]:
        for number, unit in enumerate(self._units):
            self._names.update(unit.name.encode("utf-8", "surrogateescape") + b"\0")
            self.count += 1
            if number % self._shards == self._shard:
                yield number, unit

    @property
    def digest(self) -> str:
        """Of the names of all units, once iterated."""
        return self._names.hexdigest()


def check_part(shard: int, shards: int) -> None:
    """Raises `ConfigError` where there is no part `shard` of `shards`."""
    if shards < 1 or not 0 <= shard < shards:
        raise ConfigError(f"shard must lie in [0, shards), found shard {shard} of {shards} shards")


def part_folder(out: Path, shard: int, shards: int) -> Path:
    """Where a part lies."""
    return parts_folder(out) / f"{shard:05d}-of-{shards:05d}"


def parts_folder(out: Path) -> Path:
    """Where the parts of a prepared folder lie."""
    return out.with_name(f"{out.name}.parts")


def remove_parts(out: Path) -> None:
    """Remove the parts of a prepared folder that are merged.

    They take another name first: of parts half of which were removed, nobody could tell that they had been merged.
    """
    clear_merged(out)
    with suppress(OSError):  # the folder itself is complete, and the next merge tries again
        parts_folder(out).rename(_merged_folder(out))
        clear_merged(out)


def clear_merged(out: Path) -> None:
    """Remove what a merge left that was ended while it removed the parts."""
    shutil.rmtree(_merged_folder(out), ignore_errors=True)


def _merged_folder(out: Path) -> Path:
    return out.with_name(f".{out.name}.parts.merged")


def existing_part(folder: Path, identity: dict[str, Any]) -> PartReport | None:
    """The report of a complete part of the same preparation, or None where there is no part.

    Raises:
        DataError: there is one of another preparation.
    """
    if not folder.exists():
        return None
    part = _read_part(folder)
    differing = _differing(part, identity)
    if differing:
        raise DataError(
            f"{folder} is part of another preparation (different: {differing}): give --overwrite True, or another --out"
        )
    return PartReport(str(folder), part.manifest["pairs"], already_there=True)


def write_part(entries: Iterable[Examined], share: Share, folder: Path, identity: dict[str, Any]) -> PartReport:
    """Write what was found of a share of the corpus; a part that is there is replaced.

    Raises:
        DataError: the disk is full.
    """
    from dalle_ds.data.arrow import ShardWriter

    shard, shards = _numbers(folder)
    pairs = 0
    with disk_full_is_a_data_error(folder), built_beside(folder) as partial:
        writer = ShardWriter(partial / "files", _SCHEMA)
        for item in entries:
            fields = {name: value for name, value in vars(item).items() if name != "image"}
            fields["captions"] = [dataclasses.astuple(caption) for caption in item.captions]
            entry = json.dumps(fields)  # ASCII
            writer.add({"image": item.image, "entry": entry}, len(item.image) + len(entry))
            pairs += 1
        files = [dataclasses.replace(file, file=f"files/{file.file}") for file in writer.close()]
        manifest = {
            "format_version": FORMAT_VERSION,
            "options": identity,
            "shard": shard,
            "shards": shards,
            "units": share.count,
            "units_digest": share.digest,
            "pairs": pairs,
            "files": [vars(file) for file in files],
        }
        write_json(partial / "part.json", manifest)
    return PartReport(str(folder), pairs)


def complete_parts(out: Path, shards: int | None = None) -> list[Part]:
    """All parts of a preparation, by number.

    Args:
        shards: how many there must be; None takes what the parts say.

    Raises:
        DataError: one is missing, or they do not belong together.
    """
    folder = parts_folder(out)
    names = [_NAME.fullmatch(path.name) for path in sorted(folder.glob("*-of-*"))]
    found = {(int(name[1]), int(name[2])) for name in names if name}
    counts = {count for _, count in found} if shards is None else {shards}
    if not found:
        raise DataError(f"{folder} has no parts to merge: prepare them with --shard I --shards N")
    if len(counts) > 1:
        raise DataError(f"{folder} has parts of several divisions ({_listed(counts)}): say which with --shards N")
    count = counts.pop()
    missing = [number for number in range(count) if (number, count) not in found]
    if missing:
        raise DataError(
            f"{len(missing)} of {count} parts are missing from {folder} ({_listed(missing)}): prepare them with --shard I "
            f"--shards {count}, then merge again"
        )
    parts = [_read_part(part_folder(out, number, count)) for number in range(count)]
    first = parts[0].manifest
    for part in parts:
        differing = _differing(part, first["options"])
        if differing:
            raise DataError(
                f"{part.folder} was prepared with other options than part 0 (different: {differing}): prepare it again "
                "with --overwrite True"
            )
        if any(part.manifest[name] != first[name] for name in ("units", "units_digest")):
            raise DataError(
                f"the corpus was another one when {part.folder} was prepared ({part.manifest['units']:,} files or rows, "
                f"part 0 has seen {first['units']:,}): prepare all parts again with --overwrite True"
            )
    return parts


def merged(parts: Iterable[Part]) -> Iterator[Examined]:
    """The entries of all parts in the order of the corpus."""
    return heapq.merge(*(part.entries() for part in parts), key=lambda item: item.unit)


def _read_part(folder: Path) -> Part:
    try:
        manifest = parse_json((folder / "part.json").read_bytes())
        version = manifest["format_version"]
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise DataError(f"{folder} is no part of a preparation: no readable part.json ({error})") from error
    if version != FORMAT_VERSION:
        raise DataError(
            f"{folder} has part format {version}, not {FORMAT_VERSION}: prepare it again with --overwrite True"
        )
    found = manifest.get("shard"), manifest.get("shards")
    if found != _numbers(folder):
        raise DataError(
            f"{folder} has the files of part {found[0]} of {found[1]}: give it its own name, or prepare it again with "
            "--overwrite True"
        )
    return Part(folder, manifest)


def _numbers(folder: Path) -> tuple[int, int]:
    """(shard, shards) of a part's folder."""
    shard, shards = folder.name.split("-of-")
    return int(shard), int(shards)


def _differing(part: Part, identity: dict[str, Any]) -> str:
    options = part.manifest["options"]
    return ", ".join(sorted(name for name in identity if options.get(name) != identity[name]))


def _listed(numbers: Iterable[int]) -> str:
    ordered = sorted(numbers)
    return ", ".join(map(str, ordered[:20])) + (", …" if len(ordered) > 20 else "")
