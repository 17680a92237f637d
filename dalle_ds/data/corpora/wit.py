"""WIT, the Wikipedia-based Image Text dataset (Srinivasan et al. 2021), as the Wikipedia pairs of DALL·E App. C.

Taken are rows in English, and of their three captions the reference description, which is what stands below the picture in
the article. The attribution is what the picture's own page says, in whatever language, and the alternative text is rare.
"""

from __future__ import annotations

from functools import partial

from dalle_ds.data.corpora.pairs import Corpus, Unusable
from dalle_ds.data.corpora.rows import FIELDS, Row
from dalle_ds.data.corpora.tables import CaptionTable, TableFormat, joined, tsv_rows
from dalle_ds.errors import DataError

COLUMNS = (
    "language",
    "page_url",
    "image_url",
    "page_title",
    "section_title",
    "hierarchical_section_title",
    "caption_reference_description",
    "caption_attribution_description",
    "caption_alt_text_description",
    "mime_type",
    "original_height",
    "original_width",
    "is_main_image",
    "attribution_passes_lang_id",
    "page_changed_recently",
    "context_page_description",
    "context_section_description",
)
"""Of `wit_v1.train.all-0000?-of-00010.tsv`, in this order."""


def read_wit(source: str, pictures: str, caption_column: str | None = None) -> Corpus:
    """English pairs of WIT.

    Args:
        source: a table, or a folder of .tsv tables, unpacked.
        pictures: folder that img2dataset downloaded to.
        caption_column: which column has the captions; None takes the reference description.

    Raises:
        DataError: one of them is not there, or no such column.
    """
    column = caption_column or "caption_reference_description"
    if column not in COLUMNS:
        raise DataError(f"WIT has no column {column!r}: --caption_column takes one of {', '.join(COLUMNS)}")
    captions = partial(_captions, column=COLUMNS.index(column))
    rows = partial(tsv_rows, columns=len(COLUMNS))
    return joined(CaptionTable(source, TableFormat(rows, _url, captions)), pictures)


def _url(row: Row) -> str | None:
    if len(row) != len(COLUMNS):
        raise Unusable(FIELDS)
    return None if row[0] == "language" else row[COLUMNS.index("image_url")]


def _captions(row: Row, column: int) -> list[str]:
    return [row[column]] if row[0] == "en" and row[column].strip() else []
