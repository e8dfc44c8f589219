"""Files of web servers, ``https://``: describe them, read ranges of them. A server that ignores ranges does too."""

from __future__ import annotations

import contextlib
import http.client
import socket
import ssl
import urllib.error
import urllib.request
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any
from urllib.parse import quote, urlsplit

from fourm.utils.errors import UserError
from fourm.utils.transfer import (
    CHUNK,
    RemoteObject,
    Retries,
    Transient,
    Unresolved,
    check_url,
    raise_for_status,
    shown,
    within,
)


@dataclass(frozen=True)
class WebStore:
    """All web servers."""

    retries: Retries = Retries()

    def describe(self, url: str) -> RemoteObject:
        """Size and ETag, asked for with the first byte: what may be read may not always be asked about.

        Raises:
            MissingObject: there is no such file.
            UserError: access denied, no size, or the server stays down.
        """
        check_url(url)
        if "@" in urlsplit(url).netloc:
            raise UserError(f"{shown(url)}: a URL with a user and password in it cannot be read; a signed query can")

        def ask() -> RemoteObject:
            with self._get(url, 0, 1) as answer:
                length = answer.headers.get("Content-Length")
                size = answer.headers.get("Content-Range", "").rpartition("/")[2] if answer.status == 206 else length
                if answer.headers.get_content_type() == "text/html" and not urlsplit(url).path.endswith(
                    (".html", ".htm")
                ):
                    raise UserError(
                        f"{shown(url)}: the server answers with a web page, not with the file; does it ask for a login?"
                    )
                if not (str(size).isascii() and str(size).isdigit()):
                    raise UserError(f"{shown(url)}: the server does not tell the size of the file")
                return RemoteObject(url, int(size), answer.headers.get("ETag", ""))

        return self.retries(ask, url)

    def chunks(self, item: RemoteObject, start: int, end: int) -> Iterator[bytes]:
        """The bytes from ``start`` up to ``end``, by one request.

        Raises:
            Transient: the transfer broke.
            UserError: the file has changed, or may not be read.
        """
        with self._get(item.url, start, end, item.etag) as answer:
            position = start if answer.status == 206 else 0
            while position < end and (data := answer.read1(min(CHUNK, end - position))):
                yield data[max(start - position, 0) :]
                position += len(data)

    @contextlib.contextmanager
    def _get(self, url: str, start: int, end: int, etag: str = "") -> Iterator[Any]:
        request = urllib.request.Request(quote(url, safe=":/?#[]@!$&'()*+,;=%~"))
        request.add_header("Range", f"bytes={start}-{end - 1}")
        if etag and not etag.startswith("W/"):  # those are not to be compared byte by byte
            request.add_header("If-Match", etag)
        try:
            timeout = self.retries.timeout
            with within(2 * timeout, lambda: urllib.request.urlopen(request, timeout=timeout)) as answer:
                yield answer
        except urllib.error.HTTPError as error:
            raise_for_status(error.code, "", url)
        except (OSError, http.client.HTTPException) as error:
            reason = getattr(error, "reason", error)
            if isinstance(reason, ssl.SSLCertVerificationError):
                raise UserError(
                    f"{shown(url)}: the server's certificate is not valid: {reason.verify_message}"
                ) from error
            if isinstance(reason, socket.gaierror):
                raise Unresolved("the name of the server is not known") from error
            raise Transient(f"no complete answer from the server ({type(reason).__name__})") from error
