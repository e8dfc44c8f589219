"""Convert folders of files to tar shards and back, add a modality to shards, and split tars by modality.

    python -m fourm.tools.pack shards FOLDERS SHARDS --shard_size 1000
    python -m fourm.tools.pack add    FOLDERS SHARDS --modalities depth
    python -m fourm.tools.pack folders SHARDS FOLDERS
    python -m fourm.tools.pack split   TARS SHARDS --modalities jpg txt

Samples are matched by key, and nothing is written before every key is known to be in every modality. Files are renamed
to their final names once they are complete, and the same command continues where an interrupted one stopped. Existing
files are never overwritten: it is an error if their content differs from what would be written.
"""

from __future__ import annotations

import io
import tarfile
from collections import Counter, defaultdict
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path, PurePosixPath
from typing import Literal

from tqdm import tqdm

from fourm.data.folders import index_folder
from fourm.data.layout import existing_folders
from fourm.data.modality_info import MODALITY_INFO
from fourm.data.names import MemberNames, is_clutter, split_name
from fourm.data.raw_sample import Member, OpenFiles
from fourm.data.shards import members_of
from fourm.utils.config import resolve_options
from fourm.utils.errors import UserError, did_you_mean, run_cli
from fourm.utils.files import atomic_path, lock_folder
from fourm.utils.options import option, parse_options
from fourm.utils.paths import AnyPath

ShardKeys = dict[str, list[str]]
"""Shard → the keys of its samples in order."""


@dataclass(frozen=True)
class PackOptions:
    """Options of packing and unpacking."""

    action: Literal["shards", "add", "folders", "split"] = option(
        "what to write: shards, folders, another modality for shards (add), or a shard per modality of tars with all "
        "modalities (split)"
    )
    source: AnyPath = option("folder with a folder per modality; for 'split', folder with tars")
    output: AnyPath = option("folder for a folder per modality; for 'add', folder of the existing shards")
    modalities: tuple[str, ...] = option("names of the folders (default: all; required for 'add')", ())
    shard_size: int = option("samples per shard", 1000, at_least=1, at_most=10**9)
    skip_incomplete: bool = option("leave out keys that a modality lacks instead of stopping", False)

    def __post_init__(self) -> None:
        resolve_options(self)
        if self.action == "add" and not self.modalities:
            raise UserError("'add' needs 'modalities': the folders to add to the shards")


def pack(options: PackOptions) -> int:
    """Pack or unpack.

    Returns:
        The number of files (tars, or unpacked files) that this call wrote.

    Raises:
        UserError: Keys do not match, a file is damaged, an existing file differs, or the disk reports an error.
    """
    try:
        return _pack(options)
    except OSError as error:
        raise UserError(f"{error.filename or options.output}: {error.strerror or error}") from error


def _pack(options: PackOptions) -> int:
    source, output = Path(options.source), Path(options.output)
    shards, files = _read_combined_tars(source, options.modalities) if options.action == "split" else ({}, {})
    available = list(files) or existing_folders(source)
    for name in options.modalities:
        if name not in available:
            raise UserError(
                f"{source}: no folder '{name}'{did_you_mean(name, available)}; there are {', '.join(available)}"
            )
    names = list(options.modalities or available)
    if not names:
        raise UserError(f"{source}: contains no folders; each modality must be a folder")
    if source.resolve() == output.resolve():
        raise UserError(f"'source' and 'output' are the same folder, {source}")
    if options.action == "add" and not output.is_dir():
        raise UserError(f"{output}: there are no shards to add to")
    output.mkdir(parents=True, exist_ok=True)
    lock_folder(output)
    for leftover in (path for name in names for path in (output / name).rglob(".tmp-*")):
        leftover.unlink()  # from a process that was killed; the lock ensures that no other process is writing
    if options.action == "folders":
        return _unpack(source, output, names)
    files = {name: files.get(name) or _files(source, name) for name in names}
    if options.action == "split":
        used = _common_keys(files, options.skip_incomplete)
        shards = {shard: [key for key in keys if key in used] for shard, keys in shards.items()}
    elif options.action == "add":
        shards = _existing_shards(output, exclude=names)
        _require(files, [key for keys in shards.values() for key in keys], f"the shards in {output}")
    else:
        shards = _new_shards(files, options.shard_size, options.skip_incomplete)
    return _write_shards(output, shards, files)


def _read_combined_tars(source: Path, modalities: Sequence[str]) -> tuple[ShardKeys, dict[str, dict[str, Member]]]:
    """Index tars that contain all modalities.

    Args:
        source: Folder of the tars.
        modalities: Modalities to use; empty = all.

    Returns:
        The keys of each tar, and modality → key → member.
    """
    declared = {name: info["path"] or name for name, info in MODALITY_INFO.items()}
    names = MemberNames([*modalities, *declared, *declared.values()])
    shards: ShardKeys = {}
    files: defaultdict[str, dict[str, Member]] = defaultdict(dict)
    for path in sorted(source.glob("*.tar")):
        keys: dict[str, None] = {}
        for member_name, member in _members(path):
            name, key, extension, _ = names.split(member_name)
            if modalities and name not in modalities:
                continue
            keys[key] = None
            member = member._replace(extension=extension)
            first = files[name].setdefault(key, member)
            if first is not member:
                raise UserError(f"{path}: key {key!r} has a second {name}; the first is in {first.path}")
        shards[path.name] = list(keys)
    if not files:
        raise UserError(f"{source}: contains no tars, or only empty ones")
    return shards, dict(files)


def _files(source: Path, name: str) -> dict[str, Member]:
    """Index the files of one modality by key."""
    if any((source / name).glob("*.tar")):
        raise UserError(f"{source / name}: contains shards instead of files; the action 'folders' unpacks them")
    index = index_folder(str(source / name), (name,))
    if index.collisions:
        raise UserError(f"{source / name}: {index.collision()}")
    if not index:
        raise UserError(f"{source / name}: contains no files")
    return index


def _new_shards(files: Mapping[str, Mapping[str, Member]], shard_size: int, skip_incomplete: bool) -> ShardKeys:
    keys = sorted(_common_keys(files, skip_incomplete))
    starts = range(0, len(keys), shard_size)
    return {f"shard-{i:05d}.tar": keys[start : start + shard_size] for i, start in enumerate(starts)}


def _common_keys(files: Mapping[str, Mapping[str, Member]], skip_incomplete: bool) -> set[str]:
    """Return the keys that every modality has; other keys are left out or an error."""
    keys = set[str]().union(*files.values())
    if not skip_incomplete:
        _require(files, sorted(keys), "the other modalities", "; set 'skip_incomplete' to leave out such keys")
        return keys
    common = keys.intersection(*files.values())
    if not common:
        raise UserError(f"no key occurs in all of {', '.join(files)}")
    return common


def _require(files: Mapping[str, Mapping[str, Member]], keys: Sequence[str], where: str, advice: str = "") -> None:
    for name, members in files.items():
        missing = [key for key in keys if key not in members]
        if missing:
            raise UserError(
                f"modality {name} has no file for key '{missing[0]}' of {where} (and {len(missing) - 1} more){advice}"
            )


def _existing_shards(root: Path, exclude: Sequence[str]) -> ShardKeys:
    """Return the keys of the existing shards in the order of the first modality; all modalities must have the same."""
    shards_of = {name: _keys(root / name) for name in existing_folders(root) if name not in exclude}
    shards_of = {name: shards for name, shards in shards_of.items() if shards}
    if not shards_of:
        raise UserError(f"{root}: there are no shards to add to")
    first, shards = next(iter(shards_of.items()))
    for name, other in shards_of.items():
        for shard in sorted(shards.keys() | other.keys()):
            differing = sorted(set(shards.get(shard, ())) ^ set(other.get(shard, ())))
            if differing:
                raise UserError(f"{root}: {first}/{shard} and {name}/{shard} differ in key '{differing[0]}'")
    return shards


def _keys(folder: Path) -> ShardKeys:
    return {path.name: _keys_of(path, folder.name) for path in sorted(folder.glob("*.tar"))}


def _keys_of(path: Path, name: str) -> list[str]:
    """Return the keys in a tar of modality ``name``."""
    keys = [split_name(member, (name,))[0] for member, _ in _members(path)]
    repeated = [key for key, number in Counter(keys).items() if number > 1]
    if repeated:
        raise UserError(f"{path}: key {repeated[0]!r} has two members")
    return keys


def _members(path: Path) -> list[tuple[str, Member]]:
    """Return the names and locations of a tar's members; damage is an error, so that no loss becomes permanent."""
    try:
        return [(name, member) for name, member in members_of(str(path)) if not is_clutter(name)]
    except tarfile.ReadError as error:
        raise UserError(f"{path}: {error}") from error


def _write_shards(output: Path, shards: ShardKeys, files: Mapping[str, Mapping[str, Member]]) -> int:
    """Write all shards of all modalities; existing ones must have the same content.

    Returns:
        The number of shards that were written.

    Raises:
        UserError: An existing file differs, or is not one of the shards.
    """
    pending = []
    for name in files:
        for path in sorted((output / name).glob("*.tar")) if (output / name).is_dir() else ():
            if path.name not in shards:
                raise UserError(f"{path} exists but is not one of the shards; choose another output, or remove it")
        pending += [(name, shard) for shard in shards]
    written = 0
    with tqdm(total=len(pending), desc=str(output), unit=" shards", disable=None) as bar:
        for name, shard in pending:
            path = output / name / shard
            contents = ((_file_name(key, files[name][key]), files[name][key]) for key in shards[shard])
            if path.exists():
                _verify(path, contents)
            else:
                with atomic_path(path) as temporary:
                    _write_tar(temporary, contents)
                written += 1
            bar.update()
    return written


def _file_name(key: str, member: Member) -> str:
    return f"{key}.{member.extension}" if member.extension else key


def _write_tar(path: Path, contents: Iterator[tuple[str, Member]]) -> None:
    """Write a tar whose bytes depend only on the names and contents of the files."""
    files = OpenFiles(1)
    with tarfile.open(path, "w", format=tarfile.PAX_FORMAT) as tar:
        for name, member in contents:
            content = files.read(member)
            entry = tarfile.TarInfo(name)
            entry.size = len(content)
            tar.addfile(entry, io.BytesIO(content))


def _verify(path: Path, contents: Iterator[tuple[str, Member]]) -> None:
    """Raise a :class:`UserError` unless a tar contains exactly these files."""
    files = OpenFiles(2)  # the tar itself and one that its content comes from
    existing = dict(_members(path))
    expected = dict(contents)
    for name, member in expected.items():
        if name not in existing or files.read(existing[name]) != files.read(member):
            raise UserError(f"{path} exists and differs from {member.path}; choose another output, or remove it")
    if list(existing) != list(expected):
        raise UserError(f"{path} exists with other keys or another order; choose another output, or remove it")


def _unpack(source: Path, output: Path, names: Sequence[str]) -> int:
    """Write every member of every shard as a file, and return the number of files that were written."""
    shards = [(name, path) for name in names for path in sorted((source / name).glob("*.tar"))]
    empty = sorted(set(names) - {name for name, _ in shards})
    if empty:
        raise UserError(f"{source / empty[0]}: contains no shards")
    members = {path: _members(path) for _, path in shards}
    keys_of = {name: {p.name: set(_keys_of(p, name)) for n, p in shards if n == name} for name in names}
    for name, keys in keys_of.items():
        if keys != keys_of[names[0]]:
            raise UserError(f"{source}: the shards of {names[0]} and {name} do not have the same keys")
    written = 0
    files = OpenFiles(1)
    member_of_inode: dict[tuple[int, int], str] = {}
    with tqdm(total=sum(map(len, members.values())), desc=str(output), unit=" files", disable=None) as bar:
        for name, shard in shards:
            for member_name, member in members[shard]:
                relative = PurePosixPath(member_name)
                if ".." in relative.parts or relative.is_absolute() or "\0" in member_name:
                    raise UserError(f"{shard}: member {member_name!r} would be written outside its folder")
                path = output / name / member_name
                content = files.read(member)
                if not path.exists():
                    with atomic_path(path) as temporary:
                        temporary.write_bytes(content)
                    written += 1
                elif path.read_bytes() != content:
                    raise UserError(f"{path} exists and differs from {member_name} of {shard}; choose another output")
                status = path.stat()  # a disk may equate names that differ in case or in the encoding of accents
                first = member_of_inode.setdefault((status.st_dev, status.st_ino), f"{shard} {member_name}")
                if first != f"{shard} {member_name}":
                    raise UserError(
                        f"{path}: member {member_name!r} of {shard} and {first} are the same file on this disk"
                    )
                bar.update()
    return written


def main(argv: list[str] | None = None) -> int:
    """Pack or unpack."""
    options = parse_options(PackOptions, argv, __doc__ or "", positional=("action", "source", "output"))
    written = pack(options)
    print(f"{options.output}: {written} files written")
    return 0


if __name__ == "__main__":
    run_cli(main)
