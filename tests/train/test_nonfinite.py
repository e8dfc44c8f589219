"""Values that are not finite: skipped, counted, and never saved over good weights."""

import json
import shutil

import pytest
import torch
from safetensors.torch import load_file, save_file

from fourm.train.checkpoint import CheckpointWriter
from fourm.train.config import parse_args
from fourm.train.coordinator import Coordinator
from fourm.train.journal import Journal
from fourm.train.loop import TrainingLoop
from fourm.train.nonfinite import NonFiniteStreak, replace_non_finite
from fourm.train.parallel import DDP
from fourm.train.run import Run
from fourm.train.tasks.pretrain import Pretrain, PretrainConfig
from fourm.utils.errors import UserError
from tests.train.toy_run import losses, run_in_process, write_run

OPTIONS = {"num_workers": 0, "warmup_epochs": 0, "eval_freq": 0, "epoch_size": 16, "save_ckpt_freq": 1}


@pytest.fixture(scope="module")
def finished(tmp_path_factory):
    config = write_run(tmp_path_factory.mktemp("finite") / "toys", **OPTIONS)
    run_in_process(config)
    return config


def _copy(finished, tmp_path, name="out"):
    shutil.copytree(finished.parent / "out", tmp_path / name)
    return tmp_path / name


def test_a_step_with_a_loss_that_is_not_finite_changes_nothing_and_is_counted(tmp_path):
    path = write_run(tmp_path / "toys", **OPTIONS, model_ema=True)
    config = parse_args(PretrainConfig, ["--config", str(path)])
    run = Run(Pretrain(config), DDP(config))
    trainer, batches = run.trainer, run._batches()
    before = {name: parameter.detach().clone() for name, parameter in trainer.model.named_parameters()}
    bad = next(batches)
    bad.mod_dict["rgb@32"]["tensor"] = bad.mod_dict["rgb@32"]["tensor"].float().fill_(float("nan"))
    bad.mod_dict["rgb@32"]["input_mask"][:] = False
    trainer.train_step([bad])
    assert all(torch.equal(before[name], parameter) for name, parameter in trainer.model.named_parameters())
    assert all(average.isfinite().all() for average in trainer.ema.average.values())
    trainer.train_step([next(batches)])
    line = trainer.interval.means(run.parallel)
    assert line.skipped_steps == 1 and line.loss > 0 and all(0 < share < 1 for share in line.not_finite.values())
    assert trainer.non_finite_streak.read() is None


def test_too_many_steps_in_a_row_are_remembered_with_their_modalities():
    streak = NonFiniteStreak(["caption", "det"], 2, torch.device("cpu"))
    caption, nothing = torch.tensor([1.0, 0.0]), torch.zeros(2)
    for step, bad, where in [(1, 1, caption), (2, 0, nothing), (3, 1, nothing)]:
        streak.add(step, torch.tensor(float(bad)), where)
        assert streak.read() is None
    streak.add(4, torch.tensor(1.0), caption)
    assert streak.read() == (3, 4, ["caption"])
    streak.add(5, torch.tensor(0.0), nothing)
    assert streak.read() == (3, 4, ["caption"])


def test_a_run_that_diverges_ends_and_keeps_its_checkpoints(finished, tmp_path):
    out = _copy(finished, tmp_path)
    before = sorted(path.name for path in (out / "checkpoints").iterdir())
    with pytest.raises(UserError, match=r"in steps \d+ to \d+ \(3 in a row.*last good checkpoint is .*step-00000008"):
        run_in_process(
            finished,
            "--output_dir",
            out,
            "--epochs",
            9,
            "--blr",
            "1e30",
            "--clip_grad",
            "1e30",
            "--max_skipped_steps",
            3,
            "--allow_changes",
            "--save_ckpt_freq",
            0,
        )
    assert sorted(path.name for path in (out / "checkpoints").iterdir()) == before
    for line in (out / "log.jsonl").read_text().splitlines():
        json.loads(line, parse_constant=lambda name: pytest.fail(name))


def test_weights_that_are_not_finite_are_neither_saved_nor_taken(finished, tmp_path):
    config = parse_args(
        PretrainConfig, ["--config", str(finished), "--output_dir", str(_copy(finished, tmp_path)), "--epochs", "3"]
    )
    run = Run(Pretrain(config), DDP(config))
    with torch.no_grad():
        next(run.trainer.model.parameters()).view(-1)[0] = float("inf")
    writer = CheckpointWriter(run.checkpoints, run.parallel, 1, background=False)
    journal = Journal(config, run.trainer.step, run.trainer.total_steps, main=False)
    loop = TrainingLoop(run.trainer, [], {}, Coordinator(run.parallel, 1.0), journal, writer)
    run.trainer.step += 1
    with pytest.raises(UserError, match="step-00000009 could not be written: model/.* not finite.*step-00000008"):
        loop.save()
    assert max(path.name for path in run.checkpoints.iterdir()) == "step-00000008"
    weights = load_file(finished.parent / "out" / "model.safetensors")
    name = next(iter(weights))
    weights[name].view(-1)[0] = float("nan")
    save_file(weights, tmp_path / "nan.safetensors")
    with pytest.raises(UserError, match=f"{name} holds values that are not finite"):
        run_in_process(finished, "--output_dir", tmp_path / "new", "--finetune", tmp_path / "nan.safetensors")


def test_a_number_that_is_not_finite_is_null_in_json():
    line = {"step": 1, "losses": {"a": float("nan"), "b": 1.0}, "loss": float("-inf")}
    assert replace_non_finite(line) == (
        {"step": 1, "losses": {"a": None, "b": 1.0}, "loss": None},
        ["losses/a", "loss"],
    )


def test_damaged_lines_of_the_log_are_kept_aside(finished, tmp_path):
    out = _copy(finished, tmp_path)
    lines = (out / "log.jsonl").read_bytes().splitlines()
    (out / "log.jsonl").write_bytes(
        b"\n".join([*lines[:2], b"\xff\x00", b'{"loss": 1}', b"[]", lines[1], *lines[2:], b'{"st'])
    )
    output = run_in_process(finished, "--output_dir", out, "--epochs", 3)
    assert output.count("5 lines are damaged") == 1 and list(losses(out)) == list(range(1, 13))
    assert len((out / "log.jsonl.damaged").read_bytes().splitlines()) == 5


def test_another_configuration_needs_a_switch(finished, tmp_path):
    out = _copy(finished, tmp_path)
    changes = ["--output_dir", out, "--epochs", 3, "--seed", 7, "--opt", "sgd"]
    with pytest.raises(UserError, match="seed 0 → 7; opt adamw → sgd.*--allow_changes"):
        run_in_process(finished, *changes)
    assert "finished" in run_in_process(finished, *changes, "--allow_changes")
    data = tmp_path / "data.yaml"
    data.write_text((finished.parent / "data.yaml").read_text().replace("input_alphas: 0.5", "input_alphas: 0.1"))
    with pytest.raises(UserError, match="data set toys: .*alphas"):
        run_in_process(finished, "--output_dir", out, "--epochs", 3, "--data_config", data, "--seed", 7, "--opt", "sgd")


def test_a_checkpoint_of_an_earlier_version_is_gone_on_with(finished, tmp_path):
    from fourm.utils.checkpoints import CHECKSUMS, checksum

    out = _copy(finished, tmp_path)
    checkpoint = max((out / "checkpoints").iterdir())
    state = json.loads((checkpoint / "state.json").read_text())
    del state["identity"], state["config"]["max_skipped_steps"]
    (checkpoint / "state.json").write_text(json.dumps(state))
    sums = json.loads((checkpoint / CHECKSUMS).read_text()) | {"state.json": checksum(checkpoint / "state.json")}
    (checkpoint / CHECKSUMS).write_text(json.dumps(sums))
    assert "finished" in run_in_process(finished, "--output_dir", out, "--epochs", 3)


def test_a_finished_run_without_checkpoints_is_not_begun_anew(finished, tmp_path):
    out = _copy(finished, tmp_path)
    shutil.rmtree(out / "checkpoints")
    for left in ("the model", "the log"):
        with pytest.raises(
            UserError, match=f"holds {left} of an earlier run whose checkpoints were removed.*output_dir"
        ):
            run_in_process(finished, "--output_dir", out)
        if left == "the model":
            assert "eval toys" in run_in_process(
                finished, "--output_dir", out, "--eval", "--batch_size", 3, "--epoch_size", 1
            )
            (out / "model.safetensors").unlink()
    assert (out / "log.jsonl").read_text() == (finished.parent / "out" / "log.jsonl").read_text()
