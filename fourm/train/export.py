"""The model of a checkpoint, for use: python -m fourm.train.export CHECKPOINT_OR_RUN FOLDER [--ema]"""

from __future__ import annotations

import argparse
from pathlib import Path

from fourm.models.remote import find_checkpoint, on_disk
from fourm.models.sharded import export_model, newest_checkpoint
from fourm.utils.errors import run_cli
from fourm.utils.plugin import load_plugin


def main(argv: list[str] | None = None) -> None:
    """Write ``model.safetensors`` and ``config.json``, which ``FM.from_pretrained`` reads; one process, a GiB of memory."""
    parser = argparse.ArgumentParser(prog="python -m fourm.train.export", description=main.__doc__)
    parser.add_argument("checkpoint", help="folder or s3:// URL of a checkpoint, or of a run: its newest one")
    parser.add_argument("folder", type=Path, help="where to write")
    parser.add_argument("--ema", action="store_true", help="the moving average of the weights, of a run with model_ema")
    parser.add_argument("--plugin", default="", help="module of the run's own modalities")
    options = parser.parse_args(argv)
    load_plugin(options.plugin)
    checkpoint = newest_checkpoint(Path(on_disk(options.checkpoint, find_checkpoint)))
    export_model(checkpoint, options.folder, options.ema)
    print(f"{checkpoint} -> FM.from_pretrained('{options.folder}')")


if __name__ == "__main__":
    run_cli(main)
