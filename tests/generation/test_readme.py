"""The examples in README_GENERATION.md run in order, with a toy model in place of that of the demo."""

import os
import re
import shutil
import subprocess
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from tests.generation.test_sampler import write_run
from tests.generation.toy_tokenizers import published_model, toy_tokenizer
from tests.warm_python import warm_python

REPOSITORY = Path(__file__).parents[2]
BLOCKS = re.findall(r"^```(\w+)\n(.*?)^```", (REPOSITORY / "README_GENERATION.md").read_text(), re.M | re.S)


def write_demo(folder):
    """Write the files of ``make demo`` that generation needs."""
    write_run(folder)
    (folder / "demo_run/data/val/rgb/00000").mkdir(parents=True)
    shutil.move(folder / "run", folder / "demo_run/training")
    shutil.move(folder / "tokenizers", folder / "demo_run/tokenizers")
    picture = np.random.default_rng(0).integers(0, 256, (32, 32, 3), dtype=np.uint8)
    Image.fromarray(picture).save(folder / "demo_run/data/val/rgb/00000/000000.jpg")
    return folder / "demo_run"


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    folder = tmp_path_factory.mktemp("readme")
    write_demo(folder)
    for name in ("run_generation.py", "cfgs", "fourm"):
        (folder / name).symlink_to(REPOSITORY / name)
    runs, data = folder / "output/default/4m/models", "mix_mod7_superres_caption_rgb_bias"
    published_model("main/mix_mod7_all2all_rgb2all_a0.5", runs / "main/4m-b_mod7_500b")
    published_model(f"superres/{data}", runs / "superres/4m-l_mod7_500b--sr_448_100b")
    toy_tokenizer("rgb", patch=16).save(folder / "tokenizers/rgb")
    return folder


@pytest.mark.slow
def test_the_python_blocks_run(folder, monkeypatch):
    monkeypatch.chdir(folder)
    names = {}
    for language, code in BLOCKS:
        if language == "python":
            exec(code, names)
    for name in ("sheet.png", "guidance.png", "film.png", "duck.png", "superres.png"):
        assert Image.open(folder / name).width > 100
    steps = [(step[names["depth"]].dropped, step[names["depth"]].value) for step in names["film"]]
    assert [dropped for dropped, _ in steps] == [14, 12, 10, 8, 6, 4, 2, 0]
    before, after = names["grid"], names["edited"][0][names["rgb"]].tensor
    half = len(before) // 2
    assert before[half:].equal(after[half:]) and (before[:half] < 0).all() and (after >= 0).all()
    assert [result["tok_rgb@448"].value.shape for result in names["large"]] == [(448, 448, 3)] * 2


@pytest.mark.slow
def test_the_commands_run(folder):
    path = f"{Path(warm_python()).parent}{os.pathsep}{os.environ['PATH']}"
    environment = os.environ | {"PATH": path, "PYTHONPATH": str(REPOSITORY)}
    code = "".join(code for language, code in BLOCKS if language == "bash")
    result = subprocess.run(["bash", "-ec", code], cwd=folder, env=environment, capture_output=True, text=True)
    assert result.returncode == 0, result.stderr
    for name in ("generation", "from_words", "one"):
        assert (folder / "demo_run" / name / "sheet.png").exists()
    assert len([path for path in (folder / "demo_run/from_words").iterdir() if path.is_dir()]) == 4
    assert (folder / "output/generation/caption2rgb_448/00000/tok_rgb@448.png").exists()
