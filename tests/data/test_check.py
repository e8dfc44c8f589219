"""The check of a data set finds everything that a run would skip or stop for."""

import subprocess
import sys
from pathlib import Path

import pytest
import yaml

from fourm.data.check import main
from tests.data.dataset_files import MODALITIES, npy, write_folders, write_shards

BAD = {
    ("rgb", 1): b"\xff\xd8 no picture",
    ("caption", 2): None,
    ("det", 3): b"{",
    ("tok_rgb", 4): npy([[0, 1, 2, 3], [0, 1, 2, 3], [0, 1, 2, 256]]),
}


@pytest.fixture
def data(tmp_path):
    """Ten samples in shards, four of them bad, and five good ones in folders."""
    shards = write_shards(tmp_path / "s", 2, 5, lambda folder, i, _, content: BAD.get((folder, i), content))
    train = {
        "in_domains": "rgb@32-tok_rgb@32-caption-det", "out_domains": "tok_rgb@32-caption-det", "input_alphas": 1.0,
        "target_alphas": 1.0, "data_path": shards, "use_wds": True,
    }  # fmt: skip
    val = {"data_path": write_folders(tmp_path / "f", 5), "use_wds": False}
    content = {"modalities": MODALITIES, "train": {"datasets": {"toy": train}}, "val": {"datasets": {"toy": val}}}
    (tmp_path / "data.yaml").write_text(yaml.safe_dump(content, sort_keys=False))
    return tmp_path


def test_every_problem_is_counted_and_named(data, capsys, caplog):
    assert main(["--data_config", f"{data}/data.yaml"]) == 1
    train, val = capsys.readouterr().out.splitlines()
    assert train.startswith("train toy: 9 samples read; ") and val == "val toy: 5 samples read; all good"
    for problem in ("1 missing member", "2 corrupt member", "1 broken contract"):
        assert problem in train
    warnings = [record.getMessage() for record in caplog.records]
    assert len(warnings) == 4
    for folder, index in BAD:
        assert any(f"{data}/s/{folder}/shard-00000.tar: " in line and f"'{index:05d}'" in line for line in warnings)
    assert any("token id 256 lies outside" in line for line in warnings)


def test_part_of_a_data_set(data, capsys):
    main(["--data_config", f"{data}/data.yaml", "--max_samples", "1"])
    assert "val toy: 1 samples read; all good" in capsys.readouterr().out


def test_what_cannot_be_read_at_all_is_one_line(data):
    (data / "s" / "rgb").rename(data / "s" / "gone")
    command = [sys.executable, "check_data.py", "--data_config", f"{data}/data.yaml"]
    run = subprocess.run(command, capture_output=True, text=True, cwd=Path(__file__).parents[2])
    assert run.returncode == 2
    assert run.stderr.startswith("error: data_path ") and run.stderr.endswith("s/rgb/shard-00000.tar\n")
