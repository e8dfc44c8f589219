"""Faults of a run of weeks, in runs of seconds: kills, preemption, lost processes, damaged files, full disks."""

import contextlib
import itertools
import os
import re
import shutil
import signal
import subprocess
import time
from pathlib import Path

import pytest

from fourm.train.parallel import DDP
from tests.train.toy_run import (
    kill,
    log_lines,
    losses,
    newest_step,
    run_ranks,
    start,
    start_ranks,
    wait_for,
    wait_for_a_save,
    wait_for_step,
    write_run,
)

MODEL = {"dim": 16, "encoder_depth": 1, "decoder_depth": 1, "num_heads": 2}
OPTIONS = {"warmup_epochs": 0, "eval_freq": 0, "epoch_size": 80, "model_kwargs": MODEL, "model_ema": True}
KILLS = 6


@pytest.fixture(scope="module")
def undisturbed(tmp_path_factory):
    """The run folder of 20 steps of two processes under FSDP, with a checkpoint of every step."""
    config = write_run(tmp_path_factory.mktemp("whole") / "toys", **OPTIONS, save_every_minutes=1e-9, keep_last=0)
    run_ranks(config)
    return config.parent / "out"


@pytest.mark.slow
@pytest.mark.dist
def test_killed_again_and_again(undisturbed, tmp_path):
    killed = write_run(tmp_path / "killed", **OPTIONS)
    within_a_save = 0
    for kill_number in range(KILLS):
        ranks = start_ranks(killed, "--save_every_minutes", 1e-9)
        wait_for_step(killed, newest_step(killed.parent / "out") + 1, ranks)
        if kill_number % 3:
            wait_for_a_save(killed, ranks)  # so that it is killed during the save
        else:
            time.sleep(0.15 * kill_number / KILLS)  # another part of a step each time
        kill(ranks)
        within_a_save += any((killed.parent / "out" / "checkpoints").glob(".tmp-*"))
    assert within_a_save and newest_step(killed.parent / "out") < 20
    run_ranks(killed)
    assert losses(killed.parent / "out") == losses(undisturbed)
    log = (killed.parent / "out" / "log.txt").read_text()
    assert log.count("resumed from") == KILLS and "damaged" not in log


@pytest.mark.dist
def test_preemption_saves_and_exits_with_143(undisturbed, tmp_path):
    config = write_run(tmp_path / "toys", **OPTIONS, num_workers=1)
    ranks = start_ranks(config, "--save_every_minutes", 1e-9)
    wait_for_step(config, 3, ranks)
    os.kill(ranks[1].pid, signal.SIGTERM)  # one process receives it, and all stop
    assert wait_for(ranks) == [128 + signal.SIGTERM] * 2
    run_ranks(config)
    assert losses(config.parent / "out") == losses(undisturbed)


@pytest.mark.dist
def test_when_a_process_dies_the_others_end_with_a_message(tmp_path):
    config = write_run(tmp_path / "toys", **OPTIONS | {"epoch_size": 8000, "num_workers": 1})
    ranks = start_ranks(config, "--save_every_minutes", 1e-9)
    wait_for_step(config, 3, ranks)
    begin = time.monotonic()
    kill(ranks[1:])
    assert wait_for(ranks[:1]) == [1] and time.monotonic() - begin < 60
    assert "rank 0 stops because another process has died (" in (config.parent / "out" / "log.txt").read_text()


@pytest.mark.slow
@pytest.mark.dist
def test_torchrun_starts_a_run_again_by_itself(undisturbed, tmp_path):
    config = write_run(tmp_path / "toys", **OPTIONS, num_workers=1, save_every_minutes=1e-9)
    script = "run_training_4m_fsdp.py"
    process = start(
        config,
        processes=2,
        script=script,
        PET_MAX_RESTARTS="1",
        PET_MONITOR_INTERVAL="0.1",
        TORCH_DISABLE_SHARE_RDZV_TCP_STORE="1",
    )
    while newest_step(config.parent / "out") < 5:
        assert process.poll() is None
        time.sleep(0.01)
    os.kill(_rank_of(config, 1), signal.SIGKILL)
    output, errors = process.communicate(timeout=120)
    assert process.returncode == 0, output + errors
    assert "resumed from" in output and losses(config.parent / "out") == losses(undisturbed)


def _rank_of(config: Path, rank: int) -> int:
    """Return the id of the process that torchrun has given this rank."""
    for process in Path("/proc").glob("[0-9]*"):
        with contextlib.suppress(OSError):
            arguments, environment = ((process / name).read_text().split("\0") for name in ("cmdline", "environ"))
            if str(config) in arguments and f"RANK={rank}" in environment:
                return int(process.name)
    raise AssertionError(f"torchrun has no rank {rank}")


@pytest.mark.dist
def test_damaged_checkpoints_are_named_and_the_one_before_them_used(undisturbed, tmp_path):
    config = write_run(tmp_path / "toys", **OPTIONS)
    shutil.copytree(undisturbed, config.parent / "out")
    flipped, truncated = (
        max((config.parent / "out" / "checkpoints" / name).glob("shard-*"))
        for name in ("step-00000020", "step-00000019")
    )
    content = bytearray(flipped.read_bytes())
    content[len(content) // 2] ^= 1
    flipped.write_bytes(content)
    truncated.write_bytes(truncated.read_bytes()[:-5])
    (config.parent / "out" / "log.txt").unlink()
    run_ranks(config)
    log = (config.parent / "out" / "log.txt").read_text()
    for shard in (flipped, truncated):
        assert re.search(f"{shard.parent.name} is damaged: {shard.name} .*; trying the checkpoint before it", log)
    assert "resumed from" in log and "step-00000018" in log
    assert losses(config.parent / "out") == losses(undisturbed)


@pytest.mark.dist
def test_without_an_intact_checkpoint_no_new_run_starts(undisturbed, tmp_path):
    config = write_run(tmp_path / "toys", **OPTIONS)
    for step in (19, 20):
        name = f"checkpoints/step-{step:08d}"
        shutil.copytree(undisturbed / name, config.parent / "out" / name)
        (config.parent / "out" / name / "state.json").write_text("{}")
    run_ranks(config, status=2)


@pytest.mark.dist
def test_a_full_disk_is_one_error_and_the_old_checkpoint_survives(undisturbed, tmp_path):
    disk = tmp_path / "toys" / "out"
    config = write_run(tmp_path / "toys", **OPTIONS, keep_last=0)
    disk.mkdir()
    size = sum(path.stat().st_size for path in (undisturbed / "checkpoints" / "step-00000020").iterdir())
    mounting = ["mount", "-t", "tmpfs", "-o", f"size={int(2.5 * size)}", "tmpfs", str(disk)]
    if subprocess.run(mounting, capture_output=True).returncode:
        pytest.skip("only root may mount a small disk")
    try:
        run_ranks(config, "--save_every_minutes", 1e-9, status=2)
        kept = [path.name for path in sorted((disk / "checkpoints").iterdir())]
        assert kept == ["step-00000001", "step-00000002"]
        subprocess.run(["mount", "-o", f"remount,size={30 * size}", str(disk)], check=True)
        run_ranks(config)
        assert losses(disk) == losses(undisturbed)
    finally:
        subprocess.run(["umount", str(disk)], check=True)


def _from_step_5(undisturbed, tmp_path, **options) -> Path:
    config = write_run(tmp_path / "toys", **OPTIONS | options)
    kept = config.parent / "out" / "checkpoints" / "step-00000005"
    shutil.copytree(undisturbed / "checkpoints" / "step-00000005", kept)
    shutil.copy(undisturbed / "log.jsonl", config.parent / "out")
    return config


@pytest.mark.dist
@pytest.mark.parametrize(
    ("strategy", "processes", "options"), [(DDP, 2, {}), (DDP, 1, {"accum_iter": 2, "num_workers": 2})]
)
def test_a_checkpoint_fits_every_strategy_and_number_of_processes(undisturbed, tmp_path, strategy, processes, options):
    config = _from_step_5(undisturbed, tmp_path, **options)
    run_ranks(config, strategy=strategy, processes=processes)
    actual = losses(config.parent / "out")
    assert list(actual) == list(range(1, 21)) and actual == pytest.approx(losses(undisturbed), rel=1e-5)
    assert "data begin anew" not in (config.parent / "out" / "log.txt").read_text()
    back = write_run(tmp_path / "back", **OPTIONS)
    checkpoints = config.parent / "out" / "checkpoints"
    run_ranks(back, "--resume", checkpoints / "step-00000010")
    expected = {step: loss for step, loss in losses(undisturbed).items() if step > 10}
    assert losses(back.parent / "out") == pytest.approx(expected, rel=1e-5)


@pytest.mark.dist
def test_another_layout_says_what_of_the_data_is_kept(undisturbed, tmp_path):
    config = _from_step_5(undisturbed, tmp_path, batch_size=2)
    run_ranks(config, "--fsdp_shard_size", 2, processes=4)
    log = (config.parent / "out" / "log.txt").read_text()
    assert "made with {'num_streams': 2, 'batch_size': 4}" in log
    assert "this epoch's data begin anew: some of its samples come twice, and others not at all" in log
    actual = losses(config.parent / "out")
    assert list(actual) == list(range(1, 21)) and dict(itertools.islice(actual.items(), 5)) == {
        step: loss for step, loss in losses(undisturbed).items() if step <= 5
    }
    assert all("grad_norm" in line for line in log_lines(config.parent / "out"))
