"""What is left out of a corpus by itself, and why; copies are left to `dedup`.

The paper names its filters (DALL·E §2.3 and App. C) but gives no thresholds; the ones here are options. Those it names that
change what is kept of a corpus in other languages, or of one with short captions, are off until `paper` turns them on.

It filters by language with cld3, which no current Python can install. `py3langid` gives the likelihood of a text under a naive
Bayes model of byte n-grams for each language. Its probabilities say little of captions of a few words, and all too surely; the
difference of log-likelihoods, which grows with the evidence, does better. `docs/data.md` compares it with
lingua-language-detector.
"""

from __future__ import annotations

import unicodedata
from dataclasses import dataclass
from functools import cache
from typing import TYPE_CHECKING, Any

import numpy as np

from dalle_ds.data import reasons
from dalle_ds.data.boilerplate import is_boilerplate
from dalle_ds.data.dedup import perceptual_hash
from dalle_ds.errors import ConfigError

if TYPE_CHECKING:
    from py3langid.langid import LanguageIdentifier

# fmt: off
LANGUAGES = (
    "en", "de", "fr", "es", "pt", "it", "nl", "sv", "da", "no", "fi", "pl", "cs", "sk", "ro", "hu", "tr", "id", "ms", "vi",
    "tl", "ru", "uk", "el", "bg", "ja", "zh", "ko", "ar", "he", "hi", "th", "fa", "ca", "hr", "sr", "sl", "et", "lv", "lt",
    "bn", "ta", "te", "mr", "ur", "ka", "hy",
)
# fmt: on
"""ISO 639-1 codes that English is compared with. The model's other hundred are rare on the web, and draw captions that are
mere names."""

MAX_HASH_DISTANCE = 10
"""Beyond it, of 64 bits, other images are found, and all pairs would have to be compared."""
_OFF: dict[str, Any] = {
    "min_caption_chars": 1,
    "drop_boilerplate": False,
    "max_aspect_ratio": None,
    "min_side": 1,
    "paper": False,
    **dict.fromkeys(
        ("min_caption_words", "foreign_margin", "max_caption_copies", "max_hash_distance", "duplicate_model")
    ),
}
"""Filters, and what switches each off. Images too large to be decoded are left out in any case."""
_PAPER = {"min_caption_words": 3, "foreign_margin": 12.0, "drop_boilerplate": True, "max_aspect_ratio": 2.0}


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
    """Drop images whose longer side is more than this many times the shorter: the square crop would lose what the
    caption says (DALL·E App. C: 2). None keeps all."""
    min_side: int = 1
    """Drop images whose shorter side has fewer pixels."""
    max_megapixels: float = 150.0
    """Drop images with more pixels than this, before memory is spent on decoding them."""
    paper: bool = False
    """All that the paper names, where nothing else is given here: at least 3 words (Conceptual 12M's limit; the paper tells
    none), English with a margin of 12, no boilerplate, an aspect ratio of at most 2."""
    none: bool = False
    """No filter at all, for sets that models are measured on: what can be read is kept, but for equal pairs."""
    min_caption_words: int | None = None
    """Drop captions of fewer words between spaces; of no use in scripts that write none."""
    foreign_margin: float | None = None
    """Drop captions that another language explains better than English, by more than this many nats (py3langid); 0 drops
    all but those for which English is likeliest, 12 spares names and short captions."""
    max_caption_copies: int | None = None
    """Drop a caption where it was kept with this many images before, whatever its case; 1 keeps the first alone."""
    max_hash_distance: int | None = None
    """Drop images whose perceptual hash (64 bits; imagehash) differs from that of one kept before in at most this many
    bits, 0 to 10."""
    duplicate_model: str | None = None
    """CLIP, a run directory or export: drop images that are close to one kept before."""
    duplicate_cosine: float = 0.95
    """How close that is, for `duplicate_model`: the cosine of the embeddings."""

    def __post_init__(self) -> None:
        if self.none:
            self._switch_off()
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

    def _switch_off(self) -> None:
        for name, off in _OFF.items():
            if getattr(self, name) not in (off, getattr(FilterOptions, name)):
                raise ConfigError(f"filters.none and filters.{name}={getattr(self, name)}: leave one of them out")
            object.__setattr__(self, name, off)

    @property
    def active(self) -> dict[str, Any]:
        """The filters that may leave a pair out, with their settings."""
        return {
            name: getattr(self, name) for name, off in _OFF.items() if name != "paper" and getattr(self, name) != off
        }

    def _between(self, name: str, least: float, most: float | None) -> None:
        value = getattr(self, name)
        if value is not None and (value < least or (most is not None and value > most)):
            bounds = f"at least {least}" if most is None else f"from {least} to {most}"
            raise ConfigError(f"filters.{name} must be {bounds}, found {value}")

    @property
    def max_pixels(self) -> int:
        """`max_megapixels` in pixels."""
        return int(self.max_megapixels * 1e6)

    def check_packages(self) -> None:
        """Raises `ConfigError` for a package that would be missing in the midst of the work."""
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
    """Why a clean caption is dropped, or None; of several reasons, the one that costs least to find."""
    if not caption:
        return reasons.EMPTY
    if len(caption) < options.min_caption_chars:
        return reasons.TOO_SHORT
    if options.min_caption_words is not None and len(caption.split()) < options.min_caption_words:
        return reasons.TOO_FEW_WORDS
    if options.drop_boilerplate and is_boilerplate(caption):
        return reasons.BOILERPLATE
    if options.foreign_margin is not None and foreign_margin(caption) > options.foreign_margin:
        return reasons.NOT_ENGLISH
    return None


def image_problem(width: int, height: int, options: FilterOptions) -> str | None:
    """Why an image of this size in pixels is dropped, or None."""
    short, long = sorted((width, height))
    if width * height > options.max_pixels:
        return reasons.TOO_MANY_PIXELS
    if short < options.min_side:
        return reasons.TOO_SMALL
    if options.max_aspect_ratio is not None and long > options.max_aspect_ratio * short:
        return reasons.ASPECT_RATIO
    return None


def foreign_margin(caption: str) -> float:
    """By how many nats the likeliest other language explains a caption better than English does: negative where English is
    likeliest, infinite where most letters are of another script. `ConfigError` without py3langid."""
    letters = [char for char in caption if char.isalpha()]
    if 2 * sum(char < "\u0250" for char in letters) < len(letters):  # up to here, Latin
        return float("inf")
    scores = dict(_identifier().rank(caption.lower()))
    english = scores.pop("en")
    return float(max(scores.values()) - english)


@cache
def _identifier() -> LanguageIdentifier:
    try:
        from py3langid.langid import MODEL_FILE, LanguageIdentifier
    except ImportError as error:
        raise ConfigError(
            "filters.foreign_margin needs py3langid, which is not installed: pip install dalle-ds[filters]"
        ) from error
    identifier = LanguageIdentifier.from_model_file(MODEL_FILE)
    identifier.set_languages(list(LANGUAGES))
    return identifier
