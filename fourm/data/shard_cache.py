"""Tars in object stores and on web servers, through a folder of local copies that all processes of a machine share.

A tar is fetched whole, into a ``.part`` file, which its downloader holds locked, and takes its name once it is complete and its
checksum right. The sum of all sizes never exceeds the limit: what was used longest ago makes room. A copy may go as soon as
nobody has it open. Samples that still refer to it are then read from the store one by one, so a cache that is too small makes
a run slow, but does not stop or change it. The name of a copy depends on the ETag; a new version of an object is another one.

Beside each copy a ``.sum`` file keeps its size, time and digest. One that has changed since is checked against the digest, and
so is one in which something turns out damaged, before the store is blamed. Others may write to the folder: no link is followed.
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
    run_in_background,
)
from fourm.utils.urls import redact_url
from fourm.utils.web import WebStore

log = logging.getLogger(__name__)
Shard = TypeVar("Shard", bound=Mapping[Any, str])

AHEAD = 2  # shards that are fetched while one is being used
_HASH = 24  # digits with which the names of copies begin; nothing else in the folder is touched


@dataclass(frozen=True)
class RemoteOptions:
    """Where remote data come from and where copies are kept.

    Attributes:
        endpoint: URL of the S3 store; empty: as boto3 is configured.
        cache_dir, cache_bytes: folder of the copies, and the most that they may take.
        part_bytes, split_above_bytes: tars larger than the latter are fetched in parts, at the same time.
        requests: requests that a process may have in flight.
    """

    endpoint: str = ""
    cache_dir: str = "~/.cache/fourm/shards"
    cache_bytes: int = 50 * 10**9
    part_bytes: int = 512 * 2**20
    split_above_bytes: int = 512 * 2**20
    requests: int = 100
    retries: Retries = Retries()


class ShardCache:
    """Local copies of tars, by their URLs. Threads and processes may share a folder."""

    def __init__(self, options: RemoteOptions):
        self._options, self._folder = options, Path(options.cache_dir).expanduser()
        self._s3, self._web = (
            S3Store(options.endpoint, requests=options.requests, retries=options.retries),
            WebStore(options.retries),
        )
        self._known: dict[str, tuple[RemoteObject, Path]] = {}
        self._downloads = Downloads(options.retries, options.requests, options.part_bytes, options.split_above_bytes)
        self._warned = False
        self._checked: set[str] = (
            set()
        )  # URLs whose copies were compared with their digests because of something damaged

    def __reduce__(self) -> tuple:
        return ShardCache, (self._options,)

    def describe(self, url: str) -> RemoteObject:
        """The object at ``url``; asked for once.

        Raises:
            UserError: it is not there or cannot be read.
        """
        return self._locate(url)[0]

    def open(self, url: str) -> io.FileIO:
        """The tar at ``url``, fetched unless there is a copy. What is open stays readable, whatever becomes of the copy.

        Raises:
            UserError: it cannot be fetched, or is larger than the cache.
        """
        item, path = self._locate(url)
        try:
            self._folder.mkdir(parents=True, exist_ok=True)
            file = None
            while file is None:
                file = self._open_copy(item, path) or self._fetch(item, path)
            return file
        except OSError as error:
            raise UserError(f"data_cache_dir {self._folder}: {error.strerror or error}") from error

    def renewed(self, url: str) -> bool:
        """Whether the copy of a tar in which something is damaged was itself at fault; then it has been fetched again.

        Each tar is checked once: after that the store is at fault.

        Raises:
            UserError: as of :meth:`open`.
        """
        if url in self._checked:
            return False
        self._checked.add(url)
        item, path = self._locate(url)
        with contextlib.suppress(OSError):
            file = _open_regular(path, os.O_RDONLY)
            with file:
                known = item.digest or (_read_sum(_sum_of(path)) or (0, 0, ("", "")))[2]
                intact = _has_digest(file, item.size, known)
            if not intact:
                log.warning("%s: this copy of %s is damaged; it is fetched again", path, redact_url(url))
                path.unlink(missing_ok=True)
                self.open(url).close()
                return True
        return False

    def _open_copy(self, item: RemoteObject, path: Path) -> io.FileIO | None:
        """The copy, which thereby is the one used last; None if there is none that is right."""
        try:
            file = _open_regular(path, os.O_RDONLY)
        except FileNotFoundError:
            return None
        try:
            status = os.fstat(file.fileno())
            own = status.st_uid == os.geteuid()
            known = _read_sum(_sum_of(path)) if own else None
            if known is None or known[:2] != (status.st_size, status.st_mtime_ns) or status.st_size != item.size:
                digest = item.digest or (known[2] if known else ("", ""))
                if not _has_digest(file, item.size, digest):
                    log.warning("%s: this copy of %s is damaged; it is fetched again", path, redact_url(item.url))
                    file.close()
                    path.unlink(missing_ok=True)
                    return None
                if own:
                    _write_sum(path, status, digest)
            with contextlib.suppress(PermissionError):  # of another user
                os.utime(file.fileno(), ns=(time.time_ns(), status.st_mtime_ns))
            file.seek(0)
            return file
        except BaseException:
            file.close()
            raise

    def read(self, url: str, offset: int, size: int) -> bytes:
        """A part of the tar: from its copy, else from the store.

        Raises:
            UserError: the store cannot be read.
        """
        item, path = self._locate(url)
        with contextlib.suppress(OSError), _open_regular(path, os.O_RDONLY) as file:
            data = os.pread(file.fileno(), size, offset)
            with contextlib.suppress(PermissionError):  # of another user
                os.utime(file.fileno(), ns=(time.time_ns(), os.fstat(file.fileno()).st_mtime_ns))
            if len(data) == size:
                return data
        if not self._warned:
            log.warning(
                "%s had to make room before all of its samples were used; they are read one by one, which is slow: "
                "raise data_cache_gb, or lower num_workers or the shuffle buffers", redact_url(url),
            )  # fmt: skip
            self._warned = True
        buffer = io.BytesIO()
        self._downloads.read(self._store(url), item, offset, offset + size, lambda data, _: buffer.write(data))
        return buffer.getvalue()

    def ahead(self, shards: Iterable[Shard]) -> Iterator[Shard]:
        """The same shards in the same order, each once its tars are here, while the next ones are being fetched."""
        upcoming: deque[tuple[Shard, dict[str, Future]]] = deque()
        for shard in shards:
            under_way = {url: tar for _, tars in upcoming for url, tar in tars.items()}
            tars = {url: under_way.get(url) or run_in_background(self._prefetch, url) for url in shard.values()}
            upcoming.append((shard, tars))
            if len(upcoming) > AHEAD:
                yield _arrived(*upcoming.popleft())
        for shard, tars in upcoming:
            yield _arrived(shard, tars)

    def _prefetch(self, url: str) -> None:
        self.open(url).close()

    def _locate(self, url: str) -> tuple[RemoteObject, Path]:
        if url not in self._known:
            check_url(url)
            item = self._store(url).describe(url)
            key = "\n".join((self._options.endpoint if url.startswith("s3:") else "", url, item.etag, str(item.size)))
            name = f"{hashlib.sha256(key.encode()).hexdigest()[:_HASH]}-{redact_url(url).rpartition('/')[2][-80:]}"
            self._known[url] = item, self._folder / name
        return self._known[url]

    def _store(self, url: str) -> Store:
        return self._s3 if url.startswith("s3:") else self._web

    def _fetch(self, item: RemoteObject, path: Path) -> io.FileIO | None:
        """The copy, downloaded; None if somebody else was at it meanwhile, successfully or not."""
        part = path.with_name(f"{path.name[:_HASH]}.part")
        file = _open_regular(part, os.O_RDWR | os.O_CREAT)
        try:
            fcntl.flock(file, fcntl.LOCK_EX)
            if not _is_at(file, part):
                file.close()
                return None
            try:
                self._make_room(item, file)
                digest = self._downloads.fetch(self._store(item.url), item, file)
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

    def _make_room(self, item: RemoteObject, file: io.FileIO) -> None:
        """Give ``file`` its size, once that fits; removes the copies that were used longest ago."""
        limit = self._options.cache_bytes
        if item.size > limit:
            raise UserError(
                f"{redact_url(item.url)}: has {item.size / 1e9:.3g} GB, more than data_cache_gb={limit / 1e9:g}; raise it"
            )
        file.truncate(0)
        while True:
            with _open_regular(self._folder / ".lock", os.O_RDWR | os.O_CREAT) as lock:
                fcntl.flock(lock, fcntl.LOCK_EX)
                digits = "[0-9a-f]" * _HASH
                for part in self._folder.glob(f"{digits}.part"):
                    _remove_abandoned(part)
                parts = _files(self._folder.glob(f"{digits}.part"))
                copies = _files(self._folder.glob(f"{digits}-*"))
                used = sum(size for _, size, _ in parts + copies)
                for _, size, path in sorted(copies):
                    if used + item.size <= limit:
                        break
                    path.unlink(missing_ok=True)
                    _sum_of(path).unlink(missing_ok=True)
                    used -= size
                if used + item.size <= limit:
                    file.truncate(item.size)
                    return
            time.sleep(0.1)  # other downloads have all the room; as soon as they are complete they may go


def _open_regular(path: Path, flags: int) -> io.FileIO:
    """Open a file in the cache. What others have planted there is removed: links, also hard ones, and what is no file.

    Raises:
        FileNotFoundError: there is none, or was none of ours.
        OSError: it cannot be opened.
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
                continue  # somebody has just removed it
        with contextlib.suppress(FileNotFoundError):
            os.unlink(path)
        if not create:
            raise FileNotFoundError(errno.ENOENT, os.strerror(errno.ENOENT), str(path))


def _sum_of(path: Path) -> Path:
    return path.with_name(f"{path.name[:_HASH]}.sum")


def _read_sum(path: Path) -> tuple[int, int, tuple[str, str]] | None:
    """Size, time, and digest of a copy as it was fetched; None if they are not known."""
    with contextlib.suppress(OSError, ValueError, TypeError, RecursionError), _open_regular(path, os.O_RDONLY) as file:
        if os.fstat(file.fileno()).st_uid == os.geteuid():
            size, time_ns, algorithm, digest = json.loads(file.read(1000))
            return int(size), int(time_ns), (str(algorithm), str(digest))
    return None


def _write_sum(path: Path, status: os.stat_result, digest: tuple[str, str]) -> None:
    target = _sum_of(path)
    target.unlink(missing_ok=True)
    with _open_regular(target, os.O_RDWR | os.O_CREAT) as file:
        file.write(json.dumps([status.st_size, status.st_mtime_ns, *digest]).encode())


def _has_digest(file: io.FileIO, size: int, digest: tuple[str, str]) -> bool:
    """Whether a file is what was fetched; False also if nothing is known about that."""
    if not digest[1] or os.fstat(file.fileno()).st_size != size:
        return False
    try:
        return hash_file(file, new_hasher(digest[0])) == digest[1]
    except ValueError:  # no such algorithm
        return False


def _is_at(file: IO[bytes] | io.FileIO, path: Path) -> bool:
    try:
        return os.path.samestat(os.fstat(file.fileno()), path.lstat())
    except FileNotFoundError:
        return False


def _files(paths: Iterable[Path]) -> list[tuple[int, int, Path]]:
    """(time of the last use, size, path) of those that are still there."""
    found = []
    for path in paths:
        with contextlib.suppress(FileNotFoundError):
            status = path.lstat()
            if not stat.S_ISDIR(status.st_mode):
                found.append((status.st_atime_ns, status.st_size, path))
    return found


def _remove_abandoned(part: Path) -> None:
    """Remove what a downloader has left that has died: it would hold it locked."""
    with contextlib.suppress(FileNotFoundError, BlockingIOError), _open_regular(part, os.O_RDONLY) as file:
        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        if _is_at(file, part):
            part.unlink()


def _arrived(shard: Shard, tars: Mapping[str, Future]) -> Shard:
    for tar in tars.values():
        tar.result()
    return shard
