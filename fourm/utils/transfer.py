"""Shared parts of transfers to and from stores: bounded retries, checksums, and errors without secrets."""

from __future__ import annotations

import concurrent.futures
import errno
import hashlib
import io
import ipaddress
import os
import random
import re
import threading
import time
import zlib
from collections.abc import Callable, Iterator
from concurrent.futures import CancelledError, Future
from dataclasses import dataclass
from typing import Any, BinaryIO, Protocol, TypeVar
from urllib.parse import unquote, urlsplit

from fourm.utils.errors import UserError, sanitize
from fourm.utils.urls import redact_url

T = TypeVar("T")

CHUNK = 2**18  # bytes per read: small enough to stay in the CPU cache until they are written and hashed
MIN_RATE = 1000  # bytes per second; a slower transfer counts as broken
_RESOLVE_ATTEMPTS = 3  # to resolve a server name, which rarely succeeds later
_DOWNLOAD_ATTEMPTS = 3  # for an object whose checksum does not match
_jitter = random.Random()  # not the global generator, because failures of a store must not affect a run


class Transient(Exception):
    """A failure that may pass: throttling, a server error, a connection reset, a timeout, a truncated body."""


class Unresolved(Transient):
    """The server name cannot be resolved."""


class MissingObject(UserError):
    """The store has no such object."""


class DamagedObject(UserError):
    """The content of an object does not match its checksum."""


@dataclass(frozen=True)
class RemoteObject:
    """An object as the store describes it.

    Attributes:
        url: URL of the object.
        size: Size in bytes.
        etag: An identifier that changes with the content; empty if the store reports none.
        digest: Algorithm (``crc32`` or a name of hashlib) and hexadecimal digest of the content; None if the store
            reports none.
    """

    url: str
    size: int
    etag: str = ""
    digest: tuple[str, str] | None = None


class Store(Protocol):
    """The read interface of a store."""

    def describe(self, url: str) -> RemoteObject:
        """Request size, ETag and checksum, with retries."""
        ...

    def chunks(self, item: RemoteObject, start: int, end: int) -> Iterator[bytes]:
        """Request the bytes [start, end) once; the iterator may end early, with or without a :class:`Transient`."""
        ...


@dataclass(frozen=True)
class Retries:
    """A retry policy with exponential backoff.

    Attributes:
        attempts: Maximum number of attempts.
        first_delay: Seconds before the second attempt; the delay doubles each time.
        max_delay: Maximum number of seconds between two attempts.
        timeout: Seconds without a byte after which an attempt fails; a response must begin within twice this time.
        rate_window: Seconds over which a transfer must reach :data:`MIN_RATE` on average.
    """

    attempts: int = 10
    first_delay: float = 0.5
    max_delay: float = 20.0
    timeout: float = 30.0
    rate_window: float = 60.0

    @property
    def patience(self) -> float:
        """Seconds after which all attempts have timed out."""
        return self.attempts * (2 * self.timeout + self.max_delay)

    def __call__(self, action: Callable[[], T], url: str) -> T:
        """Return the result of ``action``, which is retried when it raises :class:`Transient`.

        Raises:
            UserError: If the last attempt fails too.
        """
        for attempt in range(self.attempts):
            try:
                return action()
            except Transient as error:
                reason = error
            if isinstance(reason, Unresolved) and attempt + 1 >= _RESOLVE_ATTEMPTS:
                raise UserError(f"{redact_url(url)}: {reason}; check the URL and the network")
            if attempt + 1 < self.attempts:
                time.sleep(min(self.first_delay * 2**attempt, self.max_delay) * _jitter.uniform(0.5, 1))
        raise UserError(
            f"{redact_url(url)}: {reason}, {self.attempts} times in a row; check the store and the network, then "
            "start again"
        )


class Rate:
    """Measures the rate of a transfer.

    Args:
        window: Seconds over which the transfer must reach :data:`MIN_RATE` on average.
        verb: What the store does in error messages: ``sends`` or ``accepts``.
    """

    def __init__(self, window: float, verb: str):
        self._window, self._verb = window, verb
        self._start, self._bytes = time.monotonic(), 0
        self._lock = threading.Lock()

    def add(self, count: int) -> None:
        """Count transferred bytes; any thread may call this."""
        with self._lock:
            self._bytes += count

    def check(self) -> None:
        """Check the rate of each window that has ended; to be called regularly.

        Raises:
            Transient: If the transfer is too slow.
        """
        seconds = time.monotonic() - self._start
        if seconds > self._window:
            if self._bytes < MIN_RATE * seconds:
                raise Transient(f"the store {self._verb} fewer than {MIN_RATE} bytes per second")
            self._start, self._bytes = time.monotonic(), 0


class Downloads:
    """Downloads objects; an interrupted transfer continues where it stopped.

    Args:
        retries: The retry policy.
        requests: Maximum number of requests in flight.
        part_bytes, split_above_bytes: Objects larger than ``split_above_bytes`` are downloaded in parts of
            ``part_bytes`` bytes, in parallel.
    """

    def __init__(self, retries: Retries, requests: int, part_bytes: int, split_above_bytes: int):
        self._retries, self._requests, self._in_flight = retries, requests, threading.Semaphore(requests)
        self._part_bytes, self._split_above_bytes = part_bytes, split_above_bytes

    def fetch(
        self, store: Store, item: RemoteObject, file: io.FileIO, cancelled: threading.Event | None = None
    ) -> tuple[str, str]:
        """Download an object into ``file`` and check it against its digest.

        Args:
            store: The store.
            item: The object.
            file: The file, which is written from its start.
            cancelled: Another thread may set this to stop the download.

        Returns:
            Algorithm and digest of the downloaded content.

        Raises:
            CancelledError: If ``cancelled`` was set.
            DamagedObject: If the digest does not match in any attempt.
            UserError: If the object cannot be read.
            OSError: If the file cannot be written.
        """
        in_parts = item.size > self._split_above_bytes
        step = self._part_bytes if in_parts else max(item.size, 1)
        algorithm, digest = item.digest or ("crc32", "")

        def write(data: bytes, position: int) -> None:
            if os.pwrite(file.fileno(), data, position) != len(data):
                raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
            if not in_parts:  # the chunks then arrive in order, even after interruptions
                hasher.update(data)

        for _ in range(_DOWNLOAD_ATTEMPTS):
            hasher = new_hasher(algorithm)
            starts = range(0, item.size, step)
            queue = iter(starts)  # shared: each thread takes the next part when it is free

            def fetch_parts(queue: Iterator[int] = queue) -> None:
                for start in queue:
                    self.read(store, item, start, min(start + step, item.size), write, cancelled)

            threads = [run_in_background(fetch_parts) for _ in range(min(len(starts), self._requests))]
            concurrent.futures.wait(threads)  # no thread may write after the file has been closed
            for thread in threads:
                thread.result()
            if in_parts:
                hash_file(file, hasher)
            if not digest or hasher.hexdigest() == digest:
                os.fsync(file.fileno())
                return algorithm, hasher.hexdigest()
        raise DamagedObject(
            f"{redact_url(item.url)}: arrives damaged, {_DOWNLOAD_ATTEMPTS} times in a row: its {algorithm} differs "
            "from the one that the store reports; upload it again"
        )

    def read(
        self,
        store: Store,
        item: RemoteObject,
        start: int,
        end: int,
        write: Callable[[bytes, int], Any],
        cancelled: threading.Event | None = None,
    ) -> None:
        """Pass the bytes [start, end) to ``write`` in chunks, each with its position.

        Raises:
            CancelledError: If ``cancelled`` was set.
            UserError: If the object cannot be read.
        """
        position = start

        def attempt() -> None:
            nonlocal position
            if position == end:
                return  # the range is empty, or was complete before the transfer broke
            with self._in_flight:
                raise_if_set(cancelled)
                rate = Rate(self._retries.rate_window, "sends")
                for data in store.chunks(item, position, end):
                    raise_if_set(cancelled)
                    if position + len(data) > end:
                        raise Transient("the store sends more bytes than requested")
                    write(data, position)
                    position += len(data)
                    rate.add(len(data))
                    rate.check()
            if position < end:
                raise Transient("the response is truncated")

        self._retries(attempt, item.url)


def raise_if_set(cancelled: threading.Event | None) -> None:
    """Raise :class:`CancelledError` if the event is set."""
    if cancelled and cancelled.is_set():
        raise CancelledError


def run_in_background(action: Callable, *arguments: Any) -> Future:
    """Run ``action`` in a daemon thread, which unlike those of an executor does not keep the process alive.

    The thread is named after ``action``.
    """
    future: Future = Future()

    def run() -> None:
        try:
            future.set_result(action(*arguments))
        except BaseException as error:
            future.set_exception(error)

    threading.Thread(target=run, name=getattr(action, "__name__", None), daemon=True).start()
    return future


def run_with_timeout(seconds: float, action: Callable[[], T]) -> T:
    """Return the result of ``action``; after the timeout it continues in the background, and its result is ignored.

    Raises:
        Transient: If ``action`` takes longer than ``seconds``.
    """
    future = run_in_background(action)
    try:
        return future.result(seconds)
    except concurrent.futures.TimeoutError as error:
        if future.done():
            raise
        raise Transient(f"no complete answer within {seconds:g} seconds") from error


def check_url(url: str, schemes: tuple[str, ...] = ("s3", "http", "https")) -> None:
    """Check the syntax of a URL before any request is made.

    Raises:
        UserError: If it is not a URL with one of the ``schemes`` and a host or bucket.
    """
    example = "s3://BUCKET/KEY" if "s3" in schemes else f"{schemes[-1]}://HOST{':29500' if 'tcp' in schemes else ''}"
    try:
        parts = urlsplit(url)
        parts.port  # noqa: B018  # raises ValueError if it is not a port
        host = parts.netloc if parts.scheme == "s3" else unquote(parts.hostname or "")
        name = r"[\w.-]+" if parts.scheme == "s3" else r"[^\s/@]+"
        if parts.scheme not in schemes or not re.fullmatch(name, host) or re.search(r"[\x00-\x1f\x7f]", url):
            raise ValueError
        if parts.scheme == "tcp" and (parts.port is None or "@" in parts.netloc):
            raise ValueError
        if "[" in parts.netloc:
            ipaddress.ip_address(host)  # which Python 3.10 does not check
        elif parts.scheme != "s3":
            host.encode("idna")
    except ValueError:
        raise UserError(f"{sanitize(redact_url(url))!r} is not a valid URL; a valid one looks like {example}") from None


def raise_for_status(status: int, code: str, url: str) -> None:
    """Raise the exception for an HTTP error status.

    Args:
        status: The HTTP status.
        code: The error code of the store, or an empty string.
        url: URL of the object.

    Raises:
        Transient: If another attempt may succeed.
        MissingObject: For 404 and 410.
        UserError: For all other statuses.
    """
    response = f"{status} {code}".strip()
    if status >= 500 or status in (408, 429) or "SlowDown" in code or "Throttl" in code or code == "RequestTimeout":
        raise Transient(f"the store answers {response}")
    if status in (404, 410):
        raise MissingObject(f"{redact_url(url)}: there is no such object ({response})")
    if status in (401, 403):
        raise UserError(f"{redact_url(url)}: access denied ({response}); check the credentials and their permissions")
    if status == 412:
        raise UserError(
            f"{redact_url(url)}: the object has changed since the run began; start again to read the new version"
        )
    raise UserError(f"{redact_url(url)}: the store refuses the request ({response})")


class Hasher(Protocol):
    """The interface of hashlib's objects."""

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
    """Create a hasher for ``crc32`` or an algorithm of hashlib."""
    return _CRC32() if algorithm == "crc32" else hashlib.new(algorithm)


def hash_file(file: BinaryIO | io.FileIO, hasher: Hasher) -> str:
    """Return the hexadecimal digest of a whole file."""
    file.seek(0)
    while data := file.read(CHUNK):
        hasher.update(data)
    return hasher.hexdigest()
