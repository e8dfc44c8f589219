"""Results on disk: a folder per sample, to look at and to read back.

``MODALITY.png`` are pictures, ``MODALITY.txt`` captions; ``values.npz`` holds what the pictures show, in its own units, and
``result.json`` all the rest. A folder is there completely or not at all.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

from fourm.generation.decoding import Decoded
from fourm.generation.plotting import as_image
from fourm.utils.errors import UserError
from fourm.utils.files import atomic_path

RESULT, VALUES = "result.json", "values.npz"


def write_result(folder: Path, result: Mapping[str, Decoded]) -> None:
    """Put a sample into ``folder``."""
    with atomic_path(folder) as path:
        path.mkdir()
        content: dict[str, Any] = {}
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


def read_result(folder: Path) -> dict[str, Decoded]:
    """What :func:`write_result` wrote.

    Raises:
        UserError: it did not write this folder.
    """
    try:
        content = json.loads((folder / RESULT).read_text(encoding="utf-8"))
        with np.load(folder / VALUES, allow_pickle=False) as arrays:
            return {
                name: Decoded(
                    entry["kind"], arrays[name] if name in arrays else entry["value"], entry["dropped"],
                    tuple(entry["names"]),
                )
                for name, entry in content.items()
            }  # fmt: skip
    except (OSError, ValueError, KeyError) as error:
        raise UserError(f"{folder} does not hold a result: {error}; remove it, and run again") from error
