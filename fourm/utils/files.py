"""Writes that an interruption cannot leave half done."""

from __future__ import annotations

import contextlib
import errno
import fcntl
import os
import shutil
from collections.abc import Iterator
from pathlib import Path

from fourm.utils.errors import UserError


@contextlib.contextmanager
def atomic_path(path: str | Path) -> Iterator[Path]:
    """Yield a temporary path beside ``path``; it takes ``path``'s place only if the block ends without an error.

    Works for files and for folders: write to what is yielded. An existing folder at ``path`` is replaced.
    """
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    # The suffix is kept last: writers such as PIL choose the format by it.
    temporary = path.with_name(f".tmp-{os.getpid()}-{path.name}")
    _remove(temporary)  # of a killed process, whose number this one has: in containers numbers are often the same
    try:
        yield temporary
        _sync(temporary)
        if path.is_dir():
            shutil.rmtree(path)
        os.replace(temporary, path)
        _sync(path.parent, recurse=False)
    finally:
        _remove(temporary)


def lock_folder(folder: str | Path) -> None:
    """Make ``folder`` this process's own until it ends; on disks without locks this does nothing.

    Raises:
        UserError: another process has it.
    """
    descriptor = os.open(Path(folder) / ".lock", os.O_RDWR | os.O_CREAT)
    try:
        # A POSIX lock is the process's, not the file's: child processes do not keep it.
        fcntl.lockf(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError as error:
        os.close(descriptor)
        if error.errno in (errno.EACCES, errno.EAGAIN):
            raise UserError(f"{folder} is in use by another process: wait for it, or choose another folder") from None


@contextlib.contextmanager
def locked(path: str | Path) -> Iterator[None]:
    """Let one thread or process after the other in; ``path`` is a file for nothing else, made if it is not there."""
    with open(path, "ab") as file:
        fcntl.flock(file, fcntl.LOCK_EX)
        yield


def _remove(path: Path) -> None:
    if path.is_dir():
        shutil.rmtree(path, ignore_errors=True)
    else:
        path.unlink(missing_ok=True)


def _sync(path: Path, recurse: bool = True) -> None:
    """Force ``path`` to the disk, so that a power cut cannot keep the new name with old content."""
    if path.is_dir() and recurse:
        for child in path.rglob("*"):
            if child.is_file():
                _sync(child)
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
