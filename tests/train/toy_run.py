"""Training runs of a few seconds: their data, configuration and processes."""

from __future__ import annotations

import contextlib
import io
import json
import multiprocessing
import os
import signal
import subprocess
import tempfile
import time
from collections.abc import Callable
from multiprocessing.context import ForkServerProcess
from pathlib import Path

import yaml

from fourm.train.fsdp import FSDP
from fourm.train.parallel import DDP, Strategy
from fourm.train.run import main
from fourm.train.task import Task
from fourm.train.tasks.pretrain import Pretrain
from fourm.utils.errors import run_cli
from tests.data.dataset_files import MODALITIES, text_tokenizer, write_folders, write_shards
from tests.warm_python import CONTEXT, warm_python

ROOT = Path(__file__).parents[2]
DOMAINS = {"in_domains": "caption-det-rgb@32-tok_rgb@32", "out_domains": "caption-det-tok_rgb@32"}


def write_run(folder: Path, **overrides) -> Path:
    """Write a data set, vocabulary and configuration below ``folder``, and return the path of the configuration."""
    folder.mkdir(parents=True, exist_ok=True)
    text_tokenizer().save(str(folder / "words.json"))
    options = {
        "modality_name_map": {"tok_rgb": "tok_rgb@32"},
        "main_augment_domain": "rgb@32",
        "input_alphas": 0.5,
        "target_alphas": 0.5,
        **DOMAINS,
    }
    data_path = write_shards(folder / "train", num_shards=4, per_shard=8)
    data = {
        "modalities": MODALITIES | {name: MODALITIES[name] | {"vocab_size": 4500} for name in ("caption", "det")},
        "train": {
            "datasets": {
                "toys": {
                    **options,
                    "data_path": data_path,
                    "use_wds": True,
                    "wds_n_repeats": 2,
                    "wds_shuffle_buffer_tar": 8,
                    "wds_shuffle_buffer_repeat": 8,
                }
            }
        },
        "val": {"datasets": {"toys": {"data_path": write_folders(folder / "val", 10), "use_wds": False}}},
    }
    (folder / "data.yaml").write_text(yaml.safe_dump(data))
    main = {
        "model_kwargs": {
            "dim": 32,
            "encoder_depth": 1,
            "decoder_depth": 1,
            "num_heads": 2,
            "drop_path_rate_encoder": 0.2,
        },
        "data_config": str(folder / "data.yaml"),
        "text_tokenizer_path": str(folder / "words.json"),
        "output_dir": str(folder / "out"),
        "input_size": 32,
        "dtype": "float32",
        "device": "cpu",
        "num_input_tokens": 16,
        "num_target_tokens": 12,
        "batch_size": 4,
        "epoch_size": 48,
        "epochs": 2,
        "blr": 0.1,
        "warmup_epochs": 1,
        "clip_grad": 1.0,
        "num_workers": 0,  # each evaluation forks them anew, which costs as much as a toy run itself
        "log_interval": 1,
        "fixed_eval_input_tokens": 8,
        "fixed_eval_target_tokens": 8,
        "fixed_eval_batch_size": 4,
    }
    (folder / "main.yaml").write_text(yaml.safe_dump(main | overrides))
    return folder / "main.yaml"


def command(config: Path, *args: object, processes: int = 1, script: str = "run_training_4m.py") -> list[str]:
    script = [script, "--config", str(config), *map(str, args)]
    if processes == 1:
        return [warm_python(), *script]
    launcher = [warm_python(), "-m", "torch.distributed.run", "--standalone", f"--nproc_per_node={processes}"]
    return [*launcher, *script]


def start(
    config: Path, *args: object, processes: int = 1, script: str = "run_training_4m.py", **environment: str
) -> subprocess.Popen:
    return subprocess.Popen(
        command(config, *args, processes=processes, script=script),
        cwd=ROOT,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        env=os.environ | environment,
        start_new_session=True,
    )


def run(
    config: Path,
    *args: object,
    processes: int = 1,
    status: int = 0,
    script: str = "run_training_4m.py",
    **environment: str,
) -> str:
    """Run to the end, and return what it printed."""
    process = start(config, *args, processes=processes, script=script, **environment)
    try:
        output, errors = process.communicate(timeout=240)
    except subprocess.TimeoutExpired:
        os.killpg(process.pid, signal.SIGKILL)  # with its children, which would slow other tests down
        raise
    assert process.returncode == status, output + errors
    return output + errors


def run_in_process(config: Path, *args: object, task: type[Task] = Pretrain) -> str:
    """Run within this process, which saves some seconds, and return what it logged."""
    output = io.StringIO()
    with contextlib.redirect_stdout(output):
        assert main(task, DDP, ["--config", str(config), *map(str, args)]) == 0
    return output.getvalue()


def start_ranks(
    config: Path,
    *args: object,
    strategy: type[Strategy] = FSDP,
    processes: int = 2,
    task: type[Task] = Pretrain,
    **environment: str,
) -> list[ForkServerProcess]:
    """Start processes that train together, forked from one that has imported everything, which saves time.

    A single process is one without process groups.
    """
    argv = ["--config", str(config), *map(str, args)]
    if processes > 1:
        argv += ["--dist_url", f"file://{tempfile.mktemp(dir=config.parent)}"]
    ranks = [
        CONTEXT.Process(target=_be_rank, args=(argv, task, strategy, rank, processes, environment))
        for rank in range(processes)
    ]
    for rank in ranks:
        rank.start()
    return ranks


def _be_rank(
    argv: list[str], task: type[Task], strategy: type[Strategy], rank: int, processes: int, environment: dict[str, str]
) -> None:
    multiprocessing.set_start_method("fork", force=True)  # loaders would otherwise use a fork server too
    os.environ.update(environment)
    if processes > 1:
        os.environ.update(RANK=str(rank), WORLD_SIZE=str(processes), LOCAL_RANK=str(rank))
    os.setpgid(0, 0)  # so that it can be killed with its loaders
    run_cli(lambda: main(task, strategy, argv))


def kill(ranks: list[ForkServerProcess]) -> None:
    """Kill the processes and their loaders with SIGKILL."""
    for rank in ranks:
        with contextlib.suppress(ProcessLookupError):
            os.killpg(rank.pid, signal.SIGKILL)
    for rank in ranks:
        rank.join()


def wait_for_step(config: Path, step: int, ranks: list[ForkServerProcess]) -> None:
    """Wait for a checkpoint of ``step`` or a later one."""
    _wait_until(lambda: newest_step(config.parent / "out") >= step, ranks)


def wait_for_a_save(config: Path, ranks: list[ForkServerProcess]) -> None:
    """Return while a checkpoint is being written."""
    _wait_until(lambda: any((config.parent / "out" / "checkpoints").glob(".tmp-*")), ranks)


def _wait_until(condition: Callable[[], bool], ranks: list[ForkServerProcess]) -> None:
    deadline = time.monotonic() + 120
    while not condition():
        if not all(rank.is_alive() for rank in ranks) or time.monotonic() > deadline:
            kill(ranks)  # they would otherwise slow other tests down
            raise AssertionError("the processes ended, or took too long")
        time.sleep(0.002)


def newest_step(folder: Path) -> int:
    return max([0, *(int(path.name[5:]) for path in folder.glob("checkpoints/step-*"))])


def run_ranks(
    config: Path,
    *args: object,
    strategy: type[Strategy] = FSDP,
    processes: int = 2,
    status: int = 0,
    task: type[Task] = Pretrain,
    **environment: str,
) -> None:
    """Train to the end; the log of the main process is in ``log.txt``."""
    ranks = start_ranks(config, *args, strategy=strategy, processes=processes, task=task, **environment)
    assert wait_for(ranks) == [status] * processes


def wait_for(ranks: list[ForkServerProcess], seconds: float = 240) -> list[int | None]:
    """Return the exit statuses of the processes, with None for those that do not end in time and are killed."""
    deadline = time.monotonic() + seconds
    for rank in ranks:
        rank.join(max(0.0, deadline - time.monotonic()))
    statuses = [rank.exitcode for rank in ranks]
    kill([rank for rank in ranks if rank.is_alive()])
    return statuses


def log_lines(folder: Path) -> list[dict]:
    return [json.loads(line) for line in (folder / "log.jsonl").read_text().splitlines()]


def losses(folder: Path) -> dict[int, float]:
    """Return the training losses by step."""
    return {line["step"]: line["loss"] for line in log_lines(folder) if "loss" in line}
