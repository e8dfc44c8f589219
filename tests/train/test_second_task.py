"""The loop trains any task under every strategy, such as an autoencoder (``autoencoder.py``)."""

import json
import shutil

import numpy as np
import pytest
import torch
import yaml
from PIL import Image
from safetensors.torch import load_file

from fourm.train.export import main as export
from fourm.train.fsdp import FSDP
from fourm.train.parallel import DDP
from tests.train.autoencoder import Autoencoder, AutoencoderTask
from tests.train.toy_run import kill, log_lines, losses, run_in_process, run_ranks, start_ranks, wait_for_step

KEYS = {
    "epoch_size": 40,
    "epochs": 2,
    "batch_size": 2,
    "blr": 0.5,
    "warmup_epochs": 0,
    "dtype": "float32",
    "device": "cpu",
    "num_workers": 0,
    "log_interval": 1,
    "model_ema": True,
    "model_ema_decay": 0.5,
    "keep_last": 0,
    "opt": "adamw",
}


@pytest.fixture(scope="module")
def images(tmp_path_factory):
    folder = tmp_path_factory.mktemp("images")
    rng = np.random.default_rng(0)
    for split, number in (("train", 24), ("val", 8)):
        (folder / split).mkdir()
        for index in range(number):
            picture = rng.integers(0, 80, (1, 1, 3)) + rng.integers(0, 40, (8, 8, 3)) + 100
            Image.fromarray(picture.astype(np.uint8)).save(folder / split / f"{index:02}.png")
    return folder


def write(folder, images, **keys):
    folder.mkdir(parents=True, exist_ok=True)
    own = {"data_path": f"{images}/train", "eval_data_path": f"{images}/val", "output_dir": f"{folder}/out"}
    (folder / "main.yaml").write_text(yaml.safe_dump(KEYS | own | keys))
    return folder / "main.yaml"


@pytest.fixture(scope="module")
def alone(images, tmp_path_factory):
    """The configuration of a run of one process that accumulates what two processes would do."""
    config = write(tmp_path_factory.mktemp("alone"), images, accum_iter=2)
    run_in_process(config, task=AutoencoderTask)
    return config


def evaluations(out):
    return [line["eval"]["images"] for line in log_lines(out) if "eval" in line]


def test_it_learns_and_its_buffer_changes_by_the_sums_of_whole_steps(alone, images):
    out = alone.parent / "out"
    actual = losses(out)
    assert len(actual) == 20 and actual[20] < 0.5 * actual[1]
    weights = load_file(out / "model.safetensors")
    pixels = [np.asarray(Image.open(path)).reshape(-1) / 255 for path in (images / "train").glob("*.png")]
    expected = np.mean(pixels, axis=0) * (1 - 0.9**20)
    np.testing.assert_allclose(weights["mean"], expected, atol=0.06)
    assert not torch.allclose(load_file(out / "ema" / "model.safetensors")["mean"], weights["mean"], rtol=1e-4)
    first, last = evaluations(out)
    assert last["all"]["loss"] < first["all"]["loss"] and last["all"]["samples"] == 8
    assert last["all"]["per_modality"].keys() == {"reconstruction"} and "all_ema" in last


@pytest.mark.dist
@pytest.mark.parametrize("strategy", [DDP, FSDP])
def test_two_processes_train_it_as_one(alone, images, tmp_path, strategy):
    config = write(tmp_path, images)
    run_ranks(config, strategy=strategy, task=AutoencoderTask)
    actual, expected = losses(tmp_path / "out"), losses(alone.parent / "out")
    assert actual == pytest.approx(expected, rel=1e-5)
    weights, wanted = (load_file(folder / "out" / "model.safetensors") for folder in (tmp_path, alone.parent))
    assert weights.keys() == wanted.keys()
    for name, tensor in weights.items():
        torch.testing.assert_close(tensor, wanted[name], rtol=1e-4, atol=1e-5)
    for one, two in zip(evaluations(alone.parent / "out"), evaluations(tmp_path / "out"), strict=True):
        assert two["all"]["loss"] == pytest.approx(one["all"]["loss"], rel=1e-4)
        assert two["all_ema"]["loss"] == pytest.approx(one["all_ema"]["loss"], rel=1e-4)


@pytest.mark.dist
def test_killed_it_resumes_with_the_same_losses_and_buffer(alone, images, tmp_path):
    config = write(tmp_path, images, accum_iter=2, save_every_minutes=1e-9)
    ranks = start_ranks(config, strategy=DDP, processes=1, task=AutoencoderTask)
    wait_for_step(config, 7, ranks)
    kill(ranks)
    assert "resumed from" in run_in_process(config, task=AutoencoderTask)
    assert losses(tmp_path / "out") == losses(alone.parent / "out")
    for folder in (".", "ema"):
        weights, wanted = (
            load_file(place / "out" / folder / "model.safetensors") for place in (tmp_path, alone.parent)
        )
        assert all(torch.equal(tensor, wanted[name]) for name, tensor in weights.items())


def test_it_is_evaluated_exported_planned_and_tried_out(alone, images, tmp_path):
    out = alone.parent / "out"
    evaluated = run_in_process(alone, "--eval", task=AutoencoderTask)
    assert f"loss {evaluations(out)[-1]['all']['loss']:.4f}" in evaluated
    export([str(out), str(tmp_path / "exported")])
    model = Autoencoder(json.loads((tmp_path / "exported" / "config.json").read_text()))
    model.load_state_dict(load_file(tmp_path / "exported" / "model.safetensors"))
    assert torch.equal(model.mean, load_file(out / "model.safetensors")["mean"])
    plan = run_in_process(alone, "--plan", "--plan_world_size", "2", task=AutoencoderTask)
    assert "8 samples (2 x batch_size 2 x accum_iter 2)" in plan and "parameters of the blocks" in plan
    assert "tokens" not in plan
    shutil.rmtree(tmp_path / "new", ignore_errors=True)
    assert "dry run: one step" in run_in_process(
        alone, "--dry_run", "--output_dir", tmp_path / "new", task=AutoencoderTask
    )
