"""The published files of run_generation.py are loaded, and run on stand-ins of the published models."""

import os
import signal
import subprocess
import time
from pathlib import Path

import numpy as np
import pytest
import torch
import yaml
from PIL import Image

from fourm.data.data_config import split_domains
from fourm.data.modality_info import MODALITY_INFO
from fourm.generation import decode
from fourm.generation.decoding import Detokenizer
from fourm.generation.options import parse
from fourm.generation.prompts import read_prompt_table
from fourm.generation.results import read_result
from fourm.generation.script import run
from fourm.generation.settings import COLUMNS, chained_schedule
from fourm.utils.errors import UserError
from fourm.vq import load_tokenizer
from tests.generation.stand_ins import HUB, MODELS, ROOT, write_model, write_tokenizer
from tests.warm_python import warm_python

CONFIGS = "cfgs/default/generation"
MODEL_FILES = [f"4m-{size}_mod{count}+sr_4m-l_mod7" for size in ("b", "l", "xl") for count in (7, 21)]
BASE, SR = "T2CR_roar49-25_cfg3_t6-0.5const", "x2CR_mg8_cfg3_t1const"


def arguments(models=MODEL_FILES[0], data="parti_prompts_x3", *others):
    return [
        "-c",
        f"{CONFIGS}/models/{models}.yaml",
        "-dc",
        f"{CONFIGS}/data/{data}.yaml",
        "-gc",
        f"{CONFIGS}/settings_base/{BASE}.yaml",
        "-src",
        f"{CONFIGS}/settings_sr/{SR}.yaml",
        *others,
    ]


@pytest.mark.parametrize("data", ["cc12m", "parti_prompts_x3"])
@pytest.mark.parametrize("models", MODEL_FILES)
def test_the_published_files_say_what_is_generated(models, data, monkeypatch):
    monkeypatch.chdir(ROOT)
    options = parse(arguments(models, data))
    size, count = models.split("+")[0].removeprefix("4m-").split("_mod")
    assert options.model == f"{HUB}/4M-{count}_{size.upper()}_CC12M"
    assert options.sr.model == f"{HUB}/4M-7-SR_L_CC12M" and options.detokenizer_steps == 50
    assert options.tokenizers == {
        "rgb": f"{HUB}/4M_tokenizers_rgb_16k_224-448",
        "clip": f"{HUB}/4M_tokenizers_CLIP-B16_8k_224-448",
    }
    assert options.output_dir.endswith(f"output/{models}/{data}/{BASE}+{SR}")
    assert (options.num_samples, options.num_variations) == {"cc12m": (30_000, 1)}.get(data, (None, 3))
    assert options.sheet_samples == {"cc12m": 100}.get(data, 200)
    for part, tokens in ((options, 196), (options.sr, 784)):
        targets = split_domains(part.target_domains, MODALITY_INFO, "")
        settings = {key: value for key in COLUMNS if (value := getattr(part, key)) is not None}
        schedule = chained_schedule(["caption"], targets, MODALITY_INFO, settings)
        assert len(schedule) == {196: 49 + 25, 784: 16}[tokens] and part.top_p == 0.9
        assert {step["cfg_scale"] for step in schedule} == {3.0}
        assert sum(step["num_tokens"] for step in schedule) == 2 * tokens
    assert options.sr.cond_domains is None


def test_the_command_line_overrides_every_file(tmp_path, monkeypatch):
    monkeypatch.chdir(ROOT)
    flags = [
        "--data_path",
        str(tmp_path),
        "--target_domains",
        "tok_canny_edge@224",
        "--edges_tok_id",
        "my/edges",
        "--seed",
        "7",
        "--num_workers",
        "3",
        "--dtype",
        "bf16",
        "--image_size",
        "224",
        "--save_all_outputs",
        "--data_name",
        "mine",
        "--name",
        "edges",
        "--sr_cfg_scales",
        "1.0",
        "--controlnet_id",
        "my/net",
        "--activate_controlnet",
    ]
    options = parse(arguments(MODEL_FILES[1], "cc12m", *flags))
    assert options.data == str(tmp_path) and options.seed == 7 and options.dtype == "bfloat16"
    assert options.tokenizers["canny_edge"] == "my/edges" and options.sr.cfg_scales == 1.0
    assert options.output_dir.endswith("/mine/edges") and options.controlnet_id == "my/net"
    with pytest.raises(UserError, match="'activate_controlnet' needs a ControlNet; set 'controlnet_id'"):
        parse(arguments(MODEL_FILES[1], "cc12m", "--activate_controlnet"))


@pytest.fixture(scope="module")
def hub(tmp_path_factory):
    """A working directory with stand-ins, prompts, and validation data."""
    folder = tmp_path_factory.mktemp("hub")
    for name in MODELS:
        write_model(name, folder)
    for name in ("rgb_16k_224-448", "CLIP-B16_8k_224-448"):
        write_tokenizer(name, folder)
    (folder / "parti_prompts.tsv").write_text(
        'Prompt\tCategory\tChallenge\tNote\na cup\tArtifacts\tBasic\t\n"a ""red"" duck"\tAnimals\tBasic\t\n'
    )
    for name in ("cfgs", "fourm", "run_generation.py"):
        (folder / name).symlink_to(ROOT / name)
    (folder / "val/caption/part").mkdir(parents=True)
    for index in range(2):
        (folder / f"val/caption/part/{index}.txt").write_text("a cup")
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(folder)
        yield folder


ONE_STEP = Detokenizer(1)
FAST = ["--detokenizer_steps", "1", "--decoding_steps", "3-2", "--sr_decoding_steps", "2-1", "--device", "cpu"]


def test_prompts_become_pictures_at_both_sizes_and_a_killed_command_continues(hub):
    flags = arguments(MODEL_FILES[0], "parti_prompts_x3", *FAST, "--num_samples", "1", "--batch_size", "1")
    out = Path(f"output/{MODEL_FILES[0]}/parti_prompts_x3/{BASE}+{SR}")
    process = subprocess.Popen(
        [warm_python(), "run_generation.py", *flags],
        env=os.environ | {"PYTHONPATH": str(ROOT)},
        stderr=subprocess.PIPE,
        text=True,
    )
    deadline = time.monotonic() + 300
    while not (out / "00000-0" / "result.json").exists() and process.poll() is None and time.monotonic() < deadline:
        time.sleep(0.01)
    process.send_signal(signal.SIGKILL)
    process.communicate()  # until it has ended
    kept = (out / "00000-0" / "result.json").stat().st_mtime_ns
    run(parse(flags))
    assert (out / "00000-0" / "result.json").stat().st_mtime_ns == kept
    results = [read_result(out / f"00000-{variation}") for variation in range(3)]
    for result in results:
        assert [*result] == ["caption", "tok_clip@224", "tok_rgb@224", "tok_clip@448", "tok_rgb@448"]
        assert result["tok_rgb@448"].value.shape == (448, 448, 3) and result["tok_clip@448"].value.shape == (
            28,
            28,
            512,
        )
        assert result["caption"].value == "a cup"
    assert (results[0]["tok_rgb@224"].value != results[1]["tok_rgb@224"].value).any()
    assert Image.open(out / "sheet.png").width > 500


def test_the_captions_of_a_validation_folder_without_super_resolution(hub):
    models = yaml.safe_load(Path(f"{CONFIGS}/models/{MODEL_FILES[5]}.yaml").read_text())
    Path("own.yaml").write_text(yaml.safe_dump({k: v for k, v in models.items() if k != "sr_model"}))
    flags = ["-c", "own.yaml", *arguments(MODEL_FILES[5], "cc12m", *FAST)[2:6], "--data_path", "val", *FAST[:4]]
    run(parse([*flags, "--num_samples", "1", "--device", "cpu", "--output_dir", "base"]))
    assert [*read_result(Path("base/part/0"))] == ["caption", "tok_clip@224", "tok_rgb@224"]


def test_a_table_of_prompts(hub):
    assert read_prompt_table(Path("parti_prompts.tsv")) == ["a cup", 'a "red" duck']
    for table, message in (
        ("Text\tCategory\na cup\tArt\n", "no column Prompt"),
        ("Prompt\tCategory\n\tArt\n", "no prompts"),
    ):
        Path("wrong.tsv").write_text(table)
        with pytest.raises(UserError, match=message):
            read_prompt_table(Path("wrong.tsv"))


def test_the_same_tokens_are_decoded_to_the_same_picture_in_any_batch(hub):
    tokenizers = {"rgb": load_tokenizer(f"{HUB}/4M_tokenizers_rgb_16k_224-448")}
    ids = torch.stack([torch.arange(196), torch.arange(196), torch.arange(196) + 900])
    entry = {"tensor": ids, "input_mask": torch.zeros_like(ids, dtype=torch.bool)}
    alone = {key: value[1:2] for key, value in entry.items()}
    first, second, other, last = (
        result["tok_rgb@224"].value.astype(int)
        for part in (entry, alone)
        for result in decode({"tok_rgb@224": part}, MODALITY_INFO, tokenizers, None, ONE_STEP)
    )
    assert np.abs(first - second).max() <= 1 and np.abs(first - last).max() <= 1
    assert np.abs(first - other).max() > 1
