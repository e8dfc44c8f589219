"""One sample on disk: where its members lie, and their values once somebody asks for them.

A :class:`RawSample` is a reference. Where a sample is repeated it keeps its values, once they are read and decoded, and
goes away with the last of the repeats.
"""

from __future__ import annotations

import io
import os
from collections import OrderedDict
from collections.abc import Mapping
from pathlib import Path
from typing import Any, NamedTuple

from fourm.data.decoding import EncodedImage, decode_value
from fourm.data.presence import Presence
from fourm.data.remote import ShardCache
from fourm.utils.errors import DataError
from fourm.utils.transfer import shown


class Member(NamedTuple):
    """A file, or a part of one."""

    path: str
    extension: str  # all that follows the first dot: "jpg", "json.gz"
    offset: int = 0
    size: int | None = None  # None: up to the end of the file
    cache: ShardCache | None = None  # of a file in a store, whose URL is the path


class BadSample(Exception):
    """A sample that cannot be read; it is skipped and, unless it is ``tolerated``, counted under ``reason``."""

    def __init__(self, reason: str, detail: str, tolerated: bool = False):
        super().__init__(f"{reason}: {detail}")
        self.reason, self.tolerated = reason, tolerated


class OpenFiles:
    """Reads parts of files and keeps the most recent of them open."""

    def __init__(self, limit: int = 64):
        self._limit = limit
        self._open: OrderedDict[str, io.FileIO] = OrderedDict()

    def read(self, member: Member) -> bytes:
        """The bytes of ``member``.

        Raises:
            OSError: the file cannot be read, or ends before the member does.
            UserError: the store cannot be read.
        """
        if member.cache:
            assert member.size is not None
            return member.cache.read(member.path, member.offset, member.size)
        if member.size is None:
            return Path(member.path).read_bytes()
        file = self._open.pop(member.path, None) or io.FileIO(member.path)
        self._open[member.path] = file
        if len(self._open) > self._limit:
            self._open.popitem(last=False)[1].close()
        data = os.pread(file.fileno(), member.size, member.offset)
        if len(data) != member.size:
            raise OSError(f"the file ends within the member at byte {member.offset}")
        return data

    def __reduce__(self) -> tuple:
        return OpenFiles, (self._limit,)  # a worker process opens its own


class RawSample:
    """The members of one sample, by the name of the modality that they belong to."""

    __slots__ = ("_values", "key", "members")

    def __init__(self, key: str, members: Mapping[str, Member]):
        self.key = key
        self.members = members
        self._values: dict[str, Any] | None = None

    def values(self, files: OpenFiles, keep_pixels: bool) -> dict[str, Any]:
        """The decoded members, ``{modality: value}``; to be read only.

        Args:
            keep_pixels: keep the values, and the pixels of images, for further calls. Images are :class:`EncodedImage`, and
                otherwise each use of one decodes as much as it needs.

        Raises:
            BadSample: a member is missing, cut off or not what its extension says.
            DataError: no value can be read from files with this extension.
        """
        values = self._values or {name: self._value(name, files, keep_pixels) for name in self.members}
        if keep_pixels:
            self._values = values
        return values

    def _value(self, name: str, files: OpenFiles, keep_pixels: bool) -> Any:
        member = self.members[name]
        try:
            content = files.read(member)
        except OSError as error:
            raise BadSample("unreadable member", f"{self.where(name)}: {error.strerror or error}") from error
        try:
            value = decode_value(f"member.{member.extension}", content)
            return EncodedImage(value, keep_pixels) if isinstance(value, bytes) else value
        except DataError as error:
            raise DataError(f"{self.where(name)}: {error}") from error
        except Exception as error:  # whatever a decoder stumbles over, the bytes are at fault
            if member.cache and member.cache.renewed(member.path):
                return self._value(name, files, keep_pixels)
            raise BadSample("corrupt member", f"{self.where(name)}: {error}") from error

    def where(self, name: str) -> str:
        """File and key of modality ``name``, or of the sample's first one, for messages."""
        path = self.members.get(name, next(iter(self.members.values()))).path
        return f"{shown(path)}: key '{self.key}'"


def join(columns: Mapping[str, Mapping[str, Member]], presence: Presence) -> tuple[list[RawSample], list[str]]:
    """The samples that can be used, and the keys of the others.

    Args:
        columns: modality → key → member.
    """
    samples, incomplete = [], []
    for key in dict.fromkeys(key for index in columns.values() for key in index):
        members = {name: index[key] for name, index in columns.items() if key in index}
        if usable := presence.usable(members, columns):
            samples.append(RawSample(key, {name: members[name] for name in usable}))
        else:
            incomplete.append(key)
    return samples, incomplete
