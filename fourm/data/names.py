"""Parse names of files and tar members into key, extension and modality."""

from __future__ import annotations

import posixpath
import re
from collections.abc import Iterable, Mapping

from fourm.data.decoding import FORMATS, IMAGE_EXTENSIONS

_CLUTTER_FILES = {"thumbs.db", "ehthumbs.db", "desktop.ini", "icon\r"}
_CLUTTER_FOLDERS = {
    "__MACOSX",
    "@eaDir",
    ".AppleDouble",
    ".ipynb_checkpoints",
    ".Trashes",
    "$RECYCLE.BIN",
    "lost+found",
}
_EQUIVALENT_EXTENSIONS = (IMAGE_EXTENSIONS, ("txt", "text"))
_WORD = re.compile(r"[A-Za-z_][\w@-]*$")


def is_clutter(name: str) -> bool:
    """Return whether a file is hidden or created by an operating system, and so is not part of a sample."""
    folder, _, file = name.rpartition("/")
    if file[:1] == "." or (file[-1:] in "biIB\r" and file.lower() in _CLUTTER_FILES):
        return True
    return folder != "" and not _CLUTTER_FOLDERS.isdisjoint(folder.split("/"))


def split_name(name: str, own: tuple[str, ...] = ()) -> tuple[str, str]:
    """Split a file name into key and extension: ``./a/12.5.json.gz`` → ``a/12.5``, ``json.gz``.

    The key ends at the last dot, or before a known extension and ``.gz``, so keys may contain dots.

    Args:
        name: Name of the file.
        own: Names of the modality that all files belong to, which are not part of the key: ``0001.rgb.jpg`` → ``0001``.
    """
    if "/" in name and (name.startswith(("./", "/")) or "//" in name or "/./" in name):
        name = posixpath.normpath(name).lstrip("/")
    stem, _, extension = name.rpartition(".")
    if not stem or "/" in extension or stem.endswith("/"):
        return name, ""
    if extension in ("gz", "GZ"):
        inner, dot, before = stem.rpartition(".")
        if dot and before.lower() in FORMATS and inner and not inner.endswith("/"):
            stem, extension = inner, f"{before}.{extension}"
    for modality in own if "." in stem else ():
        if stem.endswith(f".{modality}") and not stem.endswith(f"/.{modality}") and len(stem) > len(modality) + 1:
            return stem[: -len(modality) - 1], extension
    return stem, extension


def is_readable(extension: str) -> bool:
    """Return whether there is a decoder for an extension."""
    return extension in FORMATS or extension.lower().removesuffix(".gz") in FORMATS


class MemberNames:
    """Parses names in tars with all modalities: ``KEY.MODALITY.EXT``, or ``KEY.EXT`` if the extension is the modality.

    Args:
        known: Names that stand for a modality: folder names, modality names, extensions.
        name_map: Folder → modality. If several folders map to one modality, the first stands for all.
    """

    def __init__(self, known: Iterable[str], name_map: Mapping[str, str] | None = None):
        self._known = set(known) | set(name_map or ())
        self._dotted = tuple(name for name in self._known if "." in name)
        first: dict[str, str] = {}
        self._canonical = {folder: first.setdefault(mod, folder) for folder, mod in (name_map or {}).items()}
        self._equivalents: dict[str, str] = {}
        for group in _EQUIVALENT_EXTENSIONS:
            used = {self._canonical.get(extension, extension) for extension in group if extension in self._known}
            if len(used) == 1:
                self._equivalents.update(dict.fromkeys(group, used.pop()))

    def split(self, name: str) -> tuple[str, str, str, bool]:
        """Return folder, key and extension, and whether the name matches exactly rather than by a similar extension."""
        key, extension = split_name(name)
        head, dot, last = key.rpartition(".")
        if dot and last in self._known and head and not head.endswith("/"):
            return self._canonical.get(last, last), head, extension, True
        for dotted in self._dotted:
            if key.endswith(f".{dotted}"):
                return self._canonical.get(dotted, dotted), key[: -len(dotted) - 1], extension, True
        for folder in (extension, extension.lower(), extension.lower().removesuffix(".gz")):
            if folder in self._known:
                return self._canonical.get(folder, folder), key, extension, True
        lower = extension.lower().removesuffix(".gz")
        return self._equivalents.get(lower, lower), key, extension, lower not in self._equivalents


def common_folder(keys: Iterable[str]) -> str:
    """Return the folder that contains all keys (``a/b`` for ``a/b/1`` and ``a/b/c/2``), or an empty string."""
    folders = {key.rpartition("/")[0] for key in keys}
    return posixpath.commonpath(folders) if folders and "" not in folders else ""


def is_part_of_another(key: str, keys: Mapping[str, object]) -> bool:
    """Return whether a key like ``0001.depth`` (of ``0001.depth.png``) is another modality of sample ``0001``."""
    head, dot, last = key.rpartition(".")
    return bool(dot) and head in keys and _WORD.match(last) is not None
