"""The reports of a run on its speed: times per phase, memory, FLOPs, and a trace."""

import json

import pytest
import torch

from fourm.models import StepFlops
from fourm.train.config import parse_args
from fourm.train.device import GPUS, peak_tflops
from fourm.train.parallel import DDP
from fourm.train.run import Run
from fourm.train.tasks.pretrain import Pretrain, PretrainConfig
from tests.train.toy_run import log_lines, run_in_process, write_run

PHASES = ("data_wait", "select_and_copy", "forward", "backward", "optimizer")


@pytest.fixture(scope="module")
def measured(tmp_path_factory):
    """The lines of a run's log, its output and its folder."""
    folder = tmp_path_factory.mktemp("measured") / "toys"
    config = write_run(folder, accum_iter=2, log_interval=2, keep_last=1)
    output = run_in_process(config, "--profile", "--peak_tflops", "0.5")
    return [line for line in log_lines(folder / "out") if "loss" in line], output, folder / "out"


def test_every_line_of_the_log_has_the_time_of_each_phase(measured):
    lines, _, _ = measured
    for line in lines:
        assert all(line["seconds"][phase] > 0 for phase in PHASES)
        two_steps = 2 * 2 * 4 / line["samples_per_second"]  # of two micro-batches of 4 samples
        training = sum(line["seconds"][phase] for phase in PHASES)
        assert 0 < training < 1.01 * two_steps, "the phases are parts of the steps"
        assert line["data_wait"] == pytest.approx(line["seconds"]["data_wait"] / two_steps)


def test_saving_has_a_phase_and_takes_no_time_of_the_interval(measured):
    lines, _, _ = measured
    saved = [line["step"] for line in lines if "save" in line["seconds"]]
    assert saved == [8], (
        "an epoch has 6 steps: its save shows in the next line; the last save comes after the last line"
    )


def test_flops_utilisation_and_memory(measured):
    lines, output, _ = measured
    for line in lines:
        assert line["mfu"] == pytest.approx(line["tflops"] / 0.5) and line["tflops"] > 0
        assert 10**8 < line["peak_memory"] < 10**11
    assert "MFU" in output and "peak memory" in output


def test_the_flops_are_those_of_the_batches(tmp_path):
    config = parse_args(PretrainConfig, ["--config", str(write_run(tmp_path / "toys", num_workers=0))])
    run = Run(Pretrain(config), DDP(config))
    batch = next(run._batches())
    torch.manual_seed(0)
    selection = run.trainer.model.select_tokens(batch.mod_dict, 16, 12, pack=True)
    run.trainer.train_step([batch])
    line = run.trainer.interval.means(run.parallel)
    assert line.mfu is None and "mfu" not in line.line(), "nobody knows what this CPU could do"
    seconds = 4 / line.samples_per_second
    parts = selection.encoder, selection.decoder
    slots = (part.modality.shape[1] for part in parts)
    computed = tuple(part.num_computed for part in parts)
    flops = StepFlops(run.trainer.model)(4, *slots, *(part.counts for part in parts), computed)
    # Which targets fit depends on the order of the modalities; the logits of these few make little difference.
    assert line.tflops * 1e12 * seconds == pytest.approx(flops, rel=0.1)


def test_the_profile_is_a_chrome_trace_with_our_phases(measured):
    _, output, out = measured
    events = json.loads((out / "profile" / "trace.json").read_text())["traceEvents"]
    names = [event.get("name") for event in events if event.get("cat") == "user_annotation"]
    for phase in PHASES:
        count = names.count(phase)  # waiting for a batch may take several attempts
        assert count >= 3 if phase == "data_wait" else count == (3 if phase == "optimizer" else 6), phase
    assert any(event.get("name") == "aten::scaled_dot_product_attention" for event in events)
    assert "profile of 3 steps" in output


@pytest.mark.parametrize(
    ("name", "tflops"),
    [
        ("NVIDIA H100 80GB HBM3", 989),
        ("NVIDIA H100 PCIe", 756),
        ("NVIDIA A100-SXM4-80GB", 312),
        ("NVIDIA A10", 125),
        ("NVIDIA GH200 480GB", 989),
        ("NVIDIA L40S", 362),
        ("NVIDIA L4", 121),
        ("Something new", None),
    ],
)
def test_the_peak_of_a_gpu_follows_from_its_name(monkeypatch, name, tflops):
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda device: name)
    config = parse_args(PretrainConfig, ["--epochs", "1", "--dtype", "bf16"])
    assert peak_tflops(config, torch.device("cuda")) == tflops
    assert peak_tflops(config, torch.device("cpu")) is None
    assert peak_tflops(parse_args(PretrainConfig, ["--epochs", "1", "--dtype", "fp32"]), torch.device("cuda")) is None
    assert peak_tflops(parse_args(PretrainConfig, ["--epochs", "1", "--peak_tflops", "7"]), torch.device("cpu")) == 7
    assert tflops is None or tflops in [gpu.tflops for gpu in GPUS.values()]


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
def test_a_step_never_waits_for_the_gpu(tmp_path):
    path = write_run(tmp_path / "toys", num_workers=0, accum_iter=2, skip_grad=100.0, skip_nan_grad=True)
    config = parse_args(PretrainConfig, ["--config", str(path), "--device", "cuda", "--dtype", "bfloat16"])
    run = Run(Pretrain(config), DDP(config))
    batches = run._batches()
    micro_batches = [[next(batches).pin_memory() for _ in range(2)] for _ in range(3)]
    run.trainer.train_step(micro_batches[0])  # allocates, and sets the optimizer up
    torch.cuda.synchronize()
    torch.cuda.set_sync_debug_mode("error")
    try:
        for step in micro_batches[1:]:
            run.trainer.train_step(step)
    finally:
        torch.cuda.set_sync_debug_mode("default")
    line = run.trainer.interval.means(run.parallel)
    assert line.loss > 0 and all(line.seconds[phase] > 0 for phase in PHASES[1:])
