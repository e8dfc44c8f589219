"""Two processes train as one process does, with the same global batch size, under every strategy."""

from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from fourm.models import FM
from fourm.train.fsdp import FSDP
from fourm.train.parallel import DDP
from fourm.utils.errors import UserError
from tests.train.toy_run import log_lines, losses, run, run_in_process, run_ranks, write_run

# No warm-up: published schedules count it in micro-batches, of which one process has twice as many.
OPTIONS = {
    "epoch_size": 80,
    "warmup_epochs": 0,
    "save_ckpt_freq": 0,
    "model_ema": True,
    "model_ema_decay": 0.9,
    "model_kwargs": {"dim": 32, "encoder_depth": 2, "decoder_depth": 3, "num_heads": 2},
}
# The share of each of two processes of what one process does in 2 micro-batches of 4 samples, and in 4 of 2.
PLAIN, ACCUMULATING = {"accum_iter": 1, "batch_size": 4}, {"accum_iter": 2, "batch_size": 2}
RECOMPUTING, EVERY_SECOND = {"use_act_checkpoint": True}, {"use_act_checkpoint": True, "act_checkpoint_every": 2}


@pytest.fixture(scope="module")
def alone(tmp_path_factory):
    """The run folders of one process, by the ``accum_iter`` of two processes."""
    runs = {}
    for options in (PLAIN, ACCUMULATING):
        more = {"accum_iter": 2 * options["accum_iter"], "batch_size": options["batch_size"], "num_streams": 2}
        config = write_run(tmp_path_factory.mktemp("one") / "toys", **OPTIONS | more)
        run_in_process(config)
        runs[options["accum_iter"]] = config.parent / "out"
    return runs


@pytest.mark.dist
@pytest.mark.parametrize(
    ("strategy", "options"),
    [
        (DDP, ACCUMULATING | EVERY_SECOND),
        (FSDP, PLAIN | RECOMPUTING),
        (FSDP, ACCUMULATING | EVERY_SECOND),
        (FSDP, ACCUMULATING | {"fsdp_reshard_after_forward": False}),
    ],
)
def test_two_processes_train_as_one_that_accumulates(alone, tmp_path, strategy, options):
    config = write_run(tmp_path / "two", **OPTIONS | options)
    run_ranks(config, strategy=strategy)
    assert_same_training(config.parent / "out", alone[options["accum_iter"]])


def assert_same_training(actual: Path, expected: Path) -> None:
    lines = [[line for line in log_lines(out) if "loss" in line] for out in (expected, actual)]
    assert [line["step"] for line in lines[0]] == [line["step"] for line in lines[1]] == list(range(1, 21))
    for one, two in zip(*lines, strict=True):
        assert two["loss"] == pytest.approx(one["loss"], rel=1e-5), one["step"]
        # A float32 norm of a whole vocabulary is itself only exact to about 5e-5.
        assert two["grad_norm"] == pytest.approx(one["grad_norm"], rel=1e-4), one["step"]
    evaluations = [[line["eval"]["toys"] for line in log_lines(out) if "eval" in line] for out in (expected, actual)]
    for single, double in zip(*evaluations, strict=True):
        assert list(double) == ["train", "train_ema", "fixed", "fixed_ema"]
        assert single["fixed_ema"]["loss"] != single["fixed"]["loss"]
        for kind, one in single.items():
            two = double[kind]
            assert two["samples"] == one["samples"] == 10 and two["tokens"] == one["tokens"]
            assert two["per_modality"] == pytest.approx(one["per_modality"], rel=1e-5)
    for file in ("model.safetensors", "ema/model.safetensors"):
        weights = [load_file(out / file) for out in (expected, actual)]
        for name, tensor in weights[0].items():
            torch.testing.assert_close(weights[1][name], tensor, rtol=1e-4, atol=1e-5, msg=name)
    FM.from_pretrained(str(actual))


@pytest.mark.dist
def test_with_as_many_streams_every_layout_reads_the_same_even_when_it_changes_within_an_epoch(tmp_path):
    options = OPTIONS | {"eval_freq": 0, "num_streams": 4, "save_every_minutes": 1e-9, "keep_last": 0}
    alone = write_run(tmp_path / "one", **options | {"accum_iter": 2, "num_workers": 0})
    run_in_process(alone)
    expected, two = alone.parent / "out", write_run(tmp_path / "two", **options)
    run_ranks(two, "--num_workers", 1, strategy=DDP)
    assert_same_training(two.parent / "out", expected)
    run_ranks(
        two,
        "--resume",
        expected / "checkpoints" / "step-00000005",
        "--output_dir",
        tmp_path / "grown",
        "--save_every_minutes",
        0,
        "--num_workers",
        2,
        strategy=DDP,
    )
    run_in_process(
        alone,
        "--resume",
        two.parent / "out" / "checkpoints" / "step-00000007",
        "--output_dir",
        tmp_path / "shrunk",
        "--save_every_minutes",
        0,
        "--num_workers",
        4,
    )
    for name, step in (("grown", 5), ("shrunk", 7)):
        later = {s: loss for s, loss in losses(expected).items() if s > step}
        assert losses(tmp_path / name) == pytest.approx(later, rel=1e-5) and len(later) == 20 - step
        assert "begin anew" not in (tmp_path / name / "log.txt").read_text()
    with pytest.raises(UserError, match="'num_streams' 4 must be a multiple of processes x num_workers, 1 x 3"):
        run_in_process(alone, "--num_workers", 3)


@pytest.mark.dist
def test_gathering_in_bfloat16_is_as_precise_as_autocast(tmp_path):
    folders = []
    for strategy in (DDP, FSDP):
        config = write_run(tmp_path / strategy.__name__, **OPTIONS | {"dtype": "bfloat16", "epochs": 1, "eval_freq": 0})
        run_ranks(config, strategy=strategy)
        folders.append(config.parent / "out")
    lines = [[line["loss"] for line in log_lines(out) if "loss" in line] for out in folders]
    assert lines[1] == pytest.approx(lines[0], rel=1e-3)


@pytest.mark.dist
def test_both_strategies_begin_with_only_the_embeddings_and_small_batches(tmp_path):
    options = {
        "frozen_model_epochs": 1,
        "frozen_embedding_domain": "tok_rgb@32",
        "batch_warmup_steps": 2,
        "eval_freq": 0,
        "epoch_size": 24,
    }
    lines = []
    for strategy in (DDP, FSDP):
        config = write_run(tmp_path / strategy.__name__, **OPTIONS | options)
        run_ranks(config, strategy=strategy)
        lines.append([(line["loss"], line["grad_norm"]) for line in log_lines(config.parent / "out")])
    for one, two in zip(*lines, strict=True):  # the norm is that of the trained parameters
        assert two == pytest.approx(one, rel=1e-4)
    assert lines[0][0][1] < 0.9 * lines[0][3][1]


@pytest.mark.dist
def test_fsdp_starts_from_given_weights(alone, tmp_path):
    config = write_run(tmp_path / "toys", **OPTIONS, num_workers=0)
    run_ranks(config, "--finetune", alone[1], "--eval", "--no_model_ema")
    last = [line for line in log_lines(alone[1]) if "eval" in line][-1]["eval"]["toys"]
    logged = (config.parent / "out" / "log.txt").read_text()
    assert f"loss {last['fixed']['loss']:.4f}" in logged and f"loss {last['train']['loss']:.4f}" in logged


def test_alone_fsdp_is_a_single_process(alone, tmp_path):
    config = write_run(tmp_path / "toys", **OPTIONS | {"eval_freq": 0, "accum_iter": 2, "num_workers": 2})
    run(config, script="run_training_4m_fsdp.py")
    one, other = (
        [line["loss"] for line in log_lines(out) if "loss" in line] for out in (config.parent / "out", alone[1])
    )
    assert one == other


@pytest.mark.dist
def test_processes_that_cannot_be_divided_are_refused(tmp_path):
    config = write_run(tmp_path / "toys")
    run_ranks(config, "--fsdp_shard_size", 3, status=2)


@pytest.mark.dist
def test_a_bad_file_ends_both_processes_with_one_sentence(tmp_path):
    config = write_run(tmp_path / "toys")
    output = run(config, "--finetune", tmp_path / "missing.pth", processes=2, status=1)  # torchrun's own status
    assert "missing.pth does not exist" in output
