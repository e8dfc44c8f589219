"""The command ``fourm`` (or ``python -m fourm``), which has every script of the repository as a subcommand.

Under torchrun: ``torchrun --nproc_per_node=8 -m fourm train --config cfgs/….yaml``.
"""

from __future__ import annotations

import importlib
import sys
from collections.abc import Callable
from typing import NamedTuple

from fourm.utils.errors import UserError, did_you_mean, run_cli
from fourm.utils.interrupts import exit_on_interrupt

Main = Callable[[], "int | None"]


class Command(NamedTuple):
    """A subcommand.

    Attributes:
        function: The entry point ``module:function``, which reads ``sys.argv`` and may return an exit status.
        help: The line in ``fourm --help``.
    """

    function: str
    help: str


COMMANDS = {
    "train": Command("fourm.cli:train", "train a 4M model, with one process or DistributedDataParallel"),
    "train-fsdp": Command("fourm.cli:train_fsdp", "train a 4M model with fully sharded data parallelism"),
    "plan": Command("fourm.cli:plan", "estimate memory, steps and days of a training run, without data or a GPU"),
    "train-vqvae": Command("fourm.cli:train_vqvae", "train a tokenizer: a VQ-VAE"),
    "train-divae": Command("fourm.cli:train_divae", "train a tokenizer that decodes by diffusion"),
    "train-vqcontrolnet": Command("fourm.cli:train_vqcontrolnet", "train Stable Diffusion to decode a tokenizer"),
    "export": Command("fourm.train.export:main", "write the model of a checkpoint for FM.from_pretrained"),
    "generate": Command("fourm.generation.script:main", "generate any modalities from any others"),
    "app": Command("fourm.app.command:main", "generate in the browser"),
    "fit-codebook": Command("fourm.vq.fit_codebook:main", "fit a codebook to the images of a data set"),
    "tokenize": Command("fourm.vq.save_tokens:main", "convert the images of a data set to tokens"),
    "check": Command("fourm.tools.check:main", "read every sample of a data set and report what is wrong"),
    "preview": Command(
        "fourm.tools.preview.command:main", "write an HTML page that shows what training sees of a data set"
    ),
    "pack": Command("fourm.tools.pack:main", "convert folders to shards, and back"),
    "demo": Command("fourm.demo.__main__:main", "render a small data set, train on it, generate, report"),
}


def main() -> None:
    """Run the subcommand named by the first argument."""
    exit_on_interrupt()  # importing the subcommand's modules takes seconds
    name = sys.argv[1] if len(sys.argv) > 1 else ""
    if name in COMMANDS:
        sys.argv = [f"fourm {name}", *sys.argv[2:]]  # as if the subcommand were a script
        run_cli(load(name))
    run_cli(print_help if name in ("-h", "--help") else lambda: _reject(name))


def load(name: str) -> Main:
    """Return the function of a subcommand; only the modules that it needs are imported."""
    module, function = COMMANDS[name].function.split(":")
    return getattr(importlib.import_module(module), function)


def print_help() -> None:
    """List the subcommands."""
    width = max(map(len, COMMANDS))
    print("usage: fourm COMMAND [OPTIONS]\n\nAny-to-any multimodal masked models (4M). The commands are:\n")
    print("\n".join(f"  {name:{width}}  {command.help}" for name, command in COMMANDS.items()))
    print("\n'fourm COMMAND --help' lists the options of a command.")


def _reject(name: str) -> None:
    problem = f"unknown command '{name}'{did_you_mean(name, COMMANDS)}" if name else "no command is given"
    raise UserError(f"command line: {problem}; 'fourm --help' lists the commands")


def train() -> int:
    """Run ``run_training_4m.py``."""
    from fourm.train.parallel import DDP
    from fourm.train.run import main
    from fourm.train.tasks.pretrain import Pretrain

    return main(Pretrain, DDP)


def train_fsdp() -> int:
    """Run ``run_training_4m_fsdp.py``."""
    from fourm.train.fsdp import FSDP
    from fourm.train.run import main
    from fourm.train.tasks.pretrain import Pretrain

    return main(Pretrain, FSDP)


def train_vqvae() -> int:
    """As ``run_training_vqvae.py``."""
    from fourm.train.parallel import DDP
    from fourm.train.run import main
    from fourm.train.tasks.tokenizer import VQVAETraining

    return main(VQVAETraining, DDP)


def train_divae() -> int:
    """As ``run_training_divae.py``."""
    from fourm.train.parallel import DDP
    from fourm.train.run import main
    from fourm.train.tasks.diffusion_tokenizer import DiVAETraining

    return main(DiVAETraining, DDP)


def train_vqcontrolnet() -> int:
    """As ``run_training_vqcontrolnet.py``."""
    from fourm.train.parallel import DDP
    from fourm.train.run import main
    from fourm.train.tasks.diffusion_tokenizer import VQControlNetTraining

    return main(VQControlNetTraining, DDP)


def plan() -> int:
    """Run ``run_training_4m.py --plan``."""
    sys.argv.append("--plan")
    return train()
