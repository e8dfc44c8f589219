"""Results on disk: a folder per sample, to look at and to read back.

``MODALITY.png`` are pictures, ``MODALITY.txt`` captions; ``values.npz`` holds what the pictures show, in its own units, and
``result.json`` all the rest, and under ``made_from`` what it was made from. A folder is there completely or not at all.
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
# What reading files that something else has written or cut off raises.
_DAMAGE = (
    OSError, EOFError, ValueError, TypeError, AttributeError, KeyError, RecursionError, BadZipFile, zlib.error,
)  # fmt: skip


def write_result(folder: Path, result: Mapping[str, Decoded], origin: Mapping[str, Any] | None = None) -> None:
    """Put a sample into ``folder``, in which nothing but an earlier result may be.

    Args:
        origin: what it was made from, for :func:`origin_of`.

    Raises:
        UserError: as :func:`check_result`.
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
                entry["value"] = decoded.value
            content[name] = entry
        np.savez_compressed(path / VALUES, **arrays)
        (path / RESULT).write_text(json.dumps(content, indent=1) + "\n", encoding="utf-8")


def check_result(folder: Path) -> None:
    """See, before it is made, whether a result can be written to ``folder``.

    Raises:
        UserError: anything but a result is there, or the folder cannot be written to.
    """
    check_folder(folder, _own_files(folder))


def origin_of(folder: Path) -> Any:
    """What the result in ``folder`` was made from; None if it does not say, or if there is none."""
    try:
        return json.loads((folder / RESULT).read_bytes()).get(_ORIGIN)
    except (OSError, ValueError, AttributeError, RecursionError):
        return None


def _own_files(folder: Path) -> list[str]:
    """The names of a result's files, if there is one in ``folder``."""
    try:
        names = [glob.escape(name) for name in json.loads((folder / RESULT).read_bytes())]
    except (OSError, ValueError, TypeError, RecursionError):
        return []
    return [RESULT, VALUES, *(f"{name}.{extension}" for name in names for extension in ("png", "txt"))]


def read_result(folder: Path) -> dict[str, Decoded]:
    """What :func:`write_result` wrote.

    Raises:
        UserError: it did not write this folder.
    """
    try:
        content = json.loads((folder / RESULT).read_text(encoding="utf-8"))
        content.pop(_ORIGIN, None)
        with np.load(folder / VALUES, allow_pickle=False) as arrays:
            return {
                name: Decoded(
                    entry["kind"], arrays[name] if name in arrays else entry["value"], entry["dropped"],
                    tuple(entry["names"]),
                )
                for name, entry in content.items()
            }  # fmt: skip
    except _DAMAGE as error:
        raise UserError(f"{folder} does not hold a result: {error}; remove it, and run again") from error
