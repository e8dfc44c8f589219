import io
import threading
import time

from fourm.utils.transfer import Downloads, RemoteObject, Retries


class Numbers:
    """A store of bytes that count, which notes how many threads there are."""

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
