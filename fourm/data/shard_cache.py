"""Read tars from object stores and web servers through a folder of local copies that all processes of a machine share.

A tar is downloaded as a whole into a ``.part`` file, which its downloader keeps locked, and is renamed once it is
complete and its checksum matches. The total size never exceeds the limit: the least recently used copies are removed.
If samples still refer to a removed copy, they are read from the store one by one, so a cache that is too small slows a
run down but does not stop or change it. The name of a copy depends on the ETag, so a new version of an object gets a
new copy.

A ``.sum`` file next to each copy holds its size, time and digest. A copy that was modified since, or that appears to be
damaged, is checked against the digest. Other users may write to the folder, so links are never followed.
"""

from __future__ import annotations

import contextlib
import errno
import fcntl
import hashlib
import io
import json
import logging
import os
import stat
import threading
import time
from collections import deque
from collections.abc import Iterable, Iterator, Mapping
from concurrent.futures import Future
from dataclasses import dataclass
from pathlib import Path
from typing import IO, Any, TypeVar

from fourm.utils.errors import UserError
from fourm.utils.s3 import S3Store
from fourm.utils.transfer import (
    Downloads,
    RemoteObject,
    Retries,
    Store,
    check_url,
    hash_file,
    new_hasher,
    raise_if_set,
    run_in_background,
)
from fourm.utils.urls import redact_url
from fourm.utils.web import WebStore

log = logging.getLogger(__name__)
Shard = TypeVar("Shard", bound=Mapping[Any, str])

_PREFETCHED_SHARDS = 2  # shards that are downloaded while another one is being used
_HASH_DIGITS = 24  # hex digits at the start of the names of copies; other files in the folder are not touched


@dataclass(frozen=True)
class RemoteOptions:
    """Options for reading and caching remote data.

    Attributes:
        endpoint: URL of the S3 store; if empty, the one that boto3 is configured with.
        cache_dir: Folder of the local copies.
        cache_bytes: Maximum total size of the copies in bytes.
        part_bytes: Size in bytes of the parts in which a large tar is downloaded concurrently.
        split_above_bytes: Size in bytes above which a tar is downloaded in parts.
        requests: Maximum number of concurrent requests of a process.
        retries: How failed requests are repeated.
    """

    endpoint: str = ""
    cache_dir: str = "~/.cache/fourm/shards"
    cache_bytes: int = 50 * 10**9
    part_bytes: int = 512 * 2**20
    split_above_bytes: int = 512 * 2**20
    requests: int = 100
    retries: Retries = Retries()


class ShardCache:
    """Local copies of remote tars. Threads and processes may share a folder."""

    def __init__(self, options: RemoteOptions):
        self._options = options
        self._folder = Path(options.cache_dir).expanduser()
        self._s3 = S3Store(options.endpoint, requests=options.requests, retries=options.retries)
        self._web = WebStore(options.retries)
        self._known: dict[str, tuple[RemoteObject, Path]] = {}
        self._downloads = Downloads(options.retries, options.requests, options.part_bytes, options.split_above_bytes)
        self._warned = False
        self._checked: set[str] = set()  # URLs of the copies that :meth:`repair` has checked

    def __reduce__(self) -> tuple:
        return ShardCache, (self._options,)

    def describe(self, url: str) -> RemoteObject:
        """Return the properties of the object at ``url``, which are requested only once.

        Raises:
            UserError: The object does not exist or cannot be read.
        """
        return self._locate(url)[0]

    def open(self, url: str, cancelled: threading.Event | None = None) -> io.FileIO:
        """Open the tar at ``url``, which is downloaded if there is no copy. It stays readable if the copy is removed.

        Args:
            url: URL of the tar.
            cancelled: Another thread may set this to stop the download.

        Raises:
            CancelledError: ``cancelled`` was set before the tar was complete.
            UserError: The tar cannot be downloaded, or is larger than the cache.
        """
        item, path = self._locate(url)
        try:
            self._folder.mkdir(parents=True, exist_ok=True)
            file = None
            while file is None:
                file = self._open_copy(item, path) or self._fetch(item, path, cancelled)
            return file
        except OSError as error:
            raise UserError(f"data_cache_dir {self._folder}: {error.strerror or error}") from error

    def repair(self, url: str) -> bool:
        """Check the copy of a tar that appears to be damaged, and download it again if its digest does not match.

        Each tar is checked once, because any further damage must be in the store.

        Returns:
            Whether the tar was downloaded again.

        Raises:
            UserError: The tar cannot be downloaded.
        """
        if url in self._checked:
            return False
        self._checked.add(url)
        item, path = self._locate(url)
        with contextlib.suppress(OSError):
            file = _open_regular(path, os.O_RDONLY)
            with file:
                known = item.digest or (_read_sum(_sum_path(path)) or (0, 0, ("", "")))[2]
                intact = _has_digest(file, item.size, known)
            if not intact:
                _warn_damaged(path, url)
                path.unlink(missing_ok=True)
                self.open(url).close()
                return True
        return False

    def _open_copy(self, item: RemoteObject, path: Path) -> io.FileIO | None:
        """Open the copy and mark it as most recently used; return None if there is no intact copy."""
        try:
            file = _open_regular(path, os.O_RDONLY)
        except FileNotFoundError:
            return None
        try:
            status = os.fstat(file.fileno())
            own = status.st_uid == os.geteuid()
            known = _read_sum(_sum_path(path)) if own else None
            if known is None or known[:2] != (status.st_size, status.st_mtime_ns) or status.st_size != item.size:
                digest = item.digest or (known[2] if known else ("", ""))
                if not _has_digest(file, item.size, digest):
                    _warn_damaged(path, item.url)
                    file.close()
                    path.unlink(missing_ok=True)
                    return None
                if own:
                    _write_sum(path, status, digest)
            with contextlib.suppress(PermissionError):  # the copy may belong to another user
                os.utime(file.fileno(), ns=(time.time_ns(), status.st_mtime_ns))
            file.seek(0)
            return file
        except BaseException:
            file.close()
            raise

    def read(self, url: str, offset: int, size: int) -> bytes:
        """Return ``size`` bytes of the tar from ``offset`` on, from its copy or, if there is none, from the store.

        Raises:
            UserError: The store cannot be read.
        """
        item, path = self._locate(url)
        with contextlib.suppress(OSError), _open_regular(path, os.O_RDONLY) as file:
            data = os.pread(file.fileno(), size, offset)
            with contextlib.suppress(PermissionError):  # the copy may belong to another user
                os.utime(file.fileno(), ns=(time.time_ns(), os.fstat(file.fileno()).st_mtime_ns))
            if len(data) == size:
                return data
        if not self._warned:
            log.warning(
                "%s was removed from the cache before all of its samples were used; they are now read one by one, "
                "which is slow: raise data_cache_gb, or lower num_workers or the shuffle buffers",
                redact_url(url),
            )
            self._warned = True
        buffer = io.BytesIO()
        self._downloads.read(self._store(url), item, offset, offset + size, lambda data, _: buffer.write(data))
        return buffer.getvalue()

    def ahead(self, shards: Iterable[Shard]) -> Iterator[Shard]:
        """Yield the shards in order once their tars are downloaded, while the next ones are being downloaded.

        Closing the generator cancels these downloads, without waiting for their threads to notice.
        """
        upcoming: deque[tuple[Shard, dict[str, Future]]] = deque()
        cancelled = threading.Event()
        try:
            for shard in shards:
                pending = {url: tar for _, tars in upcoming for url, tar in tars.items()}
                tars = {
                    url: pending.get(url) or run_in_background(self._prefetch, url, cancelled) for url in shard.values()
                }
                upcoming.append((shard, tars))
                if len(upcoming) > _PREFETCHED_SHARDS:
                    yield _wait_for(*upcoming.popleft())
            for shard, tars in upcoming:
                yield _wait_for(shard, tars)
        finally:
            cancelled.set()

    def _prefetch(self, url: str, cancelled: threading.Event) -> None:
        self.open(url, cancelled).close()

    def _locate(self, url: str) -> tuple[RemoteObject, Path]:
        if url not in self._known:
            check_url(url)
            item = self._store(url).describe(url)
            key = "\n".join((self._options.endpoint if url.startswith("s3:") else "", url, item.etag, str(item.size)))
            name = (
                f"{hashlib.sha256(key.encode()).hexdigest()[:_HASH_DIGITS]}-{redact_url(url).rpartition('/')[2][-80:]}"
            )
            self._known[url] = item, self._folder / name
        return self._known[url]

    def _store(self, url: str) -> Store:
        return self._s3 if url.startswith("s3:") else self._web

    def _fetch(self, item: RemoteObject, path: Path, cancelled: threading.Event | None) -> io.FileIO | None:
        """Download the copy; return None if another process was downloading it meanwhile, successfully or not."""
        part = path.with_name(f"{path.name[:_HASH_DIGITS]}.part")
        file = _open_regular(part, os.O_RDWR | os.O_CREAT)
        try:
            fcntl.flock(file, fcntl.LOCK_EX)
            if not _is_same_file(file, part):
                file.close()
                return None
            if path.exists():  # another process has completed it since this one looked for a copy
                part.unlink(missing_ok=True)
                file.close()
                return None
            try:
                self._make_room(item, file, cancelled)
                digest = self._downloads.fetch(self._store(item.url), item, file, cancelled)
                _write_sum(path, os.fstat(file.fileno()), digest)
                os.replace(part, path)
            except BaseException:
                part.unlink(missing_ok=True)
                raise
            fcntl.flock(file, fcntl.LOCK_UN)
            file.seek(0)
            return file
        except BaseException:
            file.close()
            raise

    def _make_room(self, item: RemoteObject, file: io.FileIO, cancelled: threading.Event | None) -> None:
        """Allocate the size of ``item`` for ``file``, and remove the least recently used copies to make it fit."""
        limit = self._options.cache_bytes
        if item.size > limit:
            raise UserError(
                f"{redact_url(item.url)}: its {item.size / 1e9:.3g} GB are more than data_cache_gb={limit / 1e9:g}; "
                "raise it"
            )
        file.truncate(0)
        while True:
            raise_if_set(cancelled)
            with _open_regular(self._folder / ".lock", os.O_RDWR | os.O_CREAT) as lock:
                fcntl.flock(lock, fcntl.LOCK_EX)
                digits = "[0-9a-f]" * _HASH_DIGITS
                for part in self._folder.glob(f"{digits}.part"):
                    _remove_abandoned(part)
                parts = _stat_files(self._folder.glob(f"{digits}.part"))
                copies = _stat_files(self._folder.glob(f"{digits}-*"))
                used = sum(size for _, size, _ in parts + copies)
                for _, size, path in sorted(copies):
                    if used + item.size <= limit:
                        break
                    path.unlink(missing_ok=True)
                    _sum_path(path).unlink(missing_ok=True)
                    used -= size
                if used + item.size <= limit:
                    file.truncate(item.size)
                    return
            time.sleep(0.1)  # other downloads take all the space; they can be removed once they are complete


def _open_regular(path: Path, flags: int) -> io.FileIO:
    """Open a file in the cache; symbolic links, hard links and anything else but regular files are removed.

    Raises:
        FileNotFoundError: The file does not exist, or something else was removed from its place.
        OSError: The file cannot be opened.
    """
    create = bool(flags & os.O_CREAT)
    while True:
        try:
            descriptor = os.open(path, flags | os.O_NOFOLLOW | os.O_NONBLOCK | os.O_CLOEXEC, 0o644)
        except OSError as error:
            if error.errno not in (errno.ELOOP, errno.ENXIO):
                raise
        else:
            status = os.fstat(descriptor)
            if stat.S_ISREG(status.st_mode) and status.st_nlink < 2:
                return io.FileIO(descriptor, "r+" if create else "r")
            os.close(descriptor)
            if stat.S_ISREG(status.st_mode) and not status.st_nlink:
                continue  # another process has just removed it
        with contextlib.suppress(FileNotFoundError):
            os.unlink(path)
        if not create:
            raise FileNotFoundError(errno.ENOENT, os.strerror(errno.ENOENT), str(path))


def _sum_path(path: Path) -> Path:
    return path.with_name(f"{path.name[:_HASH_DIGITS]}.sum")


def _warn_damaged(path: Path, url: str) -> None:
    log.warning("%s: this copy of %s is damaged and will be downloaded again", path, redact_url(url))


def _read_sum(path: Path) -> tuple[int, int, tuple[str, str]] | None:
    """Return the size, modification time (ns) and digest of a copy when it was downloaded; None if unknown."""
    with contextlib.suppress(OSError, ValueError, TypeError, RecursionError), _open_regular(path, os.O_RDONLY) as file:
        if os.fstat(file.fileno()).st_uid == os.geteuid():
            size, time_ns, algorithm, digest = json.loads(file.read(1000))
            return int(size), int(time_ns), (str(algorithm), str(digest))
    return None


def _write_sum(path: Path, status: os.stat_result, digest: tuple[str, str]) -> None:
    target = _sum_path(path)
    target.unlink(missing_ok=True)
    with _open_regular(target, os.O_RDWR | os.O_CREAT) as file:
        file.write(json.dumps([status.st_size, status.st_mtime_ns, *digest]).encode())


def _has_digest(file: io.FileIO, size: int, digest: tuple[str, str]) -> bool:
    """Return whether a file has this size and digest; False if the digest is unknown."""
    if not digest[1] or os.fstat(file.fileno()).st_size != size:
        return False
    try:
        return hash_file(file, new_hasher(digest[0])) == digest[1]
    except ValueError:  # unknown algorithm
        return False


def _is_same_file(file: IO[bytes] | io.FileIO, path: Path) -> bool:
    try:
        return os.path.samestat(os.fstat(file.fileno()), path.lstat())
    except FileNotFoundError:
        return False


def _stat_files(paths: Iterable[Path]) -> list[tuple[int, int, Path]]:
    """Return (time of last use in ns, size in bytes, path) of the files that still exist."""
    files = []
    for path in paths:
        with contextlib.suppress(FileNotFoundError):
            status = path.lstat()
            if not stat.S_ISDIR(status.st_mode):
                files.append((status.st_atime_ns, status.st_size, path))
    return files


def _remove_abandoned(part: Path) -> None:
    """Remove the part file of a downloader that has died; a running one would hold a lock on it."""
    with contextlib.suppress(FileNotFoundError, BlockingIOError), _open_regular(part, os.O_RDONLY) as file:
        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        if _is_same_file(file, part):
            part.unlink()


def _wait_for(shard: Shard, tars: Mapping[str, Future]) -> Shard:
    for tar in tars.values():
        tar.result()
    return shard
