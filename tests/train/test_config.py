import dataclasses
import inspect
import subprocess
from pathlib import Path

import pytest
import yaml

from fourm.train.config import load_config, parse_args
from fourm.train.options import saved_options
from fourm.train.schedules import run_length
from fourm.train.tasks.pretrain import PretrainConfig
from fourm.utils.errors import UserError
from tests.warm_python import warm_python

ROOT = Path(__file__).parents[2]


@pytest.fixture
def main_yaml(tmp_path):
    path = tmp_path / "main.yaml"
    path.write_text("total_tokens: 500\nwarmup_tokens: 10\nepochs: -1\nblr: 1e-4\ntokenizer_path: vocabulary.json\n")
    return str(path)


def test_command_line_beats_yaml_beats_defaults(main_yaml):
    config = parse_args(
        PretrainConfig, ["--config", main_yaml, "--blr", "2e-5", "--no_auto_resume", "--opt_betas", "0.9", "0.99"]
    )
    assert (config.blr, config.total_tokens, config.batch_size) == (2e-5, 500.0, 128)
    assert config.auto_resume is False and config.opt_betas == (0.9, 0.99)
    assert config.text_tokenizer_path == "vocabulary.json"


def test_every_switch_has_both_forms():
    for name in [f.name for f in dataclasses.fields(PretrainConfig) if f.type == "bool" and f.name != "print_config"]:
        assert getattr(parse_args(PretrainConfig, ["--epochs", "1", f"--{name}"]), name) is True
        assert getattr(parse_args(PretrainConfig, ["--epochs", "1", f"--no_{name}"]), name) is False


def test_auto_names_come_from_the_config_path(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    path = Path("cfgs/default/4m/models/main/4m-b_mod7_500b.yaml")
    path.parent.mkdir(parents=True)
    path.write_text("epochs: 1\n")
    config = load_config(PretrainConfig, path)
    assert config.run_name == config.wandb_run_name == "default/4m/models/main/4m-b_mod7_500b"
    assert config.output_dir == "output/default/4m/models/main/4m-b_mod7_500b"
    Path("mine.yaml").write_text("epochs: 1\noutput_dir: /data/autonomy/auto\n")
    for path in ("mine.yaml", Path("mine.yaml").resolve()):
        assert load_config(PretrainConfig, path).output_dir == "/data/autonomy/mine"


def test_the_resolved_config_builds_itself_again(main_yaml, tmp_path):
    config = parse_args(PretrainConfig, ["--config", main_yaml, "--model_kwargs", "{dim: 64}"])
    (tmp_path / "again.yaml").write_text(yaml.safe_dump(saved_options(config)))
    assert load_config(PretrainConfig, tmp_path / "again.yaml") == config


def test_no_key_is_declared_twice():
    declared = [name for group in PretrainConfig.__mro__ for name in inspect.get_annotations(group)]
    assert len(declared) == len(set(declared)) == len(dataclasses.fields(PretrainConfig))


def test_the_help_shows_the_groups(capsys):
    with pytest.raises(SystemExit):
        parse_args(PretrainConfig, ["--help"])
    text = capsys.readouterr().out
    for title in ("Data and token budgets", "4M model and loss", "Optimizer", "Checkpoints", "FSDP", "Log", "Run"):
        assert f"\n{title}:\n" in text, title


def test_commands_are_no_part_of_the_configuration_that_is_saved(main_yaml):
    config = parse_args(PretrainConfig, ["--config", main_yaml, "--dry_run", "--profile", "--plan_mfu", "0.5"])
    assert config.dry_run and not saved_options(config).keys() & {
        "dry_run",
        "profile",
        "plan_mfu",
        "eval",
        "print_config",
    }


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--batch_sze", "3"], r"unknown key '--batch_sze' \(did you mean '--batch_size'\?\)"),
        (["--batch_size", "many"], "command line: 'batch_size' must be a whole number, not 'many'"),
        (["--batch_size"], "expected one argument"),
        (["--batch_size", "0"], "'batch_size' must be at least 1"),
        (["--epochs", "1", "--keep_last", "-1"], "'keep_last' must be at least 0, not -1"),
        (["--epochs", "1", "--clip_grad", "0"], "'clip_grad' must be above 0"),
        (["--epochs", "1", "--total_tokens", "1"], "either 'epochs' or 'total_tokens', not both"),
        ([], "neither is set"),
        (
            ["--epochs", "1", "--warmup_epochs", "1", "--warmup_tokens", "1"],
            "only one of warmup_epochs and warmup_tokens",
        ),
        (["--epochs", "1", "--min_input_tokens", "300"], "'min_input_tokens' must lie between 0 and"),
        (["--epochs", "1", "--scheduler", "step"], "'scheduler' must be cosine, wsd, or inverse_sqrt-T"),
        (["--epochs", "1", "--dtype", "float8"], "'dtype' must be one of"),
        (
            ["--epochs", "1", "--dtype", "fp16", "--residual_dtype", "bfloat16"],
            "'residual_dtype' bfloat16 needs 'dtype' bfloat16, not fp16",
        ),
        (["--epochs", "1", "--s3_save_dir", "/bucket"], "'s3_save_dir' must be s3://BUCKET"),
        (["--epochs", "1", "--s3_endpoint", "x:9", "--resume", "s3://b/c"], "'s3_endpoint' must be a URL"),
        (["--epochs", "1", "--data_cache_gb", "0"], "'data_cache_gb' must be above 0"),
    ],
)
def test_a_bad_command_line_says_what_to_mend(arguments, message):
    with pytest.raises(UserError, match=message):
        parse_args(PretrainConfig, arguments)


def test_yaml_errors_name_the_file(main_yaml):
    Path(main_yaml).write_text("total_tokns: 500\n")
    with pytest.raises(UserError, match=r"main.yaml: unknown key 'total_tokns' \(did you mean 'total_tokens'"):
        parse_args(PretrainConfig, ["--config", main_yaml])
    Path(main_yaml).write_text("tokenizer_path: a\ntext_tokenizer_path: b\n")
    with pytest.raises(UserError, match="mean the same"):
        parse_args(PretrainConfig, ["--config", main_yaml])


@pytest.mark.slow
def test_the_script_answers_a_typing_error_in_one_line():
    command = [warm_python(), "run_training_4m.py", "--batch_sze", "3"]
    result = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    assert result.returncode == 2 and result.stderr.count("\n") == 1 and "batch_size" in result.stderr


def test_published_token_arithmetic():
    # 4M-B, 7 modalities: 500 billion tokens at 256 a sample are 196 epochs of 10 million samples; 64 GPUs x 128.
    config = PretrainConfig(total_tokens=500, warmup_tokens=10, batch_size=128, epoch_size=10_000_000)
    length = run_length(config, world_size=64)
    assert length.epochs == 196 and length.batches_per_epoch == 1220 and length.total_batches == 196 * 1220
    assert length.warmup_batches == 4769 and length.frozen_batches == length.cooldown_batches == 0


def test_epochs_end_with_a_whole_optimizer_step():
    length = run_length(PretrainConfig(epochs=2, batch_size=4, accum_iter=3, epoch_size=100), world_size=2)
    assert length.batches_per_epoch == 12 and length.total_batches == 24


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"epochs": 1, "batch_size": 64, "epoch_size": 100}, "'epoch_size' 100 is smaller than one optimizer step"),
        ({"epochs": 1, "batch_size": 4, "epoch_size": 100, "warmup_epochs": 2}, "phases need 24 batches"),
    ],
)
def test_a_run_too_short_is_an_error(options, message):
    with pytest.raises(UserError, match=message):
        run_length(PretrainConfig(**options), world_size=2)
