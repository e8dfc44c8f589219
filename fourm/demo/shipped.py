"""The packaged model: loading it, and making it from a training run.

from fourm import load_demo
sampler = load_demo()
sampler.plot(sampler("a red car and a yellow duck on a brick floor"))

python -m fourm.demo.shipped RUN_FOLDER FOLDER [--figures scores.json]    # in half precision, with its model card
"""

from __future__ import annotations

import json
import shutil
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from fourm.demo.report import aligned
from fourm.generation.defaults import FILE
from fourm.generation.options import DEMO_MODEL
from fourm.generation.sampler import Sampler, load_fm, vocabulary_path
from fourm.models import FM
from fourm.models.model_card import markdown
from fourm.utils.errors import UserError, run_cli
from fourm.utils.files import atomic_path
from fourm.utils.options import Options, option, parse_options
from fourm.utils.paths import InputPath, OutputPath

VOCABULARY, CARD = "vocabulary.json", "README.md"

_CARD = """\
---
license: apache-2.0
library_name: fourm
pipeline_tag: any-to-any
tags:
- 4m
- any-to-any
---

# The demo's model

A small any-to-any model of the kind of [4M](https://arxiv.org/abs/2312.06647). It reads and generates pictures, depth,
surface normals, segmentation, edges, bounding boxes and captions of toy scenes, 64 x 64 pixels each, in any direction.
It comes with the library `fourm`, so that everything can be tried without training and without a GPU:

```python
from fourm import load_demo

sampler = load_demo()
sampler.plot(sampler("a red car and a yellow duck on a brick floor"))
```

`generation.yaml` holds the order of the targets, and their steps, temperatures and guidance, which Python,
`fourm generate --demo` and `fourm app` share. The tokenizers are in `fourm/demo/trained`. The weights are stored in
bfloat16 and used in float32.

## How it was made

The data are rendered: 17 kinds of toys, whose meshes come with pybullet, stand on photographs of scikit-image. All
other modalities follow from the renderer, and captions from templates. `fourm demo --stages render` makes such scenes,
and `docs/demo.md` has the commands of the training. The validation scenes of the demo, which the figures below are
from, were not used.

{facts}

## How good it is

{figures}

## What it cannot do

- It knows nothing but these scenes: 17 kinds of toys in 8 colours or their own, 6 grounds, one or more toys in view
  from above. Other words are ignored or misread, and photographs of the real world are far from what it was trained on.
- Captions have the form of the templates: "a red cup and a yellow duck on the grass", "on gravel, a blue car on the
  left and a grey tray on the right". Words for numbers, actions, or relations other than left, right, between and
  closest have no meaning for it.
- Pictures are 64 pixels wide and made of 64 tokens, so that thin parts, such as the spokes of a bicycle, get lost. Some
  toys are missing or appear twice, the more of them are named.
- Toys have the colours that are their own (ducks are yellow, tables wooden), but colours that a caption gives them are
  often wrong.
- It is a demonstration of the library, and no measure of what 4M can do.
"""

_INTRODUCTION = """\
Captions of {captions} validation scenes, for each of which all modalities were generated. For RGB, a judge says which
toys a picture shows: a small network that was trained on true renders and knows nothing of the model. In segmentation,
a toy counts if it has at least 0.4 % of the pixels. *Tokens of the truth* is the most that the tokenizers can show, and
a *guess* is the toys of another caption.

"""


@dataclass(frozen=True)
class ExportOptions(Options):
    """Options of the export."""

    run: InputPath = option("run folder; of an unfinished run, the newest checkpoint is used")
    folder: OutputPath = option("folder of the shipped model")
    figures: InputPath | None = option("scores.json of benchmarks/demo_model.py, for the model card", None)


def load_demo(device: str = "auto", dtype: torch.dtype | None = None) -> Sampler:
    """Load the packaged model, with its tokenizers, vocabulary and settings.

    Args:
        device: See :func:`fourm.utils.device.choose_device`.
        dtype: Autocast precision; None disables autocast.
    """
    return Sampler.load(DEMO_MODEL, device=device, dtype=dtype)


def export(run: Path, folder: Path, figures: Mapping[str, Any] | None = None) -> None:
    """Write the model of a run in bfloat16, its vocabulary and its model card.

    The ``generation.yaml`` that is in the folder stays as it is; a new folder gets that of the shipped model.

    Args:
        run: The run folder.
        folder: The folder to write.
        figures: The content of ``scores.json`` of ``benchmarks/demo_model.py``.

    Raises:
        UserError: If there is no model or vocabulary, or the folder contains something else.
    """
    vocabulary = vocabulary_path(run)
    if vocabulary is None or not Path(vocabulary).is_file():
        raise UserError(f"{run}: there is no text vocabulary {vocabulary or 'in its config.yaml'}")
    model = load_fm(run).to(torch.bfloat16)
    model.save_pretrained(folder)
    _copy(Path(vocabulary), folder / VOCABULARY)
    if not (folder / FILE).exists():
        _copy(DEMO_MODEL / FILE, folder / FILE)
    with atomic_path(folder / CARD) as path:
        path.write_text(model_card(model, figures), encoding="utf-8")


def model_card(model: FM, figures: Mapping[str, Any] | None) -> str:
    """Return the model card; see :func:`export`."""
    tables = markdown(model.model_facts() | model.training_facts).replace("## ", "### ")
    return _CARD.format(facts=tables, figures=_figures(figures) if figures else "This has not been measured.")


def _figures(figures: Mapping[str, Any]) -> str:
    """Return the table of :class:`fourm.demo.judge.Score`."""
    head = ("named objects in", "source", "precision", "recall")
    rows = [
        (score["modality"], score["source"], f"{score['precision']:.2f}", f"{score['recall']:.2f}")
        for score in figures["scores"]
    ]
    return _INTRODUCTION.format(captions=figures["captions"]) + aligned(head, rows, left=(0, 1))


def _copy(source: Path, target: Path) -> None:
    with atomic_path(target) as path:
        shutil.copyfile(source, path)


def main(argv: list[str] | None = None) -> None:
    """Export a finished run."""
    options = parse_options(ExportOptions, argv, __doc__ or "", positional=("run", "folder"))
    figures = json.loads(Path(options.figures).read_bytes()) if options.figures else None
    export(Path(options.run), Path(options.folder), figures)


if __name__ == "__main__":
    run_cli(main)
