"""A super-resolution model continues from the tokens of the first model, from Python and from the command line."""

import dataclasses
import json
import shutil
from pathlib import Path

import numpy as np
import pytest
import torch
import yaml
from tokenizers import Tokenizer

from fourm.generation import Sampler, decode
from fourm.generation.inputs import make_batch
from fourm.generation.options import parse
from fourm.generation.results import read_result
from fourm.generation.script import run
from fourm.utils.config import load_yaml
from fourm.utils.errors import UserError
from tests.generation.test_sampler import same, write_run
from tests.generation.test_script import contents
from tests.generation.toy_tokenizers import SIZE, SUPERRES, published_model, toy_model

ROOT = Path(__file__).parents[2]
CONFIGS = "cfgs/default/generation"
SMALL, LARGE, DEPTH, LARGE_DEPTH = "tok_rgb@32", "tok_rgb@64", "tok_depth@32", "tok_depth@64"
FAST = {"autoregression_schemes": "maskgit", "decoding_steps": 2, "temps": 1.0}


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    folder = write_run(tmp_path_factory.mktemp("stages"))
    toy_model(SUPERRES).save_pretrained(folder / "superres")
    (folder / "models.yaml").write_text(
        yaml.safe_dump(
            {
                "model": str(folder / "run"),
                "tokenizers": str(folder / "tokenizers"),
                "sr_model": str(folder / "superres"),
            }
        )
    )
    second = {"target_domains": "depth-rgb", "decoding_steps": "2-4", "temps": "0.5-1.0"}
    (folder / "second.yaml").write_text(
        yaml.safe_dump({**second, "autoregression_schemes": "maskgit", "token_decoding_schedules": "cosine"})
    )
    config = {
        "model_config": str(folder / "models.yaml"),
        "sr_config": str(folder / "second.yaml"),
        "data": ["a cup", "a duck"],
        "cond_domains": "caption",
        "target_domains": "rgb-depth-normal",
        "decoding_steps": 2,
        "temps": 1.0,
        "output_dir": str(folder / "default"),
        "device": "cpu",
        "num_variations": 2,
        "batch_size": 3,
    }
    (folder / "config.yaml").write_text(yaml.safe_dump(config))
    return folder


@pytest.fixture(scope="module")
def sampler(folder):
    return Sampler.load(folder / "run", folder / "tokenizers", device="cpu")


@pytest.fixture(scope="module")
def superres(folder, sampler):
    return Sampler.load(folder / "superres", device="cpu", like=sampler)


def options(folder, out, **overrides):
    arguments = {"output_dir": folder / out, **overrides}
    flags = [str(part) for key, value in arguments.items() for part in (f"--{key}", value)]
    return parse(["--config", str(folder / "config.yaml"), *flags])


def values(out):
    return {path.parent.name: dict(np.load(path)) for path in out.rglob("values.npz")}


def equal(first, second):
    assert first.keys() == second.keys() and first
    return all(
        np.array_equal(first[key][name], second[key][name], equal_nan=True) for key in first for name in first[key]
    )


def test_results_are_upsampled_with_the_tokens_that_were_generated(sampler, superres):
    results = sampler([{"caption": "a cup"}, {"caption": "a duck"}], ["rgb", "normal"], seed=0, decoding_steps=2)
    large = superres(results, ["rgb"], seed=[5, 6], **FAST)
    assert [*large[0]] == ["caption", SMALL, LARGE]  # the second model does not know normals
    assert large[0][LARGE].value.shape == (2 * SIZE, 2 * SIZE, 3)
    assert large[1]["caption"].value == "a duck" and large[1][SMALL] is results[1][SMALL]
    ids = {"caption": "a duck", SMALL: results[1][SMALL].tensor}
    assert same(large[1], superres(ids, ["rgb"], seed=6, **FAST)[0])
    other = superres({**ids, SMALL: results[0][SMALL].tensor}, ["rgb"], seed=6, **FAST)[0]
    assert not np.array_equal(other[LARGE].value, large[1][LARGE].value)


def test_every_kind_of_result_is_an_input_as_the_model_had_it(sampler, folder):
    photo = {f"rgb@{SIZE}": folder / "photo.png"}
    (result,) = sampler(photo, ["depth", "clip", "caption", "metadata"], seed=0)
    again = sampler(result, ["normal"], seed=3, temps=1.0)[0]
    ids = {name: result[name].tensor for name in (DEPTH, f"tok_clip@{SIZE}")}
    same_again = sampler({**result, **photo, **ids}, ["normal"], seed=3, temps=1.0)[0]
    assert np.array_equal(again[f"tok_normal@{SIZE}"].value, same_again[f"tok_normal@{SIZE}"].value)
    batch = make_batch([result], sampler.info, {}, None)
    (read,) = decode(batch, sampler.info, sampler.tokenizers, sampler.text_tokenizer)
    assert all(result[name].tensor.equal(read[name].tensor) for name in result)
    assert (result["caption"].value, result["metadata"].value) == (read["caption"].value, read["metadata"].value)


def test_a_result_that_holds_something_else_is_an_error(sampler):
    (result,) = sampler({"caption": "a cup"}, ["rgb"], seed=0, decoding_steps=1)
    assert same(*(sampler({name: result[SMALL]}, ["depth"], seed=0)[0] for name in ("tok_rgb", SMALL)))
    for name, value in (("rgb", result[SMALL]), (SMALL, dataclasses.replace(result[SMALL], tensor=None))):
        with pytest.raises(UserError, match=r"rgb@32: this rgb does not hold (values|ids)"):
            sampler({name: value}, ["depth"])
    with pytest.raises(UserError, match="at least one input"):
        sampler({"rgb@999": result[SMALL]}, ["depth"])


def test_a_short_name_is_the_resolution_that_is_not_given(superres):
    inputs = {"tok_depth@32": np.zeros((4, 4), np.int64), "caption": "a cup"}
    (result,) = superres(inputs, ["depth"], seed=0, temps={"depth": 0.5}, decoding_steps=2)
    assert [*result] == [DEPTH, "caption", LARGE_DEPTH]
    (result,) = superres(
        {"caption": "a cup"}, ["depth", LARGE_DEPTH], seed=0, decoding_steps={"depth": 1, LARGE_DEPTH: 2}
    )
    assert [*result] == ["caption", DEPTH, LARGE_DEPTH]


def test_what_is_minus_one_in_an_image_is_generated_and_the_rest_stays(sampler):
    tokens = torch.arange(16).view(4, 4)
    upper = tokens.clone()
    upper[2:] = -1
    for given, settings in (({"caption": "a cup"}, {}), ({}, {"autoregression_schemes": "maskgit"})):
        samples = [{**given, SMALL: upper}, {**given, SMALL: tokens.where(tokens != 5, -1)}]
        first, second = sampler(samples, ["rgb"], seed=[3, 4], temps=2.0, **settings)
        assert first[SMALL].tensor[:2].equal(tokens[:2]) and not first[SMALL].tensor[2:].equal(tokens[2:])
        assert (second[SMALL].tensor != tokens).sum() <= 1
        assert first[SMALL].dropped == second[SMALL].dropped == 0
        assert same(first, sampler(samples[0], ["rgb"], seed=3, temps=2.0, **settings)[0])
    lower = upper.roll(2, 0)
    depths = [sampler({SMALL: ids}, ["depth"], temps=0)[0] for ids in (upper, lower)]  # a part may be an input, too
    assert depths[0][SMALL].dropped == 8 and depths[0][SMALL].value.shape == (SIZE, SIZE, 3)
    assert not np.array_equal(depths[0][DEPTH].value, depths[1][DEPTH].value)


def test_the_command_writes_both_resolutions(folder):
    run(options(folder, "both"))
    result = read_result(folder / "both" / "00001-0")
    assert [*result] == ["caption", SMALL, DEPTH, f"tok_normal@{SIZE}", LARGE_DEPTH, LARGE]
    assert result[LARGE].value.shape == (2 * SIZE, 2 * SIZE, 3)
    assert (folder / "both" / "00001-0" / f"{LARGE}.png").exists() and (folder / "both" / "sheet.png").exists()
    record = json.loads((folder / "both" / "settings.json").read_text())
    assert (record["sr_decoding_steps"], record["decoding_steps"]) == ("2-4", 2)


def test_the_second_stage_is_its_model_run_on_the_results_of_the_first(folder, sampler, superres):
    run(options(folder, "chain", num_variations=1, sr_cond_domains=f"caption-{SMALL}"))
    first = sampler({"caption": "a duck"}, ["rgb", "depth", "normal"], seed=1, decoding_steps=2, temps=1.0)[0]
    settings = load_yaml(folder / "second.yaml")
    targets = settings.pop("target_domains").split("-")
    given = {name: first[name] for name in ("caption", SMALL)}
    second = superres(given, targets, seed=1 + 2_654_435_769, **settings)[0]
    written = read_result(folder / "chain" / "00001")
    assert same({**first, **second}, written)
    run(options(folder, "all_conditions", num_variations=1))
    assert not np.array_equal(read_result(folder / "all_conditions" / "00001")[LARGE].value, written[LARGE].value)


def test_interrupted_and_shared_out_it_makes_the_same(folder):
    run(options(folder, "whole"))
    whole, before = values(folder / "whole"), contents(folder / "whole")
    shutil.rmtree(folder / "whole" / "00000-1")
    shutil.rmtree(folder / "whole" / "00001-1")
    run(options(folder, "whole", batch_size=1))
    assert contents(folder / "whole") == before and equal(values(folder / "whole"), whole)
    for rank in (1, 0):
        run(options(folder, "shared"), rank=rank, world_size=2)
    assert contents(folder / "shared") == before and equal(values(folder / "shared"), whole)
    with pytest.raises(UserError, match="whole was made with sr_temps 0.5-1.0, not 0.7"):
        run(options(folder, "whole", sr_temps=0.7))


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        ({"sr_tempss": 1}, "unknown key '--sr_tempss' .did you mean '--sr_temps'"),
        ({"sr_model": "nowhere/at/all"}, "nowhere/at/all is neither a folder with a model"),
        ({"sr_target_domains": "dpeth"}, "sr_target_domains: unknown modality 'dpeth' .did you mean 'depth'"),
        ({"sr_target_domains": SMALL}, f"superres: {SMALL} is to be generated, but it is given"),
        ({"sr_target_domains": "normal"}, "sr_target_domains: unknown modality 'normal'"),
        ({"sr_cond_domains": "caption-normal"}, "sr_cond_domains: unknown modality 'normal'"),
        ({"sr_cond_domains": LARGE}, f"sr_cond_domains: unknown modality '{LARGE}'"),
        ({"sr_temps": "1-2-3"}, "superres: .*'temps' has 3 values for 2 targets .tok_depth@64, tok_rgb@64"),
        ({"sr_tokens_per_target": 65}, "65|positions"),
        ({"sr_top_p": "much"}, "keys with sr_: 'top_p' must be a number"),
        ({"sr_config": "nothing.yaml"}, "cannot read the config file nothing.yaml"),
        (
            {"sr_text_tokenizer": "{}/other.json"},
            "superres: its text vocabulary is .*other.json, not that of the model",
        ),
        (
            {"cond_domains": "det", "target_domains": "normal", "decoding_steps": 1},
            "superres reads none of det, tok_normal",
        ),
    ],
)
def test_what_cannot_work_is_said_before_the_first_stage_runs(folder, overrides, message):
    vocabulary = json.loads((folder / "words.json").read_text())
    vocabulary["model"]["vocab"]["another"] = len(vocabulary["model"]["vocab"])
    Tokenizer.from_str(json.dumps(vocabulary)).save(str(folder / "other.json"))
    overrides = {key: str(value).format(folder) for key, value in overrides.items()}
    with pytest.raises(UserError, match=message):
        run(options(folder, "wrong", **overrides))
    assert not (folder / "wrong").exists()


def test_a_second_stage_without_a_model_is_an_error(folder):
    content = load_yaml(folder / "config.yaml") | {"model_config": None, "model": str(folder / "run")}
    (folder / "no_model.yaml").write_text(yaml.safe_dump(content))
    with pytest.raises(UserError, match="no_model.yaml: second stage, keys with sr_: the key 'model' is required"):
        parse(["--config", str(folder / "no_model.yaml")])


def test_all_keys_of_the_second_stage_are_explained(capsys):
    with pytest.raises(SystemExit):
        parse(["--help"])
    text = capsys.readouterr().out
    assert "--sr_model" in text and "--sr_cfg_scales" in text and "second stage" in text and "--sr " not in text


@pytest.mark.slow
@pytest.mark.parametrize("second", [path.name for path in (ROOT / CONFIGS / "settings_sr").iterdir()])
def test_shipped_configurations_can_be_followed_by_the_published_modalities(second, tmp_path, monkeypatch):
    monkeypatch.chdir(ROOT)
    published_model("main/mix_mod7_all2all_rgb2all_a0.5", tmp_path / "base")
    published_model("superres/mix_mod7_superres_caption_rgb_bias", tmp_path / "superres")
    command = f"""--config {CONFIGS}/caption2rgb_448.yaml --sr_config {CONFIGS}/settings_sr/{second} --device cpu
        --model {tmp_path}/base --sr_model {tmp_path}/superres --tokenizers null
        --output_dir {tmp_path}/out --temps 0 --dtype float32"""
    options = parse([*command.split(), "--data", "[a red car]"])
    run(options)
    result = read_result(tmp_path / "out" / "00000")
    targets = [name for part in (options, options.sr) for name in part.target_domains.split("-")]
    assert [*result] == ["caption", *targets]
    assert result["tok_rgb@448"].value.shape == (28, 28) and result["tok_rgb@448"].dropped == 0
