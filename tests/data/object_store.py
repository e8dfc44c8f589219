"""An S3 store in a process of its own on the loopback interface, and a proxy in front of it that makes it fail."""

from __future__ import annotations

import contextlib
import http.client
import json
import socket
import subprocess
import sys
import threading
import time
from collections import Counter
from collections.abc import Callable, Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

from fourm.data.shard_cache import RemoteOptions
from fourm.utils.s3 import _client
from fourm.utils.transfer import Retries

BUCKET = "toys"
POLICY = {  # everybody may read, as from a web server
    "Version": "2012-10-17",
    "Statement": [
        {"Effect": "Allow", "Principal": "*", "Action": "s3:GetObject", "Resource": f"arn:aws:s3:::{BUCKET}/*"}
    ],
}
SECRET = "do-not-tell-anybody"
RETRIES = Retries(attempts=6, first_delay=0.01, max_delay=0.05, timeout=60)
SLOW = 1.5  # seconds that the fault "slow" takes
Fault = Callable[
    [str, str, int], "str | None"
]  # method, path, how many requests with both came before → what goes wrong


def free_port() -> int:
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        return listener.getsockname()[1]


class ObjectStore:
    """moto's server with one bucket that holds what lies in ``content``.

    Args:
        checksums: the store is to keep beside the MD5 (``CRC32``, as boto3 asks for with every upload to AWS).
    """

    def __init__(self, content: Path, checksums: str | None = None):
        self.content, self.port = content, free_port()
        self._checksums = {"ChecksumAlgorithm": checksums} if checksums else {}
        self.endpoint = f"http://127.0.0.1:{self.port}"
        self.start()

    def start(self) -> None:
        command = [sys.executable, "-m", "moto.server", "-H", "127.0.0.1", "-p", str(self.port)]
        self.process = subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
        for _ in range(600):
            with contextlib.suppress(OSError), socket.create_connection(("127.0.0.1", self.port)):
                break
            time.sleep(0.1)
        client(self.endpoint).create_bucket(Bucket=BUCKET)
        client(self.endpoint).put_bucket_policy(Bucket=BUCKET, Policy=json.dumps(POLICY))
        for file in filter(Path.is_file, self.content.rglob("*")):
            with file.open("rb") as body:
                key = file.relative_to(self.content).as_posix()
                client(self.endpoint).put_object(Bucket=BUCKET, Key=key, Body=body, **self._checksums)

    def kill(self) -> None:
        self.process.kill()
        self.process.wait()


def client(endpoint: str):
    """A boto3 client, with the patience that the first answers of a store need."""
    return _client(0, endpoint, 10, 60, 10)


@contextlib.contextmanager
def faulty(store: ObjectStore, fault: Fault = lambda *_: None) -> Iterator[FaultyProxy]:
    proxy = FaultyProxy(store.port, fault)
    threading.Thread(target=proxy.serve_forever, daemon=True).start()
    try:
        yield proxy
    finally:
        proxy.shutdown()
        proxy.server_close()


class FaultyProxy(ThreadingHTTPServer):
    """Hands requests on to a store, and lets the ones that ``fault`` chooses fail.

    Attributes:
        counts: (method, path) → requests.
        ranges: of the GET requests.
    """

    daemon_threads = True

    def __init__(self, port: int, fault: Fault):
        super().__init__(("127.0.0.1", 0), _Handler)
        self.store_port, self.fault = port, fault
        self.counts: Counter[tuple[str, str]] = Counter()
        self.ranges: list[str] = []
        self.lock = threading.Lock()
        self.endpoint = f"http://127.0.0.1:{self.server_port}"

    def handle_error(self, request, client_address) -> None:
        pass  # clients hang up when it is their turn to


class _Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    server: FaultyProxy

    def log_message(self, *_) -> None:
        pass

    def _answer(self) -> None:
        body = self.rfile.read(int(self.headers.get("Content-Length", 0)))
        path = self.path.split("?")[0]
        with self.server.lock:
            before = self.server.counts[self.command, path]
            self.server.counts[self.command, path] += 1
            if self.command == "GET":
                self.server.ranges.append(self.headers.get("Range", ""))
        fault = self.server.fault(self.command, path, before) or ""
        if fault == "slow":
            time.sleep(SLOW)
        if fault == "refuse":
            return self._hang_up()
        if fault[:3].isdigit():
            status, _, code = fault.partition(" ")
            return self._send(
                int(status), {}, f"<Error><Code>{code}</Code><Message>{SECRET}</Message></Error>".encode()
            )
        try:
            upstream = http.client.HTTPConnection("127.0.0.1", self.server.store_port, timeout=30)
            upstream.request(self.command, self.path, body, dict(self.headers))
            answer = upstream.getresponse()
            content = answer.read()
        except (OSError, http.client.HTTPException):
            return self._hang_up()
        headers = {
            k: v
            for k, v in answer.getheaders()
            if k.lower() not in ("transfer-encoding", "connection", "date", "server")
        }
        if fault == "damage":
            content = content[:-1] + bytes([content[-1] ^ 1])
        self._send(answer.status, headers, content, cut=fault if fault in ("truncate", "reset", "shorten") else "")
        return None

    def _send(self, status: int, headers: dict[str, str], content: bytes, cut: str = "") -> None:
        length = headers.pop("Content-Length", None) or headers.pop("content-length", None) or str(len(content))
        if cut:
            content = content[: len(content) // 2]
        if cut == "shorten":  # and says so
            length = str(len(content))
        self.send_response(status)
        for name, value in headers.items():
            self.send_header(name, value)
        self.send_header("Content-Length", length)
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(content)
        self.wfile.flush()
        if cut in ("truncate", "reset"):
            self._hang_up(reset=cut == "reset")

    def _hang_up(self, reset: bool = True) -> None:
        if reset:  # without lingering, the other side gets a reset instead of an end
            self.connection.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, b"\1\0\0\0\0\0\0\0")
        self.close_connection = True
        self.connection.shutdown(socket.SHUT_RDWR) if not reset else self.connection.close()

    do_GET = do_HEAD = do_PUT = do_POST = do_DELETE = _answer


def options(endpoint: str, cache: Path, **other) -> RemoteOptions:
    return RemoteOptions(**{"endpoint": endpoint, "cache_dir": str(cache), "retries": RETRIES, **other})
