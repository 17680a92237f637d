"""What lies in the folder of a source, so that every file of it is read or told of."""

from __future__ import annotations

import os
from collections.abc import Iterable, Iterator
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path, PurePosixPath

from dalle_ds.data.corpora.pairs import LINK_TO_NOTHING, NOT_A_FILE, NOT_LISTED, Unit, Unpaired, told
from dalle_ds.data.images import image_suffixes, other_image_suffixes

OTHER = "file that is not read"
FORMAT = "image format that is not read"
ARCHIVE = "archive that is not opened"
SYSTEM = "metadata of an operating system"
LOOP = "folder that is read by another path"
NO_ENTRY = "folder that cannot be read"

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

    def unpaired(self, reason: str = OTHER) -> Unpaired:
        """That it belongs to no pair, for this reason where there is no better one."""
        leads_nowhere = self.path.is_symlink() and not self.path.exists()
        problem = LINK_TO_NOTHING if leads_nowhere else self.problem
        return Unpaired(self.name, problem or unpaired_reason(self.name, reason))


def walk(folder: Path) -> list[Found]:
    """Every file in a folder and its subfolders, in the order of their paths. Links are followed, to each folder once."""
    found: list[Found] = []

    def add(path: Path, problem: str | None = None) -> None:
        name = str(path.relative_to(folder))
        is_other = is_image(name) and not is_system(name) and suffix_of(name) not in image_suffixes()
        found.append(Found(path, name, problem or (FORMAT if is_other else None)))

    root = folder.resolve()
    seen: set[tuple[int, int | Path]] = set()
    for place, folders, files in os.walk(
        folder, onerror=lambda error: add(Path(error.filename or folder), NO_ENTRY), followlinks=True
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
                add(path, NOT_A_FILE if is_image(name) else LOOP)
        folders.sort()  # which of two links to a folder is followed depends on names alone
        for name in files:
            add(Path(place, name))
    return sorted(found, key=lambda entry: entry.path)


def suffix_of(name: str) -> str:
    """The suffix of a file's name, in lower case."""
    return PurePosixPath(name).suffix.lower()


def is_image(name: str) -> bool:
    """Whether a file's name is that of a picture, in a format that is read or not."""
    suffix = suffix_of(name)
    return suffix in image_suffixes() or suffix in other_image_suffixes()


def is_read(name: str) -> bool:
    """Whether it is a picture in a format that is read."""
    return suffix_of(name) in image_suffixes() and not is_system(name)


def is_system(name: str) -> bool:
    """Whether it is something that macOS or Windows leave beside other files."""
    path = PurePosixPath(name)
    return path.name.startswith("._") or path.name.lower() in _SYSTEM or "__MACOSX" in path.parts


def unpaired_reason(name: str, reason: str = OTHER) -> str:
    """Why a file or member of an archive belongs to no pair; `reason` where its name does not tell."""
    if is_system(name):
        return SYSTEM
    return ARCHIVE if suffix_of(name) in _PACKED else reason


def not_listed(found: Iterable[Found]) -> Iterator[Unit]:
    """Files beside a table that it does not name."""
    return (told(entry.unpaired(NOT_LISTED if is_image(entry.name) else OTHER)) for entry in found)
