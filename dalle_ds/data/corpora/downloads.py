"""Pictures as img2dataset downloads them, each with the URL that it came from.

It writes shards of some thousand samples: `00000.tar`, or a folder `00000`, with `000000012.jpg` and `000000012.json` (its
"url", "status" and more), or `00000.parquet` with the pictures in a column. Captions in there are not read.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

from dalle_ds.data.corpora.pairs import (
    IMAGE_SUFFIXES,
    MAX_PICTURE_BYTES,
    MAX_TEXT_BYTES,
    NO_PICTURE,
    TOO_BIG,
    UNREADABLE,
    Broken,
    Unusable,
    read_file,
)
from dalle_ds.data.corpora.webdataset import TarSample, tar_samples
from dalle_ds.errors import DataError
from dalle_ds.parsing import parse_json

NO_URL = "no URL"

_PICTURE_COLUMNS = tuple(suffix[1:] for suffix in IMAGE_SUFFIXES)
_ROWS = 64


@dataclass(frozen=True)
class Download:
    """A picture that was downloaded."""

    name: str
    url: str
    image: bytes


@dataclass(frozen=True)
class DownloadShard:
    """A shard that is read by itself."""

    name: str
    read: Callable[[], Iterator[Download | Broken]]


def download_shards(pictures: str) -> list[DownloadShard]:
    """The shards of a folder, by name.

    Raises:
        DataError: no such folder, or no shards in it.
    """
    folder = Path(pictures)
    if not folder.is_dir():
        raise DataError(f"pictures {folder} is not a folder: give the one that img2dataset downloaded to")
    # Tars and folders have a .parquet beside them, too, with what is in their .json files.
    if tars := sorted(folder.rglob("*.tar")):
        return [DownloadShard(str(tar.relative_to(folder)), partial(_from_tar, tar)) for tar in tars]
    folders = sorted({path.parent for path in folder.rglob("*.json") if not path.name.endswith("_stats.json")})
    if folders:
        return [DownloadShard(str(path.relative_to(folder)), partial(_from_folder, path)) for path in folders]
    if tables := sorted(folder.rglob("*.parquet")):
        return [DownloadShard(str(table.relative_to(folder)), partial(_from_table, table)) for table in tables]
    raise DataError(
        f"{folder} has no pictures of img2dataset: looked for .tar, folders with .json, and .parquet (its formats "
        "webdataset, files and parquet)"
    )


def _from_tar(path: Path) -> Iterator[Download | Broken]:
    for sample in tar_samples(path):
        if isinstance(sample, Broken):
            yield sample
            continue
        image, there = sample.picture()
        if there and image is None:
            yield Broken(sample.name, TOO_BIG)
        else:
            yield _download(sample.name, image, partial(_about, sample))


def _about(sample: TarSample) -> bytes:
    return sample.members.get(".json") or b"{}"


def _from_folder(path: Path) -> Iterator[Download | Broken]:
    for about in sorted(path.glob("*.json")):
        name = f"{path.name}/{about.stem}"
        picture = next((file for suffix in IMAGE_SUFFIXES if (file := about.with_suffix(suffix)).exists()), None)
        try:
            image = None if picture is None else read_file(picture, MAX_PICTURE_BYTES)
            yield _download(name, image, partial(read_file, about, MAX_TEXT_BYTES))
        except Unusable as error:
            yield Broken(name, error.reason)
        except OSError:
            yield Broken(name, UNREADABLE)


def _from_table(path: Path) -> Iterator[Download | Broken]:
    import pyarrow as pa
    import pyarrow.parquet

    try:
        with pyarrow.parquet.ParquetFile(path) as table:
            column = next((name for name in _PICTURE_COLUMNS if name in table.schema_arrow.names), None)
            if column is None or not {"url", "key"} <= set(table.schema_arrow.names):
                yield Broken(path.name, NO_PICTURE)
                return
            for batch in table.iter_batches(_ROWS, columns=["url", "key", column]):
                for row in batch.to_pylist():
                    yield _of_row(f"{path.name}/{row['key']}", row["url"], row[column])
    except (OSError, ValueError, pa.ArrowException):
        yield Broken(path.name, UNREADABLE)


def _of_row(name: str, url: Any, image: Any) -> Download | Broken:
    if not isinstance(image, bytes):  # one that could not be downloaded
        return Broken(name, NO_PICTURE)
    if not isinstance(url, str):
        return Broken(name, NO_URL)
    return Download(name, url, image) if len(image) <= MAX_PICTURE_BYTES else Broken(name, TOO_BIG)


def _download(name: str, image: bytes | None, about: Callable[[], bytes]) -> Download | Broken:
    try:
        fields = parse_json(about())
    except ValueError:
        return Broken(name, UNREADABLE)
    return _of_row(name, fields.get("url") if isinstance(fields, dict) else None, image)
