"""Bytes of a member of a shard, or of a file in a folder, → the raw value of a modality."""

from __future__ import annotations

import ast
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

from fourm.data.images import EncodedImage
from fourm.data.limits import MAX_ARRAY_BYTES, MAX_NPY_HEADER, MAX_NPZ_MEMBERS, MAX_TEXT_BYTES
from fourm.data.object_arrays import ObjectArray

__all__ = ["FORMATS", "IMAGE_EXTENSIONS", "EncodedImage", "UnreadableFormat", "decode_value", "parse_json"]

IMAGE_EXTENSIONS = ("jpg", "jpeg", "png", "webp", "bmp", "tif", "tiff")
_TEXTS = ("txt", "text", "cls")  # cls: the number of a class, as webdataset writes it


class UnreadableFormat(ValueError):
    """Files with such an extension are not read."""


def decode_value(filename: str, content: bytes) -> Any:
    """Decode by the file's extension, which may be double (``json.gz``).

    Images stay encoded: whether, where and how finely to decode is known only once the crop and the budgets are.

    Returns:
        ``bytes`` for an image, ``str`` for txt and cls, an array for npy (of objects an :class:`ObjectArray`), a dict of arrays for npz, parsed
        JSON for json.

    Raises:
        UnreadableFormat: an extension that nothing here reads.
        Exception: content that is not what the extension says or takes more than :mod:`fourm.data.limits` allow, mostly
            ValueError or OSError.
    """
    extensions = PurePath(filename).name.lower().split(".")[1:]
    compressed = extensions[-1:] == ["gz"]
    if compressed:
        extensions.pop()
    extension = extensions[-1] if extensions else ""
    if extension not in FORMATS:
        raise UnreadableFormat(
            f"{filename}: cannot read files that end in '.{extension}' (known: {', '.join(FORMATS)}; each also with .gz)"
        )
    if compressed:
        content = _decompressed(content, MAX_TEXT_BYTES if extension in (*_TEXTS, "json") else MAX_ARRAY_BYTES)
    return FORMATS[extension](content)


def _decompressed(content: bytes, most: int) -> bytes:
    """What gzip compressed, without ever making more than ``most`` bytes of it."""
    parts: list[bytes] = []
    room = most
    while content:
        stream = zlib.decompressobj(wbits=31)  # gzip, whose checksum it compares
        parts.append(stream.decompress(content, room + 1))
        room -= len(parts[-1])
        if room < 0:
            raise ValueError(f"more than {most} bytes when decompressed")
        if not stream.eof:
            raise EOFError("the compressed file ends too early")
        content = stream.unused_data.lstrip(b"\0")  # another stream, or padding
    return parts[0] if len(parts) == 1 else b"".join(parts)


def parse_json(content: bytes) -> Any:
    """The value of a JSON text.

    Raises:
        ValueError: it is none, too long, nested too deep, or has half a character (a lone surrogate) in it.
    """
    if len(content) > MAX_TEXT_BYTES:
        raise ValueError(f"{len(content)} bytes of JSON are more than {MAX_TEXT_BYTES}")
    try:
        # Given bytes, json would let encoded halves of characters pass.
        value = json.loads(content.decode(json.detect_encoding(content)))
        if b"\\ud" in content or b"\\uD" in content:  # only so they can be written
            json.dumps(value, ensure_ascii=False).encode("utf-8")
    except RecursionError:
        raise ValueError("JSON that is nested too deep") from None
    return value


def _read_text(content: bytes) -> str:
    if len(content) > MAX_TEXT_BYTES:
        raise ValueError(f"{len(content)} bytes of text are more than {MAX_TEXT_BYTES}")
    return content.decode("utf-8").strip()


def _read_npy(content: bytes | memoryview) -> np.ndarray | ObjectArray:
    """``np.load`` without running pickles, ten times as fast: a data set has few headers, and each is parsed once."""
    if content[:6] != b"\x93NUMPY":
        raise ValueError("not an npy file")
    start = 10 if content[6] == 1 else 12  # format version 1 counts the header's bytes in 2 bytes, later ones in 4
    end = start + int.from_bytes(content[8:start], "little")
    if end - start > MAX_NPY_HEADER:
        raise ValueError(f"an npy header of {end - start} bytes, more than {MAX_NPY_HEADER}")
    dtype, order, shape = _parse_npy_header(bytes(content[start:end]))
    if dtype.hasobject:
        return ObjectArray(content[end:])
    return np.frombuffer(content, dtype, math.prod(shape), end).reshape(shape, order=order)


@lru_cache(maxsize=1024)
def _parse_npy_header(header: bytes) -> tuple[np.dtype, Literal["C", "F"], tuple[int, ...]]:
    fields = ast.literal_eval(header.decode("utf-8"))
    dtype, shape = np.dtype(fields["descr"]), fields["shape"]
    # Of an array without any bytes the other sides could be of any length, and loops over them would not end.
    if not all(type(side) is int and 0 <= side < (2**20 if 0 in shape else 2**48) for side in shape):
        raise ValueError(f"an npy file of shape {shape!r:.80}")
    return dtype, "F" if fields["fortran_order"] else "C", shape


def _read_npz(content: bytes) -> dict[str, np.ndarray | ObjectArray]:
    """``np.load`` without running pickles, or copying what is not compressed."""
    with zipfile.ZipFile(io.BytesIO(content)) as archive:
        members = archive.infolist()
        if len(members) > MAX_NPZ_MEMBERS:
            raise ValueError(f"{len(members)} arrays in one npz file, more than {MAX_NPZ_MEMBERS}")
        if (total := sum(info.file_size for info in members)) > max(MAX_ARRAY_BYTES, len(content)):
            raise ValueError(f"an npz file of {total} bytes when decompressed, more than {MAX_ARRAY_BYTES}")
        files = {info.filename.removesuffix(".npy"): _unzipped(content, archive, info) for info in members}
    return {name: _read_npy(file) for name, file in files.items()}


def _unzipped(content: bytes, archive: zipfile.ZipFile, info: zipfile.ZipInfo) -> bytes | memoryview:
    if info.compress_type != zipfile.ZIP_STORED:
        if info.compress_type != zipfile.ZIP_DEFLATED:  # numpy writes no other, and zipfile bounds no other
            raise zipfile.BadZipFile(f"{info.filename} is compressed by method {info.compress_type}")
        with archive.open(info) as packed:
            return packed.read(info.file_size)  # without a number all of it would be decompressed at once
    # Before the file stand 30 bytes, its name and further fields; the lengths of these two end the 30.
    name, more = struct.unpack_from("<HH", content, info.header_offset + 26)
    start = info.header_offset + 30 + name + more
    file = memoryview(content)[start : start + info.file_size]
    if zlib.crc32(file) != info.CRC:
        raise zipfile.BadZipFile(f"{info.filename} is damaged")
    return file


FORMATS: dict[str, Callable[[bytes], Any]] = {
    **dict.fromkeys(IMAGE_EXTENSIONS, bytes),
    **dict.fromkeys(_TEXTS, _read_text),
    "json": parse_json,
    "npy": _read_npy,
    "npz": _read_npz,
}
"""Extension → what reads it; a plugin adds its own. ``bytes`` are images, which stay encoded."""
