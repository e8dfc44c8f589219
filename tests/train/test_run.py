"""The training script on toy data: one process, from the command line to the saved model."""

import contextlib
import fcntl
import io
import json
import math
import os
import pty
import signal
import struct
import subprocess
import termios

import pytest
import torch
import yaml
from safetensors.torch import load_file, save_file

from fourm.models import FM
from fourm.models.from_checkpoint import FORMAT
from fourm.train.config import load_config, parse_args
from fourm.train.tasks.pretrain import PretrainConfig
from fourm.utils.checkpoints import read_weights
from fourm.utils.errors import UserError
from tests.train.toy_run import ROOT, command, log_lines, losses, run, run_in_process, start, write_run


@pytest.fixture(scope="module")
def finished(tmp_path_factory):
    """A finished run; tests must not change it."""
    config = write_run(tmp_path_factory.mktemp("run") / "toys", compute_grad_norm=True, num_workers=1)
    output = run(config)
    return config, config.parent / "out", output


def test_the_log_has_a_line_per_step_and_an_evaluation_per_epoch_and_kind(finished):
    _, out, output = finished
    lines = log_lines(out)
    assert [line["step"] for line in lines if "loss" in line] == list(range(1, 25))
    assert [line["epoch"] for line in lines if "loss" in line] == [0] * 12 + [1] * 12
    evaluations = [(line["step"], list(line["eval"]["toys"])) for line in lines if "eval" in line]
    assert evaluations == [(12, ["train", "fixed"]), (24, ["train", "fixed"])]
    first = lines[0]
    assert first["lr"] == 0 and first["grad_norm"] > 0 and 0 <= first["data_wait"] <= 1
    assert set(first["losses"]) <= {"caption", "det", "tok_rgb@32"}
    assert first["loss"] == pytest.approx(sum(first["losses"].values()) / 3, rel=1e-5)
    assert "step 24/24" in output and "from_pretrained" in output and "step 24/24" in (out / "log.txt").read_text()


def test_it_learns(finished):
    _, out, _ = finished
    fixed = [line["eval"]["toys"]["fixed"]["loss"] for line in log_lines(out) if "eval" in line]
    assert fixed[1] < fixed[0] - 0.1


def test_the_result_is_a_published_model(finished):
    _, out, _ = finished
    model = FM.from_pretrained(str(out))
    assert set(model.decoder_embeddings) == {"caption", "det", "tok_rgb@32"}
    config = json.loads((out / "config.json").read_text())
    assert config["dim"] == 32 and "tok_rgb@32" in config["modalities"]


def test_the_resolved_configuration_is_kept(finished):
    config, out, _ = finished
    assert load_config(PretrainConfig, out / "config.yaml") == load_config(PretrainConfig, config)


def test_only_safe_formats_are_written_and_old_checkpoints_removed(finished):
    _, out, _ = finished
    suffixes = {path.suffix for path in out.rglob("*") if path.is_file() and path.name != ".lock"}
    assert suffixes == {".json", ".jsonl", ".safetensors", ".txt", ".yaml"}
    assert [path.name for path in sorted((out / "checkpoints").iterdir())] == ["step-00000012", "step-00000024"]


def test_a_terminal_gets_a_progress_bar(tmp_path):
    config = write_run(tmp_path / "toys", epochs=1, warmup_epochs=0, eval_freq=0, num_workers=0)
    reader, writer = pty.openpty()
    fcntl.ioctl(writer, termios.TIOCSWINSZ, struct.pack("HHHH", 40, 200, 0, 0))
    process = subprocess.Popen(command(config), cwd=ROOT, stdout=subprocess.DEVNULL, stderr=writer)
    os.close(writer)
    shown = b""
    with contextlib.suppress(OSError):  # raised by reading when the other end is closed
        while part := os.read(reader, 10_000):
            shown += part
    assert process.wait(timeout=60) == 0
    for fact in ("12/12", "loss", "samples/s", "waiting for data"):
        assert fact in shown.decode()
    assert "step 12/12, loss" in (tmp_path / "toys" / "out" / "log.txt").read_text()


def test_a_finished_run_has_nothing_to_do(finished):
    config, out, _ = finished
    before = (out / "log.jsonl").read_text()
    assert "resumed from" in run_in_process(config)
    assert (out / "log.jsonl").read_text() == before


def test_eval_alone_repeats_the_last_evaluation(finished):
    config, out, _ = finished
    before = (out / "log.jsonl").read_text()
    output = run_in_process(config, "--eval", "--fixed_eval_batch_size", "3", "--num_workers", "0")
    assert f"the results were added to {out / 'eval.jsonl'}" in output
    assert (out / "log.jsonl").read_text() == before
    (again,) = [json.loads(line) for line in (out / "eval.jsonl").read_text().splitlines()]
    last = [line for line in log_lines(out) if "eval" in line][-1]
    for kind in ("train", "fixed"):
        one, other = again["eval"]["toys"][kind], last["eval"]["toys"][kind]
        assert one["samples"] == 10 and one["tokens"] == other["tokens"]
        assert one["per_modality"] == pytest.approx(other["per_modality"], rel=1e-5)  # whatever the batch size


def test_dry_run_shows_everything_and_writes_nothing(tmp_path):
    config = write_run(tmp_path / "toys", accum_iter=2)
    output = run_in_process(config, "--dry_run")
    for fact in (
        "inputs caption, det, rgb@32, tok_rgb@32 of 16-16 tokens",
        "parameters of the trunk",
        "of the embeddings",
        "2 epochs of 6 steps = 12 steps of 8 samples",
        "lr up to 0.00313",
        "dry run: one step, loss",
    ):
        assert fact in output
    assert not (tmp_path / "toys" / "out").exists()


def test_bad_input_is_one_line_and_status_2(tmp_path):
    config = write_run(tmp_path / "toys")
    output = run(config, "--text_tokenizer_path", "words.json", status=2)
    assert output.startswith("error: words.json: no such text vocabulary") and output.count("\n") == 1
    content = yaml.safe_load((tmp_path / "toys" / "data.yaml").read_text())
    content["train"]["datasets"]["toys"]["data_path"] = str(tmp_path / "[rgb]" / "shard-{0..3}.tar")
    (tmp_path / "toys" / "data.yaml").write_text(yaml.safe_dump(content))
    with pytest.raises(UserError, match="no folder for modality caption"):
        run_in_process(config)


def test_a_token_beyond_its_vocabulary_names_file_and_value(tmp_path):
    config = write_run(tmp_path / "toys")
    content = yaml.safe_load((tmp_path / "toys" / "data.yaml").read_text())
    content["modalities"]["tok_rgb@32"]["vocab_size"] = 32
    (tmp_path / "toys" / "data.yaml").write_text(yaml.safe_dump(content))
    last = run(config, "--num_workers", "2", status=2).strip().splitlines()[-1]
    assert last.startswith("error: ") and "tok_rgb" in last and "32" in last and ".tar" in last


def test_weights_and_biases_offline(tmp_path):
    config = write_run(tmp_path / "toys", epochs=1, warmup_epochs=0, eval_freq=0)
    url = "https://me:hunter2@host:9000/?X-Amz-Signature=hunter2"
    options = ("--s3_data_endpoint", url, "--log_wandb", "--wandb_project", "toys")
    output = run(config, *options, WANDB_MODE="offline", WANDB_SILENT="true")
    out = tmp_path / "toys" / "out"
    assert list((out / "wandb").glob("offline-run-*/*.wandb"))
    # The password is written nowhere, and the run can still be resumed.
    output += run_in_process(config, "--s3_data_endpoint", url, "--epochs", 2)
    with contextlib.redirect_stdout(io.StringIO()) as printed, pytest.raises(SystemExit):
        parse_args(PretrainConfig, ["--config", str(config), "--s3_data_endpoint", url, "--print_config"])
    assert "s3_data_endpoint: https://host:9000/\n" in printed.getvalue()
    assert "https://host:9000/" in (out / "config.yaml").read_text() and "resumed from" in output
    files = [path for path in out.rglob("*") if path.is_file() and not path.is_symlink()]
    assert not [path for path in files if b"hunter2" in path.read_bytes()]
    assert "hunter2" not in output + printed.getvalue()


@pytest.mark.parametrize("source", ["folder", "safetensors", "pth"])
def test_finetune_starts_from_given_weights(finished, tmp_path, source):
    _, out, _ = finished
    weights = load_file(out / "model.safetensors")
    path = {"folder": out, "safetensors": tmp_path / "weights.safetensors", "pth": tmp_path / "weights.pth"}[source]
    if source == "safetensors":
        save_file(weights, path)
    elif source == "pth":
        torch.save({"model": weights, "epoch": 3}, path)
    config = write_run(tmp_path / "toys")
    output = run_in_process(config, "--finetune", path, "--eval", "--no_auto_resume", "--num_workers", "0")
    assert f"finetune: {len(weights)} of {len(weights)} tensors" in output
    actual = json.loads((tmp_path / "toys" / "out" / "eval.jsonl").read_text())["eval"]["toys"]
    expected = [line for line in log_lines(out) if "eval" in line][-1]["eval"]["toys"]
    assert actual["fixed"]["loss"] == pytest.approx(expected["fixed"]["loss"], rel=1e-6)


def test_finetune_to_more_modalities_says_what_is_new(finished, tmp_path):
    _, out, _ = finished
    weights = {k: v for k, v in load_file(out / "model.safetensors").items() if ".det." not in k}
    save_file(weights | {"decoder_embeddings.depth.mod_emb": torch.zeros(1)}, tmp_path / "w.safetensors")
    output = run_in_process(write_run(tmp_path / "toys"), "--finetune", tmp_path / "w.safetensors", "--dry_run")
    assert "new in the model: decoder_embeddings.det, encoder_embeddings.det" in output
    assert "not in the model: decoder_embeddings.depth" in output


def test_the_frozen_phase_trains_only_embeddings(tmp_path):
    config = write_run(
        tmp_path / "toys",
        frozen_model_epochs=1,
        frozen_embedding_domain="tok_rgb@32",
        warmup_epochs=0,
        weight_decay=0.0,
        save_ckpt_freq=1,
        keep_last=0,
    )
    run_in_process(config)
    saved = sorted((tmp_path / "toys" / "out" / "checkpoints").iterdir())
    frozen, thawed = (dict(read_weights(path, FORMAT)[1]) for path in saved)
    changed = {name for name in frozen if not torch.equal(frozen[name], thawed[name])}
    assert any(name.startswith("encoder.0") for name in changed) and "mask_token" in changed
    run_in_process(write_run(tmp_path / "fresh", epochs=1, warmup_epochs=0, blr=0.0, weight_decay=0.0))
    initial = load_file(tmp_path / "fresh" / "out" / "model.safetensors")
    moved = {name.split(".")[1] for name in initial if not torch.equal(initial[name], frozen[name])}
    assert moved == {"caption", "det", "rgb@32"}, "the trunk and tok_rgb@32 stay as they were initialised"


def test_steps_that_explode_are_skipped(tmp_path):
    config = write_run(tmp_path / "toys", skip_grad=1e-6, epochs=1, warmup_epochs=0, weight_decay=0.0, clip_grad=None)
    output = run_in_process(config)
    assert "steps skipped" in output
    lines = [line for line in log_lines(tmp_path / "toys" / "out") if "loss" in line]
    assert all(line["skipped_steps"] == 1 and line["grad_norm"] == 0 for line in lines)
    run_in_process(write_run(tmp_path / "still", blr=0.0, epochs=1, warmup_epochs=0, weight_decay=0.0))
    one, other = (load_file(tmp_path / name / "out" / "model.safetensors") for name in ("toys", "still"))
    assert all(torch.equal(one[name], other[name]) for name in one)


@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
def test_reduced_precision_stays_near_float32(finished, tmp_path, dtype):
    config = write_run(tmp_path / "toys", dtype=dtype)
    run_in_process(config)
    actual, expected = losses(tmp_path / "toys" / "out"), losses(finished[1])
    assert all(math.isclose(actual[step], expected[step], rel_tol=0.02) for step in range(1, 13))


def test_recomputed_activations_give_the_same_losses(finished, tmp_path):
    config = write_run(tmp_path / "toys", use_act_checkpoint=True)
    run_in_process(config)
    assert losses(tmp_path / "toys" / "out") == pytest.approx(losses(finished[1]), rel=1e-6)


def test_a_new_run_does_not_mix_with_an_old_one(finished, tmp_path):
    config, out, _ = finished
    with pytest.raises(UserError, match="step-00000024 of an earlier run"):
        run_in_process(config, "--no_auto_resume")


def test_two_runs_never_share_a_folder(tmp_path):
    config = write_run(tmp_path / "toys", epochs=1000)
    process = start(config)
    while not (tmp_path / "toys" / "out" / "log.jsonl").exists():
        assert process.poll() is None
    with pytest.raises(UserError, match="out is in use by another process"):
        run_in_process(config)
    process.terminate()
    output, errors = process.communicate(timeout=60)
    assert process.returncode == 128 + signal.SIGTERM, output + errors


def test_eval_needs_weights_and_data(tmp_path):
    config = write_run(tmp_path / "toys")
    with pytest.raises(UserError, match="no weights to evaluate"):
        run_in_process(config, "--eval")
    content = yaml.safe_load((tmp_path / "toys" / "data.yaml").read_text())
    content["val"]["datasets"]["toys"] |= {"in_domains": "caption-rgb@32-det-tok_rgb@32", "out_domains": "rgb@32"}
    (tmp_path / "toys" / "data.yaml").write_text(yaml.safe_dump(content | {"val": {"datasets": {}}}))
    with pytest.raises(UserError, match="nothing to evaluate"):
        run_in_process(config, "--eval")


def test_bad_samples_show_in_the_log(tmp_path):
    config = write_run(tmp_path / "toys", max_bad_fraction=0.5, epochs=1, warmup_epochs=0)
    for path in sorted((tmp_path / "toys" / "val" / "tok_rgb").rglob("*.npy"))[:2]:
        path.write_bytes(b"no array")
    output = run_in_process(config)
    (line,) = [line for line in log_lines(tmp_path / "toys" / "out") if "eval" in line]
    assert line["eval"]["toys"]["fixed"]["bad_samples"] == {"toys: corrupt member": 2}
    assert line["eval"]["toys"]["fixed"]["samples"] == 8 and "bad samples" in output


def test_an_evaluation_tells_what_its_samples_lack(tmp_path):
    config = write_run(tmp_path / "toys", epochs=1, warmup_epochs=0, num_workers=0)
    data = tmp_path / "toys" / "data.yaml"
    content = yaml.safe_load(data.read_text())
    content["val"]["datasets"]["toys"]["missing"] = "allow"
    data.write_text(yaml.safe_dump(content))
    for folder, count in (("caption", 3), ("det", 1)):
        for path in sorted((tmp_path / "toys" / "val" / folder).rglob("*.json"))[:count]:
            path.unlink()
    output = run_in_process(config)
    (line,) = [line for line in log_lines(tmp_path / "toys" / "out") if "eval" in line]
    for result in line["eval"]["toys"].values():
        assert result["samples"] == 10
        assert result["missing"] == {"caption": 0.3, "det": 0.1, "rgb@32": 0.0, "tok_rgb@32": 0.0}
    assert "eval toys: missing values: caption 30.0%, det 10.0%, rgb@32 0.0%" in output
    assert all(line["missing"] == {} for line in log_lines(tmp_path / "toys" / "out") if "loss" in line), "of training"


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
def test_a_gpu_trains_as_the_cpu_does(finished, tmp_path):
    config = write_run(tmp_path / "toys")
    run(config, "--device", "cuda")
    actual, expected = losses(tmp_path / "toys" / "out"), losses(finished[1])
    assert all(math.isclose(actual[step], expected[step], rel_tol=1e-3) for step in range(1, 13))
