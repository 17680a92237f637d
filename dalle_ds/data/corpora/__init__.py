"""Readers of corpora: images (still encoded) with their captions, in a fixed order, one pair in memory.

`pairs` says what a corpus is. `folder`, `webdataset` and `hf` read what anybody may have; `twemoji` is embedded;
`evaluation_sets` are COCO and CUB; Conceptual Captions, WIT and YFCC100M are tables, `joined` with downloaded images.
"""

from dalle_ds.data.corpora.evaluation_sets import read_coco, read_cub
from dalle_ds.data.corpora.folder import read_folder
from dalle_ds.data.corpora.hf import read_hf
from dalle_ds.data.corpora.joined import read_conceptual, read_wit, read_yfcc
from dalle_ds.data.corpora.pairs import Broken, Corpus, RawPair, Unit, Unpaired
from dalle_ds.data.corpora.twemoji import read_twemoji
from dalle_ds.data.corpora.webdataset import read_webdataset

__all__ = [
    "Broken",
    "Corpus",
    "RawPair",
    "Unit",
    "Unpaired",
    "read_coco",
    "read_conceptual",
    "read_cub",
    "read_folder",
    "read_hf",
    "read_twemoji",
    "read_webdataset",
    "read_wit",
    "read_yfcc",
]
