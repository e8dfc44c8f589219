from pathlib import Path

import pytest
import yaml

from fourm.data.data_config import load_data_config
from fourm.tools.pack import PackOptions
from fourm.train.config import load_config, parse_args
from fourm.train.tasks.pretrain import PretrainConfig
from fourm.utils.errors import UserError
from fourm.utils.paths import expand_path, locate


def test_home_and_variables_are_expanded_and_nothing_else(monkeypatch):
    monkeypatch.setenv("HOME", "/home/me")
    monkeypatch.setenv("DATA", "/data")
    assert expand_path("~/x") == "/home/me/x" and expand_path("$DATA/[rgb,caption]/a-{0..9}.tar").startswith(
        "/data/[rgb"
    )
    assert expand_path("${DATA}2/*.tar") == "/data2/*.tar" and expand_path("a$") == "a$"
    for same in ("s3://b/~/$DATA", "EPFL-VILAB/4M-7_B", "a/~b", ""):
        assert expand_path(same) == same
    for path, message in (
        ("$NO_SUCH/x", r"'data_path': the environment variable \$NO_SUCH"),
        ("~nobody9/x", "no such user"),
    ):
        with pytest.raises(UserError, match=message):
            expand_path(path, "'data_path'")


def test_paths_of_options_expand_in_yaml_on_the_command_line_and_in_python(monkeypatch, tmp_path):
    monkeypatch.setenv("HOME", "/home/me")
    (tmp_path / "c.yaml").write_text("epochs: 1\noutput_dir: ~/runs/auto\n")
    assert load_config(PretrainConfig, tmp_path / "c.yaml").output_dir == "/home/me/runs/c"
    assert (
        parse_args(PretrainConfig, ["--epochs", "1", "--data_config=~/d.yaml", "--output_dir", "~"]).data_config
        == "/home/me/d.yaml"
    )
    assert parse_args(PretrainConfig, ["--epochs", "1", "--output_dir", "~"]).output_dir == "/home/me"
    assert PackOptions("shards", "~/a", "$HOME/b").output == "/home/me/b"


def test_paths_in_a_configuration_are_found_in_its_folder_and_above(tmp_path, monkeypatch):
    config = tmp_path / "a" / "b" / "main.yaml"
    config.parent.mkdir(parents=True)
    (tmp_path / "a" / "data.yaml").touch()
    assert locate("data.yaml", config) == str(tmp_path / "a" / "data.yaml")
    assert locate("data.yaml", None) == "data.yaml" and locate("other.yaml", config) == "other.yaml"
    config.write_text("epochs: 1\ndata_config: data.yaml\n")
    assert Path(load_config(PretrainConfig, config).data_config) == tmp_path / "a" / "data.yaml"
    monkeypatch.chdir(tmp_path / "a")
    assert load_config(PretrainConfig, config).data_config == "data.yaml"


def test_data_are_looked_up_in_the_working_directory_and_then_beside_the_configuration(tmp_path, monkeypatch):
    config = tmp_path / "there" / "data.yaml"
    fields = {"in_domains": "caption", "out_domains": "caption", "input_alphas": 1, "target_alphas": 1}
    for folder in (tmp_path / "there", tmp_path / "here"):
        for name in ("a-0.tar", "a-1.tar"):
            (folder / "s" / "caption").mkdir(parents=True, exist_ok=True)
            (folder / "s" / "caption" / name).touch()
    for pattern in ("s/[caption]/a-{0..1}.tar", "s/[caption]/a-*.tar"):
        text = yaml.safe_dump({"train": {"datasets": {"a": {**fields, "use_wds": True, "data_path": pattern}}}})
        config.write_bytes(text.replace("\n", "\r\n").encode())  # as Windows writes it
        monkeypatch.chdir(tmp_path)
        assert load_data(config) == f"{tmp_path}/there/{pattern}"
        monkeypatch.chdir(tmp_path / "here")
        assert load_data(config) == pattern
        monkeypatch.setenv("HOME", str(tmp_path / "here"))
        for place in ("~", "$HOME", "${HOME}"):
            config.write_text(text.replace("data_path: s/", f"data_path: {place}/s/"))
            assert load_data(config) == f"{tmp_path}/here/{pattern}"


def load_data(config):
    return load_data_config(config, num_input_tokens=8, num_target_tokens=8).train["a"].data_path
