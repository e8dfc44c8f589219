"""The command ``fourm``: every subcommand exists, passes its arguments on, and imports only what it needs."""

import re
import subprocess
import sys
from pathlib import Path

import pytest
import yaml

from fourm import cli
from tests.warm_python import warm_python

REPOSITORY = Path(__file__).parents[1]


def fourm(*arguments, **options):
    command = [warm_python(), "-m", "fourm", *map(str, arguments)]
    return subprocess.run(command, cwd=REPOSITORY, capture_output=True, text=True, timeout=120, **options)


def call(monkeypatch, *arguments):
    """Run a subcommand in this process and return its exit status."""
    monkeypatch.setenv("OMP_WAIT_POLICY", "PASSIVE")  # the demo sets it, which must not affect other tests
    monkeypatch.setattr(sys, "argv", ["fourm", *map(str, arguments)])
    with pytest.raises(SystemExit) as end:
        cli.main()
    return end.value.code


def test_help_lists_every_subcommand_and_does_not_import_torch():
    code = "import sys; from fourm.cli import main\ntry: main()\nfinally: print(*sys.modules, file=sys.stderr)"
    result = subprocess.run([sys.executable, "-c", code, "--help"], cwd=REPOSITORY, capture_output=True, text=True)
    assert result.returncode == 0
    listed = re.findall(r"^  (\S+) +\S.*\w$", result.stdout, re.M)
    assert listed == list(cli.COMMANDS) and max(map(len, result.stdout.splitlines())) <= 100
    assert not {"torch", "numpy", "yaml"} & set(result.stderr.split())


@pytest.mark.parametrize("name", cli.COMMANDS)
def test_every_subcommand_shows_its_options(name, monkeypatch, capsys):
    assert call(monkeypatch, name, "--help") == 0
    assert capsys.readouterr().out.startswith(f"usage: fourm {name} ")


@pytest.mark.parametrize("name", cli.COMMANDS)
def test_every_subcommand_gets_its_arguments(name, monkeypatch, capsys):
    assert call(monkeypatch, name, "--no_such_option") == 2
    assert "unknown key '--no_such_option'" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["fit_codebok"], "unknown command 'fit_codebok' (did you mean 'fit-codebook'?); "),
        (["--config", "x.yaml"], "unknown command '--config'; "),
        ([], "no command is given; "),
    ],
)
def test_a_mistake_prints_one_line_that_names_the_nearest_option(arguments, message):
    result = fourm(*arguments)
    assert (result.returncode, result.stdout) == (2, "")
    assert result.stderr == f"error: command line: {message}'fourm --help' lists the commands\n"


def test_train_and_plan_are_the_training_scripts():
    config = REPOSITORY / "cfgs/default/4m/models/main/4m-b_mod7_500b.yaml"
    printed = [fourm(name, "--config", config, "--print_config").stdout for name in ("train", "train-fsdp")]
    script = [warm_python(), "run_training_4m.py", "--config", str(config)]
    run = subprocess.run([*script, "--print_config"], cwd=REPOSITORY, capture_output=True, text=True)
    assert printed[0] == printed[1] == run.stdout
    assert yaml.safe_load(printed[0]).get("model") == "fm_base_12e_12d_swiglu_nobias"
    plans = [
        fourm("plan", "--config", config),
        subprocess.run([*script, "--plan"], cwd=REPOSITORY, capture_output=True, text=True),
    ]
    assert plans[0].returncode == 0 and plans[0].stdout == plans[1].stdout != ""


def test_the_process_exits_with_the_status_of_the_subcommand(tmp_path):
    (tmp_path / "rgb").mkdir()
    (tmp_path / "rgb" / "a.jpg").write_bytes(b"x")
    packed = fourm("pack", "shards", tmp_path, tmp_path / "out")
    assert packed.returncode == 0 and (tmp_path / "out" / "rgb" / "shard-00000.tar").exists()
    missing = fourm("pack", "shards", tmp_path / "none", tmp_path / "out")
    assert missing.returncode == 2 and missing.stderr.startswith("error: ") and missing.stderr.count("\n") == 1
