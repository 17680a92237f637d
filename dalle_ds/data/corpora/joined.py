"""Conceptual Captions, WIT and YFCC100M: captions in tab-separated tables, joined with images that img2dataset downloaded.

A table, of any length, is read once for an index by URL, which lies on the disk (in TMPDIR). img2dataset writes shards of some
thousand samples: `00000.tar`, or a folder `00000`, with `000000012.jpg` and `000000012.json` (its "url" and more), or
`00000.parquet` with the images in a column. Captions in there are not read.
"""

from __future__ import annotations

import html
import re
import sqlite3
import tempfile
from collections.abc import Callable, Iterator
from dataclasses import replace
from functools import cached_property, partial
from pathlib import Path
from typing import Any, BinaryIO

import xxhash

from dalle_ds.data import reasons
from dalle_ds.data.corpora import files
from dalle_ds.data.corpora.files import Found, is_image, is_system, suffix_of
from dalle_ds.data.corpora.hf import table_rows
from dalle_ds.data.corpora.pairs import Broken, Corpus, RawPair, Unit, Unpaired, Unusable, or_broken
from dalle_ds.data.corpora.rows import Line, Row, quoted_rows
from dalle_ds.data.corpora.webdataset import TarSample, is_tar, tar_samples
from dalle_ds.data.images import image_suffixes
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
Download = tuple[str, str, bytes]
"""(name, URL, encoded image)."""
Read = Callable[[], Iterator[Download | Broken]]


# --- kinds of tables ------------------------------------------------------------------------------------------------


def read_conceptual(source: str, pictures: str) -> Corpus:
    """Conceptual Captions (Sharma et al. 2018; DALL·E §2.3), rows of a caption and a URL, or Conceptual 12M, of a URL and a
    caption; neither has a heading. `source` is a table or a folder of .tsv tables, `pictures` what img2dataset downloaded to;
    `DataError` where one of them is not there."""

    def captions(row: Row) -> list[str]:
        return [field for field in row[:2] if not field.startswith(_SCHEMES)]

    return _joined(CaptionTable(source, plain_rows, _conceptual_url, captions), pictures)


def _conceptual_url(row: Row) -> str | None:
    if len(row) > 2 and row[0].startswith(_SCHEMES):  # a tab in a caption; behind a URL there may be labels
        raise Unusable(reasons.FIELDS)
    return next((field for field in row[:2] if field.startswith(_SCHEMES)), "")


def read_wit(source: str, pictures: str, caption_column: str | None = None) -> Corpus:
    """WIT (Srinivasan et al. 2021), as the Wikipedia pairs of DALL·E App. C: rows in English, and of their three captions the
    reference description, which stands below the image in the article. The attribution is in whatever language, and the
    alternative text is rare. `caption_column` names another. Else as `read_conceptual`; tables are unpacked ones."""
    column = caption_column or "caption_reference_description"
    if column not in WIT_COLUMNS:
        raise DataError(f"WIT has no column {column!r}: --caption_column takes one of {', '.join(WIT_COLUMNS)}")
    place = WIT_COLUMNS.index(column)

    def captions(row: Row) -> list[str]:
        return [row[place]] if row[0] == "en" and row[place].strip() else []

    return _joined(CaptionTable(source, _wit_rows, _wit_url, captions), pictures)


def _wit_rows(file: BinaryIO) -> Iterator[tuple[int, Row | str]]:
    """Fields in quotes may have tabs and ends of lines in them."""
    return quoted_rows(_lines(file), "\t", lambda fields: len(fields) >= len(WIT_COLUMNS))


def _wit_url(row: Row) -> str | None:
    if len(row) != len(WIT_COLUMNS):
        raise Unusable(reasons.FIELDS)
    return None if row[0] == "language" else row[WIT_COLUMNS.index("image_url")]


def read_yfcc(source: str, pictures: str) -> Corpus:
    """YFCC100M (Thomee et al. 2016; DALL·E §2.3 and App. C): photographs, with title and description as two captions, each of
    which the filters judge by itself. Markup in descriptions is removed. Videos have no captions. Else as `read_conceptual`;
    tables are unpacked ones."""
    return _joined(CaptionTable(source, plain_rows, _yfcc_url, _yfcc_captions), pictures)


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


def plain_rows(file: BinaryIO) -> Iterator[tuple[int, Row | str]]:
    """Rows that are lines, without quotes."""
    for place, line, problem in _lines(file):
        if problem or line.strip():
            yield place, problem or line.rstrip("\r\n").split("\t")


def _lines(file: BinaryIO) -> Iterator[Line]:
    """What is not UTF-8 stays recognizable: it costs the captions in which it is."""
    place = file.tell()
    while line := file.readline(files.MAX_TEXT_BYTES + 1):
        too_long = len(line) > files.MAX_TEXT_BYTES
        yield place, "" if too_long else line.decode("utf-8", "surrogateescape"), reasons.TOO_LONG if too_long else None
        while too_long and line and not line.endswith(b"\n"):
            line = file.readline(files.MAX_TEXT_BYTES)
        place = file.tell()


# --- tables and downloads -------------------------------------------------------------------------------------------


def _joined(table: CaptionTable, pictures: str) -> Corpus:
    """The images that were downloaded, shard by shard, with their captions in the table."""
    shards = _download_shards(pictures)

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
        yield (
            Broken(name, reasons.NOT_LISTED) if captions is None else or_broken(name, RawPair.of, image, captions, name)
        )


class CaptionTable:
    """The captions of one or more tables.

    Args:
        source: a table, or a folder of .tsv files, searched with its subfolders.
        rows: of a table.
        url: of a row's image; "" where there is none, None in a heading; `Unusable` in rows of another kind of table.
        captions: of a row; none where it has no use.
    """

    def __init__(
        self, source: str, rows: Rows, url: Callable[[Row], str | None], captions: Callable[[Row], list[str]]
    ) -> None:
        path = files.existing(source)
        found = files.walk(path) if path.is_dir() else [Found(path, path.name)]
        plain = [entry.path for entry in found if suffix_of(entry.name) == ".tsv" and not is_system(entry.name)]
        self._files = [file for file in plain if file.is_file()] if path.is_dir() else [path]
        tables = set(self._files)
        self._beside = [entry for entry in found if entry.path not in tables]
        self._rows, self._url, self._captions = rows, url, captions
        self._unused: dict[str, list[Unpaired]] = {}
        packed = [entry.name for entry in found if files.unpaired_reason(entry.name) == reasons.ARCHIVE]
        if not self._files:
            raise DataError(f"{path} has no .tsv files" + (f": unpack {', '.join(packed)[:200]}" if packed else ""))
        if path.is_file() and packed:
            raise DataError(f"{path} is packed, so that no row can be read by itself: unpack it")

    def captions(self, url: str) -> list[str] | None:
        """All captions of an image, in the order of the table; None where it is not in there, `DataError` where a table cannot
        be read."""
        # Where the URL stands, or another of the same hash.
        places = self._index.execute("SELECT position FROM places WHERE key = ? ORDER BY position", (_key(url),))
        rows = [row for row in (self._row(position) for (position,) in places) if self._url(row) == url]
        return [caption for row in rows for caption in self._captions(row)] if rows else None

    def unpaired(self, pictures: str) -> Iterator[Broken]:
        """Rows that cannot be looked up, some of each kind by name, and files that are neither tables nor images."""
        _ = self._index
        yield from (row for rows in self._unused.values() for row in rows)
        places = {entry.path.parent for entry in self._beside}
        told_of = {place for place in places if not place.resolve().is_relative_to(Path(pictures).resolve())}
        yield from (entry.unpaired() for entry in self._beside if entry.path.parent in told_of)

    @cached_property
    def _index(self) -> sqlite3.Connection:
        """Where each URL stands, on the disk."""
        self._folder = tempfile.TemporaryDirectory(prefix="dalle_ds-urls-")
        index = sqlite3.connect(Path(self._folder.name) / "index", isolation_level=None)
        index.executescript("PRAGMA journal_mode = OFF; PRAGMA synchronous = OFF; BEGIN")
        index.execute("CREATE TABLE places (key INTEGER, position INTEGER)")
        index.executemany("INSERT INTO places VALUES (?, ?)", ((_key(url), place) for url, place in self._urls()))
        index.execute("CREATE INDEX keys ON places (key, position)")
        index.execute("COMMIT")
        return index

    def _urls(self) -> Iterator[tuple[str, int]]:
        for number, path in enumerate(self._files):
            with unreadable_is_a_data_error(path), path.open("rb") as file:
                encoding = files.encoding_of(file.read(4))
                if not encoding.startswith("utf-8"):
                    raise DataError(f"{path} is in {encoding.upper()}: convert it to UTF-8")
                file.seek(3 if encoding == "utf-8-sig" else 0)
                for count, (place, row) in enumerate(self._rows(file), start=1):
                    reason = row if isinstance(row, str) else reasons.NO_URL
                    try:
                        url = "" if isinstance(row, str) else self._url(row)
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
            row = next(self._rows(file), (0, ""))[1]
        if isinstance(row, str):
            raise DataError(f"{path} has changed while it was read: begin again with --overwrite True")
        return row


def _key(url: str) -> int:
    return xxhash.xxh3_64_intdigest(url.encode("utf-8", "surrogatepass")) - 2**63  # signed, as SQLite has it


def _download_shards(pictures: str) -> list[tuple[str, Read]]:
    """The shards of a folder that img2dataset downloaded to, by name, and what is none; `DataError` without shards."""
    folder = Path(pictures)
    if not folder.is_dir():
        raise DataError(f"--pictures {folder} is not a folder: give the one that img2dataset downloaded to")
    found = files.walk(folder)
    plain = [entry for entry in found if not is_system(entry.name)]
    read: Callable[[Path], Iterator[Download | Broken]]
    # Tars and folders have a .parquet beside them, too, with what is in their .json files.
    if shards := {entry.path: entry.name for entry in plain if is_tar(entry.name)}:
        read, rest = _from_tar, [entry for entry in found if entry.path not in shards]
    elif folders := _folders_of(plain):
        shards = {path: str(path.relative_to(folder)) for path in sorted(folders)}
        entries: dict[Path, list[Found]] = {}
        for entry in found:
            entries.setdefault(entry.path.parent, []).append(entry)
        read, rest = partial(_from_folder, entries), [entry for entry in found if entry.path.parent not in folders]
    elif shards := {entry.path: entry.name for entry in plain if suffix_of(entry.name) == ".parquet"}:
        read, rest = _from_table, [entry for entry in found if entry.path not in shards]
    else:
        raise DataError(
            f"{folder} has no images of img2dataset: looked for .tar, folders with .json, and .parquet (its formats "
            "webdataset, files and parquet)"
        )
    others: tuple[str, Read] = ("other files", lambda: (entry.unpaired() for entry in rest))
    return [*((name, partial(read, path)) for path, name in shards.items()), others]


def _folders_of(found: list[Found]) -> set[Path]:
    """Those in which an image lies with what is said of it."""
    images = {entry.path.with_suffix("") for entry in found if is_image(entry.name)}
    return {entry.path.parent for entry in found if _is_about(entry) and entry.path.with_suffix("") in images}


def _is_about(entry: Found) -> bool:
    return suffix_of(entry.name) == ".json" and not entry.name.endswith("_stats.json")


def _from_tar(path: Path) -> Iterator[Download | Broken]:
    for sample in tar_samples(path):
        if isinstance(sample, Broken):
            yield sample
        else:
            yield or_broken(sample.name, _of_sample, sample)
            yield from sample.unused(".json")


def _of_sample(sample: TarSample) -> Download:
    if sample.has_image and sample.image is None:
        raise Unusable(reasons.TOO_BIG)
    return _download(sample.name, sample.image, sample.texts.get(".json") or b"{}")


def _from_folder(entries_of: dict[Path, list[Found]], path: Path) -> Iterator[Download | Broken]:
    entries = entries_of[path]
    plain = [entry for entry in entries if not is_system(entry.name)]
    images = {entry.path.stem: entry for entry in reversed(plain) if is_image(entry.name)}  # the first one
    texts = [entry.path for entry in plain if _is_about(entry)]
    stems = {about.stem for about in texts}
    for about in texts:
        name = f"{path.name}/{about.stem}"
        yield or_broken(name, _of_files, name, images.get(about.stem), about)
    used = {*texts, *(entry.path for stem, entry in images.items() if stem in stems)}
    for entry in entries:
        if entry.path in used:
            continue
        if entry.problem is None and is_image(entry.name) and not is_system(entry.name):
            yield Broken(entry.name, reasons.ANOTHER_IMAGE if entry.path.stem in stems else reasons.NO_URL)
        else:
            yield entry.unpaired()


def _of_files(name: str, entry: Found | None, about: Path) -> Download:
    if entry is not None and entry.problem is not None:
        raise Unusable(entry.problem)
    image = None if entry is None else files.read_file(entry.path, files.MAX_IMAGE_BYTES)
    return _download(name, image, files.read_file(about, files.MAX_TEXT_BYTES))


def _from_table(path: Path) -> Iterator[Download | Broken]:
    for row in table_rows(path, path.name, _columns):
        if isinstance(row, Broken):
            yield row
            continue
        number, key, url, image = row
        name = f"{path.name}/{key}" if isinstance(key, str) else number
        yield or_broken(name, _of_row, name, url, image)


def _columns(names: list[str]) -> tuple[str, ...]:
    image = next((name for name in names if f".{name}" in image_suffixes()), None)
    if image is None or not {"url", "key"} <= set(names):
        raise DataError("no column of images")
    return "key", "url", image


def _download(name: str, image: bytes | None, about: bytes) -> Download:
    fields = files.json_of(about)
    return _of_row(name, fields.get("url") if isinstance(fields, dict) else None, image)


def _of_row(name: str, url: Any, image: Any) -> Download:
    if not isinstance(image, bytes):  # one that could not be downloaded
        raise Unusable(reasons.NO_IMAGE)
    if not isinstance(url, str):
        raise Unusable(reasons.NO_URL)
    if len(image) > files.MAX_IMAGE_BYTES:
        raise Unusable(reasons.TOO_BIG)
    return name, url, image
