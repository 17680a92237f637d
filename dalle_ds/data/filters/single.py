"""Cleaning of captions, and why a caption or an image is left out by itself (DALL·E §2.3 and App. C)."""

from __future__ import annotations

import unicodedata
from collections.abc import Iterator

from dalle_ds.data import reasons
from dalle_ds.data.filters.boilerplate import is_boilerplate
from dalle_ds.data.filters.language import foreign_margin
from dalle_ds.data.filters.options import FilterOptions


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
        yield reasons.EMPTY
    if len(caption) < options.min_caption_chars:
        yield reasons.TOO_SHORT
    if options.min_caption_words is not None and len(caption.split()) < options.min_caption_words:
        yield reasons.TOO_FEW_WORDS
    if options.drop_boilerplate and is_boilerplate(caption):
        yield reasons.BOILERPLATE
    if options.foreign_margin is not None and foreign_margin(caption) > options.foreign_margin:
        yield reasons.NOT_ENGLISH


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
