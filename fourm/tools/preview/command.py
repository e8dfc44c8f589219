"""A page with samples of a data YAML as training sees them, and with the token budgets that its alphas give.

    python -m fourm.tools.preview CONFIG --out page.html

The page is one file without scripts; it needs nothing else.
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
from fourm.tools.preview.page import BEGINNING, page
from fourm.tools.preview.samples import Painter, preview
from fourm.tools.preview.sequences import Reader
from fourm.utils.errors import PrintableFormatter, UserError
from fourm.utils.files import atomic_path, check_file
from fourm.utils.options import option, parse_options
from fourm.utils.paths import AnyPath, InputPath
from fourm.utils.tokenizer import load_text_tokenizer
from fourm.vq import load_tokenizer


@dataclass(frozen=True, kw_only=True)
class PreviewOptions(DataOptions):
    """What to show, and where."""

    out: AnyPath = option("the page to write, .html", "preview.html")
    split: Literal["train", "val"] = option("train or val", "train")
    datasets: tuple[str, ...] = option("names of the data sets (default: all of the split)", ())
    samples: int = option(
        "samples per data set; each is shown under every component of its mixture", 3, at_least=1, at_most=10_000
    )
    draws: int = option("draws of budgets per component", 2000, at_least=1, at_most=10**7)
    seed: int = option("of samples, crops, masks and budgets", 0, at_least=0, at_most=2**62)
    tokenizers: InputPath | None = option(
        "folder of image tokenizers, one per modality (default: a colour per id)", None
    )

    def __post_init__(self) -> None:
        super().__post_init__()
        if Path(self.out).suffix != ".html":
            raise UserError(f"'out' must end with .html, not {self.out}")


def _painter(tokenizers: Tokenizers) -> Painter:
    """Pictures as generation shows them."""

    def paint(modality: Modality, tensor: torch.Tensor) -> np.ndarray | None:
        known = torch.zeros(modality.max_tokens or 0, dtype=torch.bool)
        return as_image(decode_modality(tensor, known, modality, tokenizers, None))

    return paint


def _reader(text_tokenizer: Tokenizer) -> Reader:
    """Texts as generation reads them."""

    def read(modality: Modality, ids: torch.Tensor) -> Any:
        return decode_modality(ids, torch.zeros(len(ids), dtype=torch.bool), modality, {}, text_tokenizer).value

    return read


def _load_tokenizers(folder: str | None) -> Tokenizers:
    if folder is None:
        return {}
    found = [load_tokenizer(path.parent) for path in sorted(Path(folder).glob("*/config.json"))]
    if not found:
        raise UserError(f"tokenizers {folder}: there is no tokenizer in its folders")
    return {tokenizer.info.modality: tokenizer for tokenizer in found}


def _check_output(path: Path) -> None:
    """Check, before anything is read, that the page may be written to ``path``.

    Raises:
        UserError: A file that is not an earlier preview is there, or the page cannot be written.
    """
    check_file(path)
    if path.exists() and not path.read_bytes().startswith(BEGINNING.encode()):
        raise UserError(f"out: {path} is there and is no preview: choose another name, or remove it")


def main(argv: list[str] | None = None) -> int:
    """Write the page."""
    options = parse_options(PreviewOptions, argv, __doc__ or "", positional=("data_config",))
    handler = logging.StreamHandler()
    handler.setFormatter(PrintableFormatter("%(levelname)s: %(message)s"))
    logging.basicConfig(handlers=[handler])
    out = Path(options.out)
    _check_output(out)
    config = options.load_data()
    known = config.train if options.split == "train" else config.val
    for name in options.datasets:
        if name not in known:
            raise UserError(f"{options.data_config}: no data set '{name}' in {options.split}, only {', '.join(known)}")
    text_tokenizer = load_text_tokenizer(options.text_tokenizer_path)
    paint, read = _painter(_load_tokenizers(options.tokenizers)), _reader(text_tokenizer)
    previews = [
        preview(
            dataset, text_tokenizer, paint, read, training=options.split == "train", samples=options.samples,
            draws=options.draws, seed=options.seed,
        )
        for name, dataset in known.items()
        if name in options.datasets or not options.datasets
    ]  # fmt: skip
    with atomic_path(out) as path:
        path.write_text(page(Path(options.data_config).name, previews), encoding="utf-8")
    print(out)
    return 0
