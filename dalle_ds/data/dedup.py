"""Copies in a corpus of any size: which pairs, captions and images were there before.

Each question is put to the whole corpus and answered by its order alone, so that the answer does not depend on how many
jobs shared the work: first equal pairs, then equal captions among those left, then images that look alike among those left,
by perceptual hashes or by a CLIP's embeddings. Of those that are alike, the first stays: one is dropped if it is like an
earlier one that is kept itself, so that a chain of small changes does not lead from one image to another that is nothing like
it. Keys lie on the disk, divided by their value, and one division at a time is sorted in memory: 24 bytes a caption in all, a
sixty-fourth of that at a time, and 6 bytes a caption to remember the answers.
"""

from __future__ import annotations

import shutil
import struct
from collections.abc import Iterable, Iterator
from dataclasses import replace
from itertools import pairwise
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import numpy.typing as npt
import torch
import xxhash
from PIL import Image

from dalle_ds.data import reasons
from dalle_ds.data.images import center_crop_resize, decode_image
from dalle_ds.errors import ConfigError
from dalle_ds.parsing import parse_json

if TYPE_CHECKING:
    from dalle_ds.data.filters import FilterOptions
    from dalle_ds.data.processing import ProcessedPair
    from dalle_ds.models import Clip

_DUPLICATE, _SAME_CAPTION, _LIKE_IMAGE, _CLOSE_IMAGE, _NOT_ASKED = 1, 2, 3, 4, 255
REASONS = {
    _DUPLICATE: reasons.DUPLICATE,
    _SAME_CAPTION: reasons.SAME_CAPTION,
    _LIKE_IMAGE: reasons.LIKE_IMAGE,
    _CLOSE_IMAGE: reasons.CLOSE_IMAGE,
}
"""Code → why a caption or a pair is dropped; others are no reason."""

_DIVISIONS = 64
_BUFFERED = 2**16
_CHUNK = 2**20
_BLOCK = 4096
_BATCH = 32
_RECORD = np.dtype([("high", "<u8"), ("low", "<u8"), ("number", "<u8")])
_ITEM = np.dtype([("captions", "<u4"), ("hash", "<u8"), ("embedded", "u1")])

Codes = npt.NDArray[np.uint8]
Numbers = npt.NDArray[np.uint64]
Rows = npt.NDArray[np.intp]


class Records:
    """Numbers, ascending, under keys, of which the XXH3-128 is kept; in `folder`."""

    def __init__(self, folder: Path) -> None:
        folder.mkdir(parents=True)
        self._files = [folder / f"{division:02d}" for division in range(_DIVISIONS)]
        self._buffer: list[tuple[int, int, int]] = []

    def add(self, key: bytes, number: int) -> None:
        """Put down one number."""
        self._buffer.append((*struct.unpack("<QQ", xxhash.xxh3_128_digest(key)), number))
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


def find_copies(items: Iterable[ProcessedPair], filters: FilterOptions, scratch: Path) -> tuple[Codes, Codes]:
    """Go through a corpus in its order and find what was there before: codes (`REASONS`) of all captions, and of all items.
    The folder `scratch` is made here; the caller removes it when the result is no longer used."""
    pairs = Records(scratch / "pairs")
    texts = Records(scratch / "texts") if filters.max_caption_copies is not None else None
    number = 0
    codes_file, items_file, embeddings_file = scratch / "captions", scratch / "items", scratch / "embeddings"
    with codes_file.open("wb") as codes, items_file.open("wb") as about, embeddings_file.open("wb") as embeddings:
        for item in items:
            for caption in item.captions:
                asked = item.problem is None and caption.problem is None
                codes.write(bytes([0 if asked else _NOT_ASKED]))
                if asked:
                    pairs.add(bytes.fromhex(item.picture) + caption.text.encode(), number)
                    if texts is not None:
                        texts.add(caption.text.casefold().encode(), number)
                number += 1
            about.write(struct.pack("<IQB", len(item.captions), int(item.hash or "0", 16), bool(item.embedding)))
            embeddings.write(item.embedding)
    captions = _mapped(codes_file, np.uint8)
    for surplus in pairs.surplus(1, captions):
        captions[surplus] = _DUPLICATE
    if texts is not None and filters.max_caption_copies is not None:
        for surplus in texts.surplus(filters.max_caption_copies, captions):
            captions[surplus] = _SAME_CAPTION
    found = _mapped(items_file, _ITEM)
    verdicts = _verdicts(captions, found, scratch / "verdicts")
    if filters.max_hash_distance is not None:
        rows = np.flatnonzero(verdicts == 0)
        verdicts[rows[close_hashes(found["hash"][rows], filters.max_hash_distance)]] = _LIKE_IMAGE
    if filters.duplicate_model is not None and embeddings_file.stat().st_size:
        with_embedding = np.flatnonzero(found["embedded"])
        vectors = _mapped(embeddings_file, np.float16).reshape(len(with_embedding), -1)
        left = np.flatnonzero(verdicts[with_embedding] == 0)
        verdicts[with_embedding[close_embeddings(vectors, left, filters.duplicate_cosine)]] = _CLOSE_IMAGE
    shutil.rmtree(scratch / "pairs")
    return captions, verdicts


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


# --- images that look alike ---


def perceptual_hash(pixels: npt.NDArray[np.uint8]) -> str:
    """The 64 signs of the lowest frequencies of (H, W, 3) pixels (pHash), in hexadecimal; `ConfigError` without imagehash."""
    try:
        import imagehash
    except ImportError as error:
        raise ConfigError(
            "filters.max_hash_distance needs imagehash, which is not installed: pip install dalle-ds[filters]"
        ) from error
    return str(imagehash.phash(Image.fromarray(pixels)))


def close_hashes(hashes: npt.NDArray[np.uint64], distance: int) -> Rows:
    """Rows that differ in at most `distance` bits from an earlier row that is not one of them.

    Hashes that differ in d bits are equal in one of d + 1 parts (Norouzi et al., 2012, "Fast Search in Hamming Space"), so
    that only those that share a part are compared. 40 bytes a hash in memory, and the pairs found.
    """
    values, first, inverse = np.unique(hashes, return_index=True, return_inverse=True)
    order = np.argsort(first)
    values, first = values[order], first[order]  # distinct hashes, in the order in which they come
    found = [np.zeros((0, 2), dtype=np.int64)]
    for part in _parts(distance) if distance else ():
        keys = values & part
        by_key = np.argsort(keys, kind="stable")
        edges = np.flatnonzero(np.diff(keys[by_key], prepend=~keys[by_key[:1]], append=~keys[by_key[-1:]]))
        for start, end in pairwise(edges):
            if end - start > 1:
                found.extend(_pairs_within(values, by_key[start:end], distance))
    pairs = np.unique(np.concatenate(found), axis=0)  # (later, earlier)
    dropped = np.zeros(len(values), dtype=bool)
    for later, earlier in pairs:
        dropped[later] |= not dropped[earlier]
    place = np.empty(len(order), dtype=np.intp)
    place[order] = np.arange(len(order))
    of_row = place[inverse.reshape(-1)]
    return np.flatnonzero(dropped[of_row] | (first[of_row] != np.arange(len(hashes))))


def _parts(distance: int) -> list[np.uint64]:
    edges = np.linspace(0, 64, distance + 2).astype(int).tolist()
    return [np.uint64((1 << end) - (1 << start)) for start, end in pairwise(edges)]


def _pairs_within(values: npt.NDArray[np.uint64], rows: Rows, distance: int) -> Iterator[npt.NDArray[np.int64]]:
    """(later, earlier) of all pairs of the ascending `rows` that differ in at most `distance` bits."""
    for start in range(0, len(rows), _BLOCK):
        for other in range(0, start + 1, _BLOCK):
            later, earlier = rows[start : start + _BLOCK], rows[other : other + _BLOCK]
            close = _bits(values[later][:, None] ^ values[earlier]) <= distance
            close &= later[:, None] > earlier
            at_later, at_earlier = np.nonzero(close)
            yield np.stack([later[at_later], earlier[at_earlier]], axis=1)


def _bits(numbers: npt.NDArray[np.uint64]) -> npt.NDArray[Any]:
    """How many bits are set (NumPy has it from 2.0 on)."""
    one, two, four = (np.uint64(number) for number in (0x5555555555555555, 0x3333333333333333, 0x0F0F0F0F0F0F0F0F))
    numbers = numbers - ((numbers >> np.uint64(1)) & one)
    numbers = (numbers & two) + ((numbers >> np.uint64(2)) & two)
    numbers = (numbers + (numbers >> np.uint64(4))) & four
    return (numbers * np.uint64(0x0101010101010101)) >> np.uint64(56)


def image_model(path: str) -> Clip:
    """The CLIP at `path`, a run directory or export.

    Raises:
        CheckpointError: nothing there that can be read.
        ConfigError: another kind of model.
    """
    from dalle_ds.models import Clip, pretrained

    folder = pretrained.export_folder(path)
    kind = parse_json((folder / pretrained.CONFIG_NAME).read_bytes()).get("kind")
    if kind != "clip":
        raise ConfigError(f"filters.duplicate_model {path} is a {kind}: give a CLIP")
    return Clip.from_pretrained(folder).to(_device()).eval()


def _device() -> torch.device:
    return torch.device("cuda" if torch.cuda.is_available() else "cpu")


def embedded(items: Iterable[ProcessedPair], model: Clip) -> Iterator[ProcessedPair]:
    """The items, those that are kept so far with the embeddings of their images: D numbers of 16 bits.

    Every batch has the same size, if need be with an image in it several times: results of other shapes of the same
    product may differ in the last bit, and what is prepared must not depend on how the work was divided.
    """
    batch: list[ProcessedPair] = []
    for item in items:
        batch.append(item)
        if sum(bool(entry.image) for entry in batch) == _BATCH or len(batch) == 4 * _BATCH:
            yield from _embedded_batch(batch, model)
            batch = []
    yield from _embedded_batch(batch, model)


@torch.no_grad()
def _embedded_batch(batch: list[ProcessedPair], model: Clip) -> Iterator[ProcessedPair]:
    size = model.config.image_size  # in which the model would look at them, too: a batch of whole images may be large
    images = [
        Image.fromarray(center_crop_resize(decode_image(item.image, short_side=size), size))
        for item in batch
        if item.image
    ]
    if images:
        padded = (images * _BATCH)[:_BATCH] if len(images) < _BATCH else images
        vectors = model.embed_images(padded, normalize=True).float().cpu().numpy().astype("<f2")
    given = iter(range(len(images)))
    for item in batch:
        yield replace(item, embedding=vectors[next(given)].tobytes()) if item.image else item


def close_embeddings(vectors: npt.NDArray[np.float16], rows: Rows, cosine: float) -> Rows:
    """Those of the ascending `rows` whose vectors have at least this cosine with that of an earlier one that is kept.

    The (N, D) `vectors` have length 1. All are compared with all, 4,096 with 4,096 at a time: exact, on a GPU where there is
    one, and a matter of hours beyond some million images on one.
    """
    device = _device()

    def loaded(block: Rows) -> torch.Tensor:
        return torch.from_numpy(vectors[block].astype(np.float32)).to(device)

    kept: list[Rows] = []
    dropped: list[Rows] = []
    for start in range(0, len(rows), _BLOCK):
        block = rows[start : start + _BLOCK]
        these = loaded(block)
        close = torch.zeros(len(block), dtype=torch.bool, device=device)
        for earlier in kept:
            close |= (these @ loaded(earlier).T >= cosine).any(dim=1)
        drop = close.cpu().numpy()
        within = np.tril((these @ these.T >= cosine).cpu().numpy(), -1)
        for row in np.flatnonzero(within.any(axis=1)):
            drop[row] |= bool((within[row] & ~drop).any())
        kept.append(block[~drop])
        dropped.append(block[drop])
    return np.concatenate(dropped) if dropped else np.zeros(0, dtype=np.intp)
