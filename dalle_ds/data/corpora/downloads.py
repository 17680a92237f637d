"""Images as img2dataset downloads them, each with the URL that it came from.

It writes shards of some thousand samples: `00000.tar`, or a folder `00000`, with `000000012.jpg` and `000000012.json` (its
"url", "status" and more), or `00000.parquet` with the images in a column. Captions in there are not read.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from typing import Any

from dalle_ds.data import reasons
from dalle_ds.data.corpora.files import (
    MAX_PICTURE_BYTES,
    MAX_TEXT_BYTES,
    Found,
    is_image,
    is_system,
    json_of,
    read_file,
    suffix_of,
    walk,
)
from dalle_ds.data.corpora.hf import table_rows
from dalle_ds.data.corpora.pairs import Broken, Unusable
from dalle_ds.data.corpora.webdataset import TarSample, is_tar, tar_samples
from dalle_ds.data.images import image_suffixes
from dalle_ds.errors import DataError

Download = tuple[str, str, bytes]
"""(name, URL, encoded image)."""
Read = Callable[[], Iterator[Download | Broken]]


def download_shards(pictures: str) -> list[tuple[str, Read]]:
    """The shards of a folder, each of which is read by itself, by name.

    Raises:
        DataError: no such folder, or no shards in it.
    """
    folder = Path(pictures)
    if not folder.is_dir():
        raise DataError(f"--pictures {folder} is not a folder: give the one that img2dataset downloaded to")
    found = walk(folder)
    plain = [entry for entry in found if not is_system(entry.name)]
    # Tars and folders have a .parquet beside them, too, with what is in their .json files.
    if shards := {entry.path: entry for entry in plain if is_tar(entry.name)}:
        read: Callable[[Path], Iterator[Download | Broken]] = _from_tar
        rest = [entry for entry in found if entry.path not in shards]
    elif folders := _folders_of(plain):
        shards = {path: Found(path, str(path.relative_to(folder))) for path in sorted(folders)}
        files: dict[Path, list[Found]] = {path: [] for path in [*folders, *(entry.path.parent for entry in found)]}
        for entry in found:
            files[entry.path.parent].append(entry)
        read = partial(_from_folder, files)
        rest = [entry for entry in found if entry.path.parent not in folders]
    elif shards := {entry.path: entry for entry in plain if suffix_of(entry.name) == ".parquet"}:
        read = _from_table
        rest = [entry for entry in found if entry.path not in shards]
    else:
        raise DataError(
            f"{folder} has no images of img2dataset: looked for .tar, folders with .json, and .parquet (its formats "
            "webdataset, files and parquet)"
        )
    # One for what is no shard.
    others: tuple[str, Read] = ("other files", lambda: (entry.unpaired() for entry in rest))
    return [*((entry.name, partial(read, path)) for path, entry in shards.items()), others]


def _folders_of(found: list[Found]) -> set[Path]:
    """Those in which an image lies with what is said of it."""
    pictures = {entry.path.with_suffix("") for entry in found if is_image(entry.name)}
    return {entry.path.parent for entry in found if _is_about(entry) and entry.path.with_suffix("") in pictures}


def _is_about(entry: Found) -> bool:
    return suffix_of(entry.name) == ".json" and not entry.name.endswith("_stats.json")


def _from_tar(path: Path) -> Iterator[Download | Broken]:
    for sample in tar_samples(path):
        if isinstance(sample, Broken):
            yield sample
            continue
        if sample.has_image and sample.image is None:
            yield Broken(sample.name, reasons.TOO_BIG)
        else:
            yield _download(sample.name, sample.image, partial(_about, sample))
        yield from sample.unused(".json")


def _about(sample: TarSample) -> bytes:
    return sample.texts.get(".json") or b"{}"


def _from_folder(files_of: dict[Path, list[Found]], path: Path) -> Iterator[Download | Broken]:
    files = files_of[path]
    plain = [entry for entry in files if not is_system(entry.name)]
    pictures = {entry.path.stem: entry for entry in reversed(plain) if is_image(entry.name)}  # the first one
    texts = [entry.path for entry in plain if _is_about(entry)]
    for about in texts:
        name = f"{path.name}/{about.stem}"
        picture = pictures.get(about.stem)
        try:
            if picture is not None and picture.problem is not None:
                raise Unusable(picture.problem)
            image = None if picture is None else read_file(picture.path, MAX_PICTURE_BYTES)
            yield _download(name, image, partial(read_file, about, MAX_TEXT_BYTES))
        except Unusable as error:
            yield Broken(name, error.reason)
    stems = {about.stem for about in texts}
    used = {*texts, *(picture.path for stem, picture in pictures.items() if stem in stems)}
    for entry in files:
        if entry.path not in used:
            if entry.problem is None and is_image(entry.name) and not is_system(entry.name):
                yield Broken(entry.name, reasons.ANOTHER_PICTURE if entry.path.stem in stems else reasons.NO_URL)
            else:
                yield entry.unpaired()


def _from_table(path: Path) -> Iterator[Download | Broken]:
    for row in table_rows(path, path.name, _columns):
        if isinstance(row, Broken):
            yield row
        else:
            number, key, url, image = row
            yield _of_row(f"{path.name}/{key}" if isinstance(key, str) else number, url, image)


def _columns(names: list[str]) -> tuple[str, ...]:
    picture = next((name for name in names if f".{name}" in image_suffixes()), None)
    if picture is None or not {"url", "key"} <= set(names):
        raise DataError("no column of images")
    return "key", "url", picture


def _of_row(name: str, url: Any, image: Any) -> Download | Broken:
    if not isinstance(image, bytes):  # one that could not be downloaded
        return Broken(name, reasons.NO_PICTURE)
    if not isinstance(url, str):
        return Broken(name, reasons.NO_URL)
    return (name, url, image) if len(image) <= MAX_PICTURE_BYTES else Broken(name, reasons.TOO_BIG)


def _download(name: str, image: bytes | None, about: Callable[[], bytes]) -> Download | Broken:
    try:
        fields = json_of(about())
    except Unusable as error:
        return Broken(name, error.reason)
    return _of_row(name, fields.get("url") if isinstance(fields, dict) else None, image)
