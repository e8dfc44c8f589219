"""The loader of batches: its worker processes, what it shares and holds, and how it ends."""

import gc
import itertools
import os
import signal
import subprocess
import sys
import time
import tracemalloc
from pathlib import Path

import pytest
from torch.utils.data import DataLoader, IterableDataset

from fourm.data.batch_loader import BatchLoader
from fourm.data.unified_datasets import build_train_loader
from tests.data.dataset_files import write_shards
from tests.data.toy_batches import TOKENIZER, config


@pytest.fixture(scope="module")
def shards(tmp_path_factory):
    return write_shards(tmp_path_factory.mktemp("shards"), 4, 5)


@pytest.mark.slow
@pytest.mark.parametrize("killed", [True, False])
def test_workers_live_as_long_as_their_parent(tmp_path, shards, killed):
    config(tmp_path, shards)
    script = """
import itertools, multiprocessing, sys
from fourm.data.data_config import load_data_config
from fourm.data.unified_datasets import build_train_loader
from tests.data.dataset_files import text_tokenizer

config = load_data_config(sys.argv[1], num_input_tokens=12, num_target_tokens=12)
batches = iter(build_train_loader(
    config, text_tokenizer(), batch_size=4, batches_per_epoch=5, num_workers=2, rank=0, world_size=1, seed=0
))
for _ in range(2):  # one from each worker: both have started
    next(batches)
print(*(child.pid for child in multiprocessing.active_children()), flush=True)
sys.stdin.readline()
print(len(list(itertools.islice(batches, 20))), flush=True)
"""  # it ends with its loader open
    command = [sys.executable, "-c", script, str(tmp_path / "data.yaml")]
    pipes = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE, "text": True, "cwd": Path(__file__).parents[2]}
    with subprocess.Popen(command, **pipes) as parent:
        workers = [int(pid) for pid in parent.stdout.readline().split()]
        assert len(workers) == 2
        if killed:
            parent.kill()
        else:
            for number in (signal.SIGTERM, signal.SIGINT):  # sent to all processes, it is for the parent
                for pid in workers:
                    os.kill(pid, number)
            out, _ = parent.communicate("\n", timeout=30)
            assert out == "20\n" and parent.returncode == 0
    deadline = time.time() + 20
    while (alive := [pid for pid in workers if _runs(pid)]) and time.time() < deadline:
        time.sleep(0.2)
    for pid in alive:
        os.kill(pid, signal.SIGKILL)
    assert not alive


def _runs(pid):
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
    except OSError:
        return False


class Shared(IterableDataset):
    """Whether each batch lies in shared memory where it is made."""

    def __init__(self, batches):
        self.batches = batches

    def __iter__(self):
        for batch in self.batches:
            yield {tensor.is_shared() for entry in batch.mod_dict.values() for tensor in entry.values()}


def test_workers_make_their_batches_where_the_main_process_reads_them(tmp_path, shards):
    batches = build_train_loader(
        config(tmp_path, shards),
        TOKENIZER,
        batch_size=4,
        batches_per_epoch=5,
        num_workers=1,
        rank=0,
        world_size=1,
        seed=0,
    )._batches
    for workers in (0, 1):
        assert next(iter(DataLoader(Shared(batches), batch_size=None, num_workers=workers))) == {workers == 1}


def test_a_long_stream_holds_no_more_than_its_buffers(tmp_path):
    path = write_shards(tmp_path / "s", 27, 2)  # of more tars than are kept open
    loader = build_train_loader(
        config(tmp_path, path),
        TOKENIZER,
        batch_size=16,
        batches_per_epoch=10**6,
        num_workers=0,
        rank=0,
        world_size=1,
        seed=0,
    )
    batches, files, memory = iter(loader), len(os.listdir("/proc/self/fd")), []
    tracemalloc.start()
    try:
        for _ in range(3):
            for _ in range(20):
                next(batches)
            gc.collect()
            memory.append(tracemalloc.get_traced_memory()[0])
    finally:
        tracemalloc.stop()
    assert len(os.listdir("/proc/self/fd")) - files < 27 * 5
    assert memory[2] - memory[1] < 20 * 16 * 50, "fifty bytes a sample are a leak"


def test_closing_a_loader_without_workers_closes_what_builds_the_batches():
    ended = []

    class Endless(IterableDataset):
        def __iter__(self):
            try:
                yield from itertools.count()
            finally:
                ended.append(True)  # a stream cancels its downloads here

    batches = iter(BatchLoader(Endless(), num_workers=0))
    assert (next(batches), next(batches), ended) == (0, 1, [])
    batches.close()
    assert ended


class Collections(IterableDataset):
    def __iter__(self):
        yield gc.get_freeze_count(), gc.get_threshold()[0]


def test_workers_do_not_collect_what_they_have_inherited():
    (frozen, threshold), *_ = BatchLoader(Collections(), 1)
    assert frozen > 10_000 and threshold == 20_000
    (_, threshold), *_ = BatchLoader(Collections(), 0)
    assert threshold == gc.get_threshold()[0]
