"""Tar shards: which samples they hold, found by reading nothing but the headers.

A *shard* is one tar with every modality (``KEY.MODALITY.EXT``) or one tar per modality folder (``KEY.EXT``), joined by key.
"""

from __future__ import annotations

import itertools
import os
import tarfile
from collections import defaultdict
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path

from fourm.data.bad_samples import BadSampleLedger
from fourm.data.layout import assign_folders, expand, is_remote, split_data_path, split_member
from fourm.data.presence import Presence
from fourm.data.raw_sample import Member, RawSample, join
from fourm.data.remote import RemoteOptions, ShardCache
from fourm.utils.errors import UserError
from fourm.utils.seeds import generator
from fourm.utils.transfer import shown

_BLOCK = 512
_WINDOW = 8 * _BLOCK  # read at once: a header, and what often stands around it (extended header, the next small member)


def tar_members(path: str, cache: ShardCache | None = None) -> Iterator[tuple[str, int, int]]:
    """Name, offset and size of the regular files in a tar (ustar, GNU and pax names), in their order.

    Several times as fast as ``tarfile``, which builds an object with all metadata for each member.

    Args:
        cache: of a tar in a store.

    Raises:
        OSError: the file cannot be read.
        UserError: the store cannot be read.
        tarfile.ReadError: it is not a tar, or it is cut off (after everything before has been given).
    """
    with cache.open(path) if cache else open(path, "rb", buffering=0) as file:
        descriptor, end = file.fileno(), os.fstat(file.fileno()).st_size
        window, window_start, position = b"", 0, 0
        long_name, pax = None, dict[str, str]()
        while position + _BLOCK <= end:
            header = window[position - window_start : position - window_start + _BLOCK]
            if len(header) < _BLOCK:
                window, window_start = os.pread(descriptor, _WINDOW, position), position
                header = window[:_BLOCK]
            if not header[0]:
                return  # the zero blocks at the end
            kind, is_file = header[156:157], header[156:157] in (b"0", b"\0", b"7")
            try:
                size = int(pax["size"]) if is_file and "size" in pax else _number(header[124:136])
                if header[257:262] != b"ustar" or size < 0:
                    raise ValueError
                position += _BLOCK
                if position + size > end:
                    raise tarfile.ReadError(f"cut off within a member at byte {end}")
                if is_file:
                    yield pax.get("path") or long_name or _plain_name(header), position, size
                    long_name, pax = None, {}
                elif kind == b"L":
                    long_name = _text(os.pread(descriptor, size, position))
                elif kind == b"x":
                    pax = _pax_records(os.pread(descriptor, size, position))
            except ValueError:
                raise tarfile.ReadError(f"not a tar file, or a damaged one (header at byte {position})") from None
            position += -(-size // _BLOCK) * _BLOCK
        raise tarfile.ReadError(f"cut off at byte {end}, before the mark at the end of an archive")


def _number(field: bytes) -> int:
    """Octal digits, or a big-endian number behind the byte 0x80."""
    return int.from_bytes(field[1:], "big") if field[0] == 0x80 else int(field.strip(b" \0") or b"0", 8)


def _text(field: bytes) -> str:
    return field.split(b"\0", 1)[0].decode("utf-8", "surrogateescape")


def _plain_name(header: bytes) -> str:
    # GNU tars, magic "ustar ", keep other things where ustar keeps the prefix.
    prefix = _text(header[345:500]) if header[345] and header[257:263] == b"ustar\0" else ""
    return f"{prefix}/{_text(header[:100])}" if prefix else _text(header[:100])


def _pax_records(data: bytes) -> dict[str, str]:
    records = {}
    while b"path=" in data or b"size=" in data:  # most are about times only
        length = int(data[: data.index(b" ")])
        if length < 1:
            raise ValueError
        key, _, value = data[:length].partition(b" ")[2].rstrip(b"\n").partition(b"=")
        records[key.decode()] = value.decode("utf-8", "surrogateescape")
        data = data[length:]
    return records


class Shards:
    """The shards that a ``data_path`` names.

    Args:
        data_path: ``root/[rgb,caption]/shard-{00000..00099}.tar``, or without brackets for tars with every modality.
        wanted: the modalities to read and their usual folder names.
        name_map: folder → modality where the names differ.
        presence: which samples are used; unless given, those that have everything.
        remote: how to read from stores.

    Raises:
        UserError: nothing lies at ``data_path``, or a modality is not there.
    """

    def __init__(
        self, data_path: str, wanted: Mapping[str, str], name_map: Mapping[str, str] | None = None,
        presence: Presence | None = None, remote: RemoteOptions | None = None,
    ):  # fmt: skip
        self._presence = presence or Presence()
        pattern, folders = split_data_path(data_path)
        self._cache = ShardCache(remote or RemoteOptions()) if is_remote(data_path) else None
        shards: list[dict[str | None, str]]
        if folders is None:
            shards = [{None: path} for path in expand(pattern, None)]
            self._folders = assign_folders(wanted, self._folders_inside(shards), name_map, shown(data_path))
        else:
            self._folders = assign_folders(wanted, folders, name_map, shown(data_path))
            columns = {folder: expand(pattern, folder) for folder in self._folders.values()}
            shards = [dict(zip(columns, row, strict=True)) for row in zip(*columns.values(), strict=True)]
            for paths in columns.values():
                if self._cache:
                    self._cache.describe(paths[0])
                elif not any(Path(path).exists() for path in paths):
                    raise UserError(f"data_path {data_path}: there is no {paths[0]}")
        self._shards = shards

    def draw(self, key: tuple, stream: int, num_streams: int, ledger: BadSampleLedger) -> Iterator[RawSample]:
        """Endless samples of one stream: shards drawn with replacement, each from its first sample to its last.

        Args:
            key: what the order depends on beside the stream: (seed, epoch, …).
        """
        rng = generator(*key, "shards", stream)
        for shard in self._fetched(self._shards[rng.integers(len(self._shards))] for _ in itertools.count()):
            yield from self._join(shard, ledger)

    def all(self, ledger: BadSampleLedger) -> list[RawSample]:
        """Every sample once, in the order of the shards."""
        samples = [sample for shard in self._fetched(self._shards) for sample in self._join(shard, ledger)]
        ledger.joined(0, 0, final=True, tolerated=self._presence.missing == "skip")
        return samples

    def _fetched(self, shards: Iterable[dict[str | None, str]]) -> Iterable[dict[str | None, str]]:
        return self._cache.ahead(shards) if self._cache else shards

    def _join(self, shard: Mapping[str | None, str], ledger: BadSampleLedger) -> list[RawSample]:
        """The samples of a shard that can be used, in their order in the tars."""
        indexes: dict[str, dict[str, Member]] = {}
        for folder, path in shard.items():
            index, problem = self._index(path, folder)
            indexes.update(index)
            if problem:
                ledger.warn(path, f"{shown(path)}: {problem}")
        columns = {name: indexes.get(folder, {}) for name, folder in self._folders.items()}
        samples, incomplete = join(columns, self._presence)
        tolerated = self._presence.missing == "skip"
        if incomplete and not tolerated:
            folder = next(self._folders[name] for name, index in columns.items() if incomplete[0] not in index)
            path = shard.get(folder) or shard[None]
            more = f" and {len(incomplete) - 1} more keys are" if len(incomplete) > 1 else " is"
            ledger.warn(f"join {path}", f"{shown(path)}: no {folder} for key '{incomplete[0]}', which{more} skipped")
        total = len(samples) + len(incomplete)
        ledger.joined(max(total, 1), len(incomplete) if total else 1, tolerated=tolerated)
        return samples

    def _folders_inside(self, shards: list[dict[str | None, str]]) -> list[str]:
        """The modalities in the first tar that can be read."""
        for shard in shards:
            index, _ = self._index(shard[None], None)
            if index:
                return list(index)
        problem = self._index(shards[0][None], None)[1]
        raise UserError(f"data_path {shown(shards[0][None])}: {problem or 'the tar is empty'}")

    def _index(self, path: str, folder: str | None) -> tuple[dict[str, dict[str, Member]], str | None]:
        """What a tar holds as folder → key → member, and what is wrong with it.

        Args:
            folder: the one folder that all members belong to; None if each names its own.
        """
        index: defaultdict[str, dict[str, Member]] = defaultdict(dict)
        problem = None
        try:
            for name, offset, size in tar_members(path, self._cache):
                own_folder, key, extension = split_member(name, folder)
                first = index[own_folder].setdefault(key, Member(path, extension, offset, size, self._cache))
                if first.offset != offset:
                    problem = f"key '{key}' has two members, .{first.extension} and .{extension}; the first is used"
        except (OSError, tarfile.ReadError) as error:
            if self._cache and self._cache.renewed(path):
                return self._index(path, folder)
            problem = f"{getattr(error, 'strerror', None) or error}; what it should hold is skipped"
        return index, problem
