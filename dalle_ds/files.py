"""Files and folders that are whole or absent: written beside their place, forced to the disk, renamed; by one process."""

from __future__ import annotations

import datetime
import errno
import fcntl
import glob
import json
import os
import shutil
import socket
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

import xxhash

from dalle_ds.errors import DataError

_CHUNK_BYTES = 2**24


def write_bytes(path: Path, content: bytes) -> None:
    """Write a file whole or not at all; OSError where that fails."""
    beside = path.with_name(f".{path.name}.partial-{os.getpid()}")
    try:
        with beside.open("wb") as handle:
            handle.write(content)
            handle.flush()
            os.fsync(handle.fileno())
        beside.replace(path)
        sync_directory(path.parent)
    except OSError:
        with suppress(OSError):
            beside.unlink(missing_ok=True)
        raise


def write_text(path: Path, text: str) -> None:
    """`write_bytes` of UTF-8 text."""
    write_bytes(path, text.encode())


def write_json(path: Path, content: Any) -> None:
    """`write_bytes` of indented JSON."""
    write_text(path, json.dumps(content, indent=2, ensure_ascii=False) + "\n")


def digest_of(path: Path) -> str:
    """XXH3-128 of a file's contents, in hexadecimal; OSError where it cannot be read."""
    digest = xxhash.xxh3_128()
    with path.open("rb", buffering=0) as file:
        buffer = memoryview(bytearray(min(_CHUNK_BYTES, max(1, os.fstat(file.fileno()).st_size))))
        while count := file.readinto(buffer):
            digest.update(buffer[:count])
    return digest.hexdigest()


@contextmanager
def built_beside(folder: Path) -> Iterator[Path]:
    """A temporary folder that takes the name `folder` when the block ends well, and is removed when it does not.

    A folder of that name is replaced, and stays as it was if anything fails; callers check beforehand that it may be.
    Where a process is killed, the temporary folder is left: see `remove_leftovers`.
    """
    folder.parent.mkdir(parents=True, exist_ok=True)
    partial = Path(tempfile.mkdtemp(prefix=f".{folder.name}.partial-", dir=folder.parent))
    alive = os.open(partial, os.O_RDONLY)
    try:
        with suppress(OSError):  # not every file system has locks
            fcntl.flock(alive, fcntl.LOCK_SH)
        partial.chmod(0o777 & ~_umask())  # mkdtemp makes folders that only their owner may read
        yield partial
        replace_folder(partial, folder)
    finally:
        shutil.rmtree(partial, ignore_errors=True)
        os.close(alive)


def remove_leftovers(parent: Path, name: str | None = None) -> None:
    """Remove temporary folders of `built_beside` in `parent` whose processes were killed; those at work hold a lock.

    Args:
        name: what they were to become; None takes all.
    """
    names = "*" if name is None else glob.escape(name)
    for partial in parent.glob(f".{names}.partial-*"):
        with suppress(OSError):  # a file, another process was first, or no locks here
            found = os.open(partial, os.O_RDONLY | os.O_DIRECTORY)
            try:
                fcntl.flock(found, fcntl.LOCK_EX | fcntl.LOCK_NB)
                # First another name, so that nobody can take for whole what is half removed.
                partial.rename(partial.with_name(partial.name.replace(".partial-", ".removed-")))
            finally:
                os.close(found)
    for removed in parent.glob(f".{names}.removed-*"):
        shutil.rmtree(removed, ignore_errors=True)


@contextmanager
def only_process(target: Path, lock_name: str) -> Iterator[None]:
    """Keep other processes from making `target` meanwhile, where the file system has locks.

    Args:
        target: what is made, for the message.
        lock_name: of the file beside `target` that is locked, and says by whom; it is removed at the end.

    Raises:
        DataError: another process is making it.
    """
    path = target.parent / lock_name
    lock = _locked_file(target, path)
    try:
        yield
    finally:
        if lock is not None:
            with suppress(OSError):
                path.unlink()
            os.close(lock)


def _locked_file(target: Path, path: Path) -> int | None:
    """The open file, locked; None where that cannot be."""
    while True:
        try:
            path.parent.mkdir(parents=True, exist_ok=True)
            lock = os.open(path, os.O_RDWR | os.O_CREAT, 0o666)
        except OSError:  # what is to be written there fails, too, and says why
            return None
        try:
            # Of the kind that forked workers do not inherit: one that outlives this process must not hold it.
            fcntl.lockf(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
            if path.exists() and os.path.samestat(os.fstat(lock), path.stat()):
                now = datetime.datetime.now(datetime.timezone.utc).isoformat(timespec="seconds")
                os.ftruncate(lock, 0)
                os.write(lock, f"process {os.getpid()} on {socket.gethostname()} since {now}".encode())
                return lock
        except FileNotFoundError:
            pass
        except OSError as error:
            holder = os.read(lock, 1000).decode(errors="replace") or "another process"
            os.close(lock)
            if error.errno not in (errno.EACCES, errno.EAGAIN):
                return None
            raise DataError(
                f"{target} is being made by {holder}: wait for it, then the same command finds it done; or name another folder"
            ) from error
        os.close(lock)  # of another process, which has just removed it


def sync_folder(folder: Path) -> None:
    """Force all that is below `folder` to the disk, so that a rename never makes a half-written one look complete."""
    for path in sorted(folder.rglob("*")):
        if path.is_file():
            with path.open("rb") as handle:
                os.fsync(handle.fileno())
        elif path.is_dir():
            sync_directory(path)
    sync_directory(folder)


def sync_directory(folder: Path) -> None:
    """Force the names of what is in `folder` to the disk; without that, a renamed file may have its old name after a crash."""
    handle = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(handle)
    except OSError as error:
        if error.errno not in (errno.EINVAL, errno.ENOTSUP):  # what file systems say that cannot, and need not
            raise
    finally:
        os.close(handle)


def replace_folder(partial: Path, folder: Path) -> None:
    """Force all that is below `partial` to the disk, and give it the name `folder`; one of that name is removed then."""
    sync_folder(partial)
    if not folder.exists():
        partial.rename(folder)
        sync_directory(folder.parent)
        return
    old = Path(tempfile.mkdtemp(prefix=f".{folder.name}.old-", dir=folder.parent))
    folder.rename(old / folder.name)
    try:
        partial.rename(folder)
        sync_directory(folder.parent)
    except OSError:
        (old / folder.name).rename(folder)
        raise
    finally:
        shutil.rmtree(old, ignore_errors=True)


def _umask() -> int:
    mask = os.umask(0)
    os.umask(mask)
    return mask


@contextmanager
def disk_full_is_a_data_error(folder: Path, option: str = "") -> Iterator[None]:
    """Turns a failure to write, a full disk above all, into a `DataError` that names `folder`, and the option for another."""
    try:
        yield
    except OSError as error:
        if error.errno in (errno.ENOSPC, errno.EDQUOT):
            raise DataError(f"no space left on the disk of {folder}: free some, or write to another disk") from error
        other = f"name another folder{f' with {option}' if option else ''}"
        raise DataError(f"{folder} cannot be written ({error.strerror or error}): {other}") from error


@contextmanager
def unreadable_is_a_data_error(path: Path) -> Iterator[None]:
    """Turns a failure to read into a `DataError` that names `path`, whatever is being written meanwhile."""
    try:
        yield
    except OSError as error:
        raise DataError(f"{path} cannot be read: {error.strerror or error}") from error
