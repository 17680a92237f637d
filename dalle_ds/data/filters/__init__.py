"""What is left out of a corpus by itself, and why: `options` are all switches, `single` what they do, with `boilerplate` and
`language`. Copies are left to `data/dedup.py`."""

from dalle_ds.data.filters.options import FilterOptions
from dalle_ds.data.filters.single import caption_problem, clean_caption, cut_caption, image_problem

__all__ = ["FilterOptions", "caption_problem", "clean_caption", "cut_caption", "image_problem"]
