"""In a batch-size warm-up, the parts of a batch are used for an update each, like batches of their size."""

import copy
import math

import pytest
import torch

from fourm.train.batch_warmup import divide
from fourm.train.config import load_config
from fourm.train.parallel import DDP
from fourm.train.run import Run
from fourm.train.tasks.pretrain import Pretrain, PretrainConfig, normalise
from fourm.utils.errors import UserError
from tests.train.toy_run import log_lines, run_in_process, write_run


def test_the_number_of_updates_is_halved_at_equal_intervals():
    config = PretrainConfig(epochs=1, batch_size=8, batch_warmup_steps=10)
    assert [config.updates(step) for step in range(12)] == [4] * 5 + [2] * 5 + [1] * 2
    config = PretrainConfig(epochs=1, batch_size=8, batch_warmup_steps=2, batch_warmup_parts=8)
    assert [config.updates(step) for step in range(3)] == [8, 4, 1]
    assert PretrainConfig(epochs=1, batch_size=3).updates(0) == 1, "off by default, for batches of any size"


@pytest.mark.parametrize(("batch_size", "accum_iter", "parts"), [(6, 1, 4), (4, 3, 4), (1, 2, 4), (64, 1, 6)])
def test_a_batch_that_cannot_be_divided_is_an_error(batch_size, accum_iter, parts):
    sizes = {"batch_size": batch_size, "accum_iter": accum_iter}
    with pytest.raises(UserError, match="'batch_warmup_parts'"):
        PretrainConfig(epochs=1, batch_warmup_steps=1, batch_warmup_parts=parts, **sizes)


@pytest.fixture
def warming_up(tmp_path):
    """Return a run whose first step has four updates, and its batches."""
    options = {"num_workers": 0, "accum_iter": 2, "batch_warmup_steps": 2, "max_skipped_steps": 1}
    options |= {"warmup_epochs": 0, "blr": 0.01}
    config = load_config(PretrainConfig, write_run(tmp_path / "toys", **options))
    run = Run(Pretrain(config), DDP(config))
    batches = run._batches()
    return run, [next(batches), next(batches)]


def test_the_parts_have_every_sample_once_and_count_bad_ones_once(warming_up):
    _, batches = warming_up
    for batch in batches:
        batch.position["skipped"] = {"toys: unreadable": 3}
    for updates in (4, 2):
        parts = [part for update in divide(batches, updates) for part in update]
        assert len(divide(batches, updates)) == updates and len(parts) == max(updates, len(batches))
        for name, entry in batches[0].mod_dict.items():
            for key in entry:
                whole, divided = (torch.cat([b.mod_dict[name][key] for b in many]) for many in (batches, parts))
                assert torch.equal(whole, divided)
        assert sum(sum(part.position["skipped"].values()) for part in parts) == 6
        assert parts[-1].position["draws"] == batches[-1].position["draws"]
    assert divide(batches, 1) == [batches]


def test_a_step_makes_an_update_with_each_part_at_the_learning_rate_of_its_size(warming_up):
    run, batches = warming_up
    trainer, config = run.trainer, run.config
    twin = copy.deepcopy(trainer.model)
    lr = trainer.schedule.lr(0) / math.sqrt(4)
    decayed, others = ([p for p in twin.parameters() if (p.ndim > 1) == large] for large in (True, False))
    groups = [{"params": decayed, "weight_decay": config.weight_decay}, {"params": others, "weight_decay": 0.0}]
    optimizer = torch.optim.AdamW(groups, lr=lr, betas=config.opt_betas, eps=config.opt_eps)
    losses = []
    for (part,) in divide(batches, 4):
        images = {
            name: part.mod_dict[name] | {"tensor": normalise(part.mod_dict[name]["tensor"], *scaling)}
            for name, scaling in part.scaling.items()
        }
        loss, _ = twin(part.mod_dict | images, *run.task.slots)
        loss.backward()
        torch.nn.utils.clip_grad_norm_(twin.parameters(), config.clip_grad or math.inf)
        optimizer.step()
        optimizer.zero_grad()
        losses.append(loss.item())
    trainer.train_step(batches)
    assert trainer.step == 1 and trainer.rates(0)["lr"] == lr and trainer.rates(2)["lr"] == trainer.schedule.lr(4)
    for (name, mine), theirs in zip(trainer.model.named_parameters(), twin.parameters(), strict=True):
        torch.testing.assert_close(mine, theirs, rtol=1e-3, atol=1e-5, msg=lambda m, name=name: f"{name}: {m}")
    means = trainer.interval.means(trainer.parallel)
    assert means.loss == pytest.approx(sum(losses) / 4, rel=1e-4) and means.skipped_steps == 0


def test_every_sample_weighs_alike_in_the_mean_loss_of_steps_with_four_two_and_one_updates(warming_up, monkeypatch):
    run, batches = warming_up
    picture = batches[0].mod_dict["rgb@32"]
    picture["tensor"], picture["input_mask"][:] = picture["tensor"].float(), False
    picture["tensor"][:2] = torch.nan  # the first of four parts, which is left out
    compute, parts = run.task.loss, []

    def record(model, inputs):
        losses = compute(model, inputs)
        parts.append((inputs.samples, losses.total.item()))
        return losses

    monkeypatch.setattr(run.task, "loss", record)
    later = run._batches()
    for micro_batches in (batches, *([next(later), next(later)] for _ in range(2))):
        run.trainer.train_step(micro_batches)
    assert [samples for samples, _ in parts] == [2] * 4 + [4] * 4
    finite = [(samples, loss) for samples, loss in parts if math.isfinite(loss)]
    assert len(finite) == len(parts) - 1
    mean = sum(samples * loss for samples, loss in finite) / sum(samples for samples, _ in finite)
    assert run.trainer.interval.means(run.parallel).loss == pytest.approx(mean, rel=1e-12)


@pytest.mark.parametrize("bad_parts", [1, 4])
def test_a_step_has_failed_if_none_of_its_updates_succeeds(warming_up, bad_parts):
    run, batches = warming_up
    trainer = run.trainer
    for k, batch in enumerate(batches):  # of two parts each
        picture = batch.mod_dict["rgb@32"]
        picture["tensor"], picture["input_mask"][:] = picture["tensor"].float(), False
        picture["tensor"][: 2 * max(bad_parts - 2 * k, 0)] = torch.nan
    before = trainer.model.mask_token.clone()
    trainer.train_step(batches)
    assert trainer.interval.means(trainer.parallel).skipped_steps == bad_parts
    failed = bad_parts == 4
    assert (trainer.non_finite_streak.read() is not None) == torch.equal(trainer.model.mask_token, before) == failed


def test_the_log_has_the_learning_rates_of_the_updates(tmp_path):
    options = {"num_workers": 0, "epochs": 1, "epoch_size": 16, "log_interval": 1, "warmup_epochs": 0}
    rates = {}
    for steps in (0, 2):
        config = write_run(tmp_path / str(steps), **options, batch_warmup_steps=steps)
        run_in_process(config)
        rates[steps] = [line["lr"] for line in log_lines(config.parent / "out") if "loss" in line]
    shares = [warm / plain for warm, plain in zip(rates[2], rates[0], strict=True)]
    assert shares == pytest.approx([0.5, math.sqrt(0.5), 1, 1])
