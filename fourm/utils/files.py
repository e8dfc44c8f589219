"""Write files and folders atomically: no partial output is left behind, and foreign files are never replaced."""

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

_MAX_NAME_BYTES = 255  # on all common file systems
# Errors that only writing causes, and that carry no file name.
_DISK_ERRORS = {errno.ENOSPC, errno.EDQUOT, errno.EFBIG, errno.EROFS}


@contextlib.contextmanager
def atomic_path(path: str | Path) -> Iterator[Path]:
    """Yield a temporary path beside ``path``; the file written there is moved to ``path`` if the block succeeds.

    An existing file at ``path`` is replaced. A symbolic link is replaced too, and the file it points to is left alone.

    Raises:
        UserError: If :func:`check_file` fails or the disk is full.
    """
    path = Path(path)
    check_file(path)
    with _temporary_output(path) as temporary:
        yield temporary
        _sync(temporary)
        check_file(path)
        os.replace(temporary, path)


@contextlib.contextmanager
def atomic_folder(path: str | Path, own: Collection[str] = ()) -> Iterator[Path]:
    """Yield a new temporary folder beside ``path``, which is moved to ``path`` if the block succeeds.

    Args:
        path: The folder to write.
        own: Patterns of the file names that this writer produces. An existing folder is replaced only if it contains
            nothing else. If the names are common ones, the caller must first check that the files are its own, and pass
            no patterns if they are not.

    Raises:
        UserError: If :func:`check_folder` fails or the disk is full.
    """
    path = Path(path)
    check_folder(path, own)
    with _temporary_output(path) as temporary:
        temporary.mkdir()
        yield temporary
        _sync(temporary)
        check_folder(path, own)
        if path.exists():
            previous = _temporary_path(path, "old-")
            _remove(previous)
            os.replace(path, previous)
            try:
                os.replace(temporary, path)
            except OSError:
                os.replace(previous, path)
                raise
            _remove(previous)
        else:
            os.replace(temporary, path)


def check_file(path: str | Path) -> None:
    """Check that a file can be written to ``path``, so that a long job fails at its start rather than at its end.

    Raises:
        UserError: If ``path`` is a folder, a device or a read-only file, or its parent folder cannot be written to.
    """
    path = Path(path)
    with _as_user_errors(path):
        _check_name(path)
        if path.is_dir():
            raise UserError(f"{path} is a folder: give the path of a file")
        if path.exists() and not path.is_file():
            raise UserError(f"{path} is a device or a pipe, not a file: give the path of a file")
        _check_permission(path)
        _check_parent(path)


def check_folder(path: str | Path, own: Collection[str] = ()) -> None:
    """Check that :func:`atomic_folder` can write to ``path``.

    Raises:
        UserError: If ``path`` is a file, a symbolic link, or a folder with files other than ``own`` ones, or its parent
            folder cannot be written to.
    """
    path = Path(path)
    with _as_user_errors(path):
        _check_name(path)
        if path.is_symlink():
            raise UserError(f"{path} is a symbolic link: give the folder itself, or remove the link")
        if path.exists() and not path.is_dir():
            raise UserError(f"{path} is a file: give the path of a folder")
        for entry in sorted(path.iterdir()) if path.exists() else ():
            is_regular = entry.is_file() and not entry.is_symlink()
            if not (is_regular and any(fnmatchcase(entry.name, pattern) for pattern in own)):
                raise UserError(
                    f"{path} contains '{entry.name}', which this command did not write: choose another folder, or move "
                    "its files elsewhere; nothing was changed"
                )
        _check_permission(path)
        _check_parent(path)


def save_tensors(tensors: dict[str, Tensor], path: Path, metadata: dict[str, str] | None = None) -> None:
    """Write a ``.safetensors`` file.

    Raises:
        OSError: If the file cannot be written; safetensors itself would raise a ``SafetensorError``.
    """
    from safetensors import SafetensorError
    from safetensors.torch import save_file

    path.touch()
    mode = path.stat().st_mode
    try:
        save_file(tensors, path, metadata)
        path.chmod(mode)  # some versions of safetensors write files that only their owner can read
    except SafetensorError as error:
        number = re.search(r"\(os error (\d+)\)", str(error))
        raise OSError(int(number[1]) if number else errno.EIO, str(error), str(path)) from error


def lock_folder(folder: str | Path) -> None:
    """Lock ``folder`` until this process ends. On file systems without locks this does nothing.

    Raises:
        UserError: If another process holds the lock, or the folder is not writable.
    """
    lock = Path(folder) / ".lock"
    with _as_user_errors(lock):
        descriptor = os.open(lock, os.O_RDWR | os.O_CREAT)
    try:
        # A POSIX lock belongs to the process rather than to the open file, so child processes do not inherit it.
        fcntl.lockf(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError as error:
        os.close(descriptor)
        if error.errno in (errno.EACCES, errno.EAGAIN):
            raise UserError(f"{folder} is in use by another process: wait for it, or choose another folder") from None


@contextlib.contextmanager
def locked(path: str | Path) -> Iterator[None]:
    """Hold an exclusive lock, across threads and processes, on the file ``path``, which is created if it is missing."""
    with open(path, "ab") as file:
        fcntl.flock(file, fcntl.LOCK_EX)
        yield


@contextlib.contextmanager
def _temporary_output(path: Path) -> Iterator[Path]:
    """Yield an unused path beside ``path`` to write to; anything left there is removed at the end."""
    with _as_user_errors(path):
        path.parent.mkdir(parents=True, exist_ok=True)
    temporary = _temporary_path(path)
    _remove(temporary)  # left by a killed process with the same id, as is common in containers
    try:
        with _as_user_errors(path, temporary):
            yield temporary
            _sync(path.parent, recurse=False)
    finally:
        _remove(temporary)


def _temporary_path(path: Path, mark: str = "") -> Path:
    """Return a hidden path beside ``path`` with the same suffix, by which writers such as PIL choose the format."""
    name = f".tmp-{os.getpid()}-{mark}{path.name}"
    if len(os.fsencode(name)) > _MAX_NAME_BYTES:
        digest = hashlib.sha256(os.fsencode(path.name)).hexdigest()[:24]
        name = f".tmp-{os.getpid()}-{mark}{digest}{path.suffix if len(path.suffix) < 20 else ''}"
    return path.with_name(name)


@contextlib.contextmanager
def _as_user_errors(path: Path, temporary: Path | None = None) -> Iterator[None]:
    """Turn each ``OSError`` into a :class:`UserError` that names ``path``.

    Args:
        path: The file or folder that the block writes.
        temporary: If given, convert only errors about this path or ``path`` and errors of the disk, because the block
            may also read other files.
    """
    try:
        yield
    except OSError as error:
        name = None if error.filename is None else Path(os.fsdecode(error.filename))
        chain = () if name is None else (name, *name.parents)
        if temporary and not (temporary in chain or path in chain or (name is None and error.errno in _DISK_ERRORS)):
            raise  # an error about a file that the block reads
        detail = "" if not chain or path == name or temporary in chain else f" ({name})"
        raise UserError(f"{path} cannot be written: {reason(error)}{detail}") from error


def _check_name(path: Path) -> None:
    try:
        valid = b"\0" not in os.fsencode(path)
    except UnicodeEncodeError:
        valid = False
    if not valid:
        raise UserError(f"{path} cannot be written: this is not a valid file name")


def _check_permission(path: Path) -> None:
    """Refuse a read-only file even if this process runs as root, because somebody protected it on purpose."""
    if path.exists() and not (path.stat().st_mode & stat.S_IWUSR and os.access(path, os.W_OK)):
        raise UserError(f"{path} is read-only: choose another name, or make it writable")


def _check_parent(path: Path) -> None:
    ancestor = next(parent for parent in path.absolute().parents if os.path.lexists(parent))
    if not ancestor.is_dir():
        raise UserError(f"{path} cannot be written: {ancestor} is not a folder")
    if not os.access(ancestor, os.W_OK | os.X_OK):
        problem = "on a read-only disk" if os.statvfs(ancestor).f_flag & os.ST_RDONLY else "read-only"
        raise UserError(f"{path} cannot be written: {ancestor} is {problem}")


def _remove(path: Path) -> None:
    if path.is_dir() and not path.is_symlink():
        shutil.rmtree(path, ignore_errors=True)
    else:
        path.unlink(missing_ok=True)


def _sync(path: Path, recurse: bool = True) -> None:
    """Flush ``path`` to the disk, so that a power failure cannot leave the new name with incomplete content."""
    if path.is_dir() and recurse:
        for child in path.rglob("*"):
            if child.is_file():
                _sync(child)
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
