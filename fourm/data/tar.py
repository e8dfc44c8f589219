"""The headers of tars: v7, ustar, GNU and pax, as tar and ``tarfile`` read them, several times as fast as the latter.

One zero block is damage, two or more are the end of an archive, which another may follow. After a damaged header reading
goes on at the next good one. Everything that can be read is given; then the damage is an error.
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
_WINDOW = 8 * _BLOCK  # read at once: a header, and what often stands around it (extended header, the next small member)
_CHUNK = 2**20
_MOST_EXTENDED = 2**20  # bytes of a long name or of extended attributes
_FILES, _WITHOUT_DATA, _EXTENDED = b"0\x007", b"123456", b"LKxgX"
_COMPRESSED = {b"\x1f\x8b": "gzip", b"\x28\xb5\x2f\xfd": "zstd", b"\xfd7zXZ": "xz", b"BZh": "bzip2", b"PK\3\4": "zip"}

# Name and size of a file as nearly all are written: of kind 0, in octal digits, the name in one piece.
_USUAL = re.compile(rb"(?=([^\0]{1,100})).{124}([0-7]{11})[ \0].{20}0.{188}\0", re.DOTALL)


class DamagedTar(tarfile.ReadError):
    """Some or all of a tar cannot be read.

    Attributes:
        problems: what is wrong, in the order of the file.
    """

    def __init__(self, problems: list[str]):
        more = f"; and {len(problems) - 3} more" if len(problems) > 3 else ""
        super().__init__("; ".join(problems[:3]) + more)
        self.problems = problems


class _Link(NamedTuple):
    name: str
    target: str


def read_members(descriptor: int) -> Iterator[tuple[str, int, int]]:
    """Name, offset and size of the files in the tar that is open as ``descriptor``; links have those of their target.

    Raises:
        DamagedTar: it is not a tar, cut off or damaged; after everything that can be read has been given.
    """
    problems: list[str] = []
    links: list[_Link] = []
    yield from _scan(descriptor, problems, links)
    if links:
        files = {posixpath.normpath(name): place for name, *place in _scan(descriptor, [], [])}
        yield from _resolved(links, files, problems)
    if problems:
        raise DamagedTar(problems)


def _scan(descriptor: int, problems: list[str], links: list[_Link]) -> Iterator[tuple[str, int, int]]:
    end = os.fstat(descriptor).st_size
    window, window_start, position = b"", 0, 0
    extended, shared = dict[str, str](), dict[str, str]()
    match = _USUAL.match
    unnamed = ended = False  # a name was lost; the mark at the end was seen
    while position + _BLOCK <= end:
        at = position - window_start
        if at + _BLOCK > len(window):
            window, window_start, at = os.pread(descriptor, _WINDOW, position), position, 0
        header = window[at : at + _BLOCK]
        good = adler32(header) & 0xFFFF == _sum_asked_for(header[148:156])
        if good and header[156] == 48 and not (extended or shared or unnamed) and (usual := match(header)):
            name, digits = usual.groups()
            data, size = position + _BLOCK, int(digits, 8)
            if data + size <= end:
                position, ended = data + (size + 511 & -_BLOCK), False
                yield name.decode("utf-8", "surrogateescape"), data, size
                continue
        if not good and not _is_header(header):
            following, ended = _after_gap(descriptor, position, end, header, problems)
            if following is None:
                break
            position, extended, unnamed = following, {}, False
            continue
        ended = False
        kind = header[156]
        try:
            size = 0 if kind in _WITHOUT_DATA else _number(header[124:136])
            if kind not in _EXTENDED and (extended or shared):
                size = int(extended.get("size") or shared.get("size") or size) if kind not in _WITHOUT_DATA else 0
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
        if kind in _EXTENDED:
            try:
                if size > _MOST_EXTENDED:
                    raise ValueError
                at = data - window_start
                content = window[at : at + size] if at + size <= len(window) else os.pread(descriptor, size, data)
                _extend(kind, content, extended, shared)
            except ValueError:
                problems.append(f"a damaged or too large extended header at byte {header_at}")
                unnamed = True
            continue
        name = extended.get("path") or shared.get("path") or _plain_name(header)
        if unnamed:
            pass  # counted with the header that is damaged
        elif kind == 83 or "sparse" in extended:
            problems.append(f"{name!r} is stored as a sparse file, which cannot be read: pack it without --sparse")
            if kind == 83 and header[482]:
                position = _after_sparse_map(descriptor, data, end) + position - data
        elif kind in _FILES:
            if kind or not name.endswith("/"):  # in v7 a slash makes a folder
                yield name, data, size
        elif kind in b"12":
            target = extended.get("linkpath") or shared.get("linkpath") or _text(header[157:257])
            links.append(_Link(name, target if kind == 49 else posixpath.join(posixpath.dirname(name), target)))
        extended, unnamed = {}, False
    else:
        if compression := _compression(os.pread(descriptor, 8, 0)) if position == 0 else None:
            problems.append(compression)
        elif not ended:
            problems.append(f"cut off at byte {end}, before the mark at the end of an archive")


@lru_cache(maxsize=4096)
def _sum_asked_for(field: bytes) -> int:
    """The lower half of Adler-32, which is the sum of the bytes and 1, of a block that ``field`` is the right checksum of."""
    try:
        return int(field[:6], 8) + sum(field) - 255
    except ValueError:
        return -1


def _is_header(block: bytes) -> bool:
    """Whether the checksum in a block is right: the sum of its bytes, its own eight counted as spaces."""
    field = block[148:156]
    try:
        expected = int(field.split(b"\0", 1)[0] or field.strip(b"\0 "), 8)
    except ValueError:
        return False
    if (adler32(block) & 0xFFFF) - sum(field) + 255 == expected:  # the lower half of Adler-32 is the sum, and 1
        return True
    signed = sum(block) - sum(field) + 256 - 256 * sum(byte > 127 for byte in block)  # of some old programs
    return signed == expected or sum(block) - sum(field) + 256 == expected


def _after_gap(descriptor: int, position: int, end: int, block: bytes, problems: list[str]) -> tuple[int | None, bool]:
    """Where headers go on after a block that is none, and whether the end of an archive lies between."""
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
    if blocks == 1 or following is not None:  # else it is what follows the end
        problems.append(f"{blocks} zero blocks in place of a header at byte {start}")
    return following, True


def _compression(block: bytes) -> str | None:
    """What to say of a file that begins so, if it is compressed."""
    kind = next((name for magic, name in _COMPRESSED.items() if block.startswith(magic)), None)
    return f"it is compressed with {kind}, and shards are read at any place: decompress it" if kind else None


def _end_of_zeros(descriptor: int, position: int, end: int) -> int:
    """The first block from ``position`` on that is not all zeros."""
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
    """Octal digits, or a big-endian number behind the byte 0x80."""
    if field[0] & 0x80:
        return int.from_bytes(field[1:], "big") if field[0] == 0x80 else -1
    return int(field.split(b"\0", 1)[0].strip() or b"0", 8)


def _text(field: bytes) -> str:
    return field.split(b"\0", 1)[0].decode("utf-8", "surrogateescape")


def _plain_name(header: bytes) -> str:
    # GNU tars, magic "ustar ", keep other things where ustar keeps the prefix.
    prefix = _text(header[345:500]) if header[345] and header[257:263] == b"ustar\0" else ""
    return f"{prefix}/{_text(header[:100])}" if prefix else _text(header[:100])


def _extend(kind: int, content: bytes, extended: dict[str, str], shared: dict[str, str]) -> None:
    """Add what an extended header says of the next member, or of all (``g``); of two, the first holds."""
    if kind == 76:
        extended.setdefault("path", _text(content))
    elif kind == 75:
        extended.setdefault("linkpath", _text(content))
    elif b"path=" in content or b"size=" in content or b"sparse" in content:  # most are about times only
        records = _pax_records(content)
        if kind == 103:
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


def _after_sparse_map(descriptor: int, position: int, end: int) -> int:
    """Where the data of an old GNU sparse file begin, whose map needs more blocks."""
    while position + _BLOCK <= end:
        more = os.pread(descriptor, 1, position + 504)
        position += _BLOCK
        if more in (b"", b"\0"):
            break
    return position


def _resolved(links: list[_Link], files: dict[str, list[int]], problems: list[str]) -> Iterator[tuple[str, int, int]]:
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
