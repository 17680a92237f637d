"""Flips bits of a shard, one at a time, and reads what is left; a process of its own, since it might crash.

python -m tests.data.flip_worker DATA SPLIT SHARD STRIDE
Prints JSON: how many positions, how many rows were read right, read wrong, refused.
"""

from __future__ import annotations

import json
import sys
from collections import Counter
from pathlib import Path

from dalle_ds.data import PairDataset
from dalle_ds.errors import DataError


def rows_of(data: Path, split: str) -> list[tuple | None]:
    """(picture, captions, name) of every row that can be read; None of the others."""
    dataset = PairDataset.open(data, split)
    rows: list[tuple | None] = []
    for row in range(len(dataset)):
        try:
            rows.append((dataset.encoded(row), dataset.captions(row), dataset.name(row)))
        except DataError:
            rows.append(None)
    return rows


def main(data: Path, split: str, shard: str, stride: int) -> None:
    path = data / split / shard
    whole, right = path.read_bytes(), rows_of(data, split)
    counts: Counter[str] = Counter(refused=0, wrong=0, right=0)
    for number, position in enumerate(range(0, len(whole), stride)):
        damaged = bytearray(whole)
        damaged[position] ^= 1 << number % 8 if number % 3 else 0xFF
        path.write_bytes(damaged)
        counts["positions"] += 1
        for expected, found in zip(right, rows_of(data, split), strict=True):
            counts["refused" if found is None else "right" if found == expected else "wrong"] += 1
    path.write_bytes(whole)
    print(json.dumps(counts))


if __name__ == "__main__":
    main(Path(sys.argv[1]), sys.argv[2], sys.argv[3], int(sys.argv[4]))
