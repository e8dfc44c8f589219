"""List, describe, read, write and remove objects in S3 or any compatible store.

Credentials come from the usual places: the environment, ``~/.aws``, or the role of the container or machine. Without
credentials, requests are anonymous.
"""

from __future__ import annotations

import base64
import concurrent.futures
import contextlib
import functools
import io
import os
import re
import socket
import threading
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, TypeVar

from fourm.utils.errors import UserError
from fourm.utils.options import Options, option
from fourm.utils.transfer import (
    CHUNK,
    Downloads,
    MissingObject,
    Rate,
    RemoteObject,
    Retries,
    Transient,
    Unresolved,
    check_url,
    raise_for_status,
    run_in_background,
    run_with_timeout,
)
from fourm.utils.urls import redact_url

T = TypeVar("T")

_DIGESTS = {"ChecksumSHA256": "sha256", "ChecksumSHA1": "sha1", "ChecksumCRC32": "crc32"}


@dataclass(frozen=True, kw_only=True)
class StoreOptions(Options):
    """Object stores"""

    s3_endpoint: str = option("URL of the object store (default: the endpoint in boto3's configuration, or AWS)", "")
    s3_multipart_chunksize_mb: int = option(
        "size of each part of a split transfer, in MiB", 512, at_least=1, at_most=5120
    )
    s3_multipart_threshold_mb: int = option("split transfers larger than this, in MiB", 512, at_least=0, at_most=10**7)
    s3_max_io_queue: int = option("maximum number of requests in flight per process", 100, at_least=1, at_most=10_000)

    def store(self) -> S3Store:
        """Return the store at ``s3_endpoint``."""
        part, threshold = self.s3_multipart_chunksize_mb * 2**20, self.s3_multipart_threshold_mb * 2**20
        return S3Store(self.s3_endpoint, part, threshold, self.s3_max_io_queue)


def check_endpoint(options: Options, *names: str) -> None:
    """Check the endpoint before a store is first used; published configurations have placeholders in these keys.

    Args:
        options: The options.
        *names: Keys of the endpoint; the first one that is set counts.

    Raises:
        UserError: If the endpoint is not a URL.
    """
    for name in names:
        endpoint = getattr(options, name)
        if endpoint:
            if not endpoint.startswith(("http://", "https://")):
                raise UserError(f"'{name}' must be a URL such as https://HOST, not {redact_url(endpoint)!r}")
            check_url(endpoint, ("http", "https"))
            return


@dataclass(frozen=True)
class S3Store:
    """An S3 endpoint.

    Attributes:
        endpoint: URL of the endpoint; if empty, that of ``AWS_ENDPOINT_URL_S3`` or ``~/.aws/config``, or AWS.
        part_bytes, split_above_bytes: Transfers larger than ``split_above_bytes`` are split into parts of
            ``part_bytes`` bytes.
        requests: Maximum number of simultaneous connections.
        retries: The retry policy.
    """

    endpoint: str = ""
    part_bytes: int = 512 * 2**20
    split_above_bytes: int = 512 * 2**20
    requests: int = 100
    retries: Retries = Retries()

    def describe(self, url: str) -> RemoteObject:
        """Request size, ETag and checksum of ``s3://bucket/key``.

        Raises:
            MissingObject: If there is no such key.
            UserError: If there is no such bucket, access is denied, or the store stays down.
        """
        bucket, key = split_url(url)
        head = functools.partial(self._client().head_object, Bucket=bucket, Key=key, ChecksumMode="ENABLED")
        try:
            answer = self.retries(lambda: self._answer(url, head), url)
        except MissingObject:
            self.retries(lambda: self._check_bucket(bucket), url)
            raise
        return RemoteObject(url, answer["ContentLength"], answer.get("ETag", ""), _digest(answer))

    def chunks(self, item: RemoteObject, start: int, end: int) -> Iterator[bytes]:
        """Request the bytes [start, end) once.

        Raises:
            Transient: If the transfer breaks.
            UserError: If the object has changed or must not be read.
        """
        bucket, key = split_url(item.url)
        unchanged = {"IfMatch": item.etag} if item.etag else {}
        with self._errors(item.url):
            get = functools.partial(self._client().get_object, Bucket=bucket, Key=key, **unchanged)
            answer = self._answer(item.url, lambda: get(Range=f"bytes={start}-{end - 1}"))
            with contextlib.closing(answer["Body"]) as body:
                if not answer.get("ContentRange", "").startswith(f"bytes {start}-"):
                    raise UserError(f"{redact_url(item.url)}: the store does not support requests for byte ranges")
                # read1 returns what has arrived so far; botocore's own read waits until the whole chunk is complete.
                read = getattr(getattr(body, "_raw_stream", None), "read1", body.read)
                while data := read(CHUNK):
                    yield data

    def upload(self, path: str | Path, url: str) -> None:
        """Upload a file to ``s3://bucket/key``, in parts if it is large.

        Raises:
            UserError: If there is no such bucket, access is denied, or the store stays down.
        """
        from boto3.s3.transfer import ProgressCallbackInvoker, TransferConfig
        from s3transfer.manager import TransferManager

        bucket, key = split_url(url)
        transfer = TransferConfig(
            multipart_threshold=self.split_above_bytes, multipart_chunksize=self.part_bytes, max_io_queue=self.requests
        )

        def put() -> None:
            with open(path, "rb"), self._errors(url):  # an unreadable file is not an error of the store
                rate = Rate(self.retries.patience, "accepts")
                manager = TransferManager(self._client(self.retries.attempts), transfer, executor_cls=_DaemonExecutor)
                sending = manager.upload(str(path), bucket, key, subscribers=[ProgressCallbackInvoker(rate.add)])
                sent = run_in_background(sending.result)
                try:
                    while not sent.done():
                        concurrent.futures.wait([sent], timeout=1)
                        rate.check()
                    sent.result()
                except BaseException:
                    sending.cancel()
                    raise

        replace(self.retries, attempts=1)(put, url)  # botocore itself retries each part

    def download(self, items: Mapping[Path, RemoteObject]) -> None:
        """Download each object to a new file in parallel, and check it against its digest.

        Raises:
            DamagedObject: If a digest does not match.
            UserError: If an object cannot be read, or a file cannot be written.
        """
        downloads = Downloads(self.retries, self.requests, self.part_bytes, self.split_above_bytes)

        def write(path: Path, item: RemoteObject) -> None:
            try:
                with io.FileIO(path, "x+") as file:
                    downloads.fetch(self, item, file)
            except OSError as error:
                raise UserError(f"{path}: {error.strerror}") from error

        files = [run_in_background(write, path, item) for path, item in items.items()]
        concurrent.futures.wait(files)
        for file in files:
            file.result()

    def names(self, folder: str) -> set[str]:
        """List the names of all objects below ``s3://bucket/folder``, relative to it.

        Raises:
            UserError: If there is no such bucket, access is denied, or the store stays down.
        """
        bucket, _, key = folder.removeprefix("s3://").partition("/")
        prefix = f"{key}/" if key else ""

        def find() -> set[str]:
            pages = iter(self._client().get_paginator("list_objects_v2").paginate(Bucket=bucket, Prefix=prefix))
            names = set[str]()
            while page := self._answer(folder, lambda: next(pages, None)):
                names.update(item["Key"][len(prefix) :] for item in page.get("Contents", ()))
            return names

        return self.retries(find, folder)

    def remove(self, url: str) -> None:
        """Remove ``s3://bucket/key`` if it exists.

        Raises:
            UserError: If there is no such bucket, access is denied, or the store stays down.
        """
        bucket, key = split_url(url)
        delete = functools.partial(self._client().delete_object, Bucket=bucket, Key=key)
        self.retries(lambda: self._answer(url, delete), url)

    def _check_bucket(self, bucket: str) -> None:
        url = f"s3://{bucket}"
        try:
            self._answer(url, lambda: self._client().head_bucket(Bucket=bucket))
        except MissingObject:
            raise UserError(f"{url}: there is no such bucket at {self._place}") from None

    @property
    def _place(self) -> str:
        return redact_url(self._current_endpoint or "AWS")

    @property
    def _current_endpoint(self) -> str:
        return self.endpoint or os.environ.get("AWS_ENDPOINT_URL_S3") or os.environ.get("AWS_ENDPOINT_URL", "")

    def _client(self, attempts: int = 1) -> Any:
        # Connections must not be shared with the process that this one was forked from, and the environment may change.
        return _client(os.getpid(), self._current_endpoint, self.requests, self.retries.timeout, attempts)

    def _answer(self, url: str, request: Callable[[], T]) -> T:
        """Return the store's response to one request, within a timeout even if it trickles in byte by byte."""
        with self._errors(url):
            return run_with_timeout(2 * self.retries.timeout, request)

    @contextlib.contextmanager
    def _errors(self, url: str) -> Iterator[None]:
        """Convert botocore's errors. Most messages are omitted because they may reveal whose credentials were used."""
        from botocore import exceptions
        from botocore.parsers import ResponseParserError
        from urllib3.exceptions import HTTPError

        broken = (
            exceptions.HTTPClientError,
            exceptions.ConnectionError,
            exceptions.ResponseStreamingError,
            exceptions.IncompleteReadError,
        )
        try:
            yield
        except exceptions.ClientError as error:
            status = error.response.get("ResponseMetadata", {}).get("HTTPStatusCode", 0)
            code = error.response.get("Error", {}).get("Code", "")
            if code == "NoSuchBucket":
                raise UserError(f"{redact_url(url)}: there is no such bucket at {self._place}") from None
            raise_for_status(status, "" if code.isdigit() else code, url)
        except (*broken, ResponseParserError, HTTPError, OSError) as error:
            if _is_unresolved(error):
                raise Unresolved(f"the name of the store {self._place} cannot be resolved") from error
            raise Transient(f"no complete answer from {self._place} ({type(error).__name__})") from error
        except exceptions.BotoCoreError as error:
            raise UserError(f"{redact_url(url)}: {' '.join(str(error).split())}") from error


class _DaemonExecutor:
    """An executor for s3transfer with daemon threads, so that a store that never responds cannot block the exit."""

    def __init__(self, max_workers: int):
        self._free = threading.Semaphore(max_workers)

    def submit(self, action: Callable, *arguments: Any) -> concurrent.futures.Future:
        self._free.acquire()
        future = run_in_background(action, *arguments)
        future.add_done_callback(lambda _: self._free.release())
        return future

    def shutdown(self, wait: bool = True) -> None:
        """Do nothing, because each thread ends with its task."""


def _is_unresolved(error: BaseException | None) -> bool:
    """Return whether an error, or any error that it wraps, says that the server name could not be resolved."""
    while error is not None:
        if isinstance(error, socket.gaierror) or type(error).__name__ == "NameResolutionError":
            return True
        inner = getattr(error, "kwargs", {}).get("error")
        error = inner if isinstance(inner, BaseException) else error.__cause__ or error.__context__
    return False


def upload(path: Path, s3_url: str, store: S3Store, last: str = "") -> None:
    """Upload a file, or all files of a folder under the same names below ``s3_url``.

    Args:
        path: The file or folder.
        s3_url: URL of the target.
        store: The store.
        last: Name of the file in the folder that marks the upload as complete.

    Raises:
        UserError: If there is no such bucket, access is denied, or the store stays down.
    """
    if path.is_file():
        store.upload(path, s3_url)
    for file in sorted(path.rglob("*"), key=lambda file: (file.name == last, file)):
        if file.is_file():
            store.upload(file, f"{s3_url}/{file.relative_to(path).as_posix()}")


def split_url(url: str) -> tuple[str, str]:
    """Split ``s3://bucket/key`` into bucket and key."""
    bucket, _, key = url.removeprefix("s3://").partition("/")
    if not bucket or not key:
        raise UserError(f"{redact_url(url)}: the URL of an object must be s3://bucket/key")
    check_url(url, ("s3",))
    return bucket, key


def _digest(answer: dict[str, Any]) -> tuple[str, str] | None:
    """Return the checksum of a whole object; composite ones (with ``-``) cannot be verified without the part sizes."""
    for field, algorithm in _DIGESTS.items():
        if (value := answer.get(field)) and "-" not in value and answer.get("ChecksumType") != "COMPOSITE":
            return algorithm, base64.b64decode(value).hex()
    etag = answer.get("ETag", "").strip('"')
    encrypted = "kms" in answer.get("ServerSideEncryption", "") or "SSECustomerAlgorithm" in answer
    return ("md5", etag) if re.fullmatch("[0-9a-f]{32}", etag) and not encrypted else None


@functools.lru_cache
def _client(process: int, endpoint: str, connections: int, timeout: float, attempts: int) -> Any:
    if endpoint:
        check_url(endpoint, ("http", "https"))
    import boto3
    from botocore import UNSIGNED
    from botocore.config import Config
    from botocore.exceptions import BotoCoreError

    try:
        session = boto3.session.Session()
        options: dict[str, Any] = {} if session.get_credentials() else {"signature_version": UNSIGNED}
        config = Config(
            connect_timeout=timeout,
            read_timeout=timeout,
            max_pool_connections=connections,
            retries={"total_max_attempts": attempts, "mode": "standard"},
            # We verify the checksums of whole objects ourselves. Not all stores support checksums of requests.
            response_checksum_validation="when_required",
            request_checksum_calculation="when_required" if endpoint else "when_supported",
            **options,
        )
        return session.client("s3", endpoint_url=endpoint or None, config=config)
    except BotoCoreError as error:  # usually caused by ~/.aws
        raise UserError(f"S3 store {redact_url(endpoint) or 'as boto3 is configured'}: {error}") from error
    except ValueError:
        raise UserError(f"S3 store {redact_url(endpoint)} is not a valid URL") from None
