import math

import numpy as np
import pytest
import torch

from fourm.train.optimizer import build_optimizer, set_hyperparameters
from fourm.train.schedules import build_schedule, run_length
from fourm.train.tasks.pretrain import PretrainConfig
from fourm.utils.errors import UserError


def _schedule(world_size=2, **options):
    config = PretrainConfig(batch_size=16, accum_iter=2, epoch_size=640, blr=1e-3, **options)
    return build_schedule(config, run_length(config, world_size), world_size)


def test_rates_scale_with_the_global_batch():
    schedule = _schedule(epochs=5, min_blr=1e-5, frozen_model_epochs=1, frozen_model_blr=2e-3)
    assert schedule.peak_lr == pytest.approx(1e-3 * 64 / 256) and schedule.min_lr == pytest.approx(1e-5 * 64 / 256)
    assert schedule.lr(0) == schedule.lr(19) == pytest.approx(2e-3 * 64 / 256) and schedule.frozen(19)
    assert not schedule.frozen(20) and schedule.lr(20) == pytest.approx(schedule.peak_lr)


def test_cosine_warms_up_from_zero_and_ends_at_the_minimum():
    schedule = _schedule(epochs=5, warmup_epochs=1, min_blr=1e-5)
    assert schedule.lr(0) == 0 and schedule.lr(19) == pytest.approx(schedule.peak_lr)
    assert schedule.lr(10) == pytest.approx(schedule.peak_lr * 10 / 19)
    assert schedule.lr(60) == pytest.approx((schedule.peak_lr + schedule.min_lr) / 2)
    rates = [schedule.lr(batch) for batch in range(20, 100)]
    assert rates == sorted(rates, reverse=True) and rates[-1] == pytest.approx(schedule.min_lr, rel=0.1)


def test_inverse_sqrt_and_its_cooldown():
    schedule = _schedule(epochs=5, warmup_steps=10, cooldown_steps=20, scheduler="inverse_sqrt-30")
    assert schedule.lr(10) == pytest.approx(schedule.peak_lr)
    assert schedule.lr(10 + 45) == pytest.approx(schedule.peak_lr / math.sqrt(75 / 30))
    assert schedule.lr(80) == pytest.approx(schedule.peak_lr / math.sqrt(100 / 30))
    assert schedule.lr(99) == 0 and schedule.lr(79) > schedule.lr(85) > schedule.lr(95)


def test_wsd_is_stable_between_warm_up_and_decay():
    schedule = _schedule(epochs=5, warmup_steps=10, cooldown_steps=20, scheduler="wsd", min_blr=1e-5)
    rates = [schedule.lr(batch) for batch in range(100)]
    assert rates[0] == 0 and set(rates[10:80]) == {schedule.peak_lr} and rates[99] == pytest.approx(schedule.min_lr)
    assert np.diff(rates[80:]) == pytest.approx((schedule.min_lr - schedule.peak_lr) / 19)
    with pytest.raises(UserError, match="'scheduler' wsd needs a cool-down: set one of cooldown_epochs"):
        _schedule(epochs=5, scheduler="wsd", cooldown_epochs=0)


def test_weight_decay_is_constant_unless_it_has_an_end():
    assert {_schedule(epochs=5).weight_decay(b) for b in (0, 50, 99)} == {0.05}
    changing = _schedule(epochs=5, weight_decay_end=0.5)
    assert changing.weight_decay(0) == pytest.approx(0.05) and changing.weight_decay(99) == pytest.approx(0.5, rel=0.01)


@pytest.mark.parametrize("opt", ["adamw", "sgd"])
def test_norms_and_biases_are_not_decayed(opt):
    model = torch.nn.Sequential(torch.nn.Linear(4, 4), torch.nn.LayerNorm(4))
    optimizer = build_optimizer(model, PretrainConfig(epochs=1, opt=opt))
    set_hyperparameters(optimizer, lr=0.1, weight_decay=0.05)
    decay = {id(p): group["weight_decay"] for group in optimizer.param_groups for p in group["params"]}
    assert [decay[id(p)] for p in model.parameters()] == [0.05, 0.0, 0.0, 0.0]
    assert {group["lr"] for group in optimizer.param_groups} == {0.1}
