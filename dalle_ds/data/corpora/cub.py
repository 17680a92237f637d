"""Caltech-UCSD Birds 200-2011 (Wah et al., 2011) with the captions of Reed et al. (2016), ten to a picture, from a local copy.

    CUB_200_2011/images.txt              "1 001.Black_footed_Albatross/Black_Footed_Albatross_0046_18796.jpg"
    CUB_200_2011/train_test_split.txt    "1 0": picture 1 is not of the training part
    CUB_200_2011/images/001.Black_…/Black_…_18796.jpg
    …/text_c10/001.Black_…/Black_…_18796.txt      one caption per line; inside of CUB_200_2011 or beside it
    …/testclasses.txt                    beside text_c10, where there is one: "001.Black_footed_Albatross"

Papers on generation call the pictures of the test classes (50 of 200) the test set, those on classification those of
`train_test_split.txt`, which has pictures of all classes on both sides. Where `testclasses.txt` lies beside the captions, it
decides.
"""

from __future__ import annotations

from collections.abc import Iterator
from functools import partial
from pathlib import Path, PurePosixPath
from typing import Literal

from dalle_ds.data.corpora.coco import read_picture
from dalle_ds.data.corpora.pairs import (
    MAX_TEXT_BYTES,
    NO_CAPTION,
    UNREADABLE,
    Broken,
    Corpus,
    RawPair,
    Unit,
    Unusable,
    existing,
    read_file,
)
from dalle_ds.errors import DataError

Part = Literal["test", "train", "all"]
CAPTIONS_NAME = "text_c10"


def read_cub(source: str, part: Part = "test") -> Corpus:
    """Pictures with their different captions, in the order of `images.txt`.

    Args:
        source: the folder CUB_200_2011.
        part: which pictures; those of the test part are what DALL·E is measured on (Fig. 9).

    Raises:
        DataError: a file or folder of the layout is missing or damaged, or the part is empty.
    """
    folder = existing(source)
    captions = next(
        (place for place in (folder / CAPTIONS_NAME, folder.parent / CAPTIONS_NAME) if place.is_dir()), None
    )
    if captions is None:
        raise DataError(f"{folder} has no captions: unpack {CAPTIONS_NAME} of Reed et al. there or beside it")
    names = _table(folder / "images.txt")
    test = _test_pictures(folder, captions, names)
    chosen = [name for name in names.values() if part == "all" or (name in test) == (part == "test")]
    if not chosen:
        raise DataError(f"{folder} has no pictures of its {part} part: {len(names)} are listed in images.txt")
    return Corpus(lambda: (Unit(name, partial(_read, folder / "images", captions, name)) for name in chosen))


def _table(path: Path) -> dict[str, str]:
    """Lines of "number value"."""
    try:
        lines = read_file(path, 100 * MAX_TEXT_BYTES).decode().splitlines()
        rows = [line.split(maxsplit=1) for line in lines if line.strip()]
        return {number: value.strip() for number, value in rows}
    except (OSError, ValueError, Unusable) as error:
        raise DataError(f"{path} cannot be read as a table of CUB-200-2011: {error}") from error


def _test_pictures(folder: Path, captions: Path, names: dict[str, str]) -> set[str]:
    """Names of the pictures of the test part."""
    classes = captions.parent / "testclasses.txt"
    if not classes.is_file():
        is_train = _table(folder / "train_test_split.txt")
        return {name for number, name in names.items() if is_train.get(number) == "0"}
    try:
        listed = {line.strip() for line in read_file(classes, MAX_TEXT_BYTES).decode().splitlines()}
    except (OSError, ValueError, Unusable) as error:
        raise DataError(f"{classes} cannot be read as a list of classes: {error}") from error
    return {name for name in names.values() if PurePosixPath(name).parent.name in listed}


def _read(images: Path, captions: Path, name: str) -> Iterator[RawPair | Broken]:
    if ".." in PurePosixPath(name).parts or PurePosixPath(name).is_absolute():
        yield Broken(name, UNREADABLE)
        return
    try:
        text = read_file((captions / name).with_suffix(".txt"), MAX_TEXT_BYTES).decode()
    except FileNotFoundError:
        yield Broken(name, NO_CAPTION)
        return
    except Unusable as error:
        yield Broken(name, error.reason)
        return
    except (OSError, ValueError):
        yield Broken(name, UNREADABLE)
        return
    lines = [line.strip() for line in text.splitlines()]
    yield from read_picture(images / name, list(dict.fromkeys(line for line in lines if line)), name)
