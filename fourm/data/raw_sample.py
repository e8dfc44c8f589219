"""A sample on disk: the location of its members, and their values once they are needed.

A :class:`RawSample` is a reference. If a sample is repeated, it keeps its decoded and preprocessed values until its
last repeat is done.
"""

from __future__ import annotations

import io
import os
from collections import OrderedDict
from collections.abc import Callable, Collection, Mapping
from typing import Any, NamedTuple

import numpy as np

from fourm.data.decoding import EncodedImage, UnreadableFormat, decode_value
from fourm.data.presence import Presence
from fourm.data.regular_files import FileVersion, open_regular, version_of
from fourm.data.shard_cache import ShardCache
from fourm.utils.errors import UserError
from fourm.utils.urls import redact_url

MAX_MEMBER_BYTES = 2**30
"""Maximum size of one member or file."""


class Member(NamedTuple):
    """A file, or a part of one."""

    path: str
    extension: str  # "jpg", "json.gz"
    offset: int = 0
    size: int | None = None  # None: until the end of the file
    cache: ShardCache | None = None  # set if the file is in an object store; ``path`` is then its URL
    version: FileVersion | None = None  # version of the file when it was indexed


class MemberIndex(dict[str, Member]):
    """The members of one modality by key.

    Attributes:
        collisions: Key → two members that share it; neither of them is in the completed index.
    """

    def __init__(self) -> None:
        super().__init__()
        self.collisions: dict[str, tuple[Member, Member]] = {}
        self._others: dict[str, list[Member]] = {}

    def add(self, key: str, member: Member, preferred: bool = True) -> None:
        """Add a member; one that is not ``preferred`` is used only if its key has no other."""
        if not preferred:
            self._others.setdefault(key, []).append(member)
        elif (first := self.setdefault(key, member)) is not member:
            self.collisions.setdefault(key, (first, member))

    def complete(self) -> MemberIndex:
        """Choose between preferred and other members, remove collisions, and return the index."""
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
        """Return the same members with keys relative to ``folder``, which must contain all of them."""
        start, index = len(folder) + 1, MemberIndex()
        index.update({key[start:]: member for key, member in self.items()})
        index.collisions = {key.removeprefix(f"{folder}/"): members for key, members in self.collisions.items()}
        return index

    def collision(self) -> str:
        """Describe the first collision and count the others, for messages."""
        key, (first, second) = next(iter(self.collisions.items()))
        more = f"; {len(self.collisions) - 1} more keys collide" if len(self.collisions) > 1 else ""
        if first.size is None:
            return f"key {key!r} has two files, {first.path} and {second.path}{more}"
        return f"key {key!r} has two members, .{first.extension} and .{second.extension}{more}"


class BadSample(Exception):
    """Raised for a sample that cannot be used. It is skipped and, unless ``tolerated``, counted under ``reason``."""

    def __init__(self, reason: str, detail: str, tolerated: bool = False):
        super().__init__(f"{reason}: {detail}")
        self.reason, self.tolerated = reason, tolerated


class OpenFiles:
    """Reads members and keeps the most recently used files open."""

    def __init__(self, limit: int = 128):  # enough for the tars of 21 modalities in six shards
        self._limit = limit
        self._open: OrderedDict[str, io.FileIO] = OrderedDict()

    def read(self, member: Member) -> bytes:
        """Return the bytes of ``member``.

        Raises:
            OSError: The file cannot be read, or ends before the member does.
            UserError: The object store cannot be read, or the file was replaced after it was indexed.
        """
        if member.cache:
            assert member.size is not None
            return member.cache.read(member.path, member.offset, member.size)
        if member.size is None:
            with open_regular(member.path) as file:
                if os.fstat(file.fileno()).st_size > MAX_MEMBER_BYTES:
                    raise OSError(f"larger than the limit of {MAX_MEMBER_BYTES >> 20} MiB")
                return file.readall()
        if member.size > MAX_MEMBER_BYTES:
            raise OSError(f"larger than the limit of {MAX_MEMBER_BYTES >> 20} MiB")
        file = self._open.pop(member.path) if member.path in self._open else open_regular(member.path)
        if member.version and version_of(file.fileno()) != member.version:
            file.close()
            file = open_regular(member.path)
            if version_of(file.fileno()) != member.version:
                file.close()
                raise UserError(
                    f"{member.path} was replaced or changed after it was indexed; restart the run, and write new data "
                    "to new files"
                )
        self._open[member.path] = file
        if len(self._open) > self._limit:
            self._open.popitem(last=False)[1].close()
        data = os.pread(file.fileno(), member.size, member.offset)
        if len(data) != member.size:
            raise OSError(f"the file ends within the member at byte {member.offset}")
        return data

    def __reduce__(self) -> tuple:
        return OpenFiles, (self._limit,)  # each worker process opens its own files


class RawSample:
    """The members of one sample by modality."""

    __slots__ = ("_prepared", "_values", "key", "members")

    def __init__(self, key: str, members: Mapping[str, Member]):
        self.key = key
        self.members = members
        self._values: dict[str, Any] | None = None
        self._prepared: dict[str, Any] | None = None

    def values(self, files: OpenFiles, keep_pixels: bool) -> dict[str, Any]:
        """Return the decoded members, ``{modality: value}``, which callers must not modify.

        Args:
            keep_pixels: Keep the values, and the pixels of images, for later calls. Otherwise each use of an image (an
                :class:`EncodedImage`) decodes what it needs.

        Raises:
            BadSample: A member is missing, cut off or does not match its extension.
        """
        values = self._values or {name: self._value(name, files, keep_pixels) for name in self.members}
        if keep_pixels:
            self._values = values
        return values

    def prepared(
        self, files: OpenFiles, prepare: Callable[[dict[str, Any]], dict[str, Any]], keep: bool
    ) -> dict[str, Any]:
        """Return the result of ``prepare`` for the values of the sample, which callers must not modify.

        Args:
            files: See :meth:`values`.
            prepare: What is the same for all repeats of the sample.
            keep: Keep the result, in place of the values, for later calls.
        """
        if self._prepared is not None:
            return self._prepared
        prepared = prepare(self.values(files, keep))
        if keep:
            for value in prepared.values():
                if isinstance(value, np.ndarray):
                    value.flags.writeable = False
            self._prepared, self._values = prepared, None
        return prepared

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
        except Exception as error:  # decoders raise many types of errors for corrupt bytes
            if member.cache and member.cache.repair(member.path):
                return self._value(name, files, keep_pixels)
            raise BadSample("corrupt member", f"{self.where(name)}: {error}") from error

    def where(self, name: str) -> str:
        """Return the file and key of modality ``name``, or of the first modality, for messages."""
        path = self.members.get(name, next(iter(self.members.values()))).path
        return f"{redact_url(path)}: key '{self.key}'"


def join(columns: Mapping[str, Mapping[str, Member]], presence: Presence) -> tuple[list[RawSample], list[str]]:
    """Join the modalities by key; return the usable samples and the keys of the others.

    Args:
        columns: Modality → key → member.
        presence: Decides which samples are usable.
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
    """Remove the keys of bad samples; return the remaining columns and the number of bad samples by reason.

    Args:
        columns: Modality → its members.
        damaged: Modalities whose damaged file lacks some of their members.
    """
    twice = set[str]().union(*(index.collisions for index in columns.values()))
    lost = set[str]()
    for name in damaged:
        lost |= set[str]().union(*columns.values()) - columns[name].keys()
    lost -= twice
    if not twice and not lost:
        return dict(columns), {}
    bad = {"two members of one key": len(twice), "damaged shard": len(lost)}
    remaining: dict[str, Mapping[str, Member]] = {
        name: {key: member for key, member in index.items() if key not in twice and key not in lost}
        for name, index in columns.items()
    }
    return remaining, {reason: count for reason, count in bad.items() if count}
