"""What is left out of a corpus, and why.

`options` are all switches. Of a pair by itself: `captions`, with `boilerplate` and `language`, and `pictures`.
Of a pair among all others: `copies`, with `perceptual` hashes or a model's `likeness`.
"""

from dalle_ds.data.filters.boilerplate import is_boilerplate
from dalle_ds.data.filters.captions import (
    BOILERPLATE,
    EMPTY,
    NOT_ENGLISH,
    TOO_FEW_WORDS,
    TOO_SHORT,
    caption_problem,
    clean_caption,
    cut_caption,
)
from dalle_ds.data.filters.options import (
    MAX_HASH_DISTANCE,
    FilterOptions,
)
from dalle_ds.data.filters.pictures import (
    ASPECT_RATIO,
    TOO_MANY_PIXELS,
    TOO_SMALL,
    picture_problem,
)

__all__ = [
    "ASPECT_RATIO",
    "BOILERPLATE",
    "EMPTY",
    "MAX_HASH_DISTANCE",
    "NOT_ENGLISH",
    "TOO_FEW_WORDS",
    "TOO_MANY_PIXELS",
    "TOO_SHORT",
    "TOO_SMALL",
    "FilterOptions",
    "caption_problem",
    "clean_caption",
    "cut_caption",
    "is_boilerplate",
    "picture_problem",
]
