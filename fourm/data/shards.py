"""Index the samples of tar shards by reading only the tar headers.

A *shard* is one tar with every modality (``KEY.MODALITY.EXT``) or one tar per modality folder (``KEY.EXT``), joined by
key.
"""

from __future__ import annotations

import io
import itertools
from collections import defaultdict
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path

from fourm.data.bad_samples import BadSampleLedger
from fourm.data.layout import assign_folders, expand, is_remote, shard_patterns, split_data_path
from fourm.data.names import MemberNames, common_folder, is_clutter, is_part_of_another, is_readable, split_name
from fourm.data.presence import Presence
from fourm.data.raw_sample import Member, MemberIndex, RawSample, join, leave_out
from fourm.data.regular_files import open_regular, version_of
from fourm.data.shard_cache import RemoteOptions, ShardCache
from fourm.data.tar import DamagedTar, read_members
from fourm.utils.errors import UserError
from fourm.utils.seeds import generator
from fourm.utils.urls import redact_url


def tar_members(path: str, cache: ShardCache | None = None) -> Iterator[tuple[str, int, int]]:
    """Yield the name, offset and size of each file in a tar, in file order, and then of each link.

    Args:
        path: A local path or, with a ``cache``, a URL.
        cache: The cache for a tar in an object store.

    Raises:
        OSError: The file cannot be read.
        UserError: The object store cannot be read.
        DamagedTar: The file is not a tar, is cut off or is damaged. Raised after all readable members were yielded.
    """
    with _open(path, cache) as file:
        yield from read_members(file.fileno())


def members_of(path: str, cache: ShardCache | None = None) -> Iterator[tuple[str, Member]]:
    """Yield the name and location of each file in a tar like :func:`tar_members`; the extension is left empty."""
    with _open(path, cache) as file:
        version = None if cache else version_of(file.fileno())
        for name, offset, size in read_members(file.fileno()):
            yield name, Member(path, "", offset, size, cache, version)


def _open(path: str, cache: ShardCache | None) -> io.FileIO:
    return cache.open(path) if cache else open_regular(path)


class Shards:
    """The shards that a ``data_path`` names.

    Args:
        data_path: ``root/[rgb,caption]/shard-{00000..00099}.tar``, or without brackets for tars with every modality.
        wanted: The modalities to read and their default folder names.
        name_map: Folder → modality where the names differ.
        presence: Rules for which samples are used. The default uses only samples with every modality.
        remote: Options for reading from object stores.
        known: Further modality names that may stand between key and extension.

    Raises:
        UserError: ``data_path`` does not exist, or lacks a modality.
    """

    def __init__(
        self,
        data_path: str,
        wanted: Mapping[str, str],
        name_map: Mapping[str, str] | None = None,
        presence: Presence | None = None,
        remote: RemoteOptions | None = None,
        known: Iterable[str] = (),
    ):
        self._presence = presence or Presence()
        self._names = MemberNames([*wanted, *wanted.values(), *known], name_map)
        pattern, folders = split_data_path(data_path)
        self._cache = ShardCache(remote or RemoteOptions()) if is_remote(data_path) else None
        shards: list[dict[str | None, str]]
        if folders is None:
            shards = [{None: path} for path in expand(pattern, None)]
            self._folders = assign_folders(wanted, self._folders_inside(shards), name_map, redact_url(data_path))
        else:
            self._folders = assign_folders(wanted, folders, name_map, redact_url(data_path))
            used = dict.fromkeys(self._folders.values())
            rows = shard_patterns(pattern, used)
            shards = [{folder: row.replace("\0", folder) for folder in used} for row in rows]
            columns = {folder: [shard[folder] for shard in shards] for folder in used}
            for paths in columns.values():
                if self._cache:
                    self._cache.describe(paths[0])
                elif not any(Path(path).exists() for path in paths):
                    raise UserError(f"data_path {data_path}: there is no {paths[0]}")
        self._shards = shards

    def draw(self, key: tuple, stream: int, num_streams: int, ledger: BadSampleLedger) -> Iterator[RawSample]:
        """Yield the endless samples of one stream: shards drawn with replacement, each read from start to end.

        Args:
            key: Seeds of the order besides the stream: (seed, epoch, …).
        """
        rng = generator(*key, "shards", stream)
        for shard in self._fetched(self._shards[rng.integers(len(self._shards))] for _ in itertools.count()):
            yield from self._join(shard, ledger)

    def all(self, ledger: BadSampleLedger) -> list[RawSample]:
        """Return every sample once, in the order of the shards."""
        samples = [sample for shard in self._fetched(self._shards) for sample in self._join(shard, ledger)]
        ledger.joined(0, {}, final=True)
        return samples

    def _fetched(self, shards: Iterable[dict[str | None, str]]) -> Iterable[dict[str | None, str]]:
        return self._cache.ahead(shards) if self._cache else shards

    def _join(self, shard: Mapping[str | None, str], ledger: BadSampleLedger) -> list[RawSample]:
        """Return the usable samples of a shard in the order of the tars."""
        indexes: dict[str, MemberIndex] = {}
        damage: dict[str, int] = {}  # path → number of damaged places
        for folder, path in shard.items():
            members, problem, damaged_places = self._index(path, folder)
            indexes.update(members)
            if problem:
                ledger.warn(path, f"{redact_url(path)}: {problem}; the samples that it should contain are skipped")
            if damaged_places:
                damage[path] = damaged_places
        paths = {name: shard.get(folder) or shard[None] for name, folder in self._folders.items()}
        columns = {name: indexes.get(folder, MemberIndex()) for name, folder in self._folders.items()}
        for name, index in columns.items():
            if index.collisions:
                ledger.warn(
                    f"collision {paths[name]} {name}", f"{redact_url(paths[name])}: {index.collision()}; skipped"
                )
        columns = self._without_wrappers(columns)
        whole, bad = leave_out(columns, [name for name, path in paths.items() if path in damage])
        if damage:
            bad["damaged shard"] = max(bad.get("damaged shard", 0), sum(damage.values()))
        samples, incomplete = join(whole, self._presence)
        tolerated = self._presence.missing != "error"
        for name in columns if incomplete and not tolerated else ():
            lacking = [key for key in incomplete if key not in columns[name]]
            if lacking:
                more = f" and {len(lacking) - 1} more keys" if len(lacking) > 1 else ""
                message = f"{redact_url(paths[name])}: no {self._folders[name]} for key {lacking[0]!r}{more}; skipped"
                ledger.warn(f"join {paths[name]} {name}", message)
        total = len(samples) + len(incomplete) + sum(bad.values())
        if not tolerated:
            bad["missing member"] = len(incomplete) if total else 1
        ledger.joined(max(total, 1), bad, (len(incomplete) if total else 1) if tolerated else 0)
        return samples

    def _without_wrappers(self, columns: dict[str, MemberIndex]) -> dict[str, MemberIndex]:
        """Strip the folder that each tar was made from (``x/rgb/1`` → ``1``) if no key occurs in all columns.

        Apart from modality names, there must be at most one such folder: ``train/1`` and ``val/1`` stay two samples.
        """
        filled = [index for index in columns.values() if index]
        if not any("/" in next(iter(index)) for index in filled):
            return columns
        if any(all(key in index for index in filled) for key in filled[0]):
            return columns
        wrappers = {name: common_folder(index) for name, index in columns.items()}
        others = [
            "".join(f"/{part}" for part in wrapper.split("/") if part not in (name, self._folders[name], ""))
            for name, wrapper in wrappers.items()
        ]
        if not all(max(others, key=len).endswith(other) for other in others):
            return columns
        return {name: index.below(wrappers[name]) if wrappers[name] else index for name, index in columns.items()}

    def _folders_inside(self, shards: list[dict[str | None, str]]) -> list[str]:
        """Return the modalities in the first tar that can be read."""
        for shard in shards:
            index = self._index(shard[None], None)[0]
            if index:
                return list(index)
        problem = self._index(shards[0][None], None)[1]
        raise UserError(f"data_path {redact_url(shards[0][None])}: {problem or 'the tar is empty'}")

    def _index(self, path: str, folder: str | None) -> tuple[dict[str, MemberIndex], str | None, int]:
        """Index a tar.

        Args:
            path: Path or URL of the tar.
            folder: The folder that all members belong to; None if each member names its modality.

        Returns:
            Folder → members, a description of the damage or None, and the number of damaged places.
        """
        index: defaultdict[str, MemberIndex] = defaultdict(MemberIndex)
        problem, places = None, 0
        try:
            with _open(path, self._cache) as file:
                version = None if self._cache else version_of(file.fileno())
                if folder is None:
                    for name, offset, size in read_members(file.fileno()):
                        if not is_clutter(name):
                            own_folder, key, extension, exact = self._names.split(name)
                            member = Member(path, extension, offset, size, self._cache, version)
                            index[own_folder].add(key, member, exact)
                else:
                    own = (folder, *(name for name, assigned in self._folders.items() if assigned == folder))
                    single = index[folder]
                    for name, offset, size in read_members(file.fileno()):
                        if not is_clutter(name):
                            key, extension = split_name(name, own)
                            member = Member(path, extension, offset, size, self._cache, version)
                            single.add(key, member, is_readable(extension))
        except (DamagedTar, OSError) as error:
            if self._cache and self._cache.repair(path):
                return self._index(path, folder)
            if isinstance(error, DamagedTar):
                problem, places = str(error), len(error.problems)
            else:
                problem, places = error.strerror or str(error), int(not isinstance(error, FileNotFoundError))
        for members in index.values():
            members.complete()
        if folder is None:
            _drop_parts(index)
        return index, problem, places


def _drop_parts(index: dict[str, MemberIndex]) -> None:
    """Remove members like ``0001.depth.png`` beside ``0001.png``: a modality that is not read, not another sample."""
    for name, members in index.items():
        for key in [key for key in members if "." in key and is_part_of_another(key, members)]:
            if not any(key in others for other, others in index.items() if other != name):
                del members[key]
