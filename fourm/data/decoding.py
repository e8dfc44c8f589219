"""Bytes of a member of a shard, or of a file in a folder, → the raw value of a modality."""

from __future__ import annotations

import gzip
import io
import json
from pathlib import PurePath
from typing import Any

import numpy as np

from fourm.utils.errors import DataError

IMAGE_EXTENSIONS = ("jpg", "jpeg", "png", "webp", "bmp", "tif", "tiff")


def decode_value(filename: str, content: bytes) -> Any:
    """Decode by the file's extension, which may be double (``json.gz``).

    Images stay encoded: whether, where and how finely to decode is known only once the crop and the budgets are.

    Returns:
        ``bytes`` for an image, ``str`` for txt, an array for npy, a dict of arrays for npz, parsed JSON for json.

    Raises:
        DataError: an extension that nothing here reads.
        ValueError, OSError, EOFError: content that is not what the extension says.
    """
    extensions = PurePath(filename).name.lower().split(".")[1:]
    if extensions[-1:] == ["gz"]:
        content = gzip.decompress(content)
        extensions.pop()
    extension = extensions[-1] if extensions else ""
    if extension in IMAGE_EXTENSIONS:
        return content
    if extension in ("txt", "text"):
        return content.decode("utf-8").strip()
    if extension == "json":
        return json.loads(content)
    if extension == "npy":
        return np.load(io.BytesIO(content), allow_pickle=False)
    if extension == "npz":
        with np.load(io.BytesIO(content), allow_pickle=False) as arrays:
            return dict(arrays)
    known = ", ".join((*IMAGE_EXTENSIONS, "txt", "json", "npy", "npz"))
    raise DataError(f"{filename}: cannot read files that end in '.{extension}' (known: {known}; each also with .gz)")
