"""Objects of S3, or of any store that speaks its protocol: find, describe, read, write and remove them.

Credentials come from the usual places: environment, ``~/.aws``, role of the container or machine; requests are anonymous if
there are none.
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
    in_background,
    raise_for_status,
    shown,
    within,
)

T = TypeVar("T")

_DIGESTS = {"ChecksumSHA256": "sha256", "ChecksumSHA1": "sha1", "ChecksumCRC32": "crc32"}


@dataclass(frozen=True, kw_only=True)
class StoreOptions(Options):
    """Object stores"""

    s3_endpoint: str = option("URL of the object store (default: as boto3 is configured, else AWS)", "")
    s3_multipart_chunksize_mb: int = option("size of a part of a transfer", 512, at_least=1, at_most=5120)
    s3_multipart_threshold_mb: int = option("transfers above this are split", 512, at_least=0, at_most=10**7)
    s3_max_io_queue: int = option("requests that a process may have in flight", 100, at_least=1, at_most=10_000)

    def store(self) -> S3Store:
        """The store at ``s3_endpoint``."""
        part, threshold = self.s3_multipart_chunksize_mb * 2**20, self.s3_multipart_threshold_mb * 2**20
        return S3Store(self.s3_endpoint, part, threshold, self.s3_max_io_queue)


def check_endpoint(options: Options, *names: str) -> None:
    """Check endpoints when something in a store is about to be read: published files have placeholders in these keys.

    Raises:
        UserError: the first of the keys ``names`` that is set is no URL.
    """
    for name in names:
        if endpoint := getattr(options, name):
            if not endpoint.startswith(("http://", "https://")):
                raise UserError(f"'{name}' must be a URL, https://HOST, not {shown(endpoint)!r}")
            check_url(endpoint, ("http", "https"))
            return


@dataclass(frozen=True)
class S3Store:
    """One endpoint.

    Attributes:
        endpoint: URL; empty: that of ``AWS_ENDPOINT_URL_S3`` or ``~/.aws/config``, else AWS.
        part_bytes, split_above_bytes: transfers larger than the latter go in parts.
        requests: connections at once.
    """

    endpoint: str = ""
    part_bytes: int = 512 * 2**20
    split_above_bytes: int = 512 * 2**20
    requests: int = 100
    retries: Retries = Retries()

    def describe(self, url: str) -> RemoteObject:
        """Size, ETag and checksum of ``s3://bucket/key``.

        Raises:
            MissingObject: there is no such key.
            UserError: no such bucket, access denied, or the store stays down.
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
        """The bytes from ``start`` up to ``end``, by one request.

        Raises:
            Transient: the transfer broke.
            UserError: the object has changed, or may not be read.
        """
        bucket, key = split_url(item.url)
        unchanged = {"IfMatch": item.etag} if item.etag else {}
        with self._errors(item.url):
            get = functools.partial(self._client().get_object, Bucket=bucket, Key=key, **unchanged)
            answer = self._answer(item.url, lambda: get(Range=f"bytes={start}-{end - 1}"))
            with contextlib.closing(answer["Body"]) as body:
                if not answer.get("ContentRange", "").startswith(f"bytes {start}-"):
                    raise UserError(f"{shown(item.url)}: the store does not answer requests for a range of bytes")
                # What is there, where botocore's own way would wait for all of the piece, byte by byte if need be.
                read = getattr(getattr(body, "_raw_stream", None), "read1", body.read)
                while data := read(CHUNK):
                    yield data

    def upload(self, path: str | Path, url: str) -> None:
        """Copy a file to ``s3://bucket/key``, in parts if it is large.

        Raises:
            UserError: no such bucket, access denied, or the store stays down.
        """
        from boto3.s3.transfer import ProgressCallbackInvoker, TransferConfig
        from s3transfer.manager import TransferManager

        bucket, key = split_url(url)
        transfer = TransferConfig(
            multipart_threshold=self.split_above_bytes, multipart_chunksize=self.part_bytes, max_io_queue=self.requests
        )

        def put() -> None:
            with open(path, "rb"), self._errors(url):  # what cannot be read is no fault of the store
                rate = Rate(self.retries.patience, "takes")
                manager = TransferManager(self._client(self.retries.attempts), transfer, executor_cls=_Threads)
                sending = manager.upload(str(path), bucket, key, subscribers=[ProgressCallbackInvoker(rate.add)])
                sent = in_background(sending.result)
                try:
                    while not sent.done():
                        concurrent.futures.wait([sent], timeout=1)
                        rate.check()
                    sent.result()
                except BaseException:
                    sending.cancel()
                    raise

        replace(self.retries, attempts=1)(put, url)  # botocore has repeated its parts

    def download(self, items: Mapping[Path, RemoteObject]) -> None:
        """Write each object to a new file, and check it against its digest, side by side.

        Raises:
            DamagedObject: the digest is another one.
            UserError: an object cannot be read, or a file not written.
        """
        downloads = Downloads(self.retries, self.requests, self.part_bytes, self.split_above_bytes)

        def write(path: Path, item: RemoteObject) -> None:
            try:
                with io.FileIO(path, "x+") as file:
                    downloads.fetch(self, item, file)
            except OSError as error:
                raise UserError(f"{path}: {error.strerror}") from error

        files = [in_background(write, path, item) for path, item in items.items()]
        concurrent.futures.wait(files)
        for file in files:
            file.result()

    def names(self, folder: str) -> set[str]:
        """The names of all objects below ``s3://bucket/folder``, as they go on after it.

        Raises:
            UserError: no such bucket, access denied, or the store stays down.
        """
        bucket, _, key = folder.removeprefix("s3://").partition("/")
        prefix = f"{key}/" if key else ""

        def find() -> set[str]:
            pages = iter(self._client().get_paginator("list_objects_v2").paginate(Bucket=bucket, Prefix=prefix))
            found = set[str]()
            while page := self._answer(folder, lambda: next(pages, None)):
                found.update(item["Key"][len(prefix) :] for item in page.get("Contents", ()))
            return found

        return self.retries(find, folder)

    def remove(self, url: str) -> None:
        """Remove ``s3://bucket/key``, if it is there.

        Raises:
            UserError: no such bucket, access denied, or the store stays down.
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
        return shown(
            self.endpoint or os.environ.get("AWS_ENDPOINT_URL_S3") or os.environ.get("AWS_ENDPOINT_URL", "AWS")
        )

    def _client(self, attempts: int = 1) -> Any:
        # Connections must not be shared with the process that this one was forked from.
        return _client(os.getpid(), self.endpoint, self.requests, self.retries.timeout, attempts)

    def _answer(self, url: str, request: Callable[[], T]) -> T:
        """The store's answer to one request, which has to be there soon even if it comes byte by byte."""
        with self._errors(url):
            return within(2 * self.retries.timeout, request)

    @contextlib.contextmanager
    def _errors(self, url: str) -> Iterator[None]:
        """Turn botocore's errors into ours. Their texts are left out: they may tell whose credentials were used."""
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
                raise UserError(f"{shown(url)}: there is no such bucket at {self._place}") from None
            raise_for_status(status, "" if code.isdigit() else code, url)
        except (*broken, ResponseParserError, HTTPError, OSError) as error:
            if _is_unresolved(error):
                raise Unresolved(f"the name of the store {self._place} is not known") from error
            raise Transient(f"no complete answer from {self._place} ({type(error).__name__})") from error
        except exceptions.BotoCoreError as error:
            raise UserError(f"{shown(url)}: {' '.join(str(error).split())}") from error


class _Threads:
    """An executor of s3transfer whose threads end with the process: a store that never answers must not hold up its end."""

    def __init__(self, max_workers: int):
        self._free = threading.Semaphore(max_workers)

    def submit(self, action: Callable, *arguments: Any) -> concurrent.futures.Future:
        self._free.acquire()
        future = in_background(action, *arguments)
        future.add_done_callback(lambda _: self._free.release())
        return future

    def shutdown(self, wait: bool = True) -> None:
        """Nothing is left to do: a thread ends with its task."""


def _is_unresolved(error: BaseException | None) -> bool:
    """Whether the name of the server could not be found, which libraries tell in many wrappings."""
    while error is not None:
        if isinstance(error, socket.gaierror) or type(error).__name__ == "NameResolutionError":
            return True
        inner = getattr(error, "kwargs", {}).get("error")
        error = inner if isinstance(inner, BaseException) else error.__cause__ or error.__context__
    return False


def upload(path: Path, s3_url: str, store: S3Store, last: str = "") -> None:
    """Copy a file, or all files of a folder to the same names below ``s3_url``.

    Args:
        last: the file of the folder that tells that all others are there.

    Raises:
        UserError: no such bucket, access denied, or the store stays down.
    """
    if path.is_file():
        store.upload(path, s3_url)
    for file in sorted(path.rglob("*"), key=lambda file: (file.name == last, file)):
        if file.is_file():
            store.upload(file, f"{s3_url}/{file.relative_to(path).as_posix()}")


def split_url(url: str) -> tuple[str, str]:
    """Bucket and key of ``s3://bucket/key``."""
    bucket, _, key = url.removeprefix("s3://").partition("/")
    if not bucket or not key:
        raise UserError(f"{shown(url)}: an object is named s3://bucket/key")
    check_url(url, ("s3",))
    return bucket, key


def _digest(answer: dict[str, Any]) -> tuple[str, str] | None:
    """The checksum of a whole object: those of its parts, which ``-`` tells, cannot be computed without knowing the parts."""
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
            connect_timeout=timeout, read_timeout=timeout, max_pool_connections=connections,
            retries={"total_max_attempts": attempts, "mode": "standard"},
            # Checksums of answers are verified over whole objects, here; those of requests not all stores understand.
            response_checksum_validation="when_required",
            request_checksum_calculation="when_required" if endpoint else "when_supported",
            **options,
        )  # fmt: skip
        return session.client("s3", endpoint_url=endpoint or None, config=config)
    except BotoCoreError as error:  # in ~/.aws, most likely
        raise UserError(f"S3 store {shown(endpoint) or 'as boto3 is configured'}: {error}") from error
    except ValueError:
        raise UserError(f"S3 store {shown(endpoint)}: this is not a valid URL") from None
