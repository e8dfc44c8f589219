"""What surrounds the package: published configurations without the repository, and the Slurm script."""

import os
import re
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from fourm.generation.options import parse
from fourm.train.config import load_config
from fourm.train.tasks.pretrain import PretrainConfig

ROOT = Path(__file__).parents[1]
CONFIG = "cfgs/default/4m/models/main/4m-b_mod7_500b.yaml"


def test_published_configurations_are_known_in_any_folder(tmp_path, monkeypatch):
    in_repository = load_config(PretrainConfig, ROOT / CONFIG)
    monkeypatch.chdir(tmp_path)
    config = load_config(PretrainConfig, CONFIG)
    assert Path(config.data_config).read_bytes() == (ROOT / in_repository.data_config).read_bytes()
    assert config.run_name == "default/4m/models/main/4m-b_mod7_500b"
    data = "cfgs/default/4m/data/cc12m/main/mix_mod7_all2all_rgb2all_a0.5.yaml"
    assert Path(
        load_config(PretrainConfig, None, {"data_config": data, "epochs": 1, "epoch_size": 8}).data_config
    ).is_file()
    generation = parse(["--config", "cfgs/default/generation/caption2rgb_448.yaml", "--output_dir", "out"])
    assert generation.sr is not None
    mine = tmp_path / CONFIG
    mine.parent.mkdir(parents=True)
    mine.write_text("batch_size: 3\nepochs: 1\nepoch_size: 8\ndata_config: mine.yaml")
    assert load_config(PretrainConfig, CONFIG).batch_size == 3  # the working directory goes first


PROGRAMS = {
    "srun": 'while [[ $1 == --* ]]; do shift; done\nSLURM_PROCID=0 SLURM_LOCALID=0 SLURM_NTASKS=1 exec "$@"',
    "scontrol": 'if [ "$1" = requeue ]; then echo "$2" > "$REPORT/requeued"; else echo node7; echo node8; fi',
}
RUN = """#!{python}
import os, pathlib, signal, sys, time
report = pathlib.Path(os.environ["REPORT"])
names = "RANK", "WORLD_SIZE", "LOCAL_RANK", "MASTER_ADDR"
text = " ".join([*(os.environ[name] for name in names), *sys.argv[1:]])
(report / "new").write_text(text)
if "--short" not in sys.argv:
    signal.signal(signal.SIGTERM, lambda *_: (time.sleep(0.3), os._exit(143)))  # saves first
(report / "new").rename(report / "started")
while "--short" not in sys.argv:
    time.sleep(0.05)
"""


@pytest.mark.parametrize("ending", ["the run is finished", "time is up", "the job is cancelled"])
def test_the_slurm_script_goes_on_in_another_job_when_its_time_is_up(tmp_path, ending):
    """With stand-ins for Slurm's programs and for the training."""
    script = (ROOT / "docs" / "train.sbatch").read_text()
    marked = re.findall(r"^# CHANGE \d.*\n(.*)$", script, re.M)
    assert len(marked) == 3
    options = "--config my.yaml" + (" --short" if ending == "the run is finished" else "")
    for line, changed in zip(marked[1:], (f"REPOSITORY={tmp_path}", f"OPTIONS=({options})"), strict=True):
        script = script.replace(line, changed)
    (tmp_path / "train.sbatch").write_text(script)
    for name, text in PROGRAMS.items():
        (tmp_path / name).write_text(f"#!/bin/bash\n{text}\n")
    (tmp_path / ".venv" / "bin").mkdir(parents=True)
    (tmp_path / ".venv" / "bin" / "python").write_text(RUN.format(python=sys.executable))
    for program in (*PROGRAMS, ".venv/bin/python"):
        (tmp_path / program).chmod(0o755)
    environment = os.environ | {
        "PATH": f"{tmp_path}:{os.environ['PATH']}",
        "REPORT": str(tmp_path),
        "SLURM_JOB_ID": "123",
        "SLURM_JOB_NODELIST": "node[7-8]",
    }
    process = subprocess.Popen(["bash", tmp_path / "train.sbatch"], env=environment, start_new_session=True)
    try:
        deadline = time.monotonic() + 60
        while not (tmp_path / "started").exists() and time.monotonic() < deadline:
            time.sleep(0.05)
        assert (tmp_path / "started").read_text() == f"0 1 0 node7 run_training_4m_fsdp.py {options}"
        if ending == "time is up":
            process.send_signal(signal.SIGUSR1)
        elif ending == "the job is cancelled":
            os.killpg(process.pid, signal.SIGTERM)
        status = process.wait(60)
    finally:
        if process.poll() is None:
            os.killpg(process.pid, signal.SIGKILL)
    requeued = tmp_path / "requeued"
    if ending == "time is up":
        assert status == 143 and requeued.read_text() == "123\n"
    else:
        assert status == (0 if ending == "the run is finished" else -signal.SIGTERM) and not requeued.exists()
