"""Which split a pair belongs to, a pure function of the seed and its group, so that no image is on both sides; and writing
splits while a corpus streams by."""

from __future__ import annotations

import hashlib
import shutil
from collections import Counter
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pyarrow as pa

from dalle_ds.data.snapshot import DataFile
from dalle_ds.data.store import PAIR_SCHEMA, checksum
from dalle_ds.data.store_writer import StoreWriter
from dalle_ds.files import write_json


@dataclass(frozen=True)
class StoredPair:
    """One row of a prepared split."""

    image: bytes
    """The encoded image."""
    captions: list[str]
    """At least one, cleaned."""
    name: str
    group: str


class SplitWriter:
    """Writes pairs to `folder`, so that `datasets.load_from_disk` opens it. (`Dataset.save_to_disk` needs the rows to be in a
    dataset already, which would write a corpus twice.)"""

    def __init__(self, folder: Path) -> None:
        self._folder = folder
        self._digest = hashlib.sha256()
        self._writer = StoreWriter(folder, PAIR_SCHEMA)
        self.rows = 0
        self.files: list[DataFile] = []
        """What was written, once closed."""

    def add(self, pair: StoredPair) -> None:
        """Append a pair."""
        stored = [pair.image, *(text.encode() for text in (*pair.captions, pair.name, pair.group))]
        for part in stored:
            self._digest.update(len(part).to_bytes(8, "big"))
            self._digest.update(part)
        text_check = checksum(*pair.captions, pair.name, pair.group)
        checks = {"image_check": checksum(pair.image), "text_check": text_check}
        self._writer.add(vars(pair) | checks, sum(map(len, stored)))
        self.rows += 1

    def close(self) -> str:
        """Finish the last file and those that describe the split: the SHA-256 of all rows in order, in hexadecimal."""
        import datasets  # worker processes do without

        self.files = self._writer.close()
        features = datasets.Features.from_arrow_schema(PAIR_SCHEMA)
        datasets.DatasetInfo(features=features).write_to_directory(str(self._folder))
        state: dict[str, Any] = {
            "_data_files": [{"filename": file.file} for file in self.files],
            "_fingerprint": self._digest.hexdigest()[:16],
            "_format_columns": None,
            "_format_kwargs": {},
            "_format_type": None,
            "_output_all_columns": False,
            "_split": self._folder.name,
        }
        write_json(self._folder / "state.json", state)
        return self._digest.hexdigest()


def read_rows(folder: Path) -> Iterator[StoredPair]:
    """The rows of a closed split, in order, a batch in memory at a time."""
    for path in sorted(folder.glob("data-*.arrow")):
        with pa.memory_map(str(path)) as source, pa.ipc.open_stream(source) as batches:
            for batch in batches:
                for row in batch.to_pylist():
                    yield StoredPair(row["image"], row["captions"], row["name"], row["group"])


def unit_hash(seed: int, *names: str) -> float:
    """A number in [0, 1) that is uniform over names, the same on every machine."""
    text = "\0".join((str(seed), *names))
    digest = hashlib.sha256(text.encode("utf-8", "surrogatepass")).digest()
    return int.from_bytes(digest[:6], "big") / 2**48


def compositional_holdout(variants: Iterable[tuple[str, str]], fraction: float, seed: int) -> set[tuple[str, str]]:
    """Chooses combinations of (group, variant) whose parts both remain in training with other partners.

    Args:
        variants: every (group, variant) of the training split, plain ones (variant "") left out.
        fraction: share of them to hold out, in [0, 1); fewer where the parts would not remain.

    Returns:
        The combinations to hold out: for each, another variant of its group and its variant of another group stay.
    """
    combinations = sorted(set(variants), key=lambda pair: unit_hash(seed, "compositional", *pair))
    wanted = int(fraction * len(combinations))
    of_group = Counter(group for group, _ in combinations)
    of_variant = Counter(variant for _, variant in combinations)
    held_out: set[tuple[str, str]] = set()
    for group, variant in combinations:
        if len(held_out) == wanted:
            break
        if of_group[group] > 1 and of_variant[variant] > 1:
            held_out.add((group, variant))
            of_group[group] -= 1
            of_variant[variant] -= 1
    return held_out


class SplitSorter:
    """Sends every pair to its split while the corpus streams by.

    Two choices need the whole corpus: which variants to hold out, and which group becomes the validation split should
    none fall into it by its hash. Pairs that may be concerned (all variants; while validation is empty, each group with
    the lowest hash yet) wait in a file until the end.
    """

    def __init__(self, folder: Path, validation: float, compositional: float, seed: int) -> None:
        self._folder = folder
        self._validation = validation
        self._compositional = compositional
        self._seed = seed
        self._writers = {split: SplitWriter(folder / split) for split in ("train", "validation")}
        self._waiting = SplitWriter(folder / "waiting")
        self._variants: list[str] = []  # of the waiting pairs
        self._lowest = (1.0, "")  # (hash, group)

    def add(self, pair: StoredPair, variant: str) -> None:
        """Store one pair."""
        place = unit_hash(self._seed, pair.group)
        if place < self._validation:
            self._writers["validation"].add(pair)
            return
        no_validation = self._validation > 0 and not self._writers["validation"].rows
        if no_validation:
            self._lowest = min(self._lowest, (place, pair.group))
        if variant or (no_validation and pair.group == self._lowest[1]):
            self._waiting.add(pair)
            self._variants.append(variant)
        else:
            self._writers["train"].add(pair)

    def finish(self) -> tuple[dict[str, int], str, dict[str, list[dict[str, Any]]]]:
        """Place the waiting pairs and close the splits: (split → rows, fingerprint of all, split → files)."""
        self._waiting.close()
        needs_validation = self._validation > 0 and not self._writers["validation"].rows
        waiting = [pair.group for pair in read_rows(self._folder / "waiting")]
        several_groups = self._writers["train"].rows > 0 or len(set(waiting)) > 1
        to_validation = self._lowest[1] if needs_validation and several_groups else None
        pairs = zip(waiting, self._variants, strict=True)
        variants = [(group, variant) for group, variant in pairs if variant and group != to_validation]
        held_out = compositional_holdout(variants, self._compositional, self._seed)
        if held_out:
            self._writers["compositional"] = SplitWriter(self._folder / "compositional")
        for pair, variant in zip(read_rows(self._folder / "waiting"), self._variants, strict=True):
            split = "compositional" if (pair.group, variant) in held_out else "train"
            self._writers["validation" if pair.group == to_validation else split].add(pair)
        shutil.rmtree(self._folder / "waiting")
        digests = [f"{split}:{writer.close()}" for split, writer in self._writers.items()]
        fingerprint = hashlib.sha256("\n".join(digests).encode()).hexdigest()
        rows = {split: writer.rows for split, writer in self._writers.items()}
        files = {split: [vars(file) for file in writer.files] for split, writer in self._writers.items()}
        return rows, fingerprint, files
