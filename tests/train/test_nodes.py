"""Two nodes, simulated by two torchrun agents on one machine."""

import os
import socket
import subprocess

import pytest

from tests.train.toy_run import ROOT, log_lines, run_in_process, write_run
from tests.warm_python import warm_python

OPTIONS = {
    "epoch_size": 80,
    "epochs": 1,
    "warmup_epochs": 0,
    "eval_freq": 0,
    "batch_size": 2,
    "model_kwargs": {"dim": 32, "encoder_depth": 2, "decoder_depth": 2, "num_heads": 2},
}


def _free_port() -> int:
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        return listener.getsockname()[1]


@pytest.mark.slow
@pytest.mark.dist
def test_two_nodes_of_two_processes_train_as_one_process(tmp_path):
    alone = write_run(tmp_path / "alone", **OPTIONS | {"accum_iter": 4, "num_streams": 4})
    run_in_process(alone)
    config = write_run(tmp_path / "nodes", **OPTIONS)
    agent = [
        warm_python(),
        "-m",
        "torch.distributed.run",
        "--nnodes=2",
        "--nproc_per_node=2",
        "--rdzv_backend=c10d",
        f"--rdzv_endpoint=127.0.0.1:{_free_port()}",
        "--rdzv_id=toys",
        "--local_addr=127.0.0.1",
        "run_training_4m_fsdp.py",
        "--config",
        str(config),
        "--fsdp_shard_size",
        "2",
    ]
    environment = os.environ | {"GLOO_SOCKET_IFNAME": "lo"}
    nodes = [
        subprocess.Popen(agent, cwd=ROOT, env=environment, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)
        for _ in range(2)
    ]
    outputs = [node.communicate(timeout=240)[0] for node in nodes]
    assert [node.returncode for node in nodes] == [0, 0], "\n".join(outputs)
    lines = [
        [(line["loss"], line["grad_norm"]) for line in log_lines(folder.parent / "out")] for folder in (alone, config)
    ]
    assert len(lines[0]) == len(lines[1]) == 10
    for (loss, norm), (their_loss, their_norm) in zip(*lines, strict=True):
        assert their_loss == pytest.approx(loss, rel=1e-5) and their_norm == pytest.approx(norm, rel=1e-4)
