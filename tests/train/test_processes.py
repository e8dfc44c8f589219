"""How long the processes of a run wait for each other."""

import os
import time

import pytest
import torch
import torch.distributed as dist

from fourm.train.fsdp import FSDP
from fourm.train.parallel import Processes
from fourm.train.tasks.pretrain import PretrainConfig
from fourm.utils.errors import UserError
from tests.train.toy_run import CONTEXT, wait_for

TIMEOUT = 3.0  # seconds


def _options(rank: int, world_size: int, rendezvous: str, **options) -> PretrainConfig:
    os.setpgid(0, 0)  # so that wait_for can kill it
    os.environ.update(RANK=str(rank), WORLD_SIZE=str(world_size))
    return PretrainConfig(epochs=1, device="cpu", dist_url=rendezvous, process_timeout=TIMEOUT / 60, **options)


def _start(target, processes: int, folder, *args):
    ranks = [
        CONTEXT.Process(target=target, args=(rank, processes, f"file://{folder}/rendezvous", *args))
        for rank in range(processes)
    ]
    for rank in ranks:
        rank.start()
    return ranks


def _work_longer_than_the_timeout(rank: int, world_size: int, rendezvous: str) -> None:
    processes = Processes(_options(rank, world_size, rendezvous))

    def long_work() -> str:
        time.sleep(2 * TIMEOUT)
        return "a checkpoint was fetched"

    assert processes.from_main(long_work) == "a checkpoint was fetched"

    def failing_work() -> None:
        raise UserError("the store cannot be read")

    with pytest.raises(UserError, match="the store cannot be read"):
        processes.from_main(failing_work)
    processes.close()


@pytest.mark.dist
def test_what_one_process_does_for_all_may_last_longer_than_process_timeout(tmp_path):
    ranks = _start(_work_longer_than_the_timeout, 2, tmp_path)
    assert wait_for(ranks, 60) == [0, 0]


def _wait_alone_in_every_group(rank: int, world_size: int, rendezvous: str, done) -> None:
    strategy = FSDP(_options(rank, world_size, rendezvous, fsdp_shard_size=2))
    strategy.new_group()
    if rank:
        done.wait()  # and takes part in no collective operation, as if it hung
        os._exit(0)  # rather than close, as the groups are broken now
    groups = list(dist.distributed_c10d._world.pg_map)
    sizes = sorted(group.size() for group in groups)
    assert sizes == [2, 2, 4, 4], "neighbours with a shard each, replicas, all processes, and those of a thread"
    begin = time.monotonic()
    operations = [dist.all_reduce(torch.zeros(1), group=group, async_op=True) for group in groups]
    for operation in operations:
        with pytest.raises(RuntimeError, match="(?i)timed out|timeout"):
            operation.wait()
    assert time.monotonic() - begin > 0.5 * TIMEOUT
    done.set()
    os._exit(0)


@pytest.mark.dist
def test_process_timeout_holds_in_every_process_group(tmp_path):
    done = CONTEXT.Event()
    ranks = _start(_wait_alone_in_every_group, 4, tmp_path, done)
    assert wait_for(ranks, 60) == [0] * 4
