"""A run that waits for data reacts to signals, and does not wait for ever."""

import os
import signal
import time

import pytest
from torch.utils.data import IterableDataset

from fourm.data.batch_loader import BatchLoader
from fourm.train.parallel import DDP
from fourm.utils.errors import UserError
from tests.train.toy_run import newest_step, start_ranks, wait_for, write_run

OPTIONS = {"warmup_epochs": 0, "eval_freq": 0, "plugin": "tests.train.hanging"}


@pytest.mark.dist
@pytest.mark.parametrize(("processes", "workers"), [(1, 0), (2, 1)])
def test_sigterm_stops_a_run_while_a_transform_hangs(tmp_path, processes, workers):
    config = write_run(tmp_path / "toys", **OPTIONS, num_workers=workers)
    ranks = start_ranks(config, strategy=DDP, processes=processes, FOURM_TEST_HANGS="14")  # in the fourth batch
    log = config.parent / "out" / "log.txt"
    deadline = time.monotonic() + 60
    while not log.exists() or f"step {2 if processes == 1 else 1}/" not in log.read_text():
        assert time.monotonic() < deadline
        time.sleep(0.05)
    time.sleep(0.5)
    assert newest_step(config.parent / "out") == 0
    os.kill(ranks[0].pid, signal.SIGTERM)
    assert wait_for(ranks, 60) == [128 + signal.SIGTERM] * processes
    assert newest_step(config.parent / "out") == 3


@pytest.mark.dist
@pytest.mark.parametrize("workers", [0, 1])
def test_waiting_for_data_has_a_time_limit(tmp_path, workers):
    config = write_run(tmp_path / "toys", **OPTIONS, num_workers=workers, data_timeout=0.03)
    ranks = start_ranks(config, strategy=DDP, processes=1, FOURM_TEST_HANGS="6")
    assert wait_for(ranks, 60) == [2]


class _Dies(IterableDataset):
    def __iter__(self):
        yield 1
        os.kill(os.getpid(), signal.SIGKILL)
        yield 2


class _Fails(IterableDataset):
    def __iter__(self):
        yield 1
        raise OSError(5, "Input/output error", "a.tar")


@pytest.mark.parametrize(
    ("batches", "message"), [(_Dies(), "ended by SIGKILL.*memory"), (_Fails(), "a.tar: Input/output error")]
)
def test_the_failure_of_a_worker_is_reported_in_a_sentence(batches, message):
    iterator = iter(BatchLoader(batches, 1))
    with pytest.raises(UserError, match=message):
        list(iterator)
    iterator.close()
