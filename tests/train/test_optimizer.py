"""Clipping, skipping and loss scaling against the plain way of doing it."""

import pytest
import torch

from fourm.train.optimizer import GradientStep, build_optimizer, set_hyperparameters
from fourm.train.parallel import DDP
from fourm.train.tasks.pretrain import PretrainConfig


def _setup(**options):
    torch.manual_seed(0)
    model = torch.nn.Sequential(torch.nn.Linear(5, 7), torch.nn.LayerNorm(7), torch.nn.Linear(7, 3))
    config = PretrainConfig(epochs=1, device="cpu", dtype=options.pop("dtype", "float32"), **options)
    parallel = DDP(config)
    optimizer = build_optimizer(model, config, [model], parallel)
    set_hyperparameters(optimizer, lr=0.1, weight_decay=0.2)
    return model, optimizer, GradientStep(optimizer, config, parallel)


def _loss(model, factor=1.0):
    return (model(torch.linspace(-1, 1, 20).view(4, 5)) ** 2).sum() * factor


def test_only_matrices_decay():
    _, optimizer, _ = _setup()
    decays = {
        parameter.ndim: group["weight_decay"] for group in optimizer.param_groups for parameter in group["params"]
    }
    assert decays == {1: 0.0, 2: 0.2}


@pytest.mark.parametrize("opt", ["adamw", "sgd", "muon"])
@pytest.mark.parametrize("clip", [None, 0.01, 100.0])
def test_clipping_equals_clipping_the_gradients_first(opt, clip):
    model, _, step = _setup(opt=opt, clip_grad=clip)
    plain, optimizer, _ = _setup(opt=opt)
    for _ in range(3):
        _loss(model).backward()
        norm, skipped = step(list(model.parameters()))
        _loss(plain).backward()
        expected = torch.nn.utils.clip_grad_norm_(plain.parameters(), clip or float("inf"))
        optimizer.step()
        optimizer.zero_grad()
        assert skipped == 0 and norm == pytest.approx(expected.item(), rel=1e-5)
        assert all(parameter.grad is None for parameter in model.parameters())
    for one, other in zip(model.parameters(), plain.parameters(), strict=True):
        torch.testing.assert_close(one, other)


@pytest.mark.parametrize("opt", ["adamw", "sgd", "muon"])
def test_a_skipped_step_changes_nothing(opt):
    skipping, _, step = _setup(opt=opt, skip_grad=5.0)
    plain, optimizer, _ = _setup(opt=opt)
    for factor in (1e3, 1e-3, float("nan"), 1e-3):  # the first and the third are skipped
        _loss(skipping, factor).backward()
        _, skipped = step(list(skipping.parameters()))
        assert bool(skipped) == (factor != 1e-3)
        if not skipped:
            _loss(plain, factor).backward()
            optimizer.step()
            optimizer.zero_grad()
    for one, other in zip(skipping.parameters(), plain.parameters(), strict=True):
        torch.testing.assert_close(one, other)


def test_the_loss_scale_follows_overflows_and_does_not_show():
    model, _, step = _setup(dtype="float16")
    plain, optimizer, _ = _setup()
    assert step.scale == 2.0**16
    (_loss(model) * float("inf")).backward()
    assert step(list(model.parameters()))[1] == 1 and step.scale == 2.0**15
    for _ in range(2000):
        (_loss(model) * step.scale).backward()
        norm, skipped = step(list(model.parameters()))
        _loss(plain).backward()
        expected = torch.nn.utils.clip_grad_norm_(plain.parameters(), float("inf"))
        optimizer.step()
        optimizer.zero_grad()
        assert skipped == 0 and norm == pytest.approx(expected.item(), rel=1e-3, abs=1e-6)
    assert step.scale == 2.0**16 and step.state() == [2.0**16, 0.0]
