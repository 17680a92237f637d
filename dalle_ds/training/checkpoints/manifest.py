"""What a checkpoint's files are, to the byte: without its manifest a checkpoint does not exist, and with one it is whole.

`manifest.json` is written last. It names every other file with its length and digest, and has a digest of its own, so that
a file that was cut off, overwritten, lost or in which one bit has changed is told from a good one, the manifest included.
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path, PurePosixPath
from typing import Any

import xxhash

from dalle_ds.errors import CheckpointError

FORMAT = 3
"""Of checkpoints. Those of format 2 had no manifest; those before had no number, and were of use to one layout only."""
MANIFEST_NAME = "manifest.json"
_CHUNK_BYTES = 2**24


@dataclass(frozen=True)
class FileRecord:
    """A file as it was written."""

    size: int
    """Bytes."""
    digest: str
    """XXH3 of 128 bits, hexadecimal: against accidents, at the speed of memory; not against forgery."""


@dataclass(frozen=True)
class Manifest:
    """The files of a checkpoint."""

    step: int
    """Updates that it has seen."""
    files: Mapping[str, FileRecord]
    """By path within the checkpoint, with "/" between folders."""
    format: int = FORMAT
    """`FORMAT` of the version that wrote it."""

    def write(self, folder: Path) -> None:
        """Put it into `folder`, not yet forced to the disk."""
        (folder / MANIFEST_NAME).write_text(self._text())

    @classmethod
    def read(cls, folder: Path) -> Manifest:
        """That of a checkpoint, byte for byte as it was written.

        Raises:
            CheckpointError: it is missing or is not.
            OSError: it may be, but cannot be read here and now.
        """
        path = folder / MANIFEST_NAME
        try:
            text = path.read_bytes().decode()
            content = json.loads(text)
            files = {name: FileRecord(*record) for name, record in content["files"].items()}
            manifest = cls(content["step"], files, content["format"])
            whole = text == manifest._text() and not any(map(_leaves, files))
        except FileNotFoundError as error:
            raise CheckpointError(f"{path} is missing") from error
        except (ValueError, KeyError, TypeError, AttributeError, RecursionError):
            whole = False
        if not whole:
            raise CheckpointError(f"{path} is not as it was written")
        return manifest

    def faults(self, folder: Path, names: Iterable[str] | None = None, *, contents: bool = True) -> list[str]:
        """A sentence for every file that is not as it was written.

        Args:
            names: files to look at; None takes all.
            contents: whether to read them; their lengths are always looked at.

        Raises:
            OSError: one may be, but cannot be read here and now.
        """
        found = []
        for name in self.files if names is None else names:
            path, record = folder / name, self.files[name]
            try:
                size = path.stat().st_size
            except FileNotFoundError:
                found.append(f"{path} is missing")
                continue
            if size != record.size:
                found.append(f"{path} has {size:,} bytes, and had {record.size:,} when it was written")
            elif contents and digest_of(path) != record.digest:
                found.append(f"{path} has other contents than when it was written")
        return found

    def _text(self) -> str:
        content: dict[str, Any] = {
            "format": self.format,
            "step": self.step,
            "files": {name: [record.size, record.digest] for name, record in self.files.items()},
        }
        content["digest"] = xxhash.xxh3_128_hexdigest(json.dumps(content).encode())
        return json.dumps(content, indent=1) + "\n"


def digest_of(path: Path) -> str:
    """The digest of a file's contents."""
    digest = xxhash.xxh3_128()
    with path.open("rb", buffering=0) as file:
        buffer = memoryview(bytearray(_CHUNK_BYTES))
        while count := file.readinto(buffer):
            digest.update(buffer[:count])
    return digest.hexdigest()


def record_of(path: Path) -> FileRecord:
    """What a manifest says of a file that has just been written."""
    return FileRecord(path.stat().st_size, digest_of(path))


def _leaves(name: str) -> bool:
    """Whether a path leads out of its folder."""
    path = PurePosixPath(name)
    return path.is_absolute() or ".." in path.parts or not path.parts
