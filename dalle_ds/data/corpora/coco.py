"""COCO captions (Chen et al., 2015) from a local copy: COCO/annotations/captions_val2014.json beside COCO/val2014/*.jpg.

The set that text-to-image papers measure zero-shot FID on; DALL·E takes 30,000 captions of its validation part (Fig. 9).
"""

from __future__ import annotations

from collections.abc import Iterator
from functools import partial
from pathlib import Path
from typing import Any

from dalle_ds.data.corpora.pairs import (
    MAX_PICTURE_BYTES,
    NO_PICTURE,
    UNREADABLE,
    Broken,
    Corpus,
    RawPair,
    Unit,
    Unusable,
    existing,
    pair_of,
    read_file,
)
from dalle_ds.errors import DataError
from dalle_ds.parsing import parse_json

MAX_ANNOTATION_BYTES = 2**30
PREFIX = "captions_"


def read_coco(source: str) -> Corpus:
    """Pictures with all their captions (five, mostly), in the order of the annotation file.

    Args:
        source: a file `annotations/captions_PART.json`, whose pictures lie in the folder PART beside `annotations`; or the
            folder of both, where it has one such file.

    Raises:
        DataError: no or several annotation files, one that is damaged, or no folder of pictures.
    """
    file = _annotation_file(existing(source))
    folder = file.parent.parent / file.stem.removeprefix(PREFIX)
    if not folder.is_dir():
        raise DataError(f"{file} describes the pictures of a folder {folder}, which does not exist: unpack them there")
    return Corpus(partial(_units, file, folder))


def _annotation_file(path: Path) -> Path:
    if path.is_file():
        return path
    folder = path / "annotations" if (path / "annotations").is_dir() else path
    found = sorted(folder.glob(f"{PREFIX}*.json"))
    if len(found) != 1:
        told = ", ".join(file.name for file in found) or "none"
        raise DataError(f"{folder} must have one {PREFIX}PART.json, found {told}: name the file itself as the source")
    return found[0]


def _units(file: Path, folder: Path) -> Iterator[Unit]:
    try:
        content = parse_json(read_file(file, MAX_ANNOTATION_BYTES))
        names: dict[Any, str] = {image["id"]: str(image["file_name"]) for image in content["images"]}
        captions: dict[Any, list[str]] = {}
        for annotation in content["annotations"]:
            captions.setdefault(annotation["image_id"], []).append(str(annotation["caption"]).strip())
    except (OSError, ValueError, KeyError, TypeError, Unusable) as error:
        raise DataError(f"{file} cannot be read as annotations of COCO: {error}") from error
    for number, name in names.items():
        # The name alone: an annotation file does not choose what else is read.
        yield Unit(name, partial(read_picture, folder / Path(name).name, captions.get(number, []), name))


def read_picture(path: Path, captions: list[str], name: str) -> Iterator[RawPair | Broken]:
    """The pair of a picture's file and its captions."""
    try:
        yield pair_of(read_file(path, MAX_PICTURE_BYTES), captions, name)
    except FileNotFoundError:
        yield Broken(name, NO_PICTURE)
    except Unusable as error:
        yield Broken(name, error.reason)
    except (OSError, ValueError):
        yield Broken(name, UNREADABLE)
