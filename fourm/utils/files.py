"""Writes that an interruption cannot leave half done, and that replace nothing but what the same writer made."""

from __future__ import annotations

import contextlib
import errno
import fcntl
import hashlib
import os
import re
import shutil
import stat
from collections.abc import Collection, Iterator
from fnmatch import fnmatchcase
from pathlib import Path
from typing import TYPE_CHECKING

from fourm.utils.errors import UserError, reason

if TYPE_CHECKING:
    from torch import Tensor

_LONGEST_NAME = 255  # bytes, on all common file systems
# Errors without a file's name that only writing causes.
_DISK_ERRORS = {errno.ENOSPC, errno.EDQUOT, errno.EFBIG, errno.EROFS}


@contextlib.contextmanager
def atomic_path(path: str | Path) -> Iterator[Path]:
    """Yield a temporary path beside ``path``; what is written there becomes the file ``path`` if the block ends without an error.

    A file at ``path`` is replaced, a symbolic link to a file too: what it points at stays as it is.

    Raises:
        UserError: as :func:`check_file`, or the disk is full.
    """
    path = Path(path)
    check_file(path)
    with _temporary(path) as temporary:
        yield temporary
        _sync(temporary)
        check_file(path)
        os.replace(temporary, path)


@contextlib.contextmanager
def atomic_folder(path: str | Path, own: Collection[str] = ()) -> Iterator[Path]:
    """Yield a new temporary folder beside ``path``, which takes its place if the block ends without an error.

    Args:
        own: patterns of the names of files that this writer makes. A folder at ``path`` is replaced only if it holds nothing
            else. Where such names are common, the caller first looks whether the files are its own, and passes none if not.

    Raises:
        UserError: as :func:`check_folder`, or the disk is full.
    """
    path = Path(path)
    check_folder(path, own)
    with _temporary(path) as temporary:
        temporary.mkdir()
        yield temporary
        _sync(temporary)
        check_folder(path, own)
        if path.exists():
            before = _beside(path, "old-")
            _remove(before)
            os.replace(path, before)
            try:
                os.replace(temporary, path)
            except OSError:
                os.replace(before, path)
                raise
            _remove(before)
        else:
            os.replace(temporary, path)


def check_file(path: str | Path) -> None:
    """See at the start whether a file can be written to ``path``, rather than after hours.

    Raises:
        UserError: a folder or a device is there, or a file that may not be written; or there is no way to it.
    """
    path = Path(path)
    with _sentences(path):
        _check_name(path)
        if path.is_dir():
            raise UserError(f"{path} is a folder: give the path of a file")
        if path.exists() and not path.is_file():
            raise UserError(f"{path} is not a file, but a device or a pipe: give the path of a file")
        _check_permission(path)
        _check_parent(path)


def check_folder(path: str | Path, own: Collection[str] = ()) -> None:
    """See at the start whether :func:`atomic_folder` can write to ``path``.

    Raises:
        UserError: a file or a symbolic link is there, or a folder with anything but ``own`` files; or there is no way to it.
    """
    path = Path(path)
    with _sentences(path):
        _check_name(path)
        if path.is_symlink():
            raise UserError(f"{path} is a symbolic link: give the folder itself, or remove the link")
        if path.exists() and not path.is_dir():
            raise UserError(f"{path} is a file: give the path of a folder")
        for entry in sorted(path.iterdir()) if path.exists() else ():
            plain = entry.is_file() and not entry.is_symlink()
            if not (plain and any(fnmatchcase(entry.name, pattern) for pattern in own)):
                raise UserError(
                    f"{path} holds '{entry.name}', which was not written by this command: choose another folder, or move what "
                    "is in it; nothing was changed"
                )
        _check_permission(path)
        _check_parent(path)


def save_tensors(tensors: dict[str, Tensor], path: Path, metadata: dict[str, str] | None = None) -> None:
    """Write a ``.safetensors`` file.

    Raises:
        OSError: it cannot be written; safetensors has another error for that.
    """
    from safetensors import SafetensorError
    from safetensors.torch import save_file

    try:
        save_file(tensors, path, metadata)
    except SafetensorError as error:
        found = re.search(r"\(os error (\d+)\)", str(error))
        raise OSError(int(found[1]) if found else errno.EIO, str(error), str(path)) from error


def lock_folder(folder: str | Path) -> None:
    """Make ``folder`` this process's own until it ends; on disks without locks this does nothing.

    Raises:
        UserError: another process has it, or it may not be written to.
    """
    lock = Path(folder) / ".lock"
    with _sentences(lock):
        descriptor = os.open(lock, os.O_RDWR | os.O_CREAT)
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


@contextlib.contextmanager
def _temporary(path: Path) -> Iterator[Path]:
    """A name beside ``path`` for what is to replace it; nothing is there before and after."""
    with _sentences(path):
        path.parent.mkdir(parents=True, exist_ok=True)
    temporary = _beside(path)
    _remove(temporary)  # of a killed process, whose number this one has: in containers numbers are often the same
    try:
        with _sentences(path, temporary):
            yield temporary
            _sync(path.parent, recurse=False)
    finally:
        _remove(temporary)


def _beside(path: Path, mark: str = "") -> Path:
    """The suffix is kept last: writers such as PIL choose the format by it."""
    name = f".tmp-{os.getpid()}-{mark}{path.name}"
    if len(os.fsencode(name)) > _LONGEST_NAME:
        digest = hashlib.sha256(os.fsencode(path.name)).hexdigest()[:24]
        name = f".tmp-{os.getpid()}-{mark}{digest}{path.suffix if len(path.suffix) < 20 else ''}"
    return path.with_name(name)


@contextlib.contextmanager
def _sentences(path: Path, temporary: Path | None = None) -> Iterator[None]:
    """Errors of the system become a :class:`UserError` that names ``path``.

    Args:
        temporary: only those about it or ``path``, and those of full disks: the block may read other files.
    """
    try:
        yield
    except OSError as error:
        name = None if error.filename is None else Path(os.fsdecode(error.filename))
        above = () if name is None else (name, *name.parents)
        if temporary and not (temporary in above or path in above or (name is None and error.errno in _DISK_ERRORS)):
            raise  # of what the block reads
        where = "" if not above or path == name or temporary in above else f" ({name})"
        raise UserError(f"{path} cannot be written: {reason(error)}{where}") from error


def _check_name(path: Path) -> None:
    try:
        valid = b"\0" not in os.fsencode(path)
    except UnicodeEncodeError:
        valid = False
    if not valid:
        raise UserError(f"{path} cannot be written: no file can have such a name")


def _check_permission(path: Path) -> None:
    """Also for the administrator, who may write to everything: who made it read-only wants to keep it."""
    if path.exists() and not (path.stat().st_mode & stat.S_IWUSR and os.access(path, os.W_OK)):
        raise UserError(f"{path} is read-only: choose another name, or make it writable")


def _check_parent(path: Path) -> None:
    above = next(parent for parent in path.absolute().parents if os.path.lexists(parent))
    if not above.is_dir():
        raise UserError(f"{path} cannot be written: {above} is not a folder")
    if not os.access(above, os.W_OK | os.X_OK):
        read_only = os.statvfs(above).f_flag & os.ST_RDONLY
        raise UserError(f"{path} cannot be written: {above} is {'on a read-only disk' if read_only else 'read-only'}")


def _remove(path: Path) -> None:
    if path.is_dir() and not path.is_symlink():
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
