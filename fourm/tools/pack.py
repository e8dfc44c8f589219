"""Folders of files → tar shards, and back; one more modality for shards that are there; tars of all modalities → one each.

    python -m fourm.tools.pack shards FOLDERS SHARDS --shard_size 1000
    python -m fourm.tools.pack add    FOLDERS SHARDS --modalities depth
    python -m fourm.tools.pack folders SHARDS FOLDERS
    python -m fourm.tools.pack split   TARS SHARDS --modalities jpg txt

Samples are matched by key, and nothing is written before every key is known to be in every modality. Files take their
names when they are complete; the same command goes on where an interrupted one stopped. What is there already stays as it
is: if it is not what would be written, that is an error.
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

KeysOfShards = dict[str, list[str]]
"""Shard → the keys of its samples, in their order."""


@dataclass(frozen=True)
class PackOptions:
    """What to pack or unpack."""

    action: Literal["shards", "add", "folders", "split"] = option(
        "what to make: shards, folders, a modality of shards (add), or shards of tars with all modalities (split)"
    )
    source: AnyPath = option("folder with a folder per modality; of 'split' with tars")
    output: AnyPath = option("folder for a folder per modality; of 'add' the shards that are there")
    modalities: tuple[str, ...] = option("names of the folders (default: all; 'add' needs them)", ())
    shard_size: int = option("samples of a shard", 1000, at_least=1, at_most=10**9)
    skip_incomplete: bool = option("leave out keys that a modality lacks, rather than stop", False)

    def __post_init__(self) -> None:
        resolve_options(self)
        if self.action == "add" and not self.modalities:
            raise UserError("'add' needs 'modalities': the folders to add to the shards")


def pack(options: PackOptions) -> int:
    """Do what ``options`` say.

    Returns:
        The number of files (tars, or unpacked files) that this call wrote.

    Raises:
        UserError: keys do not match, a file is damaged, something else is already there, or the disk refuses.
    """
    try:
        return _pack(options)
    except OSError as error:
        raise UserError(f"{error.filename or options.output}: {error.strerror or error}") from error


def _pack(options: PackOptions) -> int:
    source, output = Path(options.source), Path(options.output)
    shards, files = _whole_tars(source, options.modalities) if options.action == "split" else ({}, {})
    there = list(files) or existing_folders(source)
    for name in options.modalities:
        if name not in there:
            raise UserError(f"{source}: no folder '{name}'{did_you_mean(name, there)}; there are {', '.join(there)}")
    names = list(options.modalities or there)
    if not names:
        raise UserError(f"{source}: there is no folder in it; each modality is one")
    if source.resolve() == output.resolve():
        raise UserError(f"'source' and 'output' are the same folder, {source}")
    if options.action == "add" and not output.is_dir():
        raise UserError(f"{output}: there are no shards to add to")
    output.mkdir(parents=True, exist_ok=True)
    lock_folder(output)
    for leftover in (path for name in names for path in (output / name).rglob(".tmp-*")):
        leftover.unlink()  # of a process that was killed: this one has the folder for itself
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


def _whole_tars(source: Path, modalities: Sequence[str]) -> tuple[KeysOfShards, dict[str, dict[str, Member]]]:
    """The keys of tars that hold all modalities, and modality → key → member.

    Args:
        modalities: those to split off, if not all.
    """
    declared = {name: info["path"] or name for name, info in MODALITY_INFO.items()}
    names = MemberNames([*modalities, *declared, *declared.values()])
    shards: KeysOfShards = {}
    files: defaultdict[str, dict[str, Member]] = defaultdict(dict)
    for path in sorted(source.glob("*.tar")):
        keys: dict[str, None] = {}
        for member, place in _members(path):
            name, key, extension, _ = names.split(member)
            if modalities and name not in modalities:
                continue
            keys[key] = None
            place = place._replace(extension=extension)
            if (first := files[name].setdefault(key, place)) is not place:
                raise UserError(f"{path}: key {key!r} has a second {name}, beside the one in {first.path}")
        shards[path.name] = list(keys)
    if not files:
        raise UserError(f"{source}: there are no tars in it, or nothing is in them")
    return shards, dict(files)


def _files(source: Path, name: str) -> dict[str, Member]:
    """Key → file of one modality."""
    if any((source / name).glob("*.tar")):
        raise UserError(f"{source / name}: there are shards in it, not files; 'folders' unpacks them")
    index = index_folder(str(source / name), (name,))
    if index.collisions:
        raise UserError(f"{source / name}: {index.collision()}")
    if not index:
        raise UserError(f"{source / name}: there are no files in it")
    return index


def _new_shards(files: Mapping[str, Mapping[str, Member]], shard_size: int, skip_incomplete: bool) -> KeysOfShards:
    keys = sorted(_common_keys(files, skip_incomplete))
    starts = range(0, len(keys), shard_size)
    return {f"shard-{i:05d}.tar": keys[start : start + shard_size] for i, start in enumerate(starts)}


def _common_keys(files: Mapping[str, Mapping[str, Member]], skip_incomplete: bool) -> set[str]:
    """The keys that every modality has; another one is an error, or is left out."""
    keys = set[str]().union(*files.values())
    if not skip_incomplete:
        _require(files, sorted(keys), "the other modalities", "; 'skip_incomplete' leaves such keys out")
    elif not (keys := keys.intersection(*files.values())):
        raise UserError(f"no key is in all of {', '.join(files)}")
    return keys


def _require(files: Mapping[str, Mapping[str, Member]], keys: Sequence[str], where: str, advice: str = "") -> None:
    for name, members in files.items():
        missing = [key for key in keys if key not in members]
        if missing:
            raise UserError(
                f"modality {name} has no file for key '{missing[0]}' of {where}, nor for {len(missing) - 1} more{advice}"
            )


def _existing_shards(root: Path, exclude: Sequence[str]) -> KeysOfShards:
    """The keys of the shards that are there, in the order of the first modality; all modalities must agree."""
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


def _keys(folder: Path) -> KeysOfShards:
    return {path.name: _keys_of(path, folder.name) for path in sorted(folder.glob("*.tar"))}


def _keys_of(path: Path, name: str) -> list[str]:
    """The keys in a tar of modality ``name``."""
    keys = [split_name(member, (name,))[0] for member, _ in _members(path)]
    if twice := [key for key, number in Counter(keys).items() if number > 1]:
        raise UserError(f"{path}: key {twice[0]!r} has two members")
    return keys


def _members(path: Path) -> list[tuple[str, Member]]:
    """Name and place of what a tar holds; one that is damaged would make a loss permanent, and is an error."""
    try:
        return [(name, member) for name, member in members_of(str(path)) if not is_clutter(name)]
    except tarfile.ReadError as error:
        raise UserError(f"{path}: {error}") from error


def _write_shards(output: Path, shards: KeysOfShards, files: Mapping[str, Mapping[str, Member]]) -> int:
    """All shards of all modalities; those that are there must be the same, to the byte.

    Raises:
        UserError: another file is there.
    """
    pending = []
    for name in files:
        for path in sorted((output / name).glob("*.tar")) if (output / name).is_dir() else ():
            if path.name not in shards:
                raise UserError(f"{path} is there and would not be written; choose another output, or remove it")
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
    """The bytes depend on nothing but names and contents of the files."""
    files = OpenFiles(1)
    with tarfile.open(path, "w", format=tarfile.PAX_FORMAT) as tar:
        for name, member in contents:
            content = files.read(member)
            entry = tarfile.TarInfo(name)
            entry.size = len(content)
            tar.addfile(entry, io.BytesIO(content))


def _verify(path: Path, contents: Iterator[tuple[str, Member]]) -> None:
    """Raise a :class:`UserError` unless a tar holds just these files."""
    files = OpenFiles(2)  # the tar, and the one that its content comes from
    found = dict(_members(path))
    expected = dict(contents)
    for name, member in expected.items():
        if name not in found or files.read(found[name]) != files.read(member):
            raise UserError(f"{path} is there and differs from {member.path}; choose another output, or remove it")
    if list(found) != list(expected):
        raise UserError(f"{path} is there with other keys, or in another order; choose another output, or remove it")


def _unpack(source: Path, output: Path, names: Sequence[str]) -> int:
    """Every member of every shard as a file."""
    shards = [(name, path) for name in names for path in sorted((source / name).glob("*.tar"))]
    if empty := sorted(set(names) - {name for name, _ in shards}):
        raise UserError(f"{source / empty[0]}: there are no shards in it")
    members = {path: _members(path) for _, path in shards}
    keys_of = {name: {p.name: set(_keys_of(p, name)) for n, p in shards if n == name} for name in names}
    for name, keys in keys_of.items():
        if keys != keys_of[names[0]]:
            raise UserError(f"{source}: the shards of {names[0]} and {name} do not have the same keys")
    written, files = 0, OpenFiles(1)
    places: dict[tuple[int, int], str] = {}
    with tqdm(total=sum(map(len, members.values())), desc=str(output), unit=" files", disable=None) as bar:
        for name, shard in shards:
            for member, place in members[shard]:
                if ".." in PurePosixPath(member).parts or PurePosixPath(member).is_absolute() or "\0" in member:
                    raise UserError(f"{shard}: member {member!r} would be written outside its folder")
                path, content = output / name / member, files.read(place)
                if not path.exists():
                    with atomic_path(path) as temporary:
                        temporary.write_bytes(content)
                    written += 1
                elif path.read_bytes() != content:
                    raise UserError(f"{path} is there and differs from {member} of {shard}; choose another output")
                status = path.stat()  # names may be the same to the disk: by case, or by how accents are written
                other = places.setdefault((status.st_dev, status.st_ino), f"{shard} {member}")
                if other != f"{shard} {member}":
                    raise UserError(f"{path}: member {member!r} of {shard} and {other} are the same file on this disk")
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
