"""What can be said of a pair by itself: its captions cleaned and judged, its image decoded once to be sure.

Pairs can be examined in any order and on any machine; what depends on other pairs (duplicates, splits) comes later, from
what is told of each here, in the order of the corpus.
"""

from __future__ import annotations

import hashlib
import itertools
import multiprocessing
import sys
from collections import Counter, deque
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from dataclasses import dataclass, field, replace
from functools import partial
from typing import TypeVar

from dalle_ds.data import reasons
from dalle_ds.data.corpora import Broken, RawPair, Unit, Unpaired
from dalle_ds.data.dedup import perceptual_hash
from dalle_ds.data.filters import FilterOptions, caption_problem, clean_caption, cut_caption, image_problem
from dalle_ds.data.images import decode_image, encode_png, image_size_of, resize_short_side
from dalle_ds.errors import DataError

_TOLD_BY_NAME = 5  # of a unit's files that belong to no pair, for one reason
_CAPTION_CHARS = 2**16  # of a caption as it was written; of more, no more is cleaned than is kept in any case

Item = TypeVar("Item")
Result = TypeVar("Result")


@dataclass(frozen=True)
class Caption:
    """A caption, cleaned."""

    text: str
    problem: str | None
    """Why it is dropped, whatever other pairs are like."""
    cut: bool
    """Whether it was longer."""


@dataclass(frozen=True)
class ProcessedPair:
    """A pair, or what is in the place of one, and all that preparation needs to know of it."""

    unit: int
    """The number of the corpus's unit that it comes from."""
    name: str
    problem: str | None
    """Why it is dropped, whatever its captions are like."""
    captions: list[Caption] = field(default_factory=list)
    picture: str = ""
    """SHA-256 of the image as it was in the corpus, in hexadecimal."""
    group: str = ""
    variant: str = ""
    image: bytes = b""
    """The image as it is to be stored; empty where the pair is dropped."""
    hash: str = ""
    """Perceptual hash of the image, 16 hexadecimal digits, where the filters ask for it."""
    embedding: bytes = b""
    """Of the image, numbers of 16 bits, where the filters ask for it."""
    count: int = 1
    """How many are told of as one."""
    unpaired: bool = False
    """Whether it is in no pair's place, but belongs to none."""


def process_units(
    units: Iterable[tuple[int, Unit]], filters: FilterOptions, shrink: int | None, workers: int
) -> Iterator[ProcessedPair]:
    """Everything that the units, given with their numbers, hold, in order; judged and decoded in `workers` processes."""
    pairs = ((number, pair) for number, unit in units for pair in _contents(unit))
    process = partial(process_pair, filters=filters, shrink=shrink)
    for (_, pair), (item, as_it_is) in _map_in_order(process, pairs, workers):
        # Images are not sent back by the process that has looked at them.
        yield replace(item, image=pair.image) if as_it_is and isinstance(pair, RawPair) else item


def _contents(unit: Unit) -> Iterator[RawPair | Broken]:
    """What a unit holds; a hundred thousand members of an archive that belong to no pair become a few."""
    counts: Counter[str] = Counter()
    last: dict[str, Unpaired] = {}
    for item in unit.read():
        if isinstance(item, Unpaired):
            counts[item.reason] += item.count
            if counts[item.reason] > _TOLD_BY_NAME:
                before = last[item.reason].count if item.reason in last else 0
                last[item.reason] = replace(item, count=before + item.count)
                continue
        yield item
    yield from last.values()


def process_pair(
    numbered: tuple[int, RawPair | Broken], filters: FilterOptions, shrink: int | None
) -> tuple[ProcessedPair, bool]:
    """What is found of a pair of a unit, and whether its image is to be stored as it is."""
    unit, pair = numbered
    if isinstance(pair, Broken):
        unpaired = isinstance(pair, Unpaired)
        return ProcessedPair(unit, _storable(pair.name), pair.reason, count=pair.count, unpaired=unpaired), False
    captions = [process_caption(text, filters) for text in pair.captions]
    captions += [Caption("", reason, cut=False) for reason in pair.lost]
    digest = hashlib.sha256(pair.image).hexdigest()
    item = ProcessedPair(unit, _storable(pair.name), None, captions, digest, pair.group, pair.variant)
    if all(caption.problem for caption in captions):  # dropped already
        return item, False
    try:
        width, height = image_size_of(pair.image)
        if problem := image_problem(width, height, filters):
            return replace(item, problem=problem), False
        pixels = decode_image(pair.image, max_pixels=filters.max_pixels, short_side=shrink)
    except DataError:
        return replace(item, problem=reasons.UNDECODABLE), False
    if filters.max_hash_distance is not None:
        item = replace(item, hash=perceptual_hash(pixels))
    if shrink is None or min(width, height) <= shrink:
        return item, True
    return replace(item, image=encode_png(resize_short_side(pixels, shrink))), False


def process_caption(text: str, filters: FilterOptions) -> Caption:
    """A caption as it was written, cleaned, cut and judged."""
    most = max(_CAPTION_CHARS, 4 * filters.max_caption_chars)
    cleaned = clean_caption(text[:most])
    caption = cut_caption(cleaned, filters.max_caption_chars)
    return Caption(caption, caption_problem(caption, filters), caption != cleaned or len(text) > most)


def _storable(name: str) -> str:
    """File names need not be valid Unicode; what is stored must be."""
    return name.encode("utf-8", "backslashreplace").decode("utf-8")


def _map_in_order(
    function: Callable[[Item], Result], items: Iterator[Item], workers: int
) -> Iterator[tuple[Item, Result]]:
    """(item, function(item)) in the order of the items, computed by `workers` processes, a few items ahead."""
    if workers <= 1:
        for item in items:
            yield item, function(item)
        return
    context = multiprocessing.get_context("forkserver" if sys.platform == "linux" else "spawn")
    context.set_forkserver_preload([__name__])  # imported once, not by every process
    with ProcessPoolExecutor(workers, mp_context=context) as pool:
        submitted = ((item, pool.submit(function, item)) for item in items)
        try:
            ahead = deque(itertools.islice(submitted, 8 * workers - 1))
            while ahead:
                ahead.extend(itertools.islice(submitted, 1))
                item, future = ahead.popleft()
                yield item, future.result()
        except BrokenProcessPool as error:
            raise DataError(
                "a process that decodes images was killed, most likely for lack of memory: "
                "use fewer --workers or lower filters.max_megapixels"
            ) from error
