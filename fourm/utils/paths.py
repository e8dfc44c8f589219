"""Expand paths such as ``~/data`` and ``$DATA/cc12m``, and locate the files that a configuration names."""

from __future__ import annotations

import os
import re
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated

from fourm.utils.errors import UserError

PACKAGE = Path(__file__).parents[1]
_VARIABLE = re.compile(r"\$(?:([A-Za-z_]\w*)|\{([A-Za-z_]\w*)\})")


@dataclass(frozen=True)
class PathKind:
    """How a configuration key that holds a path is interpreted.

    Attributes:
        relative_to_config: Whether to look for the file also in the folder of the configuration that names it, and
            above.
        may_be_empty: Whether an empty string is allowed; it means that the key is not set.
    """

    relative_to_config: bool = False
    may_be_empty: bool = True


AnyPath = Annotated[str, PathKind()]
OutputPath = Annotated[str, PathKind(may_be_empty=False)]
InputPath = Annotated[str, PathKind(relative_to_config=True)]


def expand_path(path: str, where: str = "path") -> str:
    """Replace ``~``, ``$NAME`` and ``${NAME}`` in a path; URLs, hub ids and patterns are returned unchanged.

    Args:
        path: The path as the user typed it.
        where: The key that error messages name.

    Raises:
        UserError: If a variable is not set, a user does not exist, or the path contains a NUL character.
    """
    if re.match(r"\w+://", path):
        return path
    if "\0" in path:
        raise UserError(f"{where}: there is a NUL character in {path!r}, which no path may contain")

    def value(match: re.Match[str]) -> str:
        name = match[1] or match[2]
        if name not in os.environ:
            raise UserError(f"{where}: the environment variable ${name} in {path!r} is not set")
        return os.environ[name]

    expanded = os.path.expanduser(_VARIABLE.sub(value, path))
    if re.match(r"~[\w.-]*(/|$)", expanded):
        raise UserError(
            f"{where}: {path!r} names the home of {expanded[1:].split('/')[0]!r}, but there is no such user"
        )
    return expanded


def shipped(path: str) -> str:
    """Return where a published configuration ``cfgs/…``, or a vocabulary or model ``fourm/…``, is in the package.

    A file or folder of this name in the working directory goes first. Other paths are returned unchanged.
    """
    if path.startswith(("cfgs/", "fourm/")) and not os.path.lexists(path):
        for folder in (PACKAGE, PACKAGE.parent):  # installed; in the repository
            if (folder / path).exists():
                return str(folder / path)
    return path


def locate(name: str, config: str | Path | None) -> str:
    """Find a file or folder that a configuration names.

    It is searched for in the working directory, in the parents of the configuration, and among the published
    configurations (:func:`shipped`).

    Args:
        name: The path as it stands in the configuration.
        config: The configuration file, or None for a command line.

    Returns:
        The path of the file; ``name`` itself if it is absolute, exists in the working directory, or exists nowhere.
    """
    if not name or os.path.isabs(name) or re.match(r"\w+://", name) or os.path.lexists(name):
        return name
    for folder in Path(config).resolve().parents if config is not None else ():
        try:
            if (folder / name).exists():
                return str(folder / name)
        except OSError:  # the name is too long for a file
            return name
    return shipped(name)
