"""Sets that text-to-image models are measured on, from local copies: COCO captions and Caltech-UCSD Birds.

COCO (Chen et al., 2015): COCO/annotations/captions_val2014.json beside COCO/val2014/*.jpg. DALL·E takes 30,000 captions of its
validation part (Fig. 9).

CUB-200-2011 (Wah et al., 2011) with the captions of Reed et al. (2016), ten to an image:

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
from typing import Any

from dalle_ds.data import reasons
from dalle_ds.data.corpora import files
from dalle_ds.data.corpora.pairs import Broken, Corpus, RawPair, Unit, Unpaired, Unusable
from dalle_ds.errors import DataError
from dalle_ds.parsing import is_text, parse_json, shown

_ANNOTATION_BYTES = 2**30
_PREFIX = "captions_"
_CAPTIONS_NAME = "text_c10"


def read_coco(source: str) -> Corpus:
    """Images with all their captions (five, mostly), in the order of the annotation file.

    `source` is a file `annotations/captions_PART.json`, whose images lie in the folder PART beside `annotations`, or the
    folder of both, where it has one such file; `DataError` where there are none, or several.
    """
    file = _annotation_file(files.existing(source))
    folder = file.parent.parent / file.stem.removeprefix(_PREFIX)
    if not folder.is_dir():
        raise DataError(f"{file} describes the images of a folder {folder}, which does not exist: unpack them there")
    return Corpus(partial(_coco_units, file, folder))


def _annotation_file(path: Path) -> Path:
    if path.is_file():
        return path
    folder = path / "annotations" if (path / "annotations").is_dir() else path
    found = sorted(folder.glob(f"{_PREFIX}*.json"))
    if len(found) != 1:
        names = ", ".join(file.name for file in found) or "none"
        raise DataError(f"{folder} must have one {_PREFIX}PART.json, found {names}: name the file itself as the source")
    return found[0]


def _coco_units(file: Path, folder: Path) -> Iterator[Unit]:
    try:
        content = parse_json(files.read_file(file, _ANNOTATION_BYTES))
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
        try:
            number, name = image["id"], image["file_name"]
            reason = reasons.SAME_ID if number in names else None if is_text(name) and name else reasons.NO_IMAGE
            if is_text(name):
                listed.add(Path(name).name)
        except (KeyError, TypeError):
            reason = reasons.UNREADABLE
        if reason is None:
            names[number] = name
        else:
            bad.append(Broken(f"{file.name} image {place}", reason))
    for number, name in names.items():
        # The name alone: an annotation file does not choose what else is read.
        yield Unit.of_pair(name, files.pair_of_file, folder / Path(name).name, captions.pop(number, []), name)
    bad += [Broken(f"{file.name} captions of image {shown(number)}", reasons.NO_IMAGE) for number in captions]
    yield from map(Unit.of, bad)
    yield files.others(lambda: (entry for entry in files.walk(folder) if entry.name not in listed))


def read_cub(source: str) -> Corpus:
    """Images of the test part, which DALL·E is measured on (Fig. 9), with their captions, in the order of `images.txt`.
    `source` is the folder CUB_200_2011; `DataError` where something of the layout is missing or damaged, or the part is empty.
    """
    folder = files.existing(source)
    captions = next(
        (place / _CAPTIONS_NAME for place in (folder, folder.parent) if (place / _CAPTIONS_NAME).is_dir()), None
    )
    if captions is None:
        raise DataError(f"{folder} has no captions: unpack {_CAPTIONS_NAME} of Reed et al. there or beside it")
    names, bad = _cub_table(folder / "images.txt")
    test, of_neither = _test_images(folder, captions, names)
    if not test:
        raise DataError(f"{folder} has no images of its test part: {len(names)} are listed in images.txt")

    def units() -> Iterator[Unit]:
        for name in filter(test.__contains__, names.values()):
            yield Unit.of_pair(name, _cub_pair, folder / "images", captions, name)
        yield from map(Unit.of, bad)
        yield from (Unit.of(Broken(name, reasons.NOT_LISTED)) for name in names.values() if name in of_neither)
        of_training = sum(name not in test and name not in of_neither for name in names.values())
        if of_training:
            yield Unit.of(Unpaired("images.txt", reasons.OTHER_PART, of_training))
        read = {folder / "images.txt", folder / "train_test_split.txt", folder / "testclasses.txt"}
        for name in names.values():
            read |= {folder / "images" / name, _caption_file(captions, name)}
        places = (folder,) if captions.is_relative_to(folder) else (folder, captions)
        yield files.others(lambda: (entry for place in places for entry in files.walk(place) if entry.path not in read))

    return Corpus(units)


def _cub_table(path: Path) -> tuple[dict[str, str], list[Broken]]:
    """Lines of "number value"."""
    values: dict[str, str] = {}
    bad: list[Broken] = []
    for place, line in enumerate(_cub_lines(path), start=1):
        number, _, value = line.strip().partition(" ")
        if value and number not in values:
            values[number] = value.strip()
        elif line.strip():
            bad.append(Broken(f"{path.name} line {place}", reasons.BAD_LINE))
    return values, bad


def _cub_lines(path: Path) -> list[str]:
    try:
        return files.lines_of(files.read_file(path, 100 * files.MAX_TEXT_BYTES))
    except Unusable as error:
        raise DataError(f"{path} cannot be read as a table of CUB-200-2011: {error}") from error


def _test_images(folder: Path, captions: Path, names: dict[str, str]) -> tuple[set[str], set[str]]:
    """Names of the images of the test part, and of those of which nobody says which part they belong to."""
    classes = captions.parent / "testclasses.txt"
    if classes.is_file():
        listed = {line.strip() for line in _cub_lines(classes)}
        return {name for name in names.values() if PurePosixPath(name).parent.name in listed}, set()
    is_train, _ = _cub_table(folder / "train_test_split.txt")
    test = {name for number, name in names.items() if is_train.get(number) == "0"}
    return test, {name for number, name in names.items() if is_train.get(number) not in ("0", "1")}


def _caption_file(captions: Path, name: str) -> Path:
    return captions / f"{name.removesuffix(PurePosixPath(name).suffix)}.txt"


def _cub_pair(images: Path, captions: Path, name: str) -> RawPair:
    if ".." in PurePosixPath(name).parts or PurePosixPath(name).is_absolute():
        raise Unusable(reasons.UNREADABLE)
    lines = files.lines_of(files.read_file(_caption_file(captions, name), files.MAX_TEXT_BYTES, reasons.NO_CAPTION))
    return files.pair_of_file(images / name, lines, name)
