"""Read the headers of v7, ustar, GNU and pax tars like ``tarfile`` does, but several times as fast.

A single zero block counts as damage. Two or more zero blocks end an archive, and another archive may follow. After a
damaged header, reading continues at the next valid one. All readable members are returned before the damage is raised.
"""

from __future__ import annotations

import contextlib
import os
import posixpath
import re
import tarfile
from collections.abc import Iterator
from functools import lru_cache
from typing import NamedTuple
from zlib import adler32

_BLOCK = 512
_ZEROS = bytes(_BLOCK)
_WINDOW = 8 * _BLOCK  # bytes per read: a header and what is usually next to it (extended header, next small member)
_CHUNK = 2**20
_MAX_EXTENDED_BYTES = 2**20  # limit for a long name or extended attributes
_FILES, _WITHOUT_DATA, _EXTENDED = b"0\x007", b"123456", b"LKxgX"
_COMPRESSED = {b"\x1f\x8b": "gzip", b"\x28\xb5\x2f\xfd": "zstd", b"\xfd7zXZ": "xz", b"BZh": "bzip2", b"PK\3\4": "zip"}

# The common form of a file header: type 0, size in octal digits, name not split into a prefix.
_USUAL = re.compile(rb"(?=([^\0]{1,100})).{124}([0-7]{11})[ \0].{20}0.{188}\0", re.DOTALL)


class DamagedTar(tarfile.ReadError):
    """Raised when a tar cannot be read, or only in part.

    Attributes:
        problems: Descriptions of the damage, in file order.
    """

    def __init__(self, problems: list[str]):
        more = f"; and {len(problems) - 3} more" if len(problems) > 3 else ""
        super().__init__("; ".join(problems[:3]) + more)
        self.problems = problems


class _Link(NamedTuple):
    name: str
    target: str


def read_members(descriptor: int) -> Iterator[tuple[str, int, int]]:
    """Yield the name, offset and size of each file in an open tar; a link has the offset and size of its target.

    Raises:
        DamagedTar: The file is not a tar, is cut off or is damaged. Raised after all readable members were yielded.
    """
    problems: list[str] = []
    links: list[_Link] = []
    yield from _scan(descriptor, problems, links)
    if links:
        files = {posixpath.normpath(name): place for name, *place in _scan(descriptor, [], [])}
        yield from _resolve_links(links, files, problems)
    if problems:
        raise DamagedTar(problems)


def _scan(descriptor: int, problems: list[str], links: list[_Link]) -> Iterator[tuple[str, int, int]]:
    end = os.fstat(descriptor).st_size
    window, window_start, position = b"", 0, 0
    extended, shared = dict[str, str](), dict[str, str]()
    match = _USUAL.match
    unnamed, ended = False, False  # the member's name was lost; the end-of-archive mark was seen
    while position + _BLOCK <= end:
        at = position - window_start
        if at + _BLOCK > len(window):
            window, window_start, at = os.pread(descriptor, _WINDOW, position), position, 0
        header = window[at : at + _BLOCK]
        good = adler32(header) & 0xFFFF == _expected_sum(header[148:156])
        if good and header[156] == 48 and not (extended or shared or unnamed) and (usual := match(header)):
            name, digits = usual.groups()
            data, size = position + _BLOCK, int(digits, 8)
            if data + size <= end:
                position, ended = data + (size + 511 & -_BLOCK), False
                yield name.decode("utf-8", "surrogateescape"), data, size
                continue
        if not good and not _is_header(header):
            following, ended = _skip_gap(descriptor, position, end, header, problems)
            if following is None:
                break
            position, extended, unnamed = following, {}, False
            continue
        ended = False
        type_flag = header[156]
        try:
            size = 0 if type_flag in _WITHOUT_DATA else _number(header[124:136])
            if type_flag not in _EXTENDED and (extended or shared):
                size = int(extended.get("size") or shared.get("size") or size) if type_flag not in _WITHOUT_DATA else 0
            if size < 0:
                raise ValueError
        except ValueError:
            problems.append(f"a damaged header at byte {position}")
            position, extended, unnamed = position + _BLOCK, {}, False
            continue
        header_at, data = position, position + _BLOCK
        position = data + (size + 511) // _BLOCK * _BLOCK
        if data + size > end:
            problems.append(f"cut off within a member at byte {end}")
            return
        if type_flag in _EXTENDED:
            try:
                if size > _MAX_EXTENDED_BYTES:
                    raise ValueError
                at = data - window_start
                content = window[at : at + size] if at + size <= len(window) else os.pread(descriptor, size, data)
                _read_extended_header(type_flag, content, extended, shared)
            except ValueError:
                problems.append(f"a damaged or too large extended header at byte {header_at}")
                unnamed = True
            continue
        name = extended.get("path") or shared.get("path") or _plain_name(header)
        if unnamed:
            pass  # already reported with its damaged header
        elif type_flag == 83 or "sparse" in extended:
            problems.append(f"{name!r} is a sparse file, which is not supported; pack it without --sparse")
            if type_flag == 83 and header[482]:
                position = _skip_sparse_map(descriptor, data, end) + position - data
        elif type_flag in _FILES:
            if type_flag or not name.endswith("/"):  # in v7, a trailing slash marks a folder
                yield name, data, size
        elif type_flag in b"12":
            target = extended.get("linkpath") or shared.get("linkpath") or _text(header[157:257])
            links.append(_Link(name, target if type_flag == 49 else posixpath.join(posixpath.dirname(name), target)))
        extended, unnamed = {}, False
    else:
        if compression := _compression(os.pread(descriptor, 8, 0)) if position == 0 else None:
            problems.append(compression)
        elif not ended:
            problems.append(f"cut off at byte {end}: the end-of-archive mark is missing")


@lru_cache(maxsize=4096)
def _expected_sum(field: bytes) -> int:
    """Return the lower half of Adler-32 (1 + the sum of all bytes) of a block whose checksum ``field`` is correct."""
    try:
        return int(field[:6], 8) + sum(field) - 255
    except ValueError:
        return -1


def _is_header(block: bytes) -> bool:
    """Check a block's checksum: the sum of its bytes, where the checksum field itself counts as eight spaces."""
    field = block[148:156]
    try:
        expected = int(field.split(b"\0", 1)[0] or field.strip(b"\0 "), 8)
    except ValueError:
        return False
    if (adler32(block) & 0xFFFF) - sum(field) + 255 == expected:  # the lower half of Adler-32 is the sum + 1
        return True
    signed = (
        sum(block) - sum(field) + 256 - 256 * sum(byte > 127 for byte in block)
    )  # some old programs sum signed bytes
    return signed == expected or sum(block) - sum(field) + 256 == expected


def _skip_gap(descriptor: int, position: int, end: int, block: bytes, problems: list[str]) -> tuple[int | None, bool]:
    """Return where the next header is after an invalid block, and whether an end of archive lies in between."""
    if block != _ZEROS:
        following = _next_header(descriptor, position + _BLOCK, end)
        if following is None and position == 0:
            problems.append(_compression(block) or "not a tar file, or a damaged one (header at byte 0)")
        else:
            problems.append(f"a damaged header at byte {position}")
        return following, False
    start, position = position, _end_of_zeros(descriptor, position, end)
    if position + _BLOCK > end:
        return None, True
    blocks = (position - start) // _BLOCK
    if _is_header(os.pread(descriptor, _BLOCK, position)):
        if blocks == 1:
            problems.append(f"a lone zero block at byte {start}")
        return position, True
    following = _next_header(descriptor, position, end)
    if blocks == 1 or following is not None:  # otherwise this is padding after the end
        problems.append(f"{blocks} zero blocks in place of a header at byte {start}")
    return following, True


def _compression(block: bytes) -> str | None:
    """Return a description of the problem if a file that begins with ``block`` is compressed."""
    compression = next((name for magic, name in _COMPRESSED.items() if block.startswith(magic)), None)
    return f"compressed with {compression}, but shards need random access; decompress it" if compression else None


def _end_of_zeros(descriptor: int, position: int, end: int) -> int:
    """Return the offset of the first non-zero block at or after ``position``."""
    while position < end:
        with contextlib.suppress(OSError):
            position = max(position, os.lseek(descriptor, position, getattr(os, "SEEK_DATA", 3)) // _BLOCK * _BLOCK)
        chunk = os.pread(descriptor, _CHUNK, position)
        zeros = len(chunk) - len(chunk.lstrip(b"\0"))
        if zeros < len(chunk) or not chunk:
            return position + zeros // _BLOCK * _BLOCK
        position += zeros
    return end


def _next_header(descriptor: int, position: int, end: int) -> int | None:
    while position + _BLOCK <= end:
        chunk = os.pread(descriptor, _CHUNK, position)
        for at in range(0, len(chunk) - _BLOCK + 1, _BLOCK):
            if chunk[at + 148 : at + 154].strip(b" \0").isdigit() and _is_header(chunk[at : at + _BLOCK]):
                return position + at
        position += max(len(chunk) // _BLOCK, 1) * _BLOCK
    return None


def _number(field: bytes) -> int:
    """Parse octal digits, or a big-endian number after the byte 0x80."""
    if field[0] & 0x80:
        return int.from_bytes(field[1:], "big") if field[0] == 0x80 else -1
    return int(field.split(b"\0", 1)[0].strip() or b"0", 8)


def _text(field: bytes) -> str:
    return field.split(b"\0", 1)[0].decode("utf-8", "surrogateescape")


def _plain_name(header: bytes) -> str:
    # GNU tars (magic "ustar ") store other fields where ustar stores the prefix.
    prefix = _text(header[345:500]) if header[345] and header[257:263] == b"ustar\0" else ""
    return f"{prefix}/{_text(header[:100])}" if prefix else _text(header[:100])


def _read_extended_header(type_flag: int, content: bytes, extended: dict[str, str], shared: dict[str, str]) -> None:
    """Add the fields of an extended header for the next member, or for all members (``g``); the first value wins."""
    if type_flag == 76:
        extended.setdefault("path", _text(content))
    elif type_flag == 75:
        extended.setdefault("linkpath", _text(content))
    elif b"path=" in content or b"size=" in content or b"sparse" in content:  # most extended headers hold only times
        records = _pax_records(content)
        if type_flag == 103:
            shared.update(records)
        else:
            for key, value in records.items():
                extended.setdefault("sparse" if key.startswith("GNU.sparse") else key, value)
            if "size" in records:
                int(records["size"])


def _pax_records(content: bytes) -> dict[str, str]:
    records, at = {}, 0
    while at < len(content) and content[at]:
        space = content.index(b" ", at, at + 20)
        record_end = at + int(content[at:space])
        if record_end <= space + 1 or record_end > len(content) or content[record_end - 1] != 10:
            raise ValueError
        key, _, value = content[space + 1 : record_end - 1].partition(b"=")
        records[key.decode("utf-8", "surrogateescape")] = value.decode("utf-8", "surrogateescape")
        at = record_end
    return records


def _skip_sparse_map(descriptor: int, position: int, end: int) -> int:
    """Return where the data of an old GNU sparse file begin if its map takes further blocks."""
    while position + _BLOCK <= end:
        more = os.pread(descriptor, 1, position + 504)
        position += _BLOCK
        if more in (b"", b"\0"):
            break
    return position


def _resolve_links(
    links: list[_Link], files: dict[str, list[int]], problems: list[str]
) -> Iterator[tuple[str, int, int]]:
    targets = {posixpath.normpath(link.name): posixpath.normpath(link.target) for link in links}
    folders: set[str] | None = None
    for link in links:
        target, steps = posixpath.normpath(link.target), 0
        while target not in files and target in targets and steps < 40:
            target, steps = targets[target], steps + 1
        if target in files:
            offset, size = files[target]
            yield link.name, offset, size
            continue
        if folders is None:
            folders = {posixpath.dirname(name) for name in files}
        if target not in folders:
            problems.append(f"{link.name!r} is a link to {link.target!r}, which is not in the tar")
