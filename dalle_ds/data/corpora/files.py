"""What lies in the folder of a source, so that every file of it is read or told of; and reading files of it."""

from __future__ import annotations

import codecs
import io
import os
from collections.abc import Callable, Iterable
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path, PurePosixPath
from typing import Any

from dalle_ds.data import reasons
from dalle_ds.data.corpora.pairs import Broken, RawPair, Unit, Unpaired, Unusable, or_broken
from dalle_ds.data.images import image_suffixes, other_image_suffixes
from dalle_ds.errors import DataError
from dalle_ds.parsing import parse_json

MAX_IMAGE_BYTES = 512 * 2**20
"""Of an encoded image."""
MAX_TEXT_BYTES = 2**20
"""Of a caption file, a line of a table, or a name in an archive."""
_PACKED = (".tar", ".tgz", ".gz", ".bz2", ".xz", ".zst", ".zip", ".7z", ".rar")
_SYSTEM = (".ds_store", "thumbs.db", "desktop.ini")


@dataclass(frozen=True)
class Found:
    """A file, or what stands in the place of one."""

    path: Path
    name: str
    """Relative to the folder that was looked through."""
    problem: str | None = None
    """Why it is not read, whatever it is."""

    def unpaired(self, reason: str = reasons.OTHER) -> Unpaired:
        """That it belongs to no pair, for this reason where there is no better one."""
        leads_nowhere = self.path.is_symlink() and not self.path.exists()
        problem = reasons.LINK_TO_NOTHING if leads_nowhere else self.problem
        return Unpaired(self.name, problem or unpaired_reason(self.name, reason))


def walk(folder: Path) -> list[Found]:
    """Every file in a folder and its subfolders, in the order of their paths. Links are followed, to each folder once."""
    found: list[Found] = []

    def add(path: Path, problem: str | None = None) -> None:
        name = str(path.relative_to(folder))
        is_other = is_image(name) and not is_system(name) and suffix_of(name) not in image_suffixes()
        found.append(Found(path, name, problem or (reasons.FORMAT if is_other else None)))

    root = folder.resolve()
    seen: set[tuple[int, int | Path]] = set()
    for place, folders, files in os.walk(
        folder, onerror=lambda error: add(Path(error.filename or folder), reasons.NO_ENTRY), followlinks=True
    ):
        for name in sorted(folders):
            path = Path(place, name)
            target = path.resolve()
            again = path.is_symlink() and (target.is_relative_to(root) or root.is_relative_to(target))
            with suppress(OSError):  # of which `walk` tells
                there = path.stat()
                key = there.st_dev, there.st_ino or target  # some file systems have no numbers
                again = again or key in seen
                seen |= set() if again else {key}
            if again:
                folders.remove(name)
            if again or is_image(name):
                add(path, reasons.NOT_A_FILE if is_image(name) else reasons.LOOP)
        folders.sort()  # which of two links to a folder is followed depends on names alone
        for name in files:
            add(Path(place, name))
    return sorted(found, key=lambda entry: entry.path)


def others(found: Callable[[], Iterable[Found]], of_images: str = reasons.NOT_LISTED) -> Unit:
    """Files beside those that are read, as one unit, since they are no work; images for the reason `of_images`."""
    return Unit(
        "other files",
        lambda: (entry.unpaired(of_images if is_image(entry.name) else reasons.OTHER) for entry in found()),
    )


def suffix_of(name: str) -> str:
    """The suffix of a file's name, in lower case."""
    return PurePosixPath(name).suffix.lower()


def is_image(name: str) -> bool:
    """Whether a file's name is that of an image, in a format that is read or not."""
    return suffix_of(name) in (*image_suffixes(), *other_image_suffixes())


def is_read(name: str) -> bool:
    """Whether it is an image in a format that is read."""
    return suffix_of(name) in image_suffixes() and not is_system(name)


def is_system(name: str) -> bool:
    """Whether it is something that macOS or Windows leave beside other files."""
    path = PurePosixPath(name)
    return path.name.startswith("._") or path.name.lower() in _SYSTEM or "__MACOSX" in path.parts


def unpaired_reason(name: str, reason: str = reasons.OTHER) -> str:
    """Why a file or member of an archive belongs to no pair; `reason` where its name does not tell."""
    if is_system(name):
        return reasons.SYSTEM
    return reasons.ARCHIVE if suffix_of(name) in _PACKED else reason


def existing(source: str) -> Path:
    """The path of a source; `DataError` where there is nothing."""
    path = Path(source)
    try:
        path.stat()
    except (FileNotFoundError, NotADirectoryError) as error:
        raise DataError(f"source {path} does not exist") from error
    except OSError as error:
        raise DataError(f"source {path} cannot be read: {error.strerror}") from error
    return path


def read_file(path: Path, limit: int, missing: str = reasons.NO_IMAGE) -> bytes:
    """A file's contents, `Unusable` where it cannot be read, or is not there, which has the reason `missing`. A pipe or device
    would never end, and so is refused, as is a file of more than `limit` bytes."""
    try:
        if path.exists() and not path.is_file():
            raise Unusable(reasons.NOT_A_FILE)
        with path.open("rb") as file:
            size = os.fstat(file.fileno()).st_size
            if size > limit:
                raise Unusable(reasons.TOO_BIG)
            return file.read(size + 1)  # no more, whatever the file becomes
    except (FileNotFoundError, NotADirectoryError) as error:
        raise Unusable(reasons.LINK_TO_NOTHING if path.is_symlink() else missing) from error
    except (OSError, ValueError) as error:  # ValueError: a NUL in the name
        raise Unusable(reasons.UNREADABLE) from error


def encoding_of(head: bytes) -> str:
    """How a text is encoded that begins with these four bytes: as its byte order mark says, else in UTF-8."""
    marks = {
        codecs.BOM_UTF8: "utf-8-sig",
        codecs.BOM_UTF32_LE: "utf-32",  # begins with the mark of UTF-16
        codecs.BOM_UTF32_BE: "utf-32",
        codecs.BOM_UTF16_LE: "utf-16",
        codecs.BOM_UTF16_BE: "utf-16",
    }
    return next((encoding for mark, encoding in marks.items() if head.startswith(mark)), "utf-8")


def lines_of(text: bytes) -> list[str]:
    """Captions, one in a line; `Unusable` where they are neither UTF-8 nor have a byte order mark."""
    try:
        decoded = text.decode(encoding_of(text[:4]))
    except UnicodeDecodeError as error:
        raise Unusable(reasons.ENCODING) from error
    # Not `splitlines`, which ends lines at characters that captions may have in them.
    return [line.removesuffix("\n") for line in io.StringIO(decoded, newline=None)]


def json_of(text: bytes) -> Any:
    """The value of a JSON document; `Unusable` where it is none."""
    try:
        return parse_json(text)
    except UnicodeDecodeError as error:
        raise Unusable(reasons.ENCODING) from error
    except ValueError as error:
        raise Unusable(reasons.BROKEN_JSON) from error


def pair_of_file(path: Path, captions: Any, name: str) -> RawPair:
    """`RawPair.of` an image file."""
    return RawPair.of(read_file(path, MAX_IMAGE_BYTES), captions, name)


def pair_of_row(folder: Path, file_name: Any, captions: Any, name: str) -> RawPair | Broken:
    """The pair of a row called `name`, which has the name of an image file, relative to `folder`, and one or more captions."""
    if not isinstance(file_name, str) or not file_name:
        return Broken(name, reasons.NO_IMAGE)
    return or_broken(f"{file_name} ({name})", pair_of_file, folder / file_name, captions, file_name)
