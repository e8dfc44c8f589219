"""What transfers from and to stores have in common: bounded retries, checksums, and errors without secrets."""

from __future__ import annotations

import concurrent.futures
import errno
import hashlib
import io
import os
import random
import re
import threading
import time
import zlib
from collections.abc import Callable, Iterator
from concurrent.futures import Future
from dataclasses import dataclass
from typing import Any, BinaryIO, Protocol, TypeVar
from urllib.parse import unquote, urlsplit

from fourm.utils.errors import UserError, printable
from fourm.utils.urls import shown as shown

T = TypeVar("T")

CHUNK = 2**18  # bytes read at once: few enough that they are still in a cache when they are written and hashed
MIN_RATE = 1000  # bytes per second, below which a transfer counts as broken
_UNRESOLVED = 3  # tries for the name of a server, which seldom comes back
_DOWNLOADS = 3  # of an object whose checksum is wrong
_jitter = random.Random()  # not the global generator: how often a store fails must not change a run


class Transient(Exception):
    """A failure that may pass: throttling, an error of the server, a reset, a timeout, a body that was cut off."""


class Unresolved(Transient):
    """The name of the server is not known."""


class MissingObject(UserError):
    """The store has no such object."""


class DamagedObject(UserError):
    """What the store has is not what its checksum tells."""


@dataclass(frozen=True)
class RemoteObject:
    """An object as the store describes it.

    Attributes:
        size: in bytes.
        etag: changes with the content; empty if the store tells none.
        digest: algorithm (``crc32`` or a name of hashlib) and hexadecimal digest of the content; None if the store tells none.
    """

    url: str
    size: int
    etag: str = ""
    digest: tuple[str, str] | None = None


class Store(Protocol):
    """What can be read from a store."""

    def describe(self, url: str) -> RemoteObject:
        """Ask for size, ETag and checksum, with retries."""
        ...

    def chunks(self, item: RemoteObject, start: int, end: int) -> Iterator[bytes]:
        """The bytes from ``start`` up to ``end``, by one request; they may break off early, with :class:`Transient` or without."""
        ...


@dataclass(frozen=True)
class Retries:
    """How often to try, and how long to wait in between: twice as long each time, up to ``longest_delay`` seconds.

    Attributes:
        timeout: seconds without a byte after which an attempt has failed; an answer has to begin within twice this time.
        rate_over: seconds over which a transfer must reach :data:`MIN_RATE`.
    """

    attempts: int = 10
    first_delay: float = 0.5
    longest_delay: float = 20.0
    timeout: float = 30.0
    rate_over: float = 60.0

    @property
    def patience(self) -> float:
        """Seconds that all attempts may take, if none of them gets anywhere."""
        return self.attempts * (2 * self.timeout + self.longest_delay)

    def __call__(self, action: Callable[[], T], url: str) -> T:
        """The result of ``action``, which is tried again whenever it raises :class:`Transient`.

        Raises:
            UserError: the last attempt failed too.
        """
        for attempt in range(self.attempts):
            try:
                return action()
            except Transient as error:
                reason = error
            if isinstance(reason, Unresolved) and attempt + 1 >= _UNRESOLVED:
                raise UserError(f"{shown(url)}: {reason}; check the URL, or the network")
            if attempt + 1 < self.attempts:
                time.sleep(min(self.first_delay * 2**attempt, self.longest_delay) * _jitter.uniform(0.5, 1))
        raise UserError(
            f"{shown(url)}: {reason}, {self.attempts} times in a row; see to the store or the network, then start again"
        )


class Rate:
    """How fast a transfer is.

    Args:
        over: seconds over which it must reach :data:`MIN_RATE`.
        what: the store does: ``sends``, or ``takes``.
    """

    def __init__(self, over: float, what: str):
        self._over, self._what = over, what
        self._since, self._bytes = time.monotonic(), 0
        self._lock = threading.Lock()

    def add(self, count: int) -> None:
        """Count bytes that have arrived, in any thread."""
        with self._lock:
            self._bytes += count

    def check(self) -> None:
        """Look at the time; to be called again and again.

        Raises:
            Transient: the transfer is too slow.
        """
        if (seconds := time.monotonic() - self._since) > self._over:
            if self._bytes < MIN_RATE * seconds:
                raise Transient(f"the store {self._what} fewer than {MIN_RATE} bytes per second")
            self._since, self._bytes = time.monotonic(), 0


class Downloads:
    """Fetches objects; a transfer goes on where it broke.

    Args:
        requests: that may be in flight.
        part_bytes, split_above_bytes: objects larger than the latter are fetched in parts, side by side.
    """

    def __init__(self, retries: Retries, requests: int, part_bytes: int, split_above_bytes: int):
        self._retries, self._requests, self._in_flight = retries, requests, threading.Semaphore(requests)
        self._part_bytes, self._split_above_bytes = part_bytes, split_above_bytes

    def fetch(self, store: Store, item: RemoteObject, file: io.FileIO) -> tuple[str, str]:
        """Fill ``file`` with the object, and check it against its digest.

        Returns:
            Algorithm and digest of what was written.

        Raises:
            DamagedObject: the digest is another one, again and again.
            UserError: the object cannot be read.
            OSError: the file cannot be written.
        """
        in_parts = item.size > self._split_above_bytes
        step = self._part_bytes if in_parts else max(item.size, 1)
        algorithm, digest = item.digest or ("crc32", "")

        def write(data: bytes, position: int) -> None:
            if os.pwrite(file.fileno(), data, position) != len(data):
                raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
            if not in_parts:  # in their order, whatever breaks on the way
                hasher.update(data)

        for _ in range(_DOWNLOADS):
            hasher = new_hasher(algorithm)
            starts = range(0, item.size, step)
            upcoming = iter(starts)  # a part after the other, for whichever thread is free

            def fetch_parts(upcoming: Iterator[int] = upcoming) -> None:
                for start in upcoming:
                    self.read(store, item, start, min(start + step, item.size), write)

            threads = [in_background(fetch_parts) for _ in range(min(len(starts), self._requests))]
            concurrent.futures.wait(threads)  # none may write any more when the file is closed
            for thread in threads:
                thread.result()
            if in_parts:
                hash_file(file, hasher)
            if not digest or hasher.hexdigest() == digest:
                os.fsync(file.fileno())
                return algorithm, hasher.hexdigest()
        raise DamagedObject(
            f"{shown(item.url)}: arrives damaged, {_DOWNLOADS} times in a row: its {algorithm} is not the one that the "
            "store tells; upload it again"
        )

    def read(self, store: Store, item: RemoteObject, start: int, end: int, write: Callable[[bytes, int], Any]) -> None:
        """Hand the bytes from ``start`` up to ``end`` to ``write``, each piece with its position.

        Raises:
            UserError: the object cannot be read.
        """
        position = start

        def attempt() -> None:
            nonlocal position
            if position == end:
                return  # an empty member, or all was there before the transfer broke
            with self._in_flight:
                rate = Rate(self._retries.rate_over, "sends")
                for data in store.chunks(item, position, end):
                    if position + len(data) > end:
                        raise Transient("the store sends more than was asked for")
                    write(data, position)
                    position += len(data)
                    rate.add(len(data))
                    rate.check()
            if position < end:
                raise Transient("the answer is cut off")

        self._retries(attempt, item.url)


def in_background(action: Callable, *arguments: Any) -> Future:
    """Run ``action`` in a thread that does not outlive the process, unlike those of an executor."""
    future: Future = Future()

    def run() -> None:
        try:
            future.set_result(action(*arguments))
        except BaseException as error:
            future.set_exception(error)

    threading.Thread(target=run, daemon=True).start()
    return future


def within(seconds: float, action: Callable[[], T]) -> T:
    """The result of ``action``. What takes longer goes on in a thread of its own, and nobody waits for it.

    Raises:
        Transient: it took longer.
    """
    future = in_background(action)
    try:
        return future.result(seconds)
    except concurrent.futures.TimeoutError as error:
        if future.done():
            raise
        raise Transient(f"no complete answer within {seconds:g} seconds") from error


def check_url(url: str, schemes: tuple[str, ...] = ("s3", "http", "https")) -> None:
    """Find what cannot work before anything is asked.

    Raises:
        UserError: it is no URL with one of the ``schemes`` and a host or bucket.
    """
    example = "s3://BUCKET/KEY" if "s3" in schemes else f"{schemes[-1]}://HOST{':29500' if 'tcp' in schemes else ''}"
    try:
        parts = urlsplit(url)
        parts.port  # noqa: B018  # raises for one that is none
        host = parts.netloc if parts.scheme == "s3" else unquote(parts.hostname or "")
        name = r"[\w.-]+" if parts.scheme == "s3" else r"[^\s/@]+"
        if parts.scheme not in schemes or not re.fullmatch(name, host) or re.search(r"[\x00-\x1f\x7f]", url):
            raise ValueError
        if parts.scheme == "tcp" and (parts.port is None or "@" in parts.netloc):
            raise ValueError
        if parts.scheme != "s3":
            host.encode("idna")
    except ValueError:
        raise UserError(f"{printable(shown(url))!r} is not a valid URL, such as {example}") from None


def raise_for_status(status: int, code: str, url: str) -> None:
    """Turn the status of an answer that is an error into one of ours.

    Args:
        code: the store's own word for it, if it has one.

    Raises:
        Transient: another attempt may do.
        MissingObject: 404 and 410.
        UserError: all else.
    """
    answer = f"{status} {code}".strip()
    if status >= 500 or status in (408, 429) or "SlowDown" in code or "Throttl" in code or code == "RequestTimeout":
        raise Transient(f"the store answers {answer}")
    if status in (404, 410):
        raise MissingObject(f"{shown(url)}: there is no such object ({answer})")
    if status in (401, 403):
        raise UserError(
            f"{shown(url)}: access denied ({answer}); check the credentials and what they may read and write"
        )
    if status == 412:
        raise UserError(f"{shown(url)}: the object has changed since the run began; start again to read the new one")
    raise UserError(f"{shown(url)}: the store refuses the request ({answer})")


class Hasher(Protocol):
    """What hashlib gives."""

    def update(self, data: bytes, /) -> None: ...

    def hexdigest(self) -> str: ...


class _CRC32:
    def __init__(self) -> None:
        self._value = 0

    def update(self, data: bytes, /) -> None:
        self._value = zlib.crc32(data, self._value)

    def hexdigest(self) -> str:
        return f"{self._value:08x}"


def new_hasher(algorithm: str) -> Hasher:
    """Of ``crc32`` or an algorithm of hashlib."""
    return _CRC32() if algorithm == "crc32" else hashlib.new(algorithm)


def hash_file(file: BinaryIO | io.FileIO, hasher: Hasher) -> str:
    """The digest of a file, from its beginning."""
    file.seek(0)
    while data := file.read(CHUNK):
        hasher.update(data)
    return hasher.hexdigest()
