"""Conceptual Captions (Sharma et al. 2018; DALL·E §2.3): a table of captions and URLs, and the pictures downloaded.

`Train_GCC-training.tsv` has a caption and a URL in each row, `cc12m.tsv` a URL and a caption; neither has a heading.
"""

from __future__ import annotations

from dalle_ds.data.corpora.pairs import Corpus, Unusable
from dalle_ds.data.corpora.rows import FIELDS, Row
from dalle_ds.data.corpora.tables import CaptionTable, TableFormat, joined, plain_rows

_SCHEMES = ("http://", "https://")


def read_conceptual(source: str, pictures: str) -> Corpus:
    """Pairs of Conceptual Captions or Conceptual 12M.

    Args:
        source: the table, or a folder of .tsv tables.
        pictures: folder that img2dataset downloaded to.

    Raises:
        DataError: one of them is not there.
    """
    return joined(CaptionTable(source, TableFormat(plain_rows, _url, _captions)), pictures)


def _url(row: Row) -> str | None:
    if len(row) > 2 and row[0].startswith(_SCHEMES):  # a tab in a caption; behind a URL there may be labels
        raise Unusable(FIELDS)
    return next((field for field in row[:2] if field.startswith(_SCHEMES)), "")


def _captions(row: Row) -> list[str]:
    return [field for field in row[:2] if not field.startswith(_SCHEMES)]
