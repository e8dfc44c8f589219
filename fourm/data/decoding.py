"""Bytes of a member of a shard, or of a file in a folder, → the raw value of a modality."""

from __future__ import annotations

import ast
import gzip
import io
import json
import math
import struct
import zipfile
import zlib
from collections.abc import Callable
from functools import lru_cache
from pathlib import PurePath
from typing import Any, Literal

import numpy as np
from PIL import Image, UnidentifiedImageError

from fourm.data.object_arrays import ObjectArray
from fourm.utils.errors import DataError

IMAGE_EXTENSIONS = ("jpg", "jpeg", "png", "webp", "bmp", "tif", "tiff")


class EncodedImage:
    """An image that is decoded when its pixels are wanted; until then only its header is read.

    Args:
        keep: decode all of it, once for all that ask; else each time anew, and only as finely as is asked for.

    Attributes:
        shape: (height, width).

    Raises:
        OSError: not an image.
    """

    def __init__(self, content: bytes, keep: bool = False):
        self.content, self._keep = content, keep
        try:
            self._opened: Image.Image | None = Image.open(io.BytesIO(content))
        except UnidentifiedImageError:
            raise OSError("not an image, or a damaged one") from None
        self._kept: dict[str | None, np.ndarray] = {}
        self.shape = (self._opened.height, self._opened.width)

    def pixels(self, mode: str | None, scale: int = 1) -> np.ndarray:
        """(h, w) or (h, w, C), to be read only.

        Args:
            mode: PIL mode to convert to; None = as stored.
            scale: a JPEG that is not kept may come so many times smaller: 1, 2, 4 or 8.

        Raises:
            OSError: the image is damaged.
        """
        if mode in self._kept:
            return self._kept[mode]
        image, self._opened = self._opened or Image.open(io.BytesIO(self.content)), None
        if scale > 1 and not self._keep:
            image.draft(None, (self.shape[1] // scale, self.shape[0] // scale))  # type: ignore[arg-type]
        pixels = np.asarray(image if mode in (None, image.mode) else image.convert(mode))
        if self._keep:
            self._kept[mode] = pixels
        return pixels


def decode_value(filename: str, content: bytes) -> Any:
    """Decode by the file's extension, which may be double (``json.gz``).

    Images stay encoded: whether, where and how finely to decode is known only once the crop and the budgets are.

    Returns:
        ``bytes`` for an image, ``str`` for txt, an array for npy (of objects an :class:`ObjectArray`), a dict of arrays for npz, parsed
        JSON for json.

    Raises:
        DataError: an extension that nothing here reads.
        Exception: content that is not what the extension says, mostly ValueError or OSError.
    """
    extensions = PurePath(filename).name.lower().split(".")[1:]
    if extensions[-1:] == ["gz"]:
        content = gzip.decompress(content)
        extensions.pop()
    extension = extensions[-1] if extensions else ""
    if extension not in FORMATS:
        raise DataError(
            f"{filename}: cannot read files that end in '.{extension}' (known: {', '.join(FORMATS)}; each also with .gz)"
        )
    return FORMATS[extension](content)


def _read_npy(content: bytes | memoryview) -> np.ndarray | ObjectArray:
    """``np.load`` without running pickles, ten times as fast: a data set has few headers, and each is parsed once."""
    if content[:6] != b"\x93NUMPY":
        raise ValueError("not an npy file")
    start = 10 if content[6] == 1 else 12  # format version 1 counts the header's bytes in 2 bytes, later ones in 4
    end = start + int.from_bytes(content[8:start], "little")
    dtype, order, shape = _parse_npy_header(bytes(content[start:end]))
    if dtype.hasobject:
        return ObjectArray(content[end:])
    return np.frombuffer(content, dtype, math.prod(shape), end).reshape(shape, order=order)


@lru_cache(maxsize=1024)
def _parse_npy_header(header: bytes) -> tuple[np.dtype, Literal["C", "F"], tuple[int, ...]]:
    fields = ast.literal_eval(header.decode("utf-8"))
    dtype = np.dtype(fields["descr"])
    return dtype, "F" if fields["fortran_order"] else "C", fields["shape"]


def _read_npz(content: bytes) -> dict[str, np.ndarray | ObjectArray]:
    """``np.load`` without running pickles, or copying what is not compressed."""
    with zipfile.ZipFile(io.BytesIO(content)) as archive:
        files = {info.filename.removesuffix(".npy"): _unzipped(content, archive, info) for info in archive.infolist()}
    return {name: _read_npy(file) for name, file in files.items()}


def _unzipped(content: bytes, archive: zipfile.ZipFile, info: zipfile.ZipInfo) -> bytes | memoryview:
    if info.compress_type != zipfile.ZIP_STORED:
        return archive.read(info)
    # Before the file stand 30 bytes, its name and further fields; the lengths of these two end the 30.
    name, more = struct.unpack_from("<HH", content, info.header_offset + 26)
    start = info.header_offset + 30 + name + more
    file = memoryview(content)[start : start + info.file_size]
    if zlib.crc32(file) != info.CRC:
        raise zipfile.BadZipFile(f"{info.filename} is damaged")
    return file


FORMATS: dict[str, Callable[[bytes], Any]] = {
    **dict.fromkeys(IMAGE_EXTENSIONS, bytes),
    **dict.fromkeys(("txt", "text"), lambda content: content.decode("utf-8").strip()),
    "json": json.loads,
    "npy": _read_npy,
    "npz": _read_npz,
}
"""Extension → what reads it; a plugin adds its own. ``bytes`` are images, which stay encoded."""
