"""The shipped notebooks are executed and small, contain nothing about the machine, and run on another model."""

import io
import json
import os
import re
import subprocess
from pathlib import Path

import numpy as np
import pytest
import yaml
from PIL import Image

from tests.data.dataset_files import jpeg, npy, write_tar
from tests.generation.test_readme import write_demo
from tests.generation.toy_tokenizers import MODALITIES, SIZE, VOCAB
from tests.warm_python import warm_python

ROOT = Path(__file__).parents[1]
NOTEBOOKS = ROOT / "notebooks"
NOTEBOOK = NOTEBOOKS / "generation.ipynb"
FIGURES = ["rgb-to-all", "caption-to-all", "chain", "guidance-sweep", "edit"]
TOUR = {
    "guidance_and_editing": [
        "guidance-temperature",
        "schemes-steps",
        "curves",
        "mixtures",
        "depth-and-words",
        "region",
        "kept-tokens",
        "other-words",
        "moved-boxes",
    ],
    "retrieval": ["captions", "structures"],
    "own_modality": ["generate", "words"],
}
"""The other notebooks, and the ids of their cells that display a picture."""
TOKENS = [name for name in MODALITIES if name.startswith("tok_") and "clip" not in name]
NOT_GENERATED = ("metadata", "color_palette", "tok_clip")


def scene(index):
    """Return the files of a scene: {folder: (extension, content)}."""
    rng = np.random.default_rng(index)
    classes, depth = rng.integers(0, 3, (SIZE, SIZE)), rng.integers(1, 2**16, (SIZE, SIZE))
    tokens = {name: ("npy", npy(rng.integers(0, VOCAB, (1, 16), dtype=np.int16))) for name in TOKENS}
    box = {"boxes": [0.1, 0.2, 0.6, 0.9], "class_name": "cup", "score": 1.0}
    return tokens | {
        "rgb": ("jpg", jpeg(rng, (SIZE, SIZE))),
        "depth": ("png", png(depth.astype(np.uint16))),
        "semseg": ("png", png(classes.astype(np.uint8))),
        "caption": ("txt", f"a cup and {index} ducks".encode()),
        "det": ("json", json.dumps({"instances": [box]}).encode()),
        "crop_settings": ("npy", npy(np.array([(0, 0, SIZE, SIZE, 0)]))),
    }


def png(array):
    buffer = io.BytesIO()
    Image.fromarray(array).save(buffer, "PNG")
    return buffer.getvalue()


def write_toy_demo(folder):
    """Write everything that ``make demo`` leaves behind and that the notebooks read, with a model of random weights."""
    demo = write_demo(folder)
    for index in range(3):
        for name, (extension, content) in scene(index).items():
            path = demo / f"data/val/{name}/00000/{index:06d}.{extension}"
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_bytes(content)
    scenes = {f"{index:06d}": scene(index) for index in range(10, 20)}
    for name in scene(0):
        members = [(f"{key}.{files[name][0]}", files[name][1]) for key, files in scenes.items()]
        write_tar(demo / f"data/train/{name}/shard-00000.tar", members)
    inputs = [name for name in MODALITIES if not name.startswith(NOT_GENERATED)]
    targets = [name for name in inputs if not name.startswith("rgb")]
    alphas = {name: {"input_alphas": [1.0, 1.0]} for name in inputs}
    for name in targets:
        alphas[name] |= {"target_alphas": [1.0, 1.0]} | ({} if "@" in name else {"keep": ["random", "random"]})
    write_yaml(demo / "alphas.yaml", {"sampling_weights": [1, 1], "alphas_mixture": alphas})
    folders = ",".join(["rgb", "caption", "det", "crop_settings", *TOKENS])
    train = {
        "in_domains": "-".join(inputs),
        "out_domains": "-".join(targets),
        "alphas_config": str(demo / "alphas.yaml"),
        "data_path": f"{demo}/data/train/[{folders}]/shard-{{00000..00000}}.tar",
        "use_wds": True,
        "main_augment_domain": f"rgb@{SIZE}",
        "aligned_captions": False,
    }
    val = {"data_path": f"{demo}/data/val", "use_wds": False}
    modalities = {name: MODALITIES[name] for name in inputs}
    sets = {"train": {"datasets": {"scenes": train}}, "val": {"datasets": {"scenes": val}}}
    write_yaml(demo / "data.yaml", {"modalities": modalities, **sets})
    config = yaml.safe_load((demo / "training/config.yaml").read_text())
    config |= {
        "model": "fm_tiny_6e_6d_swiglu_nobias",
        "dtype": "float32",
        "device": "cpu",
        "patch_size": 8,
        "input_size": SIZE,
        "model_kwargs": {"dim": 32, "encoder_depth": 1, "decoder_depth": 1, "num_heads": 2},
        "num_input_tokens": 16,
        "num_target_tokens": 12,
        "epochs": 1,
        "data_config": str(demo / "data.yaml"),
    }
    write_yaml(demo / "training/config.yaml", config)
    return demo


def write_yaml(path, content):
    path.write_text(yaml.safe_dump(content))


@pytest.fixture(scope="module")
def toy_demo(tmp_path_factory):
    return write_toy_demo(tmp_path_factory.mktemp("notebooks"))


def is_picture(output):
    return bool({"image/png", "image/jpeg"} & output.get("data", {}).keys())


def figures(path):
    """Return the ids of the cells that display a picture."""
    cells = json.loads(path.read_text())["cells"]
    return [cell["id"] for cell in cells if any(is_picture(o) for o in cell.get("outputs", ()))]


def check_shipped(path, ids):
    assert figures(path) == ids
    content = json.loads(path.read_text())
    code = [cell for cell in content["cells"] if cell["cell_type"] == "code"]
    assert [cell["execution_count"] for cell in code] == [*range(1, len(code) + 1)]
    assert all(not cell["metadata"] for cell in content["cells"])
    assert content["metadata"].keys() == {"kernelspec", "language_info"}
    return ["".join(output.get("text", "")) for cell in code for output in cell["outputs"]]


def test_the_shipped_notebook_has_its_figures_and_nothing_about_the_machine():
    texts = check_shipped(NOTEBOOK, FIGURES)
    assert NOTEBOOK.stat().st_size < 1_500_000
    assert not any("/" in text for text in texts)


@pytest.mark.parametrize("name", TOUR)
def test_the_other_notebooks_have_theirs(name):
    path = NOTEBOOKS / f"{name}.ipynb"
    texts = check_shipped(path, TOUR[name])
    assert path.stat().st_size < 1_000_000
    assert not any(re.search(r"/\w+/", text) for text in texts)


def execute(path, demo, out):
    command = [warm_python(), "notebooks/execute.py", "--notebook", str(path), "--output", str(out)]
    environment = os.environ | {"FOURM_DEMO": str(demo), "PYTHONPATH": str(ROOT)}
    result = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True)
    assert result.returncode == 0, result.stderr
    sources = [[cell["source"] for cell in json.loads(file.read_text())["cells"]] for file in (path, out)]
    assert sources[0] == sources[1]


@pytest.mark.slow
def test_the_notebook_runs_on_a_toy_model(toy_demo, tmp_path):
    execute(NOTEBOOK, toy_demo, tmp_path / "executed.ipynb")
    assert figures(tmp_path / "executed.ipynb") == FIGURES


@pytest.mark.slow
@pytest.mark.parametrize("name", TOUR)
def test_the_other_notebooks_run_on_a_toy_model(name, toy_demo, tmp_path):
    execute(NOTEBOOKS / f"{name}.ipynb", toy_demo, tmp_path / "executed.ipynb")
    assert figures(tmp_path / "executed.ipynb") == TOUR[name]
