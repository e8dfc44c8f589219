"""Export the model of a checkpoint: fourm export CHECKPOINT_OR_RUN FOLDER [--ema]"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from fourm.train.checkpoint import read_task_name
from fourm.train.facts import export_with_facts
from fourm.train.task import task_named
from fourm.train.tasks import diffusion_tokenizer, tokenizer  # noqa: F401 (their tasks are found by name)
from fourm.train.tasks.pretrain import Pretrain
from fourm.utils.checkpoints import newest_checkpoint
from fourm.utils.errors import run_cli
from fourm.utils.model_store import download_if_remote, find_checkpoint
from fourm.utils.options import option, parse_options
from fourm.utils.paths import AnyPath
from fourm.utils.plugin import PluginOptions, load_plugin


@dataclass(frozen=True, kw_only=True)
class ExportOptions(PluginOptions):
    """Which checkpoint, and where to"""

    checkpoint: AnyPath = option("folder or s3:// URL of a checkpoint, or of a run for its newest checkpoint")
    folder: AnyPath = option("folder to write to")
    ema: bool = option("export the moving average of the weights, of a run with model_ema", False)


def main(argv: list[str] | None = None) -> None:
    """Write ``model.safetensors`` and ``config.json`` for ``from_pretrained``, with one process and a GiB of memory."""
    options = parse_options(ExportOptions, argv, main.__doc__ or "", positional=("checkpoint", "folder"))
    load_plugin(options.plugin)
    checkpoint = newest_checkpoint(Path(download_if_remote(options.checkpoint, find_checkpoint)))
    task = task_named(read_task_name(checkpoint) or Pretrain.name)  # earlier versions had only this task
    export_with_facts(checkpoint, Path(options.folder), task.format, options.ema)
    print(f"{checkpoint} -> from_pretrained('{options.folder}')")


if __name__ == "__main__":
    run_cli(main)
