"""Cleaning of captions, and the reasons for which pairs are left out (DALL·E §2.3 and App. C; Sharma et al. 2018).

The paper names its filters but gives no thresholds; the ones here are options. Those it names that change what is kept of
a corpus in other languages, or of one with short captions, are off until `paper` turns them on.
"""

from __future__ import annotations

import hashlib
import re
import unicodedata
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import cache
from pathlib import Path

import numpy as np

from dalle_ds.data.boilerplate import is_boilerplate
from dalle_ds.data.language import foreign_margin
from dalle_ds.data.perceptual import perceptual_hash
from dalle_ds.errors import ConfigError

EMPTY = "empty caption"
TOO_SHORT = "caption too short"
TOO_FEW_WORDS = "too few words"
BOILERPLATE = "boilerplate caption"
NOT_ENGLISH = "not English"
BLOCKED = "blocked words"
NOT_REQUIRED = "no required words"
REPETITIVE = "repeated words"
CAPITALS = "too many capitals"
DIGITS = "too many digits"
ASPECT_RATIO = "aspect ratio"
TOO_SMALL = "picture too small"
TOO_MANY_PIXELS = "too many pixels"

MAX_HASH_DISTANCE = 10
"""Beyond it, of 64 bits, other pictures are found, and all pairs would have to be compared."""
_PAPER = {"min_caption_words": 3, "foreign_margin": 12.0, "drop_boilerplate": True, "max_aspect_ratio": 2.0}
_WORD = re.compile(r"\w+")


@dataclass(frozen=True)
class FilterOptions:
    """What is kept of a corpus."""

    min_caption_chars: int = 1
    """Shorter captions are dropped."""
    max_caption_chars: int = 1000
    """Longer captions are cut at the last space before this, and counted."""
    drop_boilerplate: bool = True
    """Drop captions that are mostly of the kind "photographed on 4 March 2012" (DALL·E App. C)."""
    max_aspect_ratio: float | None = 2.0
    """Drop pictures whose longer side is more than this many times the shorter: the square crop would lose what the
    caption says (DALL·E App. C: 2). None keeps all."""
    min_side: int = 1
    """Drop pictures whose shorter side has fewer pixels."""
    max_megapixels: float = 150.0
    """Drop pictures with more pixels than this, before memory is spent on decoding them."""
    paper: bool = False
    """All that the paper names, where nothing else is given here: at least 3 words (Conceptual 12M's limit; the paper tells
    none), English with a margin of 12, no boilerplate, an aspect ratio of at most 2."""
    min_caption_words: int | None = None
    """Drop captions of fewer words between spaces; of no use in scripts that write none."""
    foreign_margin: float | None = None
    """Drop captions that another language explains better than English, by more than this many nats (py3langid); 0 drops
    all but those for which English is likeliest, 12 spares names and short captions."""
    block: str | None = None
    """File of phrases, and /regular expressions/ between slashes, one in a line: captions with any of them are dropped."""
    require: str | None = None
    """File as for `block`: captions without any of them are dropped."""
    max_repeated_words: float | None = None
    """Drop captions of which a larger share of words was there before (Sharma et al. 2018: "high token repetition")."""
    max_capitals: float | None = None
    """Drop captions of which a larger share of letters is capitals."""
    max_digits: float | None = None
    """Drop captions of which a larger share of letters and digits is digits."""
    max_caption_copies: int | None = None
    """Drop a caption where it was kept with this many pictures before, whatever its case; 1 keeps the first alone."""
    max_hash_distance: int | None = None
    """Drop pictures whose perceptual hash (64 bits; imagehash) differs from that of one kept before in at most this many
    bits, 0 to 10."""
    duplicate_model: str | None = None
    """CLIP or duplicate detector, a run directory or export: drop pictures that are close to one kept before."""
    duplicate_cosine: float = 0.95
    """How close that is, for `duplicate_model`: the cosine of the embeddings."""

    def __post_init__(self) -> None:
        for name, value in _PAPER.items() if self.paper else ():
            if getattr(self, name) is None:
                object.__setattr__(self, name, value)
        for name in ("min_caption_chars", "max_caption_chars", "min_side", "max_megapixels"):
            if getattr(self, name) <= 0:
                raise ConfigError(f"filters.{name} must be greater than 0, found {getattr(self, name)}")
        if self.max_caption_chars < self.min_caption_chars:
            raise ConfigError(
                f"filters.max_caption_chars={self.max_caption_chars} is less than "
                f"filters.min_caption_chars={self.min_caption_chars}: no caption could be kept"
            )
        self._between("max_aspect_ratio", 1, None)
        self._between("min_caption_words", 1, None)
        self._between("max_caption_copies", 1, None)
        self._between("max_hash_distance", 0, MAX_HASH_DISTANCE)
        self._between("duplicate_cosine", 0, 1)
        for name in ("max_repeated_words", "max_capitals", "max_digits"):
            self._between(name, 0, 1)

    def _between(self, name: str, least: float, most: float | None) -> None:
        value = getattr(self, name)
        if value is not None and (value < least or (most is not None and value > most)):
            bounds = f"at least {least}" if most is None else f"from {least} to {most}"
            raise ConfigError(f"filters.{name} must be {bounds}, found {value}")

    @property
    def max_pixels(self) -> int:
        """`max_megapixels` in pixels."""
        return int(self.max_megapixels * 1e6)

    def check_files(self) -> None:
        """Raises `ConfigError` for what would be missing in the midst of the work: word lists and packages."""
        for path in filter(None, (self.block, self.require)):
            word_list(path)
        if self.foreign_margin is not None:
            foreign_margin("a caption")
        if self.max_hash_distance is not None:
            perceptual_hash(np.zeros((8, 8, 3), dtype=np.uint8))


def clean_caption(text: str) -> str:
    """Unicode NFC, control characters and runs of white space as one space, none at the ends; all scripts are kept.

    Lone surrogates, which no file could store, become "?".
    """
    if text.isascii() and text.isprintable():  # what most captions are, and as it should be but for spaces
        return " ".join(text.split())
    storable = text.encode("utf-8", "replace").decode("utf-8")
    without_controls = "".join(" " if unicodedata.category(char) == "Cc" else char for char in storable)
    return " ".join(unicodedata.normalize("NFC", without_controls).split())


def cut_caption(caption: str, max_chars: int) -> str:
    """The caption itself if it has at most `max_chars` characters, else as many whole words of it as fit (or as much of
    its first word)."""
    if len(caption) <= max_chars:
        return caption
    words, _, _ = caption[: max_chars + 1].rpartition(" ")
    return words or caption[:max_chars]


def caption_problem(caption: str, options: FilterOptions) -> str | None:
    """Why a clean caption is dropped, or None; of several reasons, the one that is found first."""
    return next(_caption_problems(caption, options), None)


def _caption_problems(caption: str, options: FilterOptions) -> Iterator[str]:
    """In the order of what they cost to find."""
    if not caption:
        yield EMPTY
    if len(caption) < options.min_caption_chars:
        yield TOO_SHORT
    if options.min_caption_words is not None and len(caption.split()) < options.min_caption_words:
        yield TOO_FEW_WORDS
    if options.drop_boilerplate and is_boilerplate(caption):
        yield BOILERPLATE
    if options.block is not None and word_list(options.block).search(caption):
        yield BLOCKED
    if options.require is not None and not word_list(options.require).search(caption):
        yield NOT_REQUIRED
    if options.max_repeated_words is not None and repeated_words(caption) > options.max_repeated_words:
        yield REPETITIVE
    if _exceeds(options.max_capitals, caption, str.isupper, str.isalpha):
        yield CAPITALS
    if _exceeds(options.max_digits, caption, str.isdigit, str.isalnum):
        yield DIGITS
    if options.foreign_margin is not None and foreign_margin(caption) > options.foreign_margin:
        yield NOT_ENGLISH


def _exceeds(share: float | None, caption: str, part: Callable[[str], bool], whole: Callable[[str], bool]) -> bool:
    """Whether more than this share of a kind of characters is of another kind, which it includes."""
    return share is not None and sum(map(part, caption)) > share * sum(map(whole, caption))


def picture_problem(width: int, height: int, options: FilterOptions) -> str | None:
    """Why a picture of this size in pixels is dropped, or None."""
    short, long = sorted((width, height))
    if width * height > options.max_pixels:
        return TOO_MANY_PIXELS
    if short < options.min_side:
        return TOO_SMALL
    if options.max_aspect_ratio is not None and long > options.max_aspect_ratio * short:
        return ASPECT_RATIO
    return None


def repeated_words(caption: str) -> float:
    """The share of words that stood in the caption before, in [0, 1)."""
    words = _WORD.findall(caption.lower())
    return 1 - len(set(words)) / len(words) if words else 0.0


@cache
def word_list(path: str) -> re.Pattern[str]:
    """What finds any of the phrases of a file, each as whole words, and of its /regular expressions/, whatever the case.

    Empty lines, and those that begin with #, are left out.

    Raises:
        ConfigError: the file cannot be read, has nothing in it, or an expression that is none.
    """
    patterns = []
    for number, line in enumerate(_read(path).decode("utf-8-sig", "replace").splitlines(), start=1):
        entry = line.strip()
        if not entry or entry.startswith("#"):
            continue
        is_expression = len(entry) > 2 and entry[0] == entry[-1] == "/"
        phrase = r"\s+".join(map(re.escape, unicodedata.normalize("NFC", entry).split()))
        pattern = entry[1:-1] if is_expression else rf"(?<!\w){phrase}(?!\w)"
        try:
            re.compile(pattern, re.IGNORECASE)
        except re.error as error:
            raise ConfigError(f"{path} line {number} is no regular expression ({error}): {entry}") from error
        patterns.append(f"(?:{pattern})")
    if not patterns:
        raise ConfigError(f"{path} has no phrases: write one in a line")
    try:
        return re.compile("|".join(patterns), re.IGNORECASE)
    except re.error as error:
        raise ConfigError(f"the expressions of {path} do not go together ({error}): leave out named groups") from error


def file_digest(path: str) -> str:
    """SHA-256 of a word list's contents, in hexadecimal.

    Raises:
        ConfigError: it cannot be read.
    """
    return hashlib.sha256(_read(path)).hexdigest()


def _read(path: str) -> bytes:
    try:
        return Path(path).read_bytes()
    except OSError as error:
        raise ConfigError(f"word list {path} cannot be read: {error.strerror}") from error
