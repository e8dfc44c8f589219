"""Shards in an S3 store and on a web server: the stream is the local one, whatever goes wrong on the way."""

import contextlib
import functools
import hashlib
import http.server
import itertools
import json
import os
import subprocess
import threading
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from fourm.data.bad_samples import BadSampleLedger
from fourm.data.raw_sample import OpenFiles, RawSample
from fourm.data.shard_cache import RemoteOptions, ShardCache
from fourm.data.shards import Shards
from fourm.utils.errors import UserError
from fourm.utils.files import locked
from tests.data.dataset_files import write_shards
from tests.data.object_store import BUCKET, RETRIES, SECRET, ObjectStore, client, faulty, options
from tests.warm_python import warm_python

WANTED = {"rgb@224": "rgb", "caption": "caption", "tok_rgb@224": "tok_rgb", "crop_settings": "crop_settings"}
NAMES = {"tok_rgb": "tok_rgb@224"}
ROOT = Path(__file__).parents[2]
DRAWS = 60


@pytest.fixture(autouse=True)
def credentials(monkeypatch):
    monkeypatch.setenv("AWS_ACCESS_KEY_ID", "toy-key")
    monkeypatch.setenv("AWS_SECRET_ACCESS_KEY", SECRET)
    monkeypatch.setenv("AWS_EC2_METADATA_DISABLED", "true")


@pytest.fixture(scope="module")
def local(tmp_path_factory):
    """The data path of local shards: 6 of 4 samples."""
    with pytest.MonkeyPatch.context():
        return write_shards(tmp_path_factory.mktemp("shards"), 6, 4)


@pytest.fixture(scope="module")
def store(local):
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("AWS_ACCESS_KEY_ID", "toy-key")
        patch.setenv("AWS_SECRET_ACCESS_KEY", SECRET)
        store = ObjectStore(Path(local.partition("[")[0]))
    yield store
    store.kill()


@contextlib.contextmanager
def drawing(data_path: str, remote: RemoteOptions | None = None) -> Iterator[Iterator[RawSample]]:
    """The samples of a stream; afterwards the cache is at rest, because all threads that prefetch have ended."""
    samples = Shards(data_path, WANTED, NAMES, remote=remote).draw((0, "order", 0), 0, 1, BadSampleLedger("toy", 0.0))
    try:
        yield samples
    finally:
        samples.close()
        for thread in threading.enumerate():
            if thread.name == ShardCache._prefetch.__name__:
                thread.join(60)
                assert not thread.is_alive()


def stream(data_path: str, remote: RemoteOptions | None = None, draws: int = DRAWS) -> list[tuple[str, str]]:
    """Key and digest of all members of the first samples; those of one shard are read after the next has begun."""
    files, read = OpenFiles(), []
    with drawing(data_path, remote) as samples:
        for sample in itertools.islice(samples, draws):
            digest = hashlib.sha256()
            for member in sample.members.values():
                digest.update(files.read(member))
            read.append((sample.key, digest.hexdigest()))
    return read


def on_s3(local: str) -> str:
    return f"s3://{BUCKET}/[{local.partition('[')[2]}"


def sizes(cache: Path) -> list[int]:
    """Of the files in a cache, each once: one may get its name while this looks."""
    found = {}
    for path in cache.iterdir():
        with contextlib.suppress(FileNotFoundError):
            found[path.stat().st_ino] = path.stat().st_size
    return list(found.values())


def test_the_stream_is_the_local_one_and_every_tar_is_fetched_once(local, store, tmp_path):
    with faulty(store) as proxy:
        remote = options(proxy.endpoint, tmp_path)
        assert stream(on_s3(local), remote) == stream(local)
        fetched = {path: count for (method, path), count in proxy.counts.items() if method == "GET"}
        assert len(fetched) > 12 and set(fetched.values()) == {1} and not any("/det/" in path for path in fetched)
        assert stream(on_s3(local), remote) == stream(local)
        assert sum(count for (method, _), count in proxy.counts.items() if method == "GET") == len(fetched)


@pytest.mark.parametrize(
    "fault", ["500 InternalError", "503 SlowDown", "truncate", "shorten", "reset", "refuse", "damage"]
)
def test_what_fails_for_a_while_changes_nothing(local, store, tmp_path, fault):
    def sometimes(method, path, before):
        if fault == "damage":
            return fault if method == "GET" and not before else None
        return fault if before % 3 < 2 and (method == "GET" or fault[0] in "5r") else None

    with faulty(store, sometimes) as proxy:
        small_parts = options(proxy.endpoint, tmp_path, part_bytes=20_000, split_above_bytes=20_000)
        assert stream(on_s3(local), small_parts, draws=24) == stream(local, draws=24)
        assert any(not text.startswith("bytes=0-") for text in proxy.ranges)


def test_parts_are_fetched_side_by_side(local, store, tmp_path):
    with faulty(store) as proxy:
        remote = options(proxy.endpoint, tmp_path, part_bytes=4_000, split_above_bytes=4_000)
        with ShardCache(remote).open(f"s3://{BUCKET}/rgb/shard-00000.tar") as file:
            content = file.readall()
        assert content == Path(local.partition("[")[0], "rgb/shard-00000.tar").read_bytes()
        firsts = sorted(int(text[6:].split("-")[0]) for text in proxy.ranges)
        assert firsts == list(range(0, len(content), 4_000)) and len(firsts) > 2


def test_a_store_that_is_slower_than_the_timeout_is_asked_again(local, store, tmp_path):
    with faulty(store, lambda method, path, before: "slow" if not before and "rgb" in path else None) as proxy:
        impatient = options(proxy.endpoint, tmp_path, retries=type(RETRIES)(6, 0.01, 0.05, timeout=1.0))
        assert stream(on_s3(local), impatient, draws=8) == stream(local, draws=8)
        assert proxy.counts["HEAD", "/toys/rgb/shard-00000.tar"] > 1


@pytest.mark.slow
def test_a_store_that_is_restarted_amid_a_shard_changes_nothing(local, tmp_path):
    store, down, up = ObjectStore(Path(local.partition("[")[0])), threading.Event(), threading.Event()

    def restart():
        store.kill()
        store.start()  # this one forgets what it had, so it serves again once it has been given that
        up.set()

    def amid(method, path, before):
        if method == "GET" and len(proxy.ranges) > 10 and not down.is_set():
            down.set()
            threading.Thread(target=restart, daemon=True).start()
            return "truncate"
        return "refuse" if down.is_set() and not up.is_set() else None

    try:
        with faulty(store, amid) as proxy:
            patient = options(
                proxy.endpoint,
                tmp_path,
                part_bytes=9_000,
                split_above_bytes=9_000,
                retries=type(RETRIES)(40, 0.1, 2.0, timeout=5),
            )
            assert stream(on_s3(local), patient) == stream(local)
            assert up.is_set()
    finally:
        store.kill()


@pytest.mark.parametrize(
    "fault, where, message, requests",
    [
        ("500 InternalError", "HEAD", "the store answers 500, 6 times in a row", 6),
        ("503 SlowDown", "GET", "the store answers 503 SlowDown, 6 times in a row", 6),
        ("refuse", "HEAD", r"no complete answer from http://127.0.0.1:\d+ \(\w+\), 6 times in a row", 6),
        ("truncate", "GET", "6 times in a row", 6),
        ("damage", "GET", "arrives damaged, 3 times in a row: its md5", 3),
        ("403 AccessDenied", "GET", r"access denied \(403 AccessDenied\); check the credentials", 1),
        ("403 ", "HEAD", r"access denied \(403\)", 1),
        ("400 ExpiredToken", "GET", "refuses the request .400 ExpiredToken", 1),
        ("412 PreconditionFailed", "GET", "has changed since the run began", 1),
    ],
)
def test_what_stays_broken_is_one_error_after_a_bounded_number_of_requests(
    local, store, tmp_path, fault, where, message, requests
):
    with faulty(store, lambda method, path, before: fault if method == where and "rgb" in path else None) as proxy:
        with pytest.raises(UserError, match=message) as failure:
            stream(on_s3(local), options(proxy.endpoint, tmp_path))
        assert str(failure.value).startswith("s3://toys/") and "\n" not in str(failure.value)
        assert not {SECRET, "toy-key"} & set(str(failure.value).split()) and SECRET not in str(failure.value)
        counts = [count for (method, path), count in proxy.counts.items() if method == where and "rgb" in path]
        assert max(counts) == requests
    assert not list(tmp_path.glob("*.part"))


@pytest.mark.parametrize(
    "data_path, message",
    [
        (
            "s3://nowhere/[rgb,caption,tok_rgb,crop_settings]/shard-00000.tar",
            "s3://nowhere: there is no such bucket at http",
        ),
        (
            f"s3://{BUCKET}/[rgb,caption,tok_rgb,crop_settings]/shard-{{7..9}}.tar",
            "shard-7.tar: there is no such object",
        ),
        (f"s3://{BUCKET}/nothing.tar", "nothing.tar: there is no such object"),
        (f"s3://{BUCKET}", "the URL of an object must be s3://bucket/key"),
        (f"s3://{BUCKET}/[rgb,caption]/shard-00000.tar", "no folder for modality tok_rgb@224"),
    ],
)
def test_what_is_not_there_is_named(store, tmp_path, data_path, message):
    with pytest.raises(UserError, match=message):
        Shards(data_path, WANTED, NAMES, remote=options(store.endpoint, tmp_path))


def test_a_shard_that_is_missing_ends_the_run(store, local, tmp_path):
    missing = on_s3(local).replace("00005", "00009")
    with pytest.raises(UserError, match=r"shard-0000\d.tar: there is no such object"):
        stream(missing, options(store.endpoint, tmp_path), draws=200)


def test_validation_goes_through_all_of_it(local, store, tmp_path):
    shards = Shards(on_s3(local), WANTED, NAMES, remote=options(store.endpoint, tmp_path))
    assert sorted(int(sample.key) for sample in shards.all(BadSampleLedger("toy", 0.0))) == list(range(24))


def test_a_cache_that_is_too_small_is_obeyed_and_changes_nothing(local, store, tmp_path, caplog):
    limit, most, done = 40_000, [0], threading.Event()

    def watch():
        while not done.is_set():
            with locked(tmp_path / ".lock"):  # room is made and taken at once
                most[0] = max(most[0], sum(sizes(tmp_path)))

    watcher = threading.Thread(target=watch)
    watcher.start()
    try:
        assert stream(on_s3(local), options(store.endpoint, tmp_path, cache_bytes=limit)) == stream(local)
    finally:
        done.set()
        watcher.join()
    assert limit / 2 < most[0] <= limit
    assert caplog.text.count("raise data_cache_gb") == 1


def test_a_tar_larger_than_the_cache_is_an_error(local, store, tmp_path):
    with pytest.raises(UserError, match="more than data_cache_gb=5e-06; raise it"):
        stream(on_s3(local), options(store.endpoint, tmp_path, cache_bytes=5_000))


def test_what_was_used_longest_ago_makes_room(local, store, tmp_path):
    urls = [f"s3://{BUCKET}/rgb/shard-0000{i}.tar" for i in range(4)]
    sizes = [Path(local.partition("[")[0], url.removeprefix(f"s3://{BUCKET}/")).stat().st_size for url in urls]
    cache = ShardCache(options(store.endpoint, tmp_path, cache_bytes=max(sizes) * 3))
    stranger = tmp_path / "my-thesis.tex"
    stranger.write_bytes(b"x" * 10**6)
    (tmp_path / f"{'0' * 24}.part").write_bytes(b"x" * 10**6)  # of a process that was killed
    for url in urls[:3]:
        cache.open(url).close()
    held = cache.open(urls[1])
    cache.read(urls[0], 0, 10)
    held_at, first_at, third_at = (cache._locate(urls[i])[1] for i in (1, 0, 2))
    os.utime(third_at, (1, 1))
    cache.open(urls[3]).close()
    assert first_at.exists() and held_at.exists() and not third_at.exists()
    os.utime(held_at, (1, 1))
    cache.open(urls[2]).close()
    assert not held_at.exists() and len(held.readall()) == sizes[1], "what is open stays readable"
    assert stranger.exists() and not list(tmp_path.glob("*.part"))


def test_a_new_version_of_an_object_is_fetched(local, store, tmp_path):
    url, bucket = f"s3://{BUCKET}/changing.tar", client(store.endpoint)
    for content in (b"one", b"two"):
        bucket.put_object(Bucket=BUCKET, Key="changing.tar", Body=content, ChecksumAlgorithm="CRC32")
        cache = ShardCache(options(store.endpoint, tmp_path))
        assert cache.open(url).readall() == content and cache.describe(url).digest[0] == "crc32"


def test_a_copy_that_another_process_completes_in_between_is_not_fetched_again(local, store, tmp_path):
    class Late(ShardCache):
        def _open_copy(self, *arguments):
            copy = super()._open_copy(*arguments)
            if copy is None:
                other.open(url).close()
            return copy

    with faulty(store) as proxy:
        other, late = (kind(options(proxy.endpoint, tmp_path)) for kind in (ShardCache, Late))
        url = f"{on_s3(local).partition('[')[0]}rgb/shard-00000.tar"
        content = late.open(url).readall()
        assert [count for (method, _), count in proxy.counts.items() if method == "GET"] == [1]
    assert content == Path(local.partition("[")[0], "rgb/shard-00000.tar").read_bytes()
    assert not list(tmp_path.glob("*.part"))


@pytest.mark.slow
@pytest.mark.dist
def test_processes_share_a_cache(local, store, tmp_path):
    program = (
        "import json, sys; from tests.data.test_shard_cache import *\n"
        "endpoint, path, folder, limit = sys.argv[1:]\n"
        "print(json.dumps(stream(path, options(endpoint, Path(folder), cache_bytes=int(limit)), draws=24)))"
    )
    expected = [list(pair) for pair in stream(local, draws=24)]
    for limit, folder in ((10**9, "large"), (60_000, "small")):
        with faulty(store) as proxy:
            command = [warm_python(), "-c", program, proxy.endpoint, on_s3(local), tmp_path / folder, str(limit)]
            processes = [subprocess.Popen(command, cwd=ROOT, stdout=subprocess.PIPE, text=True) for _ in range(2)]
            for process in processes:
                assert json.loads(process.communicate(timeout=120)[0]) == expected
            fetched = {count for (method, _), count in proxy.counts.items() if method == "GET"}
            if folder == "large":
                assert fetched == {1}
            else:
                assert max(fetched) > 1
        assert sum(sizes(tmp_path / folder)) <= limit


@pytest.mark.parametrize("ranges", [True, False])
def test_shards_on_a_web_server(local, store, tmp_path, ranges):
    if ranges:
        with faulty(store, lambda method, path, before: "truncate" if before == 1 else None) as proxy:
            url = f"{proxy.endpoint}/{on_s3(local)[5:]}?token={SECRET}"
            assert stream(url, options("", tmp_path, part_bytes=9_000, split_above_bytes=9_000)) == stream(local)
        return
    handler = functools.partial(http.server.SimpleHTTPRequestHandler, directory=local.partition("[")[0])
    handler.log_message = lambda *_: None
    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), handler) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        url = f"http://127.0.0.1:{server.server_port}/[{local.partition('[')[2]}"
        assert stream(url, options("", tmp_path, cache_bytes=60_000)) == stream(local)
        server.shutdown()


@pytest.mark.parametrize(
    "fault, message",
    [
        ("404", "there is no such object"),
        ("403", "access denied"),
        ("502", "answers 502, 6 times"),
        ("refuse", "6 times"),
    ],
)
def test_a_web_server_that_fails_is_named_without_the_signature(local, store, tmp_path, fault, message):
    with faulty(store, lambda *_: fault) as proxy:
        url = f"{proxy.endpoint}/{on_s3(local)[5:]}?token={SECRET}"
        with pytest.raises(UserError, match=message) as failure:
            stream(url, options("", tmp_path))
        assert SECRET not in str(failure.value) and f"{proxy.server_port}/toys/rgb/shard-00000.tar" in str(
            failure.value
        )


def test_a_password_in_a_url_is_refused_and_not_repeated(tmp_path):
    with pytest.raises(
        UserError, match="^https://host/rgb/a.tar: URLs with a user or password are not supported"
    ) as failure:
        Shards(f"https://me:{SECRET}@host/[rgb]/a.tar", {"rgb@224": "rgb"}, None, remote=options("", tmp_path))
    assert SECRET not in str(failure.value)


def test_the_next_shards_are_fetched_while_one_is_used_and_given_up_with_it(local, store, tmp_path):
    with drawing(local) as samples:
        shards = [Path(sample.members["caption"].path).name for sample in itertools.islice(samples, 0, 12, 4)]
    assert len(set(shards)) > 1
    first_is_used = threading.Event()

    def wait_unless_first(method, path, before):
        if method == "GET" and Path(path).name != shards[0]:
            first_is_used.wait(30)

    with faulty(store, wait_unless_first) as proxy:
        with drawing(on_s3(local), options(proxy.endpoint, tmp_path)) as samples:
            next(samples)
            assert not first_is_used.is_set(), "nothing waits for the next ones"
            end = time.monotonic() + 30
            while time.monotonic() < end:
                if {Path(path).name for method, path in list(proxy.counts) if method == "GET"} == set(shards):
                    break
                time.sleep(0.02)
            else:
                pytest.fail(f"not asked for: {set(shards)}")
            copied = copies(tmp_path)
            samples.close()
            first_is_used.set()
        assert copies(tmp_path) == copied and not list(tmp_path.glob("*.part"))


def test_an_empty_member_is_read_from_the_store(store, tmp_path):
    url = f"s3://{BUCKET}/rgb/shard-00000.tar"
    cache = ShardCache(options(store.endpoint, tmp_path))
    assert cache.read(url, 512, 0) == b"" and len(cache.read(url, 0, 512)) == 512
    assert not list(tmp_path.iterdir())


def test_a_disk_that_is_full_is_one_error(store, tmp_path, monkeypatch):
    monkeypatch.setattr("fourm.data.shard_cache.os.pwrite", lambda descriptor, data, position: len(data) - 1)
    with pytest.raises(UserError, match=f"data_cache_dir {tmp_path}: No space left on device"):
        ShardCache(options(store.endpoint, tmp_path)).open(f"s3://{BUCKET}/rgb/shard-00000.tar")
    assert not list(tmp_path.glob("*.part"))


def test_a_wrong_profile_is_one_error(tmp_path, monkeypatch):
    monkeypatch.setenv("AWS_PROFILE", "nobody")
    with pytest.raises(UserError, match="S3 store http://127.0.0.1:9: .*profile.*nobody"):
        Shards(f"s3://{BUCKET}/a.tar", WANTED, NAMES, remote=options("http://127.0.0.1:9", tmp_path))


def copies(cache: Path) -> list[Path]:
    return sorted(path for path in cache.iterdir() if path.name[24:25] == "-")


@pytest.mark.parametrize("web", [False, True])
@pytest.mark.parametrize(
    "damage", ["cut off", "changed", "changed in secret", "another's notes", "link", "hard link", "pipe"]
)
def test_a_damaged_copy_is_fetched_again(local, store, tmp_path, damage, web, caplog):
    cache, mine = tmp_path / "cache", tmp_path / "mine"
    with faulty(store) as proxy:
        path = f"{proxy.endpoint}/{on_s3(local)[5:]}" if web else on_s3(local)
        remote = options("" if web else proxy.endpoint, cache)
        expected = stream(path, remote)
        for copy in copies(cache):
            status, content = copy.stat(), copy.read_bytes()
            mine.write_bytes(b"mine")
            if damage == "cut off":
                copy.write_bytes(content[:5000])
            elif damage in ("changed", "changed in secret"):
                copy.write_bytes(b"\0" * len(content))
                if damage == "changed in secret":
                    os.utime(copy, ns=(status.st_atime_ns, status.st_mtime_ns))
                    header = content[:257] + b"nonsense" + content[265:]
                    copy.write_bytes(header)
                    os.utime(copy, ns=(status.st_atime_ns, status.st_mtime_ns))
            elif damage == "another's notes":
                copy.write_bytes(b"\0" * len(content))
                copy.with_name(f"{copy.name[:24]}.sum").write_text("[" * 900)
            else:
                copy.unlink()
                if damage == "pipe":
                    os.mkfifo(copy)
                else:
                    (copy.symlink_to if damage == "link" else copy.hardlink_to)(mine)
                if damage == "link":
                    copy.with_name(f"{copy.name[:24]}.part").symlink_to(mine)
        if damage == "link":
            (cache / ".lock").unlink()
            (cache / ".lock").symlink_to(tmp_path / "made-elsewhere")
        assert stream(path, remote) == expected == stream(local)
    assert mine.read_bytes() == b"mine" and not (tmp_path / "made-elsewhere").exists()
    assert not any(copy.is_symlink() for copy in copies(cache))
    assert ("is damaged and will be downloaded again" in caplog.text) == ("link" not in damage and damage != "pipe")


def test_a_damaged_member_in_a_copy_is_read_anew_and_one_in_the_store_is_not(local, store, tmp_path, caplog):
    shards = Shards(on_s3(local), WANTED, NAMES, remote=options(store.endpoint, tmp_path))
    sample = next(iter(shards.all(BadSampleLedger("toy", 0.0))))
    member = sample.members["rgb@224"]
    copy = next(path for path in copies(tmp_path) if path.samefile(member.cache._locate(member.path)[1]))
    status = copy.stat()
    with copy.open("r+b") as file:
        file.seek(member.offset)
        file.write(b"\0" * member.size)
    os.utime(copy, ns=(status.st_atime_ns, status.st_mtime_ns))
    assert member.cache.repair(member.path) and "this copy of s3://toys/rgb" in caplog.text
    whole = Path(local.partition("[")[0], "rgb", Path(member.path).name).read_bytes()
    assert copy.read_bytes() == whole
    assert not member.cache.repair(member.path), "what is damaged still is so in the store"
