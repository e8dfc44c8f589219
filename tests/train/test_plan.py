"""``--plan``: every published configuration on paper, without its data."""

import dataclasses

import pytest
import torch
import yaml

from fourm.train.config import load_config, parse_args
from fourm.train.parallel import DDP
from fourm.train.plan import STRATEGIES, plan_run, state_bytes
from fourm.train.run import Run
from fourm.train.tasks.pretrain import Pretrain, PretrainConfig
from fourm.utils.errors import UserError
from tests.models.toy_models import toy_model
from tests.train.toy_run import ROOT, run_in_process, write_run

PUBLISHED = sorted((ROOT / "cfgs/default/4m/models").rglob("*.yaml"))
TRUNK = {"4m-b": 198e6, "4m-l": 705e6, "4m-xl": 2.8e9}  # parameters, as published


def planned(path, **overrides):
    config = load_config(PretrainConfig, path, overrides)
    task = Pretrain(config)
    model = task.build_model()
    return plan_run(task, model), model


@pytest.mark.parametrize("path", PUBLISHED, ids=lambda path: path.stem)
def test_any_published_configuration_can_be_planned_without_data(path, monkeypatch):
    monkeypatch.chdir(ROOT)
    plan, model = planned(path.relative_to(ROOT), plan_world_size=128)
    assert all(parameter.is_meta for parameter in model.parameters())
    assert plan.parameters["trunk"] == pytest.approx(TRUNK[path.stem.split("_")[0]], rel=0.01)
    together = [sum(plan.memory[name].values()) for name in STRATEGIES]
    assert together == sorted(together, reverse=True) and together[2] > 1e9
    # Six operations per parameter and token: each token meets one half of the trunk; attention and logits come on top.
    least = 6 * plan.parameters["trunk"] / 2 * plan.total_tokens
    assert 0.95 * least < plan.total_flops < 2 * least
    assert plan.total_flops == pytest.approx(plan.days * 86400 * 128 * 0.4 * 989e12)


@pytest.mark.parametrize("opt", ["adamw", "muon"])
def test_states_take_what_they_take_in_a_run(tmp_path, opt):
    path = write_run(tmp_path / "toys", num_workers=0, opt=opt)
    config = parse_args(PretrainConfig, ["--config", str(path), "--plan_world_size", "1"])
    plan, _ = planned(path, plan_world_size=1)
    run = Run(Pretrain(config), DDP(config))
    actual = {}
    parameters = list(run.trainer.model.parameters())
    optimizer = run.trainer.optimizer
    optimizer.register_step_pre_hook(lambda *_: actual.update(gradients=sum(p.grad.nbytes for p in parameters)))
    run.trainer.train_step([next(run._batches())])
    actual["parameters"] = sum(p.nbytes for p in parameters)
    actual["optimizer"] = sum(t.nbytes for state in optimizer.state.values() for t in state.values() if t.ndim)
    expected = plan.memory["DDP"]
    assert actual == {part: expected[part] for part in actual}
    assert plan.steps == run.trainer.total_steps and plan.samples == 4


def test_a_model_that_the_machine_cannot_hold_is_refused_before_it_is_made(tmp_path):
    config = write_run(tmp_path / "toys", num_workers=0)
    large = ["--model_kwargs", "{dim: 32768, num_heads: 64, encoder_depth: 60, decoder_depth: 1}"]
    with pytest.raises(UserError, match="'model' .* with its 'model_kwargs': about .* parameters take .* GB, but this"):
        run_in_process(config, *large)
    assert "fits 80 GB" in run_in_process(config, *large, "--plan")


def test_shards_shrink_with_the_number_of_gpus(monkeypatch):
    monkeypatch.chdir(ROOT)
    path = "cfgs/default/4m/models/main/4m-xl_mod7_500b.yaml"
    (few, _), (many, _) = (planned(path, plan_world_size=size) for size in (16, 128))
    for strategy in STRATEGIES[1:]:
        assert few.memory[strategy]["optimizer"] == 8 * many.memory[strategy]["optimizer"]
    assert few.memory["DDP"] == many.memory["DDP"]
    assert few.flops == many.flops, "of a step on one GPU"
    assert few.days == pytest.approx(8 * many.days, rel=0.01)


def test_a_residual_stream_in_bfloat16_takes_less_memory(monkeypatch):
    monkeypatch.chdir(ROOT)
    path = "cfgs/default/4m/models/main/4m-b_mod7_500b.yaml"
    (default, _), (narrow, model) = (planned(path, residual_dtype=dtype) for dtype in ("float32", "bfloat16"))
    assert model.residual_dtype == torch.bfloat16
    activations = [plan.memory["DDP"]["activations"] for plan in (default, narrow)]
    assert 0.7 * activations[0] < activations[1] < 0.9 * activations[0]


def test_the_command_prints_a_table_and_touches_nothing(tmp_path):
    config = write_run(tmp_path / "toys")
    for path in (tmp_path / "toys" / "train").rglob("*.tar"):
        path.unlink()
    output = run_in_process(config, "--plan", "--plan_gpu", "A100", "--plan_world_size", "4", "--dtype", "bf16")
    for fact in (
        "on 4 x A100, bf16",
        "16 samples (4 x batch_size 4 x accum_iter 1)",
        "6 steps",
        "days at 40%",
        "FSDP, ZeRO-3",
        "fits 80 GB",
    ):
        assert fact in output, output
    assert not (tmp_path / "toys" / "out").exists()
    with pytest.raises(UserError, match="'plan_gpu': unknown 'H10'.*H100"):
        run_in_process(config, "--plan", "--plan_gpu", "H10")
    with pytest.raises(UserError, match="plan_mfu"):
        parse_args(PretrainConfig, ["--config", str(config), "--plan_mfu", "40"])


class WithoutData(Pretrain):
    def __init__(self, config):
        self.config = config


def test_sharing_within_a_machine_accumulation_and_the_average_count(tmp_path):
    model = toy_model()
    total = sum(parameter.numel() for parameter in model.parameters())

    def planned(**keys):
        config = load_config(PretrainConfig, None, {"epochs": 1, "dtype": "float32", **keys})
        return state_bytes(WithoutData(config), model, "FSDP, ZeRO-3", 16)

    plain, hybrid = planned(), planned(fsdp_shard_size=4)
    assert hybrid["optimizer"] == 8 * total / 4 == 4 * plain["optimizer"]
    assert planned(accum_iter=2)["gradients"] == 4 * total / 16 + 4 * total
    assert planned(model_ema=True)["parameters"] - plain["parameters"] == 4 * total / 16
    with pytest.raises(UserError, match="does not divide"):
        planned(fsdp_shard_size=3)


def test_a_transfer_is_planned_with_all_of_its_tokens_or_refused(tmp_path):
    path = write_run(tmp_path / "toys", num_workers=0)
    data_path = tmp_path / "toys" / "data.yaml"
    content = yaml.safe_load(data_path.read_text())
    (name, entry), *_ = content["train"]["datasets"].items()
    kept = {key: value for key, value in entry.items() if "alphas" not in key and "tokens" not in key}
    kept |= {"masking": "transfer", "in_domains": "rgb@32", "out_domains": "tok_rgb@32"}
    data_path.write_text(yaml.safe_dump({**content, "train": {"datasets": {name: kept}}, "val": {}}))
    config = load_config(PretrainConfig, path, {"num_input_tokens": 4, "num_target_tokens": 4})
    inputs, targets = Pretrain(dataclasses.replace(config, batch_size=8)).mean_budgets()
    assert (inputs, targets) == (pytest.approx({"rgb@32": 32}), pytest.approx({"tok_rgb@32": 32}))
    with pytest.raises(UserError, match=f"data set {name}: 'masking' transfer: .*set num_input_tokens to 4"):
        planned(path, num_input_tokens=3)
