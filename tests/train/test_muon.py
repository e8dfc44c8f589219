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
from fourm.utils.errors import UserError
from tests.train.toy_run import (
    CONTEXT,
    kill,
    losses,
    newest_step,
    run_in_process,
    run_ranks,
    start_ranks,
    wait_for,
    wait_for_step,
    write_run,
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


def _train(strategy, steps=3, **options):
    """Do some steps with the same gradients in all processes, and return the whole parameters."""
    options |= {"opt": "muon", "muon_lr_scale": 0.5, "muon_momentum": 0.9, "device": "cpu", "dtype": "float32"}
    config = load_config(PretrainConfig, None, {"epochs": 1, **options})
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
    return weights


def test_a_step_is_that_of_muon_and_adamw_of_torch():
    weights = _train(DDP)
    model = Model()
    torch.manual_seed(0)
    model.init_weights()
    matrices = [p for name, p in model.named_parameters() if p.ndim == 2 and "embedding" not in name]
    vectors = [p for p in model.parameters() if p.ndim == 1]
    muon = torch.optim.Muon(matrices, lr=LR / 2, weight_decay=DECAY, momentum=0.9, adjust_lr_fn="match_rms_adamw")
    adamw = torch.optim.AdamW(
        [{"params": vectors, "weight_decay": 0.0}, {"params": [model.embedding.weight]}],
        lr=LR,
        betas=(0.9, 0.95),
        weight_decay=DECAY,
    )
    for _ in range(3):
        for parameter in model.parameters():
            parameter.grad = torch.randn(parameter.shape)
        muon.step()
        adamw.step()
    for name, parameter in model.named_parameters():
        torch.testing.assert_close(weights[name], parameter.detach(), rtol=1e-5, atol=1e-6, msg=name)


def _check_sharing(rank: int, meeting_point: str) -> None:
    expected = _train(DDP)
    os.environ.update(RANK=str(rank), WORLD_SIZE="2")
    for number, (strategy, options) in enumerate([(DDP, {}), (FSDP, {}), (FSDP, {"fsdp_shard_size": 1})]):
        weights = _train(strategy, dist_url=f"{meeting_point}-{number}", **options)
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


def test_a_model_without_blocks_is_refused():
    config = PretrainConfig(epochs=1, opt="muon", device="cpu")
    with pytest.raises(UserError, match="'opt' muon: the model has no blocks with matrices"):
        build_optimizer(nn.Linear(2, 2), config, [], DDP(config))


@pytest.mark.dist
def test_a_killed_run_continues_exactly_and_fsdp_continues_alike(tmp_path):
    options = {
        "opt": "muon",
        "accum_iter": 2,
        "num_workers": 0,
        "num_streams": 2,
        "eval_freq": 0,
        "epochs": 1,
        "keep_last": 0,
        "save_every_minutes": 1e-9,
        "epoch_size": 96,
        "warmup_epochs": 0,
        "async_save": False,
    }
    config, whole = write_run(tmp_path / "killed", **options), write_run(tmp_path / "whole", **options)
    run_in_process(whole)
    expected = losses(whole.parent / "out")
    ranks = start_ranks(config, strategy=DDP, processes=1)
    wait_for_step(config, 3, ranks)
    kill(ranks)
    assert newest_step(config.parent / "out") < len(expected) == 12, "too late: the run has ended"
    with pytest.raises(UserError, match="muon_momentum 0.95 → 0.5; muon_lr_scale 1.0 → 2.0"):
        run_in_process(config, "--muon_momentum", 0.5, "--muon_lr_scale", 2)
    run_in_process(config)
    assert losses(config.parent / "out") == expected
    run_ranks(
        whole,
        "--resume",
        whole.parent / "out" / "checkpoints" / "step-00000004",
        "--output_dir",
        tmp_path / "two",
        "--accum_iter",
        1,
        strategy=FSDP,
    )
    later = {step: loss for step, loss in expected.items() if step > 4}
    assert losses(tmp_path / "two") == pytest.approx(later, rel=1e-4)
