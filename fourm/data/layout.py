"""Interpret ``data_path``, and assign folders to modalities."""

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
_MAX_FILES = 10**6


def is_remote(path: str) -> bool:
    """Return whether a path is a URL of an object store or web server."""
    return path.startswith(("s3://", "https://", "http://"))


def split_data_path(data_path: str) -> tuple[str, list[str] | None]:
    """Split a path into a pattern, with ``\\0`` in place of ``[a,b]``, and the folder names in the brackets, if any.

    Raises:
        UserError: The scheme is not supported, or there are several pairs of brackets.
    """
    if re.match(r"\w+:", data_path) and not is_remote(data_path):
        raise UserError(f"data_path {redact_url(data_path)}: only local files, s3:// and http(s):// can be read")
    parts = re.split(r"\[(.*?)\]", data_path)
    if len(parts) == 1:
        return data_path, None
    if len(parts) != 3:
        raise UserError(
            f"data_path {redact_url(data_path)}: expected exactly one pair of brackets, around the modality folders"
        )
    return f"{parts[0]}\0{parts[2]}", [name.strip() for name in parts[1].split(",") if name.strip()]


def expand(pattern: str, folder: str | None) -> list[str]:
    """Return the files that ``pattern`` names for one modality folder; braces, ``*`` and ``?`` are expanded.

    Raises:
        UserError: The braces are invalid or name too many files, or no file matches ``*``.
    """
    return [
        path if folder is None else path.replace("\0", folder)
        for path in shard_patterns(pattern, [] if folder is None else [folder])
    ]


def shard_patterns(pattern: str, folders: Iterable[str]) -> list[str]:
    """Return a path per shard with ``\\0`` in place of its folder; ``*`` matches the shards in any of ``folders``."""
    paths = expand_braces(pattern)
    return paths if is_remote(pattern) else [shard for path in paths for shard in _glob_shards(path, list(folders))]


def expand_braces(pattern: str) -> list[str]:
    """Expand the ranges and lists in the braces of a pattern.

    Raises:
        UserError: The braces are invalid or name too many files.
    """
    ranges = re.findall(r"\{(-?\d+)\.\.(-?\d+)", pattern)
    if math.prod(abs(int(last) - int(first)) + 1 for first, last in ranges) <= _MAX_FILES:
        try:
            names = list(itertools.islice(braceexpand.braceexpand(pattern, escape=False), _MAX_FILES + 1))
        except (ValueError, RecursionError):
            raise UserError(f"{redact_url(pattern)}: its braces are unbalanced or nested too deeply") from None
        if len(names) <= _MAX_FILES:
            return [os.path.expanduser(name) if name.startswith("~") else name for name in names]
    raise UserError(f"{redact_url(pattern)}: its braces name more than {_MAX_FILES} files")


def _glob_shards(path: str, folders: list[str]) -> list[str]:
    if not re.search("[*?]", path) or os.path.exists(path):
        return [path]
    shards: set[str] = set()
    for folder in folders or [""]:
        regex = "".join(
            f"([^/]{part})" if part == "*" else "([^/])" if part == "?" else re.escape(part.replace("\0", folder))
            for part in re.split("([*?])", path)
        )
        for match in glob.iglob(re.sub(r"\[", "[[]", path.replace("\0", folder))):
            groups = iter(re.fullmatch(regex, match).groups())  # type: ignore[union-attr]
            shards.add("".join(next(groups) if part in ("*", "?") else part for part in re.split("([*?])", path)))
    if not shards:
        pattern = path.replace("\0", f"[{','.join(folders)}]")
        raise UserError(f"data_path {pattern}: no file matches it")
    return sorted(shards)


def wanted_names(modalities: Mapping[str, Modality]) -> dict[str, str]:
    """Return the entries that a sample must have, with their default folders.

    Tokens need ``crop_settings``, the crops that they were computed for, only if another modality follows these crops.
    """
    names = {name: modality.path or name for name, modality in modalities.items()}
    if any(modality.pretokenized for modality in modalities.values()) and needs_coordinates(modalities):
        names[CROP_SETTINGS] = CROP_SETTINGS
    return names


def needs_coordinates(modalities: Mapping[str, Modality]) -> bool:
    """Return whether a modality needs the coordinates of the crop instead of having a value per stored crop."""
    transforms = transforms_for(modalities).values()
    return any(transform.follows_crop and not isinstance(transform, PerCropTransform) for transform in transforms)


def assign_folders(
    wanted: Mapping[str, str], folders: Iterable[str], name_map: Mapping[str, str] | None, where: str
) -> dict[str, str]:
    """Find the folder of each wanted modality.

    Args:
        wanted: Modality → its default folder name.
        folders: The existing folders.
        name_map: ``modality_name_map`` of the data YAML, folder → modality.
        where: Path for error messages.

    Raises:
        UserError: A modality has no folder.
    """
    folders = list(folders)
    name_map = name_map or {}
    assigned = {}
    for name, default in wanted.items():
        mapped = [folder for folder in folders if name_map.get(folder) == name]
        candidates = mapped or [folder for folder in (default, name) if folder in folders]
        if not candidates:
            raise UserError(
                f"{where}: no folder for modality {name}{did_you_mean(default, folders)}; there are "
                f"{', '.join(sorted(folders)) or 'none'}; set 'modality_name_map' if one of them is the modality"
            )
        assigned[name] = candidates[0]
    return assigned


def existing_folders(root: str | Path) -> list[str]:
    """Return the names of the folders in ``root``, without hidden ones."""
    try:
        return sorted(entry.name for entry in Path(root).iterdir() if entry.is_dir() and not entry.name.startswith("."))
    except OSError as error:
        raise UserError(f"data_path {root}: {error.strerror}") from error
