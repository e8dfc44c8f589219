"""Where a data set lies: what ``data_path`` stands for, and which folder feeds which modality."""

from __future__ import annotations

import glob
import itertools
import math
import os
import re
from collections.abc import Iterable, Mapping
from pathlib import Path

import braceexpand

from fourm.data.modality_info import Modality
from fourm.data.modality_transforms import transforms_for
from fourm.data.transforms.tokens import PerCropTransform
from fourm.utils.errors import UserError, did_you_mean
from fourm.utils.urls import redact_url

CROP_SETTINGS = "crop_settings"
_MOST_FILES = 10**6


def is_remote(path: str) -> bool:
    """Whether a path is the URL of something in an object store or on a web server."""
    return path.startswith(("s3://", "https://", "http://"))


def split_data_path(data_path: str) -> tuple[str, list[str] | None]:
    """The path with ``{}`` in place of its ``[a,b]``, and the folder names in the brackets (None without brackets).

    Raises:
        UserError: a path that cannot be read, or has several pairs of brackets.
    """
    if re.match(r"\w+:", data_path) and not is_remote(data_path):
        raise UserError(f"data_path {redact_url(data_path)}: only local files, s3:// and http(s):// can be read")
    parts = re.split(r"\[(.*?)\]", data_path)
    if len(parts) == 1:
        return data_path, None
    if len(parts) != 3:
        raise UserError(
            f"data_path {redact_url(data_path)}: there must be one pair of brackets, around the modality folders"
        )
    return f"{parts[0]}\0{parts[2]}", [name.strip() for name in parts[1].split(",") if name.strip()]


def expand(pattern: str, folder: str | None) -> list[str]:
    """The files that ``pattern`` names for one modality folder: ranges in braces are written out, ``*`` and ``?`` looked up.

    Raises:
        UserError: braces that cannot be read or name too many files, or ``*`` that nothing matches.
    """
    return [
        path if folder is None else path.replace("\0", folder)
        for path in shard_patterns(pattern, [] if folder is None else [folder])
    ]


def shard_patterns(pattern: str, folders: Iterable[str]) -> list[str]:
    """One path for each shard, with ``\0`` in place of its folder; with ``*`` those that any of the ``folders`` has."""
    paths = expand_braces(pattern)
    return paths if is_remote(pattern) else [found for path in paths for found in _matching(path, list(folders))]


def expand_braces(pattern: str) -> list[str]:
    """All that a pattern with ranges and lists in braces names.

    Raises:
        UserError: braces that cannot be read or name too many files.
    """
    ranges = re.findall(r"\{(-?\d+)\.\.(-?\d+)", pattern)
    if math.prod(abs(int(last) - int(first)) + 1 for first, last in ranges) <= _MOST_FILES:
        try:
            names = list(itertools.islice(braceexpand.braceexpand(pattern, escape=False), _MOST_FILES + 1))
        except (ValueError, RecursionError):
            raise UserError(f"{redact_url(pattern)}: its braces are not balanced, or nested too deep") from None
        if len(names) <= _MOST_FILES:
            return [os.path.expanduser(name) if name.startswith("~") else name for name in names]
    raise UserError(f"{redact_url(pattern)}: its braces name more than {_MOST_FILES} files")


def _matching(path: str, folders: list[str]) -> list[str]:
    if not re.search("[*?]", path) or os.path.exists(path):
        return [path]
    found: set[str] = set()
    for folder in folders or [""]:
        wild = "".join(
            f"([^/]{part})" if part == "*" else "([^/])" if part == "?" else re.escape(part.replace("\0", folder))
            for part in re.split("([*?])", path)
        )
        for match in glob.iglob(re.sub(r"\[", "[[]", path.replace("\0", folder))):
            groups = iter(re.fullmatch(wild, match).groups())  # type: ignore[union-attr]
            found.add("".join(next(groups) if part in ("*", "?") else part for part in re.split("([*?])", path)))
    if not found:
        shown_path = path.replace("\0", f"[{','.join(folders)}]")
        raise UserError(f"data_path {shown_path}: no file matches it")
    return sorted(found)


def wanted_names(modalities: Mapping[str, Modality]) -> dict[str, str]:
    """The entries that a sample must have, with their usual folder.

    Tokens come with the crops that they were computed for, unless nothing else needs to know where these lie.
    """
    names = {name: modality.path or name for name, modality in modalities.items()}
    if any(modality.pretokenized for modality in modalities.values()) and needs_coordinates(modalities):
        names[CROP_SETTINGS] = CROP_SETTINGS
    return names


def needs_coordinates(modalities: Mapping[str, Modality]) -> bool:
    """Whether anything follows the crop itself, rather than having a value for each stored one."""
    transforms = transforms_for(modalities).values()
    return any(transform.follows_crop and not isinstance(transform, PerCropTransform) for transform in transforms)


def assign_folders(
    wanted: Mapping[str, str], folders: Iterable[str], name_map: Mapping[str, str] | None, where: str
) -> dict[str, str]:
    """Find the folder of each wanted modality.

    Args:
        wanted: modality → its usual folder name.
        folders: those that are there.
        name_map: ``modality_name_map`` of the data YAML, folder → modality.
        where: the path that errors name.

    Raises:
        UserError: none of the folders belongs to a modality.
    """
    folders, name_map = list(folders), name_map or {}
    found = {}
    for name, usual in wanted.items():
        mapped = [folder for folder in folders if name_map.get(folder) == name]
        options = mapped or [folder for folder in (usual, name) if folder in folders]
        if not options:
            raise UserError(
                f"{where}: no folder for modality {name}{did_you_mean(usual, folders)}; there are "
                f"{', '.join(sorted(folders)) or 'none'}; 'modality_name_map' can say which one it is"
            )
        found[name] = options[0]
    return found


def existing_folders(root: str | Path) -> list[str]:
    """Names of the folders in ``root``."""
    try:
        return sorted(entry.name for entry in Path(root).iterdir() if entry.is_dir() and not entry.name.startswith("."))
    except OSError as error:
        raise UserError(f"data_path {root}: {error.strerror}") from error
