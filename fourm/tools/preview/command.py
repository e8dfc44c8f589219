"""Write an HTML page with samples of a data YAML as training sees them, and with the token budgets from its alphas.

    python -m fourm.tools.preview CONFIG --out page.html

The page is one self-contained file without scripts.
"""

from __future__ import annotations

import logging
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch
from tokenizers import Tokenizer

from fourm.data.modality_info import Modality
from fourm.data.options import DataOptions
from fourm.generation.decoding import Tokenizers, decode_modality
from fourm.generation.plotting import as_image
from fourm.generation.sampler import load_tokenizers
from fourm.tools.preview.page import PAGE_START, page
from fourm.tools.preview.samples import Painter, preview
from fourm.tools.preview.sequences import Reader
from fourm.utils.errors import SanitizingFormatter, UserError
from fourm.utils.files import atomic_path, check_file
from fourm.utils.options import option, parse_options
from fourm.utils.paths import AnyPath, InputPath
from fourm.utils.tokenizer import load_text_tokenizer


@dataclass(frozen=True, kw_only=True)
class PreviewOptions(DataOptions):
    """Options of the preview."""

    out: AnyPath = option("path of the HTML page", "preview.html")
    split: Literal["train", "val"] = option("train or val", "train")
    datasets: tuple[str, ...] = option("names of the data sets (default: all of the split)", ())
    samples: int = option(
        "samples per data set; each is shown under every component of its mixture", 3, at_least=1, at_most=10_000
    )
    draws: int = option("number of budgets drawn per component", 2000, at_least=1, at_most=10**7)
    seed: int = option("seed of samples, crops, masks and budgets", 0, at_least=0, at_most=2**62)
    tokenizers: InputPath | None = option(
        "folder with one tokenizer folder per modality, such as depth or clip (default: show each id as a colour)", None
    )

    def __post_init__(self) -> None:
        super().__post_init__()
        if Path(self.out).suffix != ".html":
            raise UserError(f"'out' must end with .html, not {self.out}")


def _painter(tokenizers: Tokenizers) -> Painter:
    """Return a function that draws grids in the same way as generation, and what is no picture by its ids."""

    def paint(modality: Modality, tensor: torch.Tensor) -> np.ndarray | None:
        known = torch.zeros(modality.max_tokens or 0, dtype=torch.bool)
        pictures = (as_image(decode_modality(tensor, known, modality, own, None)) for own in (tokenizers, {}))
        return next((picture for picture in pictures if picture is not None), None)

    return paint


def _reader(text_tokenizer: Tokenizer) -> Reader:
    """Return a function that parses texts in the same way as generation."""

    def read(modality: Modality, ids: torch.Tensor) -> Any:
        return decode_modality(ids, torch.zeros(len(ids), dtype=torch.bool), modality, {}, text_tokenizer).value

    return read


def _check_output(path: Path) -> None:
    """Check, before anything is read, that the page may be written to ``path``.

    Raises:
        UserError: The file exists and is not a preview, or it cannot be written.
    """
    check_file(path)
    if path.exists() and not path.read_bytes().startswith(PAGE_START.encode()):
        raise UserError(f"out: {path} exists and is not a preview; choose another name, or remove it")


def main(argv: list[str] | None = None) -> int:
    """Write the page."""
    options = parse_options(PreviewOptions, argv, __doc__ or "", positional=("data_config",))
    handler = logging.StreamHandler()
    handler.setFormatter(SanitizingFormatter("%(levelname)s: %(message)s"))
    logging.basicConfig(handlers=[handler])
    out = Path(options.out)
    _check_output(out)
    config = options.load_data()
    datasets = config.train if options.split == "train" else config.val
    for name in options.datasets:
        if name not in datasets:
            raise UserError(
                f"{options.data_config}: no data set '{name}' in {options.split}, only {', '.join(datasets)}"
            )
    text_tokenizer = load_text_tokenizer(options.text_tokenizer_path)
    paint, read = _painter(load_tokenizers(options.tokenizers)), _reader(text_tokenizer)
    previews = [
        preview(
            dataset,
            text_tokenizer,
            paint,
            read,
            training=options.split == "train",
            samples=options.samples,
            draws=options.draws,
            seed=options.seed,
        )
        for name, dataset in datasets.items()
        if name in options.datasets or not options.datasets
    ]
    with atomic_path(out) as path:
        path.write_text(page(Path(options.data_config).name, previews), encoding="utf-8")
    print(out)
    return 0
