"""Open untrusted files of a data set."""

from __future__ import annotations

import errno
import io
import os
import stat

FileVersion = tuple[int, int, int]
"""Inode, size in bytes and modification time in ns; if it differs, the file was replaced or modified."""

_FILE_TYPES = {
    stat.S_IFIFO: "a FIFO",
    stat.S_IFSOCK: "a socket",
    stat.S_IFCHR: "a device",
    stat.S_IFBLK: "a device",
    stat.S_IFDIR: "a folder",
}


def open_regular(path: str | os.PathLike[str]) -> io.FileIO:
    """Open a regular file for reading, without blocking on anything else.

    Raises:
        OSError: The file cannot be opened, or is a folder, a FIFO, a device or a socket.
    """
    _require_regular(os.stat(path), path)
    file = io.FileIO(os.open(path, os.O_RDONLY | os.O_NONBLOCK | os.O_CLOEXEC))
    try:
        _require_regular(os.fstat(file.fileno()), path)
    except BaseException:
        file.close()
        raise
    return file


def version_of(descriptor: int) -> FileVersion:
    """Return the version of an open file."""
    status = os.fstat(descriptor)
    return status.st_ino, status.st_size, status.st_mtime_ns


def _require_regular(status: os.stat_result, path: str | os.PathLike[str]) -> None:
    if not stat.S_ISREG(status.st_mode):
        file_type = _FILE_TYPES.get(stat.S_IFMT(status.st_mode), "something else")
        raise OSError(errno.EINVAL, f"it is {file_type}, not a file", os.fspath(path))
