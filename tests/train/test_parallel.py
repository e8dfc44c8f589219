"""Two processes and one, at the same global batch."""

import pytest
import torch
from safetensors.torch import load_file

from tests.train.toy_run import log_lines, losses, run, run_here, write_run

# No warm-up: published schedules count it in micro-batches, of which one process has twice as many.
OPTIONS = {
    "epoch_size": 64, "warmup_epochs": 0,
    "model_kwargs": {"dim": 32, "encoder_depth": 1, "decoder_depth": 1, "num_heads": 2},
}  # fmt: skip


@pytest.mark.dist
def test_two_processes_train_as_one_that_accumulates(tmp_path):
    configs = [
        write_run(tmp_path / "one", accum_iter=2, num_workers=2, **OPTIONS),
        write_run(tmp_path / "two", num_workers=1, **OPTIONS),
    ]
    run_here(configs[0])
    run(configs[1], processes=2)
    expected, found = (losses(config.parent / "out") for config in configs)
    assert list(expected) == list(found) == list(range(1, 17))
    for step, loss in expected.items():
        assert found[step] == pytest.approx(loss, rel=1e-5), step
    evaluations = [[line["eval"]["toys"] for line in log_lines(c.parent / "out") if "eval" in line] for c in configs]
    for single, double in zip(*evaluations, strict=True):
        for kind in ("train", "fixed"):
            one, two = single[kind], double[kind]
            assert two["samples"] == one["samples"] == 10 and two["tokens"] == one["tokens"]
            assert two["per_modality"] == pytest.approx(one["per_modality"], rel=1e-5)
    weights = [load_file(config.parent / "out" / "model.safetensors") for config in configs]
    for name, tensor in weights[0].items():
        torch.testing.assert_close(weights[1][name], tensor, rtol=1e-4, atol=1e-5, msg=name)


@pytest.mark.dist
def test_a_bad_file_ends_both_processes_with_one_sentence(tmp_path):
    config = write_run(tmp_path / "toys")
    output = run(config, "--finetune", tmp_path / "missing.pth", processes=2, status=1)  # torchrun's own status
    assert "missing.pth does not exist" in output
