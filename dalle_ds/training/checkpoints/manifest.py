"""The checkpoints of a run on the disk: which there are, which of them is resumed, which are kept.

A checkpoint is complete or absent: it is written as `partial-step-N`, forced to the disk, and renamed
to `step-N`. What is removed is renamed first, so that no half of it is ever taken for a whole. A complete checkpoint that
has been damaged since is called `damaged-step-N`, and left for whoever wants to look at it until the next one is written.
`latest` has the name of the newest; it is for people and scripts, and no decision here trusts it.

`manifest.json` is written last. It names every other file with its length and digest, and has a digest of its own, so that
a file that was cut off, overwritten, lost or in which one bit has changed is told from a good one, the manifest included.
"""

from __future__ import annotations

import json
import re
import shutil
import socket
from collections.abc import Iterable, Mapping
from contextlib import suppress
from dataclasses import dataclass
from functools import partial
from pathlib import Path, PurePosixPath
from typing import Any, NamedTuple

import xxhash

from dalle_ds.errors import CheckpointError
from dalle_ds.files import digest_of, sync_directory, sync_folder, write_text
from dalle_ds.parallel import Mesh
from dalle_ds.training.checkpoints.content import FORMAT, STATE_NAME, load_state, other_version

MANIFEST_NAME = "manifest.json"
LATEST_NAME = "latest"
_STEP = re.compile(r"step-(0|[1-9]\d*)")
_PARTIAL, _REMOVED, _REPLACED, _DAMAGED = "partial-", "removed-", "replaced-", "damaged-"


class FileRecord(NamedTuple):
    """A file as it was written: bytes, and XXH3 of 128 bits, hexadecimal (against accidents, not against forgery)."""

    size: int
    digest: str


@dataclass(frozen=True)
class Manifest:
    """The files of a checkpoint."""

    step: int
    """Updates that it has seen."""
    files: Mapping[str, FileRecord]
    """By path within the checkpoint, with "/" between folders."""
    format: int = FORMAT

    def write(self, folder: Path) -> None:
        """Put it into `folder`, not yet forced to the disk."""
        (folder / MANIFEST_NAME).write_text(self._text())

    @classmethod
    def read(cls, folder: Path) -> Manifest:
        """That of a checkpoint, byte for byte as it was written.

        CheckpointError where it is missing or is not; OSError where it may be, but cannot be read here and now.
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
        """A sentence for each of these files, or of all, that is not as it was written.

        Without `contents`, only lengths are looked at. OSError where a file cannot be read here and now.
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
        content: dict[str, Any] = {"format": self.format, "step": self.step, "files": dict(self.files)}
        content["digest"] = xxhash.xxh3_128_hexdigest(json.dumps(content).encode())
        return json.dumps(content, indent=1) + "\n"


def record_of(path: Path) -> FileRecord:
    """What a manifest says of a file that has just been written."""
    return FileRecord(path.stat().st_size, digest_of(path))


def _leaves(name: str) -> bool:
    """Whether a path leads out of its folder."""
    path = PurePosixPath(name)
    return path.is_absolute() or ".." in path.parts or not path.parts


class CheckpointFolder:
    """`RUN_DIR/checkpoints`, which may not exist yet. Only the main process changes it."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def all(self) -> list[Path]:
        """Checkpoints, oldest first, whether they are as they were written or not."""
        if not self.path.is_dir():
            return []
        found = [path for path in self.path.iterdir() if _STEP.fullmatch(path.name) and path.is_dir()]
        return sorted(found, key=step_of)

    def newest(self) -> Path | None:
        """The latest one whose manifest, and the lengths of whose files, are as they were written."""
        return next((path for path in reversed(self.all()) if not faults_of(path, contents=False)), None)

    def newest_good(self, mesh: Mesh) -> Path | None:
        """The latest one that is as it was written, and not from the midst of updates that went wrong, as the last of a run
        may be; CheckpointError where some process cannot read one. Collective."""
        for checkpoint in mesh.decide(lambda: [path for path in reversed(self.all()) if _is_good(path)]):
            if not faults_found_by_all(checkpoint, mesh):
                return checkpoint
        return None

    def damaged(self) -> list[Path]:
        """Those that were set aside."""
        return sorted(self.path.glob(f"{_DAMAGED}*"))

    def begin(self, step: int) -> Path:
        """An empty folder in which a checkpoint can be written; OSError where it cannot be made."""
        unfinished = self.path / f"{_PARTIAL}step-{step}"
        shutil.rmtree(unfinished, ignore_errors=True)
        unfinished.mkdir(parents=True)
        return unfinished

    def complete(self, unfinished: Path, manifest: Manifest) -> Path:
        """Make what `begin` returned, with all its files, a checkpoint; OSError where it cannot be done."""
        manifest.write(unfinished)
        sync_folder(unfinished)
        final = unfinished.with_name(unfinished.name.removeprefix(_PARTIAL))
        replaced = final.with_name(f"{_REPLACED}{final.name}")
        if final.exists():
            shutil.rmtree(replaced, ignore_errors=True)
            final.rename(replaced)
        unfinished.rename(final)
        sync_directory(self.path)
        shutil.rmtree(replaced, ignore_errors=True)
        self._name_latest()
        return final

    def prune(self, keep: int, keep_every: int | None = None) -> None:
        """Remove all but the newest `keep` good ones, those newer than these, and the first at or after each multiple of
        `keep_every` updates; and those that were set aside. What cannot be removed stays."""
        checkpoints = self.all()
        milestones: dict[int, Path] = {}
        if keep_every is not None:
            for checkpoint in checkpoints:
                milestones.setdefault(step_of(checkpoint) // keep_every, checkpoint)
            milestones.pop(0, None)
        good = 0
        for checkpoint in reversed(checkpoints):
            if good >= keep and checkpoint not in milestones.values():
                self._remove(checkpoint)
            else:
                good += _is_good(checkpoint) and not faults_of(checkpoint, contents=False)
        for checkpoint in self.damaged():
            self._remove(checkpoint)

    def drop_after(self, step: int) -> None:
        """Remove the checkpoints of updates beyond `step`, which a run that went back there must not be resumed from;
        CheckpointError where one cannot be removed."""
        for checkpoint in self.all():
            if step_of(checkpoint) > step:
                self._remove(checkpoint)
                if checkpoint.exists():
                    raise CheckpointError(f"{checkpoint} cannot be removed: remove it, and start the run again")
        self._name_latest()

    def set_aside(self, checkpoint: Path, faults: list[str]) -> None:
        """Give a damaged checkpoint a name that it is not resumed under, and say so; CheckpointError where that fails."""
        aside = checkpoint.with_name(f"{_DAMAGED}{checkpoint.name}")
        try:
            if aside.exists():
                self._remove(aside)
            checkpoint.rename(aside)
        except OSError as error:
            raise CheckpointError(f"{checkpoint} is damaged and cannot be renamed: {error}") from error
        self._name_latest()
        others = f" (and {len(faults) - 1} more)" if len(faults) > 1 else ""
        print(f"{checkpoint.name} is damaged and was renamed to {aside.name}: {faults[0]}{others}", flush=True)

    def clear(self) -> None:
        """Remove what killed runs left unfinished, or had not removed to the end."""
        for replaced in self.path.glob(f"{_REPLACED}*"):
            final = replaced.with_name(replaced.name.removeprefix(_REPLACED))
            if not final.exists():  # killed between two renames
                with suppress(OSError):
                    replaced.rename(final)
        for prefix in (_PARTIAL, _REMOVED, _REPLACED, "."):
            for unfinished in self.path.glob(f"{prefix}*"):
                if unfinished.is_dir():
                    shutil.rmtree(unfinished, ignore_errors=True)
                else:
                    unfinished.unlink(missing_ok=True)

    def _name_latest(self) -> None:
        with suppress(OSError):  # a checkpoint is there without it
            newest = self.all()[-1:]
            write_text(self.path / LATEST_NAME, "".join(f"{checkpoint.name}\n" for checkpoint in newest))

    def _remove(self, checkpoint: Path) -> None:
        doomed = checkpoint.with_name(f"{_REMOVED}{checkpoint.name}")
        shutil.rmtree(doomed, ignore_errors=True)
        with suppress(OSError):
            checkpoint.rename(doomed)
            shutil.rmtree(doomed, ignore_errors=True)


def step_of(checkpoint: Path) -> int:
    """The updates that a checkpoint has seen, by its name."""
    return int(checkpoint.name.removeprefix("step-"))


def faults_of(checkpoint: Path, *, contents: bool = True) -> list[str]:
    """A sentence for everything about a checkpoint that is not as it was written, or cannot be read.

    Of files, without `contents`, only the lengths are looked at.
    """
    try:
        return _manifest_of(checkpoint).faults(checkpoint, contents=contents)
    except OSError as error:
        return [str(_unreadable(checkpoint, error))]
    except CheckpointError as error:
        return [str(error)]


def require_whole(checkpoint: Path) -> None:
    """Read all of a checkpoint; CheckpointError where it is not as it was written, or is of another version."""
    _check_version(checkpoint)
    faults = faults_of(checkpoint)
    if faults:
        raise CheckpointError(f"the checkpoint {checkpoint} is damaged: {faults[0]}; remove it to take an older one")


def choose_checkpoint(folder: CheckpointFolder, mesh: Mesh) -> Path | None:
    """The checkpoint that a run goes on from: the latest that is as it was written to the last bit, or None in a new run.

    Later ones that are not are set aside, with a line on each. The processes share the reading. Collective.

    Raises:
        CheckpointError: none of those that there are is as it was written; they are of another version; or one cannot be read
            by all processes, which says nothing of the checkpoint.
    """
    mesh.decide(lambda: _tell_lost(folder))
    while (checkpoint := mesh.decide(lambda: next(reversed(folder.all()), None))) is not None:
        faults = faults_found_by_all(checkpoint, mesh)
        if not faults:
            return checkpoint
        mesh.decide(partial(folder.set_aside, checkpoint, faults))
    damaged = mesh.decide(folder.damaged)
    if damaged:
        raise CheckpointError(
            f"all checkpoints in {folder.path} are damaged ({', '.join(path.name for path in damaged)}): put a good copy of "
            "one back under its name, step-N; or delete these to begin again from the first update"
        )
    return None


def faults_found_by_all(checkpoint: Path, mesh: Mesh) -> list[str]:
    """`faults_of`, each process reading some of the files; CheckpointError where it is of another version, or some process
    cannot read it. Collective."""

    def look() -> tuple[Manifest | None, list[str]]:
        _check_version(checkpoint)
        try:
            manifest = _manifest_of(checkpoint)
            return manifest, manifest.faults(checkpoint, contents=False)
        except OSError as error:
            raise _unreadable(checkpoint, error) from error
        except CheckpointError as error:
            return None, [str(error)]

    manifest, faults = mesh.decide(look)
    if faults or manifest is None:
        return faults
    by_size = sorted(manifest.files, key=lambda name: manifest.files[name].size)
    own: list[str] | CheckpointError
    try:
        for name in manifest.files if not mesh.is_main else ():
            (checkpoint / name).stat()  # the main process has seen it
        own = manifest.faults(checkpoint, by_size[mesh.rank :: mesh.world_size])
    except OSError as error:
        own = _unreadable(checkpoint, error)
    for found in mesh.gather_objects(own):
        if isinstance(found, CheckpointError):
            raise found
        faults += found
    return faults


def _unreadable(checkpoint: Path, error: OSError) -> CheckpointError:
    return CheckpointError(
        f"the checkpoint {checkpoint} cannot be read on {socket.gethostname()} ({error}): it must lie where all processes can "
        "read it; move it away to go on from the one before"
    )


def _manifest_of(checkpoint: Path) -> Manifest:
    manifest = Manifest.read(checkpoint)
    name = _STEP.fullmatch(checkpoint.name)  # a copy may be called anything
    if name is not None and manifest.step != int(name[1]):
        raise CheckpointError(f"{checkpoint} has been renamed: its manifest is of step {manifest.step}")
    if STATE_NAME not in manifest.files:
        raise CheckpointError(f"{checkpoint / MANIFEST_NAME} names no {STATE_NAME}")
    return manifest


def _check_version(checkpoint: Path) -> None:
    """Refuse a checkpoint of another version, which is not damaged, and must not be taken for it."""
    found: Any = FORMAT
    with suppress(OSError, ValueError, RecursionError, CheckpointError):
        if (checkpoint / MANIFEST_NAME).exists():
            found = Manifest.read(checkpoint).format
        else:
            state = json.loads((checkpoint / STATE_NAME).read_text())
            found = state.get("format") if isinstance(state, dict) and "step" in state else FORMAT
    if found != FORMAT:
        raise other_version(checkpoint, found)


def _is_good(checkpoint: Path) -> bool:
    """Whether a checkpoint can be read and is not from the midst of updates that went wrong."""
    try:
        guard = load_state(checkpoint).get("guard")
        return guard is None or guard["bad_in_a_row"] == 0
    except (CheckpointError, KeyError, TypeError):
        return False


def _tell_lost(folder: CheckpointFolder) -> None:
    """A line where the newest checkpoint, by `latest`, is not there any more."""
    try:
        name = (folder.path / LATEST_NAME).read_text().strip()
    except (OSError, ValueError):
        return
    newest = next(reversed(folder.all()), None)
    if _STEP.fullmatch(name) and (newest is None or step_of(newest) < step_of(folder.path / name)):
        found = "there is none" if newest is None else f"the newest there is {newest.name}"
        print(f"{folder.path} had a checkpoint {name}, which is gone: {found}", flush=True)
