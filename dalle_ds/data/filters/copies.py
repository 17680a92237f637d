"""Copies in a corpus of any size: which pairs, captions and pictures were there before.

Each question is put to the whole corpus and answered by its order alone, so that the answer does not depend on how many
jobs shared the work: first equal pairs, then equal captions among those left, then like pictures among those left. Keys
lie on the disk, divided by their value, and one division at a time is sorted in memory: 24 bytes a caption in all, a
sixty-fourth of that at a time, and 6 bytes a caption to remember the answers.
"""

from __future__ import annotations

import shutil
import struct
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import xxhash

from dalle_ds.data.filters.options import FilterOptions
from dalle_ds.data.filters.perceptual import close_hashes
from dalle_ds.data.processing import ProcessedPair

DUPLICATE = "duplicate"
SAME_CAPTION = "caption of other pictures"
LIKE_PICTURE = "like picture (perceptual hash)"
CLOSE_PICTURE = "like picture (embedding)"
REASONS = (None, DUPLICATE, SAME_CAPTION, LIKE_PICTURE, CLOSE_PICTURE)

_DIVISIONS = 64
_BUFFERED = 2**16
_CHUNK = 2**20
_NOT_ASKED = 255
_RECORD = np.dtype([("high", "<u8"), ("low", "<u8"), ("number", "<u8")])
_ITEM = np.dtype([("captions", "<u4"), ("hash", "<u8"), ("embedded", "u1")])

Codes = npt.NDArray[np.uint8]
Numbers = npt.NDArray[np.uint64]


class Records:
    """Numbers, ascending, under 16-byte keys; kept in `folder`."""

    def __init__(self, folder: Path) -> None:
        folder.mkdir(parents=True)
        self._files = [folder / f"{division:02d}" for division in range(_DIVISIONS)]
        self._buffer: list[tuple[int, int, int]] = []

    def add(self, key: bytes, number: int) -> None:
        """Put down one number."""
        self._buffer.append((*struct.unpack("<QQ", key), number))
        if len(self._buffer) >= _BUFFERED:
            self._write()

    def surplus(self, copies: int, codes: Codes) -> Iterator[Numbers]:
        """All numbers under whose key there are at least `copies` lower ones, of those with code 0."""
        self._write()
        for path in filter(Path.exists, self._files):
            records = np.fromfile(path, dtype=_RECORD)
            records = records[codes[records["number"]] == 0]
            records = records[np.lexsort((records["low"], records["high"]))]  # stable: numbers ascend under a key
            new = np.ones(len(records), dtype=bool)
            new[1:] = (records["high"][1:] != records["high"][:-1]) | (records["low"][1:] != records["low"][:-1])
            places = np.arange(len(records))
            first = np.maximum.accumulate(np.where(new, places, 0))
            yield records["number"][places - first >= copies]

    def _write(self) -> None:
        records = np.array(self._buffer, dtype=_RECORD)
        self._buffer = []
        divisions = records["high"] % _DIVISIONS
        for division in np.unique(divisions):
            with self._files[int(division)].open("ab") as file:
                file.write(records[divisions == division].tobytes())


@dataclass(frozen=True)
class Copies:
    """What was found, by the numbers of captions and of items in the order of the corpus."""

    captions: Codes
    items: Codes

    def of_caption(self, number: int) -> str | None:
        """Why a caption is dropped, or None."""
        code = int(self.captions[number])
        return None if code == _NOT_ASKED else REASONS[code]

    def of_item(self, number: int) -> str | None:
        """Why a pair is dropped, or None."""
        code = int(self.items[number])
        return None if code == _NOT_ASKED else REASONS[code]


def find_copies(items: Iterable[ProcessedPair], filters: FilterOptions, scratch: Path) -> Copies:
    """Go through a corpus and find what was there before.

    Args:
        items: in the order of the corpus.
        scratch: folder made here, which the caller removes when the result is no longer used.
    """
    pairs = Records(scratch / "pairs")
    texts = Records(scratch / "texts") if filters.max_caption_copies is not None else None
    number = 0
    codes_file, items_file, embeddings_file = scratch / "captions", scratch / "items", scratch / "embeddings"
    with codes_file.open("wb") as codes, items_file.open("wb") as about, embeddings_file.open("wb") as embeddings:
        for item in items:
            for caption in item.captions:
                asked = item.problem is None and caption.problem is None
                codes.write(b"\0" if asked else bytes([_NOT_ASKED]))
                if asked:
                    text = caption.text.encode()
                    pairs.add(xxhash.xxh3_128_digest(bytes.fromhex(item.picture) + text), number)
                    if texts is not None:
                        texts.add(xxhash.xxh3_128_digest(caption.text.casefold().encode()), number)
                number += 1
            about.write(struct.pack("<IQB", len(item.captions), int(item.hash or "0", 16), bool(item.embedding)))
            embeddings.write(item.embedding)
    captions = _mapped(codes_file, np.uint8)
    for surplus in pairs.surplus(1, captions):
        captions[surplus] = REASONS.index(DUPLICATE)
    if texts is not None and filters.max_caption_copies is not None:
        for surplus in texts.surplus(filters.max_caption_copies, captions):
            captions[surplus] = REASONS.index(SAME_CAPTION)
    found = _mapped(items_file, _ITEM)
    verdicts = _verdicts(captions, found, scratch / "verdicts")
    if filters.max_hash_distance is not None:
        rows = np.flatnonzero(verdicts == 0)
        verdicts[rows[close_hashes(found["hash"][rows], filters.max_hash_distance)]] = REASONS.index(LIKE_PICTURE)
    if filters.duplicate_model is not None and embeddings_file.stat().st_size:
        from dalle_ds.data.filters.likeness import close_embeddings  # imports torch

        with_embedding = np.flatnonzero(found["embedded"])
        vectors = _mapped(embeddings_file, np.float16).reshape(len(with_embedding), -1)
        left = verdicts[with_embedding] == 0
        close = close_embeddings(vectors, np.flatnonzero(left), filters.duplicate_cosine)
        verdicts[with_embedding[close]] = REASONS.index(CLOSE_PICTURE)
    shutil.rmtree(scratch / "pairs")
    return Copies(captions, verdicts)


def _verdicts(captions: Codes, found: Any, path: Path) -> Codes:
    """A code for each item: 0 where a caption of it is left."""
    verdicts: Codes = np.lib.format.open_memmap(path, mode="w+", dtype=np.uint8, shape=(len(found),))
    first = 0
    for start in range(0, len(found), _CHUNK):
        counts = found["captions"][start : start + _CHUNK].astype(np.int64)
        ends = np.cumsum(counts)
        left = np.concatenate([[0], np.cumsum(captions[first : first + int(ends[-1])] == 0)])
        verdicts[start : start + len(counts)] = np.where(left[ends] > left[ends - counts], 0, _NOT_ASKED)
        first += int(ends[-1])
    return verdicts


def _mapped(path: Path, dtype: Any) -> Any:
    """A file as an array that can be written; an empty one cannot be mapped."""
    return np.memmap(path, dtype=dtype, mode="r+") if path.stat().st_size else np.zeros(0, dtype=dtype)
