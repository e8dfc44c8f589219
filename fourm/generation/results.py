"""Writes results to disk, one folder per sample, and reads them back.

``MODALITY.png`` contains a picture and ``MODALITY.txt`` a caption; ``values.npz`` contains the values of the pictures,
in their own units, and the arrays within other values; ``result.json`` contains everything else, with the origin of the
result under ``made_from``. Folders are written atomically.
"""

from __future__ import annotations

import glob
import json
import zlib
from collections.abc import Mapping
from pathlib import Path
from typing import Any
from zipfile import BadZipFile

import numpy as np
from PIL import Image

from fourm.generation.decoding import Decoded
from fourm.generation.plotting import as_image
from fourm.utils.errors import UserError
from fourm.utils.files import atomic_folder, check_folder

RESULT, VALUES = "result.json", "values.npz"
_ORIGIN = "made_from"
_ARRAY = "array"  # key of a reference to an array in ``values.npz``
# Errors of reading files that are incomplete or were written by something else.
_READ_ERRORS = (
    OSError,
    EOFError,
    ValueError,
    TypeError,
    AttributeError,
    KeyError,
    RecursionError,
    BadZipFile,
    zlib.error,
)


def write_result(folder: Path, result: Mapping[str, Decoded], origin: Mapping[str, Any] | None = None) -> None:
    """Write the result of a sample to ``folder``, which may contain nothing but an earlier result.

    Args:
        folder: The folder to write.
        result: The result.
        origin: What the result was made from, for :func:`origin_of`.

    Raises:
        UserError: See :func:`check_result`.
    """
    with atomic_folder(folder, _own_files(folder)) as path:
        content: dict[str, Any] = {} if origin is None else {_ORIGIN: dict(origin)}
        arrays: dict[str, Any] = {}
        for name, decoded in result.items():
            entry = {"kind": decoded.kind, "dropped": decoded.dropped, "names": list(decoded.names)}
            image = as_image(decoded)
            if image is not None:
                Image.fromarray(image).save(path / f"{name}.png")
            if decoded.kind == "caption":
                (path / f"{name}.txt").write_text(decoded.value + "\n", encoding="utf-8")
            if isinstance(decoded.value, np.ndarray):
                arrays[name] = decoded.value
            else:
                entry["value"] = _without_arrays(decoded.value, name, arrays)
            content[name] = entry
        np.savez_compressed(path / VALUES, **arrays)
        (path / RESULT).write_text(json.dumps(content, indent=1) + "\n", encoding="utf-8")


def _without_arrays(value: Any, path: str, arrays: dict[str, Any]) -> Any:
    """Return a value for JSON: its arrays are moved to ``arrays``, under names that begin with ``path``."""
    if isinstance(value, np.ndarray):
        arrays[path] = value
        return {_ARRAY: path}
    if isinstance(value, Mapping):
        return {key: _without_arrays(item, f"{path}/{key}", arrays) for key, item in value.items()}
    if isinstance(value, list):
        return [_without_arrays(item, f"{path}/{index}", arrays) for index, item in enumerate(value)]
    return value


def _with_arrays(value: Any, arrays: Mapping[str, Any]) -> Any:
    """Undo :func:`_without_arrays`."""
    if isinstance(value, dict):
        if value.keys() == {_ARRAY}:
            return arrays[value[_ARRAY]]
        return {key: _with_arrays(item, arrays) for key, item in value.items()}
    return [_with_arrays(item, arrays) for item in value] if isinstance(value, list) else value


def check_result(folder: Path) -> None:
    """Check in advance that a result can be written to ``folder``.

    Raises:
        UserError: If the folder contains anything but a result, or cannot be written to.
    """
    check_folder(folder, _own_files(folder))


def origin_of(folder: Path) -> Any:
    """Return what the result in ``folder`` was made from, or None if there is no result or it does not say."""
    try:
        return json.loads((folder / RESULT).read_bytes()).get(_ORIGIN)
    except (OSError, ValueError, AttributeError, RecursionError):
        return None


def _own_files(folder: Path) -> list[str]:
    """Return the names of the files of the result in ``folder``, if there is one."""
    try:
        names = [glob.escape(name) for name in json.loads((folder / RESULT).read_bytes())]
    except (OSError, ValueError, TypeError, RecursionError):
        return []
    return [RESULT, VALUES, *(f"{name}.{extension}" for name in names for extension in ("png", "txt"))]


def read_result(folder: Path) -> dict[str, Decoded]:
    """Read a result that :func:`write_result` wrote.

    Raises:
        UserError: If the folder does not contain a result, or the result is damaged.
    """
    try:
        content = json.loads((folder / RESULT).read_text(encoding="utf-8"))
        content.pop(_ORIGIN, None)
        with np.load(folder / VALUES, allow_pickle=False) as arrays:
            return {
                name: Decoded(
                    entry["kind"],
                    arrays[name] if name in arrays else _with_arrays(entry["value"], arrays),
                    entry["dropped"],
                    tuple(entry["names"]),
                )
                for name, entry in content.items()
            }
    except _READ_ERRORS as error:
        raise UserError(f"{folder} does not contain a readable result: {error}; remove it and run again") from error
