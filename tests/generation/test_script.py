"""run_generation.py generates from folders, pictures and prompts, and continues after an interruption."""

import json
import shutil
import subprocess
from pathlib import Path

import numpy as np
import pytest
import yaml
from PIL import Image

from fourm.data.data_config import split_domains
from fourm.data.modality_info import MODALITY_INFO
from fourm.generation.options import AllOptions, parse
from fourm.generation.results import read_result
from fourm.generation.script import run
from fourm.generation.settings import COLUMNS, chained_schedule
from fourm.utils.config import load_yaml
from fourm.utils.errors import DataError, UserError
from fourm.utils.options import flat_options
from tests.generation.test_sampler import write_run
from tests.generation.toy_tokenizers import SIZE
from tests.page_faults import glibc, memory_is_kept
from tests.warm_python import warm_python

ROOT = Path(__file__).parents[2]


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    folder = write_run(tmp_path_factory.mktemp("toy"))
    rng = np.random.default_rng(0)
    for index in range(5):
        for modality in ("rgb", "caption"):
            (folder / "data" / modality / "part").mkdir(parents=True, exist_ok=True)
        picture = rng.integers(0, 256, (40, 48, 3), dtype=np.uint8)
        Image.fromarray(picture).save(folder / "data" / "rgb" / "part" / f"{index}.png")
        (folder / "data" / "caption" / "part" / f"{index}.txt").write_text("a red cup")
    (folder / "model.yaml").write_text(
        yaml.safe_dump({"model": str(folder / "run"), "tokenizers": str(folder / "tokenizers"), "device": "cpu"})
    )
    config = {
        "model_config": str(folder / "model.yaml"),
        "data": str(folder / "data"),
        "cond_domains": "rgb",
        "target_domains": "depth-caption",
        "output_dir": str(folder / "default"),
        "tokens_per_target": "16-8",
        "batch_size": 2,
        "temps": "1.0-0.5",
    }
    (folder / "config.yaml").write_text(yaml.safe_dump(config))
    return folder


def options(folder, out, **overrides):
    arguments = {"output_dir": folder / out, **overrides}
    flags = [str(part) for key, value in arguments.items() for part in (f"--{key}", value)]
    return parse(["--config", str(folder / "config.yaml"), *flags])


def contents(out):
    return {path.relative_to(out): path.read_bytes() for path in out.rglob("*.json") if path.name == "result.json"}


def test_a_data_set_becomes_results_and_a_contact_sheet(folder):
    run(options(folder, "all"))
    results = [read_result(folder / "all" / "part" / str(index)) for index in range(5)]
    for result in results:
        assert [*result] == [f"rgb@{SIZE}", f"tok_depth@{SIZE}", "caption"]
        assert result[f"tok_depth@{SIZE}"].value.shape == (SIZE, SIZE)
    files = {path.name for path in (folder / "all" / "part" / "3").iterdir()}
    assert files == {f"rgb@{SIZE}.png", f"tok_depth@{SIZE}.png", "caption.txt", "values.npz", "result.json"}
    assert (folder / "all" / "part" / "3" / "caption.txt").read_text().strip() == results[3]["caption"].value.strip()
    assert Image.open(folder / "all" / f"part/3/rgb@{SIZE}.png").size == (SIZE, SIZE)
    width, height = Image.open(folder / "all" / "sheet.png").size
    assert height > width


def test_an_interrupted_command_makes_what_is_missing_and_the_same(folder):
    run(options(folder, "whole"))
    before = contents(folder / "whole")
    shutil.rmtree(folder / "whole" / "part" / "1")
    shutil.rmtree(folder / "whole" / "part" / "4")
    (folder / "whole" / "sheet.png").unlink()
    kept = (folder / "whole" / "part" / "0" / "result.json").stat().st_mtime_ns
    run(options(folder, "whole", batch_size=1))
    assert contents(folder / "whole") == before
    assert (folder / "whole" / "part" / "0" / "result.json").stat().st_mtime_ns == kept
    assert (folder / "whole" / "sheet.png").exists()


def test_processes_share_the_samples_and_the_last_one_makes_the_sheet(folder):
    run(options(folder, "one"))
    run(options(folder, "two"), rank=0, world_size=2)
    assert len(contents(folder / "two")) == 3
    assert not (folder / "two" / "sheet.png").exists()
    run(options(folder, "two"), rank=1, world_size=2)
    assert contents(folder / "two") == contents(folder / "one")
    assert (folder / "two" / "sheet.png").exists()


def test_prompts_with_variations(folder):
    prompts = folder / "prompts.txt"
    prompts.write_text("a red cup\n\na duck\n")
    words = {"cond_domains": "caption", "target_domains": "tok_rgb@32", "tokens_per_target": 16, "temps": 1.0}
    run(options(folder, "prompts", data=prompts, num_variations=2, **words))
    names = sorted(path.name for path in (folder / "prompts").iterdir() if path.is_dir())
    assert names == ["00000-0", "00000-1", "00001-0", "00001-1"]
    pictures = [read_result(folder / "prompts" / name)[f"tok_rgb@{SIZE}"].value for name in names]
    assert not np.array_equal(pictures[0], pictures[1])
    assert read_result(folder / "prompts" / "00001-1")["caption"].value == "a duck"
    run(options(folder, "listed", data="[a red cup, a duck]", seed=0, **words))
    listed = read_result(folder / "listed" / "00000")[f"tok_rgb@{SIZE}"].value
    assert np.array_equal(listed, pictures[0])


def test_a_picture_and_a_folder_of_pictures(folder):
    run(options(folder, "photo", data=folder / "photo.png", num_samples=1))
    assert [*read_result(folder / "photo" / "photo")] == [f"rgb@{SIZE}", f"tok_depth@{SIZE}", "caption"]
    run(options(folder, "photos", data=folder / "data" / "rgb" / "part", num_samples=2))
    assert (folder / "photos" / "1" / "result.json").exists() and not (folder / "photos" / "2").exists()


def test_results_of_other_settings_do_not_get_mixed(folder):
    run(options(folder, "mixed", num_samples=1))
    with pytest.raises(UserError, match="mixed was made with temps 1.0-0.5, not 2.0"):
        run(options(folder, "mixed", num_samples=1, temps=2.0))
    run(options(folder, "mixed", num_samples=2))
    assert (folder / "mixed" / "part" / "1").is_dir()


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        ({"data": "nothing/here"}, "neither a file nor a folder nothing/here"),
        ({"data": "[a cup]"}, "prompts need one text in cond_domains, not rgb@32"),
        ({"data": "{}/photo.png", "cond_domains": "det"}, "pictures need one modality of images"),
        ({"data": "{}/run"}, "no folder rgb, and no pictures"),
        ({"target_domains": "depth-captoin"}, "target_domains: unknown modality 'captoin' .did you mean 'caption'"),
        ({"temps": "1-2-3"}, "'temps' has 3 values for 2 targets"),
        ({"batch_size": 0}, "'batch_size' must be at least 1"),
        ({"dtype": "float8"}, "'dtype' must be one of"),
    ],
)
def test_what_cannot_work_is_one_clear_sentence(folder, overrides, message):
    overrides = {key: str(value).format(folder) for key, value in overrides.items()}
    with pytest.raises(UserError, match=message):
        run(options(folder, "wrong", **overrides))


def test_a_broken_file_of_a_data_set_is_named(folder, tmp_path):
    shutil.copytree(folder / "data", tmp_path / "data")
    (tmp_path / "data" / "rgb" / "part" / "2.png").write_bytes(b"nothing")
    with pytest.raises(DataError, match="2.png|key 'part/2'"):
        run(options(folder, "broken", data=tmp_path / "data", batch_size=1))
    assert (folder / "broken" / "part" / "1").is_dir()


def test_the_command_ends_with_one_line_and_status_2(folder):
    command = [warm_python(), "run_generation.py", "--config", str(folder / "config.yaml"), "--tempss", "1"]
    result = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    assert result.returncode == 2
    assert result.stderr.strip().splitlines() == [
        "error: command line: unknown key '--tempss' (did you mean '--temps'?)"
    ]


@pytest.mark.parametrize(
    "path", sorted(ROOT.glob("cfgs/**/generation*/**/*.yaml")) + [ROOT / "cfgs/demo/generation.yaml"]
)
def test_shipped_configurations_have_known_keys(path):
    content = load_yaml(path)
    assert content.keys() <= set(flat_options(AllOptions))
    for key in ("model_config", "data_config", "gen_config", "sr_config"):
        assert not content.get(key) or (ROOT / content[key]).is_file()


def test_settings_are_recorded(folder):
    run(options(folder, "recorded", num_samples=1))
    record = json.loads((folder / "recorded" / "settings.json").read_text())
    assert (record["temps"], record["target_domains"], record["seed"]) == ("1.0-0.5", "depth-caption", 0)


@pytest.mark.parametrize(
    "path", sorted((ROOT / "cfgs/default/generation/settings_base").glob("*all.yaml")), ids=lambda p: p.name
)
def test_shipped_settings_can_be_followed_by_the_published_modalities(path, monkeypatch):
    monkeypatch.chdir(ROOT)
    options = parse(["--config", str(path)])
    targets = split_domains(options.target_domains, MODALITY_INFO, "")
    settings = {key: value for key in COLUMNS if (value := getattr(options, key)) is not None}
    schedule = chained_schedule([options.cond_domains], targets, MODALITY_INFO, settings)
    totals = {name: sum(s["num_tokens"] for s in schedule if s["target_domain"] == name) for name in targets}
    assert totals == {name: MODALITY_INFO[name].max_tokens for name in targets}


@glibc
def test_the_command_keeps_freed_memory_on_a_cpu(folder):
    arguments = ["--config", str(folder / "config.yaml"), "--output_dir", str(folder / "kept"), "--num_samples", "1"]
    assert memory_is_kept(f"from fourm.generation.script import main; main({arguments})")
