"""Leaf helpers, one job a file; nothing here imports another package of the project."""

import importlib
from typing import Any

_PUBLISHED = {"denormalize": "fourm.utils.normalization", "load_safetensors": "fourm.utils.weight_files"}
"""Names that users import from here. Their modules import torch, which commands do only once they handle Ctrl-C."""


def __getattr__(name: str) -> Any:
    if name in _PUBLISHED:
        return getattr(importlib.import_module(_PUBLISHED[name]), name)
    raise AttributeError(f"module {__name__} has no attribute {name}")
