"""Wrong and damaged files: each command reports them in one sentence, and loses nothing."""

import json
import os
import shutil
import subprocess

import pytest
import torch
from safetensors.torch import load_file, save_file

from fourm.generation.script import main as generate
from fourm.models import FM
from fourm.models.from_checkpoint import FORMAT
from fourm.tools.check import main as check
from fourm.train.checkpoint import read_state
from fourm.train.config import parse_args
from fourm.train.export import main as export
from fourm.train.finetune import read_weights
from fourm.train.tasks.pretrain import PretrainConfig
from fourm.utils.checkpoints import checksum
from fourm.utils.errors import UserError
from fourm.utils.plugin import load_plugin
from fourm.vq import PatchCodebook, PatchCodebookConfig, load_tokenizer
from tests.generation.test_sampler import write_run
from tests.train.checkpoint_files import write_checkpoint
from tests.train.toy_run import ROOT
from tests.warm_python import warm_python

DEEP = b"[" * 100_000


@pytest.fixture(scope="module")
def original(tmp_path_factory):
    folder = write_run(tmp_path_factory.mktemp("original"))
    write_checkpoint(folder / "checkpoints", 1, FM.from_pretrained(str(folder / "run")))
    (folder / "checkpoints" / "step-00000001").rename(folder / "checkpoint")
    codebook = PatchCodebook(PatchCodebookConfig("rgb", 8, 8, 3, 32))
    codebook.codebook.normal_()
    codebook.save(folder / "codebook")
    return folder


def _generate(model, *options):
    arguments = ("--model", model, "--device", "cpu", "--cond_domains", "rgb", "--data", model.parent / "photo.png")
    out = ("--target_domains", "depth", "--output_dir", model.parent / "out")
    generate([str(part) for part in (*arguments, *out, *options)])


@pytest.mark.parametrize("content", [b"", DEEP, b"[]", b'{"type": []}', '{"a": "\xe9"}'.encode("latin-1"), b"cut"])
@pytest.mark.parametrize("name", ["config.json", "model.safetensors"])
def test_a_damaged_tokenizer(original, tmp_path, name, content):
    shutil.copytree(original / "codebook", tmp_path / "codebook")
    (tmp_path / "codebook" / name).write_bytes(content)
    with pytest.raises(UserError, match=str(tmp_path / "codebook")):
        load_tokenizer(tmp_path / "codebook")


@pytest.mark.parametrize(
    "change",
    [{"vocab_size": 10**10}, {"num_channels": 10**9}, {"one_hot_classes": -1}, {"value_range": [1]}, {"type": {}}],
)
def test_a_tokenizer_with_impossible_sizes(original, tmp_path, change):
    shutil.copytree(original / "codebook", tmp_path / "codebook")
    config = tmp_path / "codebook" / "config.json"
    config.write_text(json.dumps(json.loads(config.read_text()) | change))
    with pytest.raises(UserError, match=next(iter(change)) + "|does not fit config.json"):
        load_tokenizer(tmp_path / "codebook")


def test_a_tokenizer_that_is_not_finite(original, tmp_path):
    shutil.copytree(original / "codebook", tmp_path / "codebook")
    weights = load_file(tmp_path / "codebook" / "model.safetensors")
    weights["codebook"][0, 0] = torch.nan
    save_file(weights, tmp_path / "codebook" / "model.safetensors")
    with pytest.raises(UserError, match="codebook holds values that are not finite"):
        load_tokenizer(tmp_path / "codebook")


@pytest.mark.parametrize(
    "change", [{"dim": "x"}, {"modalities": 5}, {"domains_in": 5}, {"num_heads": 0}, {"dim": -1}, {"unknown": 1}]
)
@pytest.mark.parametrize("command", ["export", "generation", "finetune"])
def test_a_checkpoint_with_right_checksums_and_a_wrong_model(original, tmp_path, command, change):
    folder = tmp_path / "checkpoint"
    shutil.copytree(original / "checkpoint", folder)
    config = folder / "config.json"
    config.write_text(json.dumps(json.loads(config.read_text()) | change))
    sums = json.loads((folder / "checksums.json").read_text()) | {"config.json": checksum(config)}
    (folder / "checksums.json").write_text(json.dumps(sums))
    actions = {
        "export": lambda: export([str(folder), str(tmp_path / "exported")]),
        "generation": lambda: _generate(folder, "--text_tokenizer", original / "words.json"),
        "finetune": lambda: read_weights(str(folder), FORMAT),
    }
    with pytest.raises(UserError, match=f"checkpoint {folder}: config.json"):
        actions[command]()
    assert not (tmp_path / "exported").exists()


def test_weights_that_are_not_finite_are_not_exported(original, tmp_path):
    model = FM.from_pretrained(str(original / "run"))
    folder = write_checkpoint(tmp_path / "checkpoints", 1, model)
    shard = next(folder.glob("shard-*"))
    raw = bytearray(shard.read_bytes())
    raw[-4:] = b"\x00\x00\xc0\x7f"  # the last number is NaN
    shard.write_bytes(raw)
    sums = json.loads((folder / "checksums.json").read_text()) | {shard.name: checksum(shard)}
    (folder / "checksums.json").write_text(json.dumps(sums))
    with pytest.raises(UserError, match="not finite"):
        export([str(folder), str(tmp_path / "exported")])
    assert not list((tmp_path / "exported").glob("*"))


@pytest.mark.parametrize("content", [b"", DEEP, b"[]", b'{"config": 5}', b'{"config": {"text_tokenizer_path": 5}}'])
def test_a_malformed_state_given_to_generation(original, tmp_path, content):
    shutil.copytree(original / "checkpoint", tmp_path / "checkpoint")
    (tmp_path / "checkpoint" / "state.json").write_bytes(content)
    with pytest.raises(UserError, match="state.json.*set text_tokenizer"):
        _generate(tmp_path / "checkpoint")


@pytest.mark.parametrize(
    "change", [{"step": -1}, {"step": True}, {"global_batch": 0}, {"identity": 5}, {"identity": {"data": 5}}]
)
def test_a_malformed_state_given_to_training(tmp_path, change):
    state = {"step": 1, "config": {}, "global_batch": 4, "layout": {}, "loss_scale": [], "ranks": []}
    (tmp_path / "state.json").write_text(json.dumps(state | change))
    with pytest.raises(UserError, match=f"state.json is damaged: '{next(iter(change))}' is missing or invalid"):
        read_state(tmp_path)


@pytest.mark.parametrize(
    "source",
    [
        "def f(:",
        "{}['a']",
        "raise RuntimeError('no')",
        "def f(): f()\nf()",
        "1 / 0",
        "import sys; sys.exit()",
        "class Own(BaseException): pass\nraise Own('no')",
    ],
)
def test_a_plugin_that_fails(tmp_path, monkeypatch, source):
    name = f"plugin_{abs(hash(source))}"
    (tmp_path / f"{name}.py").write_text(source)
    monkeypatch.syspath_prepend(tmp_path)
    with pytest.raises(UserError, match=f"'plugin': {name} fails"):
        load_plugin(name)


def test_a_plugin_that_ends_the_process_ends_a_command_with_one_line(tmp_path):
    (tmp_path / "own_plugin.py").write_text("class Own(BaseException): pass\nraise Own('no')")
    command = [warm_python(), "-m", "fourm", "check", "data.yaml", "--plugin", "own_plugin"]
    environment = os.environ | {"PYTHONPATH": str(ROOT)}
    done = subprocess.run(command, cwd=tmp_path, env=environment, capture_output=True, text=True, timeout=120)
    line = f"error: 'plugin': own_plugin fails in {tmp_path}/own_plugin.py, line 2, with Own: no\n"
    assert (done.returncode, done.stdout, done.stderr) == (2, "", line)


@pytest.mark.parametrize(("rank", "world_size"), [("x", "1"), ("5", "2"), ("0", "0"), ("0", ""), ("-1", "1")])
def test_contradictory_ranks_in_the_environment(original, monkeypatch, rank, world_size):
    monkeypatch.setenv("RANK", rank)
    monkeypatch.setenv("WORLD_SIZE", world_size)
    with pytest.raises(UserError, match="RANK|WORLD_SIZE"):
        _generate(original / "run")


@pytest.mark.parametrize("name", ["a\0b", ".", "photo.png", "nowhere"])
def test_paths_that_are_not_configuration_files(original, monkeypatch, name):
    monkeypatch.chdir(original)
    for command in (check, lambda argv: parse_args(PretrainConfig, ["--config", *argv])):
        with pytest.raises(UserError, match="NUL character|folder|not text in UTF-8|No such file|no such file"):
            command([name])
    assert os.listdir() and (original / "photo.png").exists()
