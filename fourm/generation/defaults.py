"""How a model is meant to be used: ``generation.yaml`` beside its weights.

``Sampler.load``, ``fourm generate`` and ``fourm app`` read the file, so that they agree; what is asked of them goes
before it. Its keys are those of ``fourm generate``. Paths are relative to its folder.

    text_tokenizer: vocabulary.json
    cond_domains: caption
    target_domains: semseg-rgb-depth
    temps: {rgb: 1.0}
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from fourm.generation.settings import COLUMNS, TargetSettings
from fourm.utils.config import build, load_yaml
from fourm.utils.options import option

FILE = "generation.yaml"


@dataclass(frozen=True, kw_only=True)
class Defaults(TargetSettings):
    """The content of ``generation.yaml``."""

    tokenizers: str | dict[str, str] | None = option("see StageOptions", None)
    text_tokenizer: str | None = option("text vocabulary", None)
    class_names: list[str] = option("names of the classes of segmentations", [])
    cond_domains: str | None = option("input modalities of fourm generate", None)
    target_domains: str | None = option("modalities to generate, in this order, as far as they are not given", None)

    def settings(self) -> dict[str, Any]:
        """Return the settings of single targets that are given, as arguments of the sampler."""
        columns = {key: getattr(self, key) for key in COLUMNS}
        return {key: value for key, value in columns.items() if value is not None}


def read_defaults(model: str | Path) -> Defaults:
    """Read the ``generation.yaml`` of a folder with a model; without one, nothing has a default.

    Raises:
        UserError: If the file is not valid.
    """
    path = Path(model) / FILE
    if not path.is_file():
        return Defaults()
    defaults = build(Defaults, load_yaml(path), str(path))
    tokenizers = defaults.tokenizers
    if isinstance(tokenizers, dict):
        tokenizers = {name: _place(path.parent, place) for name, place in tokenizers.items()}
    elif tokenizers:
        tokenizers = _place(path.parent, tokenizers)
    vocabulary = defaults.text_tokenizer and _place(path.parent, defaults.text_tokenizer)
    return replace(defaults, tokenizers=tokenizers, text_tokenizer=vocabulary)


def _place(folder: Path, name: str) -> str:
    """Return the path of a file or folder; what does not exist may be an id on the hub."""
    return str(folder / name) if (folder / name).exists() else name
