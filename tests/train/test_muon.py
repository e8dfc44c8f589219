"""Muon against ``torch.optim.Muon``, in one process and shared by two, and runs that are killed and resumed."""

import os

import pytest
import torch
from torch import nn
from torch.distributed.tensor import DTensor

from fourm.train.config import load_config
from fourm.train.fsdp import FSDP, set_shard
from fourm.train.optimizer import build_optimizer, set_hyperparameters
from fourm.train.parallel import DDP, share_matrices
from fourm.train.tasks.pretrain import PretrainConfig
from tests.train.toy_run import (
    CONTEXT,
    wait_for,
)

LR, DECAY = 0.02, 0.1


class Model(nn.Module):
    """An embedding that AdamW trains, and two blocks, whose matrices have rows that do not divide by two."""

    def __init__(self):
        super().__init__()
        self.embedding = nn.Embedding(6, 5)
        self.blocks = nn.ModuleList(nn.Sequential(nn.Linear(5, 9), nn.LayerNorm(9), nn.Linear(9, 5)) for _ in range(2))
        self.single_row = nn.ModuleList([nn.Linear(5, 1)])

    def init_weights(self):
        for parameter in self.parameters():
            nn.init.normal_(parameter)
        return self


def _train(strategy, meeting_point="env://", steps=3):
    """Do some steps with the same gradients in all processes; return the optimizer and the whole parameters."""
    options = {"opt": "muon", "muon_lr_scale": 0.5, "muon_momentum": 0.9, "device": "cpu", "dist_url": meeting_point}
    config = load_config(PretrainConfig, None, {"epochs": 1, "dtype": "float32", **options})
    parallel = strategy(config)
    with torch.device("meta"):
        model = Model()
    torch.manual_seed(0)
    blocks = [*model.blocks, *model.single_row]
    parallel.materialise(model, blocks)
    optimizer = build_optimizer(model, config, blocks, parallel)
    set_hyperparameters(optimizer, LR, DECAY)
    for _ in range(steps):
        for parameter in model.parameters():
            gradient = torch.randn(parameter.shape)
            parameter.grad = torch.zeros_like(parameter)
            set_shard(parameter.grad, gradient)
        optimizer.step()
    weights = {
        name: (parameter.full_tensor() if isinstance(parameter, DTensor) else parameter).detach()
        for name, parameter in model.named_parameters()
    }
    parallel.close()
    return optimizer, weights


def test_a_step_is_that_of_muon_and_adamw_of_torch():
    _, weights = _train(DDP)
    model = Model()
    torch.manual_seed(0)
    model.init_weights()
    matrices = [p for name, p in model.named_parameters() if p.ndim == 2 and "embedding" not in name]
    vectors = [p for p in model.parameters() if p.ndim == 1]
    muon = torch.optim.Muon(matrices, lr=LR / 2, weight_decay=DECAY, momentum=0.9, adjust_lr_fn="match_rms_adamw")
    adamw = torch.optim.AdamW([{"params": vectors, "weight_decay": 0.0}, {"params": [model.embedding.weight]}], lr=LR,
                              betas=(0.9, 0.95), weight_decay=DECAY)  # fmt: skip
    for _ in range(3):
        for parameter in model.parameters():
            parameter.grad = torch.randn(parameter.shape)
        muon.step()
        adamw.step()
    for name, parameter in model.named_parameters():
        torch.testing.assert_close(weights[name], parameter.detach(), rtol=1e-5, atol=1e-6, msg=name)


def _check_sharing(rank: int, meeting_point: str) -> None:
    _, expected = _train(DDP)
    os.environ.update(RANK=str(rank), WORLD_SIZE="2")
    for strategy in (DDP, FSDP):
        _, weights = _train(strategy, f"{meeting_point}-{strategy.__name__}")
        for name, tensor in expected.items():
            torch.testing.assert_close(weights[name], tensor, rtol=1e-6, atol=1e-7, msg=f"{strategy} {name}")


@pytest.mark.dist
def test_two_processes_that_share_the_matrices_do_the_same_step(tmp_path):
    meeting_point = f"file://{tmp_path}/meeting_point"
    ranks = [CONTEXT.Process(target=_check_sharing, args=(rank, meeting_point)) for rank in range(2)]
    for rank in ranks:
        rank.start()
    assert wait_for(ranks) == [0, 0]


def test_the_work_is_shared_evenly():
    shapes = [torch.Size(shape) for shape in [(64, 64), (192, 64), (64, 256)] * 4]
    shares = share_matrices(shapes, 4)
    assert sorted(i for share in shares for i in share) == list(range(12))
    sizes = [sum(shapes[i].numel() for i in share) for share in shares]
    assert max(sizes) < 1.4 * min(sizes)
    assert share_matrices(shapes[:1], 3) == [[0], [], []]
