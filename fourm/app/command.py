"""The command ``fourm app``, which serves a page in the browser for generating with a model."""

from __future__ import annotations

import signal
import sys
import tempfile
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import torch

from fourm.app.page import Page
from fourm.app.session import Limits
from fourm.demo.scene import CLASSES
from fourm.generation.options import DEMO_MODEL
from fourm.generation.sampler import Sampler
from fourm.utils.errors import UserError
from fourm.utils.options import option, parse_options
from fourm.utils.paths import InputPath
from fourm.utils.plugin import load_plugin


@dataclass(frozen=True, kw_only=True)
class AppOptions(Limits):
    """Options of the app."""

    model: InputPath = option(
        "run folder, folder of a demo, folder with a model, s3:// URL of one of these, or id on the hub (default: the "
        "packaged model)",
        str(DEMO_MODEL),
    )
    tokenizers: InputPath | dict[str, InputPath] | None = option(
        "folder with one tokenizer per modality of images, or a mapping from modality to folder or hub id", None
    )
    text_tokenizer: InputPath | None = option("text vocabulary (default: that of the run)", None)
    class_names: list[str] = option("names of the classes of segmentations", [])
    plugin: str = option("Python module that defines your own modalities: my_package.my_modalities", "")
    device: str = option("device; 'auto' uses cuda if it is available, and the cpu otherwise", "auto")
    dtype: Literal["float32", "bfloat16", "float16"] = option("precision of the model", "float32")
    host: str = option("address to listen on; others than 127.0.0.1 let other machines use the model", "127.0.0.1")
    port: int = option("port to listen on", 7860, at_least=1, at_most=65535)


def load(options: AppOptions) -> Sampler:
    """Load the model; a folder that ``fourm demo`` wrote also has the tokenizers, the vocabulary and the classes.

    Raises:
        UserError: If something is missing or damaged.
    """
    model, tokenizers, names = options.model, options.tokenizers, options.class_names
    vocabulary = options.text_tokenizer
    folder = Path(model)
    if (folder / "demo.json").is_file():
        if not (folder / "training").is_dir():
            raise UserError(f"{folder} has no trained model yet; finish it with 'fourm demo --out {folder}'")
        model, tokenizers = str(folder / "training"), tokenizers or str(folder / "tokenizers")
        vocabulary, names = vocabulary or str(folder / "vocabulary.json"), names or [*CLASSES]
    dtype = None if options.dtype == "float32" else getattr(torch, options.dtype)
    return Sampler.load(model, tokenizers, vocabulary, names, options.device, dtype)


def main(argv: list[str] | None = None) -> None:
    """Serve the page until Ctrl-C."""
    options = parse_options(AppOptions, argv, __doc__ or "", positional=("model",))
    load_plugin(options.plugin)
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(128 + signal.SIGTERM))  # so that temporary files are removed
    with tempfile.TemporaryDirectory(prefix="fourm-app-") as folder:
        name = "demo" if options.model == str(DEMO_MODEL) else Path(options.model).resolve().name
        page = Page(load(options), options, name, Path(folder))
        url = page.launch(options.host, options.port)
        print(f"{url} (Ctrl-C stops the app)", flush=True)
        try:
            while True:
                time.sleep(60)
                page.remove_old_files()
        finally:
            page.blocks.close(verbose=False)
