"""Reads ``.safetensors`` files that hold the configuration of their model in the header, as published models do."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from safetensors import SafetensorError, safe_open
from torch import Tensor

from fourm.utils.config import parse_value
from fourm.utils.errors import UserError

_MAX_CHARACTERS = 10_000  # of a value that can be a number or a list of names


def load_safetensors(path: str | Path, return_config: bool = True) -> Any:
    """Read a file of weights.

    Args:
        path: The ``.safetensors`` file.
        return_config: Whether to return the configuration, too.

    Returns:
        The state dict and the configuration, which is empty if the header has none, or the state dict alone.

    Raises:
        UserError: If the file does not exist or is damaged.
    """
    try:
        with safe_open(path, framework="pt") as file:
            state_dict: dict[str, Tensor] = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
            config = parse_header(file.metadata() or {})
    except FileNotFoundError:
        raise UserError(f"{path} does not exist") from None
    except (SafetensorError, OSError) as error:
        raise UserError(f"{path} is damaged, or holds no weights: {' '.join(str(error).split())[:200]}") from error
    return (state_dict, config) if return_config else state_dict


def parse_header(metadata: Mapping[str, str]) -> dict[str, Any]:
    """Convert the configuration in a header, whose values are text, to numbers, lists and names."""
    return {
        key: None if text == "None" else parse_value(text) if len(text) <= _MAX_CHARACTERS else text
        for key, text in metadata.items()
        if key != "format"
    }
