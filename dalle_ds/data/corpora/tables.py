"""Conceptual Captions, WIT and YFCC100M: captions in tab-separated tables, joined with images that were downloaded.

A table, of any length, is read once for an index by URL, which lies on the disk (in TMPDIR).
"""

from __future__ import annotations

import html
import re
import sqlite3
import tempfile
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, replace
from functools import cached_property, partial
from pathlib import Path
from typing import BinaryIO

import xxhash

from dalle_ds.data import reasons
from dalle_ds.data.corpora.downloads import Read, download_shards
from dalle_ds.data.corpora.files import (
    MAX_TEXT_BYTES,
    Found,
    encoding_of,
    existing,
    is_system,
    suffix_of,
    unpaired_reason,
    walk,
)
from dalle_ds.data.corpora.pairs import Broken, Corpus, RawPair, Unit, Unpaired, Unusable, pair_of
from dalle_ds.data.corpora.rows import Line, Row, quoted_rows
from dalle_ds.errors import DataError
from dalle_ds.files import unreadable_is_a_data_error

_FILE_SHIFT = 48  # of a position: the file's number above, the place in it below
_EXAMPLES = 5
_SCHEMES = ("http://", "https://")
WIT_COLUMNS = (
    "language", "page_url", "image_url", "page_title", "section_title", "hierarchical_section_title",
    "caption_reference_description", "caption_attribution_description", "caption_alt_text_description", "mime_type",
    "original_height", "original_width", "is_main_image", "attribution_passes_lang_id", "page_changed_recently",
    "context_page_description", "context_section_description",
)  # fmt: skip
"""Of `wit_v1.train.all-0000?-of-00010.tsv`, in this order."""
_YFCC_COLUMNS = 23
_TITLE, _DESCRIPTION, _DOWNLOAD_URL, _MARKER = 6, 7, 14, 22  # of 23
_PHOTOGRAPH = "0"
_ENCODED = re.compile(rb"%([0-9A-Fa-f]{2})")
_TAG = re.compile(r"</?[A-Za-z][^<>]*>")

Rows = Callable[[BinaryIO], Iterator[tuple[int, Row | str]]]
"""From where a file stands: (place at which the row begins, its fields or the reason for which it cannot be read)."""


@dataclass(frozen=True)
class TableFormat:
    """How a kind of table is read."""

    rows: Rows
    url: Callable[[Row], str | None]
    """Of the image; "" where there is none, None in a heading; `Unusable` in rows that are not of this kind of table."""
    captions: Callable[[Row], list[str]]
    """None where the row has no use."""


def read_conceptual(source: str, pictures: str) -> Corpus:
    """Conceptual Captions (Sharma et al. 2018; DALL·E §2.3), rows of a caption and a URL, or Conceptual 12M, of a URL and a
    caption; neither has a heading.

    Args:
        source: the table, or a folder of .tsv tables.
        pictures: folder that img2dataset downloaded to.

    Raises:
        DataError: one of them is not there.
    """
    return joined(CaptionTable(source, TableFormat(plain_rows, _conceptual_url, _conceptual_captions)), pictures)


def _conceptual_url(row: Row) -> str | None:
    if len(row) > 2 and row[0].startswith(_SCHEMES):  # a tab in a caption; behind a URL there may be labels
        raise Unusable(reasons.FIELDS)
    return next((field for field in row[:2] if field.startswith(_SCHEMES)), "")


def _conceptual_captions(row: Row) -> list[str]:
    return [field for field in row[:2] if not field.startswith(_SCHEMES)]


def read_wit(source: str, pictures: str, caption_column: str | None = None) -> Corpus:
    """WIT (Srinivasan et al. 2021), as the Wikipedia pairs of DALL·E App. C: rows in English, and of their three captions the
    reference description, which stands below the image in the article. The attribution is in whatever language, and the
    alternative text is rare.

    Args:
        source: a table, or a folder of .tsv tables, unpacked.
        pictures: folder that img2dataset downloaded to.
        caption_column: which column has the captions; None takes the reference description.

    Raises:
        DataError: one of them is not there, or no such column.
    """
    column = caption_column or "caption_reference_description"
    if column not in WIT_COLUMNS:
        raise DataError(f"WIT has no column {column!r}: --caption_column takes one of {', '.join(WIT_COLUMNS)}")
    captions = partial(_wit_captions, column=WIT_COLUMNS.index(column))
    rows = partial(tsv_rows, columns=len(WIT_COLUMNS))
    return joined(CaptionTable(source, TableFormat(rows, _wit_url, captions)), pictures)


def _wit_url(row: Row) -> str | None:
    if len(row) != len(WIT_COLUMNS):
        raise Unusable(reasons.FIELDS)
    return None if row[0] == "language" else row[WIT_COLUMNS.index("image_url")]


def _wit_captions(row: Row, column: int) -> list[str]:
    return [row[column]] if row[0] == "en" and row[column].strip() else []


def read_yfcc(source: str, pictures: str) -> Corpus:
    """YFCC100M (Thomee et al. 2016; DALL·E §2.3 and App. C): photographs, with title and description as two captions, each of
    which the filters judge by itself. Markup in descriptions is removed. Videos have no captions.

    Args:
        source: the table, or a folder of .tsv tables, unpacked.
        pictures: folder that img2dataset downloaded to.

    Raises:
        DataError: one of them is not there.
    """
    return joined(CaptionTable(source, TableFormat(plain_rows, _yfcc_url, _yfcc_captions)), pictures)


def _yfcc_field(row: Row, number: int) -> str:
    """A field by its number in tables of 23 columns."""
    return row[number + len(row) - _YFCC_COLUMNS]


def _yfcc_url(row: Row) -> str | None:
    if len(row) not in (_YFCC_COLUMNS, _YFCC_COLUMNS + 2):
        raise Unusable(reasons.FIELDS)
    return _yfcc_field(row, _DOWNLOAD_URL)


def _yfcc_captions(row: Row) -> list[str]:
    if _yfcc_field(row, _MARKER) != _PHOTOGRAPH:
        return []
    texts = (_decoded(_yfcc_field(row, number)) for number in (_TITLE, _DESCRIPTION))
    plain = (html.unescape(_TAG.sub(" ", text)).strip() for text in texts)
    return [text for text in plain if text]


def _decoded(text: str) -> str:
    """The text that a URL-encoded one stands for; what is not UTF-8 in it stays recognizable."""
    encoded = text.replace("+", " ").encode("utf-8", "surrogateescape")
    return _ENCODED.sub(lambda code: bytes.fromhex(code[1].decode()), encoded).decode("utf-8", "surrogateescape")


class CaptionTable:
    """The captions of one or more tables.

    Args:
        source: a table, or a folder of .tsv files, searched with its subfolders.

    Raises:
        DataError: there is none, it is packed, or not in UTF-8.
    """

    def __init__(self, source: str, form: TableFormat) -> None:
        path = existing(source)
        found = walk(path) if path.is_dir() else [Found(path, path.name)]
        plain = [entry.path for entry in found if suffix_of(entry.name) == ".tsv" and not is_system(entry.name)]
        self._files = [file for file in plain if file.is_file()] if path.is_dir() else [path]
        tables = set(self._files)
        self._beside = [entry for entry in found if entry.path not in tables]
        self._form = form
        self._unused: dict[str, list[Unpaired]] = {}
        packed = [entry.name for entry in found if unpaired_reason(entry.name) == reasons.ARCHIVE]
        if not self._files:
            raise DataError(f"{path} has no .tsv files" + (f": unpack {', '.join(packed)[:200]}" if packed else ""))
        if path.is_file() and packed:
            raise DataError(f"{path} is packed, so that no row can be read by itself: unpack it")

    def captions(self, url: str) -> list[str] | None:
        """All captions of an image, in the order of the table; None where it is not in there.

        Raises:
            DataError: a table cannot be read.
        """
        rows = [row for row in map(self._row, self._index.positions(url)) if self._form.url(row) == url]
        return [caption for row in rows for caption in self._form.captions(row)] if rows else None

    def unpaired(self, pictures: str) -> Iterator[Broken]:
        """Rows that cannot be looked up, some of each kind by name, and files that are neither tables nor images."""
        _ = self._index
        yield from (row for rows in self._unused.values() for row in rows)
        places = {entry.path.parent for entry in self._beside}
        told_of = {place for place in places if not place.resolve().is_relative_to(Path(pictures).resolve())}
        yield from (entry.unpaired() for entry in self._beside if entry.path.parent in told_of)

    @cached_property
    def _index(self) -> UrlIndex:
        return UrlIndex(self._urls())

    def _urls(self) -> Iterator[tuple[str, int]]:
        for number, path in enumerate(self._files):
            with unreadable_is_a_data_error(path), path.open("rb") as file:
                encoding = encoding_of(file.read(4))
                if not encoding.startswith("utf-8"):
                    raise DataError(f"{path} is in {encoding.upper()}: convert it to UTF-8")
                file.seek(3 if encoding == "utf-8-sig" else 0)
                for count, (place, row) in enumerate(self._form.rows(file), start=1):
                    reason = row if isinstance(row, str) else reasons.NO_URL
                    try:
                        url = "" if isinstance(row, str) else self._form.url(row)
                    except Unusable as error:
                        url, reason = "", error.reason
                    if url:
                        yield url, (number << _FILE_SHIFT) + place
                    elif url is not None:
                        self._tell(Unpaired(f"{path.name} row {count}", reason))

    def _tell(self, row: Unpaired) -> None:
        rows = self._unused.setdefault(row.reason, [])
        if len(rows) < _EXAMPLES:
            rows.append(row)
        else:
            rows[-1] = replace(rows[-1], count=rows[-1].count + 1)

    def _row(self, position: int) -> Row:
        path = self._files[position >> _FILE_SHIFT]
        with unreadable_is_a_data_error(path), path.open("rb") as file:
            file.seek(position & ((1 << _FILE_SHIFT) - 1))
            row = next(self._form.rows(file), (0, ""))[1]
        if isinstance(row, str):
            raise DataError(f"{path} has changed while it was read: begin again with --overwrite True")
        return row


class UrlIndex:
    """Where each URL stands, on the disk."""

    def __init__(self, urls: Iterable[tuple[str, int]]) -> None:
        self._folder = tempfile.TemporaryDirectory(prefix="dalle_ds-urls-")
        self._rows = sqlite3.connect(Path(self._folder.name) / "index", isolation_level=None)
        self._rows.executescript("PRAGMA journal_mode = OFF; PRAGMA synchronous = OFF; BEGIN")
        self._rows.execute("CREATE TABLE places (key INTEGER, position INTEGER)")
        self._rows.executemany("INSERT INTO places VALUES (?, ?)", ((_key(url), position) for url, position in urls))
        self._rows.execute("CREATE INDEX keys ON places (key, position)")
        self._rows.execute("COMMIT")

    def positions(self, url: str) -> list[int]:
        """Where a URL, or one of the same hash, was; ascending."""
        found = self._rows.execute("SELECT position FROM places WHERE key = ? ORDER BY position", (_key(url),))
        return [position for (position,) in found]


def joined(table: CaptionTable, pictures: str) -> Corpus:
    """The images that were downloaded, shard by shard, with their captions in the table.

    Raises:
        DataError: see `download_shards`.
    """
    shards = download_shards(pictures)

    def units() -> Iterator[Unit]:
        for name, read in shards:
            yield Unit(name, partial(_read_shard, table, read))
        yield Unit("rows of the table", partial(table.unpaired, pictures))

    return Corpus(units, units_per_part=1)


def _read_shard(table: CaptionTable, read: Read) -> Iterator[RawPair | Broken]:
    for item in read():
        if isinstance(item, Broken):
            yield item
            continue
        name, url, image = item
        captions = table.captions(url)
        yield Broken(name, reasons.NOT_LISTED) if captions is None else pair_of(image, captions, name)


def plain_rows(file: BinaryIO) -> Iterator[tuple[int, Row | str]]:
    """Rows that are lines, without quotes."""
    for place, line, problem in _lines(file):
        if problem or line.strip():
            yield place, problem or line.rstrip("\r\n").split("\t")


def tsv_rows(file: BinaryIO, columns: int) -> Iterator[tuple[int, Row | str]]:
    """Rows of so many columns with fields in quotes, which may have tabs and ends of lines in them."""
    return quoted_rows(_lines(file), "\t", lambda fields: len(fields) >= columns)


def _lines(file: BinaryIO) -> Iterator[Line]:
    """What is not UTF-8 stays recognizable: it costs the captions in which it is."""
    place = file.tell()
    while line := file.readline(MAX_TEXT_BYTES + 1):
        too_long = len(line) > MAX_TEXT_BYTES
        yield place, "" if too_long else line.decode("utf-8", "surrogateescape"), reasons.TOO_LONG if too_long else None
        while too_long and line and not line.endswith(b"\n"):
            line = file.readline(MAX_TEXT_BYTES)
        place = file.tell()


def _key(url: str) -> int:
    return xxhash.xxh3_64_intdigest(url.encode("utf-8", "surrogatepass")) - 2**63  # signed, as SQLite has it
