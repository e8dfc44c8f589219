"""Decode the bytes of a shard member or file into the raw value of a modality."""

from __future__ import annotations

import ast
import io
import json
import math
import struct
import zipfile
import zlib
from collections.abc import Callable
from functools import cache, lru_cache
from types import ModuleType
from typing import Any, Literal

import numpy as np

from fourm.data.images import EncodedImage
from fourm.data.limits import MAX_ARRAY_BYTES, MAX_NPY_HEADER, MAX_NPZ_MEMBERS, MAX_TEXT_BYTES
from fourm.data.object_arrays import ObjectArray

__all__ = ["FORMATS", "IMAGE_EXTENSIONS", "EncodedImage", "UnreadableFormat", "decode_value", "parse_json"]

IMAGE_EXTENSIONS = ("jpg", "jpeg", "png", "webp", "bmp", "tif", "tiff")
_DIGITS_AS_ZEROS = bytes(byte if byte == 46 else 48 if 48 <= byte < 58 else 32 for byte in range(256))
_LONG_INTEGER = b" " + b"0" * 19
_TEXTS = ("txt", "text", "cls")  # cls: a class index, as webdataset writes it


class UnreadableFormat(ValueError):
    """Raised for a file whose extension is not supported."""


def decode_value(filename: str, content: bytes) -> Any:
    """Decode a file by its extension, which may be double (``json.gz``).

    Images stay encoded, because whether, where and at which resolution to decode them depends on the crop and the
    budgets.

    Returns:
        ``bytes`` for an image, ``str`` for txt and cls, an array for npy (an :class:`ObjectArray` if it holds objects),
        a dict of arrays for npz, and the parsed value for json.

    Raises:
        UnreadableFormat: The extension is not supported.
        Exception: The content does not match the extension or exceeds :mod:`fourm.data.limits`; mostly a ValueError or
            OSError.
    """
    extension, compressed = _extension_of(filename)
    if extension not in FORMATS:
        raise UnreadableFormat(
            f"{filename}: cannot read files with extension '.{extension}' "
            f"(supported: {', '.join(FORMATS)}; each also with .gz)"
        )
    if compressed:
        content = _decompress(content, MAX_TEXT_BYTES if extension in (*_TEXTS, "json") else MAX_ARRAY_BYTES)
    return FORMATS[extension](content)


@lru_cache(maxsize=1024)
def _extension_of(filename: str) -> tuple[str, bool]:
    """Return the extension of a file without ``.gz``, and whether it ends with that."""
    extensions = filename.rpartition("/")[2].lower().split(".")[1:]
    compressed = extensions[-1:] == ["gz"]
    if compressed:
        extensions.pop()
    return extensions[-1] if extensions else "", compressed


def _decompress(content: bytes, max_bytes: int) -> bytes:
    """Decompress gzip data; more than ``max_bytes`` is an error that is raised before more memory is taken."""
    parts: list[bytes] = []
    room = max_bytes
    while content:
        stream = zlib.decompressobj(wbits=31)  # 31: gzip format with a checked checksum
        parts.append(stream.decompress(content, room + 1))
        room -= len(parts[-1])
        if room < 0:
            raise ValueError(f"more than {max_bytes} bytes when decompressed")
        if not stream.eof:
            raise EOFError("the compressed file is cut off")
        content = stream.unused_data.lstrip(b"\0")  # another gzip stream, or padding
    return parts[0] if len(parts) == 1 else b"".join(parts)


def parse_json(content: bytes) -> Any:
    """Parse a JSON text.

    Raises:
        ValueError: The text is not JSON, is too long, is nested too deeply, or contains a lone surrogate.
    """
    if len(content) > MAX_TEXT_BYTES:
        raise ValueError(f"{len(content)} bytes of JSON exceed the limit of {MAX_TEXT_BYTES}")
    try:
        value = _load_json(content)
        if b"\\ud" in content or b"\\uD" in content:  # escapes are the only other way to write lone surrogates
            json.dumps(value, ensure_ascii=False).encode("utf-8")
    except RecursionError:
        raise ValueError("the JSON is nested too deeply") from None
    return value


def _load_json(content: bytes) -> Any:
    """Parse a JSON text with ``orjson`` if it is installed and certainly gives the same value as ``json``."""
    package = _orjson()
    # orjson turns integers beyond 64 bits into floats. Fractions with as many digits follow a dot.
    if package is not None and _LONG_INTEGER not in b" " + content.translate(_DIGITS_AS_ZEROS):
        try:
            return package.loads(content)
        except ValueError:  # NaN, another encoding, a lone surrogate, or damaged: json decides
            pass
    # Decoded here, because json.loads would accept encoded lone surrogates in bytes.
    return json.loads(content.decode(json.detect_encoding(content)))


@cache
def _orjson() -> ModuleType | None:
    """Return the optional package that parses JSON in a fraction of the time."""
    try:
        import orjson
    except ImportError:
        return None
    return orjson


def _read_text(content: bytes) -> str:
    if len(content) > MAX_TEXT_BYTES:
        raise ValueError(f"{len(content)} bytes of text exceed the limit of {MAX_TEXT_BYTES}")
    return content.decode("utf-8").strip()


def _read_npy(content: bytes | memoryview) -> np.ndarray | ObjectArray:
    """Read an npy file without executing pickles, ten times as fast as ``np.load`` because headers are cached."""
    if content[:6] != b"\x93NUMPY":
        raise ValueError("not an npy file")
    start = (
        10 if content[6] == 1 else 12
    )  # the header length takes 2 bytes in format version 1, and 4 bytes in later versions
    end = start + int.from_bytes(content[8:start], "little")
    if end - start > MAX_NPY_HEADER:
        raise ValueError(f"an npy header of {end - start} bytes exceeds the limit of {MAX_NPY_HEADER}")
    dtype, order, shape = _parse_npy_header(bytes(content[start:end]))
    if dtype.hasobject:
        return ObjectArray(content[end:])
    return np.frombuffer(content, dtype, math.prod(shape), end).reshape(shape, order=order)


@lru_cache(maxsize=1024)
def _parse_npy_header(header: bytes) -> tuple[np.dtype, Literal["C", "F"], tuple[int, ...]]:
    fields = ast.literal_eval(header.decode("utf-8"))
    dtype, shape = np.dtype(fields["descr"]), fields["shape"]
    # In an empty array, the other sides could have any length, and loops over them would not end.
    if not all(type(side) is int and 0 <= side < (2**20 if 0 in shape else 2**48) for side in shape):
        raise ValueError(f"invalid shape {shape!r:.80} of an npy file")
    return dtype, "F" if fields["fortran_order"] else "C", shape


def _read_npz(content: bytes) -> dict[str, np.ndarray | ObjectArray]:
    """Read an npz file without executing pickles, and without copying uncompressed arrays."""
    with zipfile.ZipFile(io.BytesIO(content)) as archive:
        members = archive.infolist()
        if len(members) > MAX_NPZ_MEMBERS:
            raise ValueError(f"{len(members)} arrays in one npz file exceed the limit of {MAX_NPZ_MEMBERS}")
        total = sum(info.file_size for info in members)
        if total > max(MAX_ARRAY_BYTES, len(content)):
            raise ValueError(f"an npz file of {total} bytes when decompressed exceeds the limit of {MAX_ARRAY_BYTES}")
        files = {info.filename.removesuffix(".npy"): _unzip(content, archive, info) for info in members}
    return {name: _read_npy(file) for name, file in files.items()}


def _unzip(content: bytes, archive: zipfile.ZipFile, info: zipfile.ZipInfo) -> bytes | memoryview:
    if info.compress_type != zipfile.ZIP_STORED:
        if info.compress_type != zipfile.ZIP_DEFLATED:  # numpy writes only this one, and zipfile bounds only this one
            raise zipfile.BadZipFile(f"{info.filename} uses the unsupported compression method {info.compress_type}")
        with archive.open(info) as packed:
            return packed.read(info.file_size)  # without a size, everything would be decompressed at once
    # A 30-byte header, the name and an extra field precede the file; the header ends with the lengths of the latter
    # two.
    name_length, extra_length = struct.unpack_from("<HH", content, info.header_offset + 26)
    start = info.header_offset + 30 + name_length + extra_length
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
"""Extension → decoder, to which plugins may add. ``bytes`` marks images, which stay encoded."""
