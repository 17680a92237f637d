"""Preparation in parts, each of which looks at a run of the corpus's units; merging puts them together in order.

Part p of N has the units [p·U // N, (p + 1)·U // N) of U. It lies in `OUT.parts/00000-of-00016/` until it is merged: Arrow
files with what was found of each pair, and `part.json`. The folder appears only when the part is complete: a preparation that
was killed goes on with the first part that is not there. What a part holds depends on the corpus alone, so that two jobs that
do the same part, one of which was thought dead, write the same.
"""

from __future__ import annotations

import dataclasses
import json
import re
import shutil
from bisect import bisect_right
from collections.abc import Iterable, Iterator, Sequence
from contextlib import AbstractContextManager, suppress
from dataclasses import dataclass
from itertools import islice
from pathlib import Path
from typing import Any

import pyarrow as pa
import xxhash

from dalle_ds.data.corpora import Corpus
from dalle_ds.data.processing import Caption, ProcessedPair
from dalle_ds.data.snapshot import DataFile, size_problem
from dalle_ds.data.store_writer import StoreWriter
from dalle_ds.errors import DataError
from dalle_ds.files import (
    built_beside,
    digest_of,
    disk_full_is_a_data_error,
    only_process,
    remove_leftovers,
    unreadable_is_a_data_error,
    write_json,
)
from dalle_ds.parsing import parse_json

FORMAT_VERSION = 4
_SCHEMA = pa.schema({"image": pa.binary(), "embedding": pa.binary(), "entry": pa.string()})
_MOST_PARTS = 1000
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

    def entries(self, *, images: bool = True) -> Iterator[ProcessedPair]:
        """What was found, in the order of the corpus: with images, or without, from files whose digests are verified.

        Raises:
            DataError: a file is missing, damaged or cannot be read.
        """
        for file in (DataFile(**entry) for entry in self.manifest["files"]):
            path = self.folder / "files" / file.file
            with unreadable_is_a_data_error(path):
                if size_problem(path, file.bytes) is not None or (not images and digest_of(path) != file.xxh3_128):
                    raise DataError(
                        f"{path} is missing or damaged: prepare part {self.manifest['part']} again with --overwrite True"
                    )
                with pa.memory_map(str(path)) as source, pa.ipc.open_stream(source) as batches:
                    for batch in batches:
                        for image, embedding, entry in zip(*batch.columns, strict=True):  # one row in memory
                            fields = json.loads(entry.as_py())
                            captions = [Caption(*caption) for caption in fields.pop("captions")]
                            yield ProcessedPair(
                                **fields,
                                captions=captions,
                                image=image.as_py() if images else b"",
                                embedding=b"" if images else embedding.as_py(),
                            )


@dataclass(frozen=True)
class Division:
    """How a corpus is divided."""

    units: int
    digest: str
    """XXH3-128 of the names of all units."""
    parts: int

    @classmethod
    def of(cls, corpus: Corpus, parts: int | None) -> Division:
        """The corpus in so many parts; None takes as many as `Corpus.units_per_part` says, up to a thousand."""
        names = xxhash.xxh3_128()
        units = 0
        for unit in corpus.units():
            names.update(unit.name.encode("utf-8", "surrogateescape") + b"\0")
            units += 1
        wanted = min(_MOST_PARTS, max(1, -(-units // corpus.units_per_part)))
        return cls(units, names.hexdigest(), parts or wanted)

    def end_of(self, part: int) -> int:
        """The first unit behind a part."""
        return (part + 1) * self.units // self.parts

    def units_of(self, corpus: Corpus, parts: Sequence[int]) -> Iterator[tuple[int, Any]]:
        """The units of these parts with their numbers."""
        wanted, ends = set(parts), [self.end_of(part) for part in range(self.parts)]
        for number, unit in islice(enumerate(corpus.units()), self.end_of(max(parts, default=-1))):
            if bisect_right(ends, number) in wanted:
                yield number, unit


class Parts:
    """The parts of the prepared folder `out`."""

    def __init__(self, out: Path) -> None:
        self._out = out
        self.folder = out.with_name(f"{out.name}.parts")
        self._merged = out.with_name(f".{out.name}.parts.merged")

    def place(self, part: int, parts: int) -> Path:
        """Where a part lies."""
        return self.folder / f"{part:05d}-of-{parts:05d}"

    def there(self) -> set[tuple[int, int]]:
        """(part, parts) of all that are complete."""
        names = (_NAME.fullmatch(path.name) for path in self.folder.glob("*-of-*"))
        return {(int(name[1]), int(name[2])) for name in names if name}

    def begun(self) -> int | None:
        """How many parts a preparation has that was begun; None where there is none, or several."""
        counts = {count for _, count in self.there()}
        return counts.pop() if len(counts) == 1 else None

    def existing(
        self, part: int, parts: int, identity: dict[str, Any], division: Division | None = None
    ) -> PartReport | None:
        """The report of a complete part, or None where there is none; `DataError` where there is one of another preparation,
        or of a corpus that is not divided so."""
        folder = self.place(part, parts)
        if not folder.exists():
            return None
        manifest = _read_part(folder).manifest
        differing = _differing(manifest["options"], identity)
        if differing:
            raise DataError(
                f"{folder} is part of another preparation (different: {differing}): give --overwrite True, or another --out"
            )
        if division is not None and (manifest["units"], manifest["units_digest"]) != (division.units, division.digest):
            raise DataError(
                f"the corpus has changed since {folder} was prepared: prepare it again with --overwrite True"
            )
        return PartReport(str(folder), manifest["pairs"], already_there=True)

    def only_job(self, part: int, parts: int) -> AbstractContextManager[None]:
        """Keep other processes from doing a part meanwhile."""
        return only_process(self._out, f".{self._out.name}.{part}-of-{parts}.lock")

    def write(
        self, items: Iterator[ProcessedPair], parts: Sequence[int], division: Division, identity: dict[str, Any]
    ) -> Iterator[PartReport]:
        """Write what is found of the units of these parts, one part after the other; `DataError` where the disk is full."""
        item = next(items, None)
        with disk_full_is_a_data_error(self.folder):
            for part in parts:
                folder, pairs = self.place(part, division.parts), 0
                remove_leftovers(self.folder, folder.name)
                with built_beside(folder) as partial:
                    writer = StoreWriter(partial / "files", _SCHEMA)
                    while item is not None and item.unit < division.end_of(part):
                        row = _row_of(item)
                        writer.add(row, sum(map(len, row.values())))
                        pairs += 0 if item.unpaired else item.count
                        item = next(items, None)
                    manifest = {
                        "format_version": FORMAT_VERSION,
                        "options": identity,
                        "part": part,
                        "parts": division.parts,
                        "units": division.units,
                        "units_digest": division.digest,
                        "pairs": pairs,
                        "files": [vars(file) for file in writer.close()],
                    }
                    write_json(partial / "part.json", manifest)
                yield PartReport(str(folder), pairs)

    def complete(self, count: int | None = None) -> list[Part]:
        """All parts of a preparation, in order, `count` of them or as many as the parts say; `DataError` where one is missing,
        or they do not belong together."""
        found = self.there()
        counts = {count for _, count in found} if count is None else {count}
        if not found:
            raise DataError(f"{self.folder} has no parts to merge: prepare them with --part I --parts N")
        if len(counts) > 1:
            raise DataError(
                f"{self.folder} has parts of several divisions ({_listed(counts)}): say which with --parts N"
            )
        count = counts.pop()
        missing = [number for number in range(count) if (number, count) not in found]
        if missing:
            raise DataError(
                f"{len(missing)} of {count} parts are missing from {self.folder} ({_listed(missing)}): prepare them with "
                f"--part I --parts {count}, then merge again"
            )
        parts = [_read_part(self.place(number, count)) for number in range(count)]
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

    def remove(self, merged: list[Part]) -> None:
        """Remove parts that are merged, and no others, which a job may be doing.

        Where there are no others, they take another name first: of parts half of which were removed, nobody could tell that
        they had been merged.
        """
        self.clear_merged()
        own = {part.folder for part in merged}
        with suppress(OSError):  # the folder itself is complete, and the next merge tries again
            # What ends in .work was begun by a former version.
            if all(path in own or path.suffix == ".work" for path in self.folder.iterdir()):
                self.folder.rename(self._merged)
                self.clear_merged()
            else:
                for path in own:
                    shutil.rmtree(path, ignore_errors=True)

    def clear_merged(self) -> None:
        """Remove what a merge left that was ended while it removed the parts."""
        shutil.rmtree(self._merged, ignore_errors=True)


def _row_of(item: ProcessedPair) -> dict[str, Any]:
    fields = {key: value for key, value in vars(item).items() if key not in ("image", "embedding")}
    fields["captions"] = [dataclasses.astuple(caption) for caption in item.captions]
    return {"image": item.image, "embedding": item.embedding, "entry": json.dumps(fields)}  # the last in ASCII


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
    found = manifest.get("part"), manifest.get("parts")
    if found != tuple(map(int, folder.name.split("-of-"))):
        raise DataError(
            f"{folder} has the files of part {found[0]} of {found[1]}: give it its own name, or prepare it again with "
            "--overwrite True"
        )
    return Part(folder, manifest)


def _differing(options: dict[str, Any], identity: dict[str, Any]) -> str:
    return ", ".join(sorted(name for name in identity | options if options.get(name) != identity.get(name)))


def _listed(numbers: Iterable[int]) -> str:
    ordered = sorted(numbers)
    return ", ".join(map(str, ordered[:20])) + (", …" if len(ordered) > 20 else "")
