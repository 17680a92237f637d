"""Caltech-UCSD Birds 200-2011 (Wah et al., 2011) with the captions of Reed et al. (2016), ten to an image, from a local copy.

    CUB_200_2011/images.txt              "1 001.Black_footed_Albatross/Black_Footed_Albatross_0046_18796.jpg"
    CUB_200_2011/train_test_split.txt    "1 0": image 1 is not of the training part
    CUB_200_2011/images/001.Black_…/Black_…_18796.jpg
    …/text_c10/001.Black_…/Black_…_18796.txt      one caption per line; inside of CUB_200_2011 or beside it
    …/testclasses.txt                    beside text_c10, where there is one: "001.Black_footed_Albatross"

Papers on generation call the images of the test classes (50 of 200) the test set, those on classification those of
`train_test_split.txt`, which has images of all classes on both sides. Where `testclasses.txt` lies beside the captions, it
decides.
"""

from __future__ import annotations

from collections.abc import Iterator
from functools import partial
from pathlib import Path, PurePosixPath

from dalle_ds.data import reasons
from dalle_ds.data.corpora.files import MAX_TEXT_BYTES, existing, file_pair, lines_of, others, read_file, walk
from dalle_ds.data.corpora.pairs import Broken, Corpus, RawPair, Unit, Unpaired, Unusable, told
from dalle_ds.errors import DataError

CAPTIONS_NAME = "text_c10"


def read_cub(source: str) -> Corpus:
    """Images of the test part, which DALL·E is measured on (Fig. 9), with their captions, in the order of `images.txt`.

    Args:
        source: the folder CUB_200_2011.

    Raises:
        DataError: a file or folder of the layout is missing or damaged, or the part is empty.
    """
    folder = existing(source)
    captions = next(
        (place for place in (folder / CAPTIONS_NAME, folder.parent / CAPTIONS_NAME) if place.is_dir()), None
    )
    if captions is None:
        raise DataError(f"{folder} has no captions: unpack {CAPTIONS_NAME} of Reed et al. there or beside it")
    names, bad = _table(folder / "images.txt")
    test, of_neither = _test_pictures(folder, captions, names)
    if not test:
        raise DataError(f"{folder} has no images of its test part: {len(names)} are listed in images.txt")

    def units() -> Iterator[Unit]:
        for name in filter(test.__contains__, names.values()):
            yield Unit(name, partial(_read, folder / "images", captions, name))
        yield from map(told, bad)
        yield from (told(Broken(name, reasons.NOT_LISTED)) for name in names.values() if name in of_neither)
        of_training = sum(name not in test and name not in of_neither for name in names.values())
        if of_training:
            yield told(Unpaired("images.txt", reasons.OTHER_PART, of_training))
        read = {folder / "images.txt", folder / "train_test_split.txt", folder / "testclasses.txt"}
        for name in names.values():
            read |= {folder / "images" / name, _caption_file(captions, name)}
        places = (folder,) if captions.is_relative_to(folder) else (folder, captions)
        yield others(lambda: (entry for place in places for entry in walk(place) if entry.path not in read))

    return Corpus(units)


def _table(path: Path) -> tuple[dict[str, str], list[Broken]]:
    """Lines of "number value"."""
    values: dict[str, str] = {}
    bad: list[Broken] = []
    for place, line in enumerate(_lines(path), start=1):
        number, _, value = line.strip().partition(" ")
        if value and number not in values:
            values[number] = value.strip()
        elif line.strip():
            bad.append(Broken(f"{path.name} line {place}", reasons.BAD_LINE))
    return values, bad


def _lines(path: Path) -> list[str]:
    try:
        return lines_of(read_file(path, 100 * MAX_TEXT_BYTES))
    except Unusable as error:
        raise DataError(f"{path} cannot be read as a table of CUB-200-2011: {error}") from error


def _test_pictures(folder: Path, captions: Path, names: dict[str, str]) -> tuple[set[str], set[str]]:
    """Names of the images of the test part, and of those of which nobody says which part they belong to."""
    classes = captions.parent / "testclasses.txt"
    if classes.is_file():
        listed = {line.strip() for line in _lines(classes)}
        return {name for name in names.values() if PurePosixPath(name).parent.name in listed}, set()
    is_train, _ = _table(folder / "train_test_split.txt")
    test = {name for number, name in names.items() if is_train.get(number) == "0"}
    return test, {name for number, name in names.items() if is_train.get(number) not in ("0", "1")}


def _caption_file(captions: Path, name: str) -> Path:
    return captions / f"{name.removesuffix(PurePosixPath(name).suffix)}.txt"


def _read(images: Path, captions: Path, name: str) -> Iterator[RawPair | Broken]:
    if ".." in PurePosixPath(name).parts or PurePosixPath(name).is_absolute():
        yield Broken(name, reasons.UNREADABLE)
        return
    try:
        lines = lines_of(read_file(_caption_file(captions, name), MAX_TEXT_BYTES, reasons.NO_CAPTION))
        yield file_pair(images / name, lines, name)
    except Unusable as error:
        yield Broken(name, error.reason)
