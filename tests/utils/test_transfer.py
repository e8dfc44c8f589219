import contextlib
import io
import socket
import threading
import time
from dataclasses import replace

import pytest

from fourm.utils.errors import UserError
from fourm.utils.s3 import S3Store
from fourm.utils.transfer import Downloads, RemoteObject, Retries, check_url
from fourm.utils.urls import redact_url
from fourm.utils.web import WebStore
from tests.data.object_store import BUCKET, ObjectStore, client, faulty


class Numbers:
    """A store of counting bytes, which records the number of threads."""

    threads = 0

    def chunks(self, item, start, end):
        time.sleep(0.001)
        self.threads = max(self.threads, threading.active_count())
        yield bytes(i % 251 for i in range(start, end))


def test_many_parts_need_few_threads(tmp_path):
    store, before = Numbers(), threading.active_count()
    with io.FileIO(tmp_path / "file", "x+") as file:
        Downloads(Retries(), requests=3, part_bytes=7, split_above_bytes=7).fetch(
            store, RemoteObject("s3://bucket/key", 5000), file
        )
    assert (tmp_path / "file").read_bytes() == bytes(i % 251 for i in range(5000))
    assert store.threads <= before + 3


@pytest.mark.parametrize(
    "url",
    [
        "s3:/x",
        "s3://",
        "s3:///key",
        "s3://a b/key",
        "s3://me:secret@bucket/key",
        "https://",
        "http://a b/",
        "ftp://h/x",
        "http://h:99999999/",
        "http://h:port/",
        "http://[::1/",
        "http://[zz]/x",
        "http://h/\x1b[2J",
        "host:9000",
        "",
    ],
)
def test_invalid_urls_are_reported_without_their_secrets(url):
    with pytest.raises(UserError, match="is not a valid URL") as failure:
        check_url(url)
    assert "secret" not in str(failure.value) and "\x1b" not in str(failure.value)


def test_redacted_urls_contain_no_secrets():
    for url in (
        "https://me:secret@h/a?secret",
        "https://h/a#secret",
        "http://me:secret@[::1",
        "https:/h?secret",
        "https://me:se/secret@h/a",
        "s3://k:secret@b/a",
    ):
        assert "secret" not in redact_url(url) and redact_url(url).startswith(url.split(":")[0])
    assert redact_url("/a?b@c#d") == "/a?b@c#d"
    for url in ("s3://bucket/a b?.tar", "http://[::1]:80/x", "https://h/x?sig=y", "http://127.0.0.1:9"):
        check_url(url)


@pytest.fixture
def raw_server():
    """Start a server on the loopback interface that passes each connection to a function."""
    listener = socket.create_server(("127.0.0.1", 0))

    def start(answer):
        def serve():
            with contextlib.suppress(OSError):
                while True:
                    connection, _ = listener.accept()
                    threading.Thread(target=talk, args=(connection,), daemon=True).start()

        def talk(connection):
            with contextlib.suppress(OSError), connection:
                connection.recv(65536)
                answer(connection)

        threading.Thread(target=serve, daemon=True).start()
        return f"http://127.0.0.1:{listener.getsockname()[1]}/a.tar"

    yield start
    listener.close()


IMPATIENT = Retries(attempts=2, first_delay=0.01, max_delay=0.01, timeout=0.4, rate_window=0.5)


def drip(connection, data=b"x" * 1000):
    for byte in data:
        connection.sendall(bytes([byte]))
        time.sleep(0.05)


HEAD = b"HTTP/1.1 206 Partial Content\r\nContent-Length: 1000\r\nContent-Range: bytes 0-999/1000\r\n"


@pytest.mark.parametrize(
    "answer, message",
    [
        (lambda c: drip(c, HEAD), "no complete answer within 0.8 seconds, 2 times in a row"),
        (lambda c: (c.sendall(HEAD + b"\r\n"), drip(c)), "fewer than 1000 bytes per second, 2 times in a row"),
        (lambda c: c.sendall(HEAD + b"\r\nshort"), "2 times in a row"),
        (
            lambda c: c.sendall(b"HTTP/1.1 302 Found\r\nLocation: /a.tar\r\nContent-Length: 0\r\n\r\n"),
            "refuses the request .302",
        ),
        (
            lambda c: c.sendall(b"HTTP/1.1 200 OK\r\nContent-Type: text/html\r\nContent-Length: 6\r\n\r\n<html>"),
            "web page",
        ),
        (lambda c: c.sendall(b"HTTP/1.1 200 OK\r\nContent-Length: \xb2\r\n\r\n"), "does not report the size"),
        (lambda c: c.sendall(b"no HTTP at all\r\n\r\n"), "no complete answer from the server"),
    ],
)
def test_transfers_from_slow_or_wrong_servers_fail(raw_server, answer, message):
    store, start = WebStore(IMPATIENT), time.monotonic()
    with pytest.raises(UserError, match=message):
        item = store.describe(raw_server(answer))
        Downloads(IMPATIENT, 1, 2**20, 2**20).read(store, item, 0, item.size, lambda *_: None)
    assert time.monotonic() - start < 10


def test_transfers_from_a_slow_store_fail(raw_server, monkeypatch):
    monkeypatch.setenv("AWS_ACCESS_KEY_ID", "toy")
    monkeypatch.setenv("AWS_SECRET_ACCESS_KEY", "toy")
    url = raw_server(lambda c: (c.sendall(HEAD + b"\r\n"), drip(c)))
    once = replace(IMPATIENT, attempts=1)
    store = S3Store(url.removesuffix("/a.tar"), retries=once)
    with pytest.raises(UserError, match="fewer than 1000 bytes per second, 1 times in a row"):
        Downloads(once, 1, 2**20, 2**20).read(store, RemoteObject("s3://b/k", 1000), 0, 1000, lambda *_: None)


@pytest.mark.parametrize(
    ("request_", "message"),
    [
        (lambda store, file: store.names("s3://b/folder"), "no complete answer within 0.8 seconds, 2 times in a row"),
        (lambda store, file: store.remove("s3://b/k"), "no complete answer within 0.8 seconds, 2 times in a row"),
        (lambda store, file: store.upload(file, "s3://b/k"), "the store accepts fewer than 1000 bytes per second"),
    ],
)
def test_requests_to_a_store_that_responds_byte_by_byte_fail(raw_server, monkeypatch, tmp_path, request_, message):
    monkeypatch.setenv("AWS_ACCESS_KEY_ID", "toy")
    monkeypatch.setenv("AWS_SECRET_ACCESS_KEY", "toy")
    (tmp_path / "file").write_bytes(b"x" * 1000)
    url = raw_server(lambda c: drip(c, b"HTTP/1.1 200 OK\r\nX-Slow: " + b"x" * 1000))
    store, before, start = (
        S3Store(url.removesuffix("/a.tar"), retries=IMPATIENT),
        threading.enumerate(),
        time.monotonic(),
    )
    with pytest.raises(UserError, match=message):
        request_(store, tmp_path / "file")
    assert time.monotonic() - start < 10
    assert all(thread.daemon for thread in threading.enumerate() if thread not in before), "they would hold up the end"


def test_large_files_are_uploaded_in_parts(tmp_path, monkeypatch):
    monkeypatch.setenv("AWS_ACCESS_KEY_ID", "toy")
    monkeypatch.setenv("AWS_SECRET_ACCESS_KEY", "toy")
    content = b"0123456789abcdef" * 2**20
    (tmp_path / "large").write_bytes(content)
    (tmp_path / "content").mkdir()
    server = ObjectStore(tmp_path / "content")
    try:
        with faulty(
            server, lambda method, path, before: "503 SlowDown" if method == "PUT" and before == 1 else None
        ) as proxy:
            store = S3Store(proxy.endpoint, part_bytes=5 * 2**20, split_above_bytes=2**20, requests=4)
            store.upload(tmp_path / "large", f"s3://{BUCKET}/large")
            assert proxy.counts["PUT", f"/{BUCKET}/large"] == 5, "four parts, and one again"
        assert client(server.endpoint).get_object(Bucket=BUCKET, Key="large")["Body"].read() == content
    finally:
        server.kill()


def test_a_server_name_that_cannot_be_resolved_fails_soon(monkeypatch):
    def unknown(*_, **__):
        raise socket.gaierror(socket.EAI_NONAME, "Name or service not known")

    monkeypatch.setattr(socket, "getaddrinfo", unknown)  # makes no request to a name server
    monkeypatch.setenv("AWS_ACCESS_KEY_ID", "toy")
    monkeypatch.setenv("AWS_SECRET_ACCESS_KEY", "toy")
    patient = Retries(attempts=100, first_delay=0.01)
    for store, url in (
        (WebStore(patient), "http://nowhere.invalid/x"),
        (S3Store("http://nowhere.invalid", retries=patient), "s3://b/k"),
    ):
        with pytest.raises(
            UserError, match="the name of the (server|store http://nowhere.invalid) cannot be resolved; check the URL"
        ):
            store.describe(url)
