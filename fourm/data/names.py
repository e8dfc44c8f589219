"""What the name of a file, or of a member of a tar, says: key, extension and modality."""

from __future__ import annotations

import posixpath
import re
from collections.abc import Iterable, Mapping

from fourm.data.decoding import FORMATS, IMAGE_EXTENSIONS

_CLUTTER_FILES = {"thumbs.db", "ehthumbs.db", "desktop.ini", "icon\r"}
_CLUTTER_FOLDERS = {
    "__MACOSX", "@eaDir", ".AppleDouble", ".ipynb_checkpoints", ".Trashes", "$RECYCLE.BIN", "lost+found",
}  # fmt: skip
_SAME = (IMAGE_EXTENSIONS, ("txt", "text"))
_WORD = re.compile(r"[A-Za-z_][\w@-]*$")


def is_clutter(name: str) -> bool:
    """Whether a file is hidden, or one that operating systems leave: it is no sample."""
    folder, _, file = name.rpartition("/")
    if file[:1] == "." or (file[-1:] in "biIB\r" and file.lower() in _CLUTTER_FILES):
        return True
    return folder != "" and not _CLUTTER_FOLDERS.isdisjoint(folder.split("/"))


def split_name(name: str, own: tuple[str, ...] = ()) -> tuple[str, str]:
    """A file's key and extension: ``./a/12.5.json.gz`` → ``a/12.5``, ``json.gz``.

    The last known extension ends the key, so keys may have dots; of names with none that is known, the last dot.

    Args:
        own: names of the modality that all files belong to, which are not part of the key: ``0001.rgb.jpg`` → ``0001``.
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
    """Whether a decoder is known for files with an extension."""
    return extension in FORMATS or extension.lower().removesuffix(".gz") in FORMATS


class MemberNames:
    """Names in tars with all modalities: ``KEY.MODALITY.EXT``, or ``KEY.EXT`` where the extension names the modality.

    Args:
        known: what stands for a modality: folder names, names of modalities, extensions.
        name_map: folder → modality; of several for one modality, the first stands for all.
    """

    def __init__(self, known: Iterable[str], name_map: Mapping[str, str] | None = None):
        self._known = set(known) | set(name_map or ())
        self._dotted = tuple(name for name in self._known if "." in name)
        first: dict[str, str] = {}
        self._canonical = {folder: first.setdefault(mod, folder) for folder, mod in (name_map or {}).items()}
        self._same: dict[str, str] = {}
        for group in _SAME:
            used = {self._canonical.get(extension, extension) for extension in group if extension in self._known}
            if len(used) == 1:
                self._same.update(dict.fromkeys(group, used.pop()))

    def split(self, name: str) -> tuple[str, str, str, bool]:
        """Folder, key and extension of a member, and whether it is named exactly, rather than like another extension."""
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
        return self._same.get(lower, lower), key, extension, lower not in self._same


def common_folder(keys: Iterable[str]) -> str:
    """The folder that all keys are in: of ``a/b/1`` and ``a/b/c/2``, ``a/b``; empty if there is none."""
    folders = {key.rpartition("/")[0] for key in keys}
    return posixpath.commonpath(folders) if folders and "" not in folders else ""


def is_part_of_another(key: str, keys: Mapping[str, object]) -> bool:
    """Whether ``0001.depth`` of ``0001.depth.png`` is no key, but something more of sample ``0001``."""
    head, dot, last = key.rpartition(".")
    return bool(dot) and head in keys and _WORD.match(last) is not None
