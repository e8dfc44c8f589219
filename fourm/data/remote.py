"""Tars in object stores and on web servers, through a folder of local copies that all processes of a machine share.

A tar is fetched whole, into a ``.part`` file, which its downloader holds locked, and takes its name once it is complete and its
checksum right. The sum of all sizes never exceeds the limit: what was used longest ago makes room. A copy may go as soon as
nobody has it open. Samples that still refer to it are then read from the store one by one, so a cache that is too small makes
a run slow, but does not stop or change it. The name of a copy depends on the ETag; a new version of an object is another one.
"""

from __future__ import annotations

import contextlib
import fcntl
import hashlib
import io
import logging
import os
import time
from collections import deque
from collections.abc import Iterable, Iterator, Mapping
from concurrent.futures import Future
from dataclasses import dataclass
from pathlib import Path
from typing import IO, Any, TypeVar

from fourm.utils.errors import UserError
from fourm.utils.files import locked
from fourm.utils.s3 import S3Store
from fourm.utils.transfer import Downloads, RemoteObject, Retries, Store, in_background, shown
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
                file = _open_copy(path) or self._fetch(item, path)
            return file
        except OSError as error:
            raise UserError(f"data_cache_dir {self._folder}: {error.strerror}") from error

    def read(self, url: str, offset: int, size: int) -> bytes:
        """A part of the tar: from its copy, else from the store.

        Raises:
            UserError: the store cannot be read.
        """
        item, path = self._locate(url)
        if file := _open_copy(path):
            with file:
                return os.pread(file.fileno(), size, offset)
        if not self._warned:
            log.warning(
                "%s had to make room before all of its samples were used; they are read one by one, which is slow: "
                "raise data_cache_gb, or lower num_workers or the shuffle buffers", shown(url),
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
            tars = {url: under_way.get(url) or in_background(self._prefetch, url) for url in shard.values()}
            upcoming.append((shard, tars))
            if len(upcoming) > AHEAD:
                yield _arrived(*upcoming.popleft())
        for shard, tars in upcoming:
            yield _arrived(shard, tars)

    def _prefetch(self, url: str) -> None:
        self.open(url).close()

    def _locate(self, url: str) -> tuple[RemoteObject, Path]:
        if url not in self._known:
            item = self._store(url).describe(url)
            key = "\n".join((self._options.endpoint if url.startswith("s3:") else "", url, item.etag, str(item.size)))
            name = f"{hashlib.sha256(key.encode()).hexdigest()[:_HASH]}-{shown(url).rpartition('/')[2][-80:]}"
            self._known[url] = item, self._folder / name
        return self._known[url]

    def _store(self, url: str) -> Store:
        return self._s3 if url.startswith("s3:") else self._web

    def _fetch(self, item: RemoteObject, path: Path) -> io.FileIO | None:
        """The copy, downloaded; None if somebody else was at it meanwhile, successfully or not."""
        part = path.with_name(f"{path.name[:_HASH]}.part")
        file = io.FileIO(os.open(part, os.O_RDWR | os.O_CREAT, 0o644), "r+")
        try:
            fcntl.flock(file, fcntl.LOCK_EX)
            if not _is_at(file, part):
                file.close()
                return None
            try:
                self._make_room(item, file)
                self._downloads.fetch(self._store(item.url), item, file)
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
                f"{shown(item.url)}: has {item.size / 1e9:.3g} GB, more than data_cache_gb={limit / 1e9:g}; raise it"
            )
        file.truncate(0)
        while True:
            with locked(self._folder / ".lock"):
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
                    used -= size
                if used + item.size <= limit:
                    file.truncate(item.size)
                    return
            time.sleep(0.1)  # other downloads have all the room; as soon as they are complete they may go


def _open_copy(path: Path) -> io.FileIO | None:
    """The copy, which thereby is the one used last; None if there is none."""
    with contextlib.suppress(FileNotFoundError):
        file = io.FileIO(path)
        os.utime(file.fileno())
        return file
    return None


def _is_at(file: IO[bytes] | io.FileIO, path: Path) -> bool:
    try:
        return os.path.samestat(os.fstat(file.fileno()), path.stat())
    except FileNotFoundError:
        return False


def _files(paths: Iterable[Path]) -> list[tuple[int, int, Path]]:
    """(time of the last use, size, path) of those that are still there."""
    found = []
    for path in paths:
        with contextlib.suppress(FileNotFoundError):
            status = path.stat()
            found.append((status.st_mtime_ns, status.st_size, path))
    return found


def _remove_abandoned(part: Path) -> None:
    """Remove what a downloader has left that has died: it would hold it locked."""
    with contextlib.suppress(FileNotFoundError, BlockingIOError), open(part, "rb") as file:
        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        if _is_at(file, part):
            part.unlink()


def _arrived(shard: Shard, tars: Mapping[str, Future]) -> Shard:
    for tar in tars.values():
        tar.result()
    return shard
