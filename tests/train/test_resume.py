"""An interrupted run ends with exactly the same weights and losses as an uninterrupted one."""

import contextlib
import json
import os
import shutil
import signal
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from fourm.train.parallel import DDP
from fourm.utils.errors import UserError
from tests.train.toy_run import (
    log_lines,
    losses,
    run,
    run_in_process,
    start_ranks,
    wait_for,
    wait_for_step,
    write_run,
)

OPTIONS = {
    "accum_iter": 2,
    "batch_warmup_steps": 16,
    "epoch_size": 96,
    "num_workers": 2,
    "log_interval": 3,
    "save_every_minutes": 1e-9,
}
IN_PROCESS = {"num_workers": 0, "num_streams": 2}  # the same data, without the processes of loaders


def _interrupt(config: Path, at: int, number: int) -> str:
    """Send a signal as soon as there is a checkpoint of step ``at``, so that it arrives in the middle of an epoch."""
    ranks = start_ranks(config, strategy=DDP, processes=1)
    out = config.parent / "out"
    wait_for_step(config, at, ranks)
    assert not (out / "model.safetensors").exists(), "too late: the run has ended"
    times = 2 if number == signal.SIGTERM else 1  # as schedulers do
    for child in _descendants(ranks[0].pid)[::-1] * times:  # the run and its loader processes
        with contextlib.suppress(ProcessLookupError):
            os.kill(child, number)
    assert wait_for(ranks, 60)[0] not in (None, 0, 1, 2)
    return (out / "log.txt").read_text()


def _descendants(pid: int) -> list[int]:
    """Return the ids of the process and all of its descendants."""
    parents = {}
    for status in Path("/proc").glob("[0-9]*/stat"):
        with contextlib.suppress(OSError):
            parents[int(status.parent.name)] = int(status.read_text().rpartition(")")[2].split()[1])
    pids = [pid]
    for parent in pids:
        pids += [child for child, its_parent in parents.items() if its_parent == parent]
    return pids


def _assert_same(one: Path, other: Path) -> None:
    assert losses(one) == losses(other)
    means = [
        [(line["step"], line["losses"], line["grad_norm"]) for line in log_lines(out) if "loss" in line]
        for out in (one, other)
    ]
    assert means[0] == means[1]
    evaluations = [[line for line in log_lines(out) if "eval" in line] for out in (one, other)]
    assert evaluations[0] == evaluations[1] != []
    weights = [load_file(out / "model.safetensors") for out in (one, other)]
    assert all(torch.equal(weights[0][name], weights[1][name]) for name in weights[0])


@pytest.fixture(scope="module")
def uninterrupted(tmp_path_factory):
    config = write_run(tmp_path_factory.mktemp("resume") / "whole", **OPTIONS | IN_PROCESS | {"save_every_minutes": 0})
    run(config)
    return config.parent / "out"


@pytest.mark.slow
def test_killed_in_the_middle_of_an_epoch(uninterrupted, tmp_path):
    config = write_run(tmp_path / "killed", **OPTIONS)
    _interrupt(config, at=4, number=signal.SIGKILL)
    _interrupt(config, at=14, number=signal.SIGKILL)
    assert "resumed from" in run(config)
    _assert_same(config.parent / "out", uninterrupted)


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_a_signal_saves_the_step_at_hand(uninterrupted, tmp_path, number):
    config = write_run(tmp_path / "stopped", **OPTIONS)
    output = _interrupt(config, at=2, number=number)
    newest = max((config.parent / "out" / "checkpoints").iterdir())
    assert f"stopped at step {int(newest.name[5:])}; the same command goes on" in output
    run(config, "--save_every_minutes", "0")
    _assert_same(config.parent / "out", uninterrupted)


def test_a_damaged_checkpoint_is_passed_over(uninterrupted, tmp_path):
    config = write_run(tmp_path / "damaged", **OPTIONS | IN_PROCESS)
    shutil.copytree(uninterrupted, config.parent / "out")
    weights = next((config.parent / "out" / "checkpoints" / "step-00000024").glob("shard-*-00001-of-*"))
    weights.write_bytes(weights.read_bytes()[:-100])
    output = run_in_process(config, "--save_every_minutes", "0")
    assert f"step-00000024 is damaged: {weights.name} has" in output and "step-00000012" in output
    _assert_same(config.parent / "out", uninterrupted)


def test_an_evaluation_that_was_cut_off_is_made_up_for(uninterrupted, tmp_path):
    config = write_run(tmp_path / "cut", **OPTIONS | IN_PROCESS)
    out = config.parent / "out"
    shutil.copytree(uninterrupted, out)
    lines = [json.dumps(line) + "\n" for line in log_lines(out)]
    (out / "log.jsonl").write_text("".join(lines[:-1]) + lines[-1][:40])  # killed while it wrote
    run_in_process(config, "--save_every_minutes", "0")
    _assert_same(out, uninterrupted)


def test_resume_names_a_checkpoint(uninterrupted, tmp_path):
    config = write_run(tmp_path / "named", **OPTIONS | IN_PROCESS)
    run_in_process(config, "--resume", uninterrupted / "checkpoints" / "step-00000012", "--save_every_minutes", "0")
    actual, expected = losses(config.parent / "out"), losses(uninterrupted)
    assert actual == {step: loss for step, loss in expected.items() if step > 12}
    assert "step-00000024" in run_in_process(config, "--resume", uninterrupted / "checkpoints" / "step-00000012")
    with pytest.raises(UserError, match="'resume': nowhere is neither a checkpoint"):
        run_in_process(config, "--resume", "nowhere", "--output_dir", tmp_path / "other")


def test_another_number_of_workers_goes_on_with_a_warning(uninterrupted, tmp_path):
    config = write_run(tmp_path / "workers", **OPTIONS | {"num_workers": 0})
    shutil.copytree(uninterrupted, config.parent / "out")
    shutil.rmtree(config.parent / "out" / "checkpoints" / "step-00000024")
    output = run_in_process(config, "--save_every_minutes", "0")
    assert "made with {'num_streams': 2, 'batch_size': 4}, now" in output
    assert "the coming epochs draw their samples in another order" in output
    assert set(losses(config.parent / "out")) == set(losses(uninterrupted))


def test_another_global_batch_or_model_is_refused(uninterrupted, tmp_path):
    config = write_run(tmp_path / "other", **OPTIONS | IN_PROCESS)
    shutil.copytree(uninterrupted, config.parent / "out")
    with pytest.raises(UserError, match="made with 8 samples per optimizer step, not 16"):
        run_in_process(config, "--batch_size", "8")
    with pytest.raises(UserError, match="does not fit this configuration"):
        run_in_process(config, "--model_kwargs", "{dim: 16, encoder_depth: 1, decoder_depth: 1, num_heads: 2}")
