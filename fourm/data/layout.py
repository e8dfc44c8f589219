"""Where a data set lies: what ``data_path`` stands for, and which folder feeds which modality."""

from __future__ import annotations

import itertools
import re
from collections.abc import Iterable, Mapping
from pathlib import Path

import braceexpand

from fourm.data.modality_info import Modality
from fourm.utils.errors import UserError, did_you_mean
from fourm.utils.transfer import shown

_MAX_NAMES = 200_000  # that one pattern may stand for
CROP_SETTINGS = "crop_settings"


def is_remote(path: str) -> bool:
    """Whether a path is the URL of something in an object store or on a web server."""
    return path.startswith(("s3://", "https://", "http://"))


def split_data_path(data_path: str) -> tuple[str, list[str] | None]:
    """The path with ``{}`` in place of its ``[a,b]``, and the folder names in the brackets (None without brackets).

    Raises:
        UserError: a path that cannot be read, or has several pairs of brackets.
    """
    if re.match(r"\w+:", data_path) and not is_remote(data_path):
        raise UserError(f"data_path {data_path}: only local files, s3:// and http(s):// can be read")
    parts = re.split(r"\[(.*?)\]", data_path)
    if len(parts) == 1:
        return data_path, None
    if len(parts) != 3:
        raise UserError(
            f"data_path {shown(data_path)}: there must be one pair of brackets, around the modality folders"
        )
    return f"{parts[0]}\0{parts[2]}", [name.strip() for name in parts[1].split(",") if name.strip()]


def expand(pattern: str, folder: str | None) -> list[str]:
    """The files that ``pattern`` names for one modality folder: ranges in braces are written out.

    Raises:
        UserError: braces that are not balanced, or name too many files.
    """
    pattern = pattern if folder is None else pattern.replace("\0", folder)
    try:
        names = list(itertools.islice(braceexpand.braceexpand(pattern, escape=False), _MAX_NAMES + 1))
    except (ValueError, RecursionError) as error:
        raise UserError(f"data_path {shown(pattern)}: its braces are not balanced, or nested too deep") from error
    if len(names) > _MAX_NAMES:
        raise UserError(f"data_path {shown(pattern)}: its braces name more than {_MAX_NAMES:,} files")
    return names


def wanted_names(modalities: Mapping[str, Modality]) -> dict[str, str]:
    """The entries that a sample must have, with their usual folder; tokens come with the crops they were computed for."""
    names = {name: modality.path or name for name, modality in modalities.items()}
    if any(modality.pretokenized for modality in modalities.values()):
        names[CROP_SETTINGS] = CROP_SETTINGS
    return names


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


def split_name(name: str) -> tuple[str, str]:
    """A file's key and extension: ``a/0001.json.gz`` → ``a/0001``, ``json.gz``."""
    stem, _, extension = name[name.rfind("/") + 1 :].partition(".")
    return name[: len(name) - len(extension) - 1] if extension else name, extension


def split_member(name: str, folder: str | None = None) -> tuple[str, str, str]:
    """Folder, key and extension of a member of a tar.

    Args:
        folder: of all members of the tar; None: each names its own, ``0001.rgb.jpg``, or is in that of its extension,
            ``0001.jpg``.
    """
    key, extension = split_name(name)
    if folder is None:
        folder, _, rest = extension.partition(".")
        extension = rest or folder
    return folder, key, extension


def existing_folders(root: str | Path) -> list[str]:
    """Names of the folders in ``root``."""
    try:
        return sorted(entry.name for entry in Path(root).iterdir() if entry.is_dir() and not entry.name.startswith("."))
    except OSError as error:
        raise UserError(f"data_path {root}: {error.strerror}") from error
