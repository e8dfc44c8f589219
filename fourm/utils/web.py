"""Read files from web servers (``https://``), by ranges where the server supports them."""

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
    run_with_timeout,
)
from fourm.utils.urls import redact_url


@dataclass(frozen=True)
class WebStore:
    """A :class:`~fourm.utils.transfer.Store` that reads from any web server."""

    retries: Retries = Retries()

    def describe(self, url: str) -> RemoteObject:
        """Request size and ETag by reading the first byte, because a signed URL may permit GET but not HEAD.

        Raises:
            MissingObject: If there is no such file.
            UserError: If access is denied, the size is not reported, or the server stays down.
        """
        check_url(url)
        if "@" in urlsplit(url).netloc:
            raise UserError(f"{redact_url(url)}: URLs with a user or password are not supported; use a signed URL")

        def ask() -> RemoteObject:
            with self._get(url, 0, 1) as answer:
                length = answer.headers.get("Content-Length")
                size = answer.headers.get("Content-Range", "").rpartition("/")[2] if answer.status == 206 else length
                if answer.headers.get_content_type() == "text/html" and not urlsplit(url).path.endswith(
                    (".html", ".htm")
                ):
                    raise UserError(
                        f"{redact_url(url)}: the server answers with a web page instead of the file; does it require a "
                        "login?"
                    )
                if not (str(size).isascii() and str(size).isdigit()):
                    raise UserError(f"{redact_url(url)}: the server does not report the size of the file")
                return RemoteObject(url, int(size), answer.headers.get("ETag", ""))

        return self.retries(ask, url)

    def chunks(self, item: RemoteObject, start: int, end: int) -> Iterator[bytes]:
        """Request the bytes [start, end) once.

        Raises:
            Transient: If the transfer breaks.
            UserError: If the file has changed or must not be read.
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
        if etag and not etag.startswith("W/"):  # weak ETags do not identify the exact bytes
            request.add_header("If-Match", etag)
        try:
            timeout = self.retries.timeout
            with run_with_timeout(2 * timeout, lambda: urllib.request.urlopen(request, timeout=timeout)) as answer:
                yield answer
        except urllib.error.HTTPError as error:
            raise_for_status(error.code, "", url)
        except (OSError, http.client.HTTPException) as error:
            reason = getattr(error, "reason", error)
            if isinstance(reason, ssl.SSLCertVerificationError):
                raise UserError(
                    f"{redact_url(url)}: the server's certificate is not valid: {reason.verify_message}"
                ) from error
            if isinstance(reason, socket.gaierror):
                raise Unresolved("the name of the server cannot be resolved") from error
            raise Transient(f"no complete answer from the server ({type(reason).__name__})") from error
