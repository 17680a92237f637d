"""Cleaning of captions, and the reasons for which pairs are left out (DALL·E §2.3 and App. C; Sharma et al. 2018).

The paper names its filters but gives no thresholds; the ones here are options. Its language filter (cld3) is left out:
captions of every language and script are kept.
"""

from __future__ import annotations

import re
import unicodedata
from dataclasses import dataclass

from dalle_ds.errors import ConfigError

EMPTY = "empty caption"
TOO_SHORT = "caption too short"
BOILERPLATE = "boilerplate caption"
ASPECT_RATIO = "aspect ratio"
TOO_SMALL = "picture too small"
TOO_MANY_PIXELS = "too many pixels"


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

    def __post_init__(self) -> None:
        for name in ("min_caption_chars", "max_caption_chars", "min_side", "max_megapixels"):
            if getattr(self, name) <= 0:
                raise ConfigError(f"filters.{name} must be greater than 0, found {getattr(self, name)}")
        if self.max_caption_chars < self.min_caption_chars:
            raise ConfigError(
                f"filters.max_caption_chars={self.max_caption_chars} is less than "
                f"filters.min_caption_chars={self.min_caption_chars}: no caption could be kept"
            )
        if self.max_aspect_ratio is not None and self.max_aspect_ratio < 1:
            raise ConfigError(f"filters.max_aspect_ratio must be at least 1, found {self.max_aspect_ratio}")

    @property
    def max_pixels(self) -> int:
        """`max_megapixels` in pixels."""
        return int(self.max_megapixels * 1e6)


def clean_caption(text: str) -> str:
    """Unicode NFC, control characters and runs of white space as one space, none at the ends; all scripts are kept.

    Lone surrogates, which no file could store, become "?".
    """
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
    """Why a clean caption is dropped, or None."""
    if not caption:
        return EMPTY
    if len(caption) < options.min_caption_chars:
        return TOO_SHORT
    if options.drop_boilerplate and is_boilerplate(caption):
        return BOILERPLATE
    return None


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


# --- boilerplate ----------------------------------------------------------------------------------------------------

_MONTH = r"(?:jan|feb|mar|apr|may|jun|jul|aug|sept?|oct|nov|dec)[a-z]*\.?"
_WEEKDAY = r"(?:(?:mon|tues?|wed(?:nes)?|thu(?:rs)?|fri|sat(?:ur)?|sun)(?:day)?,?\s+)?"
_DAY = r"\d{1,2}(?:st|nd|rd|th)?"
_YEAR = r"(?:1[89]|20)\d\d"
_DATE = rf"""{_WEEKDAY}(?:
      {_YEAR}([-/.:]?)\d\d\1\d\d                      # 2012-03-04, 2012:03:04, 20120304
    | \d{{1,2}}([-/.])\d{{1,2}}\2(?:{_YEAR}|\d\d)      # 3/4/2012, 04.03.12
    | {_MONTH}\s+{_DAY}\s*,?\s+{_YEAR}                # March 4th, 2012
    | (?:the\s+)?{_DAY}[\s-]+(?:of\s+)?{_MONTH},?[\s-]+{_YEAR}  # 4 March 2012, the 4th of March 2012, 04-Mar-2012
    | {_MONTH}\s+{_YEAR}                              # March 2012
    )"""
_TIME = r"(?:,?\s*(?:at\s+)?\d{1,2}[:.]\d\d(?:[:.]\d\d)?\s*(?:[ap]\.?m\.?)?)?"
_VERB = r"(?:photographed|taken|shot|captured|uploaded|posted|published|created|scanned|added|dated|recorded)"
_NOUN = r"(?:(?:this|the|a)\s+)?(?:photo(?:graph)?|picture|pic|image|snapshot|file|scan)"
_BOILERPLATE = re.compile(
    rf"\b(?:(?:{_NOUN}\s+)?(?:(?:was|were|is)\s+)?{_VERB}\s*(?:on|at|in|:)?\s*|{_NOUN}\s+(?:from|of|on)\s+)?{_DATE}{_TIME}"
    r"|\b(?:img|dsc[nf]?|pict|image|photo)[-_\s]?\d{3,}[\w-]*(?:\.(?:jpe?g|png|gif|tiff?))?",
    re.IGNORECASE | re.VERBOSE,
)


def is_boilerplate(caption: str) -> bool:
    """Whether dates, with what leads up to them, and camera file names are more than half of its letters and digits."""
    total = sum(char.isalnum() for char in caption)
    matched = sum(char.isalnum() for match in _BOILERPLATE.finditer(caption) for char in match[0])
    return 2 * matched > total
