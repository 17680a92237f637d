"""Preparation shared by several jobs: part I of N examines units I, I + N, … of the corpus; merging puts them in order.

The parts of OUT lie in `OUT.parts/00000-of-00016/` until they are merged: segments of about 128 MiB, `data-*.arrow` with what
was found of each pair, and `part.json`. A part's folder appears only when it is complete. Until then its complete segments
lie in `.00000-of-00016.work`, and a job that was killed goes on behind the last of them. Where segments end depends on the
corpus alone, so that two jobs that do the same part, one of which was thought dead, write the same.
"""

from __future__ import annotations

import dataclasses
import heapq
import json
import re
import shutil
from collections.abc import Callable, Iterable, Iterator
from contextlib import AbstractContextManager, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pyarrow as pa
import xxhash

from dalle_ds.data.corpora import Unit
from dalle_ds.data.examine import Caption, Examined
from dalle_ds.data.store import DataFile, digest_of, size_problem
from dalle_ds.errors import ConfigError, DataError
from dalle_ds.files import (
    built_beside,
    disk_full_is_a_data_error,
    only_process,
    remove_leftovers,
    sync_directory,
    unreadable_is_a_data_error,
    write_json,
)
from dalle_ds.parsing import parse_json

FORMAT_VERSION = 3
_SCHEMA = pa.schema({"image": pa.binary(), "embedding": pa.binary(), "entry": pa.string()})
_SEGMENT_BYTES = 128 * 2**20
_SEGMENT_PAIRS = 10_000
_NAME = re.compile(r"(\d+)-of-(\d+)")


@dataclass(frozen=True)
class PartReport:
    """What became of one part."""

    folder: str
    pairs: int
    """Pairs, and what was found in the place of some; not what belongs to none."""
    already_there: bool = False

    def __str__(self) -> str:
        done = "was there already" if self.already_there else "examined"
        return f"{self.folder}: {self.pairs:,} pairs, {done}"


@dataclass(frozen=True)
class Part:
    """A complete part."""

    folder: Path
    manifest: dict[str, Any]

    def entries(self, *, pictures: bool = True) -> Iterator[Examined]:
        """What was found, in the order of the corpus.

        Args:
            pictures: read them; without, the files are verified.

        Raises:
            DataError: a file is missing, damaged or cannot be read.
        """
        for shard in (DataFile(**entry) for entry in self.manifest["files"]):
            path = self.folder / shard.file
            with unreadable_is_a_data_error(path):
                if size_problem(path, shard.bytes) is not None or (not pictures and digest_of(path) != shard.xxh3_128):
                    raise DataError(
                        f"{path} is missing or damaged: prepare part {self.manifest['shard']} again with --overwrite True"
                    )
                with pa.memory_map(str(path)) as source, pa.ipc.open_stream(source) as batches:
                    for batch in batches:
                        # One row in memory, since all parts are read at a time.
                        for image, embedding, entry in zip(*batch.columns, strict=True):
                            fields = json.loads(entry.as_py())
                            captions = [Caption(*caption) for caption in fields.pop("captions")]
                            yield Examined(
                                **fields,
                                captions=captions,
                                image=image.as_py() if pictures else b"",
                                embedding=b"" if pictures else embedding.as_py(),
                            )


class Share:
    """The units of part `shard` of `shards`, and what all parts must agree on. Iterated once."""

    def __init__(self, units: Iterable[Unit], shard: int, shards: int) -> None:
        self._units = units
        self._shard = shard
        self._shards = shards
        self._names = xxhash.xxh3_128()
        self._digests: dict[int, str] = {}  # of the names up to each unit that was given out
        self._first = 0
        self._begins_with = ""
        self.count = 0
        """Units of the whole corpus, once iterated."""

    def leave_out(self, first: int, digest: str) -> None:
        """Begin with unit number `first`; those before it must have names of this digest."""
        self._first, self._begins_with = first, digest

    def __iter__(self) -> Iterator[tuple[int, Unit]]:
        for number, unit in enumerate(self._units):
            if number == self._first > 0:
                self._check_beginning()
            self._names.update(unit.name.encode("utf-8", "surrogateescape") + b"\0")
            self.count += 1
            if number >= self._first and number % self._shards == self._shard:
                self._digests[number] = self.digest
                yield number, unit
        if self.count <= self._first:
            self._check_beginning()

    def digest_up_to(self, number: int) -> str:
        """Of the names of the units up to this one, the last that an entry was found of; asked once, in ascending order."""
        for earlier in [unit for unit in self._digests if unit < number]:
            del self._digests[earlier]
        return self._digests.pop(number)

    @property
    def digest(self) -> str:
        """Of the names of all units, once iterated."""
        return self._names.hexdigest()

    def _check_beginning(self) -> None:
        if self.count != self._first or (self._first and self.digest != self._begins_with):
            raise DataError(
                f"the corpus has changed since part {self._shard} of {self._shards} was begun: prepare it again with "
                "--overwrite True"
            )


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


def remove_parts(out: Path, merged: list[Part]) -> None:
    """Remove the parts of a prepared folder that are merged, and no others, which a job may be doing.

    Where there are no others, they take another name first: of parts half of which were removed, nobody could tell that they
    had been merged.
    """
    clear_merged(out)
    folder = parts_folder(out)
    own = {path for part in merged for path in (part.folder, _work(part.folder))}
    with suppress(OSError):  # the folder itself is complete, and the next merge tries again
        if own.issuperset(folder.iterdir()):
            folder.rename(_merged_folder(out))
            clear_merged(out)
        else:
            for part in merged:
                remove_part(part.folder)


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
    _check_identity(folder, part.manifest["options"], identity)
    return PartReport(str(folder), part.manifest["pairs"], already_there=True)


def only_job(out: Path, shard: int, shards: int) -> AbstractContextManager[None]:
    """Keep other processes from doing a part, or merging it, meanwhile; see `only_process`."""
    return only_process(out, f".{out.name}.{shard}-of-{shards}.lock")


def remove_part(folder: Path) -> None:
    """Remove a part, complete or begun, so that it is done from the start."""
    for path in (_work(folder), folder):
        shutil.rmtree(path, ignore_errors=True)


def write_part(
    examined: Callable[[Share], Iterable[Examined]], share: Share, folder: Path, identity: dict[str, Any]
) -> PartReport:
    """Write what is found of a share of the corpus, going on behind the last complete segment that an earlier call left.

    Args:
        examined: looks at the units of a share.

    Raises:
        DataError: the disk is full, the part was begun with other options, or the corpus has changed since then.
    """
    work = _work(folder)
    shard, shards = _numbers(folder)
    with disk_full_is_a_data_error(folder):
        remove_leftovers(work)
        segments = _complete_segments(work, identity)
        if segments:
            share.leave_out(segments[-1]["end"], segments[-1]["digest"])
        items = iter(examined(share))
        item = next(items, None)
        while item is not None:
            with built_beside(work / f"segment-{item.unit:010d}") as partial:
                segment, item = _write_segment(partial, item, items, share)
                segment["format_version"] = FORMAT_VERSION
                segment["options"] = identity
                segment["begin"] = segments[-1]["end"] if segments else 0
                write_json(partial / "segment.json", segment)
            segments.append(segment)
        manifest = {
            "format_version": FORMAT_VERSION,
            "options": identity,
            "shard": shard,
            "shards": shards,
            "units": share.count,
            "units_digest": share.digest,
            "pairs": sum(segment["pairs"] for segment in segments),
            "files": [file for segment in segments for file in segment["files"]],
        }
        work.mkdir(parents=True, exist_ok=True)
        write_json(work / "part.json", manifest)
        if not folder.exists():  # where two jobs did the same part, the other may have been first
            work.rename(folder)
            sync_directory(folder.parent)
        shutil.rmtree(work, ignore_errors=True)
    return PartReport(str(folder), manifest["pairs"])


def _write_segment(
    partial: Path, item: Examined, items: Iterator[Examined], share: Share
) -> tuple[dict[str, Any], Examined | None]:
    """Write items up to the end of a unit behind which the segment is large enough: (what it holds, the next item)."""
    from dalle_ds.data.store_writer import StoreWriter

    name = f"segment-{item.unit:010d}"
    writer = StoreWriter(partial / "files", _SCHEMA)
    pairs = entries = size = 0
    following: Examined | None = item
    while following is not None:
        if following.unit != item.unit and (size >= _SEGMENT_BYTES or entries >= _SEGMENT_PAIRS):
            break
        item = following
        fields = {key: value for key, value in vars(item).items() if key not in ("image", "embedding")}
        fields["captions"] = [dataclasses.astuple(caption) for caption in item.captions]
        entry = json.dumps(fields)  # ASCII
        weight = len(item.image) + len(item.embedding) + len(entry)
        writer.add({"image": item.image, "embedding": item.embedding, "entry": entry}, weight)
        pairs += 0 if item.unpaired else item.count
        entries, size = entries + 1, size + weight
        following = next(items, None)
    files = [vars(dataclasses.replace(file, file=f"{name}/files/{file.file}")) for file in writer.close()]
    end = {"end": item.unit + 1, "digest": share.digest_up_to(item.unit)}
    return {**end, "pairs": pairs, "files": files}, following


def _complete_segments(work: Path, identity: dict[str, Any]) -> list[dict[str, Any]]:
    """What the segments of a part that was begun hold, up to the first that is missing."""
    segments: list[dict[str, Any]] = []
    for path in sorted(work.glob("segment-*/segment.json")):
        segment = parse_json(path.read_bytes())
        _check_identity(work, segment["options"], identity)
        if segment["begin"] != (segments[-1]["end"] if segments else 0):
            break
        if segment.get("format_version") != FORMAT_VERSION:  # of a version that did not count all that is counted now
            break
        segments.append(segment)
    return segments


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
        differing = _differing(part.manifest["options"], first["options"])
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


def merged(parts: Iterable[Part], *, pictures: bool = True) -> Iterator[Examined]:
    """The entries of all parts in the order of the corpus; see `Part.entries`."""
    return heapq.merge(*(part.entries(pictures=pictures) for part in parts), key=lambda item: item.unit)


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


def _work(folder: Path) -> Path:
    """Where a part lies until it is complete."""
    return folder.with_name(f".{folder.name}.work")


def _numbers(folder: Path) -> tuple[int, int]:
    """(shard, shards) of a part's folder."""
    shard, shards = folder.name.split("-of-")
    return int(shard), int(shards)


def _check_identity(folder: Path, options: dict[str, Any], identity: dict[str, Any]) -> None:
    differing = _differing(options, identity)
    if differing:
        raise DataError(
            f"{folder} is part of another preparation (different: {differing}): give --overwrite True, or another --out"
        )


def _differing(options: dict[str, Any], identity: dict[str, Any]) -> str:
    return ", ".join(sorted(name for name in identity | options if options.get(name) != identity.get(name)))


def _listed(numbers: Iterable[int]) -> str:
    ordered = sorted(numbers)
    return ", ".join(map(str, ordered[:20])) + (", …" if len(ordered) > 20 else "")
