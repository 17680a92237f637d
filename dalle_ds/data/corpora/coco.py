"""COCO captions (Chen et al., 2015) from a local copy: COCO/annotations/captions_val2014.json beside COCO/val2014/*.jpg.

The set that text-to-image papers measure zero-shot FID on; DALL·E takes 30,000 captions of its validation part (Fig. 9).
"""

from __future__ import annotations

from collections.abc import Iterator
from functools import partial
from pathlib import Path
from typing import Any

from dalle_ds.data import reasons
from dalle_ds.data.corpora.files import existing, file_pair, others, read_file, walk
from dalle_ds.data.corpora.pairs import Broken, Corpus, RawPair, Unit, Unusable, told
from dalle_ds.errors import DataError
from dalle_ds.parsing import is_text, parse_json, shown

MAX_ANNOTATION_BYTES = 2**30
PREFIX = "captions_"


def read_coco(source: str) -> Corpus:
    """Images with all their captions (five, mostly), in the order of the annotation file.

    Args:
        source: a file `annotations/captions_PART.json`, whose images lie in the folder PART beside `annotations`; or the
            folder of both, where it has one such file.

    Raises:
        DataError: no or several annotation files, one that is damaged, or no folder of images.
    """
    file = _annotation_file(existing(source))
    folder = file.parent.parent / file.stem.removeprefix(PREFIX)
    if not folder.is_dir():
        raise DataError(f"{file} describes the images of a folder {folder}, which does not exist: unpack them there")
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
        images, annotations = list(content["images"]), list(content["annotations"])
    except (ValueError, KeyError, TypeError, Unusable) as error:
        raise DataError(f"{file} cannot be read as annotations of COCO: {error}") from error
    captions: dict[Any, list[Any]] = {}
    bad: list[Broken] = []
    for place, annotation in enumerate(annotations):
        try:
            number, caption = annotation["image_id"], annotation["caption"]
            captions.setdefault(number, []).append(caption)
        except (KeyError, TypeError):
            bad.append(Broken(f"{file.name} annotation {place}", reasons.NO_CAPTION))
    names: dict[Any, str] = {}
    listed: set[str] = set()
    for place, image in enumerate(images):
        where = f"{file.name} image {place}"
        try:
            number, name = image["id"], image["file_name"]
            reason = reasons.SAME_ID if number in names else None if is_text(name) and name else reasons.NO_PICTURE
            if reason != reasons.NO_PICTURE and is_text(name):
                listed.add(Path(name).name)
        except (KeyError, TypeError):
            reason = reasons.UNREADABLE
        if reason is None:
            names[number] = name
        else:
            bad.append(Broken(where, reason))
    for number, name in names.items():
        # The name alone: an annotation file does not choose what else is read.
        yield Unit(name, partial(_read, folder / Path(name).name, captions.pop(number, []), name))
    bad += [Broken(f"{file.name} captions of image {shown(number)}", reasons.NO_PICTURE) for number in captions]
    yield from map(told, bad)
    yield others(lambda: (entry for entry in walk(folder) if entry.name not in listed))


def _read(path: Path, captions: list[Any], name: str) -> Iterator[RawPair | Broken]:
    yield file_pair(path, captions, name)
