"""YFCC100M (Thomee et al. 2016; DALL·E §2.3 and App. C): Flickr's metadata, and the photographs downloaded.

The table has 23 columns, or 25 with a row number and a hash more; texts are URL-encoded. Titles and descriptions are two
captions of a photograph, each of which the filters judge by itself: neither is better in general (a title may be "IMG_0520",
a description the story of a holiday), and CLIP took those with either in English. Markup in descriptions is removed. Videos
have no captions.
"""

from __future__ import annotations

import html
import re

from dalle_ds.data.corpora.pairs import Corpus, Unusable
from dalle_ds.data.corpora.rows import FIELDS, Row
from dalle_ds.data.corpora.tables import CaptionTable, TableFormat, joined, plain_rows

_COLUMNS = 23
_TITLE, _DESCRIPTION, _DOWNLOAD_URL, _MARKER = 6, 7, 14, 22  # of 23
_PHOTOGRAPH = "0"
_ENCODED = re.compile(rb"%([0-9A-Fa-f]{2})")
_TAG = re.compile(r"</?[A-Za-z][^<>]*>")


def read_yfcc(source: str, pictures: str) -> Corpus:
    """Photographs of YFCC100M with their titles and descriptions.

    Args:
        source: the table, or a folder of .tsv tables, unpacked.
        pictures: folder that img2dataset downloaded to.

    Raises:
        DataError: one of them is not there.
    """
    return joined(CaptionTable(source, TableFormat(plain_rows, _url, _captions)), pictures)


def _field(row: Row, number: int) -> str:
    """A field by its number in tables of 23 columns."""
    return row[number + len(row) - _COLUMNS]


def _url(row: Row) -> str | None:
    if len(row) not in (_COLUMNS, _COLUMNS + 2):
        raise Unusable(FIELDS)
    return _field(row, _DOWNLOAD_URL)


def _captions(row: Row) -> list[str]:
    if _field(row, _MARKER) != _PHOTOGRAPH:
        return []
    texts = (_decoded(_field(row, number)) for number in (_TITLE, _DESCRIPTION))
    plain = (html.unescape(_TAG.sub(" ", text)).strip() for text in texts)
    return [text for text in plain if text]


def _decoded(text: str) -> str:
    """The text that a URL-encoded one stands for; what is not UTF-8 in it stays recognizable."""
    encoded = text.replace("+", " ").encode("utf-8", "surrogateescape")
    return _ENCODED.sub(lambda code: bytes.fromhex(code[1].decode()), encoded).decode("utf-8", "surrogateescape")
