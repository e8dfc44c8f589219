"""One sample on disk: where its members lie, and their values once somebody asks for them.

A :class:`RawSample` is a reference. Where a sample is repeated it keeps its values, once they are read and decoded, and
goes away with the last of the repeats.
"""

from __future__ import annotations

import io
import os
from collections import OrderedDict
from collections.abc import Collection, Mapping
from typing import Any, NamedTuple

from fourm.data.decoding import EncodedImage, UnreadableFormat, decode_value
from fourm.data.presence import Presence
from fourm.data.regular_files import FileVersion, open_regular, version_of
from fourm.data.shard_cache import ShardCache
from fourm.utils.errors import UserError
from fourm.utils.urls import redact_url

MOST_BYTES = 2**30
"""Of one member or file."""


class Member(NamedTuple):
    """A file, or a part of one."""

    path: str
    extension: str  # "jpg", "json.gz"
    offset: int = 0
    size: int | None = None  # None: up to the end of the file
    cache: ShardCache | None = None  # of a file in a store, whose URL is the path
    version: FileVersion | None = None  # of the file when its members were found


class MemberIndex(dict[str, Member]):
    """Key → member, of one modality.

    Attributes:
        collisions: key → two members of it; neither is in the index once it is complete.
    """

    def __init__(self) -> None:
        super().__init__()
        self.collisions: dict[str, tuple[Member, Member]] = {}
        self._others: dict[str, list[Member]] = {}

    def add(self, key: str, member: Member, preferred: bool = True) -> None:
        """Add a member; one that is not ``preferred`` counts only where its key has no other."""
        if not preferred:
            self._others.setdefault(key, []).append(member)
        elif (first := self.setdefault(key, member)) is not member:
            self.collisions.setdefault(key, (first, member))

    def complete(self) -> MemberIndex:
        """Settle what was added."""
        for key, (first, *more) in self._others.items():
            if key not in self:
                self[key] = first
                if more:
                    self.collisions[key] = (first, more[0])
        self._others = {}
        for key in self.collisions:
            del self[key]
        return self

    def below(self, folder: str) -> MemberIndex:
        """The same members with keys that go on after ``folder``, which all of them are in."""
        start, index = len(folder) + 1, MemberIndex()
        index.update({key[start:]: member for key, member in self.items()})
        index.collisions = {key.removeprefix(f"{folder}/"): members for key, members in self.collisions.items()}
        return index

    def collision(self) -> str:
        """The first of the collisions, for messages."""
        key, (first, second) = next(iter(self.collisions.items()))
        more = f"; so have {len(self.collisions) - 1} more" if len(self.collisions) > 1 else ""
        if first.size is None:
            return f"key {key!r} has two files, {first.path} and {second.path}{more}"
        return f"key {key!r} has two members, .{first.extension} and .{second.extension}{more}"


class BadSample(Exception):
    """A sample that cannot be read; it is skipped and, unless it is ``tolerated``, counted under ``reason``."""

    def __init__(self, reason: str, detail: str, tolerated: bool = False):
        super().__init__(f"{reason}: {detail}")
        self.reason, self.tolerated = reason, tolerated


class OpenFiles:
    """Reads parts of files and keeps the most recent of them open."""

    def __init__(self, limit: int = 128):  # the tars of 21 modalities in six shards
        self._limit = limit
        self._open: OrderedDict[str, io.FileIO] = OrderedDict()

    def read(self, member: Member) -> bytes:
        """The bytes of ``member``.

        Raises:
            OSError: the file cannot be read, or ends before the member does.
            UserError: the store cannot be read, or the file was replaced since its members were found.
        """
        if member.cache:
            assert member.size is not None
            return member.cache.read(member.path, member.offset, member.size)
        if member.size is None:
            with open_regular(member.path) as file:
                if os.fstat(file.fileno()).st_size > MOST_BYTES:
                    raise OSError(f"it has more than {MOST_BYTES >> 20} MiB")
                return file.readall()
        if member.size > MOST_BYTES:
            raise OSError(f"it has more than {MOST_BYTES >> 20} MiB")
        file = self._open.pop(member.path) if member.path in self._open else open_regular(member.path)
        if member.version and version_of(file.fileno()) != member.version:
            file.close()
            file = open_regular(member.path)
            if version_of(file.fileno()) != member.version:
                file.close()
                raise UserError(
                    f"{member.path} was replaced or changed while its samples waited to be read: start again, and put "
                    "new data into new files"
                )
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
        except UnreadableFormat as error:
            raise BadSample("unreadable format", f"{self.where(name)}: {error}") from error
        except Exception as error:  # whatever a decoder stumbles over, the bytes are at fault
            if member.cache and member.cache.renewed(member.path):
                return self._value(name, files, keep_pixels)
            raise BadSample("corrupt member", f"{self.where(name)}: {error}") from error

    def where(self, name: str) -> str:
        """File and key of modality ``name``, or of the sample's first one, for messages."""
        path = self.members.get(name, next(iter(self.members.values()))).path
        return f"{redact_url(path)}: key '{self.key}'"


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


def leave_out(
    columns: Mapping[str, MemberIndex], damaged: Collection[str] = ()
) -> tuple[dict[str, Mapping[str, Member]], dict[str, int]]:
    """The columns without the keys of bad samples, and the number of these by reason.

    Args:
        columns: modality → its members.
        damaged: those of the columns that lack what their damaged file should have held.
    """
    twice = set[str]().union(*(index.collisions for index in columns.values()))
    lost = set[str]()
    for name in damaged:
        lost |= set[str]().union(*columns.values()) - columns[name].keys()
    lost -= twice
    if not twice and not lost:
        return dict(columns), {}
    bad = {"two members of one key": len(twice), "damaged shard": len(lost)}
    left = {
        name: {key: member for key, member in index.items() if key not in twice and key not in lost}
        for name, index in columns.items()
    }
    return dict(left), {reason: count for reason, count in bad.items() if count}
