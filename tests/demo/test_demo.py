"""The whole demo at toy size, run as users run it."""

import json
import os
import subprocess
from pathlib import Path

import pytest
import torch

pytest.importorskip("pybullet")
pytest.importorskip("matplotlib")

from fourm.demo.scene import CLASSES
from fourm.demo.stages import DemoOptions, parse
from fourm.demo.tokenizers import OPTIONS, TRAINED, make_tokenizer
from fourm.demo.tokenizers import main as save_in_half_precision
from fourm.utils.errors import UserError
from fourm.vq import load_tokenizer
from tests.warm_python import warm_python

ROOT = Path(__file__).parents[2]


def _demo(*args):
    return subprocess.run(
        [warm_python(), "-m", "fourm.demo", *map(str, args)], cwd=ROOT, capture_output=True, text=True, timeout=240
    )


def _run(out, *args):
    return _demo(
        "--out",
        out,
        "--config",
        "cfgs/debug/main.yaml",
        "--train_scenes",
        12,
        "--val_scenes",
        4,
        "--size",
        64,
        "--workers",
        1,
        *args,
    )


@pytest.fixture(scope="module")
def demo(tmp_path_factory):
    """The process of a demo of a dozen scenes, and its folder; the model is too small to pass."""
    out = tmp_path_factory.mktemp("demo") / "out"
    return _run(out), out


@pytest.fixture
def out(demo):
    return demo[1]


@pytest.mark.slow
def test_the_demo_runs_stops_resumes_and_reports(demo):
    finished, out = demo
    assert finished.returncode == 1, (
        finished.stdout + finished.stderr
    )  # the model fails the check; the command does not fail
    assert "FAILED" in finished.stdout and "stopping the training on purpose at step" in finished.stdout
    result = json.loads((out / "report.json").read_text())
    assert {line["modality"] for line in result["modalities"]} >= {"tok_depth@64", "caption", "det"}
    assert all(line["targets"] > 0 and line["loss"] > 0 for line in result["modalities"])
    assert result["steps"] == 60 and 0 < result["stopped_at"] < 60
    log = [json.loads(line) for line in (out / "training" / "log.jsonl").read_text().splitlines()]
    assert [line["step"] for line in log if "loss" in line] == list(range(1, 61))
    pictures = ("samples.png", "curves.png", "generated/sheet.png", "generated/words/sheet.png")
    assert all((out / name).stat().st_size > 20_000 for name in pictures)
    scores = {(s["measure"], s["unit"]): s for s in result["generated"]}
    depth, objects = scores["depth", "absolute relative error"], scores["objects in captions", "recall"]
    assert 0 < depth["tokens"] < depth["guess"] < 0.2 and depth["generated"] > 0
    assert 0 < objects["guess"] < 1 and objects["tokens"] is None
    # The tokens are those of the learned tokenizers that come with the package.
    for modality in OPTIONS:
        shipped, used = TRAINED / modality, out / "tokenizers" / modality
        assert (used / "model.safetensors").read_bytes() == (shipped / "model.safetensors").read_bytes()
    assert depth["tokens"] < 0.015 and scores["normals", "mean angle in degrees"]["tokens"] < 5
    assert scores["segmentation", "mean IoU of the classes"]["tokens"] > 0.7
    assert len([*(out / "generated" / "scenes" / "00000").iterdir()]) == 4
    assert "| depth " in finished.stdout and "| depth " in (out / "report.md").read_text()


@pytest.mark.slow
def test_decoding_schemes_are_compared(out, tmp_path):
    file = tmp_path / "schemes.json"
    command = [warm_python(), "benchmarks/schemes.py", out, "--scenes", "2", "--steps", "1", "4", "--out", file]
    process = subprocess.run(
        command, cwd=ROOT, capture_output=True, text=True, timeout=240, env=os.environ | {"PYTHONPATH": str(ROOT)}
    )
    assert process.returncode == 0, process.stderr
    scores = json.loads(file.read_text())["scores"]
    assert {(s["target"], s["scheme"], s["steps"]) for s in scores} == {
        (target, scheme, steps)
        for target in ("depth", "semseg")
        for scheme in ("halton", "maskgit", "roar")
        for steps in (1, 4)
    }
    assert all(0 <= s["score"] < 1 for s in scores)
    assert "| depth halton |" in process.stdout


@pytest.mark.slow
def test_tokenizers_are_trained_or_fitted_where_none_is_shipped(out, tmp_path):
    recipe = tmp_path / "recipe.yaml"
    text = (ROOT / "cfgs/demo/tokenizer.yaml").read_text()
    small = {
        "vit/B_2-Wi_128-H_4": "vit/B_1-Wi_16-H_2",
        "vit/B_3-Wi_128-H_4": "vit/B_1-Wi_16-H_2",
        "size: 5000": "size: 8",
    }
    for old, new in (small | {"batch_size: 16": "batch_size: 4"}).items():
        assert old in text
        text = text.replace(old, new)
    recipe.write_text(text)
    declared = {"vocab_size": 512, "patch_size": 8, "input_size": 64}
    for _ in range(2):  # the second time, it is there
        made = make_tokenizer("semseg", declared, out / "data", tmp_path / "trained", recipe, 1, seed=0, workers=1)
        assert made == "512 ids for patches of 8 pixels"
    save_in_half_precision([str(tmp_path / "trained"), str(tmp_path / "half")])
    learned = load_tokenizer(tmp_path / "half")
    assert next(learned.parameters()).dtype == torch.float32 and learned.n_labels == len(CLASSES)
    assert (tmp_path / "half/model.safetensors").stat().st_size < (
        tmp_path / "trained/model.safetensors"
    ).stat().st_size
    codebook = {**declared, "vocab_size": 8}
    # Even if learned tokenizers are to be trained: their recipe does not give these tokens.
    made = make_tokenizer("semseg", codebook, out / "data", tmp_path / "fitted", recipe, 1, seed=0, workers=1)
    assert made.startswith("codebook, 8 of 8 codes used") and load_tokenizer(tmp_path / "fitted").vocab_size == 8


@pytest.mark.slow
def test_finished_stages_are_kept(out):
    stamps = {path: path.stat().st_mtime_ns for path in out.rglob("*") if path.suffix in (".tar", ".safetensors")}
    assert len(stamps) > 15
    assert _run(out).returncode == 1
    assert all(path.stat().st_mtime_ns == stamp for path, stamp in stamps.items())


@pytest.mark.slow
def test_a_folder_made_with_other_options_is_refused(out):
    refused = _run(out, "--seed", 5)
    assert refused.returncode == 2
    assert refused.stderr.strip().splitlines()[-1].startswith("error: ") and "seed 0, not 5" in refused.stderr


def test_bad_options_are_named():
    with pytest.raises(UserError, match="^give the run folder of a tokenizer"):
        save_in_half_precision(["only one"])
    with pytest.raises(UserError, match="did you mean 'tokenize'"):
        parse(["--stages", "render,tokenise"])
    with pytest.raises(UserError, match="train_scenes"):
        DemoOptions(train_scenes=0)
