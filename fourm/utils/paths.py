"""Paths as people type them, ``~/data`` and ``$DATA/cc12m``, and files that a configuration names."""

from __future__ import annotations

import os
import re
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated

from fourm.utils.errors import UserError

_VARIABLE = re.compile(r"\$(?:([A-Za-z_]\w*)|\{([A-Za-z_]\w*)\})")


@dataclass(frozen=True)
class PathKind:
    """How a key of a configuration that holds a path is read.

    Attributes:
        beside: a file that is there already: also looked for beside the configuration that names it, and above.
        may_be_empty: an empty text means that the key is not set.
    """

    beside: bool = False
    may_be_empty: bool = True


AnyPath = Annotated[str, PathKind()]
OutputPath = Annotated[str, PathKind(may_be_empty=False)]
InputPath = Annotated[str, PathKind(beside=True)]


def expand_path(path: str, where: str = "path") -> str:
    """``path`` with ``~``, ``$NAME`` and ``${NAME}`` replaced; URLs, ids of the hub and patterns stay what they are.

    Args:
        where: what errors name: the key.

    Raises:
        UserError: a variable that is not set, a user who does not exist, or a NUL character.
    """
    if re.match(r"\w+://", path):
        return path
    if "\0" in path:
        raise UserError(f"{where}: there is a NUL character in {path!r}, which no path can have")

    def value(found: re.Match[str]) -> str:
        name = found[1] or found[2]
        if name not in os.environ:
            raise UserError(f"{where}: the environment variable ${name} in {path!r} is not set")
        return os.environ[name]

    expanded = os.path.expanduser(_VARIABLE.sub(value, path))
    if re.match(r"~[\w.-]*(/|$)", expanded):
        raise UserError(f"{where}: there is no user {expanded[1:].split('/')[0]!r}, whose home {path!r} would be")
    return expanded


def locate(name: str, config: str | Path | None) -> str:
    """A file or folder that a configuration names: from the working directory, else beside the configuration or above it.

    Args:
        config: the configuration; None: a command line.

    Returns:
        ``name`` itself if it is an absolute path, is there from the working directory, or is nowhere.
    """
    if not name or config is None or os.path.isabs(name) or re.match(r"\w+://", name) or os.path.lexists(name):
        return name
    for folder in Path(config).resolve().parents:
        try:
            if (folder / name).exists():
                return str(folder / name)
        except OSError:  # a name longer than any can be
            return name
    return name
