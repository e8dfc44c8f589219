"""README_DATA.md: its commands are run in their order on a small data set, and its files are loaded."""

import json
import os
import re
import subprocess
from pathlib import Path

import numpy as np
import pytest
import yaml

from fourm.data import resolve_modalities
from fourm.data.alphas import alphas_from_file
from fourm.data.modality_transforms import transforms_for
from tests.data.dataset_files import jpeg
from tests.warm_python import warm_python

REPOSITORY = Path(__file__).parents[2]
BLOCKS = re.findall(r"^```(\w+)\n(.*?)^```", (REPOSITORY / "README_DATA.md").read_text(), re.M | re.S)


def write_data(root, count):
    for index in range(count):
        rng = np.random.default_rng(index)
        boxes = {"instances": [{"boxes": [0.1, 0.2, 0.8, 0.9], "class_name": "dog", "score": 0.9}]}
        contents = {
            "rgb/.jpg": jpeg(rng, (200, 240)),
            "caption/.json": json.dumps(f"a photograph of dog number {index}").encode(),
            "det/.json": json.dumps(boxes).encode(),
        }
        for name, content in contents.items():
            folder, extension = name.split("/")
            path = root / folder / f"part{index % 2}" / f"{index:04d}{extension}"
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_bytes(content)


@pytest.mark.slow
def test_what_the_readme_says_can_be_done(tmp_path):
    write_data(tmp_path / "my_data", 12)
    write_data(tmp_path / "my_val", 5)
    (tmp_path / "save_vq_tokens.py").symlink_to(REPOSITORY / "save_vq_tokens.py")
    path = f"{Path(warm_python()).parent}{os.pathsep}{os.environ['PATH']}"
    environment = os.environ | {"PATH": path, "PYTHONPATH": str(REPOSITORY)}
    for language, code in BLOCKS:
        if language == "yaml":
            (tmp_path / code.split("\n")[0].removeprefix("# ")).write_text(code)
    printed = ""
    for language, code in BLOCKS:
        if language in ("bash", "python"):
            code = code.replace("--shard_size 1000", "--shard_size 6")  # two shards of so few samples
            command = ["bash", "-ec", code] if language == "bash" else [warm_python(), "-c", code]
            run = subprocess.run(command, cwd=tmp_path, env=environment, capture_output=True, text=True)
            assert run.returncode == 0, f"{code}\n{run.stderr}"
            printed += run.stdout
    assert (
        "train my_data: 12 samples read; all good\n" in printed and "val my_data: 5 samples read; all good\n" in printed
    )
    assert [found["samples_read"] for found in json.loads((tmp_path / "check.json").read_text())] == [12, 5]
    assert "rgb@224 (4, 3, 224, 224) " in printed and "'stream': 0, 'epoch': 0, 'draws': 4" in printed
    assert printed.count("{'rgb@224': (4, 3, 224, 224), 'tok_rgb@224': (4, 196), 'caption': (4, 514)}\n") == 2

    declared = yaml.safe_load((tmp_path / "my_modalities.yaml").read_text())["modalities"]
    assert transforms_for(resolve_modalities(declared, declared)).keys() == declared.keys()
    names = ["rgb@224", "tok_rgb@224", "caption", "det"]
    mixture = alphas_from_file(tmp_path / "my_alphas.yaml", resolve_modalities(names), names, names[1:])
    assert mixture.sampling_weights == (3, 1) and mixture.keep["caption"] == ("random", "all")
