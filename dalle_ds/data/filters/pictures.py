"""The reasons for which pictures are left out by their size (DALL·E App. C)."""

from __future__ import annotations

from dalle_ds.data.filters.options import FilterOptions

ASPECT_RATIO = "aspect ratio"
TOO_SMALL = "picture too small"
TOO_MANY_PIXELS = "too many pixels"


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
