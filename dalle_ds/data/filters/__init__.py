"""What is left out of a corpus, and why.

`options` are all switches. Of a pair by itself: `captions`, with `boilerplate`, `language` and `words`, and `pictures`.
Of a pair among all others: `copies`, with `perceptual` hashes or a model's `likeness`.
"""

from dalle_ds.data.filters.boilerplate import is_boilerplate
from dalle_ds.data.filters.captions import (
    BLOCKED,
    BOILERPLATE,
    CAPITALS,
    DIGITS,
    EMPTY,
    NOT_ENGLISH,
    NOT_REQUIRED,
    REPETITIVE,
    TOO_FEW_WORDS,
    TOO_SHORT,
    caption_problem,
    clean_caption,
    cut_caption,
    repeated_words,
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
from dalle_ds.data.filters.words import (
    file_digest,
    word_list,
)

__all__ = [
    "ASPECT_RATIO",
    "BLOCKED",
    "BOILERPLATE",
    "CAPITALS",
    "DIGITS",
    "EMPTY",
    "MAX_HASH_DISTANCE",
    "NOT_ENGLISH",
    "NOT_REQUIRED",
    "REPETITIVE",
    "TOO_FEW_WORDS",
    "TOO_MANY_PIXELS",
    "TOO_SHORT",
    "TOO_SMALL",
    "FilterOptions",
    "caption_problem",
    "clean_caption",
    "cut_caption",
    "file_digest",
    "is_boilerplate",
    "picture_problem",
    "repeated_words",
    "word_list",
]
