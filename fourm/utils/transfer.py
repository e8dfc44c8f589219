"""What transfers from and to stores have in common: bounded retries, checksums, and errors without secrets."""

from __future__ import annotations

import hashlib
import random
import time
import zlib
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import BinaryIO, Protocol, TypeVar
from urllib.parse import urlsplit

from fourm.utils.errors import UserError

T = TypeVar("T")

CHUNK = 2**20  # bytes read at once
_jitter = random.Random()  # not the global generator: how often a store fails must not change a run


class Transient(Exception):
    """A failure that may pass: throttling, an error of the server, a reset, a timeout, a body that was cut off."""


class MissingObject(UserError):
    """The store has no such object."""


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
        timeout: seconds without a byte after which an attempt has failed.
    """

    attempts: int = 10
    first_delay: float = 0.5
    longest_delay: float = 20.0
    timeout: float = 30.0

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
            if attempt + 1 < self.attempts:
                time.sleep(min(self.first_delay * 2**attempt, self.longest_delay) * _jitter.uniform(0.5, 1))
        raise UserError(
            f"{shown(url)}: {reason}, {self.attempts} times in a row; see to the store or the network, then start again"
        )


def shown(url: str) -> str:
    """A path as messages name it: a URL without the query and the user, where signatures and passwords are."""
    if "://" not in url:
        return url
    return urlsplit(url.split("?")[0])._replace(netloc=urlsplit(url).netloc.rpartition("@")[2]).geturl()


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


def hex_digest(file: BinaryIO, algorithm: str) -> str:
    """``crc32`` or an algorithm of hashlib over a file, from its beginning."""
    file.seek(0)
    if algorithm == "crc32":
        value = 0
        while data := file.read(CHUNK):
            value = zlib.crc32(data, value)
        return f"{value:08x}"
    hasher = hashlib.new(algorithm)
    while data := file.read(CHUNK):
        hasher.update(data)
    return hasher.hexdigest()
