"""The packaged model works right after installation."""

import io
import json
import subprocess
import sys
import zipfile
from pathlib import Path

import numpy as np
import pytest
import torch

import fourm
from fourm.demo.scene import CLASSES, GROUNDS, PAINTS, TOYS
from fourm.demo.shipped import main
from fourm.generation import Sampler
from fourm.generation.options import DEMO_MODEL
from fourm.generation.results import read_result
from fourm.models import FM
from fourm.utils.errors import UserError
from tests.generation.test_defaults import write_model
from tests.warm_python import warm_python

PROMPT = "a red car and a yellow duck on a brick floor"
PACKAGE = Path(fourm.__file__).parent
TARGETS = [f"tok_{name}@64" for name in ("semseg", "rgb", "depth", "normal", "canny_edge")]


def test_importing_the_package_is_light():
    program = "import sys, fourm; assert not {'torch', 'numpy', 'fourm.generation'} & {*sys.modules}"
    subprocess.run([sys.executable, "-c", program], check=True, timeout=120)
    with pytest.raises(AttributeError, match="no attribute 'load_model'"):
        _ = fourm.load_model


def test_load_demo_gives_a_sampler_that_takes_a_caption():
    sampler = fourm.load_demo(device="cpu")
    assert {*sampler.default_targets} >= {*TARGETS, "det"}
    assert {p.dtype for p in sampler.generation.model.parameters()} == {torch.float32}
    words = {word for toy in TOYS for word in toy.split()} | {*PAINTS} | {g.phrase for g in GROUNDS.values()}
    encoded = [sampler.text_tokenizer.encode(word, add_special_tokens=False) for word in words]
    assert not any("[UNK]" in encoding.tokens for encoding in encoded)
    (result,) = sampler(PROMPT, ["det", "semseg", "depth"], seed=0)
    assert [*result] == ["caption", "det", TARGETS[0], TARGETS[2]]
    assert result[TARGETS[0]].names == CLASSES and result[TARGETS[0]].value.shape == (64, 64)
    assert result[TARGETS[2]].dropped == 0 and {box["class_name"] for box in result["det"].value} <= {*TOYS}
    assert sampler.plot(result).axes


def test_the_command_generates_from_a_prompt(tmp_path):
    command = [warm_python(), "-m", "fourm", "generate", "--demo", "--prompt", PROMPT, "--device", "cpu"]
    process = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, timeout=240)
    assert process.returncode == 0, process.stderr
    out = tmp_path / "generated" / "a_red_car_and_a_yellow_duck_on_a_brick_floor-0"
    assert f"contact sheet: {out.relative_to(tmp_path)}/sheet.png" in process.stdout and (out / "sheet.png").exists()
    result = read_result(out / "00000")
    assert result.keys() == {"caption", "det", *TARGETS} and result["tok_rgb@64"].value.dtype == np.uint8
    assert json.loads((out / "settings.json").read_text())["data"] == [PROMPT]
    refused = subprocess.run([*command, "--model", "other"], cwd=tmp_path, capture_output=True, text=True, timeout=240)
    assert refused.returncode == 2
    assert refused.stderr == "error: command line: 'demo' and 'model' exclude each other; leave out one of them\n"


def test_a_finished_run_is_exported_in_half_precision_with_its_card(tmp_path):
    run = write_model(tmp_path / "toy") / "run"
    (run / "config.yaml").write_text(f"text_tokenizer_path: {tmp_path}/toy/words.json\n")
    shipped = tmp_path / "shipped"
    shipped.mkdir()
    (shipped / "generation.yaml").write_text((run / "generation.yaml").read_text().replace("../", "../toy/"))
    scores = [{"modality": "RGB", "source": "generated", "precision": 0.614, "recall": 0.5}]
    (tmp_path / "scores.json").write_text(json.dumps({"captions": 12, "scores": scores}))
    main([str(run), str(shipped), "--figures", str(tmp_path / "scores.json")])
    assert {p.name for p in shipped.iterdir()} == {
        "README.md",
        "config.json",
        "generation.yaml",
        "model.safetensors",
        "vocabulary.json",
    }
    sizes = [(folder / "model.safetensors").stat().st_size for folder in (run, shipped)]
    assert sizes[1] < 0.6 * sizes[0]
    original, loaded = FM.from_pretrained(str(run)), Sampler.load(shipped, device="cpu").generation.model
    for name, tensor in original.state_dict().items():
        assert torch.equal(loaded.state_dict()[name], tensor.bfloat16().float()), name
    card = (shipped / "README.md").read_text()
    assert "| RGB " in card and "| 0.61 " in card.replace("      0.61", " 0.61") and "of 12 validation scenes" in card
    assert str(tmp_path) not in card and "What it cannot do" in card and "{" not in card
    main([str(run), str(tmp_path / "new")])
    assert (tmp_path / "new" / "generation.yaml").read_bytes() == (DEMO_MODEL / "generation.yaml").read_bytes()
    (run / "config.yaml").unlink()
    with pytest.raises(UserError, match="there is no text vocabulary"):
        main([str(run), str(tmp_path / "newer")])


def test_the_package_holds_the_model_and_stays_below_30_mb():
    """In the environment of a wheel, the package is what the wheel contained; otherwise, what it will contain."""
    names = {str(path.relative_to(PACKAGE)) for path in PACKAGE.rglob("trained/**/*") if path.is_file()}
    for name in ("config.json", "model.safetensors", "vocabulary.json", "generation.yaml", "README.md"):
        assert f"trained/demo/{name}" in names
    buffer = io.BytesIO()
    with zipfile.ZipFile(buffer, "w", zipfile.ZIP_DEFLATED) as archive:
        for path in PACKAGE.rglob("*"):
            if path.is_file() and "__pycache__" not in path.parts:
                archive.write(path)
    assert buffer.tell() < 30e6
