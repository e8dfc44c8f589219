"""A model brings its settings in generation.yaml, which the sampler, the command and the app share."""

import shutil

import numpy as np
import pytest
import yaml

from fourm.app.forms import default_rows, read_settings, target_modalities
from fourm.generation import Sampler
from fourm.generation.options import parse
from fourm.generation.results import read_result
from fourm.generation.script import run
from fourm.utils.errors import UserError
from tests.generation.test_sampler import RGB, write_run
from tests.generation.toy_tokenizers import CLASSES, SIZE

TOK_RGB, DEPTH, SEMSEG = (f"tok_{name}@{SIZE}" for name in ("rgb", "depth", "semseg"))
CONTENT = {
    "tokenizers": {"rgb": "../tokenizers/rgb", "depth": "../tokenizers/depth", "semseg": "../tokenizers/semseg"},
    "text_tokenizer": "../words.json",
    "class_names": [*CLASSES],
    "cond_domains": "caption",
    "target_domains": "semseg-rgb-depth-caption",
    "decoding_steps": {"semseg": 2, "rgb": 3, "depth": 1},
    "temps": {"rgb": 0},
    "top_p": 0.9,
}


def write_model(folder, **changes):
    """Write a model with a generation.yaml, and no other file that names its vocabulary."""
    write_run(folder)
    (folder / "run" / "config.yaml").unlink()
    (folder / "run" / "generation.yaml").write_text(yaml.safe_dump(CONTENT | changes))
    return folder


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return write_model(tmp_path_factory.mktemp("defaults"))


@pytest.fixture(scope="module")
def sampler(folder):
    return Sampler.load(folder / "run", device="cpu")


def test_a_caption_alone_gives_what_the_model_is_meant_for(sampler, monkeypatch, folder):
    steps = [*sampler.generate_iter("a red cup", seed=0)]
    assert [step.target for step in steps] == [SEMSEG] * 2 + [TOK_RGB] * 3 + [DEPTH]
    (result,) = steps[-1].results()
    assert [*result] == ["caption", SEMSEG, TOK_RGB, DEPTH] and result["caption"].value == "a red cup"
    assert result[SEMSEG].names == CLASSES and result[DEPTH].kind == "depth"
    figure = sampler.plot(sampler(["a red cup", "a duck"], ["rgb", "depth"], seed=0), labels=["one", "two"])
    assert len(figure.axes) == 6 and figure.axes[3].get_ylabel() == "two"


def test_what_a_call_says_goes_before_the_defaults(sampler, folder):
    def schedule(**settings):
        return sampler.schedule({"caption": 0}, ["rgb", "depth"], **settings)

    assert {step["temperature"] for step in schedule() if step["target_domain"] == TOK_RGB} == {0}
    changed = schedule(decoding_steps={"rgb": 2}, temps={"rgb": 1.0})
    assert [(step["target_domain"], step["temperature"]) for step in changed][:2] == [(TOK_RGB, 1.0)] * 2
    assert [step["target_domain"] for step in changed] == [TOK_RGB] * 2 + [DEPTH]
    (from_picture,) = sampler({"rgb": folder / "photo.png"}, seed=0)
    assert [*from_picture] == [RGB, SEMSEG, DEPTH, "caption"], "RGB is given"
    own = Sampler.load(folder / "run", folder / "tokenizers", class_names=["other"], device="cpu")
    assert len(own.tokenizers) > 3 and own.class_names == ("other",)


def test_a_model_without_settings_generates_all_that_is_not_given(sampler):
    plain = Sampler(sampler.generation.model, sampler.tokenizers, sampler.text_tokenizer)
    names = plain.remaining_targets(["caption"])
    assert names[0] == TOK_RGB and {*names} == plain.targets.keys() - {"caption"}


def test_the_form_of_the_app_has_the_same_defaults(sampler):
    names = target_modalities(sampler)
    assert names[:4] == [SEMSEG, TOK_RGB, DEPTH, "caption"] and {*names} == {*sampler.targets}
    rows = default_rows(sampler)
    assert rows[1][1:] == [0, 3.0, 3] and rows[0][3] == 2
    assert read_settings(rows, sampler) == {}


def options(folder, out, *arguments):
    return parse(["--model", str(folder / "run"), "--device", "cpu", "--output_dir", str(folder / out), *arguments])


def test_the_command_takes_a_prompt_and_needs_nothing_else(folder, tmp_path, monkeypatch):
    run(options(folder, "out", "--prompt", "a red cup"))
    result = read_result(folder / "out" / "00000")
    assert [*result] == ["caption", SEMSEG, TOK_RGB, DEPTH] and (folder / "out" / "sheet.png").exists()
    same = Sampler.load(folder / "run", device="cpu")("a red cup", seed=0)[0]
    assert all(np.array_equal(result[name].value, same[name].value) for name in result)
    monkeypatch.chdir(tmp_path)
    default = parse(["--model", str(folder / "run"), "--prompt", "A cup, a duck!", "--seed", "3"])
    assert default.output_dir == "generated/A_cup_a_duck-3" and default.data == ["A cup, a duck!"]
    prompt_for_config = tmp_path / "config.yaml"
    prompt_for_config.write_text(yaml.safe_dump({"model": str(folder / "run"), "data": "pictures", "output_dir": "o"}))
    assert parse(["--config", str(prompt_for_config), "--prompt", "a cup"]).data == ["a cup"]


def test_other_defaults_make_other_results(folder, tmp_path):
    shutil.copytree(folder, tmp_path / "copy")
    only_depth = ("--prompt", "a cup", "--target_domains", "depth")
    run(options(tmp_path / "copy", "other", *only_depth))
    file = tmp_path / "copy" / "other" / "00000" / "result.json"
    first = file.stat().st_mtime_ns
    run(options(tmp_path / "copy", "other", *only_depth))
    assert file.stat().st_mtime_ns == first
    changed = CONTENT | {"temps": {"depth": 5.0}}
    (tmp_path / "copy" / "run" / "generation.yaml").write_text(yaml.safe_dump(changed))
    run(options(tmp_path / "copy", "other", *only_depth))
    assert file.stat().st_mtime_ns != first


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--demo", "--model", "m", "--prompt", "a"], "'demo' and 'model' exclude each other"),
        (["--demo", "--prompt", "a", "--data", "b.txt"], "'prompt' and 'data' exclude each other"),
        (["--demo", "--prompt", " "], "command line: prompt 1 is empty"),
        (["--demo"], "the key 'data' is required"),
        (["--model", "{}", "--prompt", "a cup", "--cond_domains", "rgb"], "prompts need one text in cond_domains"),
        (["--model", "{}", "--prompt", "a cup", "--target_domains", "dept"], "target_domains: unknown modality 'dept'"),
    ],
)
def test_what_cannot_work_is_one_clear_sentence(folder, tmp_path, monkeypatch, arguments, message):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(UserError, match=message) as error:
        run(parse([argument.format(folder / "run") for argument in arguments]))
    assert "\n" not in str(error.value)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"temp": 1}, "generation.yaml: unknown key 'temp'"),
        ({"target_domains": "semseg-deph"}, "generation.yaml: target_domains: unknown modality 'deph'"),
        ({"temps": {"deph": 1}}, "'deph' is not a target of this model"),
        ({"decoding_steps": "many"}, "generation.yaml: 'decoding_steps'"),
        ({"top_p": 2}, "generation.yaml: 'top_p'"),
        ({"tokenizers": {"rgb": "nowhere/at all"}}, "nowhere/at all"),
        ({"target_domains": None}, "the key 'target_domains' is required"),
    ],
)
def test_a_wrong_file_is_named(folder, tmp_path, changes, message):
    shutil.copytree(folder, tmp_path / "copy")
    (tmp_path / "copy" / "run" / "generation.yaml").write_text(yaml.safe_dump(CONTENT | changes))
    with pytest.raises(UserError, match=message):
        run(options(tmp_path / "copy", "wrong", "--prompt", "a cup"))


@pytest.mark.parametrize(("caption", "message"), [("  ", "prompt 1 is empty"), ("\0", "NUL character")])
def test_a_caption_must_say_something(sampler, caption, message):
    with pytest.raises(UserError, match=message):
        sampler(caption)
