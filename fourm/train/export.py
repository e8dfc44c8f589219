"""The model of a checkpoint, for use: fourm export CHECKPOINT_OR_RUN FOLDER [--ema]"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from fourm.train.checkpoint import trained_task
from fourm.train.task import task_named
from fourm.train.tasks import diffusion_tokenizer, tokenizer  # noqa: F401 (their tasks are found by name)
from fourm.train.tasks.pretrain import Pretrain
from fourm.utils.checkpoints import export_model, newest_checkpoint
from fourm.utils.errors import run_cli
from fourm.utils.model_store import find_checkpoint, on_disk
from fourm.utils.options import option, parse_options
from fourm.utils.paths import AnyPath
from fourm.utils.plugin import PluginOptions, load_plugin


@dataclass(frozen=True, kw_only=True)
class ExportOptions(PluginOptions):
    """Which checkpoint, and where to"""

    checkpoint: AnyPath = option("folder or s3:// URL of a checkpoint, or of a run: its newest one")
    folder: AnyPath = option("where to write")
    ema: bool = option("the moving average of the weights, of a run with model_ema", False)


def main(argv: list[str] | None = None) -> None:
    """Write ``model.safetensors`` and ``config.json``, which ``from_pretrained`` reads; one process, a GiB of memory."""
    options = parse_options(ExportOptions, argv, main.__doc__ or "", positional=("checkpoint", "folder"))
    load_plugin(options.plugin)
    checkpoint = newest_checkpoint(Path(on_disk(options.checkpoint, find_checkpoint)))
    task = task_named(trained_task(checkpoint) or Pretrain.name)  # earlier versions trained one task without a name
    export_model(checkpoint, Path(options.folder), task.format, options.ema)
    print(f"{checkpoint} -> from_pretrained('{options.folder}')")


if __name__ == "__main__":
    run_cli(main)
