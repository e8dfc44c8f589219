"""The rendered data set: it has the published layout, is deterministic, and may be interrupted."""

import json
import os
import signal
import subprocess
import sys
import tarfile
import time

import pytest

pytest.importorskip("pybullet")

from PIL import Image

from fourm.demo.render import EXTENSIONS, render_all, render_unit, units
from fourm.demo.simulator import Simulator

SIZE = 48


def _names(path):
    with tarfile.open(path) as tar:
        return tar.getnames()


@pytest.fixture(scope="module")
def simulator():
    with Simulator() as simulator:
        yield simulator


@pytest.fixture(scope="module")
def data(tmp_path_factory, simulator):
    root = tmp_path_factory.mktemp("scenes")
    for unit in units(root, "train", 4, 2) + units(root, "val", 3, 2):
        render_unit(unit, SIZE, 0, simulator)
    return root


def test_training_data_are_shards_with_the_same_keys_in_every_modality(data):
    for modality, extension in EXTENSIONS.items():
        for number, keys in enumerate([("000000", "000001"), ("000002", "000003")]):
            shard = data / "train" / modality / f"shard-{number:05d}.tar"
            assert _names(shard) == [f"{key}.{extension}" for key in keys]


def test_validation_data_are_folders(data):
    for modality, extension in EXTENSIONS.items():
        files = sorted(path.relative_to(data / "val" / modality) for path in (data / "val" / modality).rglob("*.*"))
        assert [str(f) for f in files] == [f"00000/00000{i}.{extension}" for i in (0, 1)] + [
            f"00001/000002.{extension}"
        ]


def test_files_have_the_published_formats(data):
    sample = {modality: data / "val" / modality / "00000" / f"000000.{ext}" for modality, ext in EXTENSIONS.items()}
    modes = {m: Image.open(sample[m]).mode for m in ("rgb", "depth", "normal", "semseg", "canny_edge")}
    assert modes == {"rgb": "RGB", "depth": "I;16", "normal": "RGB", "semseg": "L", "canny_edge": "L"}
    assert all(Image.open(sample[m]).size == (SIZE, SIZE) for m in modes)
    (box, *_) = json.loads(sample["det"].read_text())["instances"]
    assert len(box["boxes"]) == 4 and all(0 <= c <= 1 for c in box["boxes"]) and box["score"] == 1.0
    assert set(json.loads(sample["color_palette"].read_text())[0]) == set("1234567")


def test_the_bytes_depend_on_the_seed_only(data, tmp_path, simulator):
    (unit,) = units(tmp_path, "train", 2, 2)
    first = {m: (data / "train" / m / "shard-00000.tar").read_bytes() for m in EXTENSIONS}
    render_unit(unit, SIZE, 0, simulator)
    assert {m: unit.path(m).read_bytes() for m in EXTENSIONS} == first
    render_unit(unit, SIZE, 1, simulator)
    assert unit.path("rgb").read_bytes() != first["rgb"]


def test_a_killed_run_keeps_its_finished_shards_and_completes(tmp_path, data):
    code = (
        "import sys; from pathlib import Path; from fourm.demo.render import render_all, units\n"
        f"if __name__ == '__main__': render_all(units(Path(sys.argv[1]), 'train', 60, 2), {SIZE}, 0, 1)"
    )
    script = tmp_path / "render.py"
    script.write_text(code)
    root = tmp_path / "scenes"
    process = subprocess.Popen(
        [sys.executable, script, root],
        start_new_session=True,
        stderr=subprocess.DEVNULL,
        env=os.environ | {"PYTHONPATH": os.getcwd()},
    )
    try:
        deadline = time.time() + 60
        while not (root / "train" / "metadata" / "shard-00001.tar").exists() and time.time() < deadline:
            time.sleep(0.02)
    finally:
        os.killpg(process.pid, signal.SIGKILL)
        process.wait()
    done = {unit for unit in units(root, "train", 60, 2) if unit.is_done()}
    assert 2 <= len(done) < 30
    stamps = {unit: unit.path("rgb").stat().st_mtime_ns for unit in done}
    some = units(root, "train", 2 * (len(done) + 2), 2)
    render_all(some, SIZE, 0, 1)
    assert all(unit.is_done() for unit in some)
    assert all(unit.path("rgb").stat().st_mtime_ns == stamp for unit, stamp in stamps.items())
    assert some[0].path("rgb").read_bytes() == (data / "train" / "rgb" / "shard-00000.tar").read_bytes()
